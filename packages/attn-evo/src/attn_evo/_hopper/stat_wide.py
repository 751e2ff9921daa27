"""The second launch of causal attention on Hopper for D = 128: as `stat`, a tile at a time.

A warpgroup holds both halves of a tile's columns, which do not wait for each other: while the gate
of one is computed, the tensor cores multiply for the other.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_core.launch import Launcher
from attn_evo._hopper import support
from attn_evo._hopper.stat import PAIR, PARTS, settled, store_partial_sums, sums_of_both
from attn_evo._hopper.tiles import (
    FLAT,
    STAGES,
    accumulators,
    begin_with,
    half_triangle,
    opaque_zero,
    operand,
    start_copy,
    twice_inverse,
)
from attn_evo._triton import problem
from attn_evo._triton.tiles import (
    W_G,
    chunk_of_program,
)

_BLOCK_M = gl.constexpr(support.BLOCK_M)
_D = gl.constexpr(128)
_HALF = gl.constexpr(64)
_ROWS = gl.constexpr(8)  # of a table of sums, which a thread adds up at a time
_WARPS = 4


@gluon.jit
def _sum_rows(ptr, num_rows, LAYOUT: gl.constexpr):
    """Sum of the first rows of a table [rows, D], always in the same order."""
    OWN_COLUMN: gl.constexpr = gl.BlockedLayout([_ROWS, 1], [1, 32], [1, 4], [1, 0])
    offs_row = gl.arange(0, _ROWS, gl.SliceLayout(1, OWN_COLUMN))
    offs_d = gl.arange(0, _D, gl.SliceLayout(0, OWN_COLUMN))
    acc = gl.zeros([_ROWS, _D], gl.float32, OWN_COLUMN)
    for start in range(0, num_rows, _ROWS):
        mask = (start + offs_row < num_rows)[:, None] & (offs_d < _D)[None, :]
        ptrs = ptr + (start + offs_row)[:, None] * _D + offs_d[None, :]
        acc += gl.load(ptrs, mask=mask, other=0.0)
    return gl.convert_layout(gl.sum(acc, 0), LAYOUT)


@gluon.jit
def _start_tile(tiles, first, ptr, stride, num_rows):
    """Start to copy both halves of a tile's columns."""
    start_copy(tiles.index(first), ptr, stride, num_rows, _BLOCK_M, _HALF)
    start_copy(tiles.index(first + 1), ptr + _HALF, stride, num_rows, _BLOCK_M, _HALF)


@gluon.jit
def _start_logit(mean_0, mean_1, weights, vectors_ptr, zero, WHICH: gl.constexpr):
    """Start one half of W_g mean + b_g; the four quarters of W_g are tiles of their own."""
    offs_d = WHICH * _HALF + gl.arange(0, _HALF, gl.SliceLayout(0, accumulators(_HALF)))
    bias = gl.load(vectors_ptr + W_G * _D + offs_d)
    y = gl.expand_dims(bias, 0).broadcast_to([_BLOCK_M, _HALF])
    y = warpgroup_mma(mean_0, weights.index(2 * WHICH + zero).permute((1, 0)), y, is_async=True)
    return warpgroup_mma(
        mean_1, weights.index(2 * WHICH + 1 + zero).permute((1, 0)), y, is_async=True
    )


@gluon.jit
def _left_operand(x, dtype: gl.constexpr):
    return gl.convert_layout(x.to(dtype), operand(_HALF), assert_trivial=True)


