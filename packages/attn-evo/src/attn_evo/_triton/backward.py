"""Backward pass: it recomputes the running sums of the forward pass, then scans back.

With n = q / denominator, gate = silu(n) v, x = sigmoid(f) context, f = W_f gate + b_f:

    ratio     n and 1 / denominator of each token, which the next two take
    norm      dx = LayerNorm'(dout), df and its part of dcontext
    gate      dgate, dn, dq, dlocal, dstat and their part of dv
    stat      dgated_t = sum_{s >= t} dstat_s, and through the gate of v on to the mean
    context   dv_t += sum_{s >= t} dcontext_s

Each of the five keeps few tiles alive, so that two or more programs share an SM. The first three
walk their chunk forwards, the others backwards, and hand sums over chunks to the next. Where a dy
of a product y = x W^T + b comes up, so does its share of dW = dy^T x; a last kernel adds up the
shares of all programs in a fixed order: the bits never change. Without `causal` there is one dstat
and one dcontext a head, and "total" replaces "stat".

Gradients of halved weights (see `tiles`) are twice those of the weights: so are dq, df and, of the
gate of v, dlogit here.

On Hopper kernels of `_hopper` take the place of most: there "norm" does the work of "ratio" too.
Where a program owns a whole sequence, "stat" also does that of "context".
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from attn_core.tiling import ceil_div
from attn_core.tuning import TileConfig
from attn_evo._backends import most_head_dim
from attn_evo._hopper import support
from attn_evo._triton import configs, wide
from attn_evo._triton.backward_context import backward_context
from attn_evo._triton.backward_gate import backward_gate
from attn_evo._triton.backward_norm import backward_norm
from attn_evo._triton.backward_products import (
    backward_final,
    backward_final_and_query,
    backward_products,
)
from attn_evo._triton.backward_ratio import backward_ratio
from attn_evo._triton.backward_stat import backward_stat
from attn_evo._triton.backward_total import backward_rows, backward_total
from attn_evo._triton.backward_weights import backward_weights
from attn_evo._triton.backward_work import work_of, work_of_whole_sequences
from attn_evo.weights import EvoWeights


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
) -> tuple[torch.Tensor, torch.Tensor, EvoWeights]:
    """Gradients of v, of the sums before it and of the weights.

    `dout` and `dsums_after` are the gradients of what `attention` returns.
    """
    B, H, _, D = v.shape
    if most_head_dim(v.dtype) < D:
        call = (v, weights, mask, sums, length, causal, accum_dtype, tiles)
        return wide.attention_backward(dout, dsums_after, *call)
    if v.numel() == 0:
        dsums = v.new_empty((2, B, H, D), dtype=torch.float32)
        zeros = EvoWeights(*(torch.zeros_like(weight) for weight in weights))
        dsums = dsums.zero_() if dsums_after is None else dsums.copy_(dsums_after)
        return v.new_empty(v.shape), dsums, zeros
    if dsums_after is None and support.takes_backward(
        v, mask is not None, sums is not None, causal
    ):
        dout = support.in_units(dout)
        if v.dtype == torch.float32:
            return _attention_backward_float32_on_hopper(dout, v, weights)
        return _attention_backward_on_hopper(dout, v, weights, causal)
    call = (v, weights, mask, sums, length, causal)
    launch = functools.partial(_attention_backward, dout, dsums_after, *call)
    return launch(configs.backward_tiles(v, causal, launch))


def _attention_backward(
    dout: torch.Tensor,
    dsums_after: torch.Tensor | None,
    v: torch.Tensor,
    weights: EvoWeights,
    mask: torch.Tensor | None,
    sums: torch.Tensor | None,
    length: torch.Tensor | None,
    causal: bool,
    config: TileConfig,
) -> tuple[torch.Tensor, torch.Tensor, EvoWeights]:
    work = work_of(v, weights, mask, sums, length, causal, dsums_after, config)
    backward_ratio(work)
    backward_norm(work, dout)
    backward_gate(work)
    backward_products(work)
    if causal:
        backward_stat(work)
        backward_context(work, drows=work.dsums)
    else:
        backward_context(work, backward_total(work))
    return work.dv, work.dsums, backward_weights(work, weights)


def _attention_backward_on_hopper(
    dout: torch.Tensor, v: torch.Tensor, weights: EvoWeights, causal: bool
) -> tuple[torch.Tensor, torch.Tensor, EvoWeights]:
    from attn_evo._hopper import backward_gate as gate
    from attn_evo._hopper import backward_norm as norm
    from attn_evo._hopper import backward_stat as stat
    from attn_evo._hopper import forward

    D = v.shape[-1]
    is_wide = support.HELD_DIM < D
    dout, v = support.in_tiles(dout), support.in_tiles(v)
    if causal and forward.owns_sequences(v):
        return _attention_backward_of_whole_sequences(dout, v, weights)
    work = work_of(v, weights, None, None, None, causal, None, configs.HOPPER_BACKWARD[D])
    if not causal:
        backward_rows(work)
    norm.backward_norm(work, dout)
    if is_wide:
        backward_final(work)
    gate.backward_gate(work)
    if is_wide:
        backward_products(work)
    if causal:
        stat.backward_stat(work)
        backward_context(work, drows=work.dsums)
    else:
        backward_context(work, backward_total(work))
    return work.dv, work.dsums, backward_weights(work, weights)


def _attention_backward_of_whole_sequences(
    dout: torch.Tensor, v: torch.Tensor, weights: EvoWeights
) -> tuple[torch.Tensor, torch.Tensor, EvoWeights]:
    """As the above, where a program owns a sequence and carries all sums itself."""
    from attn_evo._hopper.whole import backward_gate as gate
    from attn_evo._hopper.whole import backward_norm as norm
    from attn_evo._hopper.whole import backward_stat as stat

    work = work_of_whole_sequences(v, weights, configs.HOPPER_BACKWARD[v.shape[-1]])
    B, H, L, D = v.shape
    contexts = v.new_empty((B * H, ceil_div(L, support.PIECE), D), dtype=torch.float32)
    dq, dstat = torch.empty_like(work.half_ratio), torch.empty_like(work.df)
    norm.backward_norm(work, dout, contexts)
    gate.backward_gate(work, dq, dstat)
    backward_final_and_query(work, dq)
    stat.backward_stat(work, contexts, dstat)
    return work.dv, work.dsums, backward_weights(work, weights)


def _attention_backward_float32_on_hopper(
    dout: torch.Tensor, v: torch.Tensor, weights: EvoWeights
) -> tuple[torch.Tensor, torch.Tensor, EvoWeights]:
    from attn_evo._hopper.float32 import backward_gate as gate
    from attn_evo._hopper.float32 import backward_norm as norm
    from attn_evo._hopper.float32 import backward_stat as stat

    config = configs.HOPPER_BACKWARD_FLOAT32
    work = work_of(v, weights, None, None, None, True, None, config)
    norm.backward_norm(work, dout)
    gate.backward_gate(work)
    stat.backward_stat(work)
    backward_context(work._replace(call=work.call.in_parts), drows=work.dsums)
    return work.dv, work.dsums, backward_weights(work, weights)
