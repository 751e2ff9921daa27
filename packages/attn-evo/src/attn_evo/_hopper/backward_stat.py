"""Suffix sums of dstat on Hopper, in place of a Triton kernel of the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_core.launch import Launcher
from attn_evo._hopper.support import BLOCK_M
from attn_evo._hopper.tiles import (
    FLAT,
    STAGES,
    accumulators,
    add_column_sums,
    begin_with,
    column_accumulators,
    column_sums,
    start_copy,
    store_columns_of_ones,
    store_partial,
    store_rows,
    store_triangle,
    sum_rows,
)
from attn_evo._triton import configs, problem
from attn_evo._triton.tiles import (
    DCONTEXT,
    DSTAT,
    W_G,
    chunk_of_program,
    rounded,
    sigmoid_of_double,
)

if TYPE_CHECKING:
    from attn_evo._triton.backward_work import Work


@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_stat_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl,
    matrices_ptr, vectors_ptr, chunk_sums_ptr,
    contexts_ptr,  # [B * H, tiles, D]: the context before each tile
    dstat_ptr, dcontext_ptr,  # [B * H, L, D], contiguous
    dv_ptr,  # [B, H, L, D], contiguous
    dsums_ptr,  # [2, B, H, D], contiguous
    partial_matrices_ptr,  # [programs, 4, D, D]
    partial_vectors_ptr,  # [programs, 6, D]
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
    D: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = v_ptr.dtype.element_ty
    IS_BFLOAT16: gl.constexpr = dtype == gl.bfloat16
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, D], dtype)
    ONES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([16, 16], dtype)
    TRIANGLE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_M], dtype)
    ROW: gl.constexpr = gl.BlockedLayout([1], [32], [D // 16], [0])
    COLUMNS: gl.constexpr = gl.SliceLayout(1, column_accumulators(D))
    pid_bh, pid_c, b, h, first, last = chunk_of_program(H, num_tiles, num_chunks, tiles_per_chunk)
    head = pid_bh.to(gl.int64)
    heads = num_heads.to(gl.int64)
    token = (head * L + (last - 1) * BLOCK_M) * D
    v_ptr += b * stride_vb + h * stride_vh + ((last - 1) * BLOCK_M).to(gl.int64) * stride_vl
    dstat_ptr += token
    dcontext_ptr += token
    dv_ptr += token
    contexts_ptr += (head * num_tiles + last - 1) * D

    weight = gl.allocate_shared_memory(dtype, [D, D], TILE)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], TILE)
    dstat_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], TILE)
    dv_tile = gl.allocate_shared_memory(dtype, [BLOCK_M, D], TILE)
    dcontext_tile = gl.allocate_shared_memory(dtype, [BLOCK_M, D], TILE)
    mean_tile = gl.allocate_shared_memory(dtype, [BLOCK_M, D], TILE)
    dlogit_tile = gl.allocate_shared_memory(dtype, [BLOCK_M, D], TILE)
    ones = gl.allocate_shared_memory(dtype, [3, 16, 16], ONES)
    triangle = gl.allocate_shared_memory(dtype, [BLOCK_M, BLOCK_M], TRIANGLE)
    after = gl.allocate_shared_memory(dtype, [BLOCK_M, BLOCK_M], TRIANGLE)
    bias_row = gl.allocate_shared_memory(gl.float32, [D], FLAT)
    context_row = gl.allocate_shared_memory(gl.float32, [D], FLAT)
    dstat_row = gl.allocate_shared_memory(gl.float32, [D], FLAT)
    rows = L - (last - 1) * BLOCK_M
    start_copy(v_tiles.index(0), v_ptr, stride_vl, rows, BLOCK_M, D)
    start_copy(dstat_tiles.index(0), dstat_ptr, D, rows, BLOCK_M, D)
    start_copy(dv_tile, dv_ptr, D, rows, BLOCK_M, D)
    start_copy(dcontext_tile, dcontext_ptr, D, rows, BLOCK_M, D)
    start_copy(weight, matrices_ptr + W_G * D * D, D, D, D, D)
    async_copy.commit_group()
    store_columns_of_ones(ones, 3, D)

    offs_d = gl.arange(0, D, ROW)
    bias_row.store(gl.load(vectors_ptr + W_G * D + offs_d))
    context_i = gl.load(contexts_ptr + offs_d)
    after_ptr = chunk_sums_ptr + ((DSTAT * heads + pid_bh) * num_chunks + pid_c + 1) * D
    dstat_after = sum_rows(after_ptr, num_chunks - pid_c - 1, D, COLUMNS)
    store_triangle(triangle, False, BLOCK_M, D)
    store_triangle(after, True, BLOCK_M, D)
    offs_m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, accumulators(D)))
    dw_g = gl.zeros([D, D], gl.float32, accumulators(D))
    sums = gl.zeros([D, 16], gl.float32, column_accumulators(D))
    for step in range(last - first):
        start = (last - 1 - step) * BLOCK_M
        rows = L - start
        stage = step % STAGES
        context_row.store(context_i * 0.5)
        dstat_row.store(dstat_after + column_sums(sums, 0, D))
        async_copy.wait_group(0)
        is_next = start > first * BLOCK_M
        num_rows = gl.where(is_next, BLOCK_M, 0)
        back = gl.where(is_next, BLOCK_M, 0)
        v_ptr -= back * stride_vl
        dstat_ptr -= back * D
        start_copy(v_tiles.index(1 - stage), v_ptr, stride_vl, num_rows, BLOCK_M, D)
        start_copy(dstat_tiles.index(1 - stage), dstat_ptr, D, num_rows, BLOCK_M, D)
        async_copy.commit_group()
        contexts_ptr -= gl.where(is_next, D, 0)
        context_i = gl.load(contexts_ptr + offs_d)

        v = v_tiles.index(stage)
        dstat = dstat_tiles.index(stage)
        context = begin_with(context_row, BLOCK_M, D)
        context = warpgroup_mma(triangle, v, context, is_async=True)
        dgated = begin_with(dstat_row, BLOCK_M, D)
        dgated = warpgroup_mma(after, dstat, dgated, is_async=True)
        sums = add_column_sums(sums, dstat, ones, 0, BLOCK_M)
        context, dgated, sums = warpgroup_mma_wait(0, deps=(context, dgated, sums))
        inverse_count = gl.expand_dims(1.0 / (start + 1 + offs_m).to(gl.float32), 1)
        mean_tile.store((context * (2.0 * inverse_count)).to(dtype))
        fence_async_shared()
        logit = begin_with(bias_row, BLOCK_M, D)
        logit = warpgroup_mma(mean_tile, weight.permute((1, 0)), logit, is_async=True)
        logit = warpgroup_mma_wait(0, deps=(logit,))
        gate = sigmoid_of_double(logit, IS_BFLOAT16)
        dgated *= gate
        dlogit = 2.0 * dgated * v.load(accumulators(D)).to(gl.float32) * (1.0 - gate)
        dlogit_tile.store(rounded(dlogit, dtype))
        dv_tile.store(rounded(dv_tile.load(accumulators(D)).to(gl.float32) + dgated, dtype))
        fence_async_shared()
        dmean = gl.zeros([BLOCK_M, D], gl.float32, accumulators(D))
        dmean = warpgroup_mma(dlogit_tile, weight, dmean, use_acc=False, is_async=True)
        dw_g = warpgroup_mma(dlogit_tile.permute((1, 0)), mean_tile, dw_g, is_async=True)
        sums = add_column_sums(sums, dlogit_tile, ones, 1, BLOCK_M)
        store_rows(dv_ptr, dv_tile, rows, BLOCK_M, D)
        dmean, dw_g, sums = warpgroup_mma_wait(0, deps=(dmean, dw_g, sums))
        dcontext = dcontext_tile.load(accumulators(D)).to(gl.float32) + dmean * inverse_count
        dcontext_tile.store(rounded(dcontext, dtype))
        fence_async_shared()
        sums = add_column_sums(sums, dcontext_tile, ones, 2, BLOCK_M)
        store_rows(dcontext_ptr, dcontext_tile, rows, BLOCK_M, D)
        sums = warpgroup_mma_wait(0, deps=(sums,))
        dv_ptr -= back * D
        dcontext_ptr -= back * D
        start_copy(dv_tile, dv_ptr, D, num_rows, BLOCK_M, D)
        start_copy(dcontext_tile, dcontext_ptr, D, num_rows, BLOCK_M, D)
        async_copy.commit_group()

    offs_d = gl.arange(0, D, COLUMNS)
    row = chunk_sums_ptr + ((DCONTEXT * heads + pid_bh) * num_chunks + pid_c) * D + offs_d
    gl.store(row, column_sums(sums, 2, D))
    row = partial_vectors_ptr + gl.program_id(0).to(gl.int64) * 6 * D + offs_d
    gl.store(row + W_G * D, column_sums(sums, 1, D))
    if pid_c == 0:
        gl.store(dsums_ptr + (heads + pid_bh) * D + offs_d, dstat_after + column_sums(sums, 0, D))
    store_partial(partial_matrices_ptr, dw_g, W_G, D)


_launch_stat = Launcher(_attention_backward_stat_kernel)


def backward_stat(work: Work) -> None:
    """As `_triton.backward`'s stat."""
    call, scratch = work.call, work.scratch
    v = call.v[0]
    _launch_stat(
        call.num_programs,
        strides=v.stride(),
        args=(
            v, *v.stride()[:3], scratch.matrices, scratch.vectors, scratch.chunk_sums,
            scratch.contexts, work.df, work.dcontext, work.dv, work.dsums, *work.partials,
            *call.sizes,
        ),
        constexprs={"D": v.shape[-1], "BLOCK_M": BLOCK_M},
        config=configs.hopper_kernel(v, call.config),
    )  # fmt: skip
