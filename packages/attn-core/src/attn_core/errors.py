"""The two errors a caller of this family may want to catch by name."""

from __future__ import annotations


class UnsupportedProblemError(ValueError):
    """The arguments are well formed, but no backend that may be used computes this problem."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name, and it is unknown or cannot work on this machine."""
