"""The clips of a dataset folder one after the other, in the order its build planned them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from common.errors import UserError
from common.lossless_clip import decode_bytes
from common.storage import open_folder
from datagen.dataset.shard_format import DamagedShard, read_manifest, read_member, read_sidecar
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
        fingerprint: changes when any shard does.

    Raises:
        UserError: no dataset there, pairs instead of clips, an empty or damaged one.
    """

    def __init__(self, dataset: str | Path) -> None:
        self._folder = open_folder(dataset)
        manifest = read_manifest(self._folder)
        if manifest.kind != "clips":
            raise UserError(
                f"{dataset} holds {manifest.kind}; give the clips that datagen.build_shards wrote"
            )
        if not manifest.samples:
            raise UserError(f"{dataset} holds no clip")
        identity = json.dumps([[entry.name, entry.sha256] for entry in manifest.shards])
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._rows = [(entry.name, row) for entry in manifest.shards for row in range(entry.samples)]
        self._open: tuple[str, Any] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: int) -> Clip:
        shard, row = self._rows[position]
        try:
            if self._open is None or self._open[0] != shard:
                self._open = (shard, read_sidecar(self._folder, shard))
            sidecar = self._open[1]
            spans = sidecar.members[row]
            if "latents.safetensors" not in spans:
                raise UserError(f"{self._folder.url}/{shard}: sample {sidecar.keys[row]} has no latents")
            latents = load(read_member(self._folder, shard, spans["latents.safetensors"]))
            hr = None
            if "hr.mkv" in spans:
                hr = to_tensor(decode_bytes(read_member(self._folder, shard, spans["hr.mkv"])))
            metadata = json.loads(read_member(self._folder, shard, spans["json"]))
        except (DamagedShard, FileNotFoundError, SafetensorError) as error:
            raise UserError(
                f"{error}: build the shard again (delete its .json and repeat the command)"
            ) from None
        z_hr, z_lr = latents["z_hr"].to(torch.float32), latents["z_lr"].to(torch.float32)
        return Clip(sidecar.keys[row], z_hr, z_lr, hr, metadata)
