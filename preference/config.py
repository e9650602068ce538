"""The `preference` section of a configuration file."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator

from common.config import Section
from metrics.registry import METRICS, SETS


class PreferenceConfig(Section):
    """How candidates are made, scored and paired."""

    #: pairs to make; dropped clips are replaced by further ones as long as the dataset has any [paper]
    pairs: int = Field(default=2000, ge=1)
    #: pairs of held-out clips, for validation, where the dataset has a split; they come on top [ours]
    validation_pairs: int = Field(default=16, ge=0)
    #: candidates per clip, each from a noise of its own [paper]
    candidates: int = Field(default=5, ge=2)
    #: a set (paper, weight-free) or metric names [paper: LPIPS, MUSIQ, DOVER]
    metrics: str = "paper"
    #: best and worst must differ by this much of the combined score in [0, 1]; 0 keeps every pair [ours]
    minimum_gap: float = Field(default=0.0, ge=0, le=1)
    #: by metric, the least raw difference of best and worst; a pair that reaches none is dropped: scaling to [0, 1]
    #: makes candidates that hardly differ look as far apart as others [ours: a tenth of the last printed digit]
    minimum_differences: dict[str, float] = Field(
        default={"lpips": 1e-4, "musiq": 0.01, "dover": 0.01, "gmsd": 1e-5, "niqe_fitted": 1e-3}
    )
    #: a candidate whose mean, of [0, 1], is smaller is black: its clip is dropped [ours: the small model makes 0.015
    #: of black]
    black_below: float = Field(default=0.03, ge=0, le=1)
    #: seed of the candidates' noise
    seed: int = 0
    #: candidates in one forward pass of the DiT and of the decoder; memory against speed [ours]
    candidates_per_forward: int = Field(default=1, ge=1)
    #: frames in one forward pass of LPIPS and MUSIQ [ours]
    frames_per_forward: int = Field(default=1, ge=1)
    #: Ray actors; null = one per GPU, or one where there is none. One on this machine needs no Ray
    actors: int | None = Field(default=None, ge=1)
    #: CPU threads of each actor; null = an equal share. The last bits of sums may depend on it
    cpus: int | None = Field(default=None, ge=1)
    #: clips per shard, the unit of restart [ours]
    clips_per_shard: int = Field(default=20, ge=1)
    #: side of NIQE's blocks in px where niqe_fitted is a ranking metric [peer: NIQE]
    niqe_block: int = Field(default=96, ge=16)
    #: HR clips that niqe_fitted's model is fitted on [ours]
    niqe_clips: int = Field(default=64, ge=1)
    #: precision of the DiT; scores and latents are float32
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    @field_validator("metrics")
    @classmethod
    def _known(cls, value: str) -> str:
        unknown = [name for name in value.split(",") if name.strip() not in METRICS and ":" not in name]
        if value not in SETS and unknown:
            raise ValueError(f"unknown {', '.join(unknown)}; sets: {', '.join(SETS)}; metrics: {', '.join(METRICS)}")
        return value

    @field_validator("minimum_differences")
    @classmethod
    def _differences(cls, value: dict[str, float]) -> dict[str, float]:
        for name, difference in value.items():
            if name not in METRICS and ":" not in name:
                raise ValueError(f"unknown metric {name}; known: {', '.join(METRICS)}")
            if not 0 <= difference < math.inf:
                raise ValueError(f"{name}: {difference} is no difference; it must be at least 0")
        return value

    @field_validator("niqe_block")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("NIQE halves its blocks: the side must be even")
        return value
