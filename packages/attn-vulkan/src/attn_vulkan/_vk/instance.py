"""A Vulkan instance: what one has to create before one may ask for devices."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_char_p, c_int32, c_uint32, c_void_p
from typing import Any

from attn_vulkan._vk import structs as vk
from attn_vulkan._vk.errors import VulkanError
from attn_vulkan._vk.loader import open_loader

_PORTABILITY = b"VK_KHR_portability_enumeration"
# What each function returns, and how many pointers it takes: nothing else is passed.
_SIGNATURES: dict[str, tuple[Any, int]] = {
    "vkEnumerateInstanceVersion": (c_int32, 1),
    "vkEnumerateInstanceExtensionProperties": (c_int32, 3),
    "vkCreateInstance": (c_int32, 3),
    "vkDestroyInstance": (None, 2),
    "vkEnumeratePhysicalDevices": (c_int32, 3),
    "vkEnumerateDeviceExtensionProperties": (c_int32, 4),
    "vkGetPhysicalDeviceProperties": (None, 2),
    "vkGetPhysicalDeviceProperties2": (None, 2),
    "vkGetPhysicalDeviceFeatures2": (None, 2),
    "vkGetPhysicalDeviceMemoryProperties": (None, 2),
}


class Instance:
    """The instance-level functions of one VkInstance; `open_instance` makes and destroys it."""

    def __init__(self, library: Any, handle: c_void_p) -> None:
        self._library = library
        self._handle = handle

    def physical_devices(self) -> list[int]:
        """Handles of the devices, in the loader's order."""
        enumerate_devices = self._function("vkEnumeratePhysicalDevices")
        return _read_list("vkEnumeratePhysicalDevices", c_void_p, enumerate_devices, self._handle)

    def extensions(self, device: int) -> set[str]:
        """Names of the extensions `device` offers."""
        name = "vkEnumerateDeviceExtensionProperties"
        found = _read_list(
            name, vk.VkExtensionProperties, self._function(name), c_void_p(device), None
        )
        return {extension.extensionName.decode() for extension in found}

    def properties(self, device: int) -> vk.VkPhysicalDeviceProperties:
        """Name, type and version of `device`."""
        properties = vk.VkPhysicalDeviceProperties()
        self._query("vkGetPhysicalDeviceProperties", device, properties)
        return properties

    def memory_properties(self, device: int) -> vk.VkPhysicalDeviceMemoryProperties:
        """Memory heaps of `device`."""
        memory = vk.VkPhysicalDeviceMemoryProperties()
        self._query("vkGetPhysicalDeviceMemoryProperties", device, memory)
        return memory

    def fill_properties(self, device: int, answer: vk.Tagged) -> None:
        """Fill one structure of properties; `device` must be of Vulkan 1.1 or newer."""
        head = vk.VkPhysicalDeviceProperties2(ctypes.addressof(answer))
        self._query("vkGetPhysicalDeviceProperties2", device, head)

    def fill_features(self, device: int, answer: vk.Tagged) -> None:
        """Fill one structure of features; `device` must be of Vulkan 1.1 or newer."""
        head = vk.VkPhysicalDeviceFeatures2(ctypes.addressof(answer))
        self._query("vkGetPhysicalDeviceFeatures2", device, head)

    def destroy(self) -> None:
        """Destroy the instance; nothing may be asked of it afterwards."""
        self._function("vkDestroyInstance")(self._handle, None)

    def _query(self, name: str, device: int, answer: ctypes.Structure) -> None:
        self._function(name)(c_void_p(device), ctypes.byref(answer))

    def _function(self, name: str) -> Callable[..., Any]:
        return _function(self._library, self._handle, name)


@contextmanager
def open_instance() -> Iterator[Instance | None]:
    """Create an instance and destroy it on leaving.

    Yields
    ------
    Instance or None
        None where the loader finds no driver, and so no device.

    Raises
    ------
    LoaderNotFound
        There is no loader.
    VulkanError
        The loader is too old or refuses to make an instance.
    """
    library = open_loader()
    library.vkGetInstanceProcAddr.restype = c_void_p
    library.vkGetInstanceProcAddr.argtypes = [c_void_p, c_char_p]
    handle = _create(library)
    if handle is None:
        yield None
        return
    instance = Instance(library, handle)
    try:
        yield instance
    finally:
        instance.destroy()


def _create(library: Any) -> c_void_p | None:
    version = _loader_version(library)
    if version < vk.VK_API_VERSION_1_1:
        raise VulkanError("the Vulkan loader must be of version 1.1 or newer, got 1.0")
    application = vk.VkApplicationInfo(
        sType=0, pApplicationName=b"attn-vulkan", apiVersion=vk.VK_API_VERSION_1_3
    )
    info = vk.VkInstanceCreateInfo(sType=1, pApplicationInfo=ctypes.pointer(application))
    if _PORTABILITY in _instance_extensions(library):  # MoltenVK's devices are hidden without it
        info.flags = vk.VK_INSTANCE_CREATE_ENUMERATE_PORTABILITY_BIT_KHR
        info.enabledExtensionCount = 1
        info.ppEnabledExtensionNames = (c_char_p * 1)(_PORTABILITY)
    handle = c_void_p()
    create = _function(library, None, "vkCreateInstance")
    result = create(ctypes.byref(info), None, ctypes.byref(handle))
    if result == vk.VK_ERROR_INCOMPATIBLE_DRIVER:
        return None
    _check("vkCreateInstance", result)
    return handle


def _loader_version(library: Any) -> int:
    if not library.vkGetInstanceProcAddr(None, b"vkEnumerateInstanceVersion"):
        return vk.VK_API_VERSION_1_0
    version = c_uint32()
    enumerate_version = _function(library, None, "vkEnumerateInstanceVersion")
    _check("vkEnumerateInstanceVersion", enumerate_version(ctypes.byref(version)))
    return version.value


def _instance_extensions(library: Any) -> set[bytes]:
    name = "vkEnumerateInstanceExtensionProperties"
    function = _function(library, None, name)
    found = _read_list(name, vk.VkExtensionProperties, function, None)
    return {extension.extensionName for extension in found}


def _function(library: Any, handle: c_void_p | None, name: str) -> Callable[..., Any]:
    address = library.vkGetInstanceProcAddr(handle, name.encode())
    if not address:
        raise VulkanError(f"the Vulkan loader has no {name}")
    returns, pointers = _SIGNATURES[name]
    prototype = getattr(ctypes, "WINFUNCTYPE", ctypes.CFUNCTYPE)
    return prototype(returns, *[c_void_p] * pointers)(address)


def _read_list(name: str, item: Any, function: Callable[..., Any], *first: Any) -> list[Any]:
    """Call a function of Vulkan's count-then-fill kind until the list of `item` is whole."""
    count = c_uint32()
    while True:
        _check(name, function(*first, ctypes.byref(count), None))
        items = (item * count.value)()
        result = function(*first, ctypes.byref(count), items)
        if result != vk.VK_INCOMPLETE:  # the list grew between the two calls
            _check(name, result)
            return list(items[: count.value])


def _check(name: str, result: int) -> None:
    if result != vk.VK_SUCCESS:
        raise VulkanError(f"{name} failed with VkResult {result}")
