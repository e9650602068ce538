"""The `trainer` section of a preset: one configuration per stage beside its code, and what all stages share here."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from common.config import Section
from trainer.engine.lora import LoRAConfig
from trainer.engine.network import DeepSpeedConfig
from trainer.stages.base import BaseConfig
from trainer.stages.dual_stream.algorithm import DualStreamConfig
from trainer.stages.preference import PreferenceTrainingConfig
from trainer.stages.progressive import ProgressiveConfig

StageName = Literal["base", "progressive", "dual_stream", "preference"]
STAGES: tuple[StageName, ...] = ("base", "progressive", "dual_stream", "preference")

#: networks that may have an adapter: Stage I's teacher takes over the student's, and the others never learn
ADAPTABLE = ("student", "critic")

#: networks of each stage, in the order in which they are built on every rank
NETWORKS: dict[StageName, tuple[str, ...]] = {
    "base": ("student",),
    "progressive": ("student", "teacher"),
    "dual_stream": ("student", "critic", "real_score"),
    "preference": ("student", "reference"),
}


class ScheduleConfig(Section):
    """How long a stage runs and on how much at a time."""

    #: updates of the exported network; Stage I's come from its own schedule
    steps: int | None = Field(default=None, ge=1)
    #: samples per update, over all ranks and accumulated micro-batches
    global_batch_size: int = Field(default=16, ge=1)
    checkpoint_every: int = Field(default=500, ge=1)
    #: 0 = never
    validate_every: int = Field(default=500, ge=0)
    #: what makes a validation the best so far, whose checkpoint is kept beside the last ones: PSNR (highest) or error
    #: in latents (lowest) of the exported network's preview; null = none [ours]
    keep_best: Literal["psnr", "latent_mse"] | None = "psnr"
    #: shape of the learning rate after warm-up; cosine falls to a tenth [ours]
    learning_rate_schedule: Literal["constant", "cosine"] = "constant"


class Schedules(Section):
    """One schedule per stage."""

    base: ScheduleConfig = ScheduleConfig(steps=100_000)  # [ours]
    progressive: ScheduleConfig = ScheduleConfig()
    dual_stream: ScheduleConfig = ScheduleConfig(steps=5_000)  # [ours]
    preference: ScheduleConfig = ScheduleConfig(steps=1_000)  # [method]


class TrackingConfig(Section):
    """wandb. An account is never asked for: `offline` writes to the output folder, `wandb sync` uploads it later."""

    wandb: Literal["online", "offline", "off"] = "offline"
    project: str = "duo-vsr"
    log_every: int = Field(default=10, ge=1)
    #: bf16 FLOP/s of one device, of which MFU is the share that was used; null = from the table of devices
    peak_flops: float | None = Field(default=None, gt=0)

    @field_validator("wandb", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        """YAML reads a bare `off` as false."""
        return "off" if value is False else value


class TrainerConfig(Section):
    """Everything about training."""

    seed: int = 0
    #: how networks are sharded and computed
    engine: DeepSpeedConfig = DeepSpeedConfig()
    #: exceptions by network name (student, critic, real_score, teacher, reference)
    engines: dict[str, DeepSpeedConfig] = Field(default_factory=dict)
    #: LoRA by network name: student, critic (of which the fake score has it); a network not named learns whole
    lora: dict[str, LoRAConfig] = Field(default_factory=dict)
    schedules: Schedules = Schedules()
    base: BaseConfig = BaseConfig()
    progressive: ProgressiveConfig = ProgressiveConfig()
    dual_stream: DualStreamConfig = DualStreamConfig()
    preference: PreferenceTrainingConfig = PreferenceTrainingConfig()
    #: attention kernels of the DiT; auto takes the fastest one installed (pipeline/model/attention.py)
    attention: Literal["auto", "flash", "flash3", "xformers", "native"] = "auto"
    #: ranks that share the tokens of each clip, for clips too long for one GPU (pipeline/model/sequence_parallel.py)
    sequence_parallel: int = Field(default=1, ge=1)
    #: torch.compile the transformer blocks; pays on GPUs for long runs
    compile_blocks: bool = False
    keep_checkpoints: int = Field(default=3, ge=1)
    #: bad steps in a row (numbers not finite, an exploded gradient norm) after which the run stops [ours]
    max_bad_steps: int = Field(default=10, ge=1)
    #: a gradient norm so many times its running mean has exploded [ours]
    explosion_factor: float = Field(default=1000.0, gt=1)
    #: clips of the fixed validation batch, per rank or group of ranks that share clips
    validation_clips: int = Field(default=4, ge=1)
    #: folder on a local disk where shards of an s3:// dataset are kept after their first use; null = read ranges of
    #: them over the network
    shard_cache: Path | None = None
    #: what to do about damaged samples (datagen/dataset/loader.py)
    damaged_samples: Literal["skip", "error"] = "skip"
    #: precision of exported transformers
    export_precision: Literal["bf16", "fp32"] = "fp32"
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("lora")
    @classmethod
    def _has_an_adapter(cls, value: dict[str, LoRAConfig]) -> dict[str, LoRAConfig]:
        for name in value:
            if name not in ADAPTABLE:
                reason = "follows the student's" if name == "teacher" else "has none"
                raise ValueError(f"{name!r} {reason}; name one of {', '.join(ADAPTABLE)}")
        return value

    @model_validator(mode="after")
    def _known_networks(self) -> TrainerConfig:
        known = {name for names in NETWORKS.values() for name in names}
        unknown = sorted(set(self.engines) - known)
        if unknown:
            raise ValueError(f"engines: unknown network {unknown[0]!r}; known: {', '.join(sorted(known))}")
        return self

    @model_validator(mode="after")
    def _adapted_networks_are_there(self) -> TrainerConfig:
        if "critic" in self.lora and not self.dual_stream.needs_fake_score:
            raise ValueError(
                "lora: with these settings of dual_stream no fake score is used; leave out 'critic'"
            )
        return self

    def engine_of(self, network: str) -> DeepSpeedConfig:
        """Sharding of one network."""
        return self.engines.get(network, self.engine)

    def lora_of(self, network: str) -> LoRAConfig | None:
        """The adapter of one network."""
        return self.lora.get("student" if network == "teacher" else network)

    def schedule_of(self, stage: StageName) -> ScheduleConfig:
        return getattr(self.schedules, stage)

    def steps_of(self, stage: StageName) -> int:
        """Steps of the loop."""
        if stage == "progressive":
            return self.progressive.steps
        steps = self.schedule_of(stage).steps
        if steps is None:
            raise ValueError(f"trainer.schedules.{stage}.steps is missing")
        return steps
