"""Backend "torch": right on every device torch has.

Everything is computed in float32, or in float64 where that is asked for. Sums run in two levels,
so that their rounding errors do not grow with the number of tokens. The backward pass recomputes
the forward one and keeps nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from attn_evo.reference import EPSILON, NORM_EPSILON, token_count
from attn_evo.weights import EvoWeights

_CHUNK = 1024  # tokens of the lower level of a sum


Scan = Callable[[torch.Tensor, bool], torch.Tensor]
"""Sums x (B, H, L, D) along L up to each token, or from each one on where the flag is set."""


class _Sums(NamedTuple):
    """Step one. All (B, H, T, D), T = L in causal problems and 1 in others; seen (T, 1)."""

    context: torch.Tensor
    seen: torch.Tensor
    gate: torch.Tensor
    stat: torch.Tensor


class _Gates(NamedTuple):
    """Step two, token by token. All (B, H, L, D), but alive (B, H, L, 1)."""

    local: torch.Tensor
    denominator: torch.Tensor
    ratio: torch.Tensor
    gate: torch.Tensor
    final: torch.Tensor
    alive: torch.Tensor


def _scan(x: torch.Tensor, reverse: bool) -> torch.Tensor:
    return _running_sum(x.flip(2), 2).flip(2) if reverse else _running_sum(x, 2)


def attention(
    v: torch.Tensor,
    weights: EvoWeights,
    mask: torch.Tensor | None,
    sums: torch.Tensor | None,
    length: torch.Tensor | None,
    causal: bool,
    accum_dtype: torch.dtype,
    tiles: Sequence[int],
    scan: Scan = _scan,
) -> tuple[torch.Tensor, torch.Tensor]:
    """EvoAttention of v (B, H, L, D): out like v, and the sums (2, B, H, D) up to its end."""
    before = _sums_before(v, sums, accum_dtype)
    if v.numel() == 0:
        return v.new_empty(v.shape), before.clone()
    values, weights = _values(v, mask, accum_dtype), _cast(weights, accum_dtype)
    step = _sums(values, weights, before, length, causal, scan)
    gates = _gates(values, weights, step.stat)
    x = gates.final * step.context * gates.alive
    out = F.layer_norm(x, x.shape[-1:], weights.norm_weight, weights.norm_bias, NORM_EPSILON)
    return out.to(v.dtype), torch.stack((step.context[:, :, -1], step.stat[:, :, -1]))


def attention_backward(
    dout: torch.Tensor,
    dsums_after: torch.Tensor | None,
    v: torch.Tensor,
    weights: EvoWeights,
    mask: torch.Tensor | None,
    sums: torch.Tensor | None,
    length: torch.Tensor | None,
    causal: bool,
    accum_dtype: torch.dtype,
    tiles: Sequence[int],
    scan: Scan = _scan,
) -> tuple[torch.Tensor, torch.Tensor, EvoWeights]:
    """Gradients of v, of the sums before it and of the weights.

    `dout` and `dsums_after` are the gradients of what `attention` returns.
    """
    before = _sums_before(v, sums, accum_dtype)
    if dsums_after is None:
        dsums_after = torch.zeros_like(before)
    if v.numel() == 0:
        return _no_tokens_backward(v, dsums_after, weights)
    values, cast = _values(v, mask, accum_dtype), _cast(weights, accum_dtype)
    step = _sums(values, cast, before, length, causal, scan)
    gates = _gates(values, cast, step.stat)
    dx, dnorm_weight, dnorm_bias = _layer_norm_backward(dout.to(accum_dtype), step, gates, cast)

    # out = LayerNorm(final * context * alive), final = sigmoid(W_f gate + b_f)
    dx = dx * gates.alive
    dcontext = _per_sum(dx * gates.final, causal)
    dfinal = dx * step.context * gates.final * (1 - gates.final)
    dw_f, db_f = _linear_backward(dfinal, gates.gate)
    dgate = dfinal @ cast.w_f

    # gate = silu(ratio) v, ratio = q / denominator
    s = torch.sigmoid(gates.ratio)
    dratio = dgate * values * s * (1 + gates.ratio * (1 - s))
    dq = dratio / gates.denominator
    dw_q, db_q = _linear_backward(dq, values)

    # denominator = |stat| + |local| + epsilon
    ddenominator = -dq * gates.ratio
    dlocal = ddenominator * gates.local.sign()
    dw_l, db_l = _linear_backward(dlocal, values)
    dstat = _per_sum(ddenominator * step.stat.sign(), causal)
    dstat[:, :, -1] += dsums_after[1]

    # stat = S(gate_s v), gate_s = sigmoid(W_g mean + b_g), mean = context / seen
    dgated = _sum_backward(dstat, causal, scan)
    dlogit = _per_sum(dgated * values, causal) * step.gate * (1 - step.gate)
    dw_g, db_g = _linear_backward(dlogit, step.context / step.seen)
    dcontext += dlogit @ cast.w_g / step.seen
    dcontext[:, :, -1] += dsums_after[0]

    dv = dgate * gates.ratio * s + dq @ cast.w_q + dlocal @ cast.w_l
    dv += dgated * step.gate + _sum_backward(dcontext, causal, scan)
    if mask is not None:
        dv.masked_fill_(~mask[:, None, :, None], 0)
    dweights = (dw_q, db_q, dw_l, db_l, dw_g, db_g, dw_f, db_f, dnorm_weight, dnorm_bias)
    return (
        dv.to(v.dtype).contiguous(),
        torch.stack((dcontext.sum(dim=2), dstat.sum(dim=2))),
        EvoWeights(*(grad.to(w.dtype) for grad, w in zip(dweights, weights, strict=True))),
    )


def prefix_sum(x: torch.Tensor, dim: int, exclusive: bool, reverse: bool) -> torch.Tensor:
    """Prefix sum of x along `dim`, accumulated in float32 at least."""
    out = x.to(torch.promote_types(x.dtype, torch.float32))
    out = out.flip(dim) if reverse else out
    out = _running_sum(out, dim)
    out = _delayed(out, dim) if exclusive else out
    out = out.flip(dim) if reverse else out
    return out.to(x.dtype).contiguous()


def prefix_sum_backward(
    dout: torch.Tensor, dim: int, exclusive: bool, reverse: bool
) -> torch.Tensor:
    """Gradient of x: what an element is added to lies on the other side of it."""
    return prefix_sum(dout, dim, exclusive, not reverse)


def _sums(
    v: torch.Tensor,
    weights: EvoWeights,
    before: torch.Tensor,
    length: torch.Tensor | None,
    causal: bool,
    scan: Scan,
) -> _Sums:
    before_context, before_stat = before[:, :, :, None]
    context = before_context + _sum(v, causal, scan)
    seen = token_count(v, causal, length)
    gate = torch.sigmoid(F.linear(context / seen, weights.w_g, weights.b_g))
    return _Sums(context, seen, gate, before_stat + _sum(gate * v, causal, scan))


def _gates(v: torch.Tensor, weights: EvoWeights, stat: torch.Tensor) -> _Gates:
    local = F.linear(v, weights.w_l, weights.b_l)
    denominator = stat.abs() + local.abs() + EPSILON
    ratio = F.linear(v, weights.w_q, weights.b_q) / denominator
    gate = F.silu(ratio) * v
    final = torch.sigmoid(F.linear(gate, weights.w_f, weights.b_f))
    return _Gates(local, denominator, ratio, gate, final, (v != 0).any(dim=-1, keepdim=True))


def _sum(x: torch.Tensor, causal: bool, scan: Scan) -> torch.Tensor:
    return scan(x, False) if causal else x.sum(dim=2, keepdim=True)


def _sum_backward(dsum: torch.Tensor, causal: bool, scan: Scan) -> torch.Tensor:
    return scan(dsum, True) if causal else dsum


def _per_sum(dsum: torch.Tensor, causal: bool) -> torch.Tensor:
    """Gradients by token as gradients by sum: without `causal` all tokens share one."""
    return dsum if causal else dsum.sum(dim=2, keepdim=True)


def _running_sum(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Inclusive prefix sum in chunks, each of which adds the sum of those before it."""
    dim, length = dim % x.dim(), x.shape[dim]
    if length <= _CHUNK or x.numel() == 0:
        return x.cumsum(dim)
    padded = _padded(x, dim, 0, -length % _CHUNK)
    chunks: torch.Tensor = padded.unflatten(dim, (-1, _CHUNK)).cumsum(dim + 1)
    before = _delayed(_running_sum(chunks.select(dim + 1, -1), dim), dim)
    return (chunks + before.unsqueeze(dim + 1)).flatten(dim, dim + 1).narrow(dim, 0, length)


