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

Gradients of halved weights (see `tiles`) are twice those of the weights: so are dq, da and df here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from attn_core.launch import Launcher
from attn_core.tiles.offsets import tile_offsets
from attn_core.tuning import TileConfig
from attn_evo._backends import most_head_dim
from attn_evo._hopper import support
from attn_evo._triton import configs, problem, wide
from attn_evo._triton.forward import running_sums
from attn_evo._triton.tiles import (
    CONTEXT,
    DCONTEXT,
    DSTAT,
    MOST_STAYING_BIASES,
    NORM_BIAS,
    NORM_WEIGHT,
    STAT,
    W_F,
    W_G,
    W_L,
    W_Q,
    add_column_sums,
    bias_rows,
    column_sums,
    gate_of_mean,
    inverse_counts,
    inverse_denominator,
    is_kept,
    linear,
    load_matrix,
    load_state,
    load_tokens,
    load_vector,
    matrix,
    no_column_sums,
    norm_statistics,
    product,
    rounded,
    running_stat,
    scan,
    scratch_ptrs,
    sigmoid_of_double,
    stat_before,
    store_partial,
    store_state,
    sum_rows,
    table_row,
    total_context,
    total_sums,
    triangle,
    twice_gated,
)
from attn_evo.weights import EvoWeights

