"""ColorVideoVDP (Mantiuk et al., "ColorVideoVDP: A visual difference predictor for image, video, and display
distortions", SIGGRAPH 2024), by its authors' package `cvvdp`.

The package asks for frames in order and keeps a quarter of a second of them. It runs in a thread of its own and is
handed each pair as it comes.
"""

from __future__ import annotations

import importlib
import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from metrics.frame_metric import ClipSize, Metric, MetricSettings, Scorer

#: a display whose shape decides the visual angle of a pixel; the package's default
DISPLAY = "standard_4k"
FRAMES_PER_SECOND = 25


class Cvvdp(Metric):
    """Just-objectionable differences: 10 is indistinguishable from the reference."""

    name = "cvvdp"
    label = "CVVDP"
    lower_is_better = False
    needs_reference = True
    packages = ("cvvdp",)

    def __init__(self, settings: MetricSettings | None = None) -> None:
        super().__init__(settings)
        try:
            package: Any = importlib.import_module("pycvvdp")
        except ImportError as error:
            raise UserError(
                f"cvvdp needs the package cvvdp ({error}; pip install --no-deps cvvdp OpenEXR pyexr)"
            ) from None
        self._metric = package.cvvdp(display_name=DISPLAY, quiet=True, device=torch.device(self.settings.device))
        self._source: Any = importlib.import_module("pycvvdp.video_source").video_source_dm

    def start(self, size: ClipSize) -> Scorer:
        return _CvvdpScorer(self._metric, self._source, size)


class _CvvdpScorer(Scorer):
    def __init__(self, metric: Any, base: type, size: ClipSize) -> None:
        pairs: queue.Queue[tuple[Tensor, Tensor] | None] = queue.Queue(1)

        class Source(base):  # type: ignore[misc]
            """What the package reads from; it asks for the video's frame, then for the reference's."""

            def get_video_size(self) -> tuple[int, int, int]:
                return size.height, size.width, size.frames

            def get_frames_per_second(self) -> float:
                return FRAMES_PER_SECOND

            def get_test_frame(self, frame: int, device: torch.device, colorspace: str) -> Tensor:
                pair = pairs.get()
                if pair is None:
                    raise EOFError("the clip ended early")
                video, self._reference = pair
                return self._converted(video, device, colorspace)

            def get_reference_frame(self, frame: int, device: torch.device, colorspace: str) -> Tensor:
                return self._converted(self._reference, device, colorspace)

            def _converted(self, frame: Tensor, device: torch.device, colorspace: str) -> Tensor:
                return self.apply_dm_and_color_transform(frame[None, :, None].to(device), colorspace)

        @torch.inference_mode()
        def predict() -> float:
            score, _ = metric.predict_video_source(Source(display_photometry=metric.display_photometry))
            return float(score)

        self._pairs = pairs
        self._threads = ThreadPoolExecutor(1)
        self._result = self._threads.submit(predict)

    def add(self, frame: Tensor, reference: Tensor | None = None) -> None:
        assert reference is not None
        self._put((frame, reference))

    def finish(self) -> float:
        return self._result.result()

    def close(self) -> None:
        if not self._result.done():
            self._put(None)
        self._threads.shutdown()

    def _put(self, pair: tuple[Tensor, Tensor] | None) -> None:
        """Hand over a pair unless the thread has failed; then its error is raised here."""
        while True:
            try:
                return self._pairs.put(pair, timeout=0.1)
            except queue.Full:
                if self._result.done():
                    if pair is not None:
                        self._result.result()
                    return
