"""LayerNorm backward on Hopper, where a program owns a whole sequence.

It computes the output as `output` does, keeps what the launches after it need of that, and while
the rest is still in registers goes back to the gradients of context and of W_f gate + b_f.

Two warpgroups hold 64 columns each of a tile of tokens. The copy engine brings v of the next tile,
whose context is summed up while the norm of this one is computed, and takes away what is computed.

Where a row's statistics need both halves of it, each warpgroup first sums up its own half, about
the mean of that half. All of these sums are exchanged at once, and merged as Chan, Golub and
LeVeque do ("Updating formulae and a pairwise algorithm for computing sample variances", 1979).
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
from attn_evo._hopper.support import BLOCK_M
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
    either,
    left_operand,
    magnitude_bits,
    opaque_zero,
    pair_product,
    start_copy,
    store_columns_of_ones,
    store_gated_values,
    store_triangle,
    twice_inverse,
    widened,
    with_sign,
)
from attn_evo._hopper.whole.tiles import PIECE
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
    fast_tanh,
    twice_gated,
)

if TYPE_CHECKING:
    from attn_evo._triton.backward_work import Work

_WARPS = 8
_REGISTERS = 255
_ROWS = gl.constexpr(BLOCK_M)  # tokens of a tile
_PIECES = gl.constexpr(BLOCK_M // PIECE.value)
_COLUMNS = gl.constexpr(64)  # of a warpgroup
# Columns of sums.
_OF_NORM_WEIGHT = gl.constexpr(0)
_OF_NORM_BIAS = gl.constexpr(1)
_OF_F = gl.constexpr(2)
_DOUT = STAGES  # its barrier, after those of the tiles of v


@gluon.jit
def _start_context(v, row, half_tile, ones, zero, D: gl.constexpr):
    """Start half the running sums of a tile, and the sums of its pieces."""
    context = begin_with(row, _ROWS, D)
    context = warpgroup_mma(half_tile, v, context, is_async=True)
    sums = gl.zeros([D, 16], gl.float32, column_accumulators(D))
    for piece in gl.static_range(_PIECES):
        sums = add_column_sums(sums, v.slice(piece * PIECE, PIECE), ones, piece + zero, PIECE)
    return context, sums


@gluon.jit
def _store_contexts(contexts_ptr, context_i, sums, tile, num_pieces, D: gl.constexpr):
    """Store half the context before each piece of a tile; return that after the last one."""
    offs_d = gl.arange(0, D, gl.SliceLayout(1, column_accumulators(D)))
    for piece in gl.static_range(_PIECES):
        number = tile * _PIECES + piece
        ptrs = contexts_ptr + number * D + offs_d
        gl.store(ptrs, context_i, mask=(offs_d < D) & (number < num_pieces))
        context_i += 0.5 * column_sums(sums, piece, D)
    return context_i


@gluon.jit
def _split(x, D: gl.constexpr):
    """[rows, halves, columns]: what each warpgroup holds."""
    return gl.reshape(x, [_ROWS, D // _COLUMNS, _COLUMNS])


@gluon.jit
def _merge_halves(mean, squares, g, along, bits, mean_b, squares_b, g_b, along_b, bits_b):
    """Of two halves: mean of x, sums of (x - mean)^2, g and g (x - mean), and bits of v."""
    apart = mean - mean_b
    squares += squares_b + (0.5 * _COLUMNS) * apart * apart
    along += along_b + 0.5 * apart * (g - g_b)
    return 0.5 * (mean + mean_b), squares, g + g_b, along, bits | bits_b


@gluon.jit
def _of_rows(x, D: gl.constexpr):
    """[rows, 1] beside tiles of results, of a number for each row."""
    x = gl.convert_layout(x, gl.SliceLayout(1, accumulators(D)), assert_trivial=True)
    return gl.expand_dims(x, 1)


@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_whole_norm_kernel(
    v_desc, dout_desc,  # [B, H, L, D]
    half_ratio_desc,  # [B * H, L, D], as those after it
    inverse_desc,  # 1 / denominator, with the sign of stat
    df_desc, dcontext_desc,
    matrices_ptr, vectors_ptr,
    contexts_ptr,  # [B * H, pieces, D], written: half the context before each piece of PIECE tokens
    partial_vectors_ptr,  # [programs, 6, D]
    L, H, num_tiles, num_pieces,
    D: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = v_desc.dtype
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_ROWS, D], dtype)
    ONES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([16, 16], dtype)
    HALF: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_ROWS, _ROWS], dtype)
    NBYTES: gl.constexpr = v_desc.block_type.nbytes
    pid = gl.program_id(0)
    b = pid // H
    h = pid % H
    contexts_ptr += pid.to(gl.int64) * num_pieces * D
    partial_vectors_ptr += pid.to(gl.int64) * 6 * D

    weights = gl.allocate_shared_memory(dtype, [4, D, D], TILE)
    biases = gl.allocate_shared_memory(gl.float32, [4, D], FLAT)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, _ROWS, D], TILE)
    dout_tile = gl.allocate_shared_memory(dtype, [_ROWS, D], TILE)
    work = gl.allocate_shared_memory(dtype, [2, _ROWS, D], TILE)
    ones = gl.allocate_shared_memory(dtype, [3, 16, 16], ONES)
    half_tiles = gl.allocate_shared_memory(dtype, [1, _ROWS, _ROWS], HALF)
    context_row = gl.allocate_shared_memory(gl.float32, [D], FLAT)
    stat_row = gl.allocate_shared_memory(gl.float32, [D], FLAT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for which in gl.static_range(STAGES + 1):
        mbarrier.init(full.index(which), count=1)
    fence_async_shared()
    thread_barrier()
    mbarrier.expect(full.index(0), NBYTES)
    load_values(v_desc, b, h, 0, full.index(0), v_tiles.index(0))
    mbarrier.expect(full.index(_DOUT), NBYTES)
    load_values(dout_desc, b, h, 0, full.index(_DOUT), dout_tile)
    offs_d = gl.arange(0, D, gl.SliceLayout(1, column_accumulators(D)))
    for which in gl.static_range(4):
        start_copy(weights.index(which), matrices_ptr + which * D * D, D, D, D, D)
        biases.index(which).store(gl.load(vectors_ptr + which * D + offs_d))
    async_copy.commit_group()
    store_columns_of_ones(ones, 3, D)
    store_triangle(half_tiles.index(0), False, _ROWS, D)

    context_i = gl.zeros([D], gl.float32, gl.SliceLayout(1, column_accumulators(D)))
    stat_i = context_i
    sums = gl.zeros([D, 16], gl.float32, column_accumulators(D))
    offs_m = gl.arange(0, _ROWS, gl.SliceLayout(1, accumulators(D)))
    columns = gl.arange(0, D, gl.SliceLayout(0, accumulators(D)))
    context_row.store(context_i)
    stat_row.store(stat_i)
    async_copy.wait_group(0)
    fence_async_shared()
    mbarrier.wait(full.index(0), 0)
    thread_barrier()
    first, half_tile = v_tiles.index(0), half_tiles.index(0)
    context, first_sums = _start_context(first, context_row, half_tile, ones, 0, D)
    context, first_sums = warpgroup_mma_wait(0, deps=(context, first_sums))
    context_i = _store_contexts(contexts_ptr, context_i, first_sums, 0, num_pieces, D)
    for tile in range(num_tiles):
        start = tile * _ROWS
        zero = opaque_zero(L - start)
        stage = tile % STAGES + zero
        other = 1 - tile % STAGES + zero
        half_tile = half_tiles.index(zero)
        high = work.index(zero)
        low = work.index(1 + zero)
        v = v_tiles.index(stage)
        next_v = v_tiles.index(other)
        mean = left_operand((context * twice_inverse(start + 1 + offs_m)).to(dtype), next_v, D)
        logit = begin_linear(mean, weights, biases, W_G + zero, _ROWS, D)
        local = begin_linear(v, weights, biases, W_L + zero, _ROWS, D)
        stat = begin_with(stat_row, _ROWS, D)
        logit = warpgroup_mma_wait(1, deps=(logit,))
        tma.store_wait(0)  # what was in `high` and `low` has left them
        thread_barrier()  # and the other warpgroup has multiplied the mean
        mbarrier.expect(full.index(other), NBYTES)
        load_values(v_desc, b, h, start + _ROWS, full.index(other), next_v)
        query = begin_linear(v, weights, biases, W_Q + zero, _ROWS, D)
        store_gated_values(v, logit, high, low, dtype, D)
        stat = warpgroup_mma(half_tile, high, stat, is_async=True)
        stat = warpgroup_mma(half_tile, low, stat, is_async=True)
        gated_sum = gl.zeros([D, 16], gl.float32, column_accumulators(D))
        gated_sum = add_column_sums(gated_sum, high, ones, zero, _ROWS)
        gated_sum = add_column_sums(gated_sum, low, ones, zero, _ROWS)
        stat, gated_sum, local, query = warpgroup_mma_wait(0, deps=(stat, gated_sum, local, query))
        stat_i += 0.5 * column_sums(gated_sum, 0, D)  # the gated values were doubled
        inverse = reciprocal(add_magnitudes(stat, local) + EPSILON)
        half_ratio = query * inverse
        values = v.load(accumulators(D))
        bits = gl.reduce(_split(magnitude_bits(values), D), 2, either)
        silu = twice_gated(half_ratio, half_ratio, True)
        thread_barrier()  # the other warpgroup has multiplied v and what was gated
        high.store(with_sign(inverse, stat).to(dtype))
        low.store(pair_product(silu.to(dtype), values))
        v.store(half_ratio.to(dtype))
        mbarrier.wait(full.index(_DOUT), tile & 1)
        fence_async_shared()
        thread_barrier()
        final = begin_linear(low, weights, biases, W_F + zero, _ROWS, D)
        send_rows(inverse_desc, pid, start, high)
        send_rows(half_ratio_desc, pid, start, v)
        dout = dout_tile.load(accumulators(D))
        norm_weight = gl.load(vectors_ptr + NORM_WEIGHT * D + columns)
        dx = widened(dout) * gl.expand_dims(norm_weight, 0)
        mbarrier.wait(full.index(other), ((tile + 1) // STAGES) & 1)
        final = warpgroup_mma_wait(0, deps=(final,))

        t = fast_tanh(final)  # 2 sigmoid - 1
        x = _split(context * t + context, D)
        context_row.store(context_i)
        stat_row.store(stat_i)
        thread_barrier()
        context, piece_sums = _start_context(next_v, context_row, half_tile, ones, zero, D)
        g = _split(dx, D)
        own_mean = gl.sum(x, 2) * (1.0 / _COLUMNS)
        x -= gl.expand_dims(own_mean, 2)
        halves = own_mean, gl.sum(x * x, 2), gl.sum(g, 2), gl.sum(g * x, 2), bits
        mean_x, variance, mean_dx, along, bits = gl.reduce(halves, 1, _merge_halves)
        variance = variance * (1.0 / D) + NORM_EPSILON
        scale = gl.rsqrt(variance)
        deviation = _of_rows(variance * scale, D)
        scale = gl.where(bits != 0, scale, 0.0)
        shift = (own_mean - gl.expand_dims(mean_x, 1)) * gl.expand_dims(scale, 1)
        x = x * gl.expand_dims(gl.expand_dims(scale, 1), 2) + gl.expand_dims(shift, 2)
        x = gl.convert_layout(gl.reshape(x, [_ROWS, D]), accumulators(D), assert_trivial=True)
        tma.store_wait(0)  # what was in `high` has left it, and half_ratio has left `v`
        thread_barrier()
        high.store(pair_product(x.to(dtype), dout))
        fence_async_shared()
        sums = add_column_sums(sums, dout_tile, ones, _OF_NORM_BIAS + zero, _ROWS)
        sums = add_column_sums(sums, high, ones, _OF_NORM_WEIGHT + zero, _ROWS)
        # Half of dx and twice x: sigmoid is (1 + t) / 2.
        along = _of_rows(along * scale * scale * (0.5 / D), D)
        mean_dx = _of_rows(mean_dx * scale * (0.5 / D), D)
        dx = dx * _of_rows(0.5 * scale, D) - mean_dx - x * along
        x = x * (2.0 * deviation) + 2.0 * _of_rows(mean_x, D)
        df = (dx * (x - x * t)).to(dtype)
        dcontext = (dx * t + dx).to(dtype)
        deps = (context, piece_sums, sums)
        context, piece_sums, sums = warpgroup_mma_wait(0, deps=deps)
        thread_barrier()  # so has the other warpgroup
        mbarrier.expect(full.index(_DOUT), NBYTES)
        load_values(dout_desc, b, h, start + _ROWS, full.index(_DOUT), dout_tile)
        high.store(df)
        low.store(dcontext)
        fence_async_shared()
        thread_barrier()
        sums = add_column_sums(sums, high, ones, _OF_F + zero, _ROWS)
        send_rows(df_desc, pid, start, high)
        send_rows(dcontext_desc, pid, start, low)
        context_i = _store_contexts(contexts_ptr, context_i, piece_sums, tile + 1, num_pieces, D)
        sums = warpgroup_mma_wait(0, deps=(sums,))
    mbarrier.wait(full.index(_DOUT), num_tiles & 1)  # rows past the end, but a copy in flight
    tma.store_wait(0)

    gl.store(partial_vectors_ptr + W_F * D + offs_d, column_sums(sums, _OF_F, D))
    gl.store(partial_vectors_ptr + NORM_WEIGHT * D + offs_d, column_sums(sums, _OF_NORM_WEIGHT, D))
    gl.store(partial_vectors_ptr + NORM_BIAS * D + offs_d, column_sums(sums, _OF_NORM_BIAS, D))


_launch_norm = GluonLauncher(_attention_backward_whole_norm_kernel, num_warps=_WARPS)


def backward_norm(work: Work, dout: torch.Tensor, contexts: torch.Tensor) -> None:
    """As `_triton.backward`'s ratio and norm, but for the gradient of W_f; fills `contexts`."""
    call, scratch = work.call, work.scratch
    v = call.v[0]
    L, H, num_heads, num_tiles, *_ = call.sizes
    tensors = (v, dout, work.half_ratio, work.inverse, work.df, work.dcontext)
    _launch_norm(
        num_heads,
        (
            *(Tiles(tensor, BLOCK_M) for tensor in tensors), scratch.matrices, scratch.vectors,
            contexts, work.partial_vectors, L, H, num_tiles, contexts.shape[1],
        ),
        {"D": v.shape[-1]},
        _REGISTERS,
    )  # fmt: skip
