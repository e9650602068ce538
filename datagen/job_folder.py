"""The folder of a build: what is committed there, what is left to write, and how a job ends.

survey/                   datagen/survey/survey_cache.py          plan.json       hash and configuration of the plan
shards/                   datagen/dataset/shard_format.py         manifest.json   written last
index.safetensors         datagen/dataset/shard_index.py
quarantine.jsonl          every source, window and sample that is not in the dataset, with the reason
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray

from common.errors import UserError
from common.locking import only_writer
from common.s3_lock import only_s3_writer
from common.storage import Folder, LocalFolder, S3Folder, cannot_write
from datagen.config import DatagenConfig
from datagen.dataset.data_card import left_out, write_report
from datagen.dataset.shard_format import (
    MANIFEST,
    CommittedShard,
    DamagedShard,
    Manifest,
    read_committed,
    shard_name,
    sidecar_name,
    write_manifest,
)
from datagen.dataset.shard_index import write_index
from datagen.dataset.shard_statistics import summed
from datagen.plan import COPY, Plan, deciding
from datagen.survey.source_survey import Unreadable

#: up to this many unreadable sources, or failed samples, a job goes on as long as there are others [ours]
FEW = 10
PLAN = "plan.json"
QUARANTINE = "quarantine.jsonl"
#: sidecars read at once [ours]
READERS = 16


@contextmanager
def writing(folder: Folder) -> Iterator[None]:
    """Be the only writer of a folder; a job that fails without a committed shard leaves only its survey behind.

    Raises:
        StorageError: a disk that is full or gone.
        UserError: another job writes there; or one that a Ray worker raised, out of Ray's wrapping.
    """
    local = isinstance(folder, LocalFolder)
    existed = local and Path(folder.url).is_dir()
    try:
        with only_s3_writer(folder) if isinstance(folder, S3Folder) else only_writer(Path(folder.url)):
            folder.remove_temporary_files()
            try:
                yield
            except UserError:
                _clean_up_if_empty(folder)
                raise
            except OSError as error:
                raise cannot_write(folder.url, error) from error
            except ray.exceptions.RayError as error:
                raised = _user_error_within(error)
                if raised is None:
                    raise
                _clean_up_if_empty(folder)
                raise raised from None
    finally:
        if local and not existed and not any(Path(folder.url).iterdir()):
            Path(folder.url).rmdir()


def check_limit(unreadable: Sequence[Unreadable], sources: int, config: DatagenConfig) -> None:
    """
    Raises:
        UserError: more sources are unreadable than `max_quarantined` allows.
    """
    too_many = len(unreadable) > FEW and len(unreadable) > config.max_quarantined * sources
    if too_many or len(unreadable) == sources:
        raise UserError(
            f"{len(unreadable)} of {sources} sources cannot be read, which is more than max_quarantined = "
            f"{config.max_quarantined} allows; the first: {unreadable[0].reason}"
        )


def begun_plan(folder: Folder) -> dict[str, Any] | None:
    """What plan.json says of the plan that the folder was begun with, with which the survey must go on to agree."""
    try:
        plan: dict[str, Any] = json.loads(folder.read(PLAN))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return plan


def refuse_another_plan(folder: Folder, config: DatagenConfig, versions: dict[str, str]) -> None:
    """Refuse what no survey can bring back to the plan that was begun: before one is made.

    Args:
        versions: those that are known; others are not compared.

    Raises:
        UserError: the folder was begun with another configuration or other versions.
    """
    begun = begun_plan(folder)
    if begun and (changed := _changed(begun, config, versions)):
        raise _another_plan(folder, changed)


def _changed(begun: dict[str, Any], config: DatagenConfig, versions: dict[str, str]) -> list[str]:
    """Entries of configuration and versions that are not those of plan.json."""
    then, now = begun["config"], deciding(config)
    changed = [f"config.{name}" for name in {**then, **now} if then.get(name) != now.get(name)]
    return changed + [f"versions.{name}" for name in versions if begun["versions"].get(name) != versions[name]]


def _another_plan(folder: Folder, changed: list[str]) -> UserError:
    reuse = f" (--reuse {folder.url} takes over what stays the same)" if MANIFEST in folder.sizes() else ""
    return UserError(
        f"{folder.url} was begun with another plan: {', '.join(changed)} differ (see its {PLAN}); "
        f"choose another --output{reuse}, or restore them to finish it"
    )


def begin(
    folder: Folder, plan: Plan, unreadable: Sequence[Unreadable], config: DatagenConfig, versions: dict[str, str]
) -> None:
    """Check that there is something to do and that the folder is this plan's.

    Raises:
        UserError: no window can be used, or the folder was begun with another plan.
    """
    if not plan.samples:
        reasons = [f"{line['source']}: {line['reason']}" for line in plan.rejected]
        reasons += [source.reason for source in unreadable]
        more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        raise UserError(f"no window can be used: {'; '.join(reasons[:3])}{more}")
    if plan.held_out == len(plan.samples):
        example = next(line for line in plan.rejected if line["reason"].startswith(COPY))
        raise UserError(
            f"nothing is left to train on: every source that is not held out shares a window with one that is, for "
            f"instance {example['source']} ({example['reason']}); cut it off, or set datagen.validation_share to 0"
        )
    now = {"hash": plan.hash, "samples": len(plan.samples), "config": deciding(config), "versions": versions}
    begun = begun_plan(folder)
    if begun is None:
        folder.write(PLAN, (json.dumps(now, indent=1) + "\n").encode())
    elif begun["hash"] != plan.hash:
        raise _another_plan(folder, _changed(begun, config, versions) or ["inputs"])


def committed_shards(folder: Folder, plan: Plan) -> dict[int, CommittedShard]:
    """Shards of this plan whose sidecar and full-size tar are there, by index."""
    sizes = folder.sizes("shards/")

    def read(index: int) -> CommittedShard | None:
        try:
            return read_committed(folder, shard_name(index))
        except (FileNotFoundError, DamagedShard):
            return None

    listed = [index for index in range(len(plan.shards())) if sidecar_name(shard_name(index)) in sizes]
    with ThreadPoolExecutor(READERS) as pool:
        sidecars = dict(zip(listed, pool.map(read, listed), strict=True))
    return {
        index: sidecar
        for index, sidecar in sidecars.items()
        if sidecar and sidecar.extra.get("plan") == plan.hash and sizes.get(sidecar.name) == sidecar.bytes
    }


def without_failed(folder: Folder, committed: dict[int, CommittedShard]) -> dict[int, CommittedShard]:
    """`committed` without shards that lack samples that failed; these are uncommitted, and so is the dataset."""
    whole = {index: shard for index, shard in committed.items() if not failures(shard)}
    for index in sorted(committed.keys() - whole.keys()):
        folder.delete(MANIFEST)
        folder.delete(sidecar_name(shard_name(index)))
    return whole


def failures(shard: CommittedShard) -> int:
    """How many of its samples failed."""
    return sum(fault["kind"] == "failed" for fault in shard.extra["failed"])


def finish(
    folder: Folder,
    plan: Plan,
    unreadable: Sequence[Unreadable],
    shards: list[CommittedShard],
    config: DatagenConfig,
    versions: dict[str, str],
    sources: int,
    frames_of: Callable[[list[dict[str, Any]]], list[np.ndarray | None]],
) -> Manifest:
    """Write quarantine.jsonl, the index, the manifest and the data card.

    Args:
        sources: how many there were.
        frames_of: of `write_report`.
    """
    faults = [{"kind": "unreadable", "source": found.source.id, "reason": found.reason} for found in unreadable]
    faults += [fault for shard in shards for fault in shard.extra["failed"]]
    rejected = [{"kind": "filtered", **rejection} for rejection in plan.rejected]
    folder.write(QUARANTINE, "".join(json.dumps(line, sort_keys=True) + "\n" for line in faults + rejected).encode())
    counts = {
        "sources": sources,
        "unreadable": len(unreadable),
        "filtered": len(rejected) + sum(fault["kind"] == "filtered" for fault in faults),
        "planned": len(plan.samples),
        "failed": sum(fault["kind"] == "failed" for fault in faults),
    }
    if plan.held_out is not None:
        counts["held_out"] = plan.held_out
    extra = {
        "plan": plan.hash,
        "config": deciding(config),
        "versions": versions,
        "counts": counts,
        "left_out": left_out(faults + rejected),
        "statistics": summed([shard.extra["statistics"] for shard in shards]),
    }
    write_index(folder, shards)
    manifest = write_manifest(folder, "clips", shards, extra)
    write_report(folder, manifest, faults + rejected, frames_of)
    return manifest


def _clean_up_if_empty(folder: Folder) -> None:
    names = folder.sizes()
    if MANIFEST in names or any(name.startswith("shards/") and name.endswith(".json") for name in names):
        return
    for name in names:
        if name.startswith("shards/") or name in (PLAN, QUARANTINE):
            folder.delete(name)
    if isinstance(folder, LocalFolder):
        folder.remove_empty_directories()


def _user_error_within(error: BaseException) -> UserError | None:
    """The UserError that a worker raised, out of Ray's text of it: its objects do not always hold the cause."""
    kinds = r"common\.(?:errors|lossless_clip)\.(?:UserError|StorageError|UnreadableVideo)"
    found = re.findall(rf"^{kinds}: (.+)$", str(error), re.MULTILINE)
    return UserError(found[0]) if found else None
