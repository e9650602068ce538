"""One HR clip and all its degradations up to the VAE, and the samples they become. Runs on CPU workers.

Nothing that a video can do escapes from here: every failure comes back as a `Fault` in the place of what it cost. Only
that its file is out of reach does, which is no failure of the video.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from common.errors import StorageError, UserError
from common.lossless_clip import encode_bytes
from common.psnr import psnr_db
from common.storage import StorageConfig
from datagen.config import DatagenConfig, FilterConfig
from datagen.dataset.shard_format import Sample
from datagen.degradation.degrade import degrade_clip
from datagen.degradation.sharpen import sharpened
from datagen.plan import SamplePlan
from datagen.sources import Source
from datagen.survey.decoder_process import decode_isolated
from datagen.survey.video_survey import contrast_of, mean_measure


@dataclass(frozen=True)
class Fault:
    """Why a sample is not made, and which `kind` of line says so in quarantine.jsonl."""

    reason: str
    kind: str = "failed"


@dataclass(frozen=True)
class Variant:
    """A degradation of a clip.

    Attributes:
        lr: uint8 (F, H/4, W/4, 3). draws: what was drawn, and LR's PSNR. stored: LR as the member `lr.mkv`, or empty.
    """

    lr: np.ndarray
    draws: dict[str, Any]
    stored: bytes


@dataclass(frozen=True)
class Clip:
    """A clip: `hr`, uint8 (F, H, W, 3), the member `hr.mkv` or nothing, and each variant or why there is none."""

    hr: np.ndarray
    stored: bytes
    variants: list[Variant | Fault]


def make_clip(plans: list[SamplePlan], config: DatagenConfig, storage: StorageConfig) -> Clip | Fault:
    """Decode and crop once, degrade for each of `plans`, which are variants of one clip."""
    # the workers are the parallelism, and results must not depend on the number of cores
    cv2.setNumThreads(1)
    plan = plans[0]
    try:
        source = Source(plan.source, plan.path)
        window = decode_isolated(source, plan.start, plan.pts, plan.frames, config, storage)
        hr = cropped(window, plan)
        reason = empty_crop(hr, config.filters)
        if reason:
            return Fault(reason, "filtered")
        if config.sharpen_targets:
            hr = sharpened(hr, config.sharpen_targets)
        stored = encode_bytes(hr) if config.store_clips else b""
    except StorageError:
        raise  # says nothing about this clip, and the next ones would fail too
    except Exception as error:
        return _fault(error, plan)
    return Clip(hr, stored, [_degraded(hr, variant, config) for variant in plans])


def _degraded(hr: np.ndarray, plan: SamplePlan, config: DatagenConfig) -> Variant | Fault:
    try:
        lr, draws = degrade_clip(hr, config.degradation, plan.seed)
        return Variant(
            lr, draws | {"lr_psnr_db": _bicubic_psnr_db(hr, lr)}, encode_bytes(lr) if config.store_clips else b""
        )
    except Exception as error:
        return _fault(error, plan)


def _fault(error: Exception, plan: SamplePlan) -> Fault:
    return Fault(str(error) if isinstance(error, UserError) else f"{plan.source}: {type(error).__name__}: {error}")


def _bicubic_psnr_db(hr: np.ndarray, lr: np.ndarray) -> float:
    """Of the bicubically enlarged LR to HR, middle frame, dB: how hard the sample is."""
    middle = len(hr) // 2
    large = cv2.resize(lr[middle], hr.shape[2:0:-1], interpolation=cv2.INTER_CUBIC)
    error = np.square(large.astype(np.float64) - hr[middle]).mean()
    return round(psnr_db(float(error), peak=255), 3)


def cropped(window: np.ndarray, plan: SamplePlan) -> np.ndarray:
    """The plan's crop of a window; UserError where the video's size has changed on the way."""
    top, left, height, width = plan.crop
    hr = window[:, top : top + height, left : left + width]
    if hr.shape[1:3] != (height, width):
        raise UserError(f"{plan.source}: frames of {window.shape[2]}x{window.shape[1]} hold no crop at {plan.crop}")
    return np.ascontiguousarray(hr)


def empty_crop(hr: np.ndarray, filters: FilterConfig) -> str | None:
    """Why a crop shows nothing, by the plan's limits: the survey measured full frames."""
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in hr]
    luma = mean_measure(frame.mean() for frame in grey)
    contrast = mean_measure(contrast_of(frame) for frame in grey)
    if luma < filters.min_luma:
        return f"black crop: luma {luma} is below {filters.min_luma}"
    if contrast < filters.min_contrast:
        return f"empty crop: contrast {contrast} is below {filters.min_contrast}"
    return None


def make_sample(plan: SamplePlan, draws: dict[str, Any], members: dict[str, bytes], versions: dict[str, str]) -> Sample:
    """Members in the order they are stored, without empty ones; the metadata never holds a path of this machine."""
    metadata = {
        "source": plan.source,
        "content": plan.content,
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
    kept = {name: content for name, content in members.items() if content}
    return Sample(plan.key, kept | {"json": json.dumps(metadata, sort_keys=True).encode()})
