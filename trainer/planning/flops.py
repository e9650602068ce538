"""How many floating-point operations a step of a stage needs, counted without doing any of them.

The stage's own `updates` run on the meta device, over bare modules of the same shape, under torch's counter. So what
is counted is the algorithm that trains, with all its switches, but nothing that sharding or activation checkpointing
adds to it: a pass computed twice to save memory counts once. An operation is one multiplication or addition of a matrix
product, a convolution or an attention; everything else is small beside them. All blocks are run: taps and passes that
stop early make them unlike each other.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import ConfigMixin
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from datagen.dataset.loader import Batch
from pipeline.model.transformer import VSRTransformer
from trainer.engine.config import DeepSpeedConfig
from trainer.engine.lora import add_adapter_like
from trainer.stages.stage import Meter, NetworkSpec, TrainingStage


def flops_per_sample(stage: TrainingStage, step: int, batch: Batch) -> float:
    """Operations of all updates of `step`, forward and backward, per sample of each update's global batch.

    Not collective, and no random state is touched.

    Args:
        batch: one of the stage's; only its first sample is used, and of its tensors only the shapes.
    """
    one = Batch(batch.keys[:1], {k: t[:1].to("meta") for k, t in batch.tensors.items()}, batch.metadata[:1])
    networks = {
        name: BareNetwork(module, stage.networks[name].trained) for name, module in _meta_modules(stage).items()
    }
    bare = copy.copy(stage)
    vars(bare).update(networks, networks=networks, _device=torch.device("meta"))
    bare.exported = next(networks[name] for name, n in stage.networks.items() if n is stage.exported)  # type: ignore[assignment]
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = UntrackedModules()  # type: ignore[assignment]
    with counter:
        bare.updates(step, [one] * stage.batches_per_step, Meter("meta"))
    return counter.get_total_flops() / stage.exported.config.gradient_accumulation


class BareNetwork:
    """`trainer.engine.network.Network` without an engine: the same calls on a bare module."""

    ema = None

    def __init__(
        self, module: nn.Module, trained: Collection[str] | None = None, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """
        Args:
            trained: names of the parameters that are trained; None: all.
            optimizer: None: `step()` only clears the gradients.
        """
        self.module = module.requires_grad_(False)
        self.config = DeepSpeedConfig()
        named = module.named_parameters()
        self.group_norms: dict[str, float] = {}
        kept = {name: parameter for name, parameter in named if trained is None or name in trained}
        #: names of the parameters that are trained
        self.trained = frozenset(kept)
        self._trained = list(kept.values())
        self._optimizer = optimizer

    @contextmanager
    def updating(self) -> Iterator[None]:
        for parameter in self._trained:
            parameter.requires_grad_(True)
        yield
        self.module.requires_grad_(False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    frozen = __call__

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> float:
        if self._optimizer is not None:
            self._optimizer.step()
        self.module.zero_grad()
        return 0.0


class UntrackedModules(nullcontext[None]):
    """In place of the counter's bookkeeping per module, which refuses `torch.autograd.grad` down to a leaf."""

    parents = frozenset({"Global"})


def _meta_modules(stage: TrainingStage) -> dict[str, nn.Module]:
    """Modules by network name of the same shapes and parameter names, without values, engines or checkpointing."""

    def transformer_of(network: NetworkSpec) -> nn.Module:
        module = stage.networks[network.name].module
        inner: Any = next(m for m in (module, *module.children()) if isinstance(m, ConfigMixin))
        copied: nn.Module = type(inner).from_config(inner.config)
        if isinstance(inner, VSRTransformer):
            add_adapter_like(copied, inner)  # type: ignore[arg-type]
        return copied

    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return stage.spec.modules(stage.config, transformer_of, 0)
