"""CUDA tensors on a Vulkan device, which is the same GPU: shared memory, shared semaphores.

Vulkan reads memory that CUDA's virtual memory management made, through POSIX file descriptors.
`empty` makes tensors of such memory, and the kernels use those in place. Tensors of other memory
are copied to an exchange buffer on the device, and outputs back. Kernels wait for the current
stream and it waits for them, by a timeline semaphore where both drivers have it; the host does not.
"""

from __future__ import annotations

import bisect
import ctypes
import math
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from ctypes import c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass

import torch

from attn_vulkan import cuda_driver as driver
from attn_vulkan._vk.errors import VulkanError
from attn_vulkan.device import devices
from attn_vulkan.placement import Span
from attn_vulkan.runtime.commands import Commands
from attn_vulkan.runtime.context import Context, open_context
from attn_vulkan.runtime.memory import Buffer

_SMALLEST = 1 << 21


class SharedMemory:
    """Memory that CUDA and Vulkan share on one GPU; blocks are kept for reuse.

    A block goes back to the pool of its stream when its tensor dies. The next user's kernels follow
    on that stream, as with torch's own allocator.
    """

    def __init__(self, context: Context, index: int) -> None:
        self._context = context
        self._index = index
        self._lock = threading.Lock()
        self._free: dict[tuple[int, int], list[int]] = {}
        self._starts: list[int] = []
        self._blocks: dict[int, tuple[int, int, Buffer]] = {}  # size, stream

    def allocate(self, size: int, stream: int) -> int:
        """CUDA address of a block of at least `size` bytes, for use on one stream."""
        size = max(_SMALLEST, 1 << (size - 1).bit_length())
        with self._lock:
            kept = self._free.setdefault((size, stream), [])
            return kept.pop() if kept else self._create(size, stream)

    def release(self, address: int) -> None:
        """Give a block back."""
        with self._lock:
            size, stream, _ = self._blocks[address]
            self._free[size, stream].append(address)

    def vulkan_address(self, pointer: int, size: int) -> int | None:
        """Where Vulkan finds CUDA memory; None where it is not of this kind."""
        with self._lock:
            position = bisect.bisect_right(self._starts, pointer) - 1
            if position < 0:
                return None
            start = self._starts[position]
            block, _, buffer = self._blocks[start]
            return buffer.address + pointer - start if pointer + size <= start + block else None

    def _create(self, size: int, stream: int) -> int:
        location = driver.Location(driver.ON_DEVICE, self._index)
        properties = driver.Properties(driver.PINNED, driver.POSIX_FD, location)
        handle, address, fd = c_ulonglong(), c_ulonglong(), c_int(-1)
        none, length = c_ulonglong(0), c_size_t(size)
        access = driver.Access(location, driver.READ_AND_WRITE)
        with ExitStack() as undo:
            driver.call("cuMemCreate", ctypes.byref(handle), length, ctypes.byref(properties), none)
            undo.callback(driver.call, "cuMemRelease", handle)
            driver.call(
                "cuMemAddressReserve", ctypes.byref(address), length, c_size_t(0), none, none
            )
            undo.callback(driver.call, "cuMemAddressFree", address, length)
            driver.call("cuMemMap", address, length, c_size_t(0), handle, none)
            undo.callback(driver.call, "cuMemUnmap", address, length)
            driver.call("cuMemSetAccess", address, length, ctypes.byref(access), c_size_t(1))
            kind = c_int(driver.POSIX_FD)
            driver.call("cuMemExportToShareableHandle", ctypes.byref(fd), handle, kind, none)
            undo.callback(os.close, fd.value)
            buffer = self._context.memory.import_fd(fd.value, size)
            undo.pop_all()
        self._blocks[address.value] = size, stream, buffer
        bisect.insort(self._starts, address.value)
        return address.value


@dataclass
class _Timeline:
    """A semaphore of one stream and Vulkan: streams overtake one another, its values may not."""

    semaphore: int
    imported: int
    stream: int
    value: int = 0

    def enqueue(self, function: str, value: int) -> None:
        """Signal or wait for a value in the order of the stream."""
        semaphores = (c_void_p * 1)(self.imported)
        parameters = driver.SemaphoreParameters(value)
        driver.call(
            function, semaphores, ctypes.byref(parameters), c_uint(1), c_void_p(self.stream)
        )


class Bridge:
    """The Vulkan context of one CUDA device, with the memory and the semaphore they share."""

    def __init__(self, context: Context, index: int) -> None:
        self.context = context
        self.memory = SharedMemory(context, index)
        self._lock = threading.Lock()
        self._timelines: dict[int, _Timeline] = {}

    def run(self, commands: Commands, stream: int) -> None:
        """Run recorded commands after what is on `stream` now, and before what comes later."""
        if not self.context.device.features.external_semaphore_fd:
            torch.cuda.current_stream().synchronize()
            self.context.run(commands)
            return
        with self._lock:
            timeline = self._timelines.get(stream)
            if timeline is None:
                timeline = self._timelines[stream] = self._create(stream)
            before, after = timeline.value + 1, timeline.value + 2
            timeline.value = after
            timeline.enqueue("cuSignalExternalSemaphoresAsync", before)
            semaphore = timeline.semaphore
            self.context.submit(commands, (semaphore, before), (semaphore, after))
            timeline.enqueue("cuWaitExternalSemaphoresAsync", after)

    def _create(self, stream: int) -> _Timeline:
        semaphore = self.context.create_semaphore(exported=True)
        description = driver.SemaphoreHandle(
            driver.TIMELINE_FD, self.context.export_semaphore(semaphore)
        )
        handle = c_void_p()
        driver.call("cuImportExternalSemaphore", ctypes.byref(handle), ctypes.byref(description))
        return _Timeline(semaphore, handle.value or 0, stream)


