"""Looking at a run: fixed clips, fixed noise, pictures and numbers. In distillation the loss curves say little; these
pictures show a drift first."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor

from common.errors import UserError
from datagen.dataset.loader import Batch
from metrics.psnr import psnr_db
from pipeline.model.vae import VAE, decode_latents, to_frames
from trainer.monitoring.tracking import Tracker
from trainer.stages.stage import TrainingStage

LABEL_HEIGHT_PX = 14


class Validation:
    """The fixed batch of a run."""

    def __init__(self, batch: Batch, vae: VAE | None, device: torch.device | str = "cpu") -> None:
        """
        Args:
            batch: the same size on every rank; rank 0's first clip is the one shown.
            vae: on rank 0, which decodes; other ranks only take part in the forwards.
            device: where the VAE goes while it decodes; between looks it makes room for the training.
        """
        self._batch, self._vae, self._device = batch, vae, torch.device(device)

    def look(self, stage: TrainingStage, step: int, tracker: Tracker | None) -> dict[str, float]:
        """Log and return latent errors over all ranks' clips and PSNR over rank 0's; save a picture. Collective.

        Every rank returns the same.
        """
        shown, target = stage.previews(self._batch), stage.target(self._batch)
        values = _errors(shown, target)
        columns = shown if stage.spec.pixels else {"z_lr": self._batch.tensors["z_lr"], **shown}
        names = tuple(columns)
        psnrs = torch.zeros(len(names), dtype=torch.float64, device=next(iter(shown.values())).device)
        if tracker is not None and (self._vae is not None or stage.spec.pixels):
            columns = columns | {"target": target}
            decoded = _clips(columns) if stage.spec.pixels else self._decode_all(columns)
            measured = [mean_psnr(decoded[name], decoded["target"]) for name in names]
            psnrs.copy_(torch.tensor(measured, dtype=torch.float64))
            tracker.picture(step, "previews", picture({name: clips[0] for name, clips in decoded.items()}))
        dist.broadcast(psnrs, src=0)
        values |= {f"validation/{name}/psnr": value for name, value in zip(names, psnrs.tolist(), strict=True)}
        if tracker is not None:
            tracker.log(step, values)
        return values

    def _decode_all(self, columns: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        """The clips of each column; the VAE is on the device only meanwhile."""
        assert self._vae is not None
        self._vae.to(self._device)
        decoded = {name: self._decode(self._vae, latents) for name, latents in columns.items()}
        self._vae.to("cpu")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return decoded

    def _decode(self, vae: VAE, latents: Tensor) -> list[Tensor]:
        """One (3, F, H, W) in [-1, 1] per clip, on the CPU; one at a time, as the VAE needs much more memory than the
        DiT."""
        clips = []
        for latent in latents.split(1):
            try:
                clip = decode_latents(vae, latent)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                if not hasattr(vae, "enable_tiling"):
                    raise UserError(
                        f"validation: the GPU's memory is full, and {type(vae).__name__} decodes no tiles; free memory "
                        "or set validate_every of the stage's schedule to 0"
                    ) from None
                vae.enable_tiling()  # from now on: what did not fit beside the training will not fit later
                clip = decode_latents(vae, latent)
            clips.append(clip[0].cpu())
        return clips


def _clips(columns: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    return {name: list(pixels.float().clamp(-1, 1).cpu()) for name, pixels in columns.items()}


def _errors(previews: dict[str, Tensor], target: Tensor) -> dict[str, float]:
    """Latent MSE against the target, mean and deviation of each preview, over all ranks. Collective."""
    values: dict[str, Tensor] = {}
    for name, latents in previews.items():
        values[f"validation/{name}/latent_mse"] = (latents - target.to(latents.device, torch.float32)).square().mean()
        values[f"validation/{name}/latent_mean"] = latents.mean()
        values[f"validation/{name}/latent_std"] = latents.std()
    means = torch.stack(list(values.values()))
    dist.all_reduce(means)
    return dict(zip(values, (means / dist.get_world_size()).tolist(), strict=True))


def mean_psnr(clips: list[Tensor], targets: list[Tensor]) -> float:
    """Mean over clips in [-1, 1] of the PSNR over all of a clip's values, dB."""
    pairs = list(zip(clips, targets, strict=True))
    return sum(psnr_db((clip - target).square().mean().item(), peak=2.0) for clip, target in pairs) / len(pairs)


def picture(columns: dict[str, Tensor]) -> Image.Image:
    """The middle frame of each clip (3, F, H, W) in [-1, 1], side by side under their names."""
    tiles = []
    for name, clip in columns.items():
        frame = to_frames(clip)[clip.shape[1] // 2].numpy()
        tile = Image.new("RGB", (frame.shape[1], frame.shape[0] + LABEL_HEIGHT_PX), "white")
        ImageDraw.Draw(tile).text((2, 1), name, fill="black")
        tile.paste(Image.fromarray(frame), (0, LABEL_HEIGHT_PX))
        tiles.append(np.asarray(tile))
    return Image.fromarray(np.concatenate(tiles, axis=1))


def fixed_batch(reader: Any) -> Batch:
    """The first batch of a reader made for the purpose."""
    iterator = iter(reader)
    batch = next(iterator)
    iterator.close()
    return batch
