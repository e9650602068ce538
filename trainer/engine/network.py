"""One network = one DeepSpeed engine, and the only two ways it may be called.

    with network.updating():             # its weights get gradients
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

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError
from trainer.engine.clipping import GroupClipping, clipped_groups
from trainer.engine.config import DeepSpeedConfig, OptimizerConfig
from trainer.engine.deepspeed_internals import (
    find_fragments,
    frozen_engine,
    push_masters,
    training_engine,
    writable_moments,
    written_moments,
)
from trainer.engine.ema import EMA
from trainer.engine.frozen_linear import use_for_constant_weights
from trainer.engine.zero_shards import Fragment, gather_to_rank_0, load_fragments, save_fragments


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
            module: its weights in float32 are the masters' first value; its dtype and device are changed. With an
                optimizer, the parameters that require gradients are trainable, and the others never change (LoRA).
            optimizer: None for a network that is never updated; it is sharded at ZeRO-3 and replicated otherwise.
            parameter_groups: torch-style groups over the trainable parameters, each with `params` and, where they
                differ, `lr`, `gradient_clip` and `name`; default: one group.
            ema_decay: keep an EMA of the masters, updated by every `step()` that is not skipped.
        """
        for parameter in module.parameters():  # a bf16 file's weights come as they are, mapped
            parameter.data = parameter.data.float()
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
        constant = [p for p in module.parameters() if optimizer is None or not p.requires_grad]
        #: checksum of what never changes, which checkpoints don't hold. Rank 0 alone has it of a frozen network
        self.constants = _checksum(constant) if optimizer is not None or dist.get_rank() == 0 else None
        if deepspeed.activation_checkpointing:
            for part in module.modules():
                if getattr(part, "_supports_gradient_checkpointing", False):
                    part.enable_gradient_checkpointing()
        self.fragments: list[Fragment] = []
        self.ema: EMA | None = None
        if optimizer is None:
            self._engine = frozen_engine(module, deepspeed)
        else:
            groups = clipped_groups(list(parameter_groups or [{"params": self._trainable}]), optimizer)
            self._engine = training_engine(module, groups, deepspeed, optimizer)
            self.fragments = find_fragments(module, self._engine.optimizer)
            self._clipping = GroupClipping(self._engine.optimizer.optimizer, self._device)
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

    def step(self) -> float:
        """Clip each parameter group and update. Returns the joint norm before clipping; inf: the update is skipped.

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

    @property
    def group_norms(self) -> dict[str, float]:
        """Gradient norm before clipping of each named parameter group, in the last update that was not skipped."""
        return {name: float(norm) for name, norm in self._clipping.norms.items()}

    def _set_updating(self, value: bool) -> None:
        self._updating = value
        for parameter in self._trainable:
            parameter.requires_grad_(value)

    @property
    def trained(self) -> frozenset[str]:
        """Names of the trainable parameters; none of a network without an optimizer."""
        return frozenset(self._shapes) if self._trainable else frozenset()

    @property
    def trained_parameter_count(self) -> int:
        """Number of trainable elements."""
        return sum(shape.numel() for shape in self._shapes.values()) if self._trainable else 0

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The EMA in place of the weights, for frozen calls inside the block. Collective.

        The weights come back exactly. Nothing happens to a network without an EMA.
        """
        if self.ema is None:
            yield
            return
        kept = [fragment.master.clone() for fragment in self.fragments]
        self._set_masters(self.ema.values)
        try:
            yield
        finally:
            self._set_masters(kept)

    def _set_masters(self, values: Sequence[Tensor]) -> None:
        for fragment, value in zip(self.fragments, values, strict=True):
            fragment.master.copy_(value)
        push_masters(self._engine, self.config)

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

    def save(self, folder: Path) -> Path:
        """Write this rank's masters, moments and EMA to `folder`/rank-NNNNN.safetensors; returns that path.

        All ranks call it; the caller makes the folder and decides when it is complete.
        """
        step, moments = written_moments(self._engine, self.fragments)
        columns: dict[str, Sequence[Tensor]] = {"master": [fragment.master for fragment in self.fragments]}
        columns |= moments
        if self.ema is not None:
            columns["ema"] = self.ema.values
        state = {
            "updates": self.updates,
            "skipped": self.skipped,
            "adam_step": step,
            "world_size": dist.get_world_size(),
            "trained_parameters": self.trained_parameter_count,
            "constants": self.constants,
        }
        path = folder / f"rank-{dist.get_rank():05d}.safetensors"
        save_fragments(path, self.fragments, columns, state)
        return path

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
        if state.get("constants") != self.constants:
            raise UserError(
                f"{folder} was trained beside other frozen weights of {self.name}: give the same --init and --teacher "
                "as before, or choose another --output"
            )
        self.updates, self.skipped = state["updates"], state["skipped"]
        if state["adam_step"]:
            load_fragments(folder, self.fragments, writable_moments(self._engine, self.fragments, state["adam_step"]))
        push_masters(self._engine, self.config)

    def copy_weights_from(self, other: Network) -> None:
        """Take over the masters of a network of the same shape and sharding; nothing is gathered."""
        pairs = list(zip(self.fragments, other.fragments, strict=True))
        if any((a.name, a.start, a.numel) != (b.name, b.start, b.numel) for a, b in pairs):
            raise ValueError(f"{self.name} and {other.name} are sharded differently; give them one configuration")
        for mine, theirs in pairs:
            mine.master.copy_(theirs.master)
        push_masters(self._engine, self.config)

    def restart_optimizer(self) -> None:
        """Forget the moments, as at the start of a new objective; masters, EMA and warm-up stay."""
        for moments in writable_moments(self._engine, self.fragments, 0.0).values():
            for moment in moments:
                moment.zero_()

    @property
    def _device(self) -> torch.device:
        return torch.device(self._engine.device)


def _checksum(parameters: Iterable[Tensor]) -> int:
    """CRC-32 of the bytes; 0 of nothing."""
    value = 0
    for parameter in parameters:
        value = zlib.crc32(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy(), value)
    return value
