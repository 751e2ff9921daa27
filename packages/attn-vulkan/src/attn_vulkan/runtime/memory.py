"""Buffers: on the device, in host memory, or made of memory that something else allocated."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_uint64, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attn_vulkan._vk import registry as vk
from attn_vulkan._vk.errors import VulkanError, VulkanOutOfMemoryError

if TYPE_CHECKING:
    from attn_vulkan.runtime.context import Context

_LOCAL = vk.VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT
_MAPPED = vk.VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | vk.VK_MEMORY_PROPERTY_HOST_COHERENT_BIT
_CACHED = _MAPPED | vk.VK_MEMORY_PROPERTY_HOST_CACHED_BIT
# Memory types to try for each kind of buffer, the best first.
_PREFERENCES = {
    "device": (_LOCAL, 0),
    "staging": (_CACHED, _MAPPED),
    "parameters": (_LOCAL | _MAPPED, _MAPPED),
}
_USAGE = (
    vk.VK_BUFFER_USAGE_STORAGE_BUFFER_BIT
    | vk.VK_BUFFER_USAGE_TRANSFER_SRC_BIT
    | vk.VK_BUFFER_USAGE_TRANSFER_DST_BIT
    | vk.VK_BUFFER_USAGE_SHADER_DEVICE_ADDRESS_BIT
)
_WHOLE = 2**64 - 1
_SMALLEST = 4096
_HOST_POINTER = vk.VK_EXTERNAL_MEMORY_HANDLE_TYPE_HOST_ALLOCATION_BIT_EXT
_FILE_DESCRIPTOR = vk.VK_EXTERNAL_MEMORY_HANDLE_TYPE_OPAQUE_FD_BIT


@dataclass
class Buffer:
    """A VkBuffer and the memory behind it.

    Attributes
    ----------
    kind : str
        "device", "staging", "parameters" or "imported"; the last is destroyed on release.
    size : int
        Bytes.
    address : int
        Where shaders find it.
    pointer : int
        Where the host finds it; 0 where it cannot.
    handle, memory : int
        VkBuffer and VkDeviceMemory.
    """

    kind: str
    size: int
    address: int
    pointer: int
    handle: int
    memory: int


class Memory:
    """Allocates buffers and keeps released ones for the next caller; safe under threads."""

    def __init__(self, context: Context, properties: vk.VkPhysicalDeviceMemoryProperties) -> None:
        self._functions = context.functions
        self._device = context.handle
        self._features = context.device.features
        self._types = list(properties.memoryTypes[: properties.memoryTypeCount])
        self._free: dict[tuple[str, int], list[Buffer]] = {}
        self._lock = threading.Lock()
        self.live = 0

    def allocate(self, size: int, kind: str = "device") -> Buffer:
        """Return a buffer of at least `size` bytes with unknown contents.

        Raises
        ------
        VulkanOutOfMemoryError
            No memory is left, not even after dropping what was kept for reuse.
        """
        size = _rounded(size)
        with self._lock:
            kept = self._free.get((kind, size))
            if kept:
                return kept.pop()
        try:
            return self._create(size, kind)
        except VulkanOutOfMemoryError:
            self.trim()
        try:
            return self._create(size, kind)
        except VulkanOutOfMemoryError as error:
            raise VulkanOutOfMemoryError(f"no memory for {size} bytes: {error}") from error

    def import_host(self, pointer: int, size: int) -> Buffer | None:
        """Make a buffer of host memory in place; None where the driver will not.

        `pointer` and `size` must be multiples of `host_alignment`.
        """
        properties = vk.VkMemoryHostPointerPropertiesEXT()
        importing = vk.VkImportMemoryHostPointerInfoEXT(
            handleType=_HOST_POINTER, pHostPointer=pointer
        )
        try:
            self._functions.vkGetMemoryHostPointerPropertiesEXT(
                self._device, _HOST_POINTER, pointer, ctypes.addressof(properties)
            )
            return self._imported(size, _HOST_POINTER, importing, properties.memoryTypeBits)
        except VulkanError:
            return None

    def import_fd(self, fd: int, size: int) -> Buffer:
        """Make a buffer of memory behind a POSIX file descriptor, which the driver then owns."""
        importing = vk.VkImportMemoryFdInfoKHR(handleType=_FILE_DESCRIPTOR, fd=fd)
        return self._imported(size, _FILE_DESCRIPTOR, importing, 2**32 - 1)

    def release(self, buffer: Buffer) -> None:
        """Take a buffer back that no command uses any more."""
        if buffer.kind == "imported":
            self._destroy(buffer)
            return
        with self._lock:
            self._free.setdefault((buffer.kind, buffer.size), []).append(buffer)

    def trim(self) -> None:
        """Destroy the buffers that are kept for reuse."""
        with self._lock:
            kept = [buffer for buffers in self._free.values() for buffer in buffers]
            self._free.clear()
        for buffer in kept:
            self._destroy(buffer)

    def _create(self, size: int, kind: str) -> Buffer:
        with self._new_buffer(kind, size, 0) as (buffer, required):
            type_index = self._type(required.memoryTypeBits, _PREFERENCES[kind])
            buffer.memory = self._allocate(required.size, type_index, None)
            self._bind(buffer)
            if kind != "device":
                self._map(buffer)
        return buffer

    def _imported(
        self, size: int, handle_type: int, importing: vk.Tagged, type_bits: int
    ) -> Buffer:
        with self._new_buffer("imported", size, handle_type) as (buffer, required):
            type_index = self._type(required.memoryTypeBits & type_bits, (_LOCAL, 0))
            buffer.memory = self._allocate(size, type_index, importing)
            self._bind(buffer)
        return buffer

    @contextmanager
    def _new_buffer(
        self, kind: str, size: int, handle_type: int
    ) -> Iterator[tuple[Buffer, vk.VkMemoryRequirements]]:
        """Make a buffer without memory; an error in the block destroys it."""
        external = vk.VkExternalMemoryBufferCreateInfo(handleTypes=handle_type)
        info = vk.VkBufferCreateInfo(
            pNext=ctypes.addressof(external) if handle_type else None, size=size, usage=_USAGE
        )
        handle = c_uint64()
        self._functions.vkCreateBuffer(
            self._device, ctypes.addressof(info), None, ctypes.addressof(handle)
        )
        required = vk.VkMemoryRequirements()
        self._functions.vkGetBufferMemoryRequirements(
            self._device, handle.value, ctypes.addressof(required)
        )
        buffer = Buffer(kind, size, address=0, pointer=0, handle=handle.value, memory=0)
        with self._lock:
            self.live += 1
        try:
            yield buffer, required
        except BaseException:
            self._destroy(buffer)
            raise

    def _allocate(self, size: int, type_index: int, importing: vk.Tagged | None) -> int:
        flags = vk.VkMemoryAllocateFlagsInfo(
            pNext=ctypes.addressof(importing) if importing else None,
            flags=vk.VK_MEMORY_ALLOCATE_DEVICE_ADDRESS_BIT,
        )
        info = vk.VkMemoryAllocateInfo(
            pNext=ctypes.addressof(flags), allocationSize=size, memoryTypeIndex=type_index
        )
        memory = c_uint64()
        self._functions.vkAllocateMemory(
            self._device, ctypes.addressof(info), None, ctypes.addressof(memory)
        )
        return memory.value

    def _bind(self, buffer: Buffer) -> None:
        self._functions.vkBindBufferMemory(self._device, buffer.handle, buffer.memory, 0)
        info = vk.VkBufferDeviceAddressInfo(buffer=buffer.handle)
        buffer.address = self._functions.vkGetBufferDeviceAddress(
            self._device, ctypes.addressof(info)
        )

    def _map(self, buffer: Buffer) -> None:
        pointer = c_void_p()
        self._functions.vkMapMemory(
            self._device, buffer.memory, 0, _WHOLE, 0, ctypes.addressof(pointer)
        )
        buffer.pointer = pointer.value or 0

    def _destroy(self, buffer: Buffer) -> None:
        self._functions.vkDestroyBuffer(self._device, buffer.handle, None)
        self._functions.vkFreeMemory(self._device, buffer.memory, None)
        with self._lock:
            self.live -= 1

    def _type(self, bits: int, preferences: tuple[int, ...]) -> int:
        for wanted in preferences:
            for index, memory_type in enumerate(self._types):
                if bits >> index & 1 and memory_type.propertyFlags & wanted == wanted:
                    return index
        raise VulkanError("the driver has no fitting type of memory")


def _rounded(size: int) -> int:
    """Round up to one of eight sizes an octave, so that released buffers find a next user."""
    size = max(size, _SMALLEST)
    step = 1 << (size.bit_length() - 4)
    return -(-size // step) * step
