"""The plan: which samples are made, from which window and crop, with which seed, into which shard.

A pure function of the survey and the configuration, made before any shard: so a killed job finds the same plan
again, and a shard is the same whichever worker makes it. The order is that of a hash of seed and stretch of
video, which mixes the sources and keeps neighbouring windows together: a worker then decodes a stretch once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from common.seeding import derive_seed
from common.video_probe import HLG, PQ
from datagen.config import DatagenConfig, FilterConfig
from datagen.dataset.shard_format import Split
from datagen.duplicates import find_duplicates, first_marked
from datagen.split import held_out_contents
from datagen.survey.source_survey import SourceSurvey, Window


@dataclass(frozen=True, slots=True)
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


#: where the inputs are mounted does not matter
_HASHED_FIELDS = tuple(field.name for field in fields(SamplePlan) if field.name != "path")


#: how the reason against a training source begins that shares a window with a held-out one
COPY = "copy of held-out"
#: a window with the reason against it or None; of a source that is left out, no window and the reason
Found = tuple[SourceSurvey, Window | None, str | None]


@dataclass(frozen=True)
class Plan:
    """All samples in order, what was left out and why, and the hash that names this plan.

    Attributes:
        held_out: how many samples are held out, the last ones; None without a split.
    """

    samples: list[SamplePlan]
    rejected: list[dict[str, Any]]
    samples_per_shard: int
    hash: str
    held_out: int | None = None

    def shards(self) -> list[list[SamplePlan]]:
        """Training samples first; no shard holds both kinds."""
        size = self.samples_per_shard
        parts = self.samples[: self._training], self.samples[self._training :]
        return [part[first : first + size] for part in parts for first in range(0, len(part), size)]

    def split_of(self, shard: int) -> Split | None:
        """Which samples the shard of this index holds; None without a split."""
        if self.held_out is None:
            return None
        return "train" if shard * self.samples_per_shard < self._training else "validation"

    @property
    def _training(self) -> int:
        return len(self.samples) - (self.held_out or 0)


def make_plan(surveys: Iterable[SourceSurvey], config: DatagenConfig, versions: dict[str, str]) -> Plan:
    """Windows that pass the filters, crops and variants of each, in hashed order.

    Args:
        surveys: in the order of the sources.
        versions: what else decides the bytes of a shard (VAE hash, libraries); part of the plan's hash.
    """
    windows, rejected, held_out = _passing(surveys, config)
    samples = [sample for survey, window in windows for sample in _samples_of(survey, window, config)]
    span = config.windows_together * (config.clip.stride or config.clip.frames)
    samples.sort(
        key=lambda sample: (
            sample.content in held_out,
            derive_seed(config.seed, "order", sample.source, sample.start // span),
            sample.source,
            sample.start,
            sample.clip,
            sample.variant,
        )
    )
    return Plan(
        samples,
        rejected,
        config.samples_per_shard,
        _plan_hash(samples, deciding(config), versions),
        sum(sample.content in held_out for sample in samples) if config.validation_share else None,
    )


def _passing(
    surveys: Iterable[SourceSurvey], config: DatagenConfig
) -> tuple[list[tuple[SourceSurvey, Window]], list[dict[str, Any]], frozenset[str]]:
    """Windows that are used, and what is not with the reason, both in the order of the surveys; contents held out."""
    found = list(_filtered(surveys, config))
    candidates = _candidates(found)
    held_out = held_out_contents((survey.content for survey, _ in candidates), config.validation_share, config.seed)
    if held_out:
        found = list(_without_copies(found, held_out, config.filters))
        candidates = _candidates(found)
    hashes, structured = _hashes(candidates)
    distance = config.filters.duplicate_distance
    duplicate_of = iter(find_duplicates(hashes, structured, _numbered(candidates), distance).tolist())
    windows: list[tuple[SourceSurvey, Window]] = []
    rejected: list[dict[str, Any]] = []
    for survey, window, reason in found:
        if window is None:
            rejected.append({"source": survey.source.id, "reason": reason})
            continue
        if reason is None and (first := next(duplicate_of)) >= 0:
            original, at = candidates[first]
            reason = f"duplicate of {original.source.id} at frame {at.start}"
        if reason is None:
            windows.append((survey, window))
        else:
            rejected.append({"source": survey.source.id, "start": window.start, "reason": reason})
    return windows, rejected, held_out


def _candidates(found: list[Found]) -> list[tuple[SourceSurvey, Window]]:
    """Windows against which there is no reason yet."""
    return [(survey, window) for survey, window, reason in found if window is not None and reason is None]


def _without_copies(found: list[Found], held_out: frozenset[str], filters: FilterConfig) -> Iterator[Found]:
    """`found`, but of a training source that shares a window with a held-out one only why it is left out."""
    candidates = _candidates(found)
    hashes, structured = _hashes(candidates)
    marked = np.array([survey.content in held_out for survey, _ in candidates], bool)
    # where duplicates are kept, a held-out source's are still no training samples
    distance = filters.duplicate_distance or FilterConfig().duplicate_distance
    copies: dict[str, str] = {}
    near = first_marked(hashes, structured, marked, distance)
    for (survey, window), original in zip(candidates, near.tolist(), strict=True):
        if original >= 0 and survey.content not in held_out:
            of, at = candidates[original]
            reason = f"{COPY} {of.source.id}: frame {window.start} is like frame {at.start}"
            copies.setdefault(survey.source.id, reason)
    told: set[str] = set()
    for entry in found:
        name = entry[0].source.id
        if name not in copies:
            yield entry
        elif name not in told:
            told.add(name)
            yield entry[0], None, copies[name]


def _filtered(surveys: Iterable[SourceSurvey], config: DatagenConfig) -> Iterator[Found]:
    """Every window with the reason against it or None; of a source that is left out, no window and the reason."""
    first: dict[str, str] = {}
    for survey in surveys:
        reason = _reject_source(survey, config)
        # whatever its frames' hashes: flat ones have none
        if reason is None and config.filters.duplicate_distance:
            original = first.setdefault(survey.content, survey.source.id)
            reason = f"duplicate of {original}: the same video" if original != survey.source.id else None
        if reason:
            yield survey, None, reason
            continue
        for window in survey.windows:
            yield survey, window, _reject_window(window, config.filters)


def _numbered(windows: list[tuple[SourceSurvey, Window]]) -> np.ndarray:
    """int64 (N,): the same number for windows of one source."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(survey.source.id, len(numbers)) for survey, _ in windows], np.int64)


