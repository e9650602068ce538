"""Validation: fixed clips with fixed noise, through the EMA that will be exported; numbers and images.

In distillation the loss curves say little; these images show a drift first. The clips are the first of the validation
set's order, spread over the ranks, so that the numbers are means over the same clips whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor

from common.errors import UserError
from common.psnr import psnr_db
from datagen.dataset.loader import Batch
from pipeline.model.vae import VAE, decode_latents, to_frames
from trainer.monitoring.tracking import Tracker
from trainer.stages.stage import TrainingStage

LABEL_HEIGHT_PX = 14


class Validation:
    """The fixed clips of a run: this rank's, or those of its group of ranks that share clips."""

    def __init__(
        self, batch: Batch, vae: VAE, device: torch.device | str = "cpu", *, first: int = 0, clips: int | None = None
    ) -> None:
        """
        Args:
            batch: the same size on every rank; the clip shown is rank 0's first.
            device: where the VAE goes while it decodes; between looks it makes room for the training.
            first: position of the batch's first clip in the validation set.
            clips: size of the validation set; what lies beyond it only keeps the ranks in step. None: all count.
        """
        count = len(batch.keys) if clips is None else min(max(clips - first, 0), len(batch.keys))
        self._clips, self._count = [_one(batch, index) for index in range(len(batch.keys))], count
        self._vae, self._device = vae, torch.device(device)
        #: of each clip, what does not change from look to look: the decoded target, and z_lr's image and PSNR
        self._targets: list[Tensor] = []
        self._low_resolution: list[tuple[Tensor, float]] = []

    def look(self, stage: TrainingStage, step: int, tracker: Tracker | None) -> dict[str, float]:
        """Log and return means over all clips; save an image of the first. Collective.

        Every rank returns the same.
        """
        sums: dict[str, float] = {}
        with stage.averaged():
            previews = [stage.previews(clip) for clip in self._clips]
        self._decode_constants(stage)
        for index, shown in enumerate(previews):
            counted = index < self._count
            values, frames = self._measured(stage, index, shown, counted=counted)
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + counted * value
            if index == 0 and tracker is not None:
                tracker.image(step, "previews", preview_image(frames))
        self._make_room()
        means = _means(sums, self._count, next(iter(previews[0].values())).device)
        if tracker is not None:
            tracker.log(step, means)
        return means

    def _measured(
        self, stage: TrainingStage, index: int, shown: dict[str, Tensor], *, counted: bool
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Numbers of one clip, and middle frames (3, H, W) to look at."""
        target = stage.target(self._clips[index]).to(torch.float32)
        values: dict[str, float] = {}
        frames: dict[str, Tensor] = {}
        if not stage.spec.pixels:
            frames["z_lr"], values["validation/z_lr/psnr"] = self._low_resolution[index]
        for name, preview in shown.items():
            prefix = f"validation/{name}"
            values[f"{prefix}/latent_mse"] = (preview - target.to(preview.device)).square().mean().item()
            values[f"{prefix}/latent_mean"] = preview.mean().item()
            values[f"{prefix}/latent_std"] = preview.std().item()
            values[f"{prefix}/psnr"] = 0.0
            if counted or index == 0:
                clip = self._decoded(stage, preview)
                frames[name], values[f"{prefix}/psnr"] = _middle(clip), psnr(clip, self._targets[index])
        return values, frames | {"target": _middle(self._targets[index])}

    def _decode_constants(self, stage: TrainingStage) -> None:
        if self._targets:
            return
        for clip in self._clips:
            target = self._decoded(stage, stage.target(clip))
            self._targets.append(target)
            if not stage.spec.pixels:
                low = self._decoded(stage, clip.tensors["z_lr"])
                self._low_resolution.append((_middle(low), psnr(low, target)))

    def _decoded(self, stage: TrainingStage, preview: Tensor) -> Tensor:
        """One clip (3, F, H, W) in [-1, 1], on the CPU."""
        if stage.spec.pixels:
            return preview[0].float().clamp(-1, 1).cpu()
        self._vae.to(self._device)
        try:
            return decode_latents(self._vae, preview)[0].cpu()
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            if not hasattr(self._vae, "enable_tiling"):
                raise UserError(
                    f"validation: the GPU's memory is full, and {type(self._vae).__name__} decodes no tiles; "
                    "free memory or set validate_every of the stage's schedule to 0"
                ) from None
            self._vae.enable_tiling()  # from now on: what did not fit beside the training will not fit later
            return decode_latents(self._vae, preview)[0].cpu()

    def _make_room(self) -> None:
        self._vae.to("cpu")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _one(batch: Batch, index: int) -> Batch:
    part = slice(index, index + 1)
    return Batch(batch.keys[part], {k: t[part] for k, t in batch.tensors.items()}, batch.metadata[part])


def _means(sums: dict[str, float], count: int, device: torch.device) -> dict[str, float]:
    """Over the clips of all ranks. Collective."""
    totals = torch.tensor([*sums.values(), float(count)], dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    return dict(zip(sums, (totals[:-1] / totals[-1]).tolist(), strict=True))


def psnr(clip: Tensor, target: Tensor) -> float:
    """PSNR over all values of a clip in [-1, 1], dB."""
    return psnr_db((clip - target).square().mean().item(), peak=2.0)


def _middle(clip: Tensor) -> Tensor:
    return clip[:, clip.shape[1] // 2]


def preview_image(frames: dict[str, Tensor]) -> Image.Image:
    """Frames (3, H, W) in [-1, 1] side by side under their names."""
    tiles = []
    for name, frame in frames.items():
        pixels = to_frames(frame[:, None])[0].numpy()
        tile = Image.new("RGB", (pixels.shape[1], pixels.shape[0] + LABEL_HEIGHT_PX), "white")
        ImageDraw.Draw(tile).text((2, 1), name, fill="black")
        tile.paste(Image.fromarray(pixels), (0, LABEL_HEIGHT_PX))
        tiles.append(np.asarray(tile))
    return Image.fromarray(np.concatenate(tiles, axis=1))


def fixed_batch(reader: Any) -> Batch:
    """The first batch of a reader made for the purpose."""
    iterator: Iterator[Batch] = iter(reader)
    batch = next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    return batch
