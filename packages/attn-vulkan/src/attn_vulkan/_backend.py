"""Backend "vulkan" as attn-core sees it, found through the entry-point group of its plug-ins.

The operators belong to attn-flash and attn-paged. They are known here by name alone, and neither
package has to be installed.
"""

from __future__ import annotations

from typing import Any, NoReturn

from attn_core.backends import Backend
from attn_core.errors import BackendUnavailableError
from attn_vulkan._version import __version__
from attn_vulkan._vk.errors import VulkanError
from attn_vulkan.device import NO_DEVICE, devices

OPERATORS = ("attn_flash::attention", "attn_flash::attention_backward", "attn_paged::attention")
# Below "torch": tensors have to be copied to the device, so a caller must ask for it.
PRIORITY = -10


def backends() -> list[Backend]:
    """The backend this distribution adds; the entry point of its name."""
    return [
        Backend(
            name="vulkan",
            ops=dict.fromkeys(OPERATORS, f"{__name__}:refuse"),
            priority=PRIORITY,
            supports=supports,
        )
    ]


def supports(op: str, problem: Any) -> str | None:
    """Say why no problem can run: no loader, no device, or no kernels in this version."""
    try:
        found = devices()
    except VulkanError as error:
        return str(error)
    if not found:
        return NO_DEVICE
    return f"attn-vulkan {__version__} finds devices ({found[0].name}) but has no kernels yet"


def refuse(*_: Any) -> NoReturn:
    """Stand in for the kernels where a compiled graph names the backend without asking first."""
    raise BackendUnavailableError(f"backend 'vulkan' cannot run: {supports('', None)}")
