"""The gate backward on Hopper, in place of one Triton kernel of the backward pass, or two.

Where D = 64 the gradients of W_q and W_l fit into the registers beside the rest.
"""

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
from attn_evo._hopper.support import BLOCK_M, HELD_DIM
from attn_evo._hopper.tiles import (
    FLAT,
    STAGES,
    accumulators,
    add_column_sums,
    against_sign,
    begin_with,
    column_accumulators,
    column_sums,
    magnitude,
    minus_sign,
    opaque_zero,
    pair_product,
    start_copy,
    store_columns_of_ones,
    store_partial,
    store_rows,
    widened,
)
from attn_evo._triton import configs, problem
from attn_evo._triton.tiles import (
    DSTAT,
    W_F,
    W_L,
    W_Q,
    chunk_of_program,
    fast_tanh,
)

if TYPE_CHECKING:
    from attn_evo._triton.backward_work import Work

_HELD_DIM = gl.constexpr(HELD_DIM)


@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_gate_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl,
    matrices_ptr, vectors_ptr, chunk_sums_ptr,
    half_ratio_ptr,  # [B * H, L, D], contiguous
    inverse_ptr,  # [B * H, L, D], contiguous; where no dW is held, dlocal takes its place
    df_ptr,  # [B * H, L, D], contiguous
    dq_ptr,  # [B * H, L, D], contiguous: written where D > 64, half_ratio itself
    dstat_ptr,  # [B * H, L, D], contiguous: written where IS_CAUSAL, df itself
    dv_ptr,  # [B, H, L, D], contiguous
    partial_matrices_ptr,  # [programs, 4, D, D]
    partial_vectors_ptr,  # [programs, 6, D]
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
    IS_CAUSAL: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = v_ptr.dtype.element_ty
    HOLDS_DW: gl.constexpr = D <= _HELD_DIM
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, D], dtype)
    ONES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([16, 16], dtype)
    ROW: gl.constexpr = gl.BlockedLayout([1], [32], [D // 16], [0])
    COLUMNS: gl.constexpr = gl.SliceLayout(1, column_accumulators(D))
    pid_bh, pid_c, b, h, first, last = chunk_of_program(H, num_tiles, num_chunks, tiles_per_chunk)
    v_ptr += b * stride_vb + h * stride_vh + (first * BLOCK_M).to(gl.int64) * stride_vl
    token = (pid_bh.to(gl.int64) * L + first * BLOCK_M) * D
    half_ratio_ptr += token
    inverse_ptr += token
    df_ptr += token
    dq_ptr += token
    dstat_ptr += token
    dv_ptr += token

    weights = gl.allocate_shared_memory(dtype, [3, D, D], TILE)
    bias_row = gl.allocate_shared_memory(gl.float32, [D], FLAT)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], TILE)
    given = gl.allocate_shared_memory(dtype, [3, BLOCK_M, D], TILE)
    work = gl.allocate_shared_memory(dtype, [3, BLOCK_M, D], TILE)
    ones = gl.allocate_shared_memory(dtype, [3, 16, 16], ONES)
    rows = L - first * BLOCK_M
    start_copy(v_tiles.index(0), v_ptr, stride_vl, rows, BLOCK_M, D)
    start_copy(given.index(0), half_ratio_ptr, D, rows, BLOCK_M, D)
    start_copy(given.index(1), inverse_ptr, D, rows, BLOCK_M, D)
    start_copy(given.index(2), df_ptr, D, rows, BLOCK_M, D)
    for which in gl.static_range(3):  # W_Q, W_L and W_F
        start_copy(weights.index(which), matrices_ptr + which * D * D, D, D, D, D)
    async_copy.commit_group()
    bias_row.store(gl.load(vectors_ptr + W_L * D + gl.arange(0, D, ROW)))
    store_columns_of_ones(ones, 3, D)
    if HOLDS_DW:
        dw_q = gl.zeros([D, D], gl.float32, accumulators(D))
        dw_l = gl.zeros([D, D], gl.float32, accumulators(D))
    sums = gl.zeros([D, 16], gl.float32, column_accumulators(D))
    for tile in range(first, last):
        rows = L - tile * BLOCK_M
        zero = opaque_zero(rows)
        half_ratio_tile = given.index(zero)
        inverse_tile = given.index(1 + zero)
        df_tile = given.index(2 + zero)
        stage = (tile - first) % STAGES
        async_copy.wait_group(0)
        num_rows = gl.where(tile + 1 < last, rows - BLOCK_M, 0)
        v_ptr += BLOCK_M * stride_vl
        start_copy(v_tiles.index(1 - stage), v_ptr, stride_vl, num_rows, BLOCK_M, D)
        async_copy.commit_group()

        v = v_tiles.index(stage)
        dgate = gl.zeros([BLOCK_M, D], gl.float32, accumulators(D))
        w_f = weights.index(W_F + zero)
        dgate = warpgroup_mma(df_tile, w_f, dgate, use_acc=False, is_async=True)
        dgate = warpgroup_mma_wait(0, deps=(dgate,))
        half_ratio = widened(half_ratio_tile.load(accumulators(D)))
        t = fast_tanh(half_ratio)  # of which sigmoid(2 half_ratio) is (1 + t) / 2
        silu = half_ratio * t + half_ratio
        twice_slope = silu * (1.0 - t) + (1.0 + t)
        inverse = inverse_tile.load(accumulators(D))
        dv = dgate * silu
        v_times_inverse = widened(v.load(accumulators(D))) * magnitude(widened(inverse))
        dq = dgate * twice_slope * v_times_inverse
        minus_ddenominator = (dq * half_ratio).to(dtype)
        dq_tile = work.index(zero)
        dlocal_tile = work.index(1 + zero)
        dstat_tile = work.index(2 + zero)
        dq_tile.store(dq.to(dtype))
        dlocal_tile.store(minus_ddenominator)  # as yet without its sign
        dstat_tile.store(against_sign(minus_ddenominator, inverse))
        fence_async_shared()
        next_ptr = half_ratio_ptr + BLOCK_M * D
        start_copy(half_ratio_tile, next_ptr, D, num_rows, BLOCK_M, D)
        next_ptr = inverse_ptr + BLOCK_M * D
        start_copy(inverse_tile, next_ptr, D, num_rows, BLOCK_M, D)
        next_ptr = df_ptr + BLOCK_M * D
        start_copy(df_tile, next_ptr, D, num_rows, BLOCK_M, D)
        async_copy.commit_group()

        w_l = weights.index(W_L + zero)
        local = begin_with(bias_row, BLOCK_M, D)
        local = warpgroup_mma(v, w_l.permute((1, 0)), local, is_async=True)
        dv = warpgroup_mma(dq_tile, weights.index(W_Q + zero), dv, is_async=True)
        sums = add_column_sums(sums, dstat_tile, ones, zero, BLOCK_M)
        if IS_CAUSAL:
            store_rows(dstat_ptr, dstat_tile, rows, BLOCK_M, D)
        local, dv, sums = warpgroup_mma_wait(0, deps=(local, dv, sums))
        minus_ddenominator = dlocal_tile.load(accumulators(D))
        dlocal_tile.store(pair_product(minus_ddenominator, minus_sign(local.to(dtype))))
        fence_async_shared()
        dv = warpgroup_mma(dlocal_tile, w_l, dv, is_async=True)
        if HOLDS_DW:
            dw_q = warpgroup_mma(dq_tile.permute((1, 0)), v, dw_q, is_async=True)
            sums = add_column_sums(sums, dq_tile, ones, 1 + zero, BLOCK_M)
            dw_l = warpgroup_mma(dlocal_tile.permute((1, 0)), v, dw_l, is_async=True)
            sums = add_column_sums(sums, dlocal_tile, ones, 2 + zero, BLOCK_M)
            dv, dw_q, dw_l, sums = warpgroup_mma_wait(0, deps=(dv, dw_q, dw_l, sums))
        else:
            store_rows(dq_ptr, dq_tile, rows, BLOCK_M, D)
            store_rows(inverse_ptr, dlocal_tile, rows, BLOCK_M, D)
            dv = warpgroup_mma_wait(0, deps=(dv,))
        dq_tile.store(dv.to(dtype))
        store_rows(dv_ptr, dq_tile, rows, BLOCK_M, D)
        half_ratio_ptr += BLOCK_M * D
        inverse_ptr += BLOCK_M * D
        df_ptr += BLOCK_M * D
        dq_ptr += BLOCK_M * D
        dstat_ptr += BLOCK_M * D
        dv_ptr += BLOCK_M * D

    offs_d = gl.arange(0, D, COLUMNS)
    head = DSTAT * num_heads.to(gl.int64) + pid_bh
    row = chunk_sums_ptr + (head * num_chunks + pid_c) * D + offs_d
    gl.store(row, column_sums(sums, 0, D))
    if HOLDS_DW:
        row = partial_vectors_ptr + gl.program_id(0).to(gl.int64) * 6 * D + offs_d
        gl.store(row + W_Q * D, column_sums(sums, 1, D))
        gl.store(row + W_L * D, column_sums(sums, 2, D))
        store_partial(partial_matrices_ptr, dw_q, W_Q, D)
        store_partial(partial_matrices_ptr, dw_l, W_L, D)


_launch_gate = Launcher(_attention_backward_gate_kernel)


def backward_gate(work: Work) -> None:
    """As `_triton.backward`'s gate and, where D = 64, its products."""
    call, scratch = work.call, work.scratch
    v = call.v[0]
    _launch_gate(
        call.num_programs,
        strides=v.stride(),
        args=(
            v, *v.stride()[:3], scratch.matrices, scratch.vectors, scratch.chunk_sums,
            work.half_ratio, work.inverse, work.df, work.half_ratio, work.df, work.dv,
            *work.partials, *call.sizes,
        ),
        constexprs={"IS_CAUSAL": work.causal, "D": v.shape[-1], "BLOCK_M": BLOCK_M},
        config=configs.hopper_kernel(v, call.config),
    )  # fmt: skip
