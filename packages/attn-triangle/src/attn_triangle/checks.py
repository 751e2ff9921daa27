"""What a triangle attention problem is, and the checks that turn arguments into one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from attn_core import arguments, checks
from attn_triangle.layout import is_aligned

MAX_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MASKED_ROWS = ("mean", "zero")


class TriangleProblem(NamedTuple):
    """The static facts of one call: all that a backend needs to accept or refuse it.

    `batch` is the product of the leading dimensions, `rows` the number R of independent rows, each
    with `len_q` queries and `len_k` keys. `is_aligned` says of q, k and v what `layout.is_aligned`
    says of a tensor.
    """

    device: torch.device
    dtype: torch.dtype
    bias_dtype: torch.dtype
    batch: int
    heads: int
    rows: int
    len_q: int
    len_k: int
    head_dim: int
    has_mask: bool
    masked_rows: str
    needs_grad: bool
    mask_is_additive: bool = False
    is_aligned: bool = True
    scale: float = 1.0


class GateProblem(NamedTuple):
    """What a backend needs to know of a gate."""

    device: torch.device
    dtype: torch.dtype
    needs_grad: bool


def triangle_problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    masked_rows: str,
) -> TriangleProblem:
    """Validate the arguments of `triangle_attention` and describe the problem they pose."""
    _require_min_rank("q", q, 4, "(*, H, R, M, D)")
    checks.require_dtype("q", q, DTYPES)
    _require_min_rank("k", k, 4, "(*, H, R, N, D)")
    checks.require_like("k", k, "q", q)
    checks.require_like("v", v, "q", q)
    *batch, heads, rows, len_q, head_dim = q.shape
    len_k = k.shape[-2]
    checks.require_shape("k", k, "(*, H, R, N, D)", (*batch, heads, rows, len_k, head_dim))
    checks.require_shape("v", v, "(*, H, R, N, D)", k.shape)
    checks.require_range("the head dimension of q", head_dim, 1, MAX_HEAD_DIM)
    _require_bias(bias, q, (*batch, heads, len_q, len_k))
    if mask is not None:
        _require_mask(mask, q, (*batch, rows, len_k))
    if not isinstance(masked_rows, str) or masked_rows not in MASKED_ROWS:
        raise ValueError(f"masked_rows must be one of {MASKED_ROWS}, got {masked_rows!r}")
    tensors = (q, k, v, bias) if mask is None else (q, k, v, bias, mask)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    scale = arguments.softmax_scale(scale, head_dim, "scale")
    return describe(q, k, v, bias, mask, scale, masked_rows, needs_grad)


def describe(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    masked_rows: str,
    needs_grad: bool,
) -> TriangleProblem:
    """Describe the problem that valid arguments pose."""
    *batch, heads, rows, len_q, head_dim = q.shape
    return TriangleProblem(
        q.device,
        q.dtype,
        bias.dtype,
        math.prod(batch),
        heads,
        rows,
        len_q,
        k.shape[-2],
        head_dim,
        mask is not None,
        masked_rows,
        needs_grad,
        mask is not None and mask.dtype != torch.bool,
        # While a compiler traces, no backend is chosen and strides may be symbols.
        torch.compiler.is_compiling() or all(is_aligned(x) for x in (q, k, v)),
        scale,
    )


def _require_bias(bias: torch.Tensor, q: torch.Tensor, full: Sequence[int]) -> None:
    _require_min_rank("bias", bias, 3, "(*, H, M, N)")
    if bias.dtype != torch.float32:
        checks.require_like("bias", bias, "q", q)
    checks.require_device("bias", bias, "q", q)
    _require_broadcastable("bias", bias, "(*, H, M, N)", full)


def _require_mask(mask: torch.Tensor, q: torch.Tensor, full: Sequence[int]) -> None:
    _require_min_rank("mask", mask, 2, "(*, R, N)")
    checks.require_dtype("mask", mask, tuple({torch.bool: 0, q.dtype: 0, torch.float32: 0}))
    checks.require_device("mask", mask, "q", q)
    _require_broadcastable("mask", mask, "(*, R, N)", full)


def _require_min_rank(name: str, tensor: torch.Tensor, rank: int, symbols: str) -> None:
    checks.require_tensor(name, tensor)
    if tensor.dim() < rank:
        raise ValueError(
            f"{name} must have at least {rank} dimensions {symbols}, got shape "
            f"{tuple(tensor.shape)}"
        )


def _require_broadcastable(
    name: str, tensor: torch.Tensor, symbols: str, full: Sequence[int]
) -> None:
    # Indices and ==, not zip and `in`: torch 2.6 compiles neither for sizes that are symbols.
    rank = tensor.dim()
    fits = rank <= len(full) and all(
        tensor.shape[-i] == 1 or tensor.shape[-i] == full[-i] for i in range(1, rank + 1)
    )
    if not fits:
        raise ValueError(
            f"{name} must have shape {symbols} = {tuple(full)}, or 1 in place of any size, got "
            f"{tuple(tensor.shape)}"
        )
