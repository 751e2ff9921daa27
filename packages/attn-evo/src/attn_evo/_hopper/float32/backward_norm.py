"""LayerNorm backward in float32 on Hopper, as `_hopper.backward_norm` in 16 bits.

But for the gradient of b_f, which `gate` adds up: here no register is left for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from attn_core.launch import Launcher
from attn_core.tiles.gluon_names import thread_barrier
from attn_core.tiles.hopper import reciprocal
from attn_evo._hopper.float32.tiles import (
    BLOCK_M,
    COLUMN,
    PARTS,
    RESULT,
    ROW,
    SPREAD_ROW,
    WARPS,
    D,
    add_weight_gradient,
    allocate_row,
    allocate_tiles,
    begin_linear,
    column_sums,
    load_row,
    load_rows,
    load_weight,
    no_column_sums,
    rows_of_threads,
    start_scan,
    store_partial,
    store_parts,
    store_row,
    store_rows,
    store_triangle,
    sum_rows,
)
from attn_evo._hopper.tiles import add_magnitudes, magnitude, opaque_zero, with_sign
from attn_evo._triton import problem
from attn_evo._triton.tiles import (
    EPSILON,
    NORM_BIAS,
    NORM_EPSILON,
    NORM_WEIGHT,
    W_F,
    W_G,
    W_L,
    W_Q,
    chunk_of_program,
    sigmoid_of_double,
    twice_gated,
)

if TYPE_CHECKING:
    from attn_evo._triton.backward_work import Work


@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_norm_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl,
    dout_ptr, stride_dob, stride_doh, stride_dol,
    matrices_ptr, vectors_ptr, tile_sums_ptr, chunk_sums_ptr,
    contexts_ptr,  # [B * H, tiles, D]: the context before each tile
    half_ratio_ptr,  # [B * H, L, D], contiguous
    inverse_ptr,  # [B * H, L, D], contiguous: 1 / denominator, with the sign of stat
    df_ptr,  # [B * H, L, D], contiguous
    dcontext_ptr,  # [B * H, L, D], contiguous
    partial_matrices_ptr,  # [programs, 4, D, D]
    partial_vectors_ptr,  # [programs, 6, D]
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
):  # fmt: skip
    pid_bh, pid_c, b, h, first, last = chunk_of_program(H, num_tiles, num_chunks, tiles_per_chunk)
    v_ptr += b * stride_vb + h * stride_vh + (first * BLOCK_M).to(gl.int64) * stride_vl
    dout_ptr += b * stride_dob + h * stride_doh + (first * BLOCK_M).to(gl.int64) * stride_dol
    head = pid_bh.to(gl.int64)
    stat_head = num_heads.to(gl.int64) + pid_bh  # of tables [4, B * H, rows, D]
    contexts_ptr += (head * num_tiles + first) * D
    tile_sums_ptr += (stat_head * num_tiles + first) * D
    v = load_rows(v_ptr, stride_vl, L - first * BLOCK_M)

    weights = allocate_tiles(4 * PARTS)
    held = allocate_tiles(PARTS)  # v, later df
    work = allocate_tiles(PARTS)
    triangle = allocate_tiles(1)
    stat_row = allocate_row()
    for which in gl.static_range(4):
        load_weight(weights, which * PARTS, matrices_ptr, which)
    store_triangle(triangle.index(0), False)
    stat_i = sum_rows(chunk_sums_ptr + stat_head * num_chunks * D, pid_c, SPREAD_ROW)
    dw_f = gl.zeros([D, D], gl.float32, RESULT)
    dnorm_weight = no_column_sums()
    dnorm_bias = no_column_sums()
    for tile in range(first, last):
        start = tile * BLOCK_M
        rows = L - start
        zero = opaque_zero(rows)
        token = (head * L + start + zero) * D
        stat_row.store(stat_i)
        store_parts(held, zero, v)
        is_alive = gl.max(magnitude(v), 1) > 0
        context = start_scan(triangle.index(zero), held, zero)
        context = warpgroup_mma_wait(0, deps=(context,))
        context += gl.expand_dims(load_row(contexts_ptr, ROW), 0)
        count = (start + 1 + gl.arange(0, BLOCK_M, COLUMN)).to(gl.float32)
        store_parts(work, zero, context * gl.expand_dims(1.0 / count, 1))
        logit = begin_linear(work, zero, weights, W_G * PARTS + zero, vectors_ptr + W_G * D)
        logit = warpgroup_mma_wait(0, deps=(logit,))
        thread_barrier()  # the other warpgroup's products have read what is overwritten now
        store_parts(work, zero, sigmoid_of_double(logit, False) * v)
        stat = start_scan(triangle.index(zero), work, zero)
        stat_i += load_row(tile_sums_ptr, SPREAD_ROW)
        tile_sums_ptr += D
        contexts_ptr += gl.where(tile + 1 < last, D, 0)
        local = begin_linear(held, zero, weights, W_L * PARTS + zero, vectors_ptr + W_L * D)
        query = begin_linear(held, zero, weights, W_Q * PARTS + zero, vectors_ptr + W_Q * D)
        stat, local, query = warpgroup_mma_wait(0, deps=(stat, local, query))
        stat += gl.expand_dims(stat_row.load(ROW), 0)
        inverse = reciprocal(add_magnitudes(stat, local) + EPSILON)
        half_ratio = query * inverse
        store_rows(inverse_ptr + token, with_sign(inverse, stat), rows)
        store_rows(half_ratio_ptr + token, half_ratio, rows)
        thread_barrier()
        store_parts(work, zero, twice_gated(half_ratio * v, half_ratio, False))
        final = begin_linear(work, zero, weights, W_F * PARTS + zero, vectors_ptr + W_F * D)
        dout = load_rows(dout_ptr, stride_dol, rows)
        dout_ptr += BLOCK_M * stride_dol
        final = warpgroup_mma_wait(0, deps=(final,))

        sigma = sigmoid_of_double(final, False)
        x = sigma * context
        mean_x = gl.expand_dims(gl.sum(x, 1) * (1.0 / D), 1)
        x -= mean_x
        variance = gl.sum(x * x, 1) * (1.0 / D) + NORM_EPSILON
        scale = gl.rsqrt(variance)
        deviation = gl.expand_dims(variance * scale, 1)
        scale = gl.expand_dims(gl.where(is_alive, scale, 0.0), 1)
        x *= scale
        dnorm_bias += rows_of_threads(dout)
        dnorm_weight += rows_of_threads(dout * x)
        dx = dout * gl.expand_dims(load_row(vectors_ptr + NORM_WEIGHT * D, ROW), 0)
        mean_dx = gl.expand_dims(gl.sum(dx, 1) * (1.0 / D), 1)
        along = gl.expand_dims(gl.sum(dx * x, 1) * (1.0 / D), 1)
        dx = scale * (dx - mean_dx - x * along)
        x = x * deviation + mean_x
        df = 2.0 * dx * x * (1.0 - sigma)
        store_rows(dcontext_ptr + token, dx * sigma, rows)
        store_rows(df_ptr + token, df, rows)
        v_ptr += BLOCK_M * stride_vl
        v = load_rows(v_ptr, stride_vl, gl.where(tile + 1 < last, rows - BLOCK_M, 0))
        store_parts(held, zero, df)
        dw_f = add_weight_gradient(held, zero, work, zero, dw_f)
        dw_f = warpgroup_mma_wait(0, deps=(dw_f,))
        thread_barrier()

    row = partial_vectors_ptr + gl.program_id(0).to(gl.int64) * 6 * D
    store_row(row + NORM_WEIGHT * D, column_sums(dnorm_weight))
    store_row(row + NORM_BIAS * D, column_sums(dnorm_bias))
    store_partial(partial_matrices_ptr, dw_f, W_F)


_launch_norm = Launcher(_attention_backward_norm_kernel)


def backward_norm(work: Work, dout: torch.Tensor) -> None:
    """As `_hopper.backward_norm`'s, but for the gradient of b_f."""
    call, scratch = work.call, work.scratch
    v = call.v[0]
    _launch_norm(
        call.num_programs,
        strides=(v.stride(), dout.stride()),
        args=(
            v, *v.stride()[:3], dout, *dout.stride()[:3], scratch.matrices, scratch.vectors,
            scratch.tile_sums, scratch.chunk_sums, scratch.contexts, work.half_ratio, work.inverse,
            work.df, work.dcontext, *work.partials, *call.sizes,
        ),
        constexprs={},
        config=call.config._replace(num_warps=WARPS, num_stages=1),
    )  # fmt: skip
