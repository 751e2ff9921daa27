"""What the attention packages share: backends, checks, operators, tuning, tiles and a test kit."""

from attn_core._version import __version__
from attn_core.backends import Backend, available, explain, register, resolve
from attn_core.device import DeviceInfo, device_info
from attn_core.errors import BackendUnavailableError, UnsupportedProblemError

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
