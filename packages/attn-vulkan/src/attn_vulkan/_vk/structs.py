"""The C structures and constants of Vulkan that the probe uses, under their own names.

Numbers and layouts are those of the Vulkan registry, ``vk.xml``.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char, c_char_p, c_uint8, c_uint32, c_uint64, c_void_p
from typing import Any, ClassVar

VK_SUCCESS = 0
VK_INCOMPLETE = 5
VK_ERROR_INCOMPATIBLE_DRIVER = -9

VK_INSTANCE_CREATE_ENUMERATE_PORTABILITY_BIT_KHR = 1
VK_MEMORY_HEAP_DEVICE_LOCAL_BIT = 1

VK_API_VERSION_1_0 = 1 << 22
VK_API_VERSION_1_1 = VK_API_VERSION_1_0 | 1 << 12
VK_API_VERSION_1_2 = VK_API_VERSION_1_0 | 2 << 12
VK_API_VERSION_1_3 = VK_API_VERSION_1_0 | 3 << 12


class VkApplicationInfo(ctypes.Structure):
    _fields_: ClassVar = [
        ("sType", c_uint32),
        ("pNext", c_void_p),
        ("pApplicationName", c_char_p),
        ("applicationVersion", c_uint32),
        ("pEngineName", c_char_p),
        ("engineVersion", c_uint32),
        ("apiVersion", c_uint32),
    ]


class VkInstanceCreateInfo(ctypes.Structure):
    _fields_: ClassVar = [
        ("sType", c_uint32),
        ("pNext", c_void_p),
        ("flags", c_uint32),
        ("pApplicationInfo", ctypes.POINTER(VkApplicationInfo)),
        ("enabledLayerCount", c_uint32),
        ("ppEnabledLayerNames", ctypes.POINTER(c_char_p)),
        ("enabledExtensionCount", c_uint32),
        ("ppEnabledExtensionNames", ctypes.POINTER(c_char_p)),
    ]


class VkExtensionProperties(ctypes.Structure):
    _fields_: ClassVar = [("extensionName", c_char * 256), ("specVersion", c_uint32)]


class VkPhysicalDeviceProperties(ctypes.Structure):
    _fields_: ClassVar = [
        ("apiVersion", c_uint32),
        ("driverVersion", c_uint32),
        ("vendorID", c_uint32),
        ("deviceID", c_uint32),
        ("deviceType", c_uint32),
        ("deviceName", c_char * 256),
        ("pipelineCacheUUID", c_uint8 * 16),
        ("limits", c_uint64 * 63),  # VkPhysicalDeviceLimits, 504 bytes that the probe does not read
        ("sparseProperties", c_uint32 * 5),
    ]


class VkMemoryType(ctypes.Structure):
    _fields_: ClassVar = [("propertyFlags", c_uint32), ("heapIndex", c_uint32)]


class VkMemoryHeap(ctypes.Structure):
    _fields_: ClassVar = [("size", c_uint64), ("flags", c_uint32)]


class VkPhysicalDeviceMemoryProperties(ctypes.Structure):
    _fields_: ClassVar = [
        ("memoryTypeCount", c_uint32),
        ("memoryTypes", VkMemoryType * 32),
        ("memoryHeapCount", c_uint32),
        ("memoryHeaps", VkMemoryHeap * 16),
    ]


class Tagged(ctypes.Structure):
    """A structure that starts with its own sType and a pointer to the next one."""

    STYPE: ClassVar[int]
    _fields_: ClassVar = [("sType", c_uint32), ("pNext", c_void_p)]

    def __init__(self, following: int | None = None) -> None:
        super().__init__(self.STYPE, following)


class VkPhysicalDeviceProperties2(Tagged):
    STYPE = 1000059001
    _fields_: ClassVar = [("properties", VkPhysicalDeviceProperties)]


class VkPhysicalDeviceSubgroupProperties(Tagged):
    STYPE = 1000094000
    _fields_: ClassVar = [
        ("subgroupSize", c_uint32),
        ("supportedStages", c_uint32),
        ("supportedOperations", c_uint32),
        ("quadOperationsInAllStages", c_uint32),
    ]


class VkPhysicalDeviceDriverProperties(Tagged):
    STYPE = 1000196000
    _fields_: ClassVar = [
        ("driverID", c_uint32),
        ("driverName", c_char * 256),
        ("driverInfo", c_char * 256),
        ("conformanceVersion", c_uint8 * 4),
    ]


class VkPhysicalDeviceFeatures2(Tagged):
    STYPE = 1000059000
    _fields_: ClassVar = [("features", c_uint32 * 55)]  # VkPhysicalDeviceFeatures, not read


def _flags(*names: str) -> Any:
    return [(name, c_uint32) for name in names]


class VkPhysicalDevice16BitStorageFeatures(Tagged):
    STYPE = 1000083000
    _fields_: ClassVar = _flags(
        "storageBuffer16BitAccess",
        "uniformAndStorageBuffer16BitAccess",
        "storagePushConstant16",
        "storageInputOutput16",
    )


class VkPhysicalDeviceShaderFloat16Int8Features(Tagged):
    STYPE = 1000082000
    _fields_: ClassVar = _flags("shaderFloat16", "shaderInt8")


class VkPhysicalDeviceBufferDeviceAddressFeatures(Tagged):
    STYPE = 1000257000
    _fields_: ClassVar = _flags(
        "bufferDeviceAddress",
        "bufferDeviceAddressCaptureReplay",
        "bufferDeviceAddressMultiDevice",
    )


class VkPhysicalDeviceShaderBfloat16FeaturesKHR(Tagged):
    STYPE = 1000141000
    _fields_: ClassVar = _flags(
        "shaderBFloat16Type",
        "shaderBFloat16DotProduct",
        "shaderBFloat16CooperativeMatrix",
    )


class VkPhysicalDeviceCooperativeMatrixFeaturesKHR(Tagged):
    STYPE = 1000506000
    _fields_: ClassVar = _flags("cooperativeMatrix", "cooperativeMatrixRobustBufferAccess")


class VkPhysicalDeviceCooperativeMatrix2FeaturesNV(Tagged):
    STYPE = 1000593000
    _fields_: ClassVar = _flags(
        "cooperativeMatrixWorkgroupScope",
        "cooperativeMatrixFlexibleDimensions",
        "cooperativeMatrixReductions",
        "cooperativeMatrixConversions",
        "cooperativeMatrixPerElementOperations",
        "cooperativeMatrixTensorAddressing",
        "cooperativeMatrixBlockLoads",
    )
