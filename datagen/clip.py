"""One planned sample up to the VAE: decode the window, crop, degrade. Runs on CPU workers.

Nothing that a video can do escapes from here: every failure comes back as the sample's `error`.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from datagen.config import DatagenConfig
from datagen.degrade import degrade_clip
from datagen.isolated import decode_isolated
from datagen.media import encode_bytes
from datagen.plan import SamplePlan
from pipeline.errors import UserError


def make_clip(plan: SamplePlan, config: DatagenConfig) -> dict[str, Any]:
    """HR and LR of a sample.

    Returns:
        `hr` and `lr`, uint8 (F, H, W, 3) and (F, H/4, W/4, 3), `draws`, the clip members where they are wanted;
        or `error` alone.
    """
    cv2.setNumThreads(
        1
    )  # the workers are the parallelism, and results must not depend on the number of cores
    try:
        window = decode_isolated(plan.path, plan.source, plan.start, plan.pts, plan.frames, config)
        hr = cropped(window, plan)
        lr, draws = degrade_clip(hr, config.degradation, plan.seed)
        clips = {"lr.mkv": encode_bytes(lr), "hr.mkv": encode_bytes(hr)} if config.store_clips else {}
    except UserError as error:
        return {"error": str(error)}
    except Exception as error:
        return {"error": f"{plan.source}: {type(error).__name__}: {error}"}
    return {"hr": hr, "lr": lr, "draws": draws | {"lr_psnr_db": _psnr(hr, lr)}, "clips": clips}


def _psnr(hr: np.ndarray, lr: np.ndarray) -> float:
    """Of the bicubically enlarged LR to HR, middle frame, dB: how hard the sample is."""
    middle = len(hr) // 2
    large = cv2.resize(lr[middle], hr.shape[2:0:-1], interpolation=cv2.INTER_CUBIC)
    return round(min(99.0, float(cv2.PSNR(large, hr[middle]))), 3)


def cropped(window: np.ndarray, plan: SamplePlan) -> np.ndarray:
    """The plan's crop of a window; UserError where the video's size has changed on the way."""
    top, left, height, width = plan.crop
    hr = window[:, top : top + height, left : left + width]
    if hr.shape[1:3] != (height, width):
        raise UserError(
            f"{plan.source}: frames of {window.shape[2]}x{window.shape[1]} hold no crop at {plan.crop}"
        )
    return np.ascontiguousarray(hr)
