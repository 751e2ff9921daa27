"""What is switched on when a device is opened: nothing that the driver did not offer."""

from __future__ import annotations

import ctypes
import itertools

from attn_vulkan.device import Device, Features
from attn_vulkan.runtime import creation

MATRIX_PARTS = {
    "cooperativeMatrixReductions",
    "cooperativeMatrixConversions",
    "cooperativeMatrixPerElementOperations",
}


def device(*shapes, **features):
    return Device(
        0, "GPU", "discrete", "1.3", "", 32, 0, Features(**features), matrix_shapes=shapes
    )


def switched_on(device, structure):
    (found,) = (s for s in creation._features(device) if type(s).__name__.endswith(structure))
    names = [name for name, _ in found._fields_ if name not in ("sType", "pNext")]
    return {name for name in names if getattr(found, name)}


def test_only_the_parts_of_matrices_that_shaders_use():
    """A driver may offer these and none of the others, as Mesa's do."""
    gpu = device(cooperative_matrix=True, cooperative_matrix2=True)
    assert switched_on(gpu, "CooperativeMatrix2FeaturesNV") == MATRIX_PARTS


def test_bfloat16_matrices_only_where_they_are_listed():
    gpu = device("float16 16x16x16", bfloat16=True, cooperative_matrix=True)
    assert switched_on(gpu, "Bfloat16FeaturesKHR") == {"shaderBFloat16Type"}
    gpu = device("bfloat16 16x16x16", bfloat16=True, cooperative_matrix=True)
    assert switched_on(gpu, "Bfloat16FeaturesKHR") == {
        "shaderBFloat16Type",
        "shaderBFloat16CooperativeMatrix",
    }


def test_an_old_device_opens_for_its_reason_to_be_told():
    chain = creation._features(device())
    assert [type(s).__name__ for s in chain] == [
        "VkPhysicalDeviceFeatures2",
        "VkPhysicalDeviceVulkan12Features",
        "VkPhysicalDevice16BitStorageFeatures",
    ]
    assert not chain[0].features.shaderInt64
    assert switched_on(device(), "Vulkan12Features") == {"timelineSemaphore"}


def test_the_chain_links_every_structure():
    chain = creation._features(device(bfloat16=True, cooperative_matrix=True))
    for structure, following in itertools.pairwise(chain):
        assert structure.pNext == ctypes.addressof(following)
    assert not chain[-1].pNext


def test_extensions_are_those_wanted_and_offered():
    gpu = device(cooperative_matrix=True, external_memory_fd=True)
    offered = {"VK_KHR_cooperative_matrix", "VK_KHR_shader_bfloat16", "VK_KHR_portability_subset"}
    assert creation._extensions(gpu, offered) == [
        "VK_KHR_cooperative_matrix",
        "VK_KHR_portability_subset",
    ]
