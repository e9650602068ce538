"""`train(job)`: everything between checked arguments and the exported model of one stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.storage import StorageConfig, open_folder
from datagen.dataset.loader import ShardReader
from datagen.dataset.shard_format import Manifest, Split, read_manifest
from pipeline.model.attention import automatic_choice, set_attention
from pipeline.model.config import ModelConfig
from pipeline.model.load_weights import build_transformer, load_transformer
from pipeline.model.prompts import PromptCache, load_prompts
from pipeline.model.sequence_parallel import ALONE, SequenceGroup, form_sequence_groups
from pipeline.model.transformer import VSRTransformer
from pipeline.model.vae import VAE, load_vae
from trainer.checkpoint import has_best, load_best
from trainer.config import TrainerConfig
from trainer.engine.lora import add_adapter, merged_state, restore_adapter, save_adapter
from trainer.engine.process_group import World, start_distributed
from trainer.export import code_version, export_folder, export_model
from trainer.loop import Run, train_loop
from trainer.monitoring.validation import Validation, fixed_batch
from trainer.output_folder import owned
from trainer.stages.stage import NetworkSpec, StageSetup, StageSpec, TrainingStage


@dataclass(frozen=True)
class TrainingJob:
    """One stage to be trained into one output folder."""

    stage: StageSpec
    model: ModelConfig
    config: TrainerConfig
    #: dataset folder or s3:// prefix
    data: str
    output: Path
    #: dataset folder or s3:// prefix of held-out clips; None: the validation split of `data`, or no validation
    validation_data: str | None = None
    #: model folder the student starts from
    init: Path | None = None
    #: model folder of the stage's teacher
    teacher: Path | None = None
    #: whose weights are exported: the last EMA, or that of the checkpoint with the best validation
    export: Literal["last", "best"] = "last"
    #: save and leave after this many steps of this process, as if preempted
    stop_after: int | None = None
    #: begin at step 0 and set what `output` holds aside
    restart: bool = False
    #: how s3:// addresses are reached
    storage: StorageConfig = field(default_factory=StorageConfig)

    def check(self) -> None:
        """Fail early, before anything is loaded.

        Raises:
            UserError: a model folder is missing or not wanted, or the best checkpoint is wanted and none is kept.
        """
        stage = self.stage
        if stage.init is not None and self.init is None:
            raise UserError(f"--stage {stage.name} starts from {stage.init}: give its folder with --init")
        takes_teacher = stage.takes_teacher(self.config.section_of(stage))
        if takes_teacher and self.teacher is None:
            raise UserError(f"--stage {stage.name} needs {stage.teacher}: give it with --teacher")
        if not takes_teacher and self.teacher is not None:
            settings = "" if stage.teacher is None else " with these settings"
            raise UserError(f"--stage {stage.name} takes no --teacher{settings}; leave it out")
        for option, folder in (("--init", self.init), ("--teacher", self.teacher)):
            if folder is not None and not folder.exists():
                raise UserError(f"{option} {folder}: no such model folder")
        schedule = self.config.schedules[stage.name]
        for name, off in (("validate_every", "0"), ("keep_best", "null")):
            if self.export == "best" and not getattr(schedule, name):
                raise UserError(
                    f"--export best: no best checkpoint is kept, as trainer.schedules.{stage.name}.{name} is {off}"
                )


def train(job: TrainingJob) -> bool:
    """Train a stage from its latest checkpoint, or from the beginning, and export the model. Collective.

    Returns:
        Whether the stage is finished; False after a signal was answered with a checkpoint.

    Raises:
        UserError: see `TrainingJob.check`; batches that the ranks cannot share; validation clips that are training
            clips; what `train_loop` raises.
    """
    job.check()
    world = start_distributed()
    with owned(job.output, restart=job.restart):
        return _train(job, world)


def _train(job: TrainingJob, world: World) -> bool:
    config, schedule = job.config, job.config.schedules[job.stage.name]
    vae, prompts = load_vae(job.model.vae), load_prompts(job.model.prompts)
    sequence = form_sequence_groups(config.sequence_parallel)
    training_reader = _reader(job, world, sequence, config.micro_batch_of(job.stage, world.size), config.seed)
    validation = None
    if schedule.validate_every:
        validation = _validation(job, training_reader.manifest, vae, world, sequence)
    if job.export == "best" and validation is None and not has_best(job.output / "checkpoints"):
        raise UserError(f"--export best: no checkpoint is the best without validation; {_hold_out(job)}")
    settings = {
        "stage": job.stage.name,
        "model": job.model.model_dump(mode="json"),
        "trainer": config.model_dump(mode="json"),
        "data": {"folder": str(job.data), **training_reader.manifest.model_dump(mode="json", exclude={"shards"})},
        "parents": {name: str(folder) for name in ("init", "teacher") if (folder := getattr(job, name))},
        "code": code_version(),
    }
    if config.attention == "auto" and job.stage.load is None and world.rank == 0:
        print(automatic_choice(config.engine_of("student").precision == "bf16"), flush=True)
    exporter = _Exporter(job, vae, prompts, settings, first=world.rank == 0)
    stage = build_stage(
        job.stage,
        config,
        job.model,
        init=job.init,
        teacher=job.teacher,
        embed=prompts.embed,
        world=world,
        keep_model=lambda name, state: exporter.export(name, state, job.model.base_steps),
        sequence=sequence,
    )
    training_reader.read_ahead(stage.batches_per_step + 1)
    run = Run(
        stage,
        training_reader,
        config,
        schedule,
        config.steps_of(job.stage),
        job.output,
        world,
        settings,
        validation=validation,
        stop_after=job.stop_after,
    )
    if not train_loop(run):
        return False
    if job.export == "best":
        run.metrics = load_best(run.checkpoints, stage)
    if job.stage.export is not None:
        averaged = {name: network for name, network in stage.networks.items() if network.ema is not None}
        trained = {name: (network.module, network.full_state_dict(ema=True)) for name, network in averaged.items()}
        if world.rank == 0:
            write = partial(job.stage.export, trained=trained, init=job.init)
            export_folder(job.output / "model", write, {**settings, "metrics": run.metrics})
    else:
        state = stage.exported.full_state_dict(ema=stage.exported.ema is not None)
        exporter.export("model", state, job.stage.exported_steps(job.model), run.metrics)
    if world.rank == 0:
        print(f"model: {job.output / 'model'}", flush=True)
    return True


def _validation(
    job: TrainingJob, training: Manifest, vae: VAE, world: World, sequence: SequenceGroup
) -> Validation | None:
    """The first `validation_clips` of the held-out clips, spread over the ranks; None where there are none.

    Held out is the validation split of `--validation-data` or `--data`, or all of a `--validation-data` without one.

    Raises:
        UserError: a shard of `--validation-data` is trained on.
    """
    folder = job.validation_data or job.data
    manifest = training if job.validation_data is None else read_manifest(open_folder(folder, job.storage))
    split: Split | Literal["all"] = "validation" if manifest.has_validation else "all"
    if split == "all" and job.validation_data is None:
        if world.rank == 0:
            print(f"validation: off; {_hold_out(job)}", flush=True)
        return None
    trained_on = {entry.sha256 for entry in training.shards_of("train") if entry.samples}
    for entry in manifest.shards_of(split):
        if entry.sha256 in trained_on:
            raise UserError(
                f"--validation-data {folder}: {entry.name} is a shard of --data {job.data}, too; validation looks at "
                "no training clips"
            )
    if job.validation_data is None and world.rank == 0:
        print(f"validation: held-out clips of {job.data}", flush=True)
    clips, readers, number = job.config.validation_clips, world.size // sequence.size, world.rank // sequence.size
    share = -(-clips // readers)
    reader = _reader(job, world, sequence, share, job.config.seed + 1, folder, split)
    return Validation(fixed_batch(reader), vae, world.device, first=number * share, clips=clips)


def _hold_out(job: TrainingJob) -> str:
    """How a run without held-out clips gets some."""
    return f"{job.data} holds no clips out: build its shards with datagen.validation_share, or give --validation-data"


def build_stage(
    spec: StageSpec,
    config: TrainerConfig,
    model: ModelConfig,
    *,
    init: Path | None,
    teacher: Path | None,
    embed: Callable[[list[str]], Tensor],
    world: World,
    keep_model: Callable[[str, dict[str, Tensor]], None] | None = None,
    sequence: SequenceGroup = ALONE,
) -> TrainingStage:
    """Load the weights of every network, add adapters, wrap them in engines. Collective.

    Args:
        sequence: the ranks that share a clip with this one.
    """
    folders, section = {"init": init, "teacher": teacher}, config.section_of(spec)

    def transformer_of(network: NetworkSpec) -> nn.Module:
        # Each network opens the file anew: mapped weights cost nothing until an engine takes them.
        folder, adapter = folders[network.weights], config.lora.get(network.lora or "")
        if network.load is not None:
            return network.load(folder, model, section, config.seed)
        if spec.load is not None:
            return spec.load(folder, model, config.seed)
        dtype = None if adapter is None else torch.float32  # peft makes its layers in the dtype that it finds
        transformer = initial_transformer(folder, model, config.seed, dtype=dtype)
        set_attention(transformer, config.attention, config.engine_of("student").dtype)
        transformer.share_sequence(sequence)
        if adapter is not None:
            add_adapter(transformer, adapter, network=network.name, seed=config.seed)
        return transformer

    setup = StageSetup(
        spec,
        section,
        spec.modules(section, transformer_of, config.seed),
        engine_of=config.engine_of,
        embed=embed,
        seed=config.seed,
        device=world.device,
        model_shift=model.shift,
        keep_model=keep_model,
    )
    stage = spec.build(setup)
    if config.compile_blocks:  # only now: a copy of a compiled module is not compiled
        # Stage II's gradient norms walk one graph several times, which donated buffers do not survive.
        torch._functorch.config.donated_buffer = False
        for trained in stage.networks.values():
            blocks: Any = getattr(trained.module, "transformer", trained.module)
            if isinstance(blocks, VSRTransformer):  # inductor fails on the backward of a codec's replicated borders
                blocks.compile_repeated_blocks()
    return stage


def initial_transformer(
    folder: Path | None, model: ModelConfig, seed: int, *, dtype: torch.dtype | None = torch.float32
) -> VSRTransformer:
    """The weights of `folder`, else those that a preset begins with; the same on every rank and every call.

    Args:
        dtype: None: as in the file.
    """
    if folder is not None:
        return load_transformer(folder, model.transformer, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_transformer(model.transformer, model.initial_weights, dtype=dtype)


def _reader(
    job: TrainingJob,
    world: World,
    sequence: SequenceGroup,
    samples: int,
    seed: int,
    data: str | None = None,
    split: Split | Literal["all"] = "train",
) -> ShardReader:
    """Reads `samples` per micro-batch on each rank, or on each group of ranks that share clips."""
    readers = world.size // sequence.size
    return ShardReader(
        data or job.data,
        members=job.stage.members,
        seed=seed,
        split=split,
        global_batch_size=samples * readers,
        rank=world.rank // sequence.size,
        world_size=readers,
        cache_dir=job.config.shard_cache,
        damaged=job.config.damaged_samples,
        storage=job.storage,
    )


class _Exporter:
    """Writes model folders on rank 0, adapters merged."""

    def __init__(
        self, job: TrainingJob, vae: VAE, prompts: PromptCache, settings: dict[str, Any], *, first: bool
    ) -> None:
        self._job, self._vae, self._prompts, self._settings, self._first = job, vae, prompts, settings, first

    def export(self, name: str, state: dict[str, Tensor], steps: int, metrics: dict[str, float] | None = None) -> None:
        """Write OUTPUT/`name` from the exported network's trained parameters."""
        if not self._first:
            return
        job = self._job
        lora = job.config.lora.get("student")
        if lora is not None:
            base = initial_transformer(job.init, job.model, job.config.seed)
            adapted = restore_adapter(base, lora, state, job.init or job.model.initial_weights)
            if name == "model":
                save_adapter(job.output / "adapter", adapted)
            state = merged_state(adapted)
        elif job.model.transformer.low_resolution_predictor:
            # Base and Stage I keep the prediction's weights: they are those at the start.
            state = initial_transformer(job.init, job.model, job.config.seed).state_dict() | state
        export_model(
            job.output / name,
            state,
            job.model,
            self._vae,
            self._prompts,
            steps=steps,
            dtype=torch.bfloat16 if job.config.export_precision == "bf16" else torch.float32,
            card={**self._settings, "metrics": metrics or {}},
        )
