"""What the attention packages share: backends, checks, operators, tuning, tiles and a test kit."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from attn_core._version import __version__
from attn_core.errors import BackendUnavailableError, UnsupportedProblemError

if TYPE_CHECKING:
    from attn_core.backends import Backend, available, explain, register, resolve
    from attn_core.device import DeviceInfo, device_info

__all__ = [
    "Backend",
    "BackendUnavailableError",
    "DeviceInfo",
    "UnsupportedProblemError",
    "__version__",
    "available",
    "device_info",
    "explain",
    "register",
    "resolve",
]

# What needs torch is imported when it is asked for: attn-vulkan serves numpy without torch.
_MODULES = {
    **dict.fromkeys(("Backend", "available", "explain", "register", "resolve"), "backends"),
    **dict.fromkeys(("DeviceInfo", "device_info"), "device"),
}


def __getattr__(name: str) -> object:
    if name in _MODULES.values():
        return importlib.import_module(f"attn_core.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'attn_core' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"attn_core.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
