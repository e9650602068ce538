"""One network = one DeepSpeed engine, and the only two ways it may be called.

    with network.updating():             # it learns
        out = network(...)
        network.backward(loss)           # once per micro-batch
        gradient_norm = network.step()   # once per update

    out = network.frozen(...)            # it doesn't; gradients may still flow through to its inputs

Several engines work in one step of Stage II, and ZeRO-3 is only exact when a network that is not being
updated has no parameter that asks for a gradient and is called past its engine. So parameters ask for
gradients inside `updating()` and at no other time, and the wrong calls raise.
tests/trainer/test_zero_calls.py shows what each of them would have done silently.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from pydantic import Field
from torch import Tensor, nn

from common.config import Section
from common.errors import UserError
from trainer.engine.ema import EMA
from trainer.engine.frozen_linear import use_for_constant_weights
from trainer.engine.zero_shards import (
    MOMENTS,
    Fragment,
    find_fragments,
    gather_to_rank_0,
    load_fragments,
    save_fragments,
)


class OptimizerConfig(Section):
    """AdamW. Groups may override the learning rate (the discriminator heads do)."""

    learning_rate: float = Field(gt=0)
    betas: tuple[float, float] = (0.0, 0.999)  # [peer] FastGen and DMD2: no momentum beside a discriminator
    weight_decay: float = Field(0.01, ge=0)  # [peer]
    #: largest global gradient norm of the network; 0 = no clipping
    gradient_clip: float = Field(1.0, ge=0)  # [peer]
    #: linear warm-up, in updates of this network; every group keeps its own peak
    warmup_updates: int = Field(0, ge=0)


class DeepSpeedConfig(Section):
    """How one network is sharded and computed; each network of a stage may have its own."""

    zero_stage: Literal[1, 2, 3] = 3
    #: bf16: weights and activations in bfloat16, masters, moments and accumulated gradients in float32
    precision: Literal["bf16", "fp32"] = "bf16"
    #: where float32 masters and Adam moments live
    offload_optimizer: bool = False
    #: keep the weight shards on the host too (ZeRO-3)
    offload_parameters: bool = False
    gradient_accumulation: int = Field(1, ge=1)
    activation_checkpointing: bool = False
    #: ZeRO-3: parameters smaller than this stay whole on every rank [DeepSpeed's default is 1e5]
    persistence_threshold: int = Field(100_000, ge=0)
    #: ZeRO: elements reduced at a time
    bucket_size: int = Field(100_000_000, ge=1)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def as_deepspeed(self, optimizer: OptimizerConfig | None) -> dict[str, Any]:
        """The dictionary given to `deepspeed.initialize`."""
        zero: dict[str, Any] = {
            "stage": self.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": torch.cuda.is_available(),
            "reduce_bucket_size": self.bucket_size,
        }
        if self.zero_stage == 3:
            zero |= {
                "stage3_param_persistence_threshold": self.persistence_threshold,
                "stage3_prefetch_bucket_size": self.bucket_size,
            }
            if self.offload_parameters:
                zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        else:
            zero["allgather_bucket_size"] = self.bucket_size
        if self.offload_optimizer and optimizer is not None:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: the stages own their batches
            "gradient_accumulation_steps": self.gradient_accumulation if optimizer is not None else 1,
            "gradient_clipping": optimizer.gradient_clip if optimizer is not None else 0.0,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
        }
        if self.precision == "bf16":
            config["bf16"] = {"enabled": True}
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        return config


@dataclass(frozen=True)
class World:
    """This process among the ranks."""

    rank: int
    size: int
    device: torch.device


def start_distributed() -> World:
    """Join the ranks that a launcher started (RANK, WORLD_SIZE, …), or be alone; NCCL on GPUs, else gloo."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "WORLD_SIZE" not in os.environ and not dist.is_initialized():
        # Alone: no port to find, and none left in the environment for child processes to trip over.
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if backend == "gloo":
        # Else DeepSpeed compiles a shared-memory reduction on its first start: a minute and a C++ compiler for nothing.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return World(dist.get_rank(), dist.get_world_size(), device)


