"""The second launch of causal attention in float32 on Hopper, as `_hopper.stat` in 16 bits."""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from attn_core.launch import Launcher
from attn_evo._hopper.float32.tiles import (
    BLOCK_M,
    COLUMN,
    PARTS,
    ROW,
    WARPS,
    D,
    allocate_tiles,
    begin_linear,
    load_row,
    load_rows,
    load_weight,
    start_scan,
    store_parts,
    store_row,
    store_triangle,
    sum_rows,
)
from attn_evo._hopper.tiles import opaque_zero
from attn_evo._triton import problem
from attn_evo._triton.tiles import W_G, chunk_of_program, sigmoid_of_double

_REGISTERS = 128  # of a thread: two programs of 256 threads share the 64 K of an SM


@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_stat_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl,
    matrices_ptr, vectors_ptr, tile_sums_ptr, chunk_sums_ptr,
    contexts_ptr,  # [B * H, tiles, D]: the context before each tile
    sums_after_ptr,  # [2, B, H, D], contiguous
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
):  # fmt: skip
    pid_bh, pid_c, b, h, first, last = chunk_of_program(H, num_tiles, num_chunks, tiles_per_chunk)
    v_ptr += b * stride_vb + h * stride_vh + (first * BLOCK_M).to(gl.int64) * stride_vl
    head = pid_bh.to(gl.int64)
    contexts_ptr += (head * num_tiles + first) * D
    tile_sums_ptr += (head * num_tiles + first) * D
    to_stat = num_heads.to(gl.int64) * num_tiles * D  # in tables [4, B * H, rows, D]
    v = load_rows(v_ptr, stride_vl, L - first * BLOCK_M)

    weight = allocate_tiles(PARTS)
    v_parts = allocate_tiles(PARTS)
    mean_parts = allocate_tiles(PARTS)
    triangle = allocate_tiles(1)
    load_weight(weight, 0, matrices_ptr, W_G)
    store_triangle(triangle.index(0), False)
    context_i = sum_rows(chunk_sums_ptr + head * num_chunks * D, pid_c, ROW)
    stat = gl.zeros([D], gl.float32, ROW)
    for tile in range(first, last):
        start = tile * BLOCK_M
        rows = L - start
        zero = opaque_zero(rows)
        store_parts(v_parts, zero, v)
        context = start_scan(triangle.index(zero), v_parts, zero)
        store_row(contexts_ptr, context_i)
        contexts_ptr += D
        tile_sum = load_row(tile_sums_ptr, ROW)
        v_ptr += BLOCK_M * stride_vl
        next_v = load_rows(v_ptr, stride_vl, gl.where(tile + 1 < last, rows - BLOCK_M, 0))
        context = warpgroup_mma_wait(0, deps=(context,))
        context += gl.expand_dims(context_i, 0)
        context_i += tile_sum
        count = (start + 1 + gl.arange(0, BLOCK_M, COLUMN)).to(gl.float32)
        store_parts(mean_parts, zero, context * gl.expand_dims(1.0 / count, 1))
        logit = begin_linear(mean_parts, zero, weight, zero, vectors_ptr + W_G * D)
        logit = warpgroup_mma_wait(0, deps=(logit,))
        total = gl.sum(sigmoid_of_double(logit, False) * v, 0)
        v = next_v
        store_row(tile_sums_ptr + to_stat, total)
        tile_sums_ptr += D
        stat += total

    row = (num_heads.to(gl.int64) + pid_bh) * num_chunks + pid_c
    store_row(chunk_sums_ptr + row * D, stat)
    if pid_c == num_chunks - 1:
        store_row(sums_after_ptr + head * D, context_i)


_launch_stat = Launcher(_attention_stat_kernel, maxnreg=_REGISTERS)


def attention_stat(call: problem.Call, scratch: problem.Scratch, sums_after: torch.Tensor) -> None:
    """As `_hopper.stat.attention_stat`."""
    v = call.v[0]
    _launch_stat(
        call.num_programs,
        strides=v.stride(),
        args=(
            v, *v.stride()[:3], scratch.matrices, scratch.vectors,
            scratch.tile_sums, scratch.chunk_sums, scratch.contexts, sums_after, *call.sizes,
        ),
        constexprs={},
        config=call.config._replace(num_warps=WARPS, num_stages=1),
    )  # fmt: skip
