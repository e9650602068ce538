"""Fast against full on held-out clips: PSNR and VMAF-NEG of what both decoders make of the same latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.effect.held_out import CLIPS
from common.psnr import psnr_db
from common.seeding import seeded_noise
from datagen.degradation.degrade import degrade_clip
from metrics.clips import to_tensor
from metrics.registry import create_all
from pipeline.latent_codec import LatentCodec
from pipeline.model.prompts import DEFAULT_PROMPT
from pipeline.model.vae import encode_video, to_frames, to_pixels
from pipeline.sampling import one_step
from pipeline.vsr_pipeline import VSRPipeline, open_pipeline

RECIPE = "light"


@torch.no_grad()
def rows(model: Path, clips: Path | None, seeds: Sequence[int]) -> dict[str, dict[str, list[float]]]:
    """By row ("full decoder, z_HR", …) and measure, one number per clip and seed of the degradation."""
    pipeline = open_pipeline(model)
    codecs: dict[str, LatentCodec] = {name: pipeline.codec(name) for name in ("full", "fast")}  # type: ignore[arg-type]
    (vmaf,) = create_all(["vmaf_neg"])
    found: dict[str, dict[str, list[float]]] = {}
    for clip in CLIPS:
        high = clip.frames(clips)
        pixels = to_pixels(high)[None]
        z_hr = encode_video(pipeline.vae, pixels)
        for seed in seeds:
            low, _ = degrade_clip(high, RECIPE, seed)
            inputs = {name: codec.inputs(low)[None] for name, codec in codecs.items()}
            z_lr = {name: codec.encode(inputs[name]) for name, codec in codecs.items()}
            error = (z_lr["fast"] - z_lr["full"]).square().mean() / z_lr["full"].square().mean()
            note(found, "z_LR, fast against full", {"latent_psnr_db": psnr_db(error.item())})
            latents = {"z_HR": z_hr, "student": _student(pipeline, z_lr["full"], seed)}
            decoded = {
                f"{name} decoder, {what}": codecs[name].decode(z, inputs[name])
                for what, z in latents.items()
                for name in codecs
            }
            if pipeline.lr_encoder is not None:
                z_fast = _student(pipeline, z_lr["fast"], seed)
                decoded["fast encoder and decoder, student"] = codecs["fast"].decode(z_fast, inputs["fast"])
            for row, video in decoded.items():
                psnr = psnr_db((video - pixels).square().mean().item(), peak=2.0)
                frames = to_tensor(to_frames(video[0]).numpy())
                note(found, row, {"psnr_db": psnr, "vmaf_neg": vmaf(frames, to_tensor(high))})
    return found


def _student(pipeline: VSRPipeline, z_lr: Tensor, seed: int) -> Tensor:
    noise = seeded_noise(tuple(z_lr.shape[1:]), seed, "codec benchmark")[None]
    prompt = pipeline.prompts.embed([DEFAULT_PROMPT])
    return one_step(lambda *x: pipeline.transformer(*x).velocity, noise, z_lr, prompt)


def note(found: dict[str, dict[str, list[float]]], row: str, values: dict[str, Any]) -> None:
    for name, value in values.items():
        found.setdefault(row, {}).setdefault(name, []).append(float(value))


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """Markdown, means over clips and seeds."""
    lines = ["| | PSNR, dB | VMAF-NEG |", "|---|---|---|"]
    for row, values in found.items():
        if "psnr_db" in values:
            lines.append(f"| {row} | {np.mean(values['psnr_db']):.2f} | {np.mean(values['vmaf_neg']):.2f} |")
    return "\n".join(lines)
