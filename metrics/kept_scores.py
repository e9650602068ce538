"""Scores kept on the disk under what they depend on: a killed run goes on, and a new method costs only itself.

The key is the SHA-256 of the metric's protocol (name, version, weights, packages), of both clips' content, of the
border left out and of the number of frames. A changed clip or weight file is another key; nothing is ever stale.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from common.atomic import write_atomic
from common.fingerprint import fingerprint
from metrics.clips import open_clip
from metrics.frame_metric import Metric
from metrics.scoring import Score, protocol, score_clip


class KeptScores:
    """Scores clips, or finds their scores in `folder`, one small file per clip and metric.

    Attributes:
        computed, found: how many scores were computed and found so far.
    """

    def __init__(self, folder: Path, max_frames: int | None = None, crop_border: int = 0) -> None:
        self._folder, self._max_frames, self._crop_border = folder, max_frames, crop_border
        self._content = cache(lambda path: open_clip(path, max_frames).fingerprint())
        self.computed = self.found = 0

    def score(self, video: Path, reference: Path | None, metrics: list[Metric]) -> dict[str, Score]:
        """Every metric of one clip.

        Raises:
            UserError: as of `score_clip`.
        """
        keys = {metric.name: self._key(metric, video, reference) for metric in metrics}
        scores = {name: score for name, key in keys.items() if (score := self._read(key)) is not None}
        self.found += len(scores)
        if rest := [metric for metric in metrics if metric.name not in scores]:
            target = open_clip(reference, self._max_frames) if reference else None
            new = score_clip(open_clip(video, self._max_frames), target, rest, self._crop_border)
            for name, score in new.items():
                self._write(keys[name], {"metric": name, "video": str(video), **score._asdict()})
            self.computed += len(new)
            scores |= new
        return {metric.name: scores[metric.name] for metric in metrics}

    def report(self) -> None:
        """Say on stderr what was computed."""
        print(f"{self.computed} scores computed, {self.found} found in the cache", file=sys.stderr)

    def _key(self, metric: Metric, video: Path, reference: Path | None) -> str:
        return fingerprint({
            "metric": protocol(metric),
            "video": self._content(video),
            "reference": self._content(reference) if reference and metric.needs_reference else None,
            "crop_border": self._crop_border,
            "max_frames": self._max_frames,
        })  # fmt: skip

    def _file(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"

    def _read(self, key: str) -> Score | None:
        try:
            kept = json.loads(self._file(key).read_text())
            return Score(kept["value"], kept["left_out"])
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def _write(self, key: str, document: dict[str, Any]) -> None:
        write_atomic(self._file(key), json.dumps(document) + "\n")
