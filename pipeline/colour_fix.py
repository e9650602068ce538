"""Give the result the colours of its source: diffusion models drift in tone, and a video must not.

`adain` matches mean and deviation per frame and channel; `wavelet` takes the low frequencies from the source and the
high ones from the result. Both in float32: in bf16 the wavelet's differences turn into stripes.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

ColourFix = Literal["none", "wavelet", "adain"]

#: the coarsest of the à-trous scales spans 2^5 px [peer: StableSR, SeedVR2]
LEVELS = 5


def fix_colour(result: Tensor, source: Tensor, method: ColourFix) -> Tensor:
    """Recolour.

    Args:
        result: (3, F, H, W) in [-1, 1].
        source: the enlarged LR clip, same shape.
    """
    if method == "none":
        return result
    result, source = result.float(), source.to(result.device).float()
    if method == "adain":
        axes = (2, 3)
        normalised = (result - result.mean(axes, keepdim=True)) / result.std(axes, keepdim=True).clamp_min(1e-5)
        recoloured = normalised * source.std(axes, keepdim=True) + source.mean(axes, keepdim=True)
    else:
        recoloured = result - low_frequencies(result) + low_frequencies(source)
    return recoloured.clamp(-1, 1)


def low_frequencies(frames: Tensor) -> Tensor:
    """(3, F, H, W) blurred by the à-trous B3-like kernel at scales 1, 2, …, 2^(LEVELS-1)."""
    kernel = frames.new_tensor([0.25, 0.5, 0.25])
    weight = (kernel[:, None] * kernel[None]).expand(3, 1, 3, 3)
    x = frames.transpose(0, 1)
    for level in range(LEVELS):
        step = 2**level
        mode = "reflect" if step < min(x.shape[2:]) else "replicate"
        x = F.conv2d(F.pad(x, (step,) * 4, mode=mode), weight, groups=3, dilation=step)
    return x.transpose(0, 1)
