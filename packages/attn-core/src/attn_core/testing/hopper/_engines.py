"""What works beside the threads: the copy engine and the tensor cores."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attn_core.testing.hopper._registers import Dtype, Tensor, array_of
from attn_core.testing.hopper._shared import Memory, one, require_fenced
from attn_core.testing.hopper._threads import ProtocolError, changed, dawdle, here, lateness

if TYPE_CHECKING:
    from attn_core.testing.hopper._pointers import Pointer

_COPY_LATENESS = 20  # in those of a thread: until then, whoever does not wait reads NaN
DTYPES = {
    torch.float32: Dtype("fp32"),
    torch.float16: Dtype("fp16"),
    torch.bfloat16: Dtype("bf16"),
    torch.uint8: Dtype("u8"),
    torch.int32: Dtype("i32"),
}


def flat_from(x: torch.Tensor) -> torch.Tensor:
    """Return all memory from the first number of a tensor on."""
    size = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return x.as_strided((size,), (1,))


class Descriptor:
    """A tensor in global memory, as the copy engine sees it: tiles are clipped at its ends.

    Offsets have 64 bits, as addresses do, so strides may rely on what is lost in them.
    """

    def __init__(
        self,
        base: torch.Tensor,
        shape: Sequence[int],
        strides: Sequence[int],
        block_shape: Sequence[int],
        layout: Any = None,
    ) -> None:
        self.flat = flat_from(base)
        self.shape = list(shape)
        self.strides = list(strides)
        self.block_shape = list(block_shape)
        self.dtype = DTYPES[base.dtype]
        self.layout = layout
        size = int(np.prod(block_shape)) * base.element_size()
        self.block_type = types.SimpleNamespace(nbytes=size, shape=self.block_shape)

    def pieces(self, coord: Sequence[Any]) -> tuple[Any, Any]:
        """Offsets of the tensor and slices of the tile that belong together."""
        start = [int(array_of(x)) for x in coord]
        parts = [
            slice(max(0, -first), max(0, -first, min(block, length - first)))
            for first, block, length in zip(start, self.block_shape, self.shape, strict=True)
        ]
        sizes = [part.stop - part.start for part in parts]
        offsets = np.zeros(sizes, np.int64)
        for axis, (first, part, stride) in enumerate(zip(start, parts, self.strides, strict=True)):
            places = np.arange(part.start, part.stop) + first
            along = places * np.full(len(places), stride)
            offsets += along.reshape([-1 if axis == i else 1 for i in range(len(sizes))])
        if offsets.size and not 0 <= offsets.min() <= offsets.max() < len(self.flat):
            raise ProtocolError(f"a tile at {start} leaves the memory of its tensor")
        return torch.from_numpy(offsets), tuple(parts)


class Tma:
    @staticmethod
    def async_load(
        desc: Descriptor, coord: Any, barrier: Any, tile: Memory, pred: Any = True
    ) -> None:
        if not array_of(pred):
            return
        source, target = desc.pieces(coord)
        barrier = one(barrier)

        def land() -> None:
            tile.array[...] = 0.0
            tile.array[target] = desc.flat[source].float().numpy()
            barrier.advance(0, desc.block_type.nbytes)

        tile.array[...] = np.nan
        with changed:
            barrier.copies.append(land)
        timer = threading.Timer(_COPY_LATENESS * lateness(), barrier.land, [land])
        timer.daemon = True
        timer.start()

    @staticmethod
    def async_store(desc: Descriptor, coord: Any, tile: Memory) -> None:
        _start_store(desc, coord, tile, torch.Tensor.__setitem__)

    @staticmethod
    def store_wait(pendings: int) -> None:
        while len(here.reads) > pendings:
            here.writes.append(here.reads.pop(0)())


class AsyncCopy:
    """Copies by the threads themselves: they land in groups, when their thread waits for them."""

    @staticmethod
    def async_load(tile: Memory, pointer: Pointer, mask: Any = True) -> None:
        target = np.broadcast_to(array_of(mask), tile.array.shape)
        source = np.broadcast_to(pointer.offset, tile.array.shape)[target]
        if source.size and not 0 <= source.min() <= source.max() < len(pointer.flat):
            raise ProtocolError("a copy leaves the memory of its tensor")

        def land() -> None:
            tile.array[...] = 0
            tile.array[target] = pointer.flat[torch.from_numpy(source)].float().numpy()

        tile.array[...] = np.nan
        here.copies[-1].append(land)

    @staticmethod
    def commit_group() -> None:
        here.copies.append([])

    @staticmethod
    def wait_group(pendings: int) -> None:
        dawdle()
        while len(here.copies) - 1 > pendings:
            for land in here.copies.pop(0):
                land()


def reduce_add(desc: Descriptor, coord: Any, tile: Memory) -> None:
    """Stand in for `primitives.reduce_add`."""
    _start_store(desc, coord, tile, _add)


def _add(flat: torch.Tensor, offsets: torch.Tensor, values: torch.Tensor) -> None:
    flat[offsets] += values


def _start_store(desc: Descriptor, coord: Any, tile: Memory, put: Callable[..., Any]) -> None:
    require_fenced(tile)
    if min(int(array_of(x)) for x in coord) < 0:
        raise ProtocolError(f"a tile is written from {coord} on: only reads may start before 0")
    target, source = desc.pieces(coord)

    def read() -> Callable[[], None]:
        values = torch.from_numpy(tile.array[source].copy())
        return lambda: put(desc.flat, target, values.to(desc.flat.dtype))

    here.reads.append(read)


def finish_writes() -> None:
    """Let global memory have all that has left shared memory."""
    with changed:
        for write in here.writes:
            write()
        here.writes.clear()


def product(a: Any, b: Any, acc: Any, use_acc: Any = True, is_async: bool = False) -> Tensor:
    require_fenced(a)
    require_fenced(b)
    result = Tensor(np.full(acc.array.shape, np.nan, np.float32))

    def compute() -> None:
        product = (array_of(a).astype(np.float32) @ array_of(b).astype(np.float32)).astype(
            np.float32
        )
        result.array = product + acc.array if array_of(use_acc) else product

    here.products.append(compute)
    if not is_async:
        await_products(0, (result,))
    return result


def await_products(pendings: int, deps: tuple[Any, ...]) -> Any:
    dawdle()
    while len(here.products) > pendings:
        here.products.pop(0)()
    return deps[0] if len(deps) == 1 else deps
