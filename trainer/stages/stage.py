"""What a stage is: `StageSpec` describes it, `StageSetup` is what it is built from, `TrainingStage` is its base class.

The loop (trainer/loop.py) knows no method; a stage knows no files. A stage writes `updates` (forwards, backwards,
optimizer steps) and `previews` (latents to look at). Command line, configuration, dry run, memory and validation ask
the spec; none of them compares names of stages. A stage outside the repository brings a spec of its own:
`--stage package.module:SPEC` (docs/extending.md).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from common.config import Section
from pipeline.model.config import ModelConfig
from pipeline.model.low_resolution_skip import LowResolutionPredictor
from trainer.engine.config import DeepSpeedConfig, OptimizerConfig
from trainer.stages.random_draws import Draws

if TYPE_CHECKING:
    from datagen.dataset.loader import Batch
    from trainer.engine.network import Network
    from trainer.planning.memory import ActivationSizes


class ScheduleConfig(Section):
    """How long a stage runs and on how much at a time."""

    #: updates of the exported network; Stage I's follow from its own configuration [ours: base, dual_stream]
    #: [note: preference]
    steps: int | None = Field(default=None, ge=1)
    #: samples per update, over all ranks and accumulated micro-batches
    global_batch_size: int = Field(default=16, ge=1)
    #: updates between two checkpoints
    checkpoint_every: int = Field(default=500, ge=1)
    #: updates between two validations; 0 = never
    validate_every: int = Field(default=500, ge=0)
    #: what makes a validation the best so far, whose checkpoint is kept beside the last ones: PSNR (highest) or error
    #: in latents (lowest) of the exported network's preview; null = none [ours]
    keep_best: Literal["psnr", "latent_mse"] | None = "psnr"
    #: shape of the learning rate after warm-up; cosine falls to a tenth [ours]
    learning_rate_schedule: Literal["constant", "cosine"] = "constant"


@dataclass(frozen=True)
class NetworkSpec:
    """One network of a stage."""

    name: str
    #: the option whose model folder holds its first weights
    weights: Literal["init", "teacher"] = "init"
    #: field of the stage's configuration with its `OptimizerConfig`; where there is none, or None stands in it, the
    #: network is frozen
    optimizer: str | None = None
    #: False for a network that is only overwritten by another's masters: its optimizer never steps
    moments: bool = True
    #: the network whose weights it takes over while it is trained, so that both have to be sharded alike
    copies: str | None = None
    #: an EMA with the configuration's `ema_decay`; the exported network has one
    ema: bool = False
    #: entry of `trainer.lora` that gives it an adapter; None: it never has one
    lora: str | None = None
    #: whether it trains its `LowResolutionPredictor` (small models have one); else that keeps its weights. By
    #: velocities at small t it learns from noise, and forgets what `tools.fit_low_resolution_predictor` gave it
    trains_predictor: bool = False
    #: property of the stage's configuration that tells whether its transformer is needed; None: always
    needed: str | None = None
    #: reads its first weights itself: (folder or None, model, the stage's section, seed) -> module, untrained without a
    #: folder, without values on the meta device; None: the stage's `load`
    load: Callable[[Path | None, ModelConfig, Any, int], nn.Module] | None = None

    def has_transformer(self, config: Any) -> bool:
        """Whether there is one with these settings of the stage."""
        return self.needed is None or bool(getattr(config, self.needed))

    def optimizer_of(self, config: Any) -> OptimizerConfig | None:
        """How it is trained with these settings of the stage; None: it is frozen."""
        return getattr(config, self.optimizer) if self.optimizer else None


#: a student with an EMA, trained with the stage's `optimizer`, with an adapter where `trainer.lora.student` is given
STUDENT = NetworkSpec("student", optimizer="optimizer", ema=True, lora="student")


#: module and weights (float32, on the CPU) of trained networks, by name
Trained = dict[str, tuple[nn.Module, dict[str, Tensor]]]


def _same_modules(config: Any, transformers: dict[str, nn.Module], shape: Any, seed: int) -> dict[str, nn.Module]:
    return transformers


@dataclass(frozen=True)
class StageSpec:
    """One stage of training."""

    #: what `--stage` takes; also the name of its section `trainer.<name>` and of its `trainer.schedules.<name>`
    name: str
    #: one line, for `--help`
    summary: str
    #: class of the section `trainer.<name>`
    config: type[Section]
    #: every network, in the order in which they are built on every rank; the exported one first
    networks: tuple[NetworkSpec, ...]
    #: the stage itself
    build: Callable[[StageSetup], TrainingStage]
    #: defaults of `trainer.schedules.<name>`
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    #: what `--init` has to be; None: it may be left out
    init: str | None = None
    #: what `--teacher` has to be; None: the stage takes none
    teacher: str | None = None
    #: property of the stage's configuration that tells whether `--teacher` is needed; None: always
    teacher_needed: str | None = None
    #: members of the dataset's samples that it reads
    members: tuple[str, ...] = ("latents",)
    #: tensor of them that validation compares with
    target: str = "z_hr"
    #: whether the stage works on pixels: `previews` and `target` are (B, 3, F, H, W) in [-1, 1] instead of latents
    pixels: bool = False
    #: reads the folder of `--init` or `--teacher`: (folder or None, model, seed) -> module; None: a transformer
    load: Callable[[Path | None, ModelConfig, int], nn.Module] | None = None
    #: writes what the stage makes: (folder, trained, init), with `trained` the module and the weights of each network
    #: that has an EMA, by name, and the folder of `--init`; None: a model folder around a transformer
    export: Callable[..., None] | None = None
    #: further models that it writes beside the exported one (`StageSetup.keep_model`)
    kept_models: int = 0
    #: Euler steps that the exported model is meant for
    exported_steps: Callable[[ModelConfig], int] = lambda model: 1
    #: number of updates, of a stage whose configuration decides it; None: `schedules.<name>.steps` does
    steps: Callable[[Any], int] | None = None
    #: networks from transformers: (config, transformers by name, the transformers' shape, seed) -> modules by name
    assemble: Callable[[Any, dict[str, nn.Module], Any, int], dict[str, nn.Module]] = _same_modules
    #: latents per sample in the batch of a trained network: config -> number
    latents_per_sample: Callable[[Any], int] = lambda config: 1
    #: bytes that the passes of one micro-batch hold at most: (sizes, config) -> bytes; None: one trained network's
    activation_bytes: Callable[[ActivationSizes, Any], float] | None = None

    def modules(
        self, config: Any, transformer_of: Callable[[NetworkSpec], nn.Module], seed: int
    ) -> dict[str, nn.Module]:
        """Modules by network name.

        Args:
            config: the stage's section.
            transformer_of: gives the transformer of a network, adapter included; asked for those that are needed.
            seed: run seed, of what `assemble` draws.
        """
        transformers = {n.name: transformer_of(n) for n in self.networks if n.has_transformer(config)}
        shape: Any = next(iter(transformers.values()))
        return self.assemble(config, transformers, shape.config, seed)

    def takes_teacher(self, config: Any) -> bool:
        """Whether `--teacher` is needed with these settings of the stage."""
        if self.teacher is None:
            return False
        return self.teacher_needed is None or bool(getattr(config, self.teacher_needed))

    def network(self, name: str) -> NetworkSpec:
        """The network called `name`."""
        return next(network for network in self.networks if network.name == name)


@dataclass
class StageSetup:
    """What a stage is built from; trainer/train.py makes it from configuration and model folders."""

    spec: StageSpec
    #: the section `trainer.<name>`
    config: Any
    #: modules by network name, weights loaded, adapters added
    modules: dict[str, nn.Module]
    #: how a network is sharded and computed
    engine_of: Callable[[str], DeepSpeedConfig]
    #: captions -> prompt embeddings (B, L, text_dim), float32; "" is the null prompt
    embed: Callable[[list[str]], Tensor]
    #: run seed of all draws
    seed: int
    device: torch.device | str = "cpu"
    #: `model.shift`: the timestep shift where the stage's own `time_shift` is null
    model_shift: float = 5.0
    #: keeps a further model beside the exported one: (name of the folder, state dict on rank 0). Called on every rank
    keep_model: Callable[[str, dict[str, Tensor]], None] | None = None

    def network(self, name: str, parameter_groups: list[dict[str, Any]] | None = None) -> Network:
        """Wrap the module of a network in its engine, as the spec says. Collective.

        Args:
            parameter_groups: torch-style groups with learning rates of their own; None: one group.
        """
        from trainer.engine.network import Network

        network, module = self.spec.network(name), self.modules[name]
        if not network.trains_predictor:
            for part in module.modules():
                if isinstance(part, LowResolutionPredictor):
                    part.requires_grad_(False)
        return Network(
            name,
            module,
            deepspeed=self.engine_of(name),
            optimizer=network.optimizer_of(self.config),
            parameter_groups=parameter_groups,
            ema_decay=self.config.ema_decay if network.ema else None,
        )


class TrainingStage(ABC):
    """One stage; every rank calls `train_step` with its own share of the global batches.

    Ranks that share clips (pipeline/model/sequence_parallel.py) call it with the same one.
    """

    #: every network, frozen ones too; those with an optimizer are saved
    networks: dict[str, Network]
    #: its EMA (its weights where it has none) becomes the model folder
    exported: Network
    #: names of what `previews` returns, the exported network's first
    preview_names: tuple[str, ...] = ("student",)

    def __init__(self, setup: StageSetup) -> None:
        self.spec, self.config = setup.spec, setup.config
        self.name = setup.spec.name
        self.shift = getattr(setup.config, "time_shift", None) or setup.model_shift
        self._embed, self._seed, self._device = setup.embed, setup.seed, torch.device(setup.device)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Every network's EMA in place of its weights, for previews. Collective."""
        with ExitStack() as stack:
            for network in self.networks.values():
                stack.enter_context(network.averaged())
            yield

    @property
    def batches_per_step(self) -> int:
        """Local batches that one `train_step` consumes: updates × gradient accumulation."""
        return self.exported.config.gradient_accumulation

    def train_step(self, step: int, batches: Sequence[Batch]) -> dict[str, float]:
        """Do all updates of step `step`; returns numbers to log, averaged over updates and ranks. Collective."""
        meter = Meter(self._device)
        self.updates(step, batches, meter)
        return meter.means()

    @abstractmethod
    def updates(self, step: int, batches: Sequence[Batch], meter: Meter) -> None:
        """The forwards, backwards and optimizer steps of `train_step`, and nothing else; `meter` takes the numbers."""

    @abstractmethod
    def previews(self, batch: Batch) -> dict[str, Tensor]:
        """Clean latents (B, C, T, H, W), float32, to look at: `preview_names`. Pixels where `spec.pixels`.

        Every rank calls it (the weights may be sharded) with a batch of the same size. Noise does not depend on the
        step, so previews of different steps can be compared.
        """

    def objective(self, step: int) -> str:
        """What step `step` minimises. Steps with the same objective need the same number of operations."""
        return self.name

    def draws(self, step: int, batch: Batch, update: int = 0) -> Draws:
        """The random draws of one update; step -1 for previews."""
        return Draws(batch.keys, self._seed, self.name, step, update, device=self._device)

    def target(self, batch: Batch) -> Tensor:
        """What validation compares previews with; of their shape."""
        return self.latents(batch, self.spec.target)

    def tokens_per_sample(self, batch: Batch) -> int:
        """Tokens of one sample of the exported network's update."""
        shape, patch = batch.tensors[self.spec.target].shape[2:], self.exported.module.config.patch_size
        return math.prod(size // p for size, p in zip(shape, patch, strict=True))

    def latents(self, batch: Batch, name: str) -> Tensor:
        """A tensor of the batch (`z_hr`, `z_lr`, …), (B, C, T, H, W), float32, on the device."""
        # in two calls: a copy that also converts converts on the CPU first and is not asynchronous
        return batch.tensors[name].to(self._device, non_blocking=True).float()

    def prompts(self, batch: Batch) -> Tensor:
        """Embeddings of the batch's captions, (B, L, text_dim), on the device."""
        return self.embedded([entry["caption"] for entry in batch.metadata])

    def embedded(self, captions: list[str]) -> Tensor:
        """Embeddings of `captions`, (B, L, text_dim), on the device."""
        return self._embed(captions).to(self._device, non_blocking=True)


class Meter:
    """Means of named numbers over the updates of a step and over the ranks, with one reduction at the end."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        self._values: dict[str, list[Tensor]] = {}

    def add(self, **values: Tensor | float) -> None:
        """Note scalars; every rank notes the same names."""
        for name, value in values.items():
            scalar = torch.as_tensor(value, dtype=torch.float32, device=self._device).detach()
            self._values.setdefault(name, []).append(scalar)

    def means(self) -> dict[str, float]:
        """Collective."""
        if not self._values:
            return {}
        means = torch.stack([torch.stack(values).mean() for values in self._values.values()])
        if dist.is_initialized():
            dist.all_reduce(means)
            means /= dist.get_world_size()
        return dict(zip(self._values, means.tolist(), strict=True))
