"""Sequence parallelism (DeepSpeed-Ulysses, arXiv 2309.14509): several ranks share the tokens of one clip.

Every rank of a group calls the DiT with the same inputs. Its tokens are shared out after the patch embedding; each
rank runs the blocks on its own share, and self-attention exchanges it by all-to-all for the full sequence of some of
the heads. Outputs are gathered: every rank returns the full velocity and full features, computed alike.

Gradients obey one rule: **their mean over the ranks of a group is the gradient of the clip**. What is computed alike on
every rank has it anyway. Before a gather, a rank's gradient knows only its own tokens, so the gather multiplies it by
the number of ranks on the way back. The mean over all ranks that DeepSpeed takes of every parameter's gradient then
needs no change, and inputs take theirs in `SequenceGroup.enter`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from common.errors import UserError


class RotaryShare(NamedTuple):
    """cos and sin (1, S/N, 1, head_dim) of a rank's own tokens; `tokens` is S, without the padding."""

    cos: Tensor
    sin: Tensor
    tokens: int


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share a clip, as one of them sees it. Alone, every method returns what it was given.

    S tokens need not divide by the N ranks: the last shares are padded with zeros, which attention never sees.
    """

    size: int = 1
    #: 0 … size - 1: which share of the tokens is this rank's
    place: int = 0
    group: dist.ProcessGroup | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceGroup:
        """A copied network stays in its group."""
        return self

    def enter(self, x: Tensor) -> Tensor:
        """An input that is equal on all ranks; its gradient will be complete and equal on all ranks, too."""
        return x if self.size == 1 else _Enter.apply(x, self)

    def share(self, tokens: Tensor) -> Tensor:
        """(B, S, …), equal on all ranks -> this rank's (B, ⌈S/N⌉, …)."""
        if self.size == 1:
            return tokens
        count = -(-tokens.shape[1] // self.size)
        own = tokens[:, self.place * count : (self.place + 1) * count]
        return _pad(own, count)

    def share_rotary(self, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | RotaryShare:
        """The rotary tables (1, S, 1, head_dim) of the own tokens."""
        if self.size == 1:
            return rotary
        cos, sin = rotary
        return RotaryShare(self.share(cos), self.share(sin), cos.shape[1])

    def gather_tokens(self, own: Tensor, tokens: int) -> Tensor:
        """(B, ⌈S/N⌉, D) of every rank -> (B, S, D) on every rank, S being `tokens`."""
        return own if self.size == 1 else _Whole.apply(own, tokens, self)

    @torch.compiler.disable  # DeepSpeed warns that an exchange torch.compile has traced may lose its gradient
    def attend(self, query: Tensor, key: Tensor, value: Tensor, tokens: int, backend: Any) -> Tensor:
        """Attention of the own tokens, (B, ⌈S/N⌉, heads, head_dim), to all S tokens; same shape."""
        from deepspeed.sequence.layer import DistributedAttention  # training only: it takes seconds to import

        def attention(*full: Tensor) -> Tensor:
            q, k, v = (part[:, :tokens] for part in full)
            return _pad(dispatch_attention_fn(q, k, v, backend=backend), full[0].shape[1])

        exchange = DistributedAttention(attention, self.group, scatter_idx=2, gather_idx=1)
        return exchange(query, key, value, 0)


#: no sequence parallelism
ALONE = SequenceGroup()


def form_sequence_groups(size: int) -> SequenceGroup:
    """Ranks 0 … size - 1 share a clip, the next `size` another one, and so on. Collective.

    Raises:
        UserError: the ranks cannot be divided so.
    """
    if size == 1:
        return ALONE
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks % size:
        raise UserError(
            f"trainer.sequence_parallel = {size} does not divide the {ranks} ranks; start a multiple of {size} ranks"
        )
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, ranks, size)]
    return SequenceGroup(size, rank % size, groups[rank // size])


def check_heads(heads: int, size: int) -> None:
    """Attention gives every rank complete heads.

    Raises:
        UserError: `heads` cannot be divided among `size` ranks.
    """
    if heads % size:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(
            f"trainer.sequence_parallel = {size} does not divide the model's {heads} attention heads; "
            f"use one of {fitting}"
        )


class UlyssesAttention(WanAttnProcessor):
    """Wan's self-attention on a share of the tokens; the kernels are those chosen for the model."""

    def __init__(self, group: SequenceGroup, backend: Any) -> None:
        super().__init__()
        self.group = group
        self._attention_backend = backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: RotaryShare | None = None,
    ) -> Tensor:
        """(B, ⌈S/N⌉, D) -> the same shape."""
        assert encoder_hidden_states is None and attention_mask is None and rotary_emb is not None
        # The norms go over all heads of a token, so they come before the exchange.
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        query, key = (_rotate(x, rotary_emb.cos, rotary_emb.sin) for x in (query, key))
        out = self.group.attend(query, key, value, rotary_emb.tokens, self._attention_backend)
        out = out.flatten(2, 3).type_as(query)
        for layer in attn.to_out:
            out = layer(out)
        return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of channels (2i, 2i + 1) by their angles; the tables hold every angle twice."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


def _pad(tokens: Tensor, count: int) -> Tensor:
    """(B, n, …) -> (B, count, …), zeros at the end."""
    missing = count - tokens.shape[1]
    if missing == 0:
        return tokens
    return torch.cat([tokens, tokens.new_zeros(tokens.shape[0], missing, *tokens.shape[2:])], dim=1)


class _Enter(torch.autograd.Function):
    """The identity; backward is the mean over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        mean = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(mean, group=ctx.group.group)
        return mean.div_(ctx.group.size), None


class _Whole(torch.autograd.Function):
    """Gather of the shares; backward is the own share, times the number of ranks (see the module's docstring)."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, tokens: int, group: SequenceGroup) -> Tensor:
        ctx.group = group
        own = own.contiguous()
        shares = [torch.empty_like(own) for _ in range(group.size)]
        dist.all_gather(shares, own, group=group.group)
        return torch.cat(shares, dim=1)[:, :tokens]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.group.share(gradient) * ctx.group.size, None, None
