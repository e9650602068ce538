"""The two Ray Data jobs: survey of the sources, and samples of the plan.

Both stream rows to the driver in order, so that whoever consumes them writes files in an order that no worker decides.
Rows are Arrow: the bytes of a clip travel as they are (NumPy would cut trailing zeros off byte strings).
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext

from datagen.clip import make_clip
from datagen.config import DatagenConfig
from datagen.isolated import survey_isolated
from datagen.plan import SamplePlan
from datagen.shards import Sample
from datagen.sources import Source
from pipeline.errors import UserError

#: how often a task is tried again after its worker died; Ray Data's default is for ever [ours]
MAX_RETRIES = 3


def start_ray(address: str | None, workers: int | None, config: DatagenConfig) -> None:
    """Connect to the cluster at `address`, or start Ray on this machine with `workers` tasks at once (default: one
    per CPU).

    What the VAE actors hold comes on top, or they would keep the tasks waiting while they wait for clips themselves.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray announces other names for arguments such as max_retries, which 2.60 does not have yet
    warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
    # Ray's C++ side writes warnings for its developers to stderr; failures reach us as exceptions
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # the environment reaches the workers: one thread per task, cores are for other tasks
    environment = {"env_vars": {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}}
    start: dict[str, Any] = {"address": address}
    if not address:
        held = (config.encode.actors or 1) * config.encode.cpus
        cpus = (workers or os.cpu_count() or 1) + held
        start = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    with _silent_stderr():
        ray.init(runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR, **start)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Ray's start announces its own log level on the file descriptor itself."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def survey_rows(sources: list[Source], config: DatagenConfig) -> Iterator[dict[str, Any]]:
    """Survey of each source, in order: datagen/survey.py's result, or `{"error": ...}`, with source and path."""

    def work(table: pa.Table) -> pa.Table:
        results = []
        for row in table.to_pylist():
            facts = {"source": row["id"], "path": row["path"], "caption": row["caption"]}
            try:
                facts |= survey_isolated(row["path"], row["id"], config)
            except UserError as error:
                facts["error"] = str(error)
            except Exception as error:
                facts["error"] = f"{row['id']}: {type(error).__name__}: {error}"
            results.append(json.dumps(facts))
        return pa.table({"survey": pa.array(results, pa.large_string())})

    rows = [asdict(source) | {"caption": source.caption or ""} for source in sources]
    dataset = _dataset(rows).map_batches(
        work, batch_size=1, batch_format="pyarrow", num_cpus=1, max_retries=MAX_RETRIES
    )
    for row in _rows(dataset):
        yield json.loads(row["survey"])


def sample_rows(
    plans: list[SamplePlan], config: DatagenConfig, vae: str, versions: dict[str, str]
) -> Iterator[tuple[SamplePlan, Sample | str]]:
    """Each planned sample in order, made, or the reason why it could not be."""

    def degrade(table: pa.Table) -> pa.Table:
        plan = _plan(table["plan"][0].as_py())
        made = make_clip(plan, config)
        clips = made.get("clips", {})
        row = {
            "plan": [table["plan"][0].as_py()],
            "error": [made.get("error", "")],
            "draws": [json.dumps(made.get("draws", {}))],
            "hr": [made["hr"].tobytes() if "hr" in made else b""],
            "lr": [made["lr"].tobytes() if "lr" in made else b""],
            "lr.mkv": [clips.get("lr.mkv", b"")],
            "hr.mkv": [clips.get("hr.mkv", b"")],
        }
        text = ("plan", "error", "draws")
        return pa.table(
            {
                name: pa.array(value, pa.large_string() if name in text else pa.large_binary())
                for name, value in row.items()
            }
        )

    class Actor(_EncodeActor):
        def __init__(self) -> None:
            super().__init__(vae, config.encode.cpus)

    gpus = int(ray.cluster_resources().get("GPU", 0))
    actors = config.encode.actors or max(1, gpus)
    share = {"num_gpus": 1} if gpus else {"num_cpus": config.encode.cpus}
    dataset = (
        _dataset([{"plan": json.dumps(asdict(plan))} for plan in plans])
        .map_batches(degrade, batch_size=1, batch_format="pyarrow", num_cpus=1, max_retries=MAX_RETRIES)
        .map_batches(
            Actor,
            batch_size=config.encode.batch_size,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=actors),
            **share,
        )
    )
    for row in _rows(dataset):
        plan = _plan(row["plan"])
        yield plan, row["error"] or _sample(plan, row, versions)


class _EncodeActor:
    """datagen/encode.py over Arrow rows; rows with an error pass through."""

    def __init__(self, vae: str, threads: int) -> None:
        from datagen.encode import Encoder

        self._encoder = Encoder(vae, threads)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        good = [row for row in rows if not row["error"]]
        if good:
            clips = [_clip(row, _plan(row["plan"])) for row in good]
            hr, lr = (np.stack(part) for part in zip(*clips, strict=True))
            for row, latents in zip(good, self._encoder.latents(hr, lr), strict=True):
                row["latents"] = latents
        encoded = pa.array([row.get("latents", b"") for row in rows], pa.large_binary())
        return table.drop_columns(["hr", "lr"]).append_column("latents", encoded)


def _clip(row: dict[str, Any], plan: SamplePlan) -> tuple[np.ndarray, np.ndarray]:
    _, _, height, width = plan.crop
    hr = np.frombuffer(row["hr"], np.uint8).reshape(plan.frames, height, width, 3)
    lr = np.frombuffer(row["lr"], np.uint8).reshape(plan.frames, height // 4, width // 4, 3)
    return hr, lr


def _sample(plan: SamplePlan, row: dict[str, Any], versions: dict[str, str]) -> Sample:
    """Members in the order they are stored; the metadata never holds a path of this machine."""
    draws = json.loads(row["draws"])
    metadata = {
        "source": plan.source,
        "clip": plan.clip,
        "window": {"start": plan.start, "frames": plan.frames, "frames_per_second": plan.frames_per_second},
        "crop": dict(zip(("top", "left", "height", "width"), plan.crop, strict=True)),
        "variant": plan.variant,
        "caption": plan.caption,
        "seed": plan.seed,
        "recipe": draws["recipe"],
        "lr_psnr_db": draws["lr_psnr_db"],
        "draws": draws["operations"],
        "versions": versions,
    }
    members = {"latents.safetensors": row["latents"]}
    members |= {name: row[name] for name in ("lr.mkv", "hr.mkv") if row[name]}
    return Sample(plan.key, members | {"json": json.dumps(metadata, sort_keys=True).encode()})


def _plan(text: str) -> SamplePlan:
    fields = json.loads(text)
    return SamplePlan(**fields | {"crop": tuple(fields["crop"])})


def _dataset(rows: list[dict[str, Any]]) -> ray.data.Dataset:
    """Few rows per task: tasks are short enough to balance, and long enough to outweigh their scheduling."""
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    per_task = int(np.clip(len(rows) // (8 * cpus), 1, 8))
    return ray.data.from_items(rows, override_num_blocks=-(-len(rows) // per_task))


def _rows(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        for index in range(batch.num_rows):
            yield batch.slice(index, 1).to_pylist()[0]
