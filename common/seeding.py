"""Seeds derived from identities, so that every draw is a function of what it belongs to."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; equal parts give equal seeds on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seeded_noise(shape: tuple[int, ...] | torch.Size, *parts: object) -> torch.Tensor:
    """Standard normal noise of `shape` (float32, CPU), a pure function of `parts`."""
    import torch  # here, since 0.7 GB are much for a process that plans or degrades and needs seeds only

    generator = torch.Generator().manual_seed(derive_seed(*parts))
    return torch.randn(shape, generator=generator)
