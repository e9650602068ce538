"""z_hr from an earlier dataset: a new degradation of the same clips encodes LR only.

A latent is taken over where the clip is the same in every way that decides its bytes: source and its content, window,
crop, VAE, and the libraries and code that decode and encode. So the dataset is the same with or without.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from safetensors import SafetensorError

from common.errors import UserError
from common.storage import Folder, StorageConfig, open_folder
from datagen.dataset.shard_format import DamagedShard, ShardEntry, Span, read_manifest, read_member, read_sidecar
from datagen.dataset.shard_index import ShardIndex, read_index
from datagen.plan import SamplePlan

#: entries of the datasets' versions that decide z_hr
DECIDING = ("vae", "encoding", "av", "numpy", "torch")
#: those that decide what a survey measures
SURVEYING = ("survey", "av", "numpy", "opencv-python-headless")
LATENTS = "latents.safetensors"


class Place(NamedTuple):
    """Where a sample of the earlier dataset lies."""

    shard: str
    latents: Span
    metadata: Span

    @classmethod
    def of(cls, values: list[Any]) -> Place:
        """From what JSON makes of one."""
        shard, latents, metadata = values
        return cls(shard, Span(*latents), Span(*metadata))


@dataclass(frozen=True)
class EarlierDataset:
    """An earlier dataset's address and where in it a sample of each clip lies."""

    url: str
    places: dict[str, Place]


def check_reusable(dataset: str, versions: dict[str, str], storage: StorageConfig) -> None:
    """Refuse at once what cannot be taken over.

    Raises:
        UserError: no finished dataset of clips, or one whose latents another VAE or other code made.
    """
    manifest = read_manifest(open_folder(dataset, storage))
    if manifest.kind != "clips":
        raise UserError(f"--reuse {dataset} holds {manifest.kind}; give a dataset that datagen.build_shards wrote")
    theirs = manifest.extra["versions"]
    for name in DECIDING:
        if theirs.get(name) != versions[name]:
            raise UserError(
                f"--reuse {dataset}: its latents were made with {name} {theirs.get(name)}, this job has "
                f"{versions[name]}; build without --reuse, or restore what made it"
            )


def surveyed_alike(dataset: str, versions: dict[str, str], storage: StorageConfig) -> Folder | None:
    """The earlier dataset, whose surveys can be taken over; None where other code or libraries measured them."""
    folder = open_folder(dataset, storage)
    theirs = read_manifest(folder).extra["versions"]
    return folder if all(theirs.get(name) == versions[name] for name in SURVEYING) else None


def find_clips(dataset: str, clips: Iterable[str], storage: StorageConfig) -> EarlierDataset:
    """Those of `clips` that `dataset` holds; only its manifest and its index, or its sidecars, are read."""
    folder = open_folder(dataset, storage)
    manifest = read_manifest(folder)
    index = read_index(folder, manifest.shards)
    wanted = set(clips)
    found: dict[str, Place] = {}
    with ThreadPoolExecutor(16) as pool:
        samples = pool.map(lambda entry: _samples(folder, entry, index), manifest.shards)
        for entry, of_shard in zip(manifest.shards, samples, strict=True):
            for key, members in of_shard:
                clip = key.rpartition("-")[0]
                if clip in wanted and clip not in found:
                    found[clip] = Place(entry.name, members[LATENTS], members["json"])
    return EarlierDataset(dataset, found)


def _samples(folder: Folder, entry: ShardEntry, index: ShardIndex | None) -> list[tuple[str, dict[str, Span]]]:
    """Key and members of a shard's samples; none where its sidecar is damaged or missing and there is no index."""
    if index is not None:
        return [index.find(entry.name, row) for row in range(entry.samples)]
    try:
        sidecar = read_sidecar(folder, entry.name)
    except (FileNotFoundError, DamagedShard):
        return []
    return list(zip(sidecar.keys, sidecar.members, strict=True))


def read_latent(dataset: str, place: Place, plan: SamplePlan, storage: StorageConfig) -> bytes:
    """A safetensors file of `z_hr`; nothing where the sample is damaged, out of reach, or of other pixels."""
    from safetensors.torch import load, save  # here: other CPU tasks need no PyTorch

    folder = open_folder(dataset, storage)
    try:
        metadata = json.loads(read_member(folder, place.shard, place.metadata))
        if not _same_pixels(metadata, plan):
            return b""
        return save({"z_hr": load(read_member(folder, place.shard, place.latents))["z_hr"]})
    except (DamagedShard, FileNotFoundError, SafetensorError, UserError, KeyError, ValueError):
        return b""


def _same_pixels(metadata: dict[str, Any], plan: SamplePlan) -> bool:
    window, crop = metadata["window"], metadata["crop"]
    return (
        metadata["content"] == plan.content
        and (window["start"], window["frames"]) == (plan.start, plan.frames)
        and tuple(crop[side] for side in ("top", "left", "height", "width")) == plan.crop
    )
