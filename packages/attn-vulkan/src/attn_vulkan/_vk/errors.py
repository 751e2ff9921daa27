"""Why Vulkan cannot be used."""

from __future__ import annotations

from attn_core.errors import BackendUnavailableError
from attn_vulkan._vk import registry as vk


class VulkanError(BackendUnavailableError):
    """A Vulkan function failed; the message has its name and the VkResult, `result` the number."""

    result = 0


class LoaderNotFound(VulkanError):  # noqa: N818  (says what it is, as StopIteration does)
    """There is no Vulkan loader on this machine; the message names the files that were tried."""


class VulkanOutOfMemoryError(VulkanError):
    """The device, or the host for it, has no memory left; nothing was kept of the failed call."""


class DeviceLostError(VulkanError):
    """The driver gave the device up; the process has to open it again."""


_NAMES = {
    vk.VK_ERROR_OUT_OF_HOST_MEMORY: "VK_ERROR_OUT_OF_HOST_MEMORY",
    vk.VK_ERROR_OUT_OF_DEVICE_MEMORY: "VK_ERROR_OUT_OF_DEVICE_MEMORY",
    vk.VK_ERROR_INITIALIZATION_FAILED: "VK_ERROR_INITIALIZATION_FAILED",
    vk.VK_ERROR_DEVICE_LOST: "VK_ERROR_DEVICE_LOST",
    vk.VK_ERROR_LAYER_NOT_PRESENT: "VK_ERROR_LAYER_NOT_PRESENT",
    vk.VK_ERROR_EXTENSION_NOT_PRESENT: "VK_ERROR_EXTENSION_NOT_PRESENT",
    vk.VK_ERROR_FEATURE_NOT_PRESENT: "VK_ERROR_FEATURE_NOT_PRESENT",
    vk.VK_ERROR_INCOMPATIBLE_DRIVER: "VK_ERROR_INCOMPATIBLE_DRIVER",
    vk.VK_ERROR_TOO_MANY_OBJECTS: "VK_ERROR_TOO_MANY_OBJECTS",
    vk.VK_ERROR_INVALID_EXTERNAL_HANDLE: "VK_ERROR_INVALID_EXTERNAL_HANDLE",
}
_CLASSES: dict[int, type[VulkanError]] = {
    vk.VK_ERROR_OUT_OF_HOST_MEMORY: VulkanOutOfMemoryError,
    vk.VK_ERROR_OUT_OF_DEVICE_MEMORY: VulkanOutOfMemoryError,
    vk.VK_ERROR_DEVICE_LOST: DeviceLostError,
}


def error_of(function: str, result: int) -> VulkanError:
    """Make the error of a failed function, of the class that its VkResult asks for."""
    name = _NAMES.get(result, "an unnamed VkResult")
    error = _CLASSES.get(result, VulkanError)(f"{function} failed: {name} ({result})")
    error.result = result
    return error
