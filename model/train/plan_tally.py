"""How many bytes of tensors are alive, counted as they come and go: exact for tensors, real or without storage."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorTally(TorchDispatchMode):
    """Counts the storages that operations inside ``with`` leave behind, until they are freed.

    What an operation allocates within itself and frees again (a convolution's workspace, say) is not seen.

    Args:
        device: whose tensors count: ``cpu``, ``cuda``, or ``meta`` for those without storage.

    Attributes:
        now: bytes alive.
        peak: most bytes alive since the last ``mark``.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.now = self.peak = 0
        self._alive: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that exist already, weights for instance."""
        for tensor in tensors:
            if tensor.device.type != self.device:
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._alive:
                self._resized(key, size)
            else:
                self._alive[key] = (weakref.ref(storage, partial(self._freed, key)), size)
                self._add(size)

    def mark(self) -> int:
        """The peak until now; the next one counts from here."""
        peak, self.peak = self.peak, self.now
        return peak

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def _resized(self, key: int, size: int) -> None:
        reference, before = self._alive[key]
        if size != before:
            self._alive[key] = (reference, size)
            self._add(size - before)

    def _freed(self, key: int, reference: Any) -> None:
        del reference  # its storage is gone
        found = self._alive.pop(key, None)
        self.now -= found[1] if found else 0


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each once."""
    sizes = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def meta_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor that has a shape and a type and no storage."""
    return torch.empty(shape, dtype=dtype, device="meta")
