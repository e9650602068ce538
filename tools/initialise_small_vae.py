"""Make the small VAE's linear path: a lapped transform in space, a DCT in time, and the PCA of their coefficients.

    python -m tools.initialise_small_vae --data SHARDS --output DIR [--channels 48] [--extend VAE]
        [--clips 400] [--seed 0]

The lapped transform is the 8-point DCT behind a pre-filter across block borders [Tran, Liang, Tu 2003: time-domain
lapped transform], orthonormal, its windows 16 pixels wide. Of its 3 x 4 x 8 x 8 coefficients per block the first
`z_dim` principal axes of real clips (the member `hr` of a dataset folder) become the latent. The convolutions begin as
zero. The folder written is what `--stage codec` takes as `--init`.

`--extend` adds channels to a trained one: the principal axes of what it loses, orthogonal to its own. Its channels stay
what they are, and `tools.more_channels` gives a model that was trained on them the new ones.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError, run_command
from common.progress import progress
from datagen.dataset.loader import ShardReader
from pipeline.model.small_vae import GROUP, OVERLAP, STRIDE, WINDOW, SmallVideoVAE
from pipeline.model.vae import load_vae, to_pixels
from tools.fit_tiny_vae import normalise_by


def cosines(size: int, kind: int) -> Tensor:
    """The orthonormal DCT-II or DCT-IV, float64 (size, size): rows are basis functions."""
    k, n = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)[None]
    if kind == 4:
        return math.sqrt(2 / size) * torch.cos(math.pi / size * (n + 0.5) * (k + 0.5))
    matrix = math.sqrt(2 / size) * torch.cos(math.pi / size * (n + 0.5) * k)
    matrix[0] /= math.sqrt(2)
    return matrix


def lapped_transform() -> Tensor:
    """Analysis of one block, float64 (8, 16): T with Σ_n T_nᵀ T_n = identity over overlapping blocks n.

    Its pre-filter is P = ½ [I J; J -I] diag(I, V) [I J; J -I], V = J·C2ᵀ·C4·J, orthogonal.
    """
    half = STRIDE // 2
    flip = torch.eye(half, dtype=torch.float64).flip(0)
    eye = torch.eye(half, dtype=torch.float64)
    butterfly = torch.cat([torch.cat([eye, flip], 1), torch.cat([flip, -eye], 1)])
    inner = torch.block_diag(eye, flip @ cosines(half, 2).T @ cosines(half, 4) @ flip)
    prefilter = butterfly @ inner @ butterfly / 2
    return cosines(STRIDE, 2) @ torch.block_diag(prefilter[half:], prefilter[:half])


def coefficients(pixels: Tensor) -> Tensor:
    """Pixels (B, 3, 4k+1, H, W) to the lapped coefficients of each block, (N, 3·4·8·8), float32."""
    spatial, temporal = lapped_transform().float(), cosines(GROUP, 2).float()
    groups = torch.cat([pixels[:, :, :1].expand(-1, -1, GROUP, -1, -1), pixels[:, :, 1:]], dim=2)
    padded = torch.nn.functional.pad(groups, (*(OVERLAP,) * 4, 0, 0), mode="replicate")
    windows = padded.unfold(2, GROUP, GROUP).unfold(3, WINDOW, STRIDE).unfold(4, WINDOW, STRIDE)
    found = torch.einsum("bctyxfij,gf,ki,lj->btyxcgkl", windows, temporal, spatial, spatial)
    return found.flatten(4).flatten(0, 3)


def kernels(axes: Tensor) -> Tensor:
    """Principal axes (z_dim, 3·4·8·8) of coefficients as kernels on pixels, (z_dim, 3, 4, 16, 16)."""
    spatial, temporal = lapped_transform().float(), cosines(GROUP, 2).float()
    shaped = axes.unflatten(1, (3, GROUP, STRIDE, STRIDE))
    return torch.einsum("zcgkl,gf,ki,lj->zcfij", shaped, temporal, spatial, spatial)


@torch.no_grad()
def initialise(vae: SmallVideoVAE, clips: list[Tensor]) -> None:
    """Set the linear path and the normalisation from clips (3, F, H, W) in [-1, 1].

    Uncentred axes: mid-grey is the natural origin, a mean of one collection would tint another.
    """
    size = 3 * GROUP * STRIDE**2
    covariance, count = torch.zeros((size, size), dtype=torch.float64), 0
    for clip in clips:
        vectors = coefficients(clip[None])
        covariance += (vectors.T @ vectors).double()
        count += len(vectors)
    _, axes = torch.linalg.eigh(covariance / count)
    kernel = kernels(axes.flip(1)[:, : vae.config.z_dim].T.float())
    for layer in (vae.linear_encode, vae.linear_decode):
        layer.weight.copy_(kernel)
        layer.bias.zero_()
    normalise_by(vae, torch.cat([vae.encode(clip[None]).latent_dist.mode() for clip in clips]))


@torch.no_grad()
def extend(vae: SmallVideoVAE, clips: list[Tensor], channels: int) -> SmallVideoVAE:
    """A VAE of `channels` channels: those of `vae`, unchanged, and principal axes of its error on clips (3, F, H, W).

    The axes are orthogonal to its linear decoder, and only the linear path knows them. What its convolutions already
    put there is counted twice until the decoder is trained.

    Raises:
        UserError: `channels` are no more than it has.
    """
    have = vae.config.z_dim
    if channels <= have:
        raise UserError(f"--channels {channels}: the VAE to extend has {have} already; ask for more")
    size = 3 * GROUP * STRIDE**2
    covariance = torch.zeros((size, size), dtype=torch.float64)
    for clip in clips:
        error = coefficients(clip[None] - vae.decode(vae.encode(clip[None]).latent_dist.mode()).sample)
        covariance += (error.T @ error).double()
    own, _ = torch.linalg.qr(_as_coefficients(vae.linear_decode.weight).double().T)
    beside = torch.eye(size, dtype=torch.float64) - own @ own.T
    _, axes = torch.linalg.eigh(beside @ covariance @ beside)
    result = SmallVideoVAE.from_config(vae.config, z_dim=channels)
    old = vae.state_dict()
    for name, new in result.state_dict().items():
        # channels come first or second in a weight; the decoder's convolutions see a latent frame and the one before
        new.zero_()
        if name == "decoder.0.weight":
            new.unflatten(1, (2, channels))[:, :, :have] = old[name].unflatten(1, (2, have))
        else:
            new[tuple(slice(length) for length in old[name].shape)] = old[name]
    kernel = kernels(axes.flip(1)[:, : channels - have].T.float())
    for layer in (result.linear_encode, result.linear_decode):
        layer.weight[have:] = kernel
    normalise_by(result, torch.cat([result.encode(clip[None]).latent_dist.mode() for clip in clips]))
    for name in ("latents_mean", "latents_std"):
        given, found = vae.config[name], result.config[name]
        unit = sum(given) / sum(found[:have]) if name == "latents_std" else 1.0
        result.register_to_config(**{name: [*given, *(unit * value for value in found[have:])]})
    return result


def _as_coefficients(weight: Tensor) -> Tensor:
    """Kernels on pixels (z_dim, 3, 4, 16, 16) as lapped coefficients (z_dim, 3·4·8·8): the inverse of `kernels`."""
    spatial, temporal = lapped_transform().float(), cosines(GROUP, 2).float()
    return torch.einsum("zcfij,gf,ki,lj->zcgkl", weight, temporal, spatial, spatial).flatten(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="dataset folder with stored clips (store_clips: true)")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--channels", type=int, default=48)
    parser.add_argument("--extend", type=Path, help="VAE folder whose channels are kept, with new ones beside them")
    parser.add_argument("--clips", type=int, default=400, help="clips of the dataset that are looked at")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    reader = ShardReader(arguments.data, members=("hr",), split="train", seed=arguments.seed, global_batch_size=1)
    clips = []
    batches = iter(reader)
    with progress(min(arguments.clips, len(reader)), "reading", "clip") as bar:
        for _ in range(min(arguments.clips, len(reader))):
            clips.append(to_pixels(next(batches).tensors["hr"][0]))
            bar.advance(1)
    if arguments.extend is None:
        vae = SmallVideoVAE(z_dim=arguments.channels)
        initialise(vae, clips)
    else:
        trained = load_vae(arguments.extend)
        if not isinstance(trained, SmallVideoVAE):
            raise UserError(f"--extend {arguments.extend} holds a {type(trained).__name__}; it takes a SmallVideoVAE")
        vae = extend(trained, clips, arguments.channels)
    vae.save_pretrained(arguments.output)
    record = {
        "command": " ".join(["python -m tools.initialise_small_vae", *sys.argv[1:]]),
        "seed": arguments.seed,
        "clips": len(clips),
    }
    (arguments.output / "initialise.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"VAE: {arguments.output}")


if __name__ == "__main__":
    run_command(main)
