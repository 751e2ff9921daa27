"""Arguments that several operators have, each checked and put in one form."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

from attn_core.checks import flag, is_finite, require_device, require_dtype, require_tensor
from attn_core.errors import UnsupportedProblemError

if TYPE_CHECKING:
    import torch

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


def require_slopes(alibi_slopes: torch.Tensor, batch: int, heads: int, q: torch.Tensor) -> None:
    """Check ALiBi's slopes, of heads or of heads in each of the batch."""
    import torch

    require_tensor("alibi_slopes", alibi_slopes)
    if tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes must have shape (H,) = ({heads},) or (B, H) = ({batch}, {heads}), "
            f"got {tuple(alibi_slopes.shape)}"
        )
    require_dtype("alibi_slopes", alibi_slopes, (torch.float32,))
    require_device("alibi_slopes", alibi_slopes, "q", q)


def require_no_grad(what: str, **tensors: torch.Tensor | None) -> None:
    """Refuse tensors whose gradient autograd would ask for: `what` has no backward pass."""
    import torch

    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise UnsupportedProblemError(
                f"{name} must not require a gradient, {what} has no backward pass: call it under "
                "torch.no_grad() or detach it"
            )


def _side(number: int) -> int:
    return min(max(number, -1), _WIDEST)
