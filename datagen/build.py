"""The steps of a build and what they leave behind; `datagen/build_shards.py` is its command.

survey/                   datagen/survey/survey_cache.py                plan.json   hash and configuration of the plan
shards/                   datagen/dataset/shard_format.py                      manifest.json   written last
quarantine.jsonl          every source, window and sample that is not in the dataset, with the reason
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from common.errors import UserError
from common.progress import progress
from common.storage import Folder, LocalFolder, open_folder
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
from datagen.encode.latent_reuse import EarlierDataset, check_reusable, find_clips
from datagen.encode.ray_jobs import Row, sample_rows
from datagen.encode.vae_encoder import vae_hash
from datagen.format_revision import code_versions
from datagen.plan import Plan, deciding, make_plan
from datagen.ray_cluster import start_ray
from datagen.sources import find_sources
from datagen.survey.survey_cache import survey_all

#: below this many unreadable sources a job goes on as long as others are readable
FEW_FAULTS = 10
PLAN = "plan.json"
QUARANTINE = "quarantine.jsonl"

Line = dict[str, Any]


def build(
    config: DatagenConfig,
    *,
    vae: Path,
    inputs: list[str],
    output: str,
    address: str | None = None,
    workers: int | None = None,
    reuse: str | None = None,
) -> Manifest:
    """Build or finish the dataset at `output`.

    Args:
        reuse: an earlier dataset of the same clips, whose z_hr are taken over; the result is the same without.

    Raises:
        UserError: nothing to build from, too much of it unreadable, an output begun with another plan, or a dataset
            to reuse that other code made.
    """
    sources = find_sources(inputs, config.storage)
    versions = code_versions() | {"vae": vae_hash(vae)}
    if reuse:
        check_reusable(reuse, versions, config.storage)
    folder = open_folder(output, config.storage)
    with _only_writer(folder):
        try:
            start_ray(address, workers, config)
            surveys = survey_all(folder, sources, config)
            faults = [
                {"kind": "unreadable", "source": s["source"], "reason": s["error"]}
                for s in surveys
                if "error" in s
            ]
            _check_limit(faults, len(sources), config)
            plan = make_plan([s for s in surveys if "error" not in s], config, versions)
            _begin(folder, plan, faults, config, versions)
            clips = (sample.clip for sample in plan.samples)
            earlier = find_clips(reuse, clips, config.storage) if reuse else None
            shards = _write_shards(folder, plan, config, str(vae.resolve()), versions, earlier)
        except UserError:
            _clean_up_if_empty(folder)
            raise
        except ray.exceptions.RayError as error:
            mendable = _user_error_within(error)
            if mendable is None:
                raise
            _clean_up_if_empty(folder)
            raise mendable from None
        finally:
            ray.shutdown()
        faults += [fault for shard in shards for fault in shard.extra["failed"]]
        rejected = [{"kind": "filtered", **rejection} for rejection in plan.rejected]
        folder.write(QUARANTINE, "".join(json.dumps(line) + "\n" for line in faults + rejected).encode())
        counts = {
            "sources": len(sources),
            "unreadable": sum(fault["kind"] == "unreadable" for fault in faults),
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


def _check_limit(faults: list[Line], sources: int, config: DatagenConfig) -> None:
    if len(faults) == sources or (
        len(faults) > FEW_FAULTS and len(faults) > config.max_quarantined * sources
    ):
        raise UserError(
            f"{len(faults)} of {sources} sources cannot be read, which is more than max_quarantined = "
            f"{config.max_quarantined} allows; the first: {faults[0]['reason']}"
        )


def _begin(
    folder: Folder, plan: Plan, faults: list[Line], config: DatagenConfig, versions: dict[str, str]
) -> None:
    """Check that there is something to do and that the folder is this plan's."""
    if not plan.samples:
        reasons = [f"{line['source']}: {line['reason']}" for line in plan.rejected] + [
            f["reason"] for f in faults
        ]
        more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        raise UserError(f"no window can be used: {'; '.join(reasons[:3])}{more}")
    mine = {"hash": plan.hash, "samples": len(plan.samples), "config": deciding(config), "versions": versions}
    try:
        begun = json.loads(folder.read(PLAN))
    except FileNotFoundError:
        folder.write(PLAN, (json.dumps(mine, indent=1) + "\n").encode())
        return
    if begun["hash"] != plan.hash:
        changed = ["config"] if begun["config"] != mine["config"] else []
        changed += [f"versions.{name}" for name in versions if begun["versions"].get(name) != versions[name]]
        changed = changed or ["inputs"]
        raise UserError(
            f"{folder.url} was begun with another plan: {', '.join(changed)} differ (see its {PLAN}); "
            "choose another --output, or restore them to finish it"
        )


