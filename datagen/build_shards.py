"""Videos become shards.

    python -m datagen.build_shards --config configs/tiny.yaml --input DIR --output DIR

survey (every source decoded once, small) -> plan (samples, their order, seeds, shards) -> encode -> write. Shards are
written atomically. Run the command again to resume; it ends with the same bytes. With --survey-only it ends after the
survey, which needs neither GPU nor VAE.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common.command_line import add_config_options, exit_on_sigterm, load_sections
from common.errors import run_command
from common.storage import Folder, StorageConfig, open_folder
from datagen.config import DatagenConfig
from datagen.dataset.data_card import REPORT
from datagen.dataset.shard_format import Manifest
from datagen.encode.latent_reuse import check_reusable, find_clips, surveyed_alike
from datagen.encode.ray_jobs import encode
from datagen.encode.shard_writer import ShardWriters
from datagen.example_frames import example_frames
from datagen.format_revision import code_versions, vae_hash
from datagen.job_folder import (
    begin,
    begun_plan,
    check_limit,
    committed_shards,
    finish,
    refuse_another_plan,
    without_failed,
    writing,
)
from datagen.plan import make_plan
from datagen.ray_cluster import memory_ahead, ray_when_needed
from datagen.shard_writing import write_shards
from datagen.sources import Source, find_sources
from datagen.survey.source_survey import SourceSurvey, Unreadable
from datagen.survey.survey_cache import Survey, survey_all
from pipeline.model.config import ModelConfig


def main() -> None:
    arguments = _arguments()
    config, model, storage = load_sections(arguments, datagen=DatagenConfig, model=ModelConfig, storage=StorageConfig)
    if arguments.check:
        print(f"{len(find_sources(arguments.input, storage, config.caption_suffix))} sources")
        return
    exit_on_sigterm()  # temporary files are removed, committed shards stay
    job: dict[str, Any] = {
        "inputs": arguments.input,
        "output": arguments.output,
        "address": arguments.address,
        "workers": arguments.workers,
    }
    if arguments.survey_only:
        surveys = survey(config, storage, **job)
        unreadable = sum(isinstance(found, Unreadable) for found in surveys)
        print(f"{arguments.output}: {len(surveys)} sources surveyed, {unreadable} of them unreadable")
        return
    manifest = build(config, storage, vae=model.vae, reuse=arguments.reuse, retry_failed=arguments.retry_failed, **job)
    held_out = sum(entry.samples for entry in manifest.shards_of("validation"))
    also = f", {held_out} of them held out" if config.validation_share else ""
    print(f"{arguments.output}: {manifest.samples} samples in {len(manifest.shards)} shards{also}")
    left_out = manifest.extra["left_out"]
    told = (", ".join(f"{count} {reason}" for reason, count in table.items()) for table in left_out.values())
    if said := "; ".join(f"{of}: {reasons}" for of, reasons in zip(left_out, told, strict=True)):
        print(f"left out of {said}; {REPORT} there shows an example of each, quarantine.jsonl lists all")


def survey(
    config: DatagenConfig,
    storage: StorageConfig,
    *,
    inputs: list[str],
    output: str,
    address: str | None = None,
    workers: int | None = None,
) -> list[Survey]:
    """Do or finish the survey of the dataset at `output`, from which `build` goes on; takes and raises the same."""
    sources, folder = find_sources(inputs, storage, config.caption_suffix), open_folder(output, storage)
    with writing(folder), ray_when_needed(address, workers, config) as start_ray:
        refuse_another_plan(folder, config, code_versions(config.sharpen_targets))
        return _surveyed(folder, sources, config, storage, start_ray)


def _surveyed(
    folder: Folder,
    sources: list[Source],
    config: DatagenConfig,
    storage: StorageConfig,
    start_ray: Callable[[], None],
    earlier: Folder | None = None,
) -> list[Survey]:
    check = partial(check_limit, sources=len(sources), config=config)
    look_again = begun_plan(folder) is None
    surveys = survey_all(
        folder, sources, config, storage, start_ray, earlier=earlier, look_again=look_again, check=check
    )
    check([found for found in surveys if isinstance(found, Unreadable)])
    return surveys


def build(
    config: DatagenConfig,
    storage: StorageConfig,
    *,
    vae: Path,
    inputs: list[str],
    output: str,
    address: str | None = None,
    workers: int | None = None,
    reuse: str | None = None,
    retry_failed: bool = False,
) -> Manifest:
    """Build or finish the dataset at `output`.

    Args:
        address: of a Ray cluster; None: this machine.
        workers: clips in the making at once; None: one per CPU.
        reuse: an earlier dataset, of which surveys and z_hr are taken over; the result is the same without.
        retry_failed: make shards anew that lack samples that failed.

    Raises:
        StorageError: inputs or the output out of reach, or a full disk.
        UserError: nothing to build from, too much of it unreadable or failing, an output begun with another plan, or a
            dataset to reuse that other code made.
    """
    sources = find_sources(inputs, storage, config.caption_suffix)
    versions = code_versions(config.sharpen_targets) | {"vae": vae_hash(vae)}
    if reuse:
        check_reusable(reuse, versions, storage)
    folder = open_folder(output, storage)
    with writing(folder):
        refuse_another_plan(folder, config, versions)
        with ray_when_needed(address, workers, config) as start_ray:
            surveyed = surveyed_alike(reuse, versions, storage) if reuse else None
            surveys = _surveyed(folder, sources, config, storage, start_ray, surveyed)
            unreadable = [found for found in surveys if isinstance(found, Unreadable)]
            readable = [found for found in surveys if isinstance(found, SourceSurvey)]
            plan = make_plan(readable, config, versions)
            begin(folder, plan, unreadable, config, versions)

            committed = committed_shards(folder, plan)
            if retry_failed:
                committed = without_failed(folder, committed)
            missing = [s for index, shard in enumerate(plan.shards()) if index not in committed for s in shard]
            earlier = find_clips(reuse, (sample.clip for sample in missing), storage) if reuse else None
            if missing:
                start_ray()
            shards = write_shards(
                plan,
                committed,
                lambda samples: encode(samples, config, storage, str(vae.resolve()), earlier),
                lambda: ShardWriters(folder, storage, plan.hash, versions, memory_ahead(config) // 4),
                config.max_failed,
            )
        frames_of = partial(example_frames, surveys=readable, samples=plan.samples, config=config, storage=storage)
        return finish(folder, plan, unreadable, shards, config, versions, len(sources), frames_of)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m datagen.build_shards",
        description="Cut, degrade and encode videos into WebDataset shards; run again after a crash to resume.",
    )
    add_config_options(parser)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="folders, globs, .txt lists, .csv or .parquet tables (column video, optionally caption), s3:// prefixes",
    )
    parser.add_argument("--output", required=True, help="folder or s3:// prefix of the dataset")
    parser.add_argument("--address", help="Ray cluster to run on, for instance auto; default: this machine")
    parser.add_argument("--workers", type=int, help="clips in the making at once; default: one per CPU")
    parser.add_argument("--check", action="store_true", help="only read the configuration and look for the sources")
    parser.add_argument(
        "--survey-only",
        action="store_true",
        help="end after the survey: on nodes without GPU, before the same command without it on those with",
    )
    parser.add_argument(
        "--retry-failed", action="store_true", help="make shards anew that lack samples that failed (quarantine.jsonl)"
    )
    parser.add_argument(
        "--reuse", metavar="DATASET", help="earlier dataset: surveys and z_hr are taken from it where they are the same"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
