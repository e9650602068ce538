"""The `datagen` section of a preset: which clips, how degraded, how encoded, how stored."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from common.config import Section
from datagen.degradation.recipe import Mixture
from datagen.degradation.sharpen import SharpenConfig


class ClipConfig(Section):
    """Windows and crops."""

    #: F = 4k + 1 frames, what a causal video VAE takes [paper: its timing is at 21 frames of 1080p]
    frames: int = Field(default=21, ge=1)
    #: frames from the start of a window to the start of the next; null = `frames`
    stride: int | None = Field(default=None, ge=1)
    #: height and width of the HR crop, px; multiples of 32 (x4 below the VAE's 8)
    crop: tuple[int, int] = (704, 1280)
    #: where the crop lies in the frame
    crop_position: Literal["random", "center"] = "random"
    #: crops at different places from each window
    crops_per_window: int = Field(default=1, ge=1)
    #: cut at scene changes, so that no window holds one (PySceneDetect, AdaptiveDetector)
    respect_scenes: bool = True
    #: PySceneDetect's threshold of change against the neighbouring frames, its default
    scene_threshold: float = Field(default=3.0, gt=0)

    @field_validator("frames")
    @classmethod
    def _is_4k_plus_1(cls, value: int) -> int:
        if value % 4 != 1:
            below = max(1, (value - 1) // 4 * 4 + 1)
            raise ValueError(f"must be 4k + 1 for the VAE; the nearest are {below} and {below + 4}")
        return value

    @field_validator("crop")
    @classmethod
    def _is_multiple_of_32(cls, value: tuple[int, int]) -> tuple[int, int]:
        if any(side <= 0 or side % 32 for side in value):
            raise ValueError("both sides must be positive multiples of 32: x4 to LR, then x8 in the VAE")
        return value


class FilterConfig(Section):
    """Windows that teach nothing. Each rejection is recorded with its reason and its measure [ours]."""

    #: sources of a smaller height are rejected, px; the crop's height is always a lower bound
    min_height: int = Field(default=0, ge=0)
    #: sources of a smaller width are rejected, px; the crop's width is always a lower bound
    min_width: int = Field(default=0, ge=0)
    #: keep sources in PQ or HLG, whose brightness is not converted: their pixels are taken as if they were BT.709's
    hdr: bool = False
    #: part of a source's frames that may be marked as interlaced: the targets would show two moments in one frame
    max_interlaced: float = Field(default=0.05, ge=0, le=1)
    #: part of a source's height or width that may lie in black bars, as of letterboxed films
    max_bars: float = Field(default=0.04, ge=0, le=1)
    #: mean luma, 0...255, below which a window is black
    min_luma: float = Field(default=4.0, ge=0)
    #: standard deviation of luma, 0...255, at the size of LR, below which it is empty
    min_contrast: float = Field(default=4.0, ge=0)
    #: mean absolute change of luma between frames, 0...255, below which it stands still; 0 = keep still ones
    min_motion: float = Field(default=0.03, ge=0)
    #: variance of the Laplacian of luma; 0 = no floor
    min_sharpness: float = Field(default=10.0, ge=0)
    #: mean absolute difference of luma, 0...255, from the most similar earlier stretch of the same source, below which
    #: a window repeats it, as a loop or a still does; 0 = keep repetitions. A loop at crf 28 measures at most 0.56,
    #: five real clips at least 1.3
    min_novelty: float = Field(default=0.7, ge=0)
    #: bits of 64 by which the perceptual hash of the first, middle or last frame must differ between windows of
    #: different sources: 13 = windows with at most 12 in each are duplicates; 0 = keep duplicates
    duplicate_distance: int = Field(default=13, ge=0, le=16)


class EncodeConfig(Section):
    """The VAE actors."""

    #: clips per call of the VAE
    batch_size: int = Field(default=1, ge=1)
    #: actors; null = one per GPU, or one where there is none
    actors: int | None = Field(default=None, ge=1)
    #: CPU cores of an actor on a machine without GPU
    cpus: int = Field(default=1, ge=1)
    #: clips that may wait between the steps, for each CPU: bounds memory, and leaves each of them room for a task of
    #: up to eight clips under the shares that Ray Data gives the steps [ours]
    clips_ahead: int = Field(default=32, ge=1)


class DatagenConfig(Section):
    """Everything that decides what is in a dataset, and a little that decides how fast it is made."""

    renamed: ClassVar[dict[str, str]] = {"storage": "storage, a section of its own"}

    #: fixes order, crops and degradations
    seed: int = 0
    clip: ClipConfig = ClipConfig()
    filters: FilterConfig = FilterConfig()
    #: unsharp mask of the HR clips, before the VAE and before the degradation: the model learns sharpened videos, as
    #: the pixel losses of RealBasicVSR and Real-ESRGAN do; recipes must not sharpen again. null = clips as they are
    #: [peer]
    sharpen_targets: SharpenConfig | None = None
    #: recipes of datagen/degradation/recipe.py with weights; each variant of each clip draws one
    degradation: Mixture = Mixture()
    #: degradations per clip
    variants: int = Field(default=1, ge=1)
    #: neighbouring windows that stay together in the shards, so that they are decoded in one go; 1 mixes them all,
    #: which costs half a group of pictures of decoding for each [ours]
    windows_together: int = Field(default=8, ge=1)
    #: part of the sources that is held out of training for validation, in shards of its own; drawn by the seed and each
    #: source's content. 0 = none [ours]
    validation_share: float = Field(default=0.0, ge=0, lt=1)
    #: samples per tar, the unit of restart
    samples_per_shard: int = Field(default=64, ge=1)
    #: also keep the LR and HR clips, lossless: needed for preference pairs and decoder training
    store_clips: bool = True
    #: suffix of text files beside the videos, which hold the captions of those that have none in a table: with `.txt`,
    #: a.txt that of a.mp4. null = text files are not read
    caption_suffix: str | None = Field(default=None, pattern=r"^\.\w+$")
    #: caption of sources that come without one
    caption: str = "high quality video"
    encode: EncodeConfig = EncodeConfig()
    #: stop when more than this part of the sources is unreadable; fewer than ten of them never stop a job with
    #: readable ones [ours]
    max_quarantined: float = Field(default=0.1, ge=0, le=1)
    #: stop before a shard is committed when more than this part of its samples, or of the job's, failed; up to ten
    #: failures never stop a job that makes samples [ours]
    max_failed: float = Field(default=0.1, ge=0, le=1)
    #: seconds a clip may take to decode before it is quarantined [ours]
    decode_timeout_s: float = Field(default=300.0, gt=0)

    @model_validator(mode="after")
    def _sharpened_once(self) -> DatagenConfig:
        names = self.degradation.weights if self.sharpen_targets else ()
        if twice := [name for name in names if self.degradation.recipe(name).sharpen]:
            raise ValueError(
                f"sharpen_targets is set, and the recipe {twice[0]} sharpens HR again; set its sharpen to null"
            )
        return self
