"""LayerNorm backward on Hopper, in place of two Triton kernels of the backward pass.

It computes the output as `output` does, keeps what the launches after it need of that, and while
the rest is still in registers goes back to the gradients of context and of W_f gate + b_f. The copy
engine brings v of the next tile while this one is computed, and takes away what is computed.
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
from attn_core.tiles.hopper import reciprocal
from attn_evo._hopper.copies import Tiles, load_values, send_rows
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
    pair_product,
    start_copy,
    store_columns_of_ones,
    store_gated_values,
    store_partial,
    store_triangle,
    sum_rows,
    twice_inverse,
    widened,
    with_sign,
)
from attn_evo._triton import problem
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
    fast_tanh,
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
_DOUT = STAGES  # its barrier, after those of the tiles of v
_REGISTERS = 255


@gluon.jit
def _vector_row(vector_ptr, D: gl.constexpr):
    """[1, D] beside tiles of results."""
    offs_d = gl.arange(0, D, gl.SliceLayout(0, accumulators(D)))
    return gl.expand_dims(gl.load(vector_ptr + offs_d), 0)


@gluon.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_norm_kernel(
    v_desc, dout_desc,  # [B, H, L, D]
    half_ratio_desc,  # [B * H, L, D], as those after it
    inverse_desc,  # 1 / denominator, with the sign of stat
    df_desc,
    dcontext_desc,  # written where IS_CAUSAL
    matrices_ptr, vectors_ptr, tile_sums_ptr, chunk_sums_ptr,
    contexts_ptr,  # [B * H, tiles, D]: the context before each tile
    partial_matrices_ptr,  # [programs, 4, D, D]
    partial_vectors_ptr,  # [programs, 6, D]
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
    IS_CAUSAL: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = v_desc.dtype
    NBYTES: gl.constexpr = v_desc.block_type.nbytes
    HOLDS_DW: gl.constexpr = D <= _HELD_DIM
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, D], dtype)
    ONES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([16, 16], dtype)
    HALF: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_M], dtype)
    COLUMNS: gl.constexpr = gl.SliceLayout(1, column_accumulators(D))
    ROW: gl.constexpr = gl.BlockedLayout([1], [32], [D // 16], [0])
    pid_bh, pid_c, b, h, first, last = chunk_of_program(H, num_tiles, num_chunks, tiles_per_chunk)
    stat_head = (num_heads + pid_bh).to(gl.int64)  # of tables [4, B * H, rows, D]
    b = b.to(gl.int32)
    h = h.to(gl.int32)
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
    full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for which in gl.static_range(STAGES + 1):
        mbarrier.init(full.index(which), count=1)
    fence_async_shared()
    thread_barrier()
    mbarrier.expect(full.index(0), NBYTES)
    load_values(v_desc, b, h, first * BLOCK_M, full.index(0), v_tiles.index(0))
    mbarrier.expect(full.index(_DOUT), NBYTES)
    load_values(dout_desc, b, h, first * BLOCK_M, full.index(_DOUT), dout_tile)
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
    async_copy.wait_group(0)
    fence_async_shared()
    for tile in range(first, last):
        start = tile * BLOCK_M
        rows = L - start
        step = tile - first
        stage = step % STAGES
        zero = opaque_zero(rows)
        half_tile = half_tiles.index(zero)
        high = work.index(zero)
        low = work.index(1 + zero)
        if IS_CAUSAL:
            context_row.store(context_i * 0.5)
            stat_row.store(stat_i)
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        thread_barrier()  # the other warpgroup has read the tile before
        mbarrier.expect(full.index(1 - stage), NBYTES)
        load_values(v_desc, b, h, start + BLOCK_M, full.index(1 - stage), v_tiles.index(1 - stage))
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
            inverse_count = twice_inverse(start + 1 + offs_m)
            if D > 64:  # the mean goes through `low`, which dcontext may not have left
                tma.store_wait(0)
                thread_barrier()
            mean = left_operand((context * inverse_count).to(dtype), low, D)
            logit = begin_linear(mean, weights, biases, W_G + zero, BLOCK_M, D)
            logit = warpgroup_mma_wait(0, deps=(logit,))
            tma.store_wait(0)  # what was in `high` and `low` has left them
            thread_barrier()
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
        values = v.load(accumulators(D))
        alive = has_values(values)
        silu = twice_gated(half_ratio, half_ratio, True)
        tma.store_wait(0)
        thread_barrier()  # the other warpgroup has multiplied v and what was gated
        high.store(with_sign(inverse, stat).to(dtype))
        low.store(pair_product(silu.to(dtype), values))
        v.store(half_ratio.to(dtype))
        fence_async_shared()
        thread_barrier()
        send_rows(inverse_desc, pid_bh, start, high)
        send_rows(half_ratio_desc, pid_bh, start, v)
        final = begin_linear(low, weights, biases, W_F + zero, BLOCK_M, D)
        final = warpgroup_mma_wait(0, deps=(final,))

        mbarrier.wait(full.index(_DOUT), step & 1)
        t = fast_tanh(final)  # 2 sigmoid - 1
        x = context * t + context
        mean_x = gl.expand_dims(gl.sum(x, 1) * (1.0 / D), 1)
        x -= mean_x
        variance = gl.sum(x * x, 1) * (1.0 / D) + NORM_EPSILON
        scale = gl.rsqrt(variance)
        deviation = gl.expand_dims(variance * scale, 1)
        scale = gl.where(alive, scale, 0.0)
        scale = gl.expand_dims(scale, 1)
        x *= scale
        dout = dout_tile.load(accumulators(D))
        tma.store_wait(0)  # what was in `high` has left it, and half_ratio has left `v`
        thread_barrier()
        high.store(pair_product(x.to(dtype), dout))
        fence_async_shared()
        sums = add_column_sums(sums, dout_tile, ones, _OF_NORM_BIAS + zero, BLOCK_M)
        sums = add_column_sums(sums, high, ones, _OF_NORM_WEIGHT + zero, BLOCK_M)
        dx = widened(dout) * _vector_row(vectors_ptr + NORM_WEIGHT * D, D)
        mean_dx, along = gl.reduce((dx, dx * x), 1, _add_two)
        # Half of dx and twice x: sigmoid is (1 + t) / 2.
        scale *= 0.5
        mean_dx = gl.expand_dims(mean_dx * (1.0 / D), 1) * scale
        along = gl.expand_dims(along * (1.0 / D), 1) * scale
        dx = dx * scale - mean_dx - x * along
        x = x * (2.0 * deviation) + 2.0 * mean_x
        df = (dx * (x - x * t)).to(dtype)
        dcontext = (dx * t + dx).to(dtype)
        sums = warpgroup_mma_wait(0, deps=(sums,))
        thread_barrier()  # so has the other warpgroup
        mbarrier.expect(full.index(_DOUT), NBYTES)
        load_values(dout_desc, b, h, start + BLOCK_M, full.index(_DOUT), dout_tile)
        high.store(df)
        fence_async_shared()
        thread_barrier()
        send_rows(df_desc, pid_bh, start, high)
        if HOLDS_DW:
            dw_f = warpgroup_mma(high.permute((1, 0)), low, dw_f, is_async=True)
        sums = add_column_sums(sums, high, ones, _OF_F + zero, BLOCK_M)
        if HOLDS_DW:
            dw_f, sums = warpgroup_mma_wait(0, deps=(dw_f, sums))
        else:
            sums = warpgroup_mma_wait(0, deps=(sums,))
        thread_barrier()
        low.store(dcontext)
        fence_async_shared()
        thread_barrier()
        if IS_CAUSAL:
            send_rows(dcontext_desc, pid_bh, start, low)
        else:
            sums = add_column_sums(sums, low, ones, _OF_DCONTEXT + zero, BLOCK_M)
            sums = warpgroup_mma_wait(0, deps=(sums,))
    # What was loaded ahead must have come before a program ends.
    num_steps = last - first
    mbarrier.wait(full.index(num_steps % STAGES), (num_steps // STAGES) & 1)
    mbarrier.wait(full.index(_DOUT), num_steps & 1)
    tma.store_wait(0)

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


_launch_norm = {
    D: GluonLauncher(_attention_backward_norm_kernel, num_warps=D // 16) for D in (64, 128)
}


def backward_norm(work: Work, dout: torch.Tensor) -> None:
    """As `_triton.backward`'s ratio and norm, but for the gradient of W_f where D > 64."""
    call, scratch = work.call, work.scratch
    v = call.v[0]
    *_, L, D = v.shape
    dcontext = work.dcontext.view(-1, L, D)
    tensors = (v, dout, work.half_ratio, work.inverse, work.df, dcontext)
    _launch_norm[D](
        call.num_programs,
        (
            *(Tiles(tensor, BLOCK_M) for tensor in tensors), scratch.matrices, scratch.vectors,
            scratch.tile_sums, scratch.chunk_sums, scratch.contexts, *work.partials, *call.sizes,
        ),
        {"IS_CAUSAL": work.causal, "D": D, "BLOCK_M": BLOCK_M},
        _REGISTERS,
    )  # fmt: skip
