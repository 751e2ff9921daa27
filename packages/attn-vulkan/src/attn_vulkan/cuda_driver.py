"""What is used of CUDA's driver, through ctypes: its structures, and calls that raise."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int, c_uint, c_ulonglong, c_void_p
from typing import Any, ClassVar

from attn_vulkan._vk.errors import VulkanError, VulkanOutOfMemoryError

PINNED = POSIX_FD = ON_DEVICE = 1
READ_AND_WRITE = 3
TIMELINE_FD = 9
_OUT_OF_MEMORY = 2


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_: ClassVar = [("type", c_int), ("id", c_int)]


class Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_: ClassVar = [
        ("type", c_int),
        ("requestedHandleTypes", c_int),
        ("location", Location),
        ("win32HandleMetaData", c_void_p),
        ("allocFlags", ctypes.c_ubyte * 8),
    ]


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_: ClassVar = [("location", Location), ("flags", c_int)]


class SemaphoreHandle(ctypes.Structure):
    """CUDA_EXTERNAL_SEMAPHORE_HANDLE_DESC."""

    _fields_: ClassVar = [
        ("type", c_int),
        ("fd", c_ulonglong),
        ("rest", c_ulonglong),
        ("flags", c_uint),
        ("reserved", c_uint * 16),
    ]


class SemaphoreParameters(ctypes.Structure):
    """Of a signal as of a wait: the value first, zeros after it."""

    _fields_: ClassVar = [("value", c_ulonglong), ("rest", c_ulonglong * 17)]


def call(name: str, *arguments: Any) -> None:
    """Call a function of the driver; one that fails raises VulkanError."""
    result = getattr(_library(), name)(*arguments)
    if result == _OUT_OF_MEMORY:
        raise VulkanOutOfMemoryError(f"{name} failed: CUDA has no memory left")
    if result:
        raise VulkanError(f"{name} failed with CUresult {result}")


def require_context(index: int) -> None:
    """Give this thread a CUDA context; those of autograd have none before their first kernel."""
    current = c_void_p()
    call("cuCtxGetCurrent", ctypes.byref(current))
    if not current:
        call("cuCtxSetCurrent", _primary_context(index))


@functools.cache
def _primary_context(index: int) -> c_void_p:
    """Return the context that torch uses too."""
    device, context = c_int(), c_void_p()
    call("cuDeviceGet", ctypes.byref(device), c_int(index))
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context


@functools.cache
def _library() -> Any:
    return ctypes.CDLL("libcuda.so.1")