class Network:
    """A module that trains in a DeepSpeed engine of its own, or only ever runs frozen."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        *,
        deepspeed: DeepSpeedConfig,
        optimizer: OptimizerConfig | None = None,
        parameter_groups: Sequence[dict[str, Any]] | None = None,
        ema_decay: float | None = None,
    ) -> None:
        """Build the engine. Collective: every rank, in the same order.

        Args:
            name: student, critic, real_score, …; used in logs, errors and file names.
            module: its float32 weights are the masters' first value; its dtype and device are changed. With an
                optimizer, the parameters that ask for a gradient learn, and the others never change (LoRA).
            optimizer: None for a network that is never updated; it is sharded at ZeRO-3 and whole otherwise.
            parameter_groups: torch-style groups over the trainable parameters, each with `params` and, where it
                differs, `lr`; default: one group.
            ema_decay: keep an EMA of the masters, updated by every `step()` that is not skipped.
        """
        self.name = name
        self.config = deepspeed
        self._updating = False
        self._backwards = 0
        #: updates done so far, skipped ones included
        self.updates = 0
        #: updates dropped because the gradient was not finite
        self.skipped = 0
        #: what the loop's schedule multiplies every learning rate with, on top of the warm-up
        self.schedule_factor = 1.0
        self._trainable = [p for p in module.parameters() if p.requires_grad] if optimizer is not None else []
        self.parameter_count = sum(parameter.numel() for parameter in module.parameters())
        self._shapes = {key: p.shape for key, p in module.named_parameters() if p.requires_grad}
        # Checkpoints don't hold what never changes; this tells whether it is still the same.
        self._constants = _checksum(p for p in module.parameters() if not p.requires_grad) if optimizer else 0
        if deepspeed.activation_checkpointing:
            for part in module.modules():
                if getattr(part, "_supports_gradient_checkpointing", False):
                    part.enable_gradient_checkpointing()
        self.fragments: list[Fragment] = []
        self.ema: EMA | None = None
        if optimizer is None:
            self._engine = _frozen_engine(module, deepspeed)
        else:
            groups = list(parameter_groups or [{"params": self._trainable}])
            self._engine = _training_engine(module, groups, deepspeed, optimizer)
            self.fragments = find_fragments(module, self._engine.optimizer)
            self._peaks = [group["lr"] for group in self._engine.optimizer.param_groups]
            self._warmup = optimizer.warmup_updates
            if ema_decay is not None:
                self.ema = EMA(self.fragments, ema_decay)
        use_for_constant_weights()
        #: the module itself, for its configuration; call the network, never this
        self.module = module
        module.requires_grad_(False)

    # --- the two ways of calling ---------------------------------------------------------------------------

    @contextmanager
    def updating(self) -> Iterator[None]:
        """For one update: forward, backward and step all happen inside."""
        if not self._trainable:
            raise RuntimeError(f"{self.name} has no optimizer; it can only be called through frozen()")
        self._set_updating(True)
        try:
            yield
        finally:
            self._set_updating(False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the network being updated."""
        if not self._updating:
            raise RuntimeError(f"{self.name} is not being updated: call {self.name}.frozen(...)")
        return self._engine(*args, **kwargs)

    def frozen(self, *args: Any, **kwargs: Any) -> Any:
        """Forward with constant parameters; differentiable with respect to the inputs."""
        if self._updating:
            raise RuntimeError(f"{self.name} is being updated: a frozen call now would corrupt its gradient")
        return self._engine.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch's mean loss; divided by `gradient_accumulation` here."""
        if not self._updating:
            raise RuntimeError(f"{self.name}.backward() outside of {self.name}.updating()")
        if self._backwards == self.config.gradient_accumulation:
            raise RuntimeError(f"{self.name}: more backward passes than gradient_accumulation; call step()")
        self._engine.backward(loss)
        self._backwards += 1
        if self._backwards < self.config.gradient_accumulation:
            self._engine.step()  # no update: it counts the micro-batch

    def gradient_norm(self, prefix: str) -> float:
        """Norm of the accumulated gradient of the parameters whose names begin with `prefix`. Collective.

        For a few small parameters, between the last `backward()` and `step()`: each is gathered.
        """
        named = self.module.named_parameters()
        gradients = [safe_get_full_grad(p) for name, p in named if name.startswith(prefix)]
        norms = [gradient.float().norm() for gradient in gradients if gradient is not None]
        return float(torch.linalg.vector_norm(torch.stack(norms)))

    def step(self) -> float:
        """Clip and update. Returns the gradient norm before clipping; inf means a skipped update.

        A norm that is not finite on any rank skips the update on all: DeepSpeed decides on the reduced norm.
        """
        if self._backwards != self.config.gradient_accumulation:
            expected = self.config.gradient_accumulation
            raise RuntimeError(f"{self.name}.step() after {self._backwards} of {expected} backward passes")
        self._backwards = 0
        warm = min(1.0, (self.updates + 1) / self._warmup) if self._warmup else 1.0
        self.set_learning_rate(warm * self.schedule_factor)
        self._engine.step()
        self.updates += 1
        norm = float(self._engine.get_global_grad_norm())
        if self._engine.optimizer.overflow:
            self.skipped += 1
            return float("inf")
        if self.ema is not None:
            self.ema.update()
        return norm

    def _set_updating(self, value: bool) -> None:
        self._updating = value
        for parameter in self._trainable:
            parameter.requires_grad_(value)

    @property
    def trained(self) -> frozenset[str]:
        """Names of the parameters that learn; none of a network without an optimizer."""
        return frozenset(self._shapes) if self._trainable else frozenset()

    @property
    def trained_parameter_count(self) -> int:
        """Elements that learn."""
        return sum(shape.numel() for shape in self._shapes.values()) if self._trainable else 0

    # --- learning rates -------------------------------------------------------------------------------

    @property
    def learning_rates(self) -> list[float]:
        """Current learning rate of each parameter group."""
        return [group["lr"] for group in self._engine.optimizer.param_groups]

    def set_learning_rate(self, factor: float) -> None:
        """Set every group to `factor` times its own peak."""
        for group, peak in zip(self._engine.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = factor * peak

    # --- weights out and in ---------------------------------------------------------------------------

    def full_state_dict(self, *, ema: bool = False) -> dict[str, Tensor]:
        """Trained parameters, float32, CPU, on rank 0 (empty elsewhere). Collective."""
        if ema and self.ema is None:
            raise RuntimeError(f"{self.name} keeps no EMA")
        values = self.ema.values if ema and self.ema else [fragment.master for fragment in self.fragments]
        return gather_to_rank_0(self._shapes, self.fragments, values, self._device)

    def save(self, folder: Path) -> None:
        """Write this rank's masters, moments and EMA to `folder`/rank-NNNNN.safetensors.

        All ranks call it; the caller makes the folder and decides when it is whole.
        """
        moments = [self._engine.optimizer.optimizer.state.get(f.flat, {}) for f in self.fragments]
        step = max((float(moment["step"]) for moment in moments if "step" in moment), default=0.0)
        columns: dict[str, Sequence[Tensor]] = {"master": [fragment.master for fragment in self.fragments]}
        if step:
            for key in MOMENTS:
                pairs = zip(self.fragments, moments, strict=True)
                columns[key] = [fragment.view_of(moment[key]) for fragment, moment in pairs]
        if self.ema is not None:
            columns["ema"] = self.ema.values
        state = {
            "updates": self.updates,
            "skipped": self.skipped,
            "adam_step": step,
            "world_size": dist.get_world_size(),
            "trained_parameters": self.trained_parameter_count,
            "constants": self._constants,
        }
        save_fragments(folder / f"rank-{dist.get_rank():05d}.safetensors", self.fragments, columns, state)

    def load(self, folder: Path) -> None:
        """Read what any number of ranks saved at any ZeRO stage; exact.

        Raises:
            UserError: `folder` is incomplete or belongs to another network, or to other constant weights.
        """
        columns: dict[str, Sequence[Tensor]] = {"master": [fragment.master for fragment in self.fragments]}
        if self.ema is not None:
            columns["ema"] = self.ema.values
        state = load_fragments(folder, self.fragments, columns)
        if (trained := state.get("trained_parameters")) != self.trained_parameter_count:
            raise UserError(
                f"{folder} has {trained} trained parameters, {self.name} has {self.trained_parameter_count}: set model "
                "and trainer.lora as they were, or choose another --output"
            )
        if state.get("constants") != self._constants:
            raise UserError(
                f"{folder} was trained beside other frozen weights of {self.name}: give the same --init and --teacher "
                "as before, or choose another --output"
            )
        self.updates, self.skipped = state["updates"], state["skipped"]
        if state["adam_step"]:
            load_fragments(folder, self.fragments, self._moments(state["adam_step"]))
        self._push_masters()

    def copy_weights_from(self, other: Network) -> None:
        """Take over the masters of a network of the same shape and sharding; nothing is gathered."""
        pairs = list(zip(self.fragments, other.fragments, strict=True))
        if any((a.name, a.start, a.numel) != (b.name, b.start, b.numel) for a, b in pairs):
            raise ValueError(
                f"{self.name} and {other.name} are sharded differently; give them one configuration"
            )
        for mine, theirs in pairs:
            mine.master.copy_(theirs.master)
        self._push_masters()

    def restart_optimizer(self) -> None:
        """Forget the moments, as at the start of a new objective; masters, EMA and warm-up stay."""
        for moments in self._moments(0.0).values():
            for moment in moments:
                moment.zero_()

    def _moments(self, step: float) -> dict[str, Sequence[Tensor]]:
        """Views of the Adam moments, allocated where the optimizer has not stepped yet."""
        states = self._engine.optimizer.optimizer.state
        for flat in {id(fragment.flat): fragment.flat for fragment in self.fragments}.values():
            state = states[flat]
            state["step"] = torch.tensor(step, device=flat.device)
            for key in MOMENTS:
                state.setdefault(key, torch.zeros_like(flat))
        return {key: [f.view_of(states[f.flat][key]) for f in self.fragments] for key in MOMENTS}

    def _push_masters(self) -> None:
        """Make the (bf16) weights of the module equal to the masters."""
        optimizer = self._engine.optimizer
        if self.config.zero_stage == 3:
            optimizer._partition_all_parameters()  # those that stay whole would keep their old values
            for index in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
            optimizer._post_step(set())
        else:
            optimizer.update_lp_params()

    @property
    def _device(self) -> torch.device:
        return torch.device(self._engine.device)


class _Whole:
    """Stands in for an engine around a frozen module that is not sharded."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self.device = device


def _frozen_engine(module: nn.Module, config: DeepSpeedConfig) -> Any:
    module.requires_grad_(False)
    for parameter in module.parameters():  # parameters only: rotary tables stay float32
        parameter.data = parameter.data.to(config.dtype)
    if config.zero_stage < 3:
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        return _Whole(module.to(device), device)
    with _float32_buffers(module):
        engine, *_ = deepspeed.initialize(model=module, config=config.as_deepspeed(None))
    return engine


def _training_engine(
    module: nn.Module, groups: list[dict[str, Any]], config: DeepSpeedConfig, optimizer: OptimizerConfig
) -> Any:
    settings: dict[str, Any] = {
        "lr": optimizer.learning_rate,
        "betas": optimizer.betas,
        "weight_decay": optimizer.weight_decay,
        "fused": True,  # one kernel per flat buffer, on the GPU and, for offloaded masters, on the host
    }
    adam = torch.optim.AdamW(groups, **settings)
    with _float32_buffers(module):
        engine, *_ = deepspeed.initialize(model=module, optimizer=adam, config=config.as_deepspeed(optimizer))
    return engine


def _checksum(parameters: Iterable[Tensor]) -> int:
    """CRC-32 of the bytes; 0 of nothing."""
    value = 0
    for parameter in parameters:
        value = zlib.crc32(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy(), value)
    return value


@contextmanager
def _float32_buffers(module: nn.Module) -> Iterator[None]:
    """DeepSpeed casts buffers with the weights; rotary tables in bf16 would blur positions."""
    kept = {name: buffer.clone() for name, buffer in module.named_buffers()}
    yield
    for name, buffer in module.named_buffers():
        buffer.data = kept[name].to(buffer.device)
