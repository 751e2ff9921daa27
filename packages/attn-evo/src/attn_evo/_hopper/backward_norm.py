"""LayerNorm backward on Hopper, in place of two Triton kernels of the backward pass.

It computes the output as `output` does, keeps what the launches after it need of that, and while
the rest is still in registers goes back to the gradients of context and of W_f gate + b_f.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_core.launch import Launcher
from attn_core.tiles.gluon_names import thread_barrier
from attn_core.tiles.hopper import reciprocal
from attn_evo._hopper.support import BLOCK_M, HELD_DIM
from attn_evo._hopper.tiles import (
    FLAT,
    STAGES,
    accumulators,
    add_column_sums,
    add_magnitudes,
    begin_linear,
    begin_with,
    column_accumulators,
    column_sums,
    has_values,
    left_operand,
    opaque_zero,
    start_copy,
    store_columns_of_ones,
    store_gated_values,
    store_partial,
    store_rows,
    store_triangle,
    sum_rows,
    with_sign,
)
from attn_evo._triton import configs, problem
from attn_evo._triton.tiles import (
    DCONTEXT,
    EPSILON,
    NORM_BIAS,
    NORM_EPSILON,
    NORM_WEIGHT,
    W_F,
    W_G,
    W_L,
    W_Q,
    chunk_of_program,
    rounded,
    sigmoid_of_double,
    twice_gated,
)

if TYPE_CHECKING:
    from attn_evo._triton.backward_work import Work

_HELD_DIM = gl.constexpr(HELD_DIM)

# Columns of sums.
_OF_NORM_WEIGHT = gl.constexpr(0)
_OF_NORM_BIAS = gl.constexpr(1)
_OF_F = gl.constexpr(2)
_OF_DCONTEXT = gl.constexpr(3)


@gluon.jit
def _vector_row(vector_ptr, D: gl.constexpr):
    """[1, D] beside tiles of results."""
    offs_d = gl.arange(0, D, gl.SliceLayout(0, accumulators(D)))
    return gl.expand_dims(gl.load(vector_ptr + offs_d), 0)


@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_norm_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl,
    dout_ptr, stride_dob, stride_doh, stride_dol,
    matrices_ptr, vectors_ptr, tile_sums_ptr, chunk_sums_ptr,
    contexts_ptr,  # [B * H, tiles, D]: the context before each tile
    half_ratio_ptr,  # [B * H, L, D], contiguous
    inverse_ptr,  # [B * H, L, D], contiguous: 1 / denominator, with the sign of stat
    df_ptr,  # [B * H, L, D], contiguous
    dcontext_ptr,  # [B * H, L, D], contiguous: written where IS_CAUSAL
    partial_matrices_ptr,  # [programs, 4, D, D]
    partial_vectors_ptr,  # [programs, 6, D]
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
    IS_CAUSAL: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = v_ptr.dtype.element_ty
    IS_BFLOAT16: gl.constexpr = dtype == gl.bfloat16
    HOLDS_DW: gl.constexpr = D <= _HELD_DIM
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, D], dtype)
    ONES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([16, 16], dtype)
    HALF: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_M], dtype)
    COLUMNS: gl.constexpr = gl.SliceLayout(1, column_accumulators(D))
    ROW: gl.constexpr = gl.BlockedLayout([1], [32], [D // 16], [0])
    pid_bh, pid_c, b, h, first, last = chunk_of_program(H, num_tiles, num_chunks, tiles_per_chunk)
    stat_head = (num_heads + pid_bh).to(gl.int64)  # of tables [4, B * H, rows, D]
    v_ptr += b * stride_vb + h * stride_vh + (first * BLOCK_M).to(gl.int64) * stride_vl
    dout_ptr += b * stride_dob + h * stride_doh + (first * BLOCK_M).to(gl.int64) * stride_dol
    token = (pid_bh.to(gl.int64) * L + first * BLOCK_M) * D
    half_ratio_ptr += token
    inverse_ptr += token
    df_ptr += token
    dcontext_ptr += token
    contexts_ptr += pid_bh.to(gl.int64) * num_tiles * D
    if IS_CAUSAL:
        contexts_ptr += first * D
    tile_sums_ptr += (stat_head * num_tiles + first) * D
    stat_sums_ptr = chunk_sums_ptr + stat_head * num_chunks * D

    weights = gl.allocate_shared_memory(dtype, [4, D, D], TILE)
    biases = gl.allocate_shared_memory(gl.float32, [4, D], FLAT)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], TILE)
    dout_tile = gl.allocate_shared_memory(dtype, [BLOCK_M, D], TILE)
    work = gl.allocate_shared_memory(dtype, [2, BLOCK_M, D], TILE)
    ones = gl.allocate_shared_memory(dtype, [4, 16, 16], ONES)
    half_tiles = gl.allocate_shared_memory(dtype, [1, BLOCK_M, BLOCK_M], HALF)
    context_row = gl.allocate_shared_memory(gl.float32, [D], FLAT)
    stat_row = gl.allocate_shared_memory(gl.float32, [D], FLAT)
    start_copy(v_tiles.index(0), v_ptr, stride_vl, L - first * BLOCK_M, BLOCK_M, D)
    start_copy(dout_tile, dout_ptr, stride_dol, L - first * BLOCK_M, BLOCK_M, D)
    offs_d = gl.arange(0, D, ROW)
    for which in gl.static_range(4):
        start_copy(weights.index(which), matrices_ptr + which * D * D, D, D, D, D)
        biases.index(which).store(gl.load(vectors_ptr + which * D + offs_d))
    async_copy.commit_group()
    store_columns_of_ones(ones, 4, D)

    context_i = gl.load(contexts_ptr + offs_d)
    if IS_CAUSAL:
        store_triangle(half_tiles.index(0), False, BLOCK_M, D)
        stat_i = sum_rows(stat_sums_ptr, pid_c, D, ROW)
    else:
        context_row.store(context_i * 0.5)
        stat_row.store(gl.load(stat_sums_ptr + offs_d))
    offs_m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, accumulators(D)))
    if HOLDS_DW:
        dw_f = gl.zeros([D, D], gl.float32, accumulators(D))
    sums = gl.zeros([D, 16], gl.float32, column_accumulators(D))
    for tile in range(first, last):
        start = tile * BLOCK_M
        rows = L - start
        stage = (tile - first) % STAGES
        zero = opaque_zero(rows)
        half_tile = half_tiles.index(zero)
        high = work.index(zero)
        low = work.index(1 + zero)
        if IS_CAUSAL:
            context_row.store(context_i * 0.5)
            stat_row.store(stat_i)
        async_copy.wait_group(0)
        num_rows = gl.where(tile + 1 < last, rows - BLOCK_M, 0)
        v_ptr += BLOCK_M * stride_vl
        start_copy(v_tiles.index(1 - stage), v_ptr, stride_vl, num_rows, BLOCK_M, D)
        async_copy.commit_group()
        if IS_CAUSAL:
            stat_i += gl.load(tile_sums_ptr + offs_d)
            tile_sums_ptr += D
            contexts_ptr += gl.where(tile + 1 < last, D, 0)
            context_i = gl.load(contexts_ptr + offs_d)

        v = v_tiles.index(stage)
        context = begin_with(context_row, BLOCK_M, D)
        stat = begin_with(stat_row, BLOCK_M, D)
        if IS_CAUSAL:
            context = warpgroup_mma(half_tile, v, context, is_async=True)
            context = warpgroup_mma_wait(0, deps=(context,))
            inverse_count = gl.expand_dims(2.0 / (start + 1 + offs_m).to(gl.float32), 1)
            mean = left_operand((context * inverse_count).to(dtype), low, D)
            logit = begin_linear(mean, weights, biases, W_G + zero, BLOCK_M, D)
            logit = warpgroup_mma_wait(0, deps=(logit,))
            store_gated_values(v, logit, high, low, dtype, D)
            stat = warpgroup_mma(half_tile, high, stat, is_async=True)
            stat = warpgroup_mma(half_tile, low, stat, is_async=True)
            stat = warpgroup_mma_wait(0, deps=(stat,))
        local = begin_linear(v, weights, biases, W_L + zero, BLOCK_M, D)
        local = warpgroup_mma_wait(0, deps=(local,))
        inverse = reciprocal(add_magnitudes(stat, local) + EPSILON)
        query = begin_linear(v, weights, biases, W_Q + zero, BLOCK_M, D)
        query = warpgroup_mma_wait(0, deps=(query,))
        half_ratio = query * inverse
        high.store(with_sign(inverse, stat).to(dtype))
        store_rows(inverse_ptr, high, rows, BLOCK_M, D)
        high.store(rounded(half_ratio, dtype))
        store_rows(half_ratio_ptr, high, rows, BLOCK_M, D)
        gate = half_ratio * v.load(accumulators(D)).to(gl.float32)
        gate = twice_gated(gate, half_ratio, IS_BFLOAT16)
        low.store(rounded(gate, dtype))
        fence_async_shared()
        final = begin_linear(low, weights, biases, W_F + zero, BLOCK_M, D)
        final = warpgroup_mma_wait(0, deps=(final,))

        sigma = sigmoid_of_double(final, IS_BFLOAT16)
        x = 2.0 * sigma * context
        mean_x = gl.expand_dims(gl.sum(x, 1) * (1.0 / D), 1)
        x -= mean_x
        variance = gl.sum(x * x, 1) * (1.0 / D) + NORM_EPSILON
        scale = gl.rsqrt(variance)
        deviation = gl.expand_dims(variance * scale, 1)
        scale = gl.where(has_values(v.load(accumulators(D))), scale, 0.0)
        scale = gl.expand_dims(scale, 1)
        x *= scale
        high.store(rounded(dout_tile.load(accumulators(D)).to(gl.float32) * x, dtype))
        fence_async_shared()
        sums = add_column_sums(sums, dout_tile, ones, _OF_NORM_BIAS + zero, BLOCK_M)
        sums = add_column_sums(sums, high, ones, _OF_NORM_WEIGHT + zero, BLOCK_M)
        dx = dout_tile.load(accumulators(D)).to(gl.float32)
        dx *= _vector_row(vectors_ptr + NORM_WEIGHT * D, D)
        mean_dx = gl.expand_dims(gl.sum(dx, 1) * (1.0 / D), 1)
        along = gl.expand_dims(gl.sum(dx * x, 1) * (1.0 / D), 1)
        dx = scale * (dx - mean_dx - x * along)
        x = x * deviation + mean_x
        df = rounded(2.0 * dx * x * (1.0 - sigma), dtype)
        dcontext = rounded(dx * sigma, dtype)
        sums = warpgroup_mma_wait(0, deps=(sums,))
        if not HOLDS_DW:  # the other warpgroup's products have read what is overwritten now
            thread_barrier()
        high.store(df)
        fence_async_shared()
        dout_ptr += BLOCK_M * stride_dol
        start_copy(dout_tile, dout_ptr, stride_dol, num_rows, BLOCK_M, D)
        async_copy.commit_group()
        if HOLDS_DW:
            dw_f = warpgroup_mma(high.permute((1, 0)), low, dw_f, is_async=True)
        sums = add_column_sums(sums, high, ones, _OF_F + zero, BLOCK_M)
        store_rows(df_ptr, high, rows, BLOCK_M, D)
        if HOLDS_DW:
            dw_f, sums = warpgroup_mma_wait(0, deps=(dw_f, sums))
        else:
            sums = warpgroup_mma_wait(0, deps=(sums,))
        low.store(dcontext)
        if IS_CAUSAL:
            store_rows(dcontext_ptr, low, rows, BLOCK_M, D)
        else:
            fence_async_shared()
            sums = add_column_sums(sums, low, ones, _OF_DCONTEXT + zero, BLOCK_M)
            sums = warpgroup_mma_wait(0, deps=(sums,))
        half_ratio_ptr += BLOCK_M * D
        inverse_ptr += BLOCK_M * D
        df_ptr += BLOCK_M * D
        dcontext_ptr += BLOCK_M * D

    offs_d = gl.arange(0, D, COLUMNS)
    row = partial_vectors_ptr + gl.program_id(0).to(gl.int64) * 6 * D + offs_d
    gl.store(row + W_F * D, column_sums(sums, _OF_F, D))
    gl.store(row + NORM_WEIGHT * D, column_sums(sums, _OF_NORM_WEIGHT, D))
    gl.store(row + NORM_BIAS * D, column_sums(sums, _OF_NORM_BIAS, D))
    if not IS_CAUSAL:
        head = DCONTEXT * num_heads.to(gl.int64) + pid_bh
        row = chunk_sums_ptr + (head * num_chunks + pid_c) * D + offs_d
        gl.store(row, column_sums(sums, _OF_DCONTEXT, D))
    if HOLDS_DW:
        store_partial(partial_matrices_ptr, dw_f, W_F, D)


_launch_norm = Launcher(_attention_backward_norm_kernel)


def backward_norm(work: Work, dout: torch.Tensor) -> None:
    """As `_triton.backward`'s ratio and norm, but for the gradient of W_f where D > 64."""
    call, scratch = work.call, work.scratch
    v = call.v[0]
    args: tuple[Any, ...] = (
        v, *v.stride()[:3], dout, *dout.stride()[:3], scratch.matrices, scratch.vectors,
        scratch.tile_sums, scratch.chunk_sums, scratch.contexts, work.half_ratio, work.inverse,
        work.df, work.dcontext, *work.partials, *call.sizes,
    )  # fmt: skip
    _launch_norm(
        call.num_programs,
        strides=(v.stride(), dout.stride()),
        args=args,
        constexprs={"IS_CAUSAL": work.causal, "D": v.shape[-1], "BLOCK_M": BLOCK_M},
        config=configs.hopper_kernel(v, call.config),
    )
