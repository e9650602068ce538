"""Preference pairs for Stage III: candidates from the one-step model, ranked, the best and the worst kept.

    python -m preference.build --config configs/tiny.yaml --model MODEL --data SHARDS --output PAIRS

For each clip the model is run from several noises (five in the paper); every candidate is decoded and scored;
ranking.py combines the scores. Full-reference metrics compare with the HR clip where the dataset keeps it,
else with the decoded z_HR. The output is a dataset folder (datagen/dataset/shard_format.py) of kind `pairs`:

    <key>.pair.safetensors   z_win, z_lose, z_lr: bf16 (C, T, h, w)
    <key>.json               caption, noise_win and noise_lose (the parts of common.seeding.seeded_noise),
                             all candidates' scores by metric, their combined scores, best, worst, gap

A clip with a broken candidate, or whose candidates hardly differ, gives no pair: the shard's sidecar keeps its reason,
and further clips of the dataset take its place. Of a dataset with a validation split, `preference.validation_pairs`
pairs of its held-out clips follow in shards of their own: the validation split of the pairs.

A shard is the unit of restart: the same command goes on after the last complete one. `preference.actors` share a
machine's GPUs (or a Ray cluster's, `--address`); the bytes are the same for any number of them. `--part 0/4` makes
every fourth shard, so several machines share a job without Ray; whoever finishes the last shard replaces dropped clips,
makes the held-out pairs and writes the manifest.
"""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from common.command_line import add_config_options, load_sections
from common.errors import UserError, run_command
from common.fingerprint import fingerprint
from common.progress import progress
from common.storage import Folder, StorageConfig, open_folder
from datagen.dataset.shard_format import (
    Sidecar,
    Split,
    read_manifest,
    read_sidecar,
    sidecar_name,
    write_manifest,
    write_shard,
)
from datagen.dataset.shard_index import write_index
from preference.actors import MakeAll, actor_count, pair_makers
from preference.candidates import model_fingerprint
from preference.clips import ClipFolder
from preference.config import PreferenceConfig
from preference.pair_maker import CLOSE, PairJob
from preference.planning import estimate
from preference.ranking_metrics import open_metrics

#: fields that decide how fast pairs come, not which
SPEED_ONLY = ("candidates_per_forward", "frames_per_forward", "actors", "cpus")
#: so many clips broken, and not one that isn't: the job stops [ours]
BROKEN_AT_START = 20


def build(job: PairJob, *, part: tuple[int, int] = (0, 1), address: str | None = None) -> int | None:
    """Make the shards that are not there yet: those of `part`, those that replace dropped clips, and held-out pairs.

    Clips are taken in rounds: first as many as pairs are asked for, then as many as were dropped, until there are
    enough pairs or no more clips. What a round holds follows from the committed shards of the rounds before.

    Args:
        address: of a Ray cluster; None: this machine.

    Returns:
        Pairs in the finished dataset, held-out ones included, or None while shards of other parts are missing.

    Raises:
        UserError: anything the command's user can mend, found before the first candidate where possible.
    """
    config, clips = job.config, ClipFolder(job.data, job.storage)
    plan = {"data": clips.fingerprint, "model": model_fingerprint(job.model), "config": plan_config(config)}
    identity, folder = plan_hash(plan), open_folder(job.output, job.storage)
    keep_niqe = bool(committed_shards(folder, identity))
    with ExitStack() as stack:
        make_all: MakeAll | None = None
        shards = 0
        for split, positions, wanted in _sides(clips, config):
            position, missing = positions.start, min(wanted, len(positions))
            while missing and position < positions.stop:
                stop = min(position + missing, positions.stop)
                starts = range(position, stop, config.clips_per_shard)
                spans = {shards + k: range(a, min(a + config.clips_per_shard, stop)) for k, a in enumerate(starts)}
                committed = committed_shards(folder, identity)
                todo = {
                    index: span
                    for index, span in spans.items()
                    if index not in committed and (shards or index % part[1] == part[0])
                }
                if todo:
                    make_all = make_all or stack.enter_context(pair_makers(job, address, keep_niqe=keep_niqe))
                    write_shards(folder, todo, make_all, identity, split)
                committed = committed_shards(folder, identity)
                if not spans.keys() <= committed.keys():
                    return None
                missing -= sum(committed[index].samples for index in spans)
                shards, position = shards + len(spans), stop
    dropped = [record for index in range(shards) for record in committed[index].extra["dropped"]]
    kinds = Counter(record["kind"] for record in dropped)
    extra = {"plan": plan, "dropped": len(dropped), "dropped_by_kind": dict(sorted(kinds.items()))}
    entries = [committed[index] for index in range(shards)]
    write_index(folder, entries)
    return write_manifest(folder, "pairs", entries, extra).samples


