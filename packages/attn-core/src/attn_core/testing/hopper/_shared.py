"""Shared memory, the fence it needs, and its barriers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from attn_core.testing.hopper._registers import Tensor, array_of
from attn_core.testing.hopper._threads import ProtocolError, changed, dawdle, here, wait


class Memory:
    """A piece of shared memory."""

    layout = None  # which says nothing here

    def __init__(self, array: Any, dtype: str) -> None:
        self.array = array
        self.dtype = dtype

    @property
    def shape(self) -> list[int]:
        return list(self.array.shape)

    def index(self, i: Any) -> Memory:
        return Memory(self.array[int(array_of(i))], self.dtype)

    def slice(self, start: int, length: int, dim: int = 0) -> Memory:
        places = (*[slice(None)] * dim, slice(start, start + length))
        return Memory(self.array[places], self.dtype)

    def permute(self, order: Sequence[int]) -> Memory:
        return Memory(self.array.transpose(order), self.dtype)

    def reinterpret(self, dtype: str, shape: Sequence[int], _layout: Any) -> Memory:
        if len(shape) == 3 and self.array.ndim == 2 and shape[2] < self.array.shape[1]:
            panels, rows, width = shape  # a swizzled tile as panels of 64 columns
            array = self.array.reshape(rows, panels, width).transpose(1, 0, 2)
        else:
            array = self.array.reshape(shape)
        if not np.shares_memory(array, self.array):
            raise ProtocolError("a tile that is not contiguous was reinterpreted")
        return Memory(array, dtype)

    def store(self, value: Tensor) -> None:
        if self.array.shape != value.array.shape:
            raise ProtocolError(f"stored {value.array.shape} into {self.array.shape}")
        self.array[...] = value.array
        with changed:
            here.program.unfenced.append((here.name, self.array))

    def load(self, _layout: Any) -> Tensor:
        return Tensor(self.array.copy(), self.dtype)


def fence() -> None:
    """Let the units that copy and multiply see what this partition wrote."""
    program = here.program
    with changed:
        program.unfenced = [entry for entry in program.unfenced if entry[0] != here.name]


def require_fenced(memory: Any) -> None:
    with changed:
        for name, array in here.program.unfenced:
            if isinstance(memory, Memory) and np.may_share_memory(array, memory.array):
                raise ProtocolError(f"{here.name} hands over what {name} wrote without a fence")


class Barrier:
    """An mbarrier: it opens when all have arrived and all bytes have landed."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0
        self.copies: list[Callable[[], None]] = []  # that are under way

    def land(self, *copies: Callable[[], None]) -> None:
        """Let copies end that are still under way."""
        with changed:
            for copy in copies:
                if copy in self.copies:
                    self.copies.remove(copy)
                    copy()

    def advance(self, arrivals: int, landed: int) -> None:
        with changed:
            if arrivals > self.pending:
                raise ProtocolError(f"{here.name} arrives at a barrier that is complete")
            self.pending -= arrivals
            self.bytes -= landed
            if self.pending == 0 and self.bytes == 0:
                self.phase ^= 1
                self.pending = self.count
                changed.notify_all()


class Barriers:
    """An array of mbarriers."""

    def __init__(self, count: int) -> None:
        self.all = [Barrier() for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        return self.all[int(array_of(i))]


def one(barrier: Barrier | Barriers) -> Barrier:
    return barrier.all[0] if isinstance(barrier, Barriers) else barrier


class Mbarrier:
    @staticmethod
    def MBarrierLayout() -> str:  # noqa: N802 - Gluon's name
        return "mbarrier"

    @staticmethod
    def init(barrier: Any, count: int) -> None:
        barrier = one(barrier)
        barrier.count = barrier.pending = count

    @staticmethod
    def expect(barrier: Any, size: int, pred: Any = True) -> None:
        dawdle()
        if array_of(pred):
            one(barrier).advance(1, -size)

    @staticmethod
    def arrive(barrier: Any, count: int = 1, pred: Any = True) -> None:
        dawdle()
        if array_of(pred):
            one(barrier).advance(count, 0)

    @staticmethod
    def wait(barrier: Any, phase: Any, pred: Any = True) -> None:
        barrier = one(barrier)
        if not array_of(pred):
            return
        if barrier.phase == int(array_of(phase)):
            barrier.land(*barrier.copies)  # it is enough that they are late for who does not wait
        wait(lambda: barrier.phase != int(array_of(phase)), f"phase {phase} of an mbarrier")


def allocate(dtype: str, shape: Sequence[int], layout: Any) -> Memory | Barriers:
    if layout == "mbarrier":
        return Barriers(shape[0])
    if dtype.startswith("i"):
        return Memory(np.full(shape, -(1 << 40)), dtype)
    return Memory(np.full(shape, np.nan, np.float32), dtype)
