"""Crops of stored clips and latents: their size, and where they start, a function of the sample like all draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from common.errors import UserError
from trainer.stages.random_draws import Draws

if TYPE_CHECKING:
    from datagen.dataset.loader import Batch


def _whole_groups(frames: int) -> int:
    if frames % 4 != 1:
        raise ValueError(f"must be 4k + 1, as the first frame stands alone; {frames // 4 * 4 + 1} is")
    return frames


#: field of a stage's configuration: frames of a crop, 4k + 1
CropFrames = Annotated[int, Field(ge=1), AfterValidator(_whole_groups)]


def crop_starts(keys: Sequence[str], room: Sequence[int], identity: tuple[object, ...] | None) -> list[list[int]]:
    """Of each sample, a start along each axis.

    Args:
        room: how many starts each axis has.
        identity: of the draw, as `Draws` takes it; None: the middle, and the first frame.
    """
    if identity is None:
        return [[0, *(size // 2 for size in room[1:])]] * len(keys)
    # On the CPU: these draws select pixels, no tensor on the device depends on them.
    draws = Draws(keys, *identity)
    columns = [(draws.uniform(f"crop {axis}") * size).long() for axis, size in enumerate(room)]
    return torch.stack(columns, 1).tolist()


def require_room(stage: str, fields: tuple[str, str], wanted: Sequence[int], clips: Tensor) -> None:
    """
    Args:
        fields: names of the fields that decide frames and side.
        wanted: frames, height, width of a crop.
        clips: (B, F, H, W, 3).

    Raises:
        UserError: the crops are larger than the clips.
    """
    have = clips.shape[1:4]
    if any(size < want for size, want in zip(have, wanted, strict=True)):
        raise UserError(
            f"trainer.{stage}: crops of {' x '.join(map(str, wanted))} do not fit the stored clips of "
            f"{' x '.join(map(str, have))}; lower {fields[0]} or {fields[1]}"
        )


def crop_latents(batch: Batch, size: tuple[int, int], *identity: object) -> Batch:
    """The batch with a random part of its latents, the same of all latents of a sample, all of their frames.

    Args:
        size: rows and columns of the part.
        identity: of the draw, as `Draws` takes it.

    Raises:
        UserError: the latents are smaller, or a tensor of the batch is none.
    """
    for name, tensor in batch.tensors.items():
        have = tuple(tensor.shape[-2:])
        if tensor.ndim != 5 or not tensor.is_floating_point():
            raise UserError(f"trainer.latent_crop: the stage reads {name}, which is no latent; set it to null")
        if have[0] < size[0] or have[1] < size[1]:
            raise UserError(f"trainer.latent_crop {list(size)} is larger than {name}, {list(have)}; lower it")
    rows, columns = next(iter(batch.tensors.values())).shape[-2:]
    starts = crop_starts(batch.keys, (rows - size[0] + 1, columns - size[1] + 1), identity)

    def crop(tensor: Tensor) -> Tensor:
        parts = [z[..., y : y + size[0], x : x + size[1]] for z, (y, x) in zip(tensor, starts, strict=True)]
        return torch.stack(parts)

    return replace(batch, tensors={name: crop(tensor) for name, tensor in batch.tensors.items()})
