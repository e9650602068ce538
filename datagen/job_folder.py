"""The folder of a build: what is committed there, what is left to write, and how a job ends.

survey/                   datagen/survey/survey_cache.py          plan.json       hash and configuration of the plan
shards/                   datagen/dataset/shard_format.py         manifest.json   written last
quarantine.jsonl          every source, window and sample that is not in the dataset, with the reason
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray

from common.errors import UserError
from common.locking import only_writer
from common.progress import progress
from common.storage import Folder, LocalFolder
from datagen.config import DatagenConfig
from datagen.dataset.data_card import write_report
from datagen.dataset.shard_format import (
    MANIFEST,
    DamagedShard,
    Manifest,
    Sample,
    Sidecar,
    read_sidecar,
    shard_name,
    write_manifest,
    write_shard,
)
from datagen.dataset.shard_statistics import ShardStatistics, summed
from datagen.encode.clip import Fault
from datagen.encode.ray_jobs import EncodedSample
from datagen.plan import Plan, deciding
from datagen.survey.source_survey import Unreadable

#: up to this many unreadable sources a job goes on as long as others are readable [ours]
FEW_UNREADABLE = 10
PLAN = "plan.json"
QUARANTINE = "quarantine.jsonl"


@contextmanager
def writing(folder: Folder) -> Iterator[None]:
    """Be the only writer of a local folder; a job that fails without a committed shard leaves nothing behind.

    Raises:
        UserError: another job writes there; or one that a Ray worker raised, out of Ray's wrapping.
    """
    local = isinstance(folder, LocalFolder)
    existed = local and Path(folder.url).is_dir()
    try:
        with only_writer(Path(folder.url)) if local else nullcontext():
            if isinstance(folder, LocalFolder):
                folder.remove_temporary_files()
            try:
                yield
            except UserError:
                _clean_up_if_empty(folder)
                raise
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
    too_many = len(unreadable) > FEW_UNREADABLE and len(unreadable) > config.max_quarantined * sources
    if too_many or len(unreadable) == sources:
        raise UserError(
            f"{len(unreadable)} of {sources} sources cannot be read, which is more than max_quarantined = "
            f"{config.max_quarantined} allows; the first: {unreadable[0].reason}"
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
    now = {"hash": plan.hash, "samples": len(plan.samples), "config": deciding(config), "versions": versions}
    try:
        begun = json.loads(folder.read(PLAN))
    except FileNotFoundError:
        folder.write(PLAN, (json.dumps(now, indent=1) + "\n").encode())
        return
    if begun["hash"] != plan.hash:
        changed = ["config"] if begun["config"] != now["config"] else []
        changed += [f"versions.{name}" for name in versions if begun["versions"].get(name) != versions[name]]
        changed = changed or ["inputs"]
        raise UserError(
            f"{folder.url} was begun with another plan: {', '.join(changed)} differ (see its {PLAN}); "
            "choose another --output, or restore them to finish it"
        )


def committed_shards(folder: Folder, plan: Plan) -> dict[int, Sidecar]:
    """Shards of this plan whose sidecar and full-size tar are there, by index."""
    sizes = folder.sizes("shards/")
    found = {}
    for index in range(len(plan.shards())):
        try:
            sidecar = read_sidecar(folder, shard_name(index))
        except (FileNotFoundError, DamagedShard):
            continue
        if sidecar.extra.get("plan") == plan.hash and sizes.get(sidecar.name) == sidecar.bytes:
            found[index] = sidecar
    return found


def write_shards(
    folder: Folder, plan: Plan, committed: dict[int, Sidecar], encoded: Iterator[EncodedSample]
) -> list[Sidecar]:
    """Write the shards that are not committed yet; returns all sidecars, in order.

    Args:
        encoded: the samples of the missing shards, in the order of the plan.
    """
    shards = plan.shards()
    missing = [index for index in range(len(shards)) if index not in committed]
    left = sum(len(shards[index]) for index in missing)
    sidecars = dict(committed)
    if missing:
        with progress(len(plan.samples), "samples", "clips", start=len(plan.samples) - left) as bar:
            counts = Counter({"failed": 0, "filtered": 0})
            for index in missing:
                failed: list[dict[str, Any]] = []
                statistics = ShardStatistics()
                shard = itertools.islice(encoded, len(shards[index]))
                samples = _made(shard, failed, statistics, bar, counts)
                # write_shard takes the samples first: `failed` and `statistics` are complete when it reads extra
                extra = {"plan": plan.hash, "failed": failed, "statistics": statistics.record}
                sidecars[index] = write_shard(folder, index, samples, extra)
    return [sidecars[index] for index in range(len(shards))]


def _made(
    encoded: Iterable[EncodedSample],
    failed: list[dict[str, Any]],
    statistics: ShardStatistics,
    bar: Any,
    counts: Counter[str],
) -> Iterator[Sample]:
    """Samples that were made; the others become lines of quarantine.jsonl in `failed`."""
    for plan, made, reused in encoded:
        if isinstance(made, Fault):
            line = {"kind": made.kind, "source": plan.source, "start": plan.start, "key": plan.key}
            failed.append(line | {"reason": made.reason})
            counts[made.kind] += 1
        if reused:
            counts["reused"] += 1
        bar.advance(1, **counts)
        if isinstance(made, Sample):
            statistics.add(made)
            yield made


def finish(
    folder: Folder,
    plan: Plan,
    unreadable: Sequence[Unreadable],
    shards: list[Sidecar],
    config: DatagenConfig,
    versions: dict[str, str],
    sources: int,
) -> Manifest:
    """Write quarantine.jsonl, the manifest and the data card.

    Args:
        sources: how many there were.
    """
    faults = [{"kind": "unreadable", "source": found.source.id, "reason": found.reason} for found in unreadable]
    faults += [fault for shard in shards for fault in shard.extra["failed"]]
    rejected = [{"kind": "filtered", **rejection} for rejection in plan.rejected]
    folder.write(QUARANTINE, "".join(json.dumps(line) + "\n" for line in faults + rejected).encode())
    counts = {
        "sources": sources,
        "unreadable": len(unreadable),
        "filtered": len(rejected) + sum(fault["kind"] == "filtered" for fault in faults),
        "planned": len(plan.samples),
        "failed": sum(fault["kind"] == "failed" for fault in faults),
    }
    extra = {
        "plan": plan.hash,
        "config": deciding(config),
        "versions": versions,
        "counts": counts,
        "statistics": summed([shard.extra["statistics"] for shard in shards]),
    }
    manifest = write_manifest(folder, "clips", shards, extra)
    write_report(folder, manifest, faults + rejected)
    return manifest


def _clean_up_if_empty(folder: Folder) -> None:
    names = folder.sizes()
    if MANIFEST in names or any(name.startswith("shards/") and name.endswith(".json") for name in names):
        return
    for name in names:
        if name.startswith(("survey/", "shards/")) or name in (PLAN, QUARANTINE):
            folder.delete(name)
    if isinstance(folder, LocalFolder):
        folder.remove_empty_directories()


def _user_error_within(error: BaseException | None) -> UserError | None:
    """The UserError that a worker raised, out of Ray's wrapping."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, UserError):
            return UserError(str(error).splitlines()[-1].removeprefix("common.errors.UserError: "))
        error = getattr(error, "cause", None) or error.__cause__
    return None
