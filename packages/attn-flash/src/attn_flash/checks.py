"""What an attention problem is, and the checks that turn arguments into one."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch

from attn_core import checks

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class AttentionProblem(NamedTuple):
    """The static facts of one call: all that a backend needs to accept or refuse it.

    `window` is (left, right): query i sees keys ``i + N - M - left`` to ``i + N - M + right``,
    both included; -1 leaves a side open. Causal attention is a window closed on the right, (-1, 0).
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    len_q: int
    len_k: int
    heads: int
    heads_kv: int
    head_dim: int
    window: tuple[int, int]
    needs_grad: bool


def attention_problem(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: tuple[int, int]
) -> AttentionProblem:
    """Validate q (B, M, H, D), k and v (B, N, H_KV, D) and describe the problem they pose."""
    checks.require_rank("q", q, "(B, M, H, D)")
    checks.require_dtype("q", q, DTYPES)
    checks.require_rank("k", k, "(B, N, H_KV, D)")
    checks.require_like("k", k, "q", q)
    checks.require_like("v", v, "q", q)
    batch, len_q, heads, head_dim = q.shape
    _, len_k, heads_kv, _ = k.shape
    checks.require_shape("k", k, "(B, N, H_KV, D)", (batch, len_k, heads_kv, head_dim))
    checks.require_shape("v", v, "(B, N, H_KV, D)", k.shape)
    checks.require_multiple("the number of heads of q", heads, "that of k and v", heads_kv)
    checks.require_range("the head dimension of q", head_dim, 1, MAX_HEAD_DIM)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return AttentionProblem(
        q.device, q.dtype, batch, len_q, len_k, heads, heads_kv, head_dim, window, needs_grad
    )


def softmax_scale(value: float | None, head_dim: int) -> float:
    """Return the scale, ``1 / sqrt(head_dim)`` where none is given."""
    if value is None:
        default: float = float(head_dim) ** -0.5
        return default
    try:
        is_number = not isinstance(value, torch.Tensor) and math.isfinite(value)
    except TypeError:
        is_number = False
    if not is_number:
        raise ValueError(f"softmax_scale must be a finite number or None, got {value!r}")
    return float(value)


def window(causal: bool, window_size: Sequence[int]) -> tuple[int, int]:
    """Return (left, right) with -1 for an open side; causal closes the right side at 0."""
    try:
        left, right = (operator.index(side) for side in window_size)
    except (TypeError, ValueError):
        raise ValueError(
            f"window_size must be two integers (left, right), got {window_size!r}"
        ) from None
    if causal:
        right = 0
    return (left if left >= 0 else -1), (right if right >= 0 else -1)


def binding_window(window: tuple[int, int], len_q: int, len_k: int) -> tuple[int, int]:
    """Return the window with -1 for a side that hides nothing at these lengths."""
    left, right = window
    return (left if left < len_k - 1 else -1), (right if right < len_q - 1 else -1)