def _sides(clips: ClipFolder, config: PreferenceConfig) -> list[tuple[Split | None, range, int]]:
    """Splits of the pairs: what their shards say, the clips to take, and how many pairs are wanted."""
    if not clips.held_out:
        return [(None, clips.training, config.pairs)]
    return [("train", clips.training, config.pairs), ("validation", clips.held_out, config.validation_pairs)]


def write_shards(
    folder: Folder, spans: dict[int, range], make_all: MakeAll, identity: str, split: Split | None
) -> None:
    """Make the clips of each shard and write it; a shard's clips are counted as they come, in order.

    Raises:
        UserError: every clip so far is broken, which is no accident of a clip.
    """
    outcomes = make_all([position for span in spans.values() for position in span])
    seen, broken = 0, 0
    with progress(sum(map(len, spans.values())), "preference pairs", "clips") as bar:
        for index, span in spans.items():
            samples, dropped = [], []
            for outcome in islice(outcomes, len(span)):
                if outcome.sample:
                    samples.append(outcome.sample)
                elif outcome.dropped:
                    dropped.append(outcome.dropped)
                bar.advance(1, dropped=len(dropped))
            seen, broken = seen + len(span), broken + sum(record["kind"] != CLOSE for record in dropped)
            if broken == seen and seen >= BROKEN_AT_START:
                raise UserError(f"each of {seen} clips is broken ({dropped[0]['reason']}); mend the model or the data")
            write_shard(folder, index, samples, {"plan": identity, "dropped": dropped}, split)


def plan_config(config: PreferenceConfig) -> dict[str, Any]:
    """What of the configuration decides the content."""
    return config.model_dump(mode="json", exclude=set(SPEED_ONLY))


def plan_hash(plan: dict[str, Any]) -> str:
    """Short identity of a plan."""
    return fingerprint(plan)[:16]


def committed_shards(folder: Folder, identity: str) -> dict[int, Sidecar]:
    """Sidecars of complete shards by index.

    Raises:
        UserError: the folder holds pairs of another plan.
    """
    sizes = folder.sizes("shards/")
    committed = {}
    for name in sorted(sizes):
        if sidecar_name(name) not in sizes or not name.endswith(".tar"):
            continue
        sidecar = read_sidecar(folder, name)
        if sidecar.extra.get("plan") != identity:
            raise UserError(
                f"{folder.url} holds pairs made from other data, another model or another configuration; "
                "choose another --output or delete it"
            )
        if sizes[name] == sidecar.bytes:
            committed[int(Path(name).stem.rpartition("-")[2])] = sidecar
    return committed


def _part(text: str) -> tuple[int, int]:
    try:
        index, count = (int(number) for number in text.split("/"))
    except ValueError:
        raise UserError(f"--part {text!r}: write i/n, for instance 0/4") from None
    if not 0 <= index < count:
        raise UserError(f"--part {text!r}: the first number must be at least 0 and less than the second")
    return index, count


def main() -> None:
    parser = argparse.ArgumentParser(description="Build preference pairs for Stage III.")
    add_config_options(parser)
    parser.add_argument("--model", type=Path, required=True, help="model folder of the stage dual_stream")
    parser.add_argument("--data", required=True, help="dataset folder or s3:// prefix of datagen.build_shards")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pairs")
    parser.add_argument("--metrics", help="ranking metrics instead of the configuration's: a set or metric names")
    parser.add_argument("--weights", type=Path, help="folder searched first for weight files")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--address", help="of a Ray cluster, auto for the one of this machine; default: no cluster")
    parser.add_argument("--check", action="store_true", help="only read the configuration and open the judges")
    parser.add_argument("--dry-run", action="store_true", help="make one pair for its time; print hours and storage")
    parser.add_argument("--part", default="0/1", help="i/n: make only every n-th shard, from i")
    arguments = parser.parse_args()
    if arguments.metrics:
        arguments.overrides.append(f"preference.metrics={arguments.metrics}")
    config, storage = load_sections(arguments, preference=PreferenceConfig, storage=StorageConfig)
    job = PairJob(
        config, arguments.model, arguments.data, arguments.output, arguments.weights, arguments.device, storage
    )
    if arguments.check:
        open_metrics(config, job.weights, job.device)
        return
    if arguments.dry_run:
        print(estimate(job, actor_count(config, job.device)))
        return
    pairs = build(job, part=_part(arguments.part), address=arguments.address)
    if pairs is None:
        print(f"part {arguments.part} is done; the manifest follows with the last part")
    else:
        manifest = read_manifest(open_folder(arguments.output, storage))
        held_out = sum(entry.samples for entry in manifest.shards_of("validation"))
        also = f", and {held_out} of held-out clips" if held_out else ""
        print(f"{pairs - held_out} of {config.pairs} pairs{also}, ranked by {config.metrics}: {arguments.output}")
        if dropped := manifest.extra["dropped_by_kind"]:
            found = ", ".join(f"{count} {kind}" for kind, count in dropped.items())
            print(f"clips dropped: {found}; reasons in {arguments.output}/shards/*.json")


if __name__ == "__main__":
    run_command(main)
