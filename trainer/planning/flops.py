"""How many floating-point operations a step of a stage needs, counted without doing any of them.

The stage's own `updates` run on the meta device, over bare modules of the same shape. So what is counted is the
algorithm that trains, with all its switches, but nothing that sharding or activation checkpointing adds to it: a pass
computed twice to save memory counts once. An operation is one multiplication or addition of a matrix product, a
convolution or an attention (torch.utils.flop_counter's formulas); everything else is small beside them.

Transformer blocks are alike and there are many, so each way of passing one is counted once and then added up: a second
where running every block on the meta device takes a quarter of a minute (1.3 B parameters, Stage II).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from datagen.dataset.loader import Batch
from trainer.engine.lora import add_adapter_like
from trainer.engine.network import DeepSpeedConfig
from trainer.stages.dual_stream.auxiliary_networks import Critic
from trainer.stages.stage import Meter, Stage


def flops_per_sample(stage: Stage, step: int, batch: Batch) -> float:
    """Operations of all updates of `step`, forward and backward, per sample of each update's global batch.

    Not collective, and no random state is touched.

    Args:
        batch: one of the stage's; only its first sample is looked at, and of its tensors only the shapes.
    """
    one = Batch(batch.keys[:1], {k: t[:1].to("meta") for k, t in batch.tensors.items()}, batch.metadata[:1])
    counter = Counter()
    networks = {
        name: BareNetwork(_on_meta(network.module, counter), network.trained)
        for name, network in stage.networks.items()
    }
    shadow = copy.copy(stage)
    vars(shadow).update(networks, networks=networks, _device=torch.device("meta"))
    with counter:
        shadow.updates(step, [one] * stage.batches_per_step, Meter("meta"))
    return counter.total / stage.exported.config.gradient_accumulation


class Counter(TorchDispatchMode):
    """Adds up what runs inside `with counter:`."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


class BareNetwork:
    """`trainer.engine.network.Network` without an engine: the same calls on a bare module."""

    def __init__(
        self,
        module: nn.Module,
        trained: Collection[str] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """
        Args:
            trained: names of the parameters that learn; None: all.
            optimizer: None: `step()` only clears the gradients.
        """
        self.module = module.requires_grad_(False)
        self.config = DeepSpeedConfig()
        named = module.named_parameters()
        self._trained = [parameter for name, parameter in named if trained is None or name in trained]
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

    def gradient_norm(self, prefix: str) -> float:
        return 0.0

    def step(self) -> float:
        if self._optimizer is not None:
            self._optimizer.step()
        self.module.zero_grad()
        return 0.0


def _on_meta(module: nn.Module, counter: Counter) -> nn.Module:
    """A module of the same shape and parameter names, its blocks only pretending to run."""
    if isinstance(module, Critic):
        transformer = None if module.transformer is None else _on_meta(module.transformer, counter)
        with torch.device("meta"):
            return Critic(
                transformer,  # type: ignore[arg-type]
                shape=module.shape,
                taps=module.taps,
                tapped=module.tapped,
                head=module.head_config,
            )
    with torch.device("meta"):
        model = type(module).from_config(module.config)  # type: ignore[attr-defined]
        add_adapter_like(model, module)
    known: dict[Hashable, tuple[float, float]] = {}
    for block in model.blocks:
        block.forward = _Forward(block, counter, known)
    return model


class _Forward:
    """Stands in for a transformer block's forward: its shapes without its work, its operations on the counter."""

    def __init__(
        self, block: nn.Module, counter: Counter, known: dict[Hashable, tuple[float, float]]
    ) -> None:
        """`known` is shared by blocks that are alike: what each way of passing one costs."""
        self.forward, self.parameters = block.forward, list(block.parameters())
        self.counter, self.known = counter, known

    def __call__(self, x: Tensor, text: Tensor, time: Tensor, rotary: tuple[Tensor, ...]) -> Tensor:
        inputs = (x, text, time)
        wanted = tuple(torch.is_grad_enabled() and t.requires_grad for t in (*inputs, *self.parameters))
        way = (x.shape, text.shape, wanted)
        if way not in self.known:
            self.known[way] = self._count(inputs, rotary)
        forward, backward = self.known[way]
        self.counter.total += forward
        # one of the weights that learn, so that the pass has a gradient even where no input asks for one
        weight = next((parameter for parameter in self.parameters if parameter.requires_grad), None)
        return _Pass.apply(self.counter, backward, *inputs, weight)

    def _count(self, inputs: tuple[Tensor, ...], rotary: tuple[Tensor, ...]) -> tuple[float, float]:
        """Run the real block once, forward and backward; the counter is left as it was."""
        before = self.counter.total
        copies = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
        out = self.forward(*copies, rotary)
        after_forward = self.counter.total
        wanted = [tensor for tensor in (*copies, *self.parameters) if tensor.requires_grad]
        if out.requires_grad:
            torch.autograd.grad(out, wanted, torch.empty_like(out), allow_unused=True)
        forward, backward = after_forward - before, self.counter.total - after_forward
        self.counter.total = before
        return forward, backward


class _Pass(torch.autograd.Function):
    """A pass that does nothing; its backward notes `operations`."""

    @staticmethod
    def forward(ctx: Any, counter: Counter, operations: float, x: Tensor, *others: Tensor | None) -> Tensor:
        ctx.counter, ctx.operations = counter, operations
        ctx.shapes = [None if tensor is None else tensor.shape for tensor in (x, *others)]
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.counter.total += ctx.operations
        asked = zip(ctx.shapes, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(torch.empty(shape, device="meta") if needed else None for shape, needed in asked)
