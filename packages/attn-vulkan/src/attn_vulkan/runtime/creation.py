"""Creating a device: its queue family, and the extensions and features that are switched on."""

from __future__ import annotations

import ctypes
import itertools
from ctypes import c_char_p, c_float, c_void_p

from attn_vulkan._vk import registry as vk
from attn_vulkan._vk.errors import VulkanError
from attn_vulkan._vk.instance import Instance
from attn_vulkan.device import Device

# By the field of `Features` that says whether they are wanted.
_EXTENSIONS = {
    "cooperative_matrix": "VK_KHR_cooperative_matrix",
    "cooperative_matrix2": "VK_NV_cooperative_matrix2",
    "bfloat16": "VK_KHR_shader_bfloat16",
    "external_memory_host": "VK_EXT_external_memory_host",
    "external_memory_fd": "VK_KHR_external_memory_fd",
    "external_semaphore_fd": "VK_KHR_external_semaphore_fd",
}
_PORTABILITY = "VK_KHR_portability_subset"  # must be enabled where it is offered


def compute_family(instance: Instance, physical: int) -> int:
    """Index of the first queue family that computes."""
    for index, family in enumerate(instance.queue_families(physical)):
        if family.queueFlags & vk.VK_QUEUE_COMPUTE_BIT:
            return index
    raise VulkanError("the device has no queue for compute")


def create_device(instance: Instance, physical: int, device: Device, family: int) -> int:
    """Return the handle of a device with one queue of `family` and the features of `device`."""
    priority = c_float(1.0)
    queue = vk.VkDeviceQueueCreateInfo(
        queueFamilyIndex=family, queueCount=1, pQueuePriorities=ctypes.addressof(priority)
    )
    names = _extensions(device, instance.extensions(physical))
    pointers = (c_char_p * len(names))(*[name.encode() for name in names])
    features = _features(device)
    info = vk.VkDeviceCreateInfo(
        pNext=ctypes.addressof(features[0]),
        queueCreateInfoCount=1,
        pQueueCreateInfos=ctypes.addressof(queue),
        enabledExtensionCount=len(names),
        ppEnabledExtensionNames=ctypes.addressof(pointers),
    )
    handle = c_void_p()
    instance.functions.vkCreateDevice(
        physical, ctypes.addressof(info), None, ctypes.addressof(handle)
    )
    assert handle.value is not None
    return handle.value


def _extensions(device: Device, offered: set[str]) -> list[str]:
    """Extensions to switch on."""
    names = [name for feature, name in _EXTENSIONS.items() if getattr(device.features, feature)]
    return [name for name in (*names, _PORTABILITY) if name in offered]


def _features(device: Device) -> list[vk.Tagged]:
    """The chain of features to switch on, each structure pointing at the next."""
    features = device.features
    chain: list[vk.Tagged] = [
        vk.VkPhysicalDeviceFeatures2(),
        vk.VkPhysicalDeviceVulkan12Features(
            shaderFloat16=features.float16,
            scalarBlockLayout=features.scalar_layout,
            timelineSemaphore=True,
            bufferDeviceAddress=features.buffer_device_address,
            vulkanMemoryModel=features.memory_model,
        ),
        vk.VkPhysicalDevice16BitStorageFeatures(storageBuffer16BitAccess=features.storage16),
    ]
    chain[0].features.shaderInt64 = features.int64
    if features.subgroup_size_control:
        chain.append(
            vk.VkPhysicalDeviceSubgroupSizeControlFeatures(
                subgroupSizeControl=True, computeFullSubgroups=True
            )
        )
    if features.bfloat16:
        chain.append(
            vk.VkPhysicalDeviceShaderBfloat16FeaturesKHR(
                shaderBFloat16Type=True,
                shaderBFloat16CooperativeMatrix=_has_bfloat16_matrices(device),
            )
        )
    if features.cooperative_matrix:
        chain.append(vk.VkPhysicalDeviceCooperativeMatrixFeaturesKHR(cooperativeMatrix=True))
    if features.cooperative_matrix2:
        chain.append(
            vk.VkPhysicalDeviceCooperativeMatrix2FeaturesNV(
                cooperativeMatrixReductions=True,
                cooperativeMatrixConversions=True,
                cooperativeMatrixPerElementOperations=True,
            )
        )
    for structure, following in itertools.pairwise(chain):
        structure.pNext = ctypes.addressof(following)
    return chain


def _has_bfloat16_matrices(device: Device) -> bool:
    shapes = device.matrix_shapes if device.features.cooperative_matrix else ()
    return any(shape.startswith("bfloat16 ") for shape in shapes)
