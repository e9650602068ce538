"""SSIM, GMSD and NIQE as pyiqa computes them, to set beside figures that others took with it.

pyiqa (IQA-PyTorch, pyiqa/archs/{ssim,gmsd,niqe}_arch.py at 0.1.16) rounds the luma of YIQ in 0…255, where ours is
BT.601 in 16…235. Its SSIM cuts negative structure at 0, its GMSD pads with zeros and divides by one less.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from metrics.gmsd import Gmsd, gmsd_plane
from metrics.niqe import Niqe
from metrics.ssim import Ssim, ssim_plane

_YIQ_LUMA = np.array([0.299, 0.587, 0.114])


def yiq_luma(frame: Tensor) -> NDArray[np.float64]:
    """Y of an RGB frame (3, H, W) in [0, 1]: whole numbers in [0, 255], float64 (H, W)."""
    rgb = frame.detach().cpu().numpy().astype(np.float64)
    return np.round(255 * np.tensordot(_YIQ_LUMA, rgb, axes=1))


class SsimPyiqa(Ssim):
    """SSIM on Y of YIQ in [0, 255]."""

    name = "ssim_pyiqa"
    label = "SSIM (pyiqa)"

    def planes(self, x: Tensor, y: Tensor) -> float:
        return ssim_plane(yiq_luma(x), yiq_luma(y), lowest_structure=0)


class GmsdPyiqa(Gmsd):
    """GMSD on Y of YIQ in [0, 255]."""

    name = "gmsd_pyiqa"
    label = "GMSD (pyiqa)"

    def frame(self, frame: Tensor, reference: Tensor | None = None) -> float:
        assert reference is not None
        return gmsd_plane(yiq_luma(frame), yiq_luma(reference), border="constant", lost_degrees=1)


class NiqePyiqa(Niqe):
    """NIQE on Y of YIQ in [0, 255], with the authors' prior."""

    name = "niqe_pyiqa"
    label = "NIQE (pyiqa)"

    def plane(self, frame: Tensor) -> NDArray[np.float64]:
        return yiq_luma(frame)
