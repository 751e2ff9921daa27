"""Attention on Vulkan GPUs, without CUDA, ROCm or a compiler."""

from attn_vulkan._version import __version__
from attn_vulkan._vk.errors import (
    DeviceLostError,
    LoaderNotFound,
    VulkanError,
    VulkanOutOfMemoryError,
)
from attn_vulkan.api import attention, attention_backward
from attn_vulkan.device import Device, Features, devices

__all__ = [
    "Device",
    "DeviceLostError",
    "Features",
    "LoaderNotFound",
    "VulkanError",
    "VulkanOutOfMemoryError",
    "__version__",
    "attention",
    "attention_backward",
    "devices",
]
