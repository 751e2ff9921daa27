"""The output of causal attention in float32 on Hopper, as `_hopper.output` in 16 bits."""

from __future__ import annotations

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
    ROW,
    SPREAD_ROW,
    WARPS,
    D,
    allocate_row,
    allocate_tiles,
    begin_linear,
    load_row,
    load_rows,
    load_weight,
    start_scan,
    store_parts,
    store_row,
    store_rows,
    store_triangle,
    sum_rows,
)
from attn_evo._hopper.tiles import add_magnitudes, magnitude, opaque_zero
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


@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_output_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl,
    matrices_ptr, vectors_ptr, tile_sums_ptr, chunk_sums_ptr,
    contexts_ptr,  # [B * H, tiles, D]: the context before each tile
    out_ptr,  # [B, H, L, D], contiguous
    sums_after_ptr,  # [2, B, H, D], contiguous
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
):  # fmt: skip
    pid_bh, pid_c, b, h, first, last = chunk_of_program(H, num_tiles, num_chunks, tiles_per_chunk)
    v_ptr += b * stride_vb + h * stride_vh + (first * BLOCK_M).to(gl.int64) * stride_vl
    head = pid_bh.to(gl.int64)
    stat_head = num_heads.to(gl.int64) + pid_bh  # of tables [4, B * H, rows, D]
    contexts_ptr += (head * num_tiles + first) * D
    tile_sums_ptr += (stat_head * num_tiles + first) * D
    v = load_rows(v_ptr, stride_vl, L - first * BLOCK_M)

    weights = allocate_tiles(4 * PARTS)
    v_parts = allocate_tiles(PARTS)
    work = allocate_tiles(PARTS)
    triangle = allocate_tiles(1)
    stat_row = allocate_row()
    for which in gl.static_range(4):
        load_weight(weights, which * PARTS, matrices_ptr, which)
    store_triangle(triangle.index(0), False)
    stat_i = sum_rows(chunk_sums_ptr + stat_head * num_chunks * D, pid_c, SPREAD_ROW)
    for tile in range(first, last):
        start = tile * BLOCK_M
        rows = L - start
        zero = opaque_zero(rows)
        stat_row.store(stat_i)
        store_parts(v_parts, zero, v)
        context = start_scan(triangle.index(zero), v_parts, zero)
        local = begin_linear(v_parts, zero, weights, W_L * PARTS + zero, vectors_ptr + W_L * D)
        query = begin_linear(v_parts, zero, weights, W_Q * PARTS + zero, vectors_ptr + W_Q * D)
        v_ptr += BLOCK_M * stride_vl
        next_v = load_rows(v_ptr, stride_vl, gl.where(tile + 1 < last, rows - BLOCK_M, 0))
        context = warpgroup_mma_wait(12, deps=(context,))
        context += gl.expand_dims(load_row(contexts_ptr, ROW), 0)
        count = (start + 1 + gl.arange(0, BLOCK_M, COLUMN)).to(gl.float32)
        store_parts(work, zero, context * gl.expand_dims(1.0 / count, 1))
        logit = begin_linear(work, zero, weights, W_G * PARTS + zero, vectors_ptr + W_G * D)
        logit, local, query = warpgroup_mma_wait(0, deps=(logit, local, query))
        thread_barrier()  # the other warpgroup's products have read what is overwritten now
        store_parts(work, zero, sigmoid_of_double(logit, False) * v)
        stat = start_scan(triangle.index(zero), work, zero)
        stat_i += load_row(tile_sums_ptr, SPREAD_ROW)
        tile_sums_ptr += D
        contexts_ptr += gl.where(tile + 1 < last, D, 0)
        stat = warpgroup_mma_wait(0, deps=(stat,))
        stat += gl.expand_dims(stat_row.load(ROW), 0)
        half_ratio = query * reciprocal(add_magnitudes(stat, local) + EPSILON)
        thread_barrier()
        store_parts(work, zero, twice_gated(half_ratio * v, half_ratio, False))
        final = begin_linear(work, zero, weights, W_F * PARTS + zero, vectors_ptr + W_F * D)
        is_alive = gl.max(magnitude(v), 1) > 0
        v = next_v
        final = warpgroup_mma_wait(0, deps=(final,))
        x = sigmoid_of_double(final, False) * context
        x -= gl.expand_dims(gl.sum(x, 1) * (1.0 / D), 1)
        scale = gl.rsqrt(gl.sum(x * x, 1) * (1.0 / D) + NORM_EPSILON)
        x *= gl.expand_dims(gl.where(is_alive, scale, 0.0), 1)
        out = x * gl.expand_dims(load_row(vectors_ptr + NORM_WEIGHT * D, ROW), 0)
        out += gl.expand_dims(load_row(vectors_ptr + NORM_BIAS * D, ROW), 0)
        store_rows(out_ptr + (head * L + start + zero) * D, out, rows)

    if pid_c == num_chunks - 1:
        store_row(sums_after_ptr + stat_head * D, stat_i)


_launch_output = Launcher(_attention_output_kernel)


def attention_output(
    call: problem.Call, scratch: problem.Scratch, out: torch.Tensor, sums_after: torch.Tensor
) -> None:
    """As `_hopper.output.attention_output`."""
    v = call.v[0]
    _launch_output(
        call.num_programs,
        strides=v.stride(),
        args=(
            v, *v.stride()[:3], scratch.matrices, scratch.vectors, scratch.tile_sums,
            scratch.chunk_sums, scratch.contexts, out, sums_after, *call.sizes,
        ),
        constexprs={},
        config=call.config._replace(num_warps=WARPS, num_stages=1),
    )  # fmt: skip
