"""Gaussian and Poisson noise on 8-bit frames, by table instead of by sampling.

A frame is 8 bit before the noise and is rounded to 8 bit after it. So Gaussian noise is one look-up: 16 random bits
per value into the inverse distribution function, rounded to integer grey levels. Poisson noise depends on the grey
level: 8 bits of it and 8 random bits per look-up, twice, since a Poisson variable is the sum of two of half its mean.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from scipy import special

from common.config import Section
from datagen.degradation.operation import Drawn, Frames, HrShape, Operation, Probability, Range, listed, walk


class NoiseConfig(Section):
    """Gaussian or Poisson noise per clip, on all channels alike (grey) or on each [peer: RealBasicVSR]."""

    #: share of clips with Gaussian noise; the others have Poisson noise
    gaussian: Probability = 0.5
    #: standard deviation of the Gaussian noise, in grey levels of 255
    sigma: Range = (1.0, 30.0)
    #: largest change of sigma per frame, in grey levels
    sigma_step: float = 0.1
    #: factor of BasicSR's Poisson noise (mmagic's is 16 times weaker by a missing division by 255)
    poisson_scale: Range = (0.05, 3.0)
    #: largest change of that factor per frame
    poisson_scale_step: float = 0.005
    #: share of clips with the same noise on all channels
    grey: Probability = 0.4


class Noise(Operation):
    """One kind per clip; its strength walks from frame to frame."""

    name = "noise"
    config = NoiseConfig

    def draw(self, config: NoiseConfig, shape: HrShape, rng: np.random.Generator) -> Drawn:
        grey = bool(rng.random() < config.grey)
        if rng.random() < config.gaussian:
            sigma = walk(rng, config.sigma, config.sigma_step, shape.frames)
            return {"kind": "gaussian", "grey": grey, "sigma": listed(sigma)}
        scale = walk(rng, config.poisson_scale, config.poisson_scale_step, shape.frames)
        return {"kind": "poisson", "grey": grey, "scale": listed(scale)}

    def apply(self, drawn: Drawn, frames: Frames, target: tuple[int, int], rng: np.random.Generator) -> Frames:
        strengths, add = (
            (drawn["sigma"], add_gaussian) if drawn["kind"] == "gaussian" else (drawn["scale"], add_poisson)
        )
        return [add(frame, strength, drawn["grey"], rng) for frame, strength in zip(frames, strengths, strict=True)]


def add_gaussian(frame: np.ndarray, sigma: float, grey: bool, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) uint8 plus normal noise of standard deviation `sigma` (0...255), rounded and clipped to uint8."""
    table = np.rint(_normal_quantiles() * sigma).astype(np.int16)
    height, width, channels = frame.shape
    count = height * width * (1 if grey else channels)
    words = np.frombuffer(rng.bytes(2 * count), np.uint16).reshape(height, width, -1)
    noise = cv2.LUT(words, table)
    return cv2.add(frame, cv2.merge([noise] * channels) if grey else noise, dtype=cv2.CV_8U)


def add_poisson(frame: np.ndarray, scale: float, grey: bool, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) uint8, BGR, plus `scale` times BasicSR's shot noise.

    That is Poisson(x·V)/V - x for x in [0, 1], with V the number of grey levels in the frame, rounded up to a power
    of two: dark frames with few levels are noisier.
    """
    base = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) if grey else frame
    table = poisson_quantiles(_levels(base)) * np.float32(scale)
    flat = base.reshape(-1)
    halves = []
    for half in range(2):
        words = cv2.merge([np.frombuffer(rng.bytes(flat.size), np.uint8), flat]).view(np.uint16)
        halves.append(cv2.LUT(words.reshape(base.shape[0], -1), table[half]))
    noise = cv2.add(halves[0], halves[1]).reshape(base.shape)
    return cv2.add(frame, cv2.merge([noise] * 3) if grey else noise, dtype=cv2.CV_8U)


@lru_cache(maxsize=1)
def _normal_quantiles() -> np.ndarray:
    """Standard normal at the middles of 65 536 equal steps of probability, (1, 65536) float64, variance 1."""
    quantiles = special.ndtri((np.arange(65536) + 0.5) / 65536)
    return (quantiles / quantiles.std())[None]


@lru_cache(maxsize=16)
def poisson_quantiles(levels: int) -> np.ndarray:
    """Two tables (2, 1, 65536) float32 by 256·grey + random byte, whose sum is shot noise in 0...255 for V = `levels`.

    Each is the inverse distribution of Poisson(x·V/2), centred, at 256 middles of probability, with its mean and
    variance set to the exact ones (256 steps alone would lose the tails' part of the variance).
    """
    mean = np.arange(256) / 255 * levels / 2
    middles = (np.arange(256) + 0.5) / 256
    # scipy.stats takes longer to load than all tables to make: only where there is Poisson noise
    from scipy import stats

    counts = stats.poisson.ppf(middles[None, :], mean[:, None])
    centred = counts - counts.mean(1, keepdims=True)
    spread = centred.std(1)
    centred *= np.divide(np.sqrt(mean), spread, out=np.zeros(256), where=spread > 0)[:, None]
    noise = (centred / levels * 255).astype(np.float32).reshape(1, 65536)
    return np.stack([noise, noise])


def _levels(frame: np.ndarray) -> int:
    histogram = cv2.calcHist([frame.reshape(-1, 1)], [0], None, [256], [0, 256])
    return 1 << (int(np.count_nonzero(histogram)) - 1).bit_length()
