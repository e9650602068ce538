"""The clips of a dataset folder one after the other, in the order its build planned them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from common.errors import UserError
from common.fingerprint import fingerprint
from common.storage import StorageConfig
from datagen.dataset.dataset import ShardDataset
from datagen.dataset.shard_format import DamagedShard
from metrics.clips import to_tensor


@dataclass(frozen=True)
class Clip:
    """One clip.

    Attributes:
        z_hr, z_lr: latents, float32 (C, T, h, w).
        hr: the HR frames, float32 (F, 3, H, W) in [0, 1], or None where the dataset keeps latents only.
        metadata: its JSON.
    """

    key: str
    z_hr: Tensor
    z_lr: Tensor
    hr: Tensor | None
    metadata: dict[str, Any]


class ClipFolder:
    """Random access by position to the clips of a finished dataset folder or s3:// prefix.

    Attributes:
        training, held_out: positions of the training clips, and after them those of the validation split.
        fingerprint: changes when any shard does.

    Raises:
        UserError: no dataset there, pairs instead of clips, an empty or damaged one.
    """

    def __init__(self, dataset: str | Path, storage: StorageConfig | None = None) -> None:
        training, manifest = ShardDataset.open(dataset, storage, kind="clips", split="train")
        self._sides = [training]
        self.fingerprint = training.fingerprint
        if manifest.has_validation:
            held_out, _ = ShardDataset.open(dataset, storage, kind="clips", split="validation")
            self._sides.append(held_out)
            self.fingerprint = fingerprint([side.fingerprint for side in self._sides])
        self.training = range(len(training))
        self.held_out = range(len(training), sum(map(len, self._sides)))

    def __getitem__(self, position: int) -> Clip:
        side = self._sides[position in self.held_out]
        try:
            sample = side[position - self.held_out.start if position in self.held_out else position]
            if "latents.safetensors" not in sample.spans:
                raise UserError(f"{side.folder.url}/{sample.shard}: sample {sample.key} has no latents")
            latents = sample.tensors("latents")
            hr = to_tensor(sample.frames("hr")) if "hr.mkv" in sample.spans else None
            metadata = sample.metadata()
        except (DamagedShard, FileNotFoundError, SafetensorError) as error:
            raise UserError(f"{error}: build the shard again (delete its .json and repeat the command)") from None
        z_hr, z_lr = latents["z_hr"].to(torch.float32), latents["z_lr"].to(torch.float32)
        return Clip(sample.key, z_hr, z_lr, hr, metadata)
