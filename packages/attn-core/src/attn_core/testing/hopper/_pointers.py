"""Pointers into global memory, and what threads tell one another through it."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import torch

from attn_core.testing.hopper._engines import DTYPES, Tma, finish_writes, flat_from
from attn_core.testing.hopper._registers import Tensor, array_of
from attn_core.testing.hopper._threads import changed, dawdle, wait


class Pointer:
    """A pointer to numbers in global memory."""

    def __init__(self, flat: torch.Tensor, offset: Any = 0) -> None:
        self.flat = flat
        self.offset = offset
        self.dtype = types.SimpleNamespace(element_ty=DTYPES.get(flat.dtype))

    @classmethod
    def to(cls, x: torch.Tensor) -> Pointer:
        """Point to the first number of a tensor of any strides."""
        return cls(flat_from(x))

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.flat, self.offset + array_of(offset))

    def __sub__(self, offset: Any) -> Pointer:
        return Pointer(self.flat, self.offset - array_of(offset))


def load(pointer: Pointer, mask: Any = None, other: Any = 0, volatile: bool = False) -> Any:
    dawdle()
    if np.ndim(pointer.offset) == 0:
        if mask is not None and not array_of(mask):
            return other
        return pointer.flat[int(pointer.offset)].item()
    is_read = np.broadcast_to(True if mask is None else array_of(mask), pointer.offset.shape)
    found = pointer.flat[torch.from_numpy(pointer.offset[is_read])]
    found = found.float() if found.is_floating_point() else found
    values = np.full(pointer.offset.shape, other, found.numpy().dtype)
    values[is_read] = found.numpy()
    return Tensor(values, pointer.dtype.element_ty)


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    if np.ndim(pointer.offset) == 0:
        pointer.flat[int(pointer.offset)] = value
        return
    mask = np.broadcast_to(True if mask is None else array_of(mask), pointer.offset.shape)
    values = torch.from_numpy(np.ascontiguousarray(array_of(value)[mask]))
    pointer.flat[torch.from_numpy(pointer.offset[mask])] = values.to(pointer.flat.dtype)


def atomic_add(pointer: Pointer, value: Any, sem: str | None = None) -> int | None:
    """Add; return what was there before where it is one number."""
    with changed:
        if np.ndim(pointer.offset):
            places = torch.from_numpy(pointer.offset.reshape(-1))
            pointer.flat.index_add_(0, places, torch.from_numpy(value.array.reshape(-1)))
            return None
        before = int(pointer.flat[int(pointer.offset)])
        pointer.flat[int(pointer.offset)] += value
        return before


def claim(pointer: Pointer) -> int:
    """Stand in for `primitives.claim`."""
    place = int(pointer.offset)
    with changed:
        state = int(pointer.flat[place])
        if state == 0:
            pointer.flat[place] = 1
    if state == 1:
        wait(lambda: int(pointer.flat[place]) == 2, "what another program has claimed")
    return 0 if state == 0 else 2


def publish(pointer: Pointer) -> None:
    """Stand in for `primitives.publish`."""
    Tma.store_wait(0)
    finish_writes()
    with changed:
        pointer.flat[int(pointer.offset)] = 2
        changed.notify_all()


def wait_until_set(pointer: Pointer) -> None:
    """Stand in for `primitives.wait_until_set`."""
    while not int(pointer.flat[int(pointer.offset)]):
        dawdle()
