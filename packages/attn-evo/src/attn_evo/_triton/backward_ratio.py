"""n = q / denominator of each token, and 1 / denominator, which `norm` and `gate` take."""

from __future__ import annotations

import triton
import triton.language as tl

from attn_core.launch import Launcher
from attn_evo._triton import problem
from attn_evo._triton.backward_work import Work, tiles_of
from attn_evo._triton.tiles import (
    CONTEXT,
    MOST_STAYING_BIASES,
    STAT,
    W_G,
    W_L,
    W_Q,
    bias_rows,
    chunk_of_program,
    inverse_counts,
    inverse_denominator,
    linear,
    load_tokens,
    matrix,
    rounded,
    running_stat,
    scratch_ptrs,
    stat_before,
    table_row,
    total_sums,
    triangle,
)


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
    pid_bh, pid_c, b, h, first, last = chunk_of_program(H, num_tiles, num_chunks, tiles_per_chunk)
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
    for tile in range(first, last):
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


_launch_ratio = Launcher(_attention_backward_ratio_kernel)


def backward_ratio(work: Work) -> None:
    call = work.call
    _launch_ratio(
        call.num_programs,
        strides=call.strides,
        args=(*call.inputs, *work.scratch, work.half_ratio, work.inverse, *call.sizes),
        constexprs={"IS_CAUSAL": work.causal, **call.flags, **call.numerics, **call.blocks},
        config=tiles_of("ratio", call),
    )
