"""Bytes of living tensors, where no allocator counts them: on a CPU, and on the meta device without computing."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made on one kind of device inside `with`, now and at most."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.now = self.peak = 0
        self._device = device
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._add(tensor, made_here=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._add(tensor, made_here=True)
        return result

    def _add(self, tensor: Any, *, made_here: bool) -> None:
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != self._device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known and self._known[key][0]() is storage:
            return
        self._forget(key)
        size = storage.nbytes() if made_here else 0

        def ended(reference: Any) -> None:
            if key in self._known and self._known[key][0] is reference:
                self._forget(key)

        self._known[key] = (weakref.ref(storage, ended), size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        if key in self._known:
            self.now -= self._known.pop(key)[1]
