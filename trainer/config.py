"""The `trainer` section of a preset: one configuration per stage beside its code, and what all stages share here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError, create_model, field_validator, model_validator

from common.config import Section
from common.errors import UserError
from pipeline.model.config import Attention
from trainer.engine.config import DeepSpeedConfig, LoRAConfig
from trainer.stages import STAGES
from trainer.stages.base import BaseConfig
from trainer.stages.codec import CodecConfig
from trainer.stages.dual_stream.config import DualStreamConfig
from trainer.stages.fast_codec.config import FastDecoderConfig, LrEncoderConfig
from trainer.stages.preference import PreferenceTrainingConfig
from trainer.stages.progressive import ProgressiveConfig
from trainer.stages.stage import ScheduleConfig, StageSpec

#: fields of an engine on which the layout of its shards depends
SHARDING = (
    "zero_stage",
    "precision",
    "offload_optimizer",
    "offload_parameters",
    "persistence_threshold",
    "bucket_size",
)


class TrackingConfig(Section):
    """wandb. An account is never asked for: `offline` writes to the output folder, `wandb sync` uploads it later."""

    #: online uploads at once, offline writes to the output folder, off tracks nothing
    wandb: Literal["online", "offline", "off"] = "offline"
    #: wandb's project
    project: str = "duo-vsr"
    #: steps between two logged ones
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

    renamed: ClassVar[dict[str, str]] = {"engines": "trainer.engine_overrides"}
    #: the stages whose sections and schedules are known; `config_class` adds one from outside the repository
    specs: ClassVar[dict[str, StageSpec]] = STAGES

    #: seed of all random draws: initial weights, order of samples, noise and times
    seed: int = 0
    #: how networks are sharded and computed
    engine: DeepSpeedConfig = DeepSpeedConfig()
    #: by network name (student, teacher, critic, real_score, reference, fake_score, codec, fast_decoder, lr_encoder,
    #: discriminator, …): fields of `engine` that differ for it
    engine_overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)
    #: LoRA by network name: student, critic (its fake score); a network not named is trained in full
    lora: dict[str, LoRAConfig] = Field(default_factory=dict)
    #: by stage name; a field that is not given has the stage's own default
    schedules: dict[str, ScheduleConfig] = Field(default_factory=dict, validate_default=True)
    codec: CodecConfig = CodecConfig()
    base: BaseConfig = BaseConfig()
    progressive: ProgressiveConfig = ProgressiveConfig()
    dual_stream: DualStreamConfig = DualStreamConfig()
    preference: PreferenceTrainingConfig = PreferenceTrainingConfig()
    fast_decoder: FastDecoderConfig = FastDecoderConfig()
    lr_encoder: LrEncoderConfig = LrEncoderConfig()
    #: attention kernels of the DiT; auto takes the fastest one installed (pipeline/model/attention.py)
    attention: Attention = "auto"
    #: ranks that share the tokens of each clip, for clips too long for one GPU (pipeline/model/sequence_parallel.py)
    sequence_parallel: int = Field(default=1, ge=1)
    #: torch.compile the transformer blocks; pays on GPUs for long runs
    compile_blocks: bool = False
    #: latest checkpoints that are kept, beside the best one
    keep_checkpoints: int = Field(default=3, ge=1)
    #: bad steps in a row (numbers not finite, an exploded gradient norm) after which the run stops [ours]
    max_bad_steps: int = Field(default=10, ge=1)
    #: a gradient norm so many times its running mean has exploded [ours]
    explosion_factor: float = Field(default=1000.0, gt=1)
    #: rows and columns of the part of each latent that a step trains on, drawn anew each time; null = all of it.
    #: Attention costs the square of the tokens, and small models have to see much; validation sees whole clips [ours]
    latent_crop: tuple[int, int] | None = None
    #: clips of the fixed validation set, spread over the ranks [ours]
    validation_clips: int = Field(default=4, ge=1)
    #: folder on a local disk where shards of an s3:// dataset are kept after their first use; null = read ranges of
    #: them over the network
    shard_cache: Path | None = None
    #: what to do about damaged samples (datagen/dataset/loader.py)
    damaged_samples: Literal["skip", "error"] = "skip"
    #: precision of exported transformers
    export_precision: Literal["bf16", "fp32"] = "fp32"
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("latent_crop")
    @classmethod
    def _holds_a_place(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and min(value) < 1:
            raise ValueError("must be at least 1 x 1; null turns it off")
        return value

    @field_validator("schedules", mode="before")
    @classmethod
    def _refine_the_stages_defaults(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        if unknown := sorted(value.keys() - cls.specs.keys()):
            raise ValueError(f"unknown stage {unknown[0]!r}; known: {', '.join(cls.specs)}")
        merged = {}
        for name, spec in cls.specs.items():
            given = value.get(name) or {}
            given = given.model_dump(exclude_unset=True) if isinstance(given, ScheduleConfig) else dict(given)
            if spec.steps is not None and given.get("steps") is not None:
                raise ValueError(
                    f"{name}.steps = {given['steps']}: the number of updates follows from trainer.{name}; leave it out"
                )
            merged[name] = spec.schedule.model_dump() | given
        return merged

    @field_validator("lora")
    @classmethod
    def _has_an_adapter(cls, value: dict[str, LoRAConfig]) -> dict[str, LoRAConfig]:
        networks = [network for spec in cls.specs.values() for network in spec.networks]
        adaptable = dict.fromkeys(network.lora for network in networks if network.lora == network.name)
        for name in value:
            if name not in adaptable:
                leader = next((n.lora for n in networks if n.name == name and n.lora), None)
                reason = f"follows the {leader}'s" if leader else "has none"
                raise ValueError(f"{name!r} {reason}; name one of {', '.join(map(str, adaptable))}")
        return value

    @field_validator("engine_overrides")
    @classmethod
    def _known_networks_and_fields(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        known = {network.name for spec in cls.specs.values() for network in spec.networks}
        for name, fields in value.items():
            if name not in known:
                raise ValueError(f"unknown network {name!r}; known: {', '.join(sorted(known))}")
            for field in fields:
                if field not in DeepSpeedConfig.model_fields:
                    raise ValueError(f"unknown key {name}.{field}; known: {', '.join(DeepSpeedConfig.model_fields)}")
            try:
                DeepSpeedConfig.model_validate(fields)
            except ValidationError as error:
                first = error.errors()[0]
                raise ValueError(f"{name}.{first['loc'][0]} = {first['input']!r}: {first['msg']}") from None
        return value

    @model_validator(mode="after")
    def _adapted_networks_are_there(self) -> TrainerConfig:
        for spec in self.specs.values():
            section = self.section_of(spec)
            for network in spec.networks:
                if network.name in self.lora and not network.has_transformer(section):
                    raise ValueError(
                        f"lora: with these settings of {spec.name} the {network.name} has no transformer; "
                        f"leave out {network.name!r}"
                    )
        return self

    @model_validator(mode="after")
    def _compiles_what_can_be_compiled(self) -> TrainerConfig:
        engines = {"engine": self.engine} | {name: self.engine_of(name) for name in self.engine_overrides}
        for name, engine in engines.items():
            if self.compile_blocks and engine.zero_stage == 3:
                where = "engine" if name == "engine" else f"engine_overrides.{name}"
                raise ValueError(
                    f"compile_blocks: true and {where}.zero_stage = 3: ZeRO-3's hooks break a block into dozens of "
                    "graphs; set compile_blocks to false, or zero_stage to 1 or 2"
                )
        return self

    @model_validator(mode="after")
    def _engines_fit_together(self) -> TrainerConfig:
        for spec in self.specs.values():
            section = self.section_of(spec)
            trained = [network for network in spec.networks if network.optimizer_of(section) is not None]
            for network in trained:
                engine = self.engine_of(network.name)
                if network.copies is not None:
                    other = self.engine_of(network.copies)
                    for field in SHARDING:
                        if (mine := getattr(engine, field)) != (theirs := getattr(other, field)):
                            raise ValueError(
                                f"engine_overrides: {network.name} takes over the weights of {network.copies} in stage "
                                f"{spec.name}, so {field} has to be the same, not {mine} and {theirs}"
                            )
                mine, theirs = (each.gradient_accumulation for each in (engine, self.engine_of(trained[0].name)))
                if network.moments and mine != theirs:
                    raise ValueError(
                        f"engine_overrides: {trained[0].name} and {network.name} take the same batches in stage "
                        f"{spec.name}; give both the same gradient_accumulation, not {theirs} and {mine}"
                    )
        return self

    def section_of(self, stage: StageSpec) -> Any:
        """The configuration of a stage."""
        return getattr(self, stage.name)

    def engine_of(self, network: str) -> DeepSpeedConfig:
        """Sharding of one network: `engine`, refined by its overrides."""
        overrides = self.engine_overrides.get(network)
        return DeepSpeedConfig.model_validate(self.engine.model_dump() | overrides) if overrides else self.engine

    def micro_batch_of(self, stage: StageSpec, ranks: int) -> int:
        """Samples per micro-batch of each rank, or of each group of ranks that share clips.

        Raises:
            UserError: the ranks cannot share the global batch, or a clip.
        """
        readers, left = divmod(ranks, self.sequence_parallel)
        if left:
            raise UserError(
                f"trainer.sequence_parallel = {self.sequence_parallel} does not divide {ranks} ranks; change one"
            )
        total = self.schedules[stage.name].global_batch_size
        accumulation = self.engine_of(stage.networks[0].name).gradient_accumulation
        micro_batch, left = divmod(total, accumulation * readers)
        if left or micro_batch == 0:
            step = accumulation * readers
            raise UserError(
                f"trainer.schedules.{stage.name}.global_batch_size = {total} is not a multiple of {readers} "
                f"{'ranks' if self.sequence_parallel == 1 else 'groups of ranks'} x {accumulation} accumulated "
                f"micro-batches; set it to {max(1, round(total / step)) * step}"
            )
        return micro_batch

    def steps_of(self, stage: StageSpec) -> int:
        """Steps of the loop.

        Raises:
            UserError: the schedule of a stage from outside gives none.
        """
        steps = self.schedules[stage.name].steps if stage.steps is None else stage.steps(self.section_of(stage))
        if steps is None:
            raise UserError(f"trainer.schedules.{stage.name}.steps is missing: give the number of updates")
        return steps


def config_class(stage: StageSpec) -> type[TrainerConfig]:
    """`TrainerConfig`, with a section and a schedule for a stage from outside the repository.

    Raises:
        UserError: its name is taken.
    """
    if STAGES.get(stage.name) is stage:
        return TrainerConfig
    if stage.name in TrainerConfig.model_fields:
        raise UserError(f"--stage: trainer.{stage.name} exists already; give the spec another name than {stage.name}")
    extended = create_model(
        TrainerConfig.__name__, __base__=TrainerConfig, **{stage.name: (stage.config, stage.config())}
    )  # type: ignore[call-overload]
    extended.specs = STAGES | {stage.name: stage}
    return extended
