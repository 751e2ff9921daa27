"""The second launch of causal attention on Hopper: gated values, summed up over tiles and chunks.

It takes the place of the Triton kernel `_attention_stat_kernel`. Four programs of a warpgroup share
an SM.
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
from attn_core.tuning import TileConfig
from attn_evo._hopper.support import BLOCK_M
from attn_evo._hopper.tiles import (
    BIAS_ROWS,
    FLAT,
    STAGES,
    W_G,
    accumulators,
    begin_with,
    half_triangle,
    left_operand,
    start_copy,
    start_linear,
    sum_rows,
    twice_gated,
)
from attn_evo._triton import problem

_REGISTERS = 128  # of a thread


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
    ROW: gl.constexpr = gl.BlockedLayout([1], [32], [D // 16], [0])
    pid_bh = gl.program_id(0) // num_chunks
    pid_c = gl.program_id(0) % num_chunks
    first = pid_c * tiles_per_chunk
    last = gl.minimum(first + tiles_per_chunk, num_tiles)
    v_ptr += (pid_bh // H).to(gl.int64) * stride_vb + (pid_bh % H).to(gl.int64) * stride_vh
    v_ptr += (first * BLOCK_M).to(gl.int64) * stride_vl
    row = (pid_bh.to(gl.int64) * num_tiles + first) * D
    contexts_ptr += row
    tile_sums_ptr += row
    to_stat = num_heads.to(gl.int64) * num_tiles * D  # in tables [4, B * H, rows, D]

    weight = gl.allocate_shared_memory(dtype, [D, D], TILE)
    bias = gl.allocate_shared_memory(dtype, [BIAS_ROWS, D], TILE)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], TILE)
    mean_tile = gl.allocate_shared_memory(dtype, [BLOCK_M, D], TILE)
    context_row = gl.allocate_shared_memory(gl.float32, [D], FLAT)
    start_copy(v_tiles.index(0), v_ptr, stride_vl, L - first * BLOCK_M, BLOCK_M, D)
    start_copy(weight, matrices_ptr + W_G * D * D, D, D, D, D)
    start_copy(bias, biases_ptr + W_G * BIAS_ROWS * D, D, BIAS_ROWS, BIAS_ROWS, D)
    async_copy.commit_group()

    offs_d = gl.arange(0, D, ROW)
    context_i = sum_rows(chunk_sums_ptr + pid_bh.to(gl.int64) * num_chunks * D, pid_c, D, ROW)
    half = half_triangle(BLOCK_M, dtype, D)
    offs_m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, accumulators(D)))
    stat = gl.zeros([D], gl.float32, ROW)
    for tile in range(first, last):
        start = tile * BLOCK_M
        stage = (tile - first) % STAGES
        context_row.store(context_i * 0.5)
        async_copy.wait_group(0)
        num_rows = gl.where(tile + 1 < last, L - start - BLOCK_M, 0)
        v_ptr += BLOCK_M * stride_vl
        start_copy(v_tiles.index(1 - stage), v_ptr, stride_vl, num_rows, BLOCK_M, D)
        async_copy.commit_group()
        gl.store(contexts_ptr + offs_d, context_i)
        context_i += gl.load(tile_sums_ptr + offs_d)

        v = v_tiles.index(stage)
        context = begin_with(context_row, BLOCK_M, D)
        context = warpgroup_mma(half, v, context, is_async=True)
        context = warpgroup_mma_wait(0, deps=(context,))
        inverse_count = gl.expand_dims(2.0 / (start + 1 + offs_m).to(gl.float32), 1)
        mean = left_operand((context * inverse_count).to(dtype), mean_tile, D)
        logit = start_linear(mean, weight, bias, BLOCK_M, D)
        logit = warpgroup_mma_wait(0, deps=(logit,))
        values = v.load(accumulators(D)).to(gl.float32)
        gated = twice_gated(values, logit, dtype == gl.bfloat16)
        total = gl.convert_layout(gl.sum(gated, 0), ROW) * 0.5
        gl.store(tile_sums_ptr + to_stat + offs_d, total)
        stat += total
        contexts_ptr += D
        tile_sums_ptr += D

    row = ((num_heads + pid_bh).to(gl.int64) * num_chunks + pid_c) * D
    gl.store(chunk_sums_ptr + row + offs_d, stat)
    if pid_c == num_chunks - 1:
        gl.store(sums_after_ptr + pid_bh.to(gl.int64) * D + offs_d, context_i)


_launch_stat = Launcher(_attention_stat_kernel, maxnreg=_REGISTERS)


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
        config=TileConfig(BLOCK_M, call.config.block_n, num_warps=D // 16, num_stages=1),
    )  # fmt: skip