def _delayed(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Move x one step along `dim`: a zero comes in, the last element falls out."""
    if x.numel() == 0:  # torch 2.6 pads no empty tensor
        return torch.zeros_like(x)
    return _padded(x, dim, 1, 0).narrow(dim, 0, x.shape[dim])


def _padded(x: torch.Tensor, dim: int, before: int, after: int) -> torch.Tensor:
    if before == after == 0:
        return x
    dims_behind = x.dim() - 1 - dim % x.dim()
    return F.pad(x, [0, 0] * dims_behind + [before, after])


def _linear_backward(dy: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the matrix and the bias of ``y = x @ w.T + b``."""
    dy, x = dy.flatten(0, 2), x.flatten(0, 2)
    return dy.T @ x, dy.sum(dim=0)


def _layer_norm_backward(
    dout: torch.Tensor, step: _Sums, gates: _Gates, weights: EvoWeights
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = gates.final * step.context * gates.alive
    dim = x.shape[-1:]
    _, mean, scale = torch.native_layer_norm(x, dim, *weights[-2:], NORM_EPSILON)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dout, x, dim, mean, scale, *weights[-2:], [True, True, True]
    )
    return dx, dweight, dbias


def _no_tokens_backward(
    v: torch.Tensor, dsums: torch.Tensor, weights: EvoWeights
) -> tuple[torch.Tensor, torch.Tensor, EvoWeights]:
    zeros = EvoWeights(*(torch.zeros_like(weight) for weight in weights))
    return v.new_empty(v.shape), dsums.clone(), zeros


def _sums_before(v: torch.Tensor, sums: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    batch, heads, _, dim = v.shape
    return v.new_zeros((2, batch, heads, dim), dtype=dtype) if sums is None else sums


def _values(v: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    if mask is not None:
        v = v.masked_fill(~mask[:, None, :, None], 0)
    return v.to(dtype)


def _cast(weights: EvoWeights, dtype: torch.dtype) -> EvoWeights:
    return EvoWeights(*(weight.to(dtype) for weight in weights))