class CudaPlacement:
    """Puts the CUDA spans of one call where Vulkan reaches them; see `placement.Placement`."""

    def __init__(self, bridge: Bridge) -> None:
        self.context = bridge.context
        self._bridge = bridge
        self._stream = torch.cuda.current_stream().cuda_stream
        self._addresses: dict[tuple[int, int], int] = {}
        self._exchanged: list[tuple[Span, int]] = []

    def place(self, span: Span) -> None:
        """Put a span within Vulkan's reach."""
        if span.size:
            self._addresses[span.pointer, span.size] = self._reachable(span)

    def address(self, span: Span) -> int:
        """Where shaders find the first byte of a span."""
        return self._addresses[span.pointer, span.size] if span.size else 0

    def run(self, commands: Commands) -> None:
        """Run what was recorded and copy outputs back, all in the order of the stream."""
        self._bridge.run(commands, self._stream)
        for span, block in self._exchanged:
            if span.is_output:
                self._copy(span.pointer, block, span.size)

    def release(self) -> None:
        """Give the exchange buffers to the next call on the stream."""
        for _, block in self._exchanged:
            self._bridge.memory.release(block)

    def _reachable(self, span: Span) -> int:
        memory = self._bridge.memory
        address = memory.vulkan_address(span.pointer, span.size)
        if address is not None:
            return address
        block = memory.allocate(span.size, self._stream)
        self._exchanged.append((span, block))
        if not (span.is_output and span.is_whole):
            self._copy(block, span.pointer, span.size)
        exchanged = memory.vulkan_address(block, span.size)
        assert exchanged is not None
        return exchanged

    def _copy(self, target: int, source: int, size: int) -> None:
        sizes = c_ulonglong(target), c_ulonglong(source), c_size_t(size)
        driver.call("cuMemcpyDtoDAsync_v2", *sizes, c_void_p(self._stream))


@contextmanager
def placed(bridge: Bridge, spans: Iterable[Span]) -> Iterator[CudaPlacement]:
    """Put spans within Vulkan's reach for the length of a block."""
    with bridge.context.in_use():
        placement = CudaPlacement(bridge)
        try:
            for span in spans:
                placement.place(span)
            yield placement
        finally:
            placement.release()


class _Block:
    """What torch sees of a shared block: the CUDA array interface."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Make an uninitialised CUDA tensor in memory that Vulkan reads and writes in place.

    Parameters
    ----------
    shape : sequence of int
        Its shape; it is contiguous.
    dtype : torch.dtype
        Its dtype.
    device : torch.device
        A CUDA device that Vulkan drives too.

    Raises
    ------
    VulkanError
        Vulkan does not reach the device, or CUDA fails.
    """
    bridge = open_bridge(device)
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype, device=device)
    with bridge.context.in_use():
        address = bridge.memory.allocate(size, torch.cuda.current_stream(device).cuda_stream)
    block = _Block(address, size)
    tensor = torch.as_tensor(block, device=device)
    weakref.finalize(block, bridge.memory.release, address)
    return tensor.view(dtype).view(tuple(shape))


def refusal(device: torch.device) -> str | None:
    """Say why Vulkan cannot use the tensors of a CUDA device; None where it can.

    Those of HIP go by way of the host, to the Vulkan device that CPU tensors go to.
    """
    if torch.version.hip is not None:
        return None
    if _vulkan_index(device) is None:
        return f"Vulkan does not drive {torch.cuda.get_device_name(device)} on this machine"
    if not devices()[_vulkan_index(device) or 0].features.external_memory_fd:
        return "the driver does not share memory (VK_KHR_external_memory_fd)"
    return None


def open_bridge(device: torch.device) -> Bridge:
    """Open the Vulkan device that is the same GPU as a CUDA device, or return it where it is."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    torch.cuda.init()
    driver.require_context(index)
    with _open_lock:
        bridge = _bridges.get(index)
        if bridge is None or bridge.context.is_closed:
            bridge = _bridges[index] = _make_bridge(index)
        return bridge


_bridges: dict[int, Bridge] = {}
_open_lock = threading.Lock()


def _make_bridge(index: int) -> Bridge:
    found = _vulkan_index(torch.device("cuda", index))
    if found is None:
        raise VulkanError(f"Vulkan does not drive CUDA device {index}")
    return Bridge(open_context(found), index)


def _vulkan_index(device: torch.device) -> int | None:
    uuid = str(torch.cuda.get_device_properties(device).uuid).replace("-", "")
    return next((found.index for found in devices() if found.uuid == uuid), None)
