"""Arguments that several operators have, each checked and put in one form."""

from __future__ import annotations

import math
import operator
from typing import Any

from attn_core.checks import flag, is_finite

_WIDEST = 2**31 - 1  # no sequence is longer, so a wider window hides as little


def softmax_scale(value: Any, head_dim: int, name: str = "softmax_scale") -> float:
    """Return the factor of the scores, ``1 / sqrt(head_dim)`` where none is given."""
    if value is None:
        return 1.0 / math.sqrt(max(head_dim, 1))
    if not is_finite(value):
        raise ValueError(f"{name} must be a finite number or None, got {value!r}")
    return float(value)


def softcap(value: Any) -> float:
    """Return the cap of the scores, 0 for none."""
    if not is_finite(value) or value < 0.0:
        raise ValueError(f"softcap must be a finite number, 0 or more, got {value!r}")
    return float(value)


def window(causal: Any, window_size: Any) -> tuple[int, int]:
    """Return (left, right) with -1 for an open side; causal closes the right side at 0."""
    try:
        left, right = (operator.index(side) for side in window_size)
    except (TypeError, ValueError):
        raise ValueError(
            f"window_size must be two integers (left, right), got {window_size!r}"
        ) from None
    return _side(left), 0 if flag("causal", causal) else _side(right)


def reach(window_size: Any) -> int:
    """Return how many keys before its own a query sees, from their number with it; -1 for all."""
    try:
        number = operator.index(window_size)
    except TypeError:
        raise ValueError(f"window_size must be an integer, got {window_size!r}") from None
    if number == 0:
        raise ValueError("window_size must be positive, or negative for no window, got 0")
    return _side(number - 1) if number > 0 else -1


def _side(number: int) -> int:
    return min(max(number, -1), _WIDEST)
