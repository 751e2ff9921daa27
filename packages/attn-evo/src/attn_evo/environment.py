"""The names that evo-attn gave to two of the family's environment variables.

``EVO_BACKEND``
    Stands in for ``ATTN_BACKEND`` where that is unset: ``auto``, ``torch``, ``triton``, ...
``EVO_AUTOTUNE``
    Stands in for ``ATTN_TUNE`` where that is unset: ``0`` is ``off`` and ``1`` is ``on``.

They concern this package alone and are read when they are needed. `attn_core.environment` describes
the variables they stand in for.
"""

from __future__ import annotations

import os

from attn_core import environment

BACKEND = "EVO_BACKEND"
AUTOTUNE = "EVO_AUTOTUNE"

_AUTOTUNE_MODES = {"0": "off", "1": "on", "off": "off", "on": "on", "force": "force"}


def requested_backend(backend: str) -> str:
    """Return the backend a call asks for: its own, that of ``EVO_BACKEND``, or ``"auto"``."""
    if not isinstance(backend, str) or backend != "auto" or os.environ.get(environment.BACKEND):
        return backend
    return os.environ.get(BACKEND, "").lower() or backend


def tune_mode() -> str:
    """Return one of `attn_core.environment.TUNE_MODES`, for backends that have tiles to tune."""
    if os.environ.get(environment.TUNE):
        return environment.tune_mode()
    value = os.environ.get(AUTOTUNE) or "0"
    if value not in _AUTOTUNE_MODES:
        raise ValueError(f"{AUTOTUNE} must be one of {', '.join(_AUTOTUNE_MODES)}, got {value!r}")
    return _AUTOTUNE_MODES[value]
