"""The second launch of causal attention on Hopper: gated values, summed up over tiles and chunks.

It takes the place of Triton's kernel for D = 64. Three programs of a warpgroup share an SM. Each
computes two tiles at a time, which do not wait for each other: the context before either is known.
They are started, and load their first values, before `sums` has ended.
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
from triton.language.extra.cuda import gdc_wait

from attn_core.launch import Launcher
from attn_core.tiles.gluon_names import reinterpret
from attn_evo._hopper.support import BLOCK_M
from attn_evo._hopper.tiles import (
    FLAT,
    STAGES,
    accumulators,
    begin_with,
    half_triangle,
    operand,
    start_copy,
    start_linear,
    sum_rows,
    twice_inverse,
    widened,
)
from attn_evo._triton import configs, problem
from attn_evo._triton.tiles import (
    BIAS_ROWS,
    W_G,
    chunk_of_program,
    twice_gated,
)

_REGISTERS = 168  # of a thread: three programs of 128 threads share the 64 K of an SM


PARTS = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))  # without bank conflicts
PAIR = gl.constexpr(gl.BlockedLayout([1, 1], [1, 32], [2, 2], [1, 0]))


@gluon.jit
def settled(x):
    """Keep x in registers of its own from here on.

    The compiler would copy equal rows where a product begins, of which it then lets only one run.
    """
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def store_partial_sums(v, logit, part):
    """Gate v [64, 64] and store twice the sums of the rows that share a thread, [32, 64]."""
    values = widened(v.load(accumulators(64)))
    gated = twice_gated(values, logit, v.dtype == gl.bfloat16)
    sums = gl.sum(gl.reshape(gated, [4, 2, 8, 64]), 1)
    part.store(gl.reshape(sums, [32, 64]))


@gluon.jit
def sums_of_both(parts):
    """The sums [2, 64] of two tiles of gated values, of which `parts` [2, 32, 64] has the parts."""
    COLUMNS: gl.constexpr = gl.BlockedLayout([32, 1], [1, 32], [2, 2], [1, 0])
    both = reinterpret(parts, gl.float32, [64, 64], PARTS).load(COLUMNS)
    sums = gl.sum(gl.reshape(both, [2, 32, 64]), 1) * 0.5
    return gl.convert_layout(sums, PAIR)


@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_stat_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl,
    matrices_ptr, biases_ptr, tile_sums_ptr, chunk_sums_ptr,
    contexts_ptr,  # [B * H, tiles, D]: the context before each tile
    sums_after_ptr,  # [2, B, H, D], contiguous
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
    D: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = v_ptr.dtype.element_ty
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, D], dtype)
    ROW: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    pid_bh, pid_c, b, h, first, last = chunk_of_program(H, num_tiles, num_chunks, tiles_per_chunk)
    v_ptr += b * stride_vb + h * stride_vh
    v_ptr += (first * BLOCK_M).to(gl.int64) * stride_vl
    row = (pid_bh.to(gl.int64) * num_tiles + first) * D
    contexts_ptr += row
    tile_sums_ptr += row
    to_stat = num_heads.to(gl.int64) * num_tiles * D  # in tables [4, B * H, rows, D]

    weight = gl.allocate_shared_memory(dtype, [D, D], TILE)
    bias = gl.allocate_shared_memory(dtype, [BIAS_ROWS, D], TILE)
    v_tiles = gl.allocate_shared_memory(dtype, [2 * STAGES, BLOCK_M, D], TILE)
    parts = gl.allocate_shared_memory(gl.float32, [2, 32, D], PARTS)
    row_0 = gl.allocate_shared_memory(gl.float32, [D], FLAT)
    row_1 = gl.allocate_shared_memory(gl.float32, [D], FLAT)
    rows = L - first * BLOCK_M
    start_copy(v_tiles.index(0), v_ptr, stride_vl, rows, BLOCK_M, D)
    v_ptr += BLOCK_M * stride_vl
    rows = gl.where(first + 1 < last, rows - BLOCK_M, 0)
    start_copy(v_tiles.index(1), v_ptr, stride_vl, rows, BLOCK_M, D)
    gdc_wait()  # so far nothing came from the launch before
    start_copy(weight, matrices_ptr + W_G * D * D, D, D, D, D)
    start_copy(bias, biases_ptr + W_G * BIAS_ROWS * D, D, BIAS_ROWS, BIAS_ROWS, D)
    async_copy.commit_group()

    offs_d = gl.arange(0, D, ROW)
    offs_pair = gl.arange(0, 2, gl.SliceLayout(1, PAIR))
    offs_column = gl.arange(0, D, gl.SliceLayout(0, PAIR))
    context_0 = sum_rows(chunk_sums_ptr + pid_bh.to(gl.int64) * num_chunks * D, pid_c, D, ROW)
    half = half_triangle(BLOCK_M, dtype, D)
    offs_m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, accumulators(D)))
    stat = gl.zeros([2, D], gl.float32, PAIR)
    sum_0 = gl.load(tile_sums_ptr + offs_d)
    sum_1 = gl.load(tile_sums_ptr + offs_d + D, mask=offs_d < (last - first - 1) * D, other=0.0)
    for tile in range(first, last, 2):  # and the one after it, which may be past the last
        start = tile * BLOCK_M
        stage = (tile - first) // 2 % STAGES
        num_tiles_left = last - tile
        context_1 = context_0 + sum_0
        row_0.store(context_0 * 0.5)
        row_1.store(context_1 * 0.5)
        async_copy.wait_group(0)
        v_ptr += BLOCK_M * stride_vl
        rows = gl.where(num_tiles_left > 2, L - start - 2 * BLOCK_M, 0)
        start_copy(v_tiles.index(2 - 2 * stage), v_ptr, stride_vl, rows, BLOCK_M, D)
        v_ptr += BLOCK_M * stride_vl
        rows = gl.where(num_tiles_left > 3, L - start - 3 * BLOCK_M, 0)
        start_copy(v_tiles.index(3 - 2 * stage), v_ptr, stride_vl, rows, BLOCK_M, D)
        async_copy.commit_group()
        gl.store(contexts_ptr + offs_d, context_0)
        gl.store(contexts_ptr + D + offs_d, context_1, mask=offs_d < (num_tiles_left - 1) * D)
        context_0 = context_1 + sum_1
        contexts_ptr += 2 * D
        next_ptr = tile_sums_ptr + 2 * D + offs_d
        sum_0 = gl.load(next_ptr, mask=offs_d < (num_tiles_left - 2) * D, other=0.0)
        sum_1 = gl.load(next_ptr + D, mask=offs_d < (num_tiles_left - 3) * D, other=0.0)

        v_0 = v_tiles.index(2 * stage)
        v_1 = v_tiles.index(2 * stage + 1)
        c_0 = settled(begin_with(row_0, BLOCK_M, D))
        c_1 = settled(begin_with(row_1, BLOCK_M, D))
        c_0 = warpgroup_mma(half, v_0, c_0, is_async=True)
        c_1 = warpgroup_mma(half, v_1, c_1, is_async=True)
        inverse_0 = twice_inverse(start + 1 + offs_m)
        inverse_1 = twice_inverse(start + 1 + BLOCK_M + offs_m)
        c_0 = warpgroup_mma_wait(1, deps=(c_0,))
        mean = gl.convert_layout((c_0 * inverse_0).to(dtype), operand(D), assert_trivial=True)
        logit_0 = start_linear(mean, weight, bias, BLOCK_M, D)
        c_1 = warpgroup_mma_wait(2, deps=(c_1,))
        mean = gl.convert_layout((c_1 * inverse_1).to(dtype), operand(D), assert_trivial=True)
        logit_1 = start_linear(mean, weight, bias, BLOCK_M, D)
        logit_0 = warpgroup_mma_wait(2, deps=(logit_0,))
        store_partial_sums(v_0, logit_0, parts.index(0))
        logit_1 = warpgroup_mma_wait(0, deps=(logit_1,))
        store_partial_sums(v_1, logit_1, parts.index(1))
        totals = sums_of_both(parts)
        ptrs = tile_sums_ptr + to_stat + offs_pair[:, None] * D + offs_column[None, :]
        mask = (offs_pair < num_tiles_left)[:, None] & (offs_column < D)[None, :]
        gl.store(ptrs, totals, mask=mask)
        stat += totals
        tile_sums_ptr += 2 * D

    row = ((num_heads + pid_bh).to(gl.int64) * num_chunks + pid_c) * D
    gl.store(chunk_sums_ptr + row + offs_column, gl.sum(stat, 0))
    if pid_c == num_chunks - 1:
        gl.store(sums_after_ptr + pid_bh.to(gl.int64) * D + offs_d, context_0)


_launch_stat = Launcher(_attention_stat_kernel, maxnreg=_REGISTERS, launch_pdl=True)


def attention_stat(call: problem.Call, scratch: problem.Scratch, sums_after: torch.Tensor) -> None:
    """Write the context before each tile, the sums of gated values, and the context after all."""
    v = call.v[0]
    D = v.shape[-1]
    _launch_stat(
        call.num_programs,
        strides=v.stride(),
        args=(
            v, *v.stride()[:3], scratch.matrices, scratch.biases,
            scratch.tile_sums, scratch.chunk_sums, scratch.contexts, sums_after, *call.sizes,
        ),
        constexprs={"D": D, "BLOCK_M": BLOCK_M},
        config=configs.hopper_kernel(v, call.config),
    )  # fmt: skip
