"""The `preference` section of a configuration file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from common.config import Section
from metrics.registry import METRICS, SETS


class PreferenceConfig(Section):
    """How candidates are made, scored and paired."""

    #: pairs to make; fewer if the dataset has fewer clips or `minimum_gap` drops some [paper]
    pairs: int = Field(default=2000, ge=1)
    #: candidates per clip, each from a noise of its own [paper]
    candidates: int = Field(default=5, ge=2)
    #: a set (paper, weight-free) or metric names [paper: LPIPS, MUSIQ, DOVER]
    metrics: str = "paper"
    #: best and worst must differ by this much of the combined score in [0, 1]; 0 keeps every pair [ours]
    minimum_gap: float = Field(default=0.0, ge=0, le=1)
    #: seed of the candidates' noise
    seed: int = 0
    #: candidates in one forward pass; memory against speed [ours]
    candidates_per_forward: int = Field(default=1, ge=1)
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

    @field_validator("niqe_block")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("NIQE halves its blocks: the side must be even")
        return value
