"""What the problems are, and the checks that turn arguments into them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from attn_core import checks
from attn_evo.state import EvoState
from attn_evo.weights import EvoWeights

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ACCUM_DTYPES = (torch.float32, torch.float64)


class AttentionProblem(NamedTuple):
    """The static facts of one call: all that a backend needs to accept or refuse it.

    `accum_dtype` is that of the running sums. `tiles` is empty, or (block_m, num_warps, num_stages)
    with 0 for what is left to the backend. `has_state` says that tokens came before.
    """

    device: torch.device
    dtype: torch.dtype
    weight_dtype: torch.dtype
    accum_dtype: torch.dtype
    batch: int
    heads: int
    length: int
    head_dim: int
    causal: bool
    has_mask: bool
    has_state: bool
    tiles: tuple[int, ...]
    needs_grad: bool


class PrefixSumProblem(NamedTuple):
    """The static facts of one prefix sum along dimension `dim`, counted from the first."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    dim: int
    exclusive: bool
    reverse: bool
    needs_grad: bool


def attention_problem(
    v: torch.Tensor,
    weights: EvoWeights,
    mask: torch.Tensor | None,
    sums: torch.Tensor | None,
    causal: bool,
    accum_dtype: torch.dtype,
    tiles: tuple[int, ...],
) -> AttentionProblem:
    """Describe the problem that checked arguments pose."""
    batch, heads, length, head_dim = v.shape
    tensors = (v, *weights) if sums is None else (v, sums, *weights)
    return AttentionProblem(
        v.device,
        v.dtype,
        weights.w_q.dtype,
        accum_dtype,
        batch,
        heads,
        length,
        head_dim,
        causal,
        mask is not None,
        sums is not None,
        tiles,
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
    )


def prefix_sum_problem(
    x: torch.Tensor, dim: int, exclusive: bool, reverse: bool
) -> PrefixSumProblem:
    """Validate x and dim, and describe the problem they pose."""
    checks.require_tensor("x", x)
    checks.require_dtype("x", x, DTYPES)
    if not isinstance(dim, int) or not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim must be a dimension of x, of shape {tuple(x.shape)}, got {dim!r}")
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    shape = tuple(x.shape)
    return PrefixSumProblem(x.device, x.dtype, shape, dim % x.dim(), exclusive, reverse, needs_grad)


def require_values(v: torch.Tensor) -> None:
    """Check v on its own."""
    checks.require_rank("v", v, "(B, H, L, D)")
    checks.require_dtype("v", v, DTYPES)
    if v.shape[-1] == 0:
        raise ValueError(f"v must have a head dimension of at least 1, got shape {tuple(v.shape)}")


def weights_for(v: torch.Tensor, weights: EvoWeights | None) -> EvoWeights:
    """Return the weights, the parameter-free ones where none are given."""
    if weights is None:
        return EvoWeights.identity(v.shape[-1], dtype=v.dtype, device=v.device)
    if not isinstance(weights, EvoWeights):
        raise ValueError(f"weights must be EvoWeights or None, got {type(weights).__name__}")
    return weights


def require_weights(weights: EvoWeights, v: torch.Tensor) -> None:
    """Check that the weights fit v and each other."""
    dim = v.shape[-1]
    first = weights.w_q
    checks.require_rank("weights.w_q", first, "(D, D)")
    checks.require_dtype("weights.w_q", first, DTYPES)
    checks.require_device("weights.w_q", first, "v", v)
    for name, weight in zip(EvoWeights._fields, weights, strict=True):
        checks.require_like(f"weights.{name}", weight, "weights.w_q", first)
        if name.startswith("w_"):
            checks.require_shape(f"weights.{name}", weight, "(D, D)", (dim, dim))
        else:
            checks.require_shape(f"weights.{name}", weight, "(D,)", (dim,))


def masked_values(
    v: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return v and the mask of the operator, (B, L) bool; a floating mask goes into v."""
    if mask is None:
        return v, None
    checks.require_tensor("attention_mask", mask)
    checks.require_device("attention_mask", mask, "v", v)
    batch, _, length, _ = v.shape
    shapes = ((batch, length), (batch, 1, length), (batch, 1, length, 1))
    if tuple(mask.shape) not in shapes:
        raise ValueError(
            "attention_mask must have shape (B, L), (B, 1, L) or (B, 1, L, 1) with B = "
            f"{batch} and L = {length}, got {tuple(mask.shape)}"
        )
    if mask.is_complex():
        raise ValueError(f"attention_mask must be of bool or real numbers, got {mask.dtype}")
    mask = mask.reshape(batch, length)
    if mask.is_floating_point():
        return v * mask[:, None, :, None].to(v.dtype), None
    return v, mask if mask.dtype == torch.bool else mask != 0


def require_state(state: EvoState | None, v: torch.Tensor) -> None:
    """Check the state of the tokens before v."""
    if state is None:
        return
    if not isinstance(state, EvoState):
        raise ValueError(f"state must be an EvoState or None, got {type(state).__name__}")
    batch, heads, _, dim = v.shape
    checks.require_shape("state.sums", state.sums, "(2, B, H, D)", (2, batch, heads, dim))
    checks.require_dtype("state.sums", state.sums, ACCUM_DTYPES)
    checks.require_device("state.sums", state.sums, "v", v)
    checks.require_shape("state.length", state.length, "()", ())
    checks.require_dtype("state.length", state.length, (torch.int64,))
    checks.require_device("state.length", state.length, "v", v)


def accum_dtype_for(
    v: torch.Tensor, accum_dtype: torch.dtype | None, sums: torch.Tensor | None
) -> torch.dtype:
    """Return the dtype of the sums: float32 unless v, the state or the caller have float64."""
    is_dtype = isinstance(accum_dtype, torch.dtype)
    if accum_dtype is not None and not (is_dtype and accum_dtype in ACCUM_DTYPES):
        raise ValueError(f"accum_dtype must be None, float32 or float64, got {accum_dtype}")
    least = torch.float64 if v.dtype == torch.float64 else torch.float32
    chosen = accum_dtype or (least if sums is None else sums.dtype)
    if least == torch.float64 and chosen != least:
        raise ValueError(f"accum_dtype must be float64 for v in float64, got {chosen}")
    if sums is not None and chosen != sums.dtype:
        raise ValueError(f"accum_dtype must be that of state.sums, {sums.dtype}, got {chosen}")
    return chosen


def tiles(block_m: int | None, num_warps: int | None, num_stages: int | None) -> tuple[int, ...]:
    """Return the hints as the operator takes them: none at all, or three with 0 for each None."""
    hints = {"block_m": block_m, "num_warps": num_warps, "num_stages": num_stages}
    if all(hint is None for hint in hints.values()):
        return ()
    for name, hint in hints.items():
        is_integer = isinstance(hint, int) and not isinstance(hint, bool)
        if hint is not None and not (is_integer and hint > 0):
            raise ValueError(f"{name} must be a positive integer or None, got {hint!r}")
    return tuple(hint or 0 for hint in hints.values())