@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_stat_wide_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl,
    matrices_ptr, vectors_ptr, tile_sums_ptr, chunk_sums_ptr,
    contexts_ptr,  # [B * H, tiles, D]: the context before each tile
    sums_after_ptr,  # [2, B, H, D], contiguous
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
):  # fmt: skip
    dtype: gl.constexpr = v_ptr.dtype.element_ty
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_HALF, _HALF], dtype)
    ROW: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    pid_bh, pid_c, b, h, first, last = chunk_of_program(H, num_tiles, num_chunks, tiles_per_chunk)
    v_ptr += b * stride_vb + h * stride_vh
    v_ptr += (first * _BLOCK_M).to(gl.int64) * stride_vl
    row = (pid_bh.to(gl.int64) * num_tiles + first) * _D
    contexts_ptr += row
    tile_sums_ptr += row
    to_stat = num_heads.to(gl.int64) * num_tiles * _D  # in tables [4, B * H, rows, D]

    weights = gl.allocate_shared_memory(dtype, [4, _HALF, _HALF], TILE)
    v_tiles = gl.allocate_shared_memory(dtype, [2 * STAGES, _BLOCK_M, _HALF], TILE)
    parts = gl.allocate_shared_memory(gl.float32, [2, 32, _HALF], PARTS)
    context_row = gl.allocate_shared_memory(gl.float32, [_D], FLAT)
    _start_tile(v_tiles, 0, v_ptr, stride_vl, L - first * _BLOCK_M)
    for quarter in gl.static_range(4):
        ptr = matrices_ptr + (W_G * _D + quarter // 2 * _HALF) * _D + quarter % 2 * _HALF
        start_copy(weights.index(quarter), ptr, _D, _HALF, _HALF, _HALF)
    async_copy.commit_group()

    offs_d = gl.arange(0, _D, ROW)
    offs_half = gl.arange(0, 2, gl.SliceLayout(1, PAIR))[:, None] * _HALF
    offs_pair = offs_half + gl.arange(0, _HALF, gl.SliceLayout(0, PAIR))[None, :]
    context_i = _sum_rows(chunk_sums_ptr + pid_bh.to(gl.int64) * num_chunks * _D, pid_c, ROW)
    half = half_triangle(_BLOCK_M, dtype, _HALF)
    offs_m = gl.arange(0, _BLOCK_M, gl.SliceLayout(1, accumulators(_HALF)))
    stat = gl.zeros([2, _HALF], gl.float32, PAIR)
    tile_sum = gl.load(tile_sums_ptr + offs_d)
    for tile in range(first, last):
        start = tile * _BLOCK_M
        stage = (tile - first) % STAGES
        zero = opaque_zero(L - start)
        context_row.store(context_i * 0.5)
        async_copy.wait_group(0)
        v_ptr += _BLOCK_M * stride_vl
        num_rows = gl.where(tile + 1 < last, L - start - _BLOCK_M, 0)
        _start_tile(v_tiles, 2 - 2 * stage, v_ptr, stride_vl, num_rows)
        async_copy.commit_group()
        gl.store(contexts_ptr + offs_d, context_i)
        contexts_ptr += _D
        context_i += tile_sum
        next_ptr = tile_sums_ptr + _D + offs_d
        tile_sum = gl.load(next_ptr, mask=offs_d < (last - tile - 1) * _D, other=0.0)

        v_0 = v_tiles.index(2 * stage)
        v_1 = v_tiles.index(2 * stage + 1)
        c_0 = settled(begin_with(context_row.slice(0, _HALF), _BLOCK_M, _HALF))
        c_1 = settled(begin_with(context_row.slice(_HALF, _HALF), _BLOCK_M, _HALF))
        c_0 = warpgroup_mma(half, v_0, c_0, is_async=True)
        c_1 = warpgroup_mma(half, v_1, c_1, is_async=True)
        inverse_count = twice_inverse(start + 1 + offs_m)
        c_0 = warpgroup_mma_wait(1, deps=(c_0,))
        mean_0 = _left_operand(c_0 * inverse_count, dtype)
        c_1 = warpgroup_mma_wait(0, deps=(c_1,))
        mean_1 = _left_operand(c_1 * inverse_count, dtype)
        logit_0 = _start_logit(mean_0, mean_1, weights, vectors_ptr, zero, 0)
        logit_1 = _start_logit(mean_0, mean_1, weights, vectors_ptr, zero, 1)
        logit_0 = warpgroup_mma_wait(2, deps=(logit_0,))
        store_partial_sums(v_0, logit_0, parts.index(0))
        logit_1 = warpgroup_mma_wait(0, deps=(logit_1,))
        store_partial_sums(v_1, logit_1, parts.index(1))
        totals = sums_of_both(parts)
        gl.store(tile_sums_ptr + to_stat + offs_pair, totals)
        stat += totals
        tile_sums_ptr += _D

    row = ((num_heads + pid_bh).to(gl.int64) * num_chunks + pid_c) * _D
    gl.store(chunk_sums_ptr + row + offs_pair, stat)
    if pid_c == num_chunks - 1:
        gl.store(sums_after_ptr + pid_bh.to(gl.int64) * _D + offs_d, context_i)


_launch_stat = Launcher(_attention_stat_wide_kernel)


def attention_stat_wide(
    call: problem.Call, scratch: problem.Scratch, sums_after: torch.Tensor
) -> None:
    """As `stat.attention_stat`."""
    v = call.v[0]
    _launch_stat(
        call.num_programs,
        strides=v.stride(),
        args=(
            v, *v.stride()[:3], scratch.matrices, scratch.vectors,
            scratch.tile_sums, scratch.chunk_sums, scratch.contexts, sums_after, *call.sizes,
        ),
        constexprs={},
        config=call.config._replace(num_warps=_WARPS, num_stages=1),
    )  # fmt: skip
