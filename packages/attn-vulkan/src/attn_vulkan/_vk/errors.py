"""Why Vulkan cannot be used."""

from __future__ import annotations

from attn_core.errors import BackendUnavailableError


class VulkanError(BackendUnavailableError):
    """A Vulkan function failed; the message has its name and the VkResult."""


class LoaderNotFound(VulkanError):  # noqa: N818  (says what it is, as StopIteration does)
    """There is no Vulkan loader on this machine; the message names the files that were tried."""
