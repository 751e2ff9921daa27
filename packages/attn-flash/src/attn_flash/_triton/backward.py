"""Backward pass in two kernels and without atomics, so that its bits never change.

With P = exp(S - lse), Z the factors of dropout, dP = Z * (dO V^T), delta = rowsum(dO * O) - dlse
and C the damping of softcapping, 1 without it:

    dS = P * (dP - delta),   dQ = scale (C * dS) K,   dK = scale (C * dS)^T Q,   dV = (Z * P)^T dO.

`backward_dq` owns BLOCK_M queries, computes their delta and dQ; `backward_dk_dv` owns BLOCK_N keys,
reads delta and computes dK and dV. S and dP are computed twice: seven products for the five of a
single pass with atomics. Dao, "FlashAttention-2", 2023, algorithm 2. The gradient of a bias is dS
without C: the first kernel writes it where there is memory for all of it, else `backward_bias`
computes it again. That of a sink is -sum of exp(sink - lse) delta.
"""

import math

import torch

from attn_core import tiling
from attn_flash import one_key
from attn_flash._triton import problem
from attn_flash._triton.backward_bias import bias_gradient
from attn_flash._triton.backward_dk_dv import key_gradients
from attn_flash._triton.backward_dq import query_gradient
from attn_flash.options import Options

# What the gradient of a bias may take before it is summed: in copies of the bias, or in elements.
_MOST_COPIES = 8
_MOST_EXPANDED = 1 << 29
_WIDEST_HEAD = 256  # bytes, of those that are summed so


def attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    needs_dbias: bool,
    options: Options,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of q, k, v, attn_bias and sinks, given those of out and, maybe, lse."""
    size = problem.size(q, k, v, options)
    bias, sinks = options.attn_bias if needs_dbias else None, options.sinks
    if size.B * size.M * size.H * size.N == 0:
        return _empty_gradients(dlse, lse, q, k, v, bias, sinks)
    if one_key.is_one_key(k, options):
        scale, softcap = options.scale, options.softcap
        return *one_key.gradients(dout, dlse, q, k, v, lse, scale, softcap), None, None
    rows = torch.empty((*lse.shape, 2), dtype=torch.float32, device=q.device)
    if options.is_varlen and sinks is not None:
        rows.zero_()  # of tokens that are in no sequence
    options = problem.with_added_bias(q, size, problem.with_narrow_bias(options))
    terms = problem.score_terms(q, size, options)
    dbias = None if bias is None else _expanded_dbias(bias, q, size, options)
    dq = query_gradient(dout, dlse, q, k, v, out, lse, rows, dbias, size, terms, options)
    dk, dv = key_gradients(dout, q, k, v, rows, size, terms, options)
    if dbias is not None:
        dbias = dbias.sum_to_size(bias.shape)
    elif bias is not None:
        dbias = bias_gradient(dout, q, k, v, rows, size, terms, options).to(bias.dtype)
    return dq, dk, dv, dbias, None if sinks is None else _dsinks(sinks, rows)


def _empty_gradients(dlse, lse, q, k, v, bias, sinks):
    """Gradients where no query has a key: where it is in a sequence, a sink alone is its lse."""
    grads = [None if x is None else x.new_zeros(x.shape) for x in (q, k, v, bias, sinks)]
    if sinks is not None and dlse is not None:
        of_sinks = dlse.where(lse != -torch.inf, 0.0).sum(-1)  # [B, H] or [H]
        grads[4] = of_sinks.sum_to_size(sinks.shape).to(sinks.dtype)
    return tuple(grads)


def _dsinks(sinks: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Gradient of sinks (H,), summed over the queries of `rows` (..., H, M, 2)."""
    lse_log2, delta = rows.unbind(-1)
    share = torch.exp2(sinks.float()[:, None] * problem.LOG2_E - lse_log2)
    grad = -(share * delta).sum(-1)
    return (grad.sum(0) if grad.dim() == 2 else grad).to(sinks.dtype)


def _expanded_dbias(bias, q, size, options):
    """Memory for the gradient of a bias (B, H, M, N) before it is summed, or None for too much.

    Triton stores tiles through shared memory, of which wide heads and biases leave too little.
    """
    whole = (size.B, size.H, size.M, size.N)
    limit = max(_MOST_COPIES * bias.numel(), _MOST_EXPANDED)
    if bias.shape[2:] != whole[2:] or math.prod(whole) > limit:
        return None
    head_bytes = tiling.padded_head_dim(max(size.D, size.D_v)) * q.element_size()
    if bias.element_size() != q.element_size() or head_bytes > _WIDEST_HEAD:
        return None
    is_all_written = options.window == (-1, -1) and not options.is_varlen
    return bias.new_empty(whole) if is_all_written else bias.new_zeros(whole)
