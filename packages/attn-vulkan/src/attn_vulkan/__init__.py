"""Attention on Vulkan GPUs: in this version, the devices it will run on."""

from attn_vulkan._version import __version__
from attn_vulkan._vk.errors import LoaderNotFound, VulkanError
from attn_vulkan.device import Device, Features, devices

__all__ = [
    "Device",
    "Features",
    "LoaderNotFound",
    "VulkanError",
    "__version__",
    "devices",
]