# Of the column sums of a program: what it hands on to other programs of its head.
_CHUNK = tl.constexpr(6)
_ROWS = tl.constexpr(128)  # of the programs whose shares a step adds up


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
def _norm_backward(
    dout, x, scale, vectors_ptr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Gradient of what the norm made x of, from that of its output; `scale` is 1 / deviation."""
    dx = dout * load_vector(vectors_ptr, NORM_WEIGHT, BLOCK_D)
    mean = tl.sum(dx, 1)[:, None] * (1.0 / HEAD_DIM)
    along_x = tl.sum(dx * x, 1)[:, None] * (1.0 / HEAD_DIM)
    return scale * (dx - mean - x * along_x)


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_ratio_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl, stride_vd,
    mask_ptr, stride_mb, stride_ml,
    sums_ptr, stride_sk, stride_sb, stride_sh, stride_sd,
    length_ptr,
    matrices_ptr, biases_ptr, vectors_ptr, tile_sums_ptr, chunk_sums_ptr,
    contexts_ptr,  # [B * H, tiles, BLOCK_D]: the context before each tile
    half_ratio_ptr,  # [B * H, L, BLOCK_D], contiguous
    inverse_ptr,  # [B * H, L, BLOCK_D], contiguous: 1 / denominator, with the sign of stat
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

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    BIASES_STAY: tl.constexpr = WEIGHTS_STAY and BLOCK_D <= MOST_STAYING_BIASES
    w_q = matrix(matrices_ptr, W_Q, WEIGHTS_STAY, BLOCK_D)
    b_q = bias_rows(biases_ptr, W_Q, BIASES_STAY, BLOCK_D)
    w_l = matrix(matrices_ptr, W_L, WEIGHTS_STAY, BLOCK_D)
    b_l = bias_rows(biases_ptr, W_L, BIASES_STAY, BLOCK_D)
    w_g = matrix(matrices_ptr, W_G, WEIGHTS_STAY, BLOCK_D)
    b_g = bias_rows(biases_ptr, W_G, BIASES_STAY, BLOCK_D)
    ones = triangle(BLOCK_M, v_ptr.dtype.element_ty, False)
    if IS_CAUSAL:
        stat_i = stat_before(
            chunk_sums_ptr, sums_ptr, stride_sk, stride_sb, stride_sh, stride_sd,
            b, h, pid_bh, pid_c, num_heads, num_chunks, HEAD_DIM, HAS_STATE, BLOCK_D,
        )  # fmt: skip
    else:
        context, stat_i = total_sums(
            chunk_sums_ptr, sums_ptr, stride_sk, stride_sb, stride_sh, stride_sd, length_ptr,
            matrices_ptr, vectors_ptr, b, h, pid_bh, L, num_heads, num_chunks,
            HEAD_DIM, HAS_STATE, IS_NVIDIA, BLOCK_D,
        )  # fmt: skip
        if pid_c == 0:
            row = table_row(contexts_ptr, CONTEXT, num_heads, pid_bh, num_tiles, 0, BLOCK_D)
            tl.store(row + offs_d, context)
    first = pid_c * tiles_per_chunk
    for tile in range(first, tl.minimum(first + tiles_per_chunk, num_tiles)):
        start = tile * BLOCK_M
        v = load_tokens(
            v_ptr, stride_vl, stride_vd, mask_ptr, stride_ml, start, L,
            HEAD_DIM, HAS_MASK, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        if IS_CAUSAL:
            row = table_row(tile_sums_ptr, STAT, num_heads, pid_bh, num_tiles, tile, BLOCK_D)
            tile_sum = tl.load(row + offs_d)
            row = table_row(contexts_ptr, CONTEXT, num_heads, pid_bh, num_tiles, tile, BLOCK_D)
            _, stat = running_stat(
                v, ones, tl.load(row + offs_d), stat_i,
                inverse_counts(length_ptr, start, HAS_STATE, BLOCK_M), w_g, b_g,
                PRECISION, IS_NVIDIA, BLOCK_D,
            )  # fmt: skip
            stat_i += tile_sum
        else:
            stat = stat_i[None, :]
        local = linear(v, w_l, b_l, PRECISION, BLOCK_D)
        inverse = inverse_denominator(stat, local, IS_NVIDIA)
        half_ratio = linear(v, w_q, b_q, PRECISION, BLOCK_D) * inverse
        inverse = tl.where(stat < 0, -inverse, inverse)

        mask = (offs_m < L - start)[:, None]
        ptrs = scratch_ptrs(half_ratio_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
        tl.store(ptrs, rounded(half_ratio, half_ratio_ptr.dtype.element_ty), mask=mask)
        ptrs = scratch_ptrs(inverse_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
        tl.store(ptrs, inverse.to(inverse_ptr.dtype.element_ty), mask=mask)


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_norm_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl, stride_vd,
    mask_ptr, stride_mb, stride_ml,
    sums_ptr, stride_sk, stride_sb, stride_sh, stride_sd,
    length_ptr,
    matrices_ptr, biases_ptr, vectors_ptr, tile_sums_ptr, chunk_sums_ptr,
    contexts_ptr,  # [B * H, tiles, BLOCK_D]: the context before each tile, or of all in the first
    dout_ptr, stride_dob, stride_doh, stride_dol, stride_dod,
    half_ratio_ptr,  # [B * H, L, BLOCK_D], contiguous
    df_ptr,  # [B * H, L, BLOCK_D], contiguous
    dcontext_ptr,  # [B * H, L, BLOCK_D], contiguous: written where IS_CAUSAL
    partial_matrices_ptr,  # [programs, 4, BLOCK_D, BLOCK_D]
    partial_vectors_ptr,  # [programs, 6, BLOCK_D]
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
    dtype: tl.constexpr = v_ptr.dtype.element_ty
    IS_BFLOAT16: tl.constexpr = dtype == tl.bfloat16

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    w_f = matrix(matrices_ptr, W_F, WEIGHTS_STAY, BLOCK_D)
    b_f = bias_rows(biases_ptr, W_F, WEIGHTS_STAY, BLOCK_D)
    ones = triangle(BLOCK_M, dtype, False)
    dw_f = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    sums = no_column_sums(BLOCK_D)
    first = pid_c * tiles_per_chunk
    for tile in range(first, tl.minimum(first + tiles_per_chunk, num_tiles)):
        start = tile * BLOCK_M
        v = load_tokens(
            v_ptr, stride_vl, stride_vd, mask_ptr, stride_ml, start, L,
            HEAD_DIM, HAS_MASK, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        dout = load_tokens(
            dout_ptr, stride_dol, stride_dod, mask_ptr, stride_ml, start, L,
            HEAD_DIM, False, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        mask = (offs_m < L - start)[:, None]
        ptrs = scratch_ptrs(half_ratio_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
        half_ratio = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        gate = twice_gated(half_ratio * v.to(tl.float32), half_ratio, IS_NVIDIA, IS_BFLOAT16)
        gate = rounded(gate, dtype)
        final = linear(gate, w_f, b_f, PRECISION, BLOCK_D)
        final = sigmoid_of_double(final, IS_NVIDIA, IS_BFLOAT16)
        row = tile if IS_CAUSAL else 0
        row = table_row(contexts_ptr, CONTEXT, num_heads, pid_bh, num_tiles, row, BLOCK_D)
        context = tl.load(row + offs_d)[None, :]
        if IS_CAUSAL:
            context = scan(ones, v, PRECISION) + context
        x = final * context
        mean, scale = norm_statistics(x, v, HEAD_DIM, BLOCK_D)

        sums = add_column_sums(sums, dout, NORM_BIAS, PRECISION)
        normal = (x - mean) * scale
        dout = dout.to(tl.float32)
        sums = add_column_sums(sums, rounded(dout * normal, dtype), NORM_WEIGHT, PRECISION)
        dx = _norm_backward(dout, normal, scale, vectors_ptr, HEAD_DIM, BLOCK_D)
        dcontext = dx * final
        df = rounded(2.0 * dx * x * (1.0 - final), dtype)
        ptrs = scratch_ptrs(df_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
        tl.store(ptrs, df, mask=mask)
        sums = add_column_sums(sums, df, W_F, PRECISION)
        dw_f = tl.dot(tl.trans(df), gate, dw_f, input_precision=PRECISION)
        dcontext = rounded(dcontext, dtype)
        if IS_CAUSAL:
            ptrs = scratch_ptrs(dcontext_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
            tl.store(ptrs, dcontext, mask=mask)
        else:
            sums = add_column_sums(sums, dcontext, _CHUNK, PRECISION)

    vectors_row = partial_vectors_ptr + tl.program_id(0).to(tl.int64) * 6 * BLOCK_D + offs_d
    tl.store(vectors_row + W_F * BLOCK_D, column_sums(sums, W_F))
    tl.store(vectors_row + NORM_WEIGHT * BLOCK_D, column_sums(sums, NORM_WEIGHT))
    tl.store(vectors_row + NORM_BIAS * BLOCK_D, column_sums(sums, NORM_BIAS))
    store_partial(partial_matrices_ptr, dw_f, W_F, BLOCK_D)
    if not IS_CAUSAL:
        row = table_row(chunk_sums_ptr, DCONTEXT, num_heads, pid_bh, num_chunks, pid_c, BLOCK_D)
        tl.store(row + offs_d, column_sums(sums, _CHUNK))


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_gate_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl, stride_vd,
    mask_ptr, stride_mb, stride_ml,
    matrices_ptr, biases_ptr, chunk_sums_ptr,
    half_ratio_ptr,  # [B * H, L, BLOCK_D], contiguous; dq takes its place
    inverse_ptr,  # [B * H, L, BLOCK_D], contiguous
    dlocal_ptr,  # [B * H, L, BLOCK_D], contiguous
    df_ptr,  # [B * H, L, BLOCK_D], contiguous; where IS_CAUSAL, dstat takes its place
    dv_ptr,  # [B, H, L, D], contiguous
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
    IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr, IS_NVIDIA: tl.constexpr,
    WEIGHTS_STAY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    pid_bh = tl.program_id(0) // num_chunks
    pid_c = tl.program_id(0) % num_chunks
    b = (pid_bh // H).to(tl.int64)
    h = (pid_bh % H).to(tl.int64)
    v_ptr += b * stride_vb + h * stride_vh
    mask_ptr += b * stride_mb
    dtype: tl.constexpr = v_ptr.dtype.element_ty

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    w_q = matrix(matrices_ptr, W_Q, WEIGHTS_STAY, BLOCK_D)
    w_l = matrix(matrices_ptr, W_L, WEIGHTS_STAY, BLOCK_D)
    b_l = bias_rows(biases_ptr, W_L, WEIGHTS_STAY, BLOCK_D)
    w_f = matrix(matrices_ptr, W_F, WEIGHTS_STAY, BLOCK_D)
    sums = no_column_sums(BLOCK_D)
    first = pid_c * tiles_per_chunk
    for tile in range(first, tl.minimum(first + tiles_per_chunk, num_tiles)):
        start = tile * BLOCK_M
        v = load_tokens(
            v_ptr, stride_vl, stride_vd, mask_ptr, stride_ml, start, L,
            HEAD_DIM, HAS_MASK, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        mask = (offs_m < L - start)[:, None]
        df_ptrs = scratch_ptrs(df_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
        df = tl.load(df_ptrs, mask=mask, other=0.0)
        dq_ptrs = scratch_ptrs(half_ratio_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
        half_ratio = tl.load(dq_ptrs, mask=mask, other=0.0).to(tl.float32)
        ptrs = scratch_ptrs(inverse_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
        inverse = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)

        dgate = product(df, load_matrix(w_f, BLOCK_D), PRECISION)
        s = sigmoid_of_double(half_ratio, IS_NVIDIA, dtype == tl.bfloat16)
        silu = 2.0 * half_ratio * s
        dq = 2.0 * dgate * v.to(tl.float32) * (s + silu * (1.0 - s)) * tl.abs(inverse)
        ddenominator = -dq * half_ratio
        dv = dgate * silu
        dq = rounded(dq, dtype)
        dv = tl.dot(dq, load_matrix(w_q, BLOCK_D), dv, input_precision=PRECISION)
        tl.store(dq_ptrs, dq, mask=mask)

        dstat = rounded(tl.where(inverse < 0, -ddenominator, ddenominator), dtype)
        sums = add_column_sums(sums, dstat, _CHUNK, PRECISION)
        if IS_CAUSAL:
            tl.store(df_ptrs, dstat, mask=mask)
        local = linear(v, w_l, b_l, PRECISION, BLOCK_D)
        dlocal = rounded(_times_sign(ddenominator, local), dtype)
        dv = tl.dot(dlocal, load_matrix(w_l, BLOCK_D), dv, input_precision=PRECISION)
        ptrs = scratch_ptrs(dlocal_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
        tl.store(ptrs, dlocal, mask=mask)
        dv_ptrs, inside = _values_ptrs(dv_ptr, pid_bh, start, L, HEAD_DIM, BLOCK_M, BLOCK_D)
        tl.store(dv_ptrs, rounded(dv, dtype), mask=inside)

    row = table_row(chunk_sums_ptr, DSTAT, num_heads, pid_bh, num_chunks, pid_c, BLOCK_D)
    tl.store(row + offs_d, column_sums(sums, _CHUNK))


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_products_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl, stride_vd,
    mask_ptr, stride_mb, stride_ml,
    dq_ptr,  # [B * H, L, BLOCK_D], contiguous
    dlocal_ptr,  # [B * H, L, BLOCK_D], contiguous
    partial_matrices_ptr,  # [programs, 4, BLOCK_D, BLOCK_D]
    partial_vectors_ptr,  # [programs, 6, BLOCK_D]
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
    HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    pid_bh = tl.program_id(0) // num_chunks
    pid_c = tl.program_id(0) % num_chunks
    b = (pid_bh // H).to(tl.int64)
    h = (pid_bh % H).to(tl.int64)
    v_ptr += b * stride_vb + h * stride_vh
    mask_ptr += b * stride_mb

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    dw_q = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    dw_l = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    sums = no_column_sums(BLOCK_D)
    first = pid_c * tiles_per_chunk
    for tile in range(first, tl.minimum(first + tiles_per_chunk, num_tiles)):
        start = tile * BLOCK_M
        v = load_tokens(
            v_ptr, stride_vl, stride_vd, mask_ptr, stride_ml, start, L,
            HEAD_DIM, HAS_MASK, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        mask = (offs_m < L - start)[:, None]
        ptrs = scratch_ptrs(dq_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
        dq = tl.load(ptrs, mask=mask, other=0.0)
        ptrs = scratch_ptrs(dlocal_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
        dlocal = tl.load(ptrs, mask=mask, other=0.0)
        sums = add_column_sums(sums, dq, W_Q, PRECISION)
        sums = add_column_sums(sums, dlocal, W_L, PRECISION)
        dw_q = tl.dot(tl.trans(dq), v, dw_q, input_precision=PRECISION)
        dw_l = tl.dot(tl.trans(dlocal), v, dw_l, input_precision=PRECISION)

    vectors_row = partial_vectors_ptr + tl.program_id(0).to(tl.int64) * 6 * BLOCK_D + offs_d
    tl.store(vectors_row + W_Q * BLOCK_D, column_sums(sums, W_Q))
    tl.store(vectors_row + W_L * BLOCK_D, column_sums(sums, W_L))
    store_partial(partial_matrices_ptr, dw_q, W_Q, BLOCK_D)
    store_partial(partial_matrices_ptr, dw_l, W_L, BLOCK_D)


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_stat_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl, stride_vd,
    mask_ptr, stride_mb, stride_ml,
    length_ptr,
    matrices_ptr, biases_ptr, chunk_sums_ptr,
    contexts_ptr,  # [B * H, tiles, BLOCK_D]: the context before each tile
    dsums_after_ptr, stride_sk, stride_sb, stride_sh, stride_sd,
    dstat_ptr,  # [B * H, L, BLOCK_D], contiguous
    dcontext_ptr,  # [B * H, L, BLOCK_D], contiguous
    dv_ptr,  # [B, H, L, D], contiguous
    dsums_ptr,  # [2, B, H, D], contiguous
    partial_matrices_ptr,  # [programs, 4, BLOCK_D, BLOCK_D]
    partial_vectors_ptr,  # [programs, 6, BLOCK_D]
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
    dtype: tl.constexpr = v_ptr.dtype.element_ty

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    w_g = matrix(matrices_ptr, W_G, WEIGHTS_STAY, BLOCK_D)
    b_g = bias_rows(biases_ptr, W_G, WEIGHTS_STAY, BLOCK_D)
    ones = triangle(BLOCK_M, dtype, False)
    ones_after = triangle(BLOCK_M, dtype, True)
    chunk_sums = table_row(chunk_sums_ptr, DSTAT, num_heads, pid_bh, num_chunks, 0, BLOCK_D)
    dstat_i = sum_rows(chunk_sums, pid_c + 1, num_chunks, BLOCK_D, BLOCK_D, BLOCK_D)
    if HAS_DSUMS:
        dstat_i += load_state(
            dsums_after_ptr, stride_sk, stride_sb, stride_sh, stride_sd, b, h,
            STAT, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    dw_g = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    sums = no_column_sums(BLOCK_D)
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
        context = scan(ones, v, PRECISION) + tl.load(row + offs_d)[None, :]
        mean = (context * inverse_count).to(dtype)  # [BLOCK_M, BLOCK_D]
        gate = linear(mean, w_g, b_g, PRECISION, BLOCK_D)
        gate = sigmoid_of_double(gate, IS_NVIDIA, dtype == tl.bfloat16)

        mask = (offs_m < L - start)[:, None]
        ptrs = scratch_ptrs(dstat_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
        dstat = tl.load(ptrs, mask=mask, other=0.0)
        dgated = (scan(ones_after, dstat, PRECISION) + dstat_i[None, :]) * gate
        dstat_i += tl.sum(dstat.to(tl.float32), 0)
        dv_ptrs, inside = _values_ptrs(dv_ptr, pid_bh, start, L, HEAD_DIM, BLOCK_M, BLOCK_D)
        dv = tl.load(dv_ptrs, mask=inside, other=0.0).to(tl.float32) + dgated
        tl.store(dv_ptrs, rounded(dv, dtype), mask=inside)

        dlogit = rounded(2.0 * dgated * v.to(tl.float32) * (1.0 - gate), dtype)
        sums = add_column_sums(sums, dlogit, W_G, PRECISION)
        dw_g = tl.dot(tl.trans(dlogit), mean, dw_g, input_precision=PRECISION)
        dmean = product(dlogit, load_matrix(w_g, BLOCK_D), PRECISION)
        ptrs = scratch_ptrs(dcontext_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
        dcontext = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32) + dmean * inverse_count
        dcontext = rounded(dcontext, dtype)
        tl.store(ptrs, dcontext, mask=mask)
        sums = add_column_sums(sums, dcontext, _CHUNK, PRECISION)

    row = table_row(chunk_sums_ptr, DCONTEXT, num_heads, pid_bh, num_chunks, pid_c, BLOCK_D)
    tl.store(row + offs_d, column_sums(sums, _CHUNK))
    vectors_row = partial_vectors_ptr + tl.program_id(0).to(tl.int64) * 6 * BLOCK_D + offs_d
    tl.store(vectors_row + W_G * BLOCK_D, column_sums(sums, W_G))
    store_partial(partial_matrices_ptr, dw_g, W_G, BLOCK_D)
    if pid_c == 0:
        store_state(dsums_ptr, num_heads, pid_bh, dstat_i, STAT, HEAD_DIM, BLOCK_D)


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_total_kernel(
    sums_ptr, stride_sk, stride_sb, stride_sh, stride_sd,
    length_ptr,
    matrices_ptr, vectors_ptr, chunk_sums_ptr,
    dsums_after_ptr, stride_ak, stride_ab, stride_ah, stride_ad,
    drows_ptr,  # [B * H, D], contiguous: what each token gets of the sums' gradients
    dsums_ptr,  # [2, B, H, D], contiguous
    partial_matrices_ptr,  # [programs, 4, BLOCK_D, BLOCK_D]: one program a head here
    partial_vectors_ptr,  # [programs, 6, BLOCK_D]
    L, H, num_heads, num_chunks,
    HAS_DSUMS: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_STATE: tl.constexpr,
    IS_NVIDIA: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    pid_bh = tl.program_id(0)
    b = (pid_bh // H).to(tl.int64)
    h = (pid_bh % H).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    own, context, inverse_count = total_context(
        chunk_sums_ptr, sums_ptr, stride_sk, stride_sb, stride_sh, stride_sd, length_ptr,
        b, h, pid_bh, L, num_heads, num_chunks, HEAD_DIM, HAS_STATE, BLOCK_D,
    )  # fmt: skip
    mean = context * inverse_count
    w_g = matrix(matrices_ptr, W_G, True, BLOCK_D).to(tl.float32)
    gate = gate_of_mean(mean, w_g, vectors_ptr, IS_NVIDIA, BLOCK_D)

    row = table_row(chunk_sums_ptr, DSTAT, num_heads, pid_bh, num_chunks, 0, BLOCK_D)
    dstat = sum_rows(row, 0, num_chunks, BLOCK_D, BLOCK_D, BLOCK_D)
    row = table_row(chunk_sums_ptr, DCONTEXT, num_heads, pid_bh, num_chunks, 0, BLOCK_D)
    dcontext = sum_rows(row, 0, num_chunks, BLOCK_D, BLOCK_D, BLOCK_D)
    if HAS_DSUMS:
        dstat += load_state(
            dsums_after_ptr, stride_ak, stride_ab, stride_ah, stride_ad, b, h,
            STAT, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        dcontext += load_state(
            dsums_after_ptr, stride_ak, stride_ab, stride_ah, stride_ad, b, h,
            CONTEXT, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    dlogit = 2.0 * dstat * own * gate * (1.0 - gate)
    dcontext += tl.sum(w_g * dlogit[:, None], 0) * inverse_count
    drow = dcontext + gate * dstat
    tl.store(drows_ptr + pid_bh * HEAD_DIM + offs_d, drow, mask=offs_d < HEAD_DIM)
    store_state(dsums_ptr, num_heads, pid_bh, dstat, STAT, HEAD_DIM, BLOCK_D)
    store_state(dsums_ptr, num_heads, pid_bh, dcontext, CONTEXT, HEAD_DIM, BLOCK_D)
    store_partial(partial_matrices_ptr, dlogit[:, None] * mean[None, :], W_G, BLOCK_D)
    tl.store(partial_vectors_ptr + (pid_bh * 6 + W_G) * BLOCK_D + offs_d, dlogit)


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_context_kernel(
    dcontext_ptr,  # [B * H, L, BLOCK_D], contiguous
    mask_ptr, stride_mb, stride_ml,
    chunk_sums_ptr,
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
            ptrs = scratch_ptrs(dcontext_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
            dcontext = tl.load(ptrs, mask=(offs_m < L - start)[:, None], other=0.0)
            dv += scan(ones_after, dcontext, PRECISION)
            dcontext_i += tl.sum(dcontext.to(tl.float32), 0)
        if HAS_MASK:
            keep = is_kept(mask_ptr, stride_ml, start, L, BLOCK_M)
            dv = tl.where(keep[:, None], dv, 0.0)
        tl.store(dv_ptrs, rounded(dv, dtype), mask=mask)
    if IS_CAUSAL and pid_c == 0:
        store_state(dsums_ptr, num_heads, pid_bh, dcontext_i, CONTEXT, HEAD_DIM, BLOCK_D)


# fmt: off
@triton.jit
def _store_row(
    dw_ptr, db_ptr, partial_matrices_ptr, partial_vectors_ptr, row, num_programs,
    WHICH: tl.constexpr, SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Row `row` of a matrix's gradient; the bias's counts as the last of them."""
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    if row < HEAD_DIM:
        rows = partial_matrices_ptr + (WHICH * BLOCK_D + row) * BLOCK_D
        stride = 4 * BLOCK_D * BLOCK_D
        total = sum_rows(rows, 0, num_programs, stride, BLOCK_D, BLOCK_D, _ROWS) * SCALE
        tl.store(dw_ptr + row * HEAD_DIM + offs_d, total.to(dw_ptr.dtype.element_ty), mask=mask_d)
    else:
        _store_vector(db_ptr, partial_vectors_ptr, num_programs, WHICH, SCALE, HEAD_DIM, BLOCK_D)


# fmt: off
@triton.jit
def _store_vector(
    ptr, partial_vectors_ptr, num_programs,
    WHICH: tl.constexpr, SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    offs_d = tl.arange(0, BLOCK_D)
    rows = partial_vectors_ptr + WHICH * BLOCK_D
    total = sum_rows(rows, 0, num_programs, 6 * BLOCK_D, BLOCK_D, BLOCK_D, _ROWS) * SCALE
    tl.store(ptr + offs_d, total.to(ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_weights_kernel(
    partial_matrices_ptr,  # [programs, 4, BLOCK_D, BLOCK_D]
    partial_vectors_ptr,  # [programs, 6, BLOCK_D]
    dw_q_ptr, db_q_ptr, dw_l_ptr, db_l_ptr, dw_g_ptr, db_g_ptr, dw_f_ptr, db_f_ptr,
    dnorm_weight_ptr, dnorm_bias_ptr,
    num_programs,
    num_gate_programs,  # of those that have a share of W_g's gradient
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    which = tl.program_id(0) // (HEAD_DIM + 1)
    row = tl.program_id(0) % (HEAD_DIM + 1)
    if which == W_Q:
        _store_row(
            dw_q_ptr, db_q_ptr, partial_matrices_ptr, partial_vectors_ptr, row, num_programs,
            W_Q, 0.5, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    elif which == W_L:
        _store_row(
            dw_l_ptr, db_l_ptr, partial_matrices_ptr, partial_vectors_ptr, row, num_programs,
            W_L, 1.0, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    elif which == W_F:
        _store_row(
            dw_f_ptr, db_f_ptr, partial_matrices_ptr, partial_vectors_ptr, row, num_programs,
            W_F, 0.5, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    elif which == W_G:
        _store_row(
            dw_g_ptr, db_g_ptr, partial_matrices_ptr, partial_vectors_ptr, row, num_gate_programs,
            W_G, 0.5, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    elif row == 0:
        _store_vector(
            dnorm_weight_ptr, partial_vectors_ptr, num_programs, NORM_WEIGHT, 1.0, HEAD_DIM, BLOCK_D
        )
    elif row == 1:
        _store_vector(
            dnorm_bias_ptr, partial_vectors_ptr, num_programs, NORM_BIAS, 1.0, HEAD_DIM, BLOCK_D
        )


_launch_ratio = Launcher(_attention_backward_ratio_kernel)
_launch_norm = Launcher(_attention_backward_norm_kernel)
_launch_gate = Launcher(_attention_backward_gate_kernel)
_launch_products = Launcher(_attention_backward_products_kernel)
_launch_stat = Launcher(_attention_backward_stat_kernel)
_launch_total = Launcher(_attention_backward_total_kernel)
_launch_context = Launcher(_attention_backward_context_kernel)
_launch_weights = Launcher(_attention_backward_weights_kernel)


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
    B, H, _, D = v.shape
    dv = v.new_empty(v.shape)
    dsums = v.new_empty((2, B, H, D), dtype=torch.float32)
    call = problem.call(v, mask, sums, length, config)
    inverse = _tokens(call, _inverse_dtype(v.dtype))
    work = _Work(
        call,
        _running_sums(call, weights, causal, torch.empty_like(dsums)),
        _tokens(call, v.dtype),
        inverse,
        inverse if inverse.dtype == v.dtype else _tokens(call, v.dtype),
        _tokens(call, v.dtype),
        _tokens(call, v.dtype) if causal else dv,
        dv,
        dsums,
        dsums_after,
        *_partials(call),
        causal,
    )
    _backward_ratio(work)
    _backward_norm(work, dout)
    _backward_gate(work)
    _backward_products(work)
    if causal:
        _backward_stat(work)
        _backward_context(work, drows=dsums)
    else:
        _backward_context(work, _backward_total(work))
    return dv, dsums, _backward_weights(work, weights)


class _Work(NamedTuple):
    """What the launches share: one call, its scratch memory and its outputs."""

    call: problem.Call
    scratch: problem.Scratch
    half_ratio: torch.Tensor
    inverse: torch.Tensor
    dlocal: torch.Tensor
    df: torch.Tensor
    dcontext: torch.Tensor
    dv: torch.Tensor
    dsums: torch.Tensor
    dsums_after: torch.Tensor | None
    partial_matrices: torch.Tensor
    partial_vectors: torch.Tensor
    causal: bool

    @property
    def partials(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each program leaves its share of the weights' gradients."""
        return self.partial_matrices, self.partial_vectors

    @property
    def dsums_after_args(self) -> tuple[Any, ...]:
        """The gradients of the sums with their strides, or what stands in for them."""
        if self.dsums_after is None:
            return self.dsums, 0, 0, 0, 0
        return self.dsums_after, *self.dsums_after.stride()


def _running_sums(
    call: problem.Call, weights: EvoWeights, causal: bool, sums_after: torch.Tensor
) -> problem.Scratch:
    has_tiles = causal and call.blocks["BLOCK_M"] == support.BLOCK_M
    if has_tiles and support.takes(call.v[0], call.flags["HAS_MASK"], call.flags["HAS_STATE"]):
        from attn_evo._hopper import forward

        return forward.running_sums(call, weights, sums_after)
    return running_sums(call, weights, causal, sums_after)


def _tokens(call: problem.Call, dtype: torch.dtype) -> torch.Tensor:
    L, _, num_heads, *_ = call.sizes
    v = call.v[0]
    return v.new_empty((num_heads, L, call.blocks["BLOCK_D"]), dtype=dtype)


def _partials(call: problem.Call) -> tuple[torch.Tensor, torch.Tensor]:
    block_d = call.blocks["BLOCK_D"]
    matrices = (call.num_programs, 4, block_d, block_d)
    new = functools.partial(call.v[0].new_empty, dtype=torch.float32)
    return new(matrices), new((call.num_programs, 6, block_d))


def _tiles(name: str, call: problem.Call) -> TileConfig:
    return configs.backward_kernel(name, call.v[0], call.config)


def _inverse_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of 1 / denominator, which may reach 1e8, beyond float16."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _backward_ratio(work: _Work) -> None:
    call = work.call
    _launch_ratio(
        call.num_programs,
        strides=call.strides,
        args=(*call.inputs, *work.scratch, work.half_ratio, work.inverse, *call.sizes),
        constexprs={"IS_CAUSAL": work.causal, **call.flags, **call.numerics, **call.blocks},
        config=_tiles("ratio", call),
    )


def _backward_norm(work: _Work, dout: torch.Tensor) -> None:
    call = work.call
    numerics = call.numerics_of_one_weight
    _launch_norm(
        call.num_programs,
        strides=(call.strides, dout.stride()),
        args=(
            *call.inputs, *work.scratch, dout, *dout.stride(),
            work.half_ratio, work.df, work.dcontext, *work.partials, *call.sizes,
        ),
        constexprs={"IS_CAUSAL": work.causal, **call.flags, **numerics, **call.blocks},
        config=_tiles("norm" if work.causal else "norm_full", call),
    )  # fmt: skip


def _backward_gate(work: _Work) -> None:
    call, scratch = work.call, work.scratch
    config = _tiles("gate", call)
    _launch_gate(
        call.num_programs,
        strides=call.strides,
        args=(
            *call.v, *call.mask, scratch.matrices, scratch.biases, scratch.chunk_sums,
            work.half_ratio, work.inverse, work.dlocal, work.df, work.dv,
            *call.sizes_in(config.block_m),
        ),
        constexprs={
            "IS_CAUSAL": work.causal, "HEAD_DIM": call.flags["HEAD_DIM"],
            "HAS_MASK": call.flags["HAS_MASK"], **call.numerics,
            **call.blocks, "BLOCK_M": config.block_m,
        },
        config=config,
    )  # fmt: skip


def _backward_products(work: _Work) -> None:
    call = work.call
    config = _tiles("products", call)
    _launch_products(
        call.num_programs,
        strides=call.strides,
        args=(
            *call.v, *call.mask, work.half_ratio, work.dlocal, *work.partials,
            *call.sizes_in(config.block_m),
        ),
        constexprs={
            "HEAD_DIM": call.flags["HEAD_DIM"], "HAS_MASK": call.flags["HAS_MASK"],
            "PRECISION": call.numerics["PRECISION"], **call.blocks, "BLOCK_M": config.block_m,
        },
        config=config,
    )  # fmt: skip


def _backward_stat(work: _Work) -> None:
    call, scratch, dsums_after = work.call, work.scratch, work.dsums_after_args
    _launch_stat(
        call.num_programs,
        strides=(call.strides, dsums_after[1:]),
        args=(
            *call.v, *call.mask, call.length,
            scratch.matrices, scratch.biases, scratch.chunk_sums, scratch.contexts,
            *dsums_after, work.df, work.dcontext, work.dv, work.dsums, *work.partials, *call.sizes,
        ),
        constexprs={
            "HAS_DSUMS": work.dsums_after is not None,
            **call.flags, **call.numerics_of_one_weight, **call.blocks,
        },
        config=_tiles("stat", call),
    )  # fmt: skip


def _backward_total(work: _Work) -> torch.Tensor:
    """What "stat" does, for the one stat and context of a head; returns what each token gets."""
    call, scratch, dsums_after = work.call, work.scratch, work.dsums_after_args
    L, H, num_heads, _, num_chunks, _ = call.sizes
    drows = torch.empty_like(work.dsums[0])
    _launch_total(
        num_heads,
        strides=(call.sums[1:], dsums_after[1:]),
        args=(
            *call.sums, call.length, scratch.matrices, scratch.vectors, scratch.chunk_sums,
            *dsums_after, drows, work.dsums, *work.partials, L, H, num_heads, num_chunks,
        ),
        constexprs={
            "HAS_DSUMS": work.dsums_after is not None, "HEAD_DIM": call.flags["HEAD_DIM"],
            "HAS_STATE": call.flags["HAS_STATE"], "IS_NVIDIA": call.numerics["IS_NVIDIA"],
            "BLOCK_D": call.blocks["BLOCK_D"],
        },
        config=configs.SUMS,
    )  # fmt: skip
    return drows


def _backward_context(work: _Work, drows: torch.Tensor) -> None:
    call, dsums_after = work.call, work.dsums_after_args
    config = _tiles("context", call)
    _launch_context(
        call.num_programs,
        strides=(call.mask[1:], dsums_after[1:]),
        args=(
            work.dcontext, *call.mask, work.scratch.chunk_sums, *dsums_after,
            drows, work.dv, work.dsums, *call.sizes_in(config.block_m),
        ),
        constexprs={
            "IS_CAUSAL": work.causal, "HAS_DSUMS": work.dsums_after is not None,
            "HEAD_DIM": call.flags["HEAD_DIM"], "HAS_MASK": call.flags["HAS_MASK"],
            "PRECISION": call.numerics["PRECISION"], **call.blocks, "BLOCK_M": config.block_m,
        },
        config=config,
    )  # fmt: skip


def _backward_weights(work: _Work, weights: EvoWeights) -> EvoWeights:
    call = work.call
    dim, block_d = call.flags["HEAD_DIM"], call.blocks["BLOCK_D"]
    num_gate_programs = call.num_programs if work.causal else call.sizes[2]
    dweights = EvoWeights(*(weight.new_empty(weight.shape) for weight in weights))
    _launch_weights(
        5 * (dim + 1),
        strides=weights.w_q.dtype,
        args=(*work.partials, *dweights, call.num_programs, num_gate_programs),
        constexprs={"HEAD_DIM": dim, "BLOCK_D": block_d},
        config=configs.SUMS,
    )
    return dweights
