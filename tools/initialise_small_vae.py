"""Make the small VAE's linear path: a lapped transform in space, a DCT in time, and the PCA of their coefficients.

    python -m tools.initialise_small_vae --data SHARDS --output DIR [--clips 400] [--seed 0]

The lapped transform is the 8-point DCT behind a pre-filter across block borders [Tran, Liang, Tu 2003: time-domain
lapped transform], orthonormal, its windows 16 pixels wide. Of its 3 x 4 x 8 x 8 coefficients per block the first
`z_dim` principal axes of real clips (the member `hr` of a dataset folder) become the latent. The convolutions begin as
zero. The folder written is what `--stage codec` takes as `--init`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from common.errors import run_command
from common.progress import progress
from datagen.dataset.loader import ShardReader
from pipeline.model.small_vae import GROUP, OVERLAP, STRIDE, WINDOW, SmallVideoVAE
from pipeline.model.vae import to_pixels
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="dataset folder with stored clips (store_clips: true)")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--channels", type=int, default=48)
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
    vae = SmallVideoVAE(z_dim=arguments.channels)
    initialise(vae, clips)
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
