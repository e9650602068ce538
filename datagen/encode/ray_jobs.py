"""The Ray Data job that makes samples: CPU tasks decode and degrade, VAE actors encode.

The driver gets references to blocks of rows, in order, so that files are written in an order that no worker decides. A
row is one clip with up to VARIANTS_PER_ROW variants, in Arrow (NumPy would cut trailing zeros off byte strings):

    plans    JSON      the variants' SamplePlans            faults  JSON         per variant, a Fault or null
    place    JSON      its latent in an earlier dataset     draws   JSON         per variant, what was drawn
    hr       bytes     RGB pixels, until encoded            lr      list[bytes]  RGB pixels, until encoded
    z_hr     bytes     safetensors of an earlier latent     reused  bool
    hr.mkv   bytes     stored clip or nothing               lr.mkv  list[bytes]
    latents  list[bytes]  the member latents.safetensors, in place of hr, z_hr and lr
"""

from __future__ import annotations

import itertools
import json
import logging
import uuid
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from common.errors import StorageError
from common.scale import SCALE
from common.storage import StorageConfig
from datagen.config import DatagenConfig
from datagen.dataset.shard_format import Sample
from datagen.encode.attempts import MAX_ATTEMPTS, attempt
from datagen.encode.clip import Clip, Fault, Variant, make_clip, make_sample
from datagen.encode.latent_reuse import LATENTS, EarlierDataset, Place, read_latent
from datagen.plan import SamplePlan
from datagen.ray_cluster import MAX_RETRIES, VARIANTS_PER_ROW, dataset_of, iterate_blocks, text_array

#: reasons against a clip
ENDED = f"ends the process that works on it ({MAX_ATTEMPTS} times; out of memory, or a crash)"
#: kind of a Fault that is not the clip's own: its file is out of reach. A status, as of an exception Ray Data passes on
#: its own wrapping only
UNREACHABLE = "unreachable"
NOT_FINITE = "its latent is not finite (NaN or infinity)"


class EncodedSample(NamedTuple):
    """A planned sample, made, or why it could not be; and whether its z_hr came from an earlier dataset."""

    plan: SamplePlan
    made: Sample | Fault
    reused: bool


class EncodedBlock(NamedTuple):
    """The next planned samples, as rows in an object store; `bytes` says how large."""

    reference: Any
    samples: int
    bytes: int


def encode(
    plans: list[SamplePlan],
    config: DatagenConfig,
    storage: StorageConfig,
    vae: str,
    earlier: EarlierDataset | None = None,
) -> Generator[EncodedBlock]:
    """Blocks of the planned samples in order: decoded and degraded by CPU tasks, encoded by VAE actors.

    Args:
        plans: None of them, no Ray job.
        vae: folder of the VAE, on every node.
        earlier: where z_hr of some clips can be taken from.
    """
    if not plans:
        return
    job = uuid.uuid4().hex
    earlier_url, places = (earlier.url, earlier.places) if earlier else ("", {})

    def degrade(table: pa.Table) -> pa.Table:
        plans, place = _plans(table["plans"][0].as_py()), json.loads(table["place"][0].as_py())
        z_hr = read_latent(earlier_url, Place.of(place), plans[0], storage) if place else b""
        with attempt(job, "degrade", plans[0].key) as allowed:
            made = _reachable(plans, config, storage) if allowed else Fault(ENDED)
        return _degraded(table["plans"], made, len(plans), z_hr)

    class Actor(_EncodeActor):
        def __init__(self) -> None:
            super().__init__(vae, config, job)

    gpus = int(ray.cluster_resources().get("GPU", 0))
    actors = config.encode.actors or max(1, gpus)
    share = {"num_gpus": 1} if gpus else {"num_cpus": config.encode.cpus}
    rows = [
        {"plans": json.dumps([asdict(plan) for plan in clip]), "place": json.dumps(places.get(clip[0].clip))}
        for clip in clips_of(plans)
    ]
    dataset = (
        dataset_of(rows)
        .map_batches(degrade, batch_size=1, batch_format="pyarrow", num_cpus=1, max_retries=MAX_RETRIES)
        .map_batches(
            Actor,
            # a clip brings its variants
            batch_size=-(-config.encode.batch_size // (1 + min(config.variants, VARIANTS_PER_ROW))),
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=actors),
            **share,
        )
    )
    in_row = map(len, clips_of(plans))
    with closing(iterate_blocks(dataset)) as blocks:
        for reference, count, size in blocks:
            yield EncodedBlock(reference, sum(itertools.islice(in_row, count)), size)


def samples_of(block: pa.Table, versions: dict[str, str], first: int, last: int) -> Iterator[EncodedSample]:
    """Samples `first`...`last` - 1 of those that the rows of a block hold."""
    position = 0
    for index in range(block.num_rows):
        count = len(json.loads(block["plans"][index].as_py()))
        if position < last and position + count > first:
            (row,) = block.slice(index, 1).to_pylist()
            yield from itertools.islice(_samples(row, versions), max(first - position, 0), last - position)
        position += count


def clips_of(plans: list[SamplePlan]) -> Iterator[list[SamplePlan]]:
    """`plans` in order, variants of a clip together: what is left of them, where a job goes on in a clip's middle."""
    for _, variants in itertools.groupby(plans, lambda plan: plan.clip):
        while part := list(itertools.islice(variants, VARIANTS_PER_ROW)):
            yield part


def _reachable(plans: list[SamplePlan], config: DatagenConfig, storage: StorageConfig) -> Clip | Fault:
    try:
        return make_clip(plans, config, storage)
    except StorageError as error:
        return Fault(str(error), UNREACHABLE)


