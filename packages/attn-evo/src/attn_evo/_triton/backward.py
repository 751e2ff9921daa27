"""Backward pass: it recomputes the running sums of the forward pass, then scans back.

With n = q / denominator, gate = silu(n) v, x = sigmoid(f) context, f = W_f gate + b_f:

    tokens    dx = LayerNorm'(dout), then df, dgate, dn, dq, dlocal and dstat of each token
    stat      dgated_t = sum_{s >= t} dstat_s, and through the gate of v on to the mean
    context   dv_t += sum_{s >= t} dcontext_s
    weights   dW = dy^T x for the four products y = x W^T + b, and sums over tokens for the biases

"tokens" walks its chunk forwards, "stat" and "context" backwards; each hands sums over tiles and
chunks to the next. "weights" adds up tiles in as many programs as there are SMs, and a last kernel
adds up those, in a fixed order: the bits never change. Without `causal` there is one dstat and one
dcontext a head, and a few operations on rows replace "stat".

Gradients of halved weights (see `tiles`) are twice those of the weights: so are dq, da and df here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from attn_core.launch import Launcher
from attn_core.tiles.offsets import tile_offsets
from attn_evo._triton import configs, problem
from attn_evo._triton.forward import running_sums
from attn_evo._triton.tiles import (
    CONTEXT,
    DCONTEXT,
    DSTAT,
    NORM_BIAS,
    NORM_WEIGHT,
    STAT,
    W_F,
    W_G,
    W_L,
    W_Q,
    fresh,
    half_ratio_and_local,
    inverse_counts,
    inverse_denominator,
    is_kept,
    linear,
    load_matrix,
    load_state,
    load_tokens,
    load_vector,
    matrix,
    normalize,
    product,
    rounded,
    running_stat,
    scratch_ptrs,
    sigmoid_of_double,
    store_state,
    sum_rows,
    table_row,
    total_stat,
    triangle,
)
from attn_evo.weights import EvoWeights

# Scratch tensors [B * H, L, BLOCK_D] in one: first what is left in dy^T x, by weight, ...
_GATE = tl.constexpr(4)  # ... then what is right in it, where that is not v ...
_MEAN = tl.constexpr(5)  # so that x of W_F and W_G are two behind their dy
_DCONTEXT = tl.constexpr(6)
_NUM_SCRATCH = 7


# fmt: off
@triton.jit
def _values_ptrs(
    ptr, pid_bh, start, L,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Pointers [BLOCK_M, BLOCK_D] into [B, H, L, D], contiguous, and which are inside."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    ptr += (pid_bh.to(tl.int64) * L + start) * HEAD_DIM
    mask = (offs_m < L - start)[:, None] & (offs_d < HEAD_DIM)[None, :]
    return ptr + tile_offsets(offs_m, HEAD_DIM, offs_d, 1), mask


@triton.jit
def _times_sign(x, y):
    """Give x the sign of y times its own; 0 where y is 0."""
    return tl.where(y > 0, x, tl.where(y < 0, -x, 0.0))


# fmt: off
@triton.jit
def _normalize_backward(
    dout, x, scale, vectors_ptr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Gradient of what `normalize` got, from that of the norm's output and what it returned."""
    dx = dout * load_vector(vectors_ptr, NORM_WEIGHT, BLOCK_D)
    mean = tl.sum(dx, 1)[:, None] * (1.0 / HEAD_DIM)
    along_x = tl.sum(dx * x, 1)[:, None] * (1.0 / HEAD_DIM)
    return scale[:, None] * (dx - mean - x * along_x)


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_tokens_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl, stride_vd,
    mask_ptr, stride_mb, stride_ml,
    sums_ptr, stride_sk, stride_sb, stride_sh, stride_sd,
    length_ptr,
    matrices_ptr, vectors_ptr, tile_sums_ptr, chunk_sums_ptr,
    contexts_ptr,  # [B * H, tiles, BLOCK_D]: the context before each tile
    dout_ptr, stride_dob, stride_doh, stride_dol, stride_dod,
    scratch_ptr,  # [7, B * H, L, BLOCK_D], contiguous
    norm_sums_ptr,  # [2, B * H, tiles, BLOCK_D]: gradients of the norm's weight and bias
    dv_ptr,  # [B, H, L, D], contiguous
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
    IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_STATE: tl.constexpr, PRECISION: tl.constexpr, IS_NVIDIA: tl.constexpr,
    WEIGHTS_STAY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    pid_bh = tl.program_id(0) // num_chunks
    pid_c = tl.program_id(0) % num_chunks
    b = (pid_bh // H).to(tl.int64)
    h = (pid_bh % H).to(tl.int64)
    v_ptr += b * stride_vb + h * stride_vh
    mask_ptr += b * stride_mb
    dout_ptr += b * stride_dob + h * stride_doh
    scratch_size = tl.cast(num_heads, tl.int64) * L * BLOCK_D
    dtype: tl.constexpr = v_ptr.dtype.element_ty
    IS_BFLOAT16: tl.constexpr = dtype == tl.bfloat16

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    w_q = matrix(matrices_ptr, W_Q, WEIGHTS_STAY, BLOCK_D)
    w_l = matrix(matrices_ptr, W_L, WEIGHTS_STAY, BLOCK_D)
    w_f = matrix(matrices_ptr, W_F, WEIGHTS_STAY, BLOCK_D)
    chunk_sums = table_row(
        chunk_sums_ptr, STAT if IS_CAUSAL else CONTEXT, num_heads, pid_bh, num_chunks, 0, BLOCK_D
    )
    if IS_CAUSAL:
        w_g = matrix(matrices_ptr, W_G, WEIGHTS_STAY, BLOCK_D)
        ones = triangle(BLOCK_M, dtype, False)
        stat_i = sum_rows(chunk_sums, 0, pid_c, BLOCK_D, BLOCK_D, BLOCK_D)
        if HAS_STATE:
            stat_i += load_state(
                sums_ptr, stride_sk, stride_sb, stride_sh, stride_sd, b, h, STAT, HEAD_DIM, BLOCK_D
            )
    else:
        context_i = sum_rows(chunk_sums, 0, num_chunks, BLOCK_D, BLOCK_D, BLOCK_D)
        stat_i = total_stat(context_i, L, matrices_ptr, vectors_ptr, IS_NVIDIA, BLOCK_D)
    dstat_acc = tl.zeros([BLOCK_D], tl.float32)
    dcontext_acc = tl.zeros([BLOCK_D], tl.float32)

    first = pid_c * tiles_per_chunk
    for tile in range(first, tl.minimum(first + tiles_per_chunk, num_tiles)):
        start = tile * BLOCK_M
        v = load_tokens(
            v_ptr, stride_vl, stride_vd, mask_ptr, stride_ml, start, L,
            HEAD_DIM, HAS_MASK, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        if IS_CAUSAL:
            row = table_row(contexts_ptr, CONTEXT, num_heads, pid_bh, num_tiles, tile, BLOCK_D)
            context, stat = running_stat(
                v, ones, tl.load(row + offs_d), stat_i,
                inverse_counts(length_ptr, start, HAS_STATE, BLOCK_M), w_g, vectors_ptr,
                PRECISION, IS_NVIDIA, BLOCK_D,
            )  # fmt: skip
            row = table_row(tile_sums_ptr, STAT, num_heads, pid_bh, num_tiles, tile, BLOCK_D)
            stat_i += tl.load(row + offs_d)
        else:
            context = context_i[None, :]
            stat = stat_i[None, :]
        half_ratio, local = half_ratio_and_local(
            v, stat, w_l, w_q, vectors_ptr, PRECISION, IS_NVIDIA, BLOCK_D
        )
        s = sigmoid_of_double(half_ratio, IS_NVIDIA, IS_BFLOAT16)
        gate = rounded(2.0 * half_ratio * s * v.to(tl.float32), dtype)
        mask_m = (offs_m < L - start)[:, None]
        ptrs = scratch_ptrs(scratch_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
        tl.store(ptrs + _GATE * scratch_size, gate, mask=mask_m)
        final = linear(gate, w_f, vectors_ptr, W_F, PRECISION, BLOCK_D)
        final = sigmoid_of_double(final, IS_NVIDIA, IS_BFLOAT16)
        x, scale = normalize(final * context, v, HEAD_DIM, BLOCK_D)

        dout = load_tokens(
            dout_ptr, stride_dol, stride_dod, mask_ptr, stride_ml, start, L,
            HEAD_DIM, False, BLOCK_M, BLOCK_D,
        ).to(tl.float32)  # fmt: skip
        row = table_row(norm_sums_ptr, 0, num_heads, pid_bh, num_tiles, tile, BLOCK_D)
        tl.store(row + offs_d, tl.sum(dout * x, 0))
        row = table_row(norm_sums_ptr, 1, num_heads, pid_bh, num_tiles, tile, BLOCK_D)
        tl.store(row + offs_d, tl.sum(dout, 0))
        dx = _normalize_backward(dout, x, scale, vectors_ptr, HEAD_DIM, BLOCK_D)

        dcontext = dx * final
        if IS_CAUSAL:
            tl.store(ptrs + _DCONTEXT * scratch_size, rounded(dcontext, dtype), mask=mask_m)
        else:
            dcontext_acc += tl.sum(dcontext, 0)
        df = rounded(2.0 * dcontext * context * (1.0 - final), dtype)
        tl.store(ptrs + W_F * scratch_size, df, mask=mask_m)
        dgate = product(df, load_matrix(w_f, BLOCK_D), PRECISION)

        # Computed again: kept since then, they would not fit into registers.
        half_ratio = fresh(half_ratio, IS_NVIDIA)
        s = sigmoid_of_double(half_ratio, IS_NVIDIA, IS_BFLOAT16)
        inverse = inverse_denominator(fresh(stat, IS_NVIDIA), local, IS_NVIDIA)
        silu = 2.0 * half_ratio * s
        dq = 2.0 * dgate * v.to(tl.float32) * (s + silu * (1.0 - s)) * inverse
        dv = dgate * silu
        ddenominator = -dq * half_ratio
        dq = rounded(dq, dtype)
        tl.store(ptrs + W_Q * scratch_size, dq, mask=mask_m)
        dv += product(dq, load_matrix(w_q, BLOCK_D), PRECISION)
        dstat = _times_sign(ddenominator, stat)
        dlocal = rounded(_times_sign(ddenominator, local), dtype)
        tl.store(ptrs + W_L * scratch_size, dlocal, mask=mask_m)
        dv += product(dlocal, load_matrix(w_l, BLOCK_D), PRECISION)
        dv_ptrs, mask = _values_ptrs(dv_ptr, pid_bh, start, L, HEAD_DIM, BLOCK_M, BLOCK_D)
        tl.store(dv_ptrs, rounded(dv, dtype), mask=mask)

        dstat_sum = tl.sum(dstat, 0)
        dstat_acc += dstat_sum
        if IS_CAUSAL:
            tl.store(ptrs + W_G * scratch_size, rounded(dstat, dtype), mask=mask_m)
            row = table_row(tile_sums_ptr, DSTAT, num_heads, pid_bh, num_tiles, tile, BLOCK_D)
            tl.store(row + offs_d, dstat_sum)

    row = table_row(chunk_sums_ptr, DSTAT, num_heads, pid_bh, num_chunks, pid_c, BLOCK_D)
    tl.store(row + offs_d, dstat_acc)
    if not IS_CAUSAL:
        row = table_row(chunk_sums_ptr, DCONTEXT, num_heads, pid_bh, num_chunks, pid_c, BLOCK_D)
        tl.store(row + offs_d, dcontext_acc)


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_stat_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl, stride_vd,
    mask_ptr, stride_mb, stride_ml,
    length_ptr,
    matrices_ptr, vectors_ptr, tile_sums_ptr, chunk_sums_ptr,
    contexts_ptr,  # [B * H, tiles, BLOCK_D]: the context before each tile
    dsums_after_ptr, stride_sk, stride_sb, stride_sh, stride_sd,
    scratch_ptr,  # [7, B * H, L, BLOCK_D], contiguous
    dv_ptr,  # [B, H, L, D], contiguous
    dsums_ptr,  # [2, B, H, D], contiguous
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
    HAS_DSUMS: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_STATE: tl.constexpr, PRECISION: tl.constexpr, IS_NVIDIA: tl.constexpr,
    WEIGHTS_STAY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    pid_bh = tl.program_id(0) // num_chunks
    pid_c = tl.program_id(0) % num_chunks
    b = (pid_bh // H).to(tl.int64)
    h = (pid_bh % H).to(tl.int64)
    v_ptr += b * stride_vb + h * stride_vh
    mask_ptr += b * stride_mb
    scratch_size = tl.cast(num_heads, tl.int64) * L * BLOCK_D
    dtype: tl.constexpr = v_ptr.dtype.element_ty

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    w_g = matrix(matrices_ptr, W_G, WEIGHTS_STAY, BLOCK_D)
    ones = triangle(BLOCK_M, dtype, False)
    ones_after = triangle(BLOCK_M, dtype, True)
    chunk_sums = table_row(chunk_sums_ptr, DSTAT, num_heads, pid_bh, num_chunks, 0, BLOCK_D)
    dstat_i = sum_rows(chunk_sums, pid_c + 1, num_chunks, BLOCK_D, BLOCK_D, BLOCK_D)
    if HAS_DSUMS:
        dstat_i += load_state(
            dsums_after_ptr, stride_sk, stride_sb, stride_sh, stride_sd, b, h,
            STAT, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    acc = tl.zeros([BLOCK_D], tl.float32)
    first = pid_c * tiles_per_chunk
    last = tl.minimum(first + tiles_per_chunk, num_tiles) - 1
    for step in range(last - first + 1):
        tile = last - step
        start = tile * BLOCK_M
        v = load_tokens(
            v_ptr, stride_vl, stride_vd, mask_ptr, stride_ml, start, L,
            HEAD_DIM, HAS_MASK, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        row = table_row(contexts_ptr, CONTEXT, num_heads, pid_bh, num_tiles, tile, BLOCK_D)
        inverse_count = inverse_counts(length_ptr, start, HAS_STATE, BLOCK_M)
        context = product(ones, v, PRECISION) + tl.load(row + offs_d)[None, :]
        mean = (context * inverse_count).to(dtype)  # [BLOCK_M, BLOCK_D]
        gate = linear(mean, w_g, vectors_ptr, W_G, PRECISION, BLOCK_D)
        gate = sigmoid_of_double(gate, IS_NVIDIA, dtype == tl.bfloat16)

        mask_m = (offs_m < L - start)[:, None]
        ptrs = scratch_ptrs(scratch_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
        dstat = tl.load(ptrs + W_G * scratch_size, mask=mask_m, other=0.0)
        dcontext = tl.load(ptrs + _DCONTEXT * scratch_size, mask=mask_m, other=0.0)
        dgated = product(ones_after, dstat, PRECISION) + dstat_i[None, :]
        row = table_row(tile_sums_ptr, DSTAT, num_heads, pid_bh, num_tiles, tile, BLOCK_D)
        dstat_i += tl.load(row + offs_d)
        dgated *= gate
        dlogit = rounded(2.0 * dgated * v.to(tl.float32) * (1.0 - gate), dtype)
        dmean = product(dlogit, load_matrix(w_g, BLOCK_D), PRECISION)
        dcontext = dcontext.to(tl.float32) + dmean * inverse_count

        tl.store(ptrs + W_G * scratch_size, dlogit, mask=mask_m)
        tl.store(ptrs + _MEAN * scratch_size, mean, mask=mask_m)
        tl.store(ptrs + _DCONTEXT * scratch_size, rounded(dcontext, dtype), mask=mask_m)
        dv_ptrs, mask = _values_ptrs(dv_ptr, pid_bh, start, L, HEAD_DIM, BLOCK_M, BLOCK_D)
        dv = tl.load(dv_ptrs, mask=mask, other=0.0).to(tl.float32) + dgated
        tl.store(dv_ptrs, rounded(dv, dtype), mask=mask)
        dcontext_sum = tl.sum(dcontext, 0)
        row = table_row(tile_sums_ptr, DCONTEXT, num_heads, pid_bh, num_tiles, tile, BLOCK_D)
        tl.store(row + offs_d, dcontext_sum)
        acc += dcontext_sum

    row = table_row(chunk_sums_ptr, DCONTEXT, num_heads, pid_bh, num_chunks, pid_c, BLOCK_D)
    tl.store(row + offs_d, acc)
    if pid_c == 0:
        store_state(dsums_ptr, num_heads, pid_bh, dstat_i, STAT, HEAD_DIM, BLOCK_D)


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_context_kernel(
    scratch_ptr,  # [7, B * H, L, BLOCK_D], contiguous
    mask_ptr, stride_mb, stride_ml,
    tile_sums_ptr, chunk_sums_ptr,
    dsums_after_ptr, stride_sk, stride_sb, stride_sh, stride_sd,
    drows_ptr,  # [B * H, D], contiguous: what to add to each token where not IS_CAUSAL
    dv_ptr,  # [B, H, L, D], contiguous
    dsums_ptr,  # [2, B, H, D], contiguous: written where IS_CAUSAL
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
    IS_CAUSAL: tl.constexpr, HAS_DSUMS: tl.constexpr,
    HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    pid_bh = tl.program_id(0) // num_chunks
    pid_c = tl.program_id(0) % num_chunks
    b = (pid_bh // H).to(tl.int64)
    h = (pid_bh % H).to(tl.int64)
    mask_ptr += b * stride_mb
    scratch_ptr += _DCONTEXT * tl.cast(num_heads, tl.int64) * L * BLOCK_D
    dtype: tl.constexpr = dv_ptr.dtype.element_ty

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    if IS_CAUSAL:
        ones_after = triangle(BLOCK_M, dtype, True)
        chunk_sums = table_row(chunk_sums_ptr, DCONTEXT, num_heads, pid_bh, num_chunks, 0, BLOCK_D)
        dcontext_i = sum_rows(chunk_sums, pid_c + 1, num_chunks, BLOCK_D, BLOCK_D, BLOCK_D)
        if HAS_DSUMS:
            dcontext_i += load_state(
                dsums_after_ptr, stride_sk, stride_sb, stride_sh, stride_sd, b, h,
                CONTEXT, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
    else:
        row = drows_ptr + pid_bh.to(tl.int64) * HEAD_DIM
        dcontext_i = tl.load(row + offs_d, mask=offs_d < HEAD_DIM, other=0.0)

    first = pid_c * tiles_per_chunk
    last = tl.minimum(first + tiles_per_chunk, num_tiles) - 1
    for step in range(last - first + 1):
        tile = last - step
        start = tile * BLOCK_M
        dv_ptrs, mask = _values_ptrs(dv_ptr, pid_bh, start, L, HEAD_DIM, BLOCK_M, BLOCK_D)
        dv = tl.load(dv_ptrs, mask=mask, other=0.0).to(tl.float32) + dcontext_i[None, :]
        if IS_CAUSAL:
            ptrs = scratch_ptrs(scratch_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
            dcontext = tl.load(ptrs, mask=(offs_m < L - start)[:, None], other=0.0)
            dv += product(ones_after, dcontext, PRECISION)
            row = table_row(tile_sums_ptr, DCONTEXT, num_heads, pid_bh, num_tiles, tile, BLOCK_D)
            dcontext_i += tl.load(row + offs_d)
        if HAS_MASK:
            keep = is_kept(mask_ptr, stride_ml, start, L, BLOCK_M)
            dv = tl.where(keep[:, None], dv, 0.0)
        tl.store(dv_ptrs, rounded(dv, dtype), mask=mask)
    if IS_CAUSAL and pid_c == 0:
        store_state(dsums_ptr, num_heads, pid_bh, dcontext_i, CONTEXT, HEAD_DIM, BLOCK_D)


# fmt: off
@triton.jit
def _sum_products(
    v_ptr, stride_vb, stride_vh, stride_vl, stride_vd,
    mask_ptr, stride_mb, stride_ml,
    dy_ptr, x_ptr, first, last, L, H, num_tiles,
    FROM_VALUES: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """dy^T x and the sum of dy over the tiles first <= index < last; x is v or scratch."""
    offs_m = tl.arange(0, BLOCK_M)
    dw = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    db = tl.zeros([BLOCK_D], tl.float32)
    for index in range(first, last):
        pid_bh = index // num_tiles
        start = index % num_tiles * BLOCK_M
        mask_m = (offs_m < L - start)[:, None]
        dy_ptrs = scratch_ptrs(dy_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
        dy = tl.load(dy_ptrs, mask=mask_m, other=0.0)  # [BLOCK_M, BLOCK_D]
        if FROM_VALUES:
            b = (pid_bh // H).to(tl.int64)
            h = (pid_bh % H).to(tl.int64)
            x = load_tokens(
                v_ptr + b * stride_vb + h * stride_vh, stride_vl, stride_vd,
                mask_ptr + b * stride_mb, stride_ml, start, L,
                HEAD_DIM, HAS_MASK, BLOCK_M, BLOCK_D,
            )  # fmt: skip
        else:
            x_ptrs = scratch_ptrs(x_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
            x = tl.load(x_ptrs, mask=mask_m, other=0.0)
        dw = tl.dot(tl.trans(dy), x, dw, input_precision=PRECISION)
        db += tl.sum(dy.to(tl.float32), 0)
    return dw, db


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_weights_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl, stride_vd,
    mask_ptr, stride_mb, stride_ml,
    scratch_ptr,  # [7, B * H, L, BLOCK_D], contiguous
    norm_sums_ptr,  # [2, rows, BLOCK_D]
    partial_matrices_ptr,  # [splits, 4, BLOCK_D, BLOCK_D]
    partial_vectors_ptr,  # [splits, 6, BLOCK_D]
    L, H, num_heads, num_tiles, num_splits, tiles_per_split, num_rows,
    HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    which = tl.program_id(0) // num_splits
    split = tl.program_id(0) % num_splits
    scratch_size = tl.cast(num_heads, tl.int64) * L * BLOCK_D
    dy_ptr = scratch_ptr + which * scratch_size
    x_ptr = scratch_ptr + (which + _GATE - W_F) * scratch_size
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, num_heads * num_tiles)
    offs_d = tl.arange(0, BLOCK_D)
    vectors = partial_vectors_ptr + split.to(tl.int64) * 6 * BLOCK_D + offs_d
    if which < W_F:
        dw, db = _sum_products(
            v_ptr, stride_vb, stride_vh, stride_vl, stride_vd, mask_ptr, stride_mb, stride_ml,
            dy_ptr, x_ptr, first, last, L, H, num_tiles,
            True, HEAD_DIM, HAS_MASK, PRECISION, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        norm_sums = table_row(norm_sums_ptr, which, 1, 0, num_rows, 0, BLOCK_D)
        rows = tl.cdiv(num_rows, num_splits)
        last_row = tl.minimum((split + 1) * rows, num_rows)
        dnorm = sum_rows(norm_sums, split * rows, last_row, BLOCK_D, BLOCK_D, BLOCK_D)
        tl.store(vectors + (NORM_WEIGHT + which) * BLOCK_D, dnorm)
    else:
        dw, db = _sum_products(
            v_ptr, stride_vb, stride_vh, stride_vl, stride_vd, mask_ptr, stride_mb, stride_ml,
            dy_ptr, x_ptr, first, last, L, H, num_tiles,
            False, HEAD_DIM, HAS_MASK, PRECISION, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    tl.store(vectors + which * BLOCK_D, db)
    matrices = partial_matrices_ptr + (split.to(tl.int64) * 4 + which) * BLOCK_D * BLOCK_D
    tl.store(matrices + tile_offsets(offs_d, BLOCK_D, offs_d, 1), dw)


# fmt: off
@triton.jit
def _store_row(
    dw_ptr, db_ptr, partial_matrices_ptr, partial_vectors_ptr, row, num_splits,
    WHICH: tl.constexpr, SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Row `row` of a matrix's gradient; the bias's counts as the last of them."""
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    if row < HEAD_DIM:
        rows = partial_matrices_ptr + (WHICH * BLOCK_D + row) * BLOCK_D
        total = sum_rows(rows, 0, num_splits, 4 * BLOCK_D * BLOCK_D, BLOCK_D, BLOCK_D) * SCALE
        tl.store(dw_ptr + row * HEAD_DIM + offs_d, total.to(dw_ptr.dtype.element_ty), mask=mask_d)
    else:
        _store_vector(db_ptr, partial_vectors_ptr, num_splits, WHICH, SCALE, HEAD_DIM, BLOCK_D)


# fmt: off
@triton.jit
def _store_vector(
    ptr, partial_vectors_ptr, num_splits,
    WHICH: tl.constexpr, SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    offs_d = tl.arange(0, BLOCK_D)
    rows = partial_vectors_ptr + WHICH * BLOCK_D
    total = sum_rows(rows, 0, num_splits, 6 * BLOCK_D, BLOCK_D, BLOCK_D) * SCALE
    tl.store(ptr + offs_d, total.to(ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_weights_sum_kernel(
    partial_matrices_ptr,  # [splits, 4, BLOCK_D, BLOCK_D]
    partial_vectors_ptr,  # [splits, 6, BLOCK_D]
    dw_q_ptr, db_q_ptr, dw_l_ptr, db_l_ptr, dw_g_ptr, db_g_ptr, dw_f_ptr, db_f_ptr,
    dnorm_weight_ptr, dnorm_bias_ptr,
    num_splits,
    IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    which = tl.program_id(0) // (HEAD_DIM + 1)
    row = tl.program_id(0) % (HEAD_DIM + 1)
    if which == W_Q:
        _store_row(
            dw_q_ptr, db_q_ptr, partial_matrices_ptr, partial_vectors_ptr, row, num_splits,
            W_Q, 0.5, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    elif which == W_L:
        _store_row(
            dw_l_ptr, db_l_ptr, partial_matrices_ptr, partial_vectors_ptr, row, num_splits,
            W_L, 1.0, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    elif which == W_F:
        _store_row(
            dw_f_ptr, db_f_ptr, partial_matrices_ptr, partial_vectors_ptr, row, num_splits,
            W_F, 0.5, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    elif which == W_G:
        if IS_CAUSAL:
            _store_row(
                dw_g_ptr, db_g_ptr, partial_matrices_ptr, partial_vectors_ptr, row, num_splits,
                W_G, 0.5, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
    elif row == 0:
        _store_vector(
            dnorm_weight_ptr, partial_vectors_ptr, num_splits, NORM_WEIGHT, 1.0, HEAD_DIM, BLOCK_D
        )
    elif row == 1:
        _store_vector(
            dnorm_bias_ptr, partial_vectors_ptr, num_splits, NORM_BIAS, 1.0, HEAD_DIM, BLOCK_D
        )


_launch_tokens = Launcher(_attention_backward_tokens_kernel)
_launch_stat = Launcher(_attention_backward_stat_kernel)
_launch_context = Launcher(_attention_backward_context_kernel)
_launch_weights = Launcher(_attention_backward_weights_kernel)
_launch_weights_sum = Launcher(_attention_backward_weights_sum_kernel)


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
    B, H, L, D = v.shape
    dv = v.new_empty(v.shape)
    dsums = v.new_empty((2, B, H, D), dtype=torch.float32)
    if v.numel() == 0:
        zeros = EvoWeights(*(torch.zeros_like(weight) for weight in weights))
        return dv, dsums.zero_() if dsums_after is None else dsums.copy_(dsums_after), zeros
    call = problem.call(v, mask, sums, length, configs.backward_tiles(v, causal))
    scratch = running_sums(call, weights, causal, torch.empty_like(dsums))
    tokens = v.new_empty((_NUM_SCRATCH, B * H, L, call.blocks["BLOCK_D"]))
    norm_sums = torch.empty_like(scratch.tile_sums[:2])
    _launch_tokens(
        call.num_programs,
        strides=(call.strides, dout.stride()),
        args=(*call.inputs, *scratch, dout, *dout.stride(), tokens, norm_sums, dv, *call.sizes),
        constexprs={"IS_CAUSAL": causal, **call.flags, **call.numerics, **call.blocks},
        config=call.config,
    )
    outputs = _Outputs(call, causal, dsums_after, tokens, dv, dsums)
    if causal:
        _backward_stat(outputs, scratch)
        _backward_context(outputs, scratch, drows=dsums)
        return dv, dsums, _backward_weights(outputs, weights, norm_sums)
    drows, dw_g, db_g = _backward_total(outputs, scratch, weights)
    _backward_context(outputs, scratch, drows)
    dweights = _backward_weights(outputs, weights, norm_sums)
    return dv, dsums, dweights._replace(w_g=dw_g, b_g=db_g)


class _Outputs(NamedTuple):
    """What the launches behind "tokens" share."""

    call: problem.Call
    causal: bool
    dsums_after: torch.Tensor | None
    tokens: torch.Tensor
    dv: torch.Tensor
    dsums: torch.Tensor

    @property
    def dsums_after_args(self) -> tuple[Any, ...]:
        """The gradients of the sums with their strides, or what stands in for them."""
        if self.dsums_after is None:
            return self.dsums, 0, 0, 0, 0
        return self.dsums_after, *self.dsums_after.stride()


def _backward_stat(outputs: _Outputs, scratch: problem.Scratch) -> None:
    call = outputs.call
    dsums_after = outputs.dsums_after_args
    _launch_stat(
        call.num_programs,
        strides=(call.strides, dsums_after[1:]),
        args=(
            *call.v, *call.mask, call.length, *scratch, *dsums_after,
            outputs.tokens, outputs.dv, outputs.dsums, *call.sizes,
        ),
        constexprs={
            "HAS_DSUMS": outputs.dsums_after is not None,
            **call.flags, **call.numerics, **call.blocks,
        },
        config=configs.BACKWARD_STAT,
    )  # fmt: skip


def _backward_total(
    outputs: _Outputs, scratch: problem.Scratch, weights: EvoWeights
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What "stat" does, for the one stat and context that all tokens share without `causal`.

    Writes the gradients of the sums; returns what each token gets of them, dW_g and db_g.
    """
    _, _, length, dim = outputs.dv.shape
    totals = scratch.chunk_sums.sum(dim=2)[..., :dim]  # [4, B * H, D]
    context, dstat, dcontext = (totals[row.value] for row in (CONTEXT, DSTAT, DCONTEXT))
    if outputs.dsums_after is not None:
        dcontext = dcontext + outputs.dsums_after[CONTEXT.value].flatten(0, 1)
        dstat = dstat + outputs.dsums_after[STAT.value].flatten(0, 1)
    w_g, b_g = weights.w_g.float(), weights.b_g.float()
    mean = context / length
    gate = torch.sigmoid(mean @ w_g.T + b_g)
    dlogit = dstat * context * gate * (1 - gate)
    dcontext = dcontext + dlogit @ w_g / length
    outputs.dsums.copy_(torch.stack((dcontext, dstat)).view_as(outputs.dsums))
    dw_g, db_g = dlogit.T @ mean, dlogit.sum(dim=0)
    return dcontext + gate * dstat, dw_g.to(weights.w_g.dtype), db_g.to(weights.b_g.dtype)


def _backward_context(outputs: _Outputs, scratch: problem.Scratch, drows: torch.Tensor) -> None:
    call = outputs.call
    dsums_after = outputs.dsums_after_args
    _launch_context(
        call.num_programs,
        strides=(call.mask[1:], dsums_after[1:]),
        args=(
            outputs.tokens, *call.mask, scratch.tile_sums, scratch.chunk_sums, *dsums_after,
            drows, outputs.dv, outputs.dsums, *call.sizes,
        ),
        constexprs={
            "IS_CAUSAL": outputs.causal, "HAS_DSUMS": outputs.dsums_after is not None,
            "HEAD_DIM": call.flags["HEAD_DIM"], "HAS_MASK": call.flags["HAS_MASK"],
            "PRECISION": call.numerics["PRECISION"], **call.blocks,
        },
        config=configs.BACKWARD_CONTEXT,
    )  # fmt: skip


def _backward_weights(
    outputs: _Outputs, weights: EvoWeights, norm_sums: torch.Tensor
) -> EvoWeights:
    call = outputs.call
    L, H, num_heads, *_ = call.sizes
    dim, block_d = call.flags["HEAD_DIM"], call.blocks["BLOCK_D"]
    block_m = configs.BACKWARD_WEIGHTS.block_m
    num_tiles = problem.ceil_div(L, block_m)
    splits = problem.splits(outputs.dv.device, num_heads * num_tiles)
    num_rows = norm_sums[0].numel() // block_d
    partial_matrices = norm_sums.new_empty((splits.num_splits, 4, block_d, block_d))
    partial_vectors = norm_sums.new_empty((splits.num_splits, 6, block_d))
    num_products = 4 if outputs.causal else 3
    _launch_weights(
        num_products * splits.num_splits,
        strides=call.strides,
        args=(
            *call.v, *call.mask, outputs.tokens, norm_sums, partial_matrices, partial_vectors,
            L, H, num_heads, num_tiles, *splits, num_rows,
        ),
        constexprs={
            "HEAD_DIM": dim, "HAS_MASK": call.flags["HAS_MASK"],
            "PRECISION": call.numerics["PRECISION"], "BLOCK_M": block_m, "BLOCK_D": block_d,
        },
        config=configs.BACKWARD_WEIGHTS,
    )  # fmt: skip
    dweights = EvoWeights(*(weight.new_empty(weight.shape) for weight in weights))
    _launch_weights_sum(
        5 * (dim + 1),
        strides=weights.w_q.dtype,
        args=(partial_matrices, partial_vectors, *dweights, splits.num_splits),
        constexprs={"IS_CAUSAL": outputs.causal, "HEAD_DIM": dim, "BLOCK_D": block_d},
        config=configs.SUMS,
    )
    return dweights
