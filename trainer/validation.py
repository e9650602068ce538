"""Looking at a run: fixed clips, fixed noise, pictures and numbers. In distillation the loss curves say little; these
pictures show a drift first."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor

from datagen.reader import Batch
from pipeline.vae import VAE, decode_latents, to_frames
from trainer.stage import Stage
from trainer.tracking import Tracker

LABEL_HEIGHT_PX = 14


class Validation:
    """The fixed batch of a run."""

    def __init__(self, batch: Batch, vae: VAE | None) -> None:
        """
        Args:
            batch: the same size on every rank; rank 0's first clip is the one shown.
            vae: on rank 0; other ranks only take part in the forwards.
        """
        self._batch, self._vae = batch, vae
        self._target = batch.tensors.get("z_hr", batch.tensors.get("z_win"))

    def look(self, stage: Stage, step: int, tracker: Tracker | None) -> None:
        """Log latent errors and a picture. Collective."""
        shown = stage.previews(self._batch)
        values = self._errors(shown)
        if tracker is None or self._vae is None:
            return
        tracker.log(step, values)
        columns = {"z_LR": self._batch.tensors["z_lr"], **shown, "target": self._target}
        tracker.picture(step, "previews", self._picture({k: v for k, v in columns.items() if v is not None}))

    def _errors(self, shown: dict[str, Tensor]) -> dict[str, float]:
        """Latent MSE against the target, mean and deviation of each preview, over all ranks."""
        if self._target is None:
            return {}
        values: dict[str, Tensor] = {}
        for name, latents in shown.items():
            target = self._target.to(latents.device, torch.float32)
            values[f"validation/{name}/latent_mse"] = (latents - target).square().mean()
            values[f"validation/{name}/latent_mean"] = latents.mean()
            values[f"validation/{name}/latent_std"] = latents.std()
        means = torch.stack(list(values.values()))
        dist.all_reduce(means)
        return dict(zip(values, (means / dist.get_world_size()).tolist(), strict=True))

    def _picture(self, columns: dict[str, Tensor]) -> Image.Image:
        """The middle frame of the first clip, one column per latent."""
        assert self._vae is not None
        tiles = []
        for name, latents in columns.items():
            frames = to_frames(decode_latents(self._vae, latents[:1].float().cpu())[0])
            frame = frames[len(frames) // 2].numpy()
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
