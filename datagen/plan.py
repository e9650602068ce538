"""The plan: which samples are made, from which window and crop, with which seed, into which shard.

A pure function of the survey and the configuration, made before any shard: so a killed job finds the same plan
again, and a shard is the same whichever worker makes it. The order is that of a hash of seed and stretch of
video, which mixes the sources and keeps neighbouring windows together: a worker then decodes a stretch once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from common.fingerprint import fingerprint
from common.seeding import derive_seed
from datagen.config import DatagenConfig, FilterConfig
from datagen.survey.source_survey import SourceSurvey, Window


@dataclass(frozen=True)
class SamplePlan:
    """One sample to make.

    Attributes:
        key: name in the shards. clip: names the HR clip, shared by its variants.
        content: hash of the source's video stream.
        start, pts: first frame's index and time stamp. crop: top, left, height, width, px.
    """

    key: str
    clip: str
    source: str
    content: str
    path: str
    caption: str
    start: int
    pts: int | None
    frames: int
    frames_per_second: float
    crop: tuple[int, int, int, int]
    variant: int
    seed: int


@dataclass(frozen=True)
class Plan:
    """All samples in order, what was left out and why, and the hash that names this plan."""

    samples: list[SamplePlan]
    rejected: list[dict[str, Any]]
    samples_per_shard: int
    hash: str

    def shards(self) -> list[list[SamplePlan]]:
        size = self.samples_per_shard
        return [self.samples[first : first + size] for first in range(0, len(self.samples), size)]


def make_plan(surveys: Iterable[SourceSurvey], config: DatagenConfig, versions: dict[str, str]) -> Plan:
    """Windows that pass the filters, crops and variants of each, in hashed order.

    Args:
        surveys: in the order of the sources.
        versions: what else decides the bytes of a shard (VAE hash, libraries); part of the plan's hash.
    """
    samples: list[SamplePlan] = []
    rejected: list[dict[str, Any]] = []
    duplicates = _Duplicates(config.filters.duplicate_distance)
    for survey in surveys:
        reason = _reject_source(survey, config)
        if reason:
            rejected.append({"source": survey.source.id, "reason": reason})
            continue
        for window in survey.windows:
            reason = _reject_window(window, config.filters) or duplicates.find(survey.source.id, window)
            if reason:
                rejected.append({"source": survey.source.id, "start": window.start, "reason": reason})
                continue
            samples += _samples_of(survey, window, config)
    span = config.windows_together * (config.clip.stride or config.clip.frames)
    samples.sort(
        key=lambda sample: (
            derive_seed(config.seed, "order", sample.source, sample.start // span),
            sample.source,
            sample.start,
            sample.clip,
            sample.variant,
        )
    )
    identity = {
        "samples": [{k: v for k, v in asdict(sample).items() if k != "path"} for sample in samples],
        "config": deciding(config),
        "versions": versions,
    }
    return Plan(samples, rejected, config.samples_per_shard, fingerprint(identity))


def deciding(config: DatagenConfig) -> dict[str, Any]:
    """The part of the configuration that decides what is in the dataset: all but how fast and from where."""
    left_out = {"encode", "max_quarantined", "decode_timeout_s"}
    return config.model_dump(mode="json", exclude=left_out)


def _reject_source(survey: SourceSurvey, config: DatagenConfig) -> str | None:
    height, width = config.clip.crop
    height, width = max(height, config.filters.min_height), max(width, config.filters.min_width)
    if survey.height < height or survey.width < width:
        return f"resolution {survey.width}x{survey.height} is below {width}x{height}"
    if survey.frames < config.clip.frames:
        return f"length {survey.frames} frames is below the window of {config.clip.frames}"
    if not survey.windows:
        return f"no scene is as long as the window of {config.clip.frames} frames"
    return None


def _reject_window(window: Window, filters: FilterConfig) -> str | None:
    floors = {
        "black: luma": (window.luma, filters.min_luma),
        "empty: contrast": (window.contrast, filters.min_contrast),
        "static: motion": (window.motion, filters.min_motion),
        "blurred: sharpness": (window.sharpness, filters.min_sharpness),
    }
    for name, (value, floor) in floors.items():
        if value < floor:
            return f"{name} {value} is below {floor}"
    return None


def _samples_of(survey: SourceSurvey, window: Window, config: DatagenConfig) -> Iterator[SamplePlan]:
    source = survey.source
    for index in range(config.clip.crops_per_window):
        crop = _crop(survey, window.start, index, config)
        clip = f"{derive_seed(source.id, window.start, config.clip.frames, crop, index):016x}"
        for variant in range(config.variants):
            yield SamplePlan(
                key=f"{clip}-{variant}",
                clip=clip,
                source=source.id,
                content=survey.content,
                path=source.path,
                caption=source.caption or config.caption,
                start=window.start,
                pts=window.pts,
                frames=config.clip.frames,
                frames_per_second=survey.frames_per_second,
                crop=crop,
                variant=variant,
                seed=derive_seed(config.seed, clip, variant),
            )


def _crop(survey: SourceSurvey, start: int, index: int, config: DatagenConfig) -> tuple[int, int, int, int]:
    height, width = config.clip.crop
    room = (survey.height - height, survey.width - width)
    if config.clip.crop_position == "center":
        return room[0] // 2, room[1] // 2, height, width
    place = [
        derive_seed(config.seed, survey.source.id, start, index, side) % (free + 1)
        for side, free in zip(("top", "left"), room, strict=True)
    ]
    return place[0], place[1], height, width


class _Duplicates:
    """Finds windows whose three hashes are near those of a window of another source, seen before.

    Hashes within d bits agree in at least one of d + 1 bands (pigeonhole), so only windows that share a band of the
    middle frame's hash are compared.
    """

    def __init__(self, distance: int) -> None:
        self._distance = distance
        self._bands: list[dict[int, list[tuple[str, int, list[int]]]]] = [defaultdict(list) for _ in range(distance)]

    def find(self, source: str, window: Window) -> str | None:
        if not self._distance:
            return None
        hashes = [int(text, 16) for text in window.hashes]
        for band, table in enumerate(self._bands):
            for other, start, others in table[self._band(hashes[1], band)]:
                if other != source and all(
                    (a ^ b).bit_count() < self._distance for a, b in zip(hashes, others, strict=True)
                ):
                    return f"duplicate of {other} at frame {start}"
        for band, table in enumerate(self._bands):
            table[self._band(hashes[1], band)].append((source, window.start, hashes))
        return None

    def _band(self, value: int, band: int) -> int:
        width = 64 // self._distance
        return value >> (band * width) if band == self._distance - 1 else value >> (band * width) & (1 << width) - 1
