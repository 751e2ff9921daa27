"""A Vulkan instance: what one has to create before one may ask for devices."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_char_p, c_uint32, c_void_p
from typing import Any

from attn_vulkan._vk import registry as vk
from attn_vulkan._vk.errors import VulkanError
from attn_vulkan._vk.functions import Functions, read_list
from attn_vulkan._vk.loader import open_loader

API_VERSION_1_0 = 1 << 22
API_VERSION_1_1 = API_VERSION_1_0 | 1 << 12
API_VERSION_1_2 = API_VERSION_1_0 | 2 << 12
API_VERSION_1_3 = API_VERSION_1_0 | 3 << 12

_PORTABILITY = b"VK_KHR_portability_enumeration"


class Instance:
    """The instance-level functions of one VkInstance."""

    def __init__(self, library: Any, handle: int) -> None:
        self.handle = handle
        self.functions = _functions(library, handle)

    def physical_devices(self) -> list[int]:
        """Handles of the devices, in the loader's order."""
        return read_list(c_void_p, self.functions.vkEnumeratePhysicalDevices, self.handle)

    def extensions(self, device: int) -> set[str]:
        """Names of the extensions `device` offers."""
        found = read_list(
            vk.VkExtensionProperties,
            self.functions.vkEnumerateDeviceExtensionProperties,
            device,
            None,
        )
        return {extension.extensionName.decode() for extension in found}

    def properties(self, device: int) -> vk.VkPhysicalDeviceProperties:
        """Name, type, version and limits of `device`."""
        properties = vk.VkPhysicalDeviceProperties()
        self.functions.vkGetPhysicalDeviceProperties(device, ctypes.addressof(properties))
        return properties

    def memory_properties(self, device: int) -> vk.VkPhysicalDeviceMemoryProperties:
        """Memory heaps and types of `device`."""
        memory = vk.VkPhysicalDeviceMemoryProperties()
        self.functions.vkGetPhysicalDeviceMemoryProperties(device, ctypes.addressof(memory))
        return memory

    def queue_families(self, device: int) -> list[vk.VkQueueFamilyProperties]:
        """Families of queues of `device`."""
        function = self.functions.vkGetPhysicalDeviceQueueFamilyProperties
        return read_list(vk.VkQueueFamilyProperties, function, device)

    def cooperative_matrices(self, device: int) -> list[vk.VkCooperativeMatrixPropertiesKHR]:
        """Shapes and types of matrices; `device` must offer VK_KHR_cooperative_matrix."""
        function = self.functions.vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR
        return read_list(vk.VkCooperativeMatrixPropertiesKHR, function, device)

    def fill_properties(self, device: int, answer: vk.Tagged) -> None:
        """Fill one structure of properties; `device` must be of Vulkan 1.1 or newer."""
        head = vk.VkPhysicalDeviceProperties2(pNext=ctypes.addressof(answer))
        self.functions.vkGetPhysicalDeviceProperties2(device, ctypes.addressof(head))

    def fill_features(self, device: int, answer: vk.Tagged | None) -> vk.VkPhysicalDeviceFeatures:
        """Fill one structure of features; `device` must be of Vulkan 1.1 or newer."""
        head = vk.VkPhysicalDeviceFeatures2(pNext=ctypes.addressof(answer) if answer else None)
        self.functions.vkGetPhysicalDeviceFeatures2(device, ctypes.addressof(head))
        return head.features  # type: ignore[no-any-return]

    def destroy(self) -> None:
        """Destroy the instance; nothing may be asked of it afterwards."""
        self.functions.vkDestroyInstance(self.handle, None)


def create_instance() -> Instance | None:
    """Create an instance, which the caller destroys.

    Returns
    -------
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
    return None if handle is None else Instance(library, handle)


@contextmanager
def open_instance() -> Iterator[Instance | None]:
    """Create an instance and destroy it on leaving; errors as in `create_instance`."""
    instance = create_instance()
    try:
        yield instance
    finally:
        if instance is not None:
            instance.destroy()


def _create(library: Any) -> int | None:
    functions = _functions(library, None)
    version = _loader_version(library, functions)
    if version < API_VERSION_1_1:
        raise VulkanError("the Vulkan loader must be of version 1.1 or newer, got 1.0")
    application = vk.VkApplicationInfo(pApplicationName=b"attn-vulkan", apiVersion=API_VERSION_1_3)
    info = vk.VkInstanceCreateInfo(pApplicationInfo=ctypes.addressof(application))
    names = (c_char_p * 1)(_PORTABILITY)
    if _PORTABILITY in _instance_extensions(functions):  # MoltenVK's devices are hidden without it
        info.flags = vk.VK_INSTANCE_CREATE_ENUMERATE_PORTABILITY_BIT_KHR
        info.enabledExtensionCount = 1
        info.ppEnabledExtensionNames = ctypes.addressof(names)
    handle = c_void_p()
    try:
        functions.vkCreateInstance(ctypes.addressof(info), None, ctypes.addressof(handle))
    except VulkanError as error:
        if error.result == vk.VK_ERROR_INCOMPATIBLE_DRIVER:
            return None
        raise
    return handle.value


def _loader_version(library: Any, functions: Functions) -> int:
    if not library.vkGetInstanceProcAddr(None, b"vkEnumerateInstanceVersion"):
        return API_VERSION_1_0
    version = c_uint32()
    functions.vkEnumerateInstanceVersion(ctypes.addressof(version))
    return version.value


def _instance_extensions(functions: Functions) -> set[bytes]:
    function = functions.vkEnumerateInstanceExtensionProperties
    return {e.extensionName for e in read_list(vk.VkExtensionProperties, function, None)}


def _functions(library: Any, handle: int | None) -> Functions:
    def address_of(name: str) -> int | None:
        return library.vkGetInstanceProcAddr(handle, name.encode())  # type: ignore[no-any-return]

    return Functions(address_of)
