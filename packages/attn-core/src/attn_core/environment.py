"""The environment variables of the family: all of them, what each allows, and its value now.

``ATTN_BACKEND``
    Name of a backend, such as ``torch`` or ``triton``. It takes the place of ``backend="auto"`` in
    every call. Unset, empty or ``auto``: the preferred backend that supports the problem.
``ATTN_TUNE``
    When tile sizes are measured inside a call. ``off`` (the default): never. ``on``: at the first
    call with a problem that has neither a measured nor a shipped row. ``force``: at the first call
    with every problem in a process.
``ATTN_CACHE_DIR``
    Directory of the measured tile sizes. Default: the user's cache directory of the platform, such
    as ``~/.cache/attn`` on Linux.
``ATTN_CHECK_VALUES``
    ``1``: also check the values in index tensors that are on a GPU, such as cumulative lengths and
    block tables, at the price of waiting for it in each call. Those on the CPU are always checked.

Each is read when it is needed, never at import.
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path

BACKEND = "ATTN_BACKEND"
TUNE = "ATTN_TUNE"
CACHE_DIR = "ATTN_CACHE_DIR"
CHECK_VALUES = "ATTN_CHECK_VALUES"
VARIABLES = (BACKEND, TUNE, CACHE_DIR, CHECK_VALUES)

TUNE_MODES = ("off", "on", "force")

# os.environ encodes a name and raises KeyError inside, at twenty times the cost of its own dict.
_values = os.environ._data  # type: ignore[attr-defined]
_BACKEND_KEY, _CHECK_VALUES_KEY = map(os.environ.encodekey, (BACKEND, CHECK_VALUES))


def backend() -> str:
    """Return the backend that takes the place of ``"auto"``, ``"auto"`` itself by default."""
    return os.environ.get(BACKEND) or "auto"


def tune_mode() -> str:
    """Return one of `TUNE_MODES`; anything else in the variable is a ValueError."""
    mode = os.environ.get(TUNE) or "off"
    if mode not in TUNE_MODES:
        raise ValueError(f"{TUNE} must be one of {', '.join(TUNE_MODES)}, got {mode!r}")
    return mode


def checks_values() -> bool:
    """Whether to wait for a GPU in order to check what its tensors hold."""
    return os.environ.get(CHECK_VALUES, "0") not in ("", "0")


def of_a_call() -> Hashable:
    """Return what tells apart environments in which a call may do something else."""
    return _values.get(_BACKEND_KEY), _values.get(_CHECK_VALUES_KEY)


def cache_dir() -> Path:
    """Return the directory of the measured tile sizes, which need not exist."""
    override = os.environ.get(CACHE_DIR)
    if override:
        return Path(override)
    import platformdirs  # not needed by a call that finds its tiles among the shipped rows

    return Path(platformdirs.user_cache_dir("attn"))
