"""Small VAEs on held-out clips: PSNR, VMAF, energy at block borders, time, and what noise in a latent looks like.

    python benchmarks/small_vae.py --vae assets/small/vae assets/tiny/vae --clips VIDEO … --output runs/codec-benchmark

Clips that were not trained on. Border energy is the mean squared difference of pixels across 8-pixel borders over that
of all other neighbours, divided by the same ratio of the source: 1 is as in the source, more prints squares. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.errors import run_command
from common.psnr import psnr_db
from common.video_reader import read_video
from metrics.clips import to_tensor
from metrics.frame_metric import Metric
from metrics.registry import create_all
from pipeline.model.vae import VAE, decode_latents, encode_video, load_vae, to_frames, to_pixels

FRAMES, LARGEST_SIDE, BLOCK = 9, 256, 8
NOISES = (0.1, 0.2)


def load_clip(path: Path) -> Tensor:
    """The middle of the video: (1, 3, 9, H, W) in [-1, 1], sides multiples of 16 of at most 256 pixels."""
    video = read_video(path)
    height, width = (min(side // 16 * 16, LARGEST_SIDE) for side in video.shape[1:3])
    start = max(0, (len(video) - FRAMES) // 2)
    top, left = (video.shape[1] - height) // 2, (video.shape[2] - width) // 2
    return to_pixels(video[start : start + FRAMES, top : top + height, left : left + width])[None]


def border_ratio(pixels: Tensor) -> float:
    """Energy of differences across borders of 8 pixels over that of all others."""
    energies = []
    for axis in (-2, -1):
        squared = pixels.diff(dim=axis).square().movedim(axis, 0).flatten(1).mean(1)
        border = torch.arange(len(squared)) % BLOCK == BLOCK - 1
        energies.append((squared[border].mean() / squared[~border].mean()).item())
    return float(np.mean(energies))


def row(vae: VAE, clip: Tensor, vmaf: Metric) -> dict[str, float]:
    """Measures of one clip."""
    began = time.perf_counter()
    z = encode_video(vae, clip)
    encoded = time.perf_counter()
    decoded = decode_latents(vae, z)
    ended = time.perf_counter()
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    disturbed = decode_latents(vae, z + NOISES[0] * noise)
    shown, source = (to_tensor(to_frames(x[0]).numpy()) for x in (decoded, clip))
    return {
        "psnr_db": psnr_db((decoded - clip).square().mean().item(), peak=2.0),
        "vmaf": vmaf(shown, source),
        "noisy_psnr_db": psnr_db((disturbed - clip).square().mean().item(), peak=2.0),
        "noisy_border": border_ratio(disturbed) / border_ratio(clip),
        "border": border_ratio(decoded) / border_ratio(clip),
        "encode_ms_per_frame": 1000 * (encoded - began) / clip.shape[2],
        "decode_ms_per_frame": 1000 * (ended - encoded) / clip.shape[2],
    }


def noisy_picture(vaes: dict[str, VAE], clip: Tensor) -> Image.Image:
    """One row per VAE: source, decoded, decoded with noise of each of NOISES in normalised latents; twice the size."""
    rows = []
    for vae in vaes.values():
        z = encode_video(vae, clip)
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        shown = [clip, *(decode_latents(vae, z + strength * noise) for strength in (0.0, *NOISES))]
        rows.append(np.concatenate([to_frames(x[0])[FRAMES // 2].numpy() for x in shown], axis=1))
    return Image.fromarray(np.concatenate(rows)).resize((2 * rows[0].shape[1], 2 * sum(r.shape[0] for r in rows)), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, nargs="+", required=True)
    parser.add_argument("--clips", type=Path, nargs="+", required=True, help="held-out videos")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    vaes = {str(path): load_vae(path) for path in arguments.vae}
    clips = {path.name: load_clip(path) for path in arguments.clips}
    (vmaf,) = create_all(["vmaf"])
    found = {name: {clip: row(vae, pixels, vmaf) for clip, pixels in clips.items()} for name, vae in vaes.items()}
    titles = (
        "VAE",
        "parameters",
        "clip",
        "PSNR, dB",
        "VMAF",
        "border",
        "with noise 0.1: PSNR, dB",
        "border",
        "encode, ms",
        "decode, ms",
    )
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, rows in found.items():
        size = sum(parameter.numel() for parameter in vaes[name].parameters()) / 1e6
        mean = {key: float(np.mean([values[key] for values in rows.values()])) for key in next(iter(rows.values()))}
        for clip, values in [*rows.items(), ("mean", mean)]:
            lines.append(
                f"| {name} | {size:.2f} M | {clip} | {values['psnr_db']:.2f} | {values['vmaf']:.1f} "
                f"| {values['border']:.3f} "
                f"| {values['noisy_psnr_db']:.2f} | {values['noisy_border']:.3f} "
                f"| {values['encode_ms_per_frame']:.1f} | {values['decode_ms_per_frame']:.1f} |"
            )
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "codec.md").write_text("\n".join(lines) + "\n")
    noisy_picture(vaes, next(iter(clips.values()))).save(arguments.output / "noise.png")
    print("\n".join(lines))
    print(json.dumps(found))


if __name__ == "__main__":
    run_command(main)
