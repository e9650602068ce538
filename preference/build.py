"""Preference pairs for Stage III: candidates from the one-step model, ranked, the best and the worst kept.

    python -m preference.build --config configs/tiny.yaml --model MODEL --data SHARDS --output PAIRS

For each clip the model is run from several noises (five in the paper); every candidate is decoded and scored;
ranking.py combines the scores. Full-reference metrics compare with the HR clip where the dataset keeps it,
else with the decoded z_HR. The output is a dataset folder (datagen/dataset/shard_format.py) of kind `pairs`:

    <key>.pair.safetensors   z_win, z_lose, z_lr: bf16 (C, T, h, w)
    <key>.json               caption, noise_win and noise_lose (the parts of common.seeding.seeded_noise),
                             all candidates' scores by metric, their combined scores, best, worst, gap

A shard is the unit of restart: the same command goes on after the last complete one. `--part 0/4` makes every
fourth shard, so several machines share a job; whoever finishes the last shard writes the manifest.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from common.command_line import add_config_options, load_sections
from common.errors import UserError, run_command
from common.fingerprint import fingerprint
from common.progress import progress
from common.storage import Folder, StorageConfig, open_folder
from datagen.dataset.shard_format import (
    Sample,
    Sidecar,
    read_sidecar,
    shard_name,
    sidecar_name,
    write_manifest,
    write_shard,
)
from metrics.frame_metric import Metric
from metrics.registry import resolve_names
from preference.candidates import CandidateModel, Candidates, model_fingerprint
from preference.clips import Clip, ClipFolder
from preference.config import PreferenceConfig
from preference.ranking import Ranking, is_pair, rank
from preference.ranking_metrics import FITTED, fitted_niqe, open_metrics


def build(
    config: PreferenceConfig,
    model_folder: Path,
    data: str,
    output: Path,
    *,
    weights: Path | None = None,
    device: str = "cpu",
    part: tuple[int, int] = (0, 1),
    storage: StorageConfig | None = None,
) -> int | None:
    """Make the shards of `part` that are not there yet.

    Returns:
        Pairs in the finished dataset, or None while shards of other parts are missing.

    Raises:
        UserError: anything the command's user can mend, found before the first candidate where possible.
    """
    clips = ClipFolder(data, storage)
    count = min(config.pairs, len(clips))
    plan = {"data": clips.fingerprint, "model": model_fingerprint(model_folder), "config": plan_config(config)}
    folder, shards = open_folder(output, storage), math.ceil(count / config.clips_per_shard)
    committed = committed_shards(folder, shards, plan_hash(plan))
    mine = [index for index in range(shards) if index % part[1] == part[0] and index not in committed]
    spans = {index: shard_span(index, config.clips_per_shard, count) for index in mine}

    if mine:
        metrics = open_metrics(config, weights, device)
        model = CandidateModel(model_folder, config, device)
        if FITTED in resolve_names(config.metrics):
            metrics.append(fitted_niqe(config, clips, model, output, keep=bool(committed)))
        with progress(sum(map(len, spans.values())), "preference pairs", "clips") as bar:
            for index, span in spans.items():
                samples, dropped = [], []
                for position in span:
                    sample, record = make_pair(clips[position], model, metrics, config.minimum_gap)
                    if sample:
                        samples.append(sample)
                    else:
                        dropped.append(record)
                    bar.advance(1)
                write_shard(folder, index, samples, {"plan": plan_hash(plan), "dropped": dropped})

    committed = committed_shards(folder, shards, plan_hash(plan))
    if len(committed) < shards:
        return None
    dropped_count = sum(len(sidecar.extra["dropped"]) for sidecar in committed.values())
    manifest = write_manifest(folder, "pairs", committed.values(), {"plan": plan, "dropped": dropped_count})
    return manifest.samples


def make_pair(
    clip: Clip, model: CandidateModel, metrics: list[Metric], minimum_gap: float
) -> tuple[Sample | None, dict[str, Any]]:
    """The sample of one clip, or None where the candidates are too close, and its JSON record."""
    candidates = model.candidates(clip)
    reference, reference_is = model.reference(clip)
    scores: dict[str, list[float]] = {metric.name: [] for metric in metrics}
    for latent in candidates.latents:
        video = model.decode(latent)
        for metric in metrics:
            scores[metric.name].append(metric(video, reference if metric.needs_reference else None))
    try:
        ranking = rank(scores, {metric.name: type(metric) for metric in metrics})
    except ValueError as error:
        raise UserError(f"clip {clip.key}: {error}; the model's output or the clip is broken") from None
    record = _record(clip, candidates, scores, ranking) | {"reference": reference_is}
    if not is_pair(ranking, minimum_gap):
        return None, {"key": clip.key, "gap": ranking.gap, "scores": scores}
    tensors = {
        "z_win": candidates.latents[ranking.best],
        "z_lose": candidates.latents[ranking.worst],
        "z_lr": clip.z_lr,
    }
    content = save({name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()})
    text = json.dumps(record, sort_keys=True).encode()
    return Sample(clip.key, {"pair.safetensors": content, "json": text}), record


def plan_config(config: PreferenceConfig) -> dict[str, Any]:
    """What of the configuration decides the content; batch size and precision's siblings do not."""
    return config.model_dump(mode="json", exclude={"candidates_per_forward"})


def plan_hash(plan: dict[str, Any]) -> str:
    """Short identity of a plan."""
    return fingerprint(plan)[:16]


def shard_span(index: int, clips_per_shard: int, count: int) -> range:
    """Positions of the clips of shard `index`."""
    return range(index * clips_per_shard, min((index + 1) * clips_per_shard, count))


def committed_shards(folder: Folder, shards: int, plan: str) -> dict[int, Sidecar]:
    """Sidecars of complete shards by index.

    Raises:
        UserError: the folder holds pairs of another plan.
    """
    sizes = folder.sizes("shards/")
    committed = {}
    for index in range(shards):
        name = shard_name(index)
        if sidecar_name(name) not in sizes:
            continue
        sidecar = read_sidecar(folder, name)
        if sidecar.extra.get("plan") != plan:
            raise UserError(
                f"{folder.url} holds pairs made from other data, another model or another configuration; "
                "choose another --output or delete it"
            )
        if sizes.get(name) == sidecar.bytes:
            committed[index] = sidecar
    return committed


def _record(clip: Clip, candidates: Candidates, scores: dict[str, list[float]], ranking: Ranking) -> dict[str, Any]:
    return {
        "key": clip.key,
        "caption": candidates.caption,
        "noise_win": candidates.noises[ranking.best],
        "noise_lose": candidates.noises[ranking.worst],
        "candidate_noises": candidates.noises,
        "scores": scores,
        "combined": list(ranking.combined),
        "best": ranking.best,
        "worst": ranking.worst,
        "gap": ranking.gap,
    }


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
    parser.add_argument("--part", default="0/1", help="i/n: make only every n-th shard, from i")
    arguments = parser.parse_args()
    if arguments.metrics:
        arguments.overrides.append(f"preference.metrics={arguments.metrics}")
    config, storage = load_sections(arguments, preference=PreferenceConfig, storage=StorageConfig)
    pairs = build(
        config,
        arguments.model,
        arguments.data,
        arguments.output,
        weights=arguments.weights,
        device=arguments.device,
        part=_part(arguments.part),
        storage=storage,
    )
    if pairs is None:
        print(f"part {arguments.part} is done; the manifest follows with the last part")
    else:
        print(f"{pairs} of {config.pairs} pairs ranked by {config.metrics}: {arguments.output}")


if __name__ == "__main__":
    run_command(main)
