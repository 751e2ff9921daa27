"""The gate backward on Hopper, where a program owns a whole sequence.

It holds the gradient of W_l. The copy engine loads a tile ahead, and tensor cores compute the two
products that a tile starts with while the tile before is stored. Inputs of two tiles leave no
shared memory for results: each takes the place of what it is computed from. The walk is backwards:
the launch before has left the last tiles in the L2 cache, and the launch after begins with the
first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_core.gluon_launch import GluonLauncher
from attn_core.tiles.gluon_names import thread_barrier
from attn_evo._hopper.copies import Tiles, load_rows, load_values, send_rows
from attn_evo._hopper.support import BLOCK_M
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
    widened,
)
from attn_evo._triton import problem
from attn_evo._triton.tiles import W_F, W_L, W_Q, fast_tanh

if TYPE_CHECKING:
    from attn_evo._triton.backward_work import Work

_REGISTERS = 255


@gluon.jit
def _start_products(v, df, weights, bias_row, zero, BLOCK_M: gl.constexpr, D: gl.constexpr):
    """Start df W_f and v W_l^T + b_l."""
    dgate = gl.zeros([BLOCK_M, D], gl.float32, accumulators(D))
    dgate = warpgroup_mma(df, weights.index(W_F + zero), dgate, use_acc=False, is_async=True)
    local = begin_with(bias_row, BLOCK_M, D)
    w_l = weights.index(W_L + zero).permute((1, 0))
    return dgate, warpgroup_mma(v, w_l, local, is_async=True)


@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_whole_gate_kernel(
    v_desc,  # [B, H, L, D]
    half_ratio_desc, inverse_desc, df_desc,  # [B * H, L, D]
    dq_desc, dstat_desc, dv_desc,  # [B * H, L, D], written
    matrices_ptr, vectors_ptr,
    partial_matrices_ptr,  # [programs, 4, D, D]
    partial_vectors_ptr,  # [programs, 6, D]
    H, num_tiles,
    D: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = v_desc.dtype
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, D], dtype)
    ONES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([16, 16], dtype)
    ROW: gl.constexpr = gl.BlockedLayout([1], [32], [D // 16], [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    BYTES: gl.constexpr = df_desc.block_type.nbytes
    head = gl.program_id(0)
    b = head // H
    h = head % H

    weights = gl.allocate_shared_memory(dtype, [3, D, D], TILE)
    bias_row = gl.allocate_shared_memory(gl.float32, [D], FLAT)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], TILE)
    half_ratio_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], TILE)
    inverse_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], TILE)
    df_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], TILE)
    ones = gl.allocate_shared_memory(dtype, [1, 16, 16], ONES)
    half_ratio_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)  # the other three
    for i in gl.static_range(STAGES):
        mbarrier.init(half_ratio_full.index(i), count=1)
        mbarrier.init(full.index(i), count=1)
    for which in gl.static_range(3):  # W_Q, W_L and W_F
        start_copy(weights.index(which), matrices_ptr + which * D * D, D, D, D, D)
    async_copy.commit_group()
    bias_row.store(gl.load(vectors_ptr + W_L * D + gl.arange(0, D, ROW)))
    store_columns_of_ones(ones, 1, D)
    fence_async_shared()
    thread_barrier()
    last = (num_tiles - 1) * BLOCK_M
    for i in gl.static_range(STAGES):  # tiles before the first arrive as zeros
        mbarrier.expect(full.index(i), 3 * BYTES)
        load_values(v_desc, b, h, last - i * BLOCK_M, full.index(i), v_tiles.index(i))
        load_rows(df_desc, head, last - i * BLOCK_M, full.index(i), df_tiles.index(i))
        load_rows(inverse_desc, head, last - i * BLOCK_M, full.index(i), inverse_tiles.index(i))
    mbarrier.expect(half_ratio_full.index(0), BYTES)
    load_rows(half_ratio_desc, head, last, half_ratio_full.index(0), half_ratio_tiles.index(0))
    dw_l = gl.zeros([D, D], gl.float32, accumulators(D))
    sums = gl.zeros([D, 16], gl.float32, column_accumulators(D))
    async_copy.wait_group(0)
    fence_async_shared()
    thread_barrier()
    mbarrier.wait(full.index(0), 0)
    products = _start_products(
        v_tiles.index(0), df_tiles.index(0), weights, bias_row, 0, BLOCK_M, D
    )
    dgate, local = warpgroup_mma_wait(0, deps=products)
    minus_local = minus_sign(local.to(dtype))
    for step in range(num_tiles):
        row = last - step * BLOCK_M
        zero = opaque_zero(row + 1)
        stage = step % STAGES + zero
        other = 1 - step % STAGES + zero
        v = v_tiles.index(stage)
        dq_tile = half_ratio_tiles.index(stage)
        dlocal_tile = inverse_tiles.index(stage)
        dstat_tile = df_tiles.index(stage)

        mbarrier.wait(half_ratio_full.index(stage), (step // STAGES) & 1)
        half_ratio = widened(dq_tile.load(accumulators(D)))
        inverse = dlocal_tile.load(accumulators(D))
        t = fast_tanh(half_ratio)  # of which sigmoid(2 half_ratio) is (1 + t) / 2
        silu = half_ratio * t + half_ratio
        twice_slope = silu * (1.0 - t) + (1.0 + t)
        dv = dgate * silu
        v_times_inverse = widened(v.load(accumulators(D))) * magnitude(widened(inverse))
        dq = dgate * twice_slope * v_times_inverse
        minus_ddenominator = (dq * half_ratio).to(dtype)
        tma.store_wait(0)  # dv of the tile before has left the tile that half_ratio comes to
        thread_barrier()  # the other warpgroup's products have read what is overwritten now
        mbarrier.expect(half_ratio_full.index(other), BYTES)
        next_tile = half_ratio_tiles.index(other)
        load_rows(half_ratio_desc, head, row - BLOCK_M, half_ratio_full.index(other), next_tile)
        dq_tile.store(dq.to(dtype))
        dlocal_tile.store(pair_product(minus_ddenominator, minus_local))
        dstat_tile.store(against_sign(minus_ddenominator, inverse))
        fence_async_shared()
        thread_barrier()
        send_rows(dq_desc, head, row, dq_tile)
        send_rows(dstat_desc, head, row, dstat_tile)
        w_l = weights.index(W_L + zero)
        dv = warpgroup_mma(dq_tile, weights.index(W_Q + zero), dv, is_async=True)
        dv = warpgroup_mma(dlocal_tile, w_l, dv, is_async=True)
        dw_l = warpgroup_mma(dlocal_tile.permute((1, 0)), v, dw_l, is_async=True)
        sums = add_column_sums(sums, dlocal_tile, ones, zero, BLOCK_M)
        dv, dw_l, sums = warpgroup_mma_wait(0, deps=(dv, dw_l, sums))
        tma.store_wait(0)
        thread_barrier()  # nobody needs the tiles of this stage, but for that of dv
        after = row - STAGES * BLOCK_M
        mbarrier.expect(full.index(stage), 3 * BYTES)
        load_values(v_desc, b, h, after, full.index(stage), v)
        load_rows(df_desc, head, after, full.index(stage), dstat_tile)
        load_rows(inverse_desc, head, after, full.index(stage), dlocal_tile)
        mbarrier.wait(full.index(other), ((step + 1) // STAGES) & 1)
        products = _start_products(
            v_tiles.index(other), df_tiles.index(other), weights, bias_row, zero, BLOCK_M, D
        )
        dq_tile.store(dv.to(dtype))
        fence_async_shared()
        thread_barrier()
        send_rows(dv_desc, head, row, dq_tile)
        dgate, local = warpgroup_mma_wait(0, deps=products)
        minus_local = minus_sign(local.to(dtype))
    # What was loaded ahead must have come before the program ends.
    mbarrier.wait(half_ratio_full.index(num_tiles % STAGES), (num_tiles // STAGES) & 1)
    uses = num_tiles + 1
    mbarrier.wait(full.index(uses % STAGES), (uses // STAGES) & 1)
    tma.store_wait(0)

    program = head.to(gl.int64)
    offs_d = gl.arange(0, D, gl.SliceLayout(1, column_accumulators(D)))
    gl.store(partial_vectors_ptr + (program * 6 + W_L) * D + offs_d, column_sums(sums, 0, D))
    store_partial(partial_matrices_ptr, dw_l, W_L, D)


_launch_gate = GluonLauncher(_attention_backward_whole_gate_kernel, num_warps=8)


def backward_gate(work: Work, dq: torch.Tensor, dstat: torch.Tensor) -> None:
    """As `_triton.backward`'s gate, with the gradient of W_l, which `products` has there."""
    v = work.call.v[0]
    _, H, num_heads, num_tiles, *_ = work.call.sizes
    inputs = v, work.half_ratio, work.inverse, work.df
    outputs = dq, dstat, work.dv.view(dq.shape)
    _launch_gate(
        num_heads,
        args=(
            *(Tiles(x, BLOCK_M) for x in (*inputs, *outputs)),
            work.scratch.matrices, work.scratch.vectors, *work.partials, H, num_tiles,
        ),
        constants={"D": v.shape[-1], "BLOCK_M": BLOCK_M},
        maxnreg=_REGISTERS,
    )  # fmt: skip
