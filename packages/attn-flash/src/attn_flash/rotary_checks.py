"""What a problem of rotary embedding is, and the checks that turn arguments into one."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch

from attn_core import checks
from attn_flash.checks import length

MAX_HEAD_DIM = 1024
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class RotaryProblem(NamedTuple):
    """The static facts of one call: all that a backend needs to accept or refuse it."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    rotary_dim: int
    interleaved: bool
    is_varlen: bool
    needs_grad: bool


def rotary_problem(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    seqlen_offsets: torch.Tensor | None,
    offset: int,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    name: str = "x",
    tables: tuple[str, str] = ("cos", "sin"),
) -> RotaryProblem:
    """Validate the arguments of `apply_rotary_emb` and describe the problem they pose."""
    if cu_seqlens is not None:
        checks.require_tensor("cu_seqlens", cu_seqlens)
    checks.require_rank(name, x, "(B, S, H, D)" if cu_seqlens is None else "(T, H, D)")
    checks.require_dtype(name, x, DTYPES)
    check_tables(tables[0], cos, tables[1], sin, name, x)
    batch = x.shape[0]
    checks.require_range(f"the head dimension of {name}", x.shape[-1], 1, MAX_HEAD_DIM)
    if cu_seqlens is not None:
        batch = _check_cu_seqlens(name, x, cu_seqlens, max_seqlen)
    if seqlen_offsets is not None:
        checks.require_shape("seqlen_offsets", seqlen_offsets, "(B,)", (batch,))
        checks.require_dtype("seqlen_offsets", seqlen_offsets, (torch.int32, torch.int64))
        checks.require_device("seqlen_offsets", seqlen_offsets, name, x)
    _check_positions(x, tables[0], cos, seqlen_offsets, offset, cu_seqlens, max_seqlen)
    return describe(x, cos, interleaved, cu_seqlens)


def describe(
    x: torch.Tensor, cos: torch.Tensor, interleaved: bool, cu_seqlens: torch.Tensor | None
) -> RotaryProblem:
    """Describe valid arguments of `apply_rotary_emb`."""
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    is_varlen = cu_seqlens is not None
    return RotaryProblem(
        x.device, x.dtype, tuple(x.shape), 2 * cos.shape[1], interleaved, is_varlen, needs_grad
    )


def check_tables(
    cos_name: str, cos: torch.Tensor, sin_name: str, sin: torch.Tensor, x_name: str, x: torch.Tensor
) -> None:
    """Check tables of cosines and sines, (S_rotary, D_rotary / 2), against what they rotate."""
    checks.require_rank(cos_name, cos, "(S_rotary, D_rotary / 2)")
    allowed = (x.dtype,) if x.dtype == torch.float32 else (x.dtype, torch.float32)
    checks.require_dtype(cos_name, cos, allowed)
    checks.require_device(cos_name, cos, x_name, x)
    checks.require_shape(sin_name, sin, "(S_rotary, D_rotary / 2)", cos.shape)
    checks.require_like(sin_name, sin, cos_name, cos)
    head_dim = x.shape[-1]
    if 2 * cos.shape[1] > head_dim:
        raise ValueError(
            f"{cos_name} must have at most half as many columns as {x_name} has, "
            f"{head_dim} // 2, got {cos.shape[1]}"
        )
    for name, table in ((cos_name, cos), (sin_name, sin)):
        if torch.is_grad_enabled() and table.requires_grad:
            raise ValueError(f"{name} must not require a gradient: rotation does not give one")


def check_rows(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Check tables with a row for each token, (S, D_rotary / 2) or with dimensions before."""
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        checks.require_tensor(name, tensor)
        if tensor.dim() < 2:
            raise ValueError(
                f"{name} must have 2 dimensions or more, got shape {tuple(tensor.shape)}"
            )
    checks.require_shape("sin", sin, "(S, D_rotary / 2)", cos.shape)
    checks.require_device("cos", cos, "x", x)
    checks.require_device("sin", sin, "x", x)
    tokens, rows = x.shape[:-2], cos.shape[:-1]
    sizes = zip(reversed(rows), reversed(tokens), strict=False)
    if len(rows) > len(tokens) or any(a not in (1, b) for a, b in sizes):
        raise ValueError(f"cos must have a row for each token {tuple(tokens)}, got {tuple(rows)}")
    if 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(
            f"cos must have at most half as many columns as x has, {x.shape[-1]} // 2, got "
            f"{cos.shape[-1]}"
        )


def positive(name: str, value: Any) -> float:
    """Return a number that is finite and more than 0."""
    if not checks.is_finite(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number, more than 0, got {value!r}")
    return float(value)


def offsets(seqlen_offsets: Any) -> tuple[torch.Tensor | None, int]:
    """Split seqlen_offsets into a tensor and a number."""
    if isinstance(seqlen_offsets, torch.Tensor):
        return seqlen_offsets, 0
    try:
        return None, operator.index(seqlen_offsets)
    except TypeError:
        raise ValueError(
            f"seqlen_offsets must be an integer or a tensor (B,), got {seqlen_offsets!r}"
        ) from None


def require_values(name: str, values: torch.Tensor | None, low: int, high: int) -> None:
    """Check every value of a tensor of integers, if there is one."""
    if values is None or values.numel() == 0:
        return
    smallest, largest = (int(value) for value in values.aminmax())
    if smallest < low or largest > high:
        wrong = smallest if smallest < low else largest
        raise ValueError(f"{name} must hold values from {low} to {high}, got {wrong}")


def _check_cu_seqlens(
    name: str, x: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int | None
) -> int:
    checks.require_rank("cu_seqlens", cu_seqlens, "(B + 1,)")
    checks.require_dtype("cu_seqlens", cu_seqlens, (torch.int32,))
    checks.require_device("cu_seqlens", cu_seqlens, name, x)
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens must have shape (B + 1,), got (0,)")
    if max_seqlen is None:
        raise ValueError("max_seqlen must be given with cu_seqlens, got None")
    length("max_seqlen", max_seqlen)
    return cu_seqlens.shape[0] - 1


def _check_positions(
    x: torch.Tensor,
    cos_name: str,
    cos: torch.Tensor,
    seqlen_offsets: torch.Tensor | None,
    offset: int,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
) -> None:
    """Check that the tables have a row for each position, where that waits for no device."""
    longest = x.shape[1] if max_seqlen is None or cu_seqlens is None else max_seqlen
    room = cos.shape[0] - longest
    if room < 0:
        raise ValueError(
            f"{cos_name} must have a row for each of {longest} positions, got {cos.shape[0]} rows"
        )
    if seqlen_offsets is None and not 0 <= offset <= room:
        raise ValueError(
            f"seqlen_offsets must be from 0 to {room} (rows of {cos_name} less the sequence's "
            f"length), got {offset}"
        )
    if not checks.may_read_values(x):
        return
    require_values("seqlen_offsets", seqlen_offsets, 0, room)
    if cu_seqlens is not None:
        _check_bounds(cu_seqlens, x.shape[0], longest)


def _check_bounds(cu_seqlens: torch.Tensor, tokens: int, max_seqlen: int) -> None:
    lengths = cu_seqlens.diff()
    starts_at_zero = int(cu_seqlens[0]) == 0 and int(cu_seqlens[-1]) <= tokens
    if not starts_at_zero or (lengths < 0).any() or (lengths > max_seqlen).any():
        raise ValueError(
            f"cu_seqlens must grow from 0 to at most {tokens} in steps of at most max_seqlen = "
            f"{max_seqlen}, got {cu_seqlens.tolist()}"
        )
