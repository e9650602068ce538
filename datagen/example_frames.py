"""A frame of what is left out, for the data card: whether a filter is set right is seen on what it throws away."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from common.errors import StorageError, UserError
from common.storage import StorageConfig
from datagen.config import DatagenConfig
from datagen.plan import SamplePlan
from datagen.survey.decoder_process import decode_isolated
from datagen.survey.source_survey import SourceSurvey


def example_frames(
    lines: list[dict[str, Any]],
    surveys: Iterable[SourceSurvey],
    samples: Iterable[SamplePlan],
    config: DatagenConfig,
    storage: StorageConfig,
) -> list[np.ndarray | None]:
    """For each line of quarantine.jsonl a frame, uint8 (H, W, 3) RGB; None where there is none to be had.

    It is the middle frame of the line's window, its crop where the line is a sample's, or the first frame of a source
    that is left out whole.
    """
    named = {line["source"] for line in lines}
    surveyed = {survey.source.id: survey for survey in surveys if survey.source.id in named}
    keys = {line.get("key") for line in lines}
    crops = {sample.key: sample.crop for sample in samples if sample.key in keys}
    frames: list[np.ndarray | None] = []
    for line in lines:
        survey, start = surveyed.get(line["source"]), line.get("start")
        if survey is None:
            frames.append(None)
            continue
        pts = next((window.pts for window in survey.windows if window.start == start), None)
        count = 1 if start is None else config.clip.frames
        try:
            window = decode_isolated(survey.source, start or 0, pts, count, config, storage)
            frame = window[count // 2]
            top, left, height, width = crops.get(line.get("key", ""), (0, 0, *frame.shape[:2]))
            frames.append(frame[top : top + height, left : left + width])
        except StorageError:  # retried long enough; the others are on the same disk or server
            return [*frames, *[None] * (len(lines) - len(frames))]
        except UserError:
            frames.append(None)
    return frames
