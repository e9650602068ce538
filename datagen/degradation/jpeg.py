"""JPEG compression of every frame."""

from __future__ import annotations

import cv2
import numpy as np

from common.config import Section
from datagen.degradation.operation import Drawn, Frames, HrShape, Operation, Range, walk


class JpegConfig(Section):
    """JPEG at a quality that walks from frame to frame [peer: RealBasicVSR]."""

    #: the encoder's quality, 0...100
    quality: Range = (30, 95)
    #: largest change of the quality per frame
    quality_step: float = 3.0


class Jpeg(Operation):
    """OpenCV's encoder."""

    name = "jpeg"
    config = JpegConfig

    def draw(self, config: JpegConfig, shape: HrShape, rng: np.random.Generator) -> Drawn:
        quality = walk(rng, config.quality, config.quality_step, shape.frames)
        return {"quality": np.rint(quality).astype(int).tolist()}

    def apply(self, drawn: Drawn, frames: Frames, target: tuple[int, int], rng: np.random.Generator) -> Frames:
        compressed = []
        for frame, quality in zip(frames, drawn["quality"], strict=True):
            _, data = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, quality])
            compressed.append(np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR)))
        return compressed
