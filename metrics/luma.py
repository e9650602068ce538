"""The luma plane on which SSIM, GMSD and NIQE are computed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

# ITU-R BT.601, studio range, on RGB in [0, 1]: what MATLAB's rgb2ycbcr and BasicSR compute
_BT601_LUMA = np.array([65.481, 128.553, 24.966])


def luma(frame: Tensor) -> NDArray[np.float64]:
    """Y of an RGB frame (3, H, W) in [0, 1]: float64 (H, W) in [16, 235]."""
    rgb = frame.detach().cpu().numpy().astype(np.float64)
    return np.tensordot(_BT601_LUMA, rgb, axes=1) + 16.0