def _write_shards(
    folder: Folder,
    plan: Plan,
    config: DatagenConfig,
    vae: str,
    versions: dict[str, str],
    earlier: EarlierDataset | None,
) -> list[Sidecar]:
    """Write what is not committed yet; all sidecars, in order."""
    shards = plan.shards()
    committed = _committed(folder, plan, len(shards))
    pending = [index for index in range(len(shards)) if index not in committed]
    todo = [sample for index in pending for sample in shards[index]]
    if todo:
        rows = sample_rows(todo, config, vae, versions, earlier)
        with progress(len(plan.samples), "samples", "clips", start=len(plan.samples) - len(todo)) as bar:
            told = Counter({"failed": 0, "filtered": 0} | ({"reused": 0} if earlier else {}))
            for index in pending:
                failed: list[Line] = []
                samples = _good(itertools.islice(rows, len(shards[index])), failed, bar, told)
                # extra is read after the samples have been taken, when its lists are complete
                statistics = ShardStatistics()
                samples = _counted(samples, statistics)
                extra = {"plan": plan.hash, "failed": failed, "statistics": statistics.record}
                committed[index] = write_shard(folder, index, samples, extra)
    return [committed[index] for index in range(len(shards))]


def _good(rows: Iterator[Row], failed: list[Line], bar: Any, told: Counter[str]) -> Iterator[Sample]:
    """Samples that were made; the others become lines of quarantine.jsonl."""
    for plan, made, reused in rows:
        if isinstance(made, Fault):
            line = {"kind": made.kind, "source": plan.source, "start": plan.start, "key": plan.key}
            failed.append(line | {"reason": made.reason})
            told[made.kind] += 1
        if reused:
            told["reused"] += 1
        bar.advance(1, **told)
        if isinstance(made, Sample):
            yield made


def _counted(samples: Iterator[Sample], statistics: ShardStatistics) -> Iterator[Sample]:
    for sample in samples:
        statistics.add(sample)
        yield sample


def _committed(folder: Folder, plan: Plan, count: int) -> dict[int, Sidecar]:
    """Shards of this plan whose sidecar and full-size tar are there."""
    sizes = folder.sizes("shards/")
    found = {}
    for index in range(count):
        try:
            sidecar = read_sidecar(folder, shard_name(index))
        except (FileNotFoundError, DamagedShard):
            continue
        if sidecar.extra.get("plan") == plan.hash and sizes.get(sidecar.name) == sidecar.bytes:
            found[index] = sidecar
    return found


def _user_error_within(error: BaseException | None) -> UserError | None:
    """The UserError that a worker raised, out of Ray's wrapping."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, UserError):
            return UserError(str(error).splitlines()[-1].removeprefix("common.errors.UserError: "))
        error = getattr(error, "cause", None) or error.__cause__
    return None


def _clean_up_if_empty(folder: Folder) -> None:
    """A failed job that committed no shard leaves nothing behind."""
    names = folder.sizes()
    if MANIFEST in names or any(name.startswith("shards/") and name.endswith(".json") for name in names):
        return
    for name in names:
        if name.startswith(("survey/", "shards/")) or name in (PLAN, QUARANTINE):
            folder.delete(name)
    if isinstance(folder, LocalFolder):
        folder.remove_empty_directories()


@contextmanager
def _only_writer(folder: Folder) -> Iterator[None]:
    """Refuse a second job in one local folder: each would remove the other's temporary files."""
    if not isinstance(folder, LocalFolder):
        yield
        return
    existed = os.path.isdir(folder.url)
    os.makedirs(folder.url, exist_ok=True)
    descriptor = os.open(folder.url, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder.url}: another job is writing here; wait for it or choose another --output"
            ) from None
        folder.remove_temporary_files()
        yield
    finally:
        os.close(descriptor)
        if not existed and not os.listdir(folder.url):
            os.rmdir(folder.url)