def _degraded(plans: pa.ChunkedArray, made: Clip | Fault, variants: int, z_hr: bytes) -> pa.Table:
    """What travels to the VAE: LR of each variant, and HR unless its latent is known."""
    parts = [made] * variants if isinstance(made, Fault) else made.variants
    good = [part if isinstance(part, Variant) else None for part in parts]
    hr, stored = (made.hr, made.stored) if isinstance(made, Clip) and any(good) else (None, b"")
    return pa.table(
        {
            "plans": plans,
            "faults": text_array([json.dumps([asdict(part) if isinstance(part, Fault) else None for part in parts])]),
            "draws": text_array([json.dumps([part and part.draws for part in good])]),
            "hr": _bytes([hr.tobytes() if hr is not None and not z_hr else b""]),
            "z_hr": _bytes([z_hr]),
            "reused": [bool(z_hr)],
            "lr": _byte_lists([[part.lr.tobytes() if part else b"" for part in good]]),
            "hr.mkv": _bytes([stored]),
            "lr.mkv": _byte_lists([[part.stored if part else b"" for part in good]]),
        }
    )


class _EncodeActor:
    """datagen/encode/vae_encoder.py over Arrow rows: HR once, LR of each variant that was made."""

    def __init__(self, vae: str, config: DatagenConfig, job: str = "") -> None:
        from datagen.encode.vae_encoder import Encoder

        self._job = job
        self._encoder = Encoder(vae, config.encode.cpus, config.encode.batch_size)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.select(["plans", "hr", "z_hr", "lr"]).to_pylist()
        with ExitStack() as stack:
            keys = [_plans(row["plans"])[0].key for row in rows]
            allowed = [stack.enter_context(attempt(self._job, "encode", key)) for key in keys]
            made = iter(self._isolated([row for row, may in zip(rows, allowed, strict=True) if may]))
            latents = [
                next(made) if may else [Fault(ENDED)] * len(row["lr"]) for row, may in zip(rows, allowed, strict=True)
            ]
        faults = [
            [
                asdict(part) if isinstance(part, Fault) and not fault else fault
                for fault, part in zip(before, row, strict=True)
            ]
            for before, row in zip(map(json.loads, table["faults"].to_pylist()), latents, strict=True)
        ]
        contents = [[b"" if isinstance(part, Fault) else part for part in row] for row in latents]
        table = table.drop_columns(["hr", "z_hr", "lr", "faults"])
        table = table.append_column("faults", text_array([json.dumps(row) for row in faults]))
        return table.append_column("latents", _byte_lists(contents))

    def _isolated(self, rows: list[dict[str, Any]]) -> list[list[bytes | Fault]]:
        """`_latents`, where the VAE fails clip by clip, and with a second try for each: no clip costs another one."""
        try:
            return self._latents(rows)
        except Exception as error:
            logging.getLogger(__name__).warning("VAE, %d clips: %s", len(rows), error)
        if len(rows) > 1:
            return [latents for row in rows for latents in self._isolated([row])]
        self._encoder.free_memory()
        try:
            return self._latents(rows)
        except Exception as error:
            return [[Fault(f"VAE: {type(error).__name__}: {error}")] * len(row["lr"]) for row in rows]

    def _latents(self, rows: list[dict[str, Any]]) -> list[list[bytes | Fault]]:
        """The member `latents.safetensors` of each variant, nothing where there is no LR."""
        from safetensors.torch import load

        from datagen.encode.vae_encoder import latents_member

        shapes = [_plans(row["plans"])[0] for row in rows]
        hr = [_pixels(row["hr"], plan, 1) for row, plan in zip(rows, shapes, strict=True) if row["hr"]]
        lr = [
            _pixels(content, plan, SCALE)
            for row, plan in zip(rows, shapes, strict=True)
            for content in row["lr"]
            if content
        ]
        z_hr, z_lr = map(iter, self._encoder.latents(hr, lr))
        latents: list[list[bytes | Fault]] = []
        for row in rows:
            high = next(z_hr) if row["hr"] else row["z_hr"] and load(row["z_hr"])["z_hr"]
            members = [latents_member(high, next(z_lr)) if content else b"" for content in row["lr"]]
            latents.append([Fault(NOT_FINITE) if member is None else member for member in members])
        return latents


def _samples(row: dict[str, Any], versions: dict[str, str]) -> Iterator[EncodedSample]:
    plans, faults, draws = _plans(row["plans"]), json.loads(row["faults"]), json.loads(row["draws"])
    for index, plan in enumerate(plans):
        if faults[index]:
            yield EncodedSample(plan, Fault(**faults[index]), False)
            continue
        members = {LATENTS: row["latents"][index], "lr.mkv": row["lr.mkv"][index], "hr.mkv": row["hr.mkv"]}
        yield EncodedSample(plan, make_sample(plan, draws[index], members, versions), row["reused"])


def _pixels(content: bytes, plan: SamplePlan, scale: int) -> np.ndarray:
    _, _, height, width = plan.crop
    return np.frombuffer(bytearray(content), np.uint8).reshape(plan.frames, height // scale, width // scale, 3)


def _plans(text: str) -> list[SamplePlan]:
    return [SamplePlan(**fields | {"crop": tuple(fields["crop"])}) for fields in json.loads(text)]


def _bytes(values: list[bytes]) -> pa.Array:
    return pa.array(values, pa.large_binary())


def _byte_lists(values: list[list[bytes]]) -> pa.Array:
    return pa.array(values, pa.list_(pa.large_binary()))