def _hashes(windows: list[tuple[SourceSurvey, Window]]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes uint64 (N, 3) of the windows' frames, and bool (N, 3), which frames have one."""
    hashes = np.zeros((len(windows), 3), np.uint64)
    structured = np.zeros((len(windows), 3), bool)
    for index, (_, window) in enumerate(windows):
        for frame, text in enumerate(window.hashes):
            if text is not None:
                hashes[index, frame], structured[index, frame] = int(text, 16), True
    return hashes, structured


def _plan_hash(samples: list[SamplePlan], config: dict[str, Any], versions: dict[str, str]) -> str:
    """`fingerprint` of all that decides the dataset, without a second copy of a million samples in memory."""
    digest = hashlib.sha256(f'{{"config": {json.dumps(config, sort_keys=True)}, "samples": ['.encode())
    for index, sample in enumerate(samples):
        identity = {field: getattr(sample, field) for field in _HASHED_FIELDS}
        digest.update(((", " if index else "") + json.dumps(identity, sort_keys=True)).encode())
    digest.update(f'], "versions": {json.dumps(versions, sort_keys=True)}}}'.encode())
    return digest.hexdigest()


def deciding(config: DatagenConfig) -> dict[str, Any]:
    """The part of the configuration that decides what is in the dataset: all but how fast and from where."""
    left_out = {"encode", "max_quarantined", "max_failed", "decode_timeout_s", "caption_suffix"}
    # datasets older than these fields: their plans stay valid
    if config.sharpen_targets is None:
        left_out.add("sharpen_targets")
    if not config.validation_share:
        left_out.add("validation_share")
    return config.model_dump(mode="json", exclude=left_out)


def _reject_source(survey: SourceSurvey, config: DatagenConfig) -> str | None:
    filters = config.filters
    height, width = config.clip.crop
    height, width = max(height, filters.min_height), max(width, filters.min_width)
    if survey.height < height or survey.width < width:
        return f"resolution {survey.width}x{survey.height} is below {width}x{height}"
    if survey.frames < config.clip.frames:
        return f"length {survey.frames} frames is below the window of {config.clip.frames}"
    if not survey.windows:
        return f"no scene is as long as the window of {config.clip.frames} frames"
    if survey.transfer in (PQ, HLG) and not filters.hdr:
        return f"hdr: transfer function {'PQ' if survey.transfer == PQ else 'HLG'}"
    if survey.interlaced > filters.max_interlaced:
        return f"interlaced: {survey.interlaced} of the frames is above {filters.max_interlaced}"
    if survey.bars > filters.max_bars:
        return f"letterboxed: {survey.bars} in black bars is above {filters.max_bars}"
    return None


def _reject_window(window: Window, filters: FilterConfig) -> str | None:
    floors = {
        "black: luma": (window.luma, filters.min_luma),
        "empty: contrast": (window.contrast, filters.min_contrast),
        "static: motion": (window.motion, filters.min_motion),
        "blurred: sharpness": (window.sharpness, filters.min_sharpness),
        "repeated: novelty": (window.novelty, filters.min_novelty),
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
