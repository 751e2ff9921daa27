"""Suffix sums of dstat and of dcontext on Hopper, where a program owns a whole sequence.

Two warpgroups take turns at its pieces, from the last one on: while one waits for a product, the
other computes. Each leaves the other the sums of the tokens from its piece on. A third warpgroup
adds up the gradient of W_g, which would fill the registers of the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_core.launch import Launcher
from attn_core.tiles.gluon_names import async_load, thread_barrier
from attn_core.tiles.hopper import arrive_at, arrive_at_stage, meet_at, meet_at_stage
from attn_evo._hopper.tiles import FLAT, opaque_zero
from attn_evo._hopper.whole.tiles import (
    GROUPS,
    PIECE,
    STAGES,
    THREADS,
    add_row_sums,
    first_column,
    first_token,
    load_column,
    load_transposed,
    of_each_thread,
    results,
    sixteen,
    square,
    start_copy,
    start_input_gradient,
    start_linear,
    start_scan,
    store_ones,
    store_rows,
    store_transposed,
    store_triangle,
)
from attn_evo._triton import configs, problem
from attn_evo._triton.tiles import W_G, rounded, sigmoid_of_double

if TYPE_CHECKING:
    from attn_evo._triton.backward_work import Work

# Named barriers, of the first group and of the second: Triton takes those below 4.
_DLOGIT_FULL = gl.constexpr(4)  # its piece of dlogit, and of the mean, is there
_DLOGIT_EMPTY = gl.constexpr(6)  # and has been multiplied
_DSTAT_FROM = gl.constexpr(8)  # the sum that it leaves the other one
_DCONTEXT_FROM = gl.constexpr(10)
# Tiles of a group, in each stage.
_V = gl.constexpr(0)
_DSTAT = gl.constexpr(2)
_DV = gl.constexpr(4)
_DCONTEXT = gl.constexpr(6)
_TILES = gl.constexpr(8)


@gluon.jit
def _walk(
    v_ptr, stride_vl, contexts_ptr, dstat_ptr, dcontext_ptr, dv_ptr, dsums_ptr, num_heads,
    weight, bias, tiles, work, triangles, contexts, dstat_rows, dcontext_rows,
    L, last_rows, num_pieces,
    D: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Every other piece, from the last one on or from that before it."""
    dtype: gl.constexpr = tiles.dtype
    FIRST: gl.constexpr = _TILES * GROUP
    offs_d = gl.arange(0, D, gl.BlockedLayout([1], [32], [4], [0]))
    offs_row = gl.arange(0, D, gl.SliceLayout(1, results()))
    offs_t = gl.arange(0, PIECE, gl.SliceLayout(0, results()))
    rows = last_rows + GROUP * PIECE
    start = L - rows
    num_rows = gl.where(start >= 0, rows, 0)
    context_ptr = contexts_ptr + gl.maximum(num_pieces - 1 - GROUP, 0) * D
    async_load(contexts.index(STAGES * GROUP), context_ptr + offs_d)
    v_start = start.to(gl.int64) * stride_vl
    start_copy(tiles.index(FIRST + _V), v_ptr + v_start, stride_vl, num_rows, 0, PIECE, D)
    start_copy(tiles.index(FIRST + _DSTAT), dstat_ptr + start * D, D, num_rows, 0, PIECE, D)
    start_copy(tiles.index(FIRST + _DV), dv_ptr + start * D, D, num_rows, 0, PIECE, D)
    start_copy(tiles.index(FIRST + _DCONTEXT), dcontext_ptr + start * D, D, num_rows, 0, PIECE, D)
    async_copy.commit_group()
    if GROUP == 1:  # after the last piece there is nothing
        arrive_at(_DSTAT_FROM + 1, THREADS)
        arrive_at(_DCONTEXT_FROM + 1, THREADS)
    apart = 64 * of_each_thread(opaque_zero(num_pieces))
    v_ptr += apart
    contexts_ptr += apart
    dstat_ptr += apart
    dcontext_ptr += apart
    dv_ptr += apart
    for step in range(GROUP, num_pieces, GROUPS):
        piece = num_pieces - 1 - step
        rows = last_rows + step * PIECE
        start = L - rows
        zero = opaque_zero(rows)
        stage = (step // GROUPS) % STAGES
        v = tiles.index(FIRST + _V + stage)
        dstat = tiles.index(FIRST + _DSTAT + stage)
        dv_tile = tiles.index(FIRST + _DV + stage)
        dcontext_tile = tiles.index(FIRST + _DCONTEXT + stage)
        mean_tile = work.index(2 * GROUP + zero)
        dlogit_tile = work.index(2 * GROUP + 1 + zero)
        async_copy.wait_group(0)
        fence_async_shared()
        thread_barrier()
        # The next one, if there is one.
        num_rows = gl.where(start >= GROUPS * PIECE, PIECE, 0)
        back = gl.where(start >= GROUPS * PIECE, GROUPS * PIECE, 0)
        other = FIRST + 1 - stage
        next_start = start - back + zero
        context_ptr = contexts_ptr + gl.maximum(piece - GROUPS, 0) * D
        async_load(contexts.index(STAGES * GROUP + 1 - stage), context_ptr + offs_d)
        v_start = next_start.to(gl.int64) * stride_vl
        start_copy(tiles.index(other + _V), v_ptr + v_start, stride_vl, num_rows, zero, PIECE, D)
        next_ptr = dstat_ptr + next_start * D
        start_copy(tiles.index(other + _DSTAT), next_ptr, D, num_rows, zero, PIECE, D)
        next_ptr = dcontext_ptr + next_start * D
        start_copy(tiles.index(other + _DCONTEXT), next_ptr, D, num_rows, zero, PIECE, D)
        next_ptr = dv_ptr + next_start * D
        start_copy(tiles.index(other + _DV), next_ptr, D, num_rows, zero, PIECE, D)
        async_copy.commit_group()

        context = start_scan(v, triangles.index(zero), D)
        dgated = start_scan(dstat, triangles.index(1 + zero), D)
        context, dgated = warpgroup_mma_wait(0, deps=(context, dgated))
        inverse_count = gl.expand_dims(1.0 / (start + 1 + offs_t).to(gl.float32), 0)
        context += load_column(contexts.index(STAGES * GROUP + stage))
        if step >= GROUPS:
            meet_at(_DLOGIT_EMPTY + GROUP, THREADS)
        store_transposed(mean_tile, context * (2.0 * inverse_count))
        fence_async_shared()
        logit = start_linear(mean_tile, weight.index(zero), bias.index(zero), D)
        meet_at(_DSTAT_FROM + (1 - GROUP), THREADS)
        dgated += load_column(dstat_rows.index(1 - GROUP))
        sum_on = first_token(dgated)
        if piece > 0:
            dstat_rows.index(GROUP).store(sum_on)
            arrive_at(_DSTAT_FROM + GROUP, THREADS)
        else:
            gl.store(dsums_ptr + num_heads.to(gl.int64) * D + offs_row, sum_on)
        logit = warpgroup_mma_wait(0, deps=(logit,))
        gate = sigmoid_of_double(logit, True)
        dgated *= gate
        dlogit = 2.0 * dgated * load_transposed(v) * (1.0 - gate)
        store_transposed(dlogit_tile, rounded(dlogit, dtype))
        dv = load_transposed(dv_tile) + dgated
        fence_async_shared()
        arrive_at(_DLOGIT_FULL + GROUP, THREADS)
        dmean = start_input_gradient(dlogit_tile, weight.index(zero), D)
        dmean = warpgroup_mma_wait(0, deps=(dmean,))
        dcontext = load_transposed(dcontext_tile) + dmean * inverse_count
        store_transposed(dcontext_tile, rounded(dcontext, dtype))
        fence_async_shared()
        dcontext = start_scan(dcontext_tile, triangles.index(1 + zero), D)
        dcontext = warpgroup_mma_wait(0, deps=(dcontext,))
        meet_at(_DCONTEXT_FROM + (1 - GROUP), THREADS)
        dcontext += load_column(dcontext_rows.index(1 - GROUP))
        sum_on = first_token(dcontext)
        if piece > 0:
            dcontext_rows.index(GROUP).store(sum_on)
            arrive_at(_DCONTEXT_FROM + GROUP, THREADS)
        else:
            gl.store(dsums_ptr + offs_row, sum_on)
        store_transposed(dv_tile, rounded(dv + dcontext, dtype))
        store_rows(dv_ptr + (start + zero) * D, dv_tile, rows, zero, PIECE, D)
    async_copy.wait_group(0)


@gluon.jit
def _add_products(
    partial_matrices_ptr, partial_vectors_ptr, work, ones, num_pieces, D: gl.constexpr
):
    """The gradients of W_g and of its bias, of the pieces of both groups."""
    dw_g = gl.zeros([D, D], gl.float32, square(D))
    sums = gl.zeros([D, 16], gl.float32, sixteen())
    for step in range(num_pieces):
        group = step % GROUPS
        meet_at_stage(_DLOGIT_FULL, group, THREADS)
        mean_tile = work.index(2 * group)
        dlogit_tile = work.index(2 * group + 1)
        dw_g = warpgroup_mma(dlogit_tile.permute((1, 0)), mean_tile, dw_g, is_async=True)
        sums = add_row_sums(sums, dlogit_tile, ones)
        dw_g, sums = warpgroup_mma_wait(0, deps=(dw_g, sums))
        if step + GROUPS < num_pieces:
            arrive_at_stage(_DLOGIT_EMPTY, group, THREADS)

    rows = gl.arange(0, D, gl.SliceLayout(1, square(D)))[:, None]
    columns = gl.arange(0, D, gl.SliceLayout(0, square(D)))[None, :]
    gl.store(partial_matrices_ptr + rows * D + columns, dw_g)
    offs_d = gl.arange(0, D, gl.SliceLayout(1, sixteen()))
    gl.store(partial_vectors_ptr + offs_d, first_column(sums))


@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_whole_stat_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl,
    matrices_ptr, vectors_ptr,
    contexts_ptr,  # [B * H, pieces, D]: half the context before each piece
    dstat_ptr, dcontext_ptr,  # [B * H, L, D], contiguous
    dv_ptr,  # [B, H, L, D], contiguous
    dsums_ptr,  # [2, B, H, D], contiguous
    partial_matrices_ptr,  # [programs, 4, D, D]
    partial_vectors_ptr,  # [programs, 6, D]
    L, H, num_heads, num_pieces,
    D: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = v_ptr.dtype.element_ty
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PIECE, D], dtype)
    WEIGHT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([D, D], dtype)
    ONES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([16, 16], dtype)
    TRIANGLE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PIECE, PIECE], dtype)
    ROW: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    pid = gl.program_id(0)
    head = pid.to(gl.int64)
    v_ptr += (pid // H).to(gl.int64) * stride_vb + (pid % H).to(gl.int64) * stride_vh
    contexts_ptr += head * num_pieces * D
    dstat_ptr += head * L * D
    dcontext_ptr += head * L * D
    dv_ptr += head * L * D
    dsums_ptr += head * D
    partial_matrices_ptr += (head * 4 + W_G) * D * D
    partial_vectors_ptr += (head * 6 + W_G) * D
    last_rows = L - (num_pieces - 1) * PIECE

    weight = gl.allocate_shared_memory(dtype, [1, D, D], WEIGHT)
    bias = gl.allocate_shared_memory(gl.float32, [1, D], FLAT)
    tiles = gl.allocate_shared_memory(dtype, [GROUPS * _TILES, PIECE, D], TILE)
    work = gl.allocate_shared_memory(dtype, [GROUPS * 2, PIECE, D], TILE)
    ones = gl.allocate_shared_memory(dtype, [16, 16], ONES)
    triangles = gl.allocate_shared_memory(dtype, [2, PIECE, PIECE], TRIANGLE)
    contexts = gl.allocate_shared_memory(gl.float32, [GROUPS * STAGES, D], FLAT)
    dstat_rows = gl.allocate_shared_memory(gl.float32, [GROUPS, D], FLAT)
    dcontext_rows = gl.allocate_shared_memory(gl.float32, [GROUPS, D], FLAT)
    offs_d = gl.arange(0, D, ROW)
    start_copy(weight.index(0), matrices_ptr + W_G * D * D, D, D, 0, D, D)
    async_copy.commit_group()
    bias.index(0).store(gl.load(vectors_ptr + W_G * D + offs_d))
    dstat_rows.index(1).store(gl.zeros([D], gl.float32, ROW))
    dcontext_rows.index(1).store(gl.zeros([D], gl.float32, ROW))
    store_ones(ones, dtype)
    store_triangle(triangles.index(0), False, dtype)
    store_triangle(triangles.index(1), True, dtype)
    async_copy.wait_group(0)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _walk,
                (
                    v_ptr, stride_vl, contexts_ptr, dstat_ptr, dcontext_ptr, dv_ptr, dsums_ptr,
                    num_heads, weight, bias, tiles, work, triangles, contexts, dstat_rows,
                    dcontext_rows, L, last_rows, num_pieces, D, 0,
                ),
            ),
            (
                _walk,
                (
                    v_ptr, stride_vl, contexts_ptr, dstat_ptr, dcontext_ptr, dv_ptr, dsums_ptr,
                    num_heads, weight, bias, tiles, work, triangles, contexts, dstat_rows,
                    dcontext_rows, L, last_rows, num_pieces, D, 1,
                ),
            ),
            (
                _add_products,
                (partial_matrices_ptr, partial_vectors_ptr, work, ones, num_pieces, D),
            ),
        ],
        [4, 4],
        [160, 184],
    )  # fmt: skip


# Registers of a thread at the start, which warp_specialize shares out: 160 where two take turns.
_launch_stat = Launcher(_attention_backward_whole_stat_kernel, maxnreg=168)


def backward_stat(work: Work, contexts: torch.Tensor, dstat: torch.Tensor) -> None:
    """As `_triton.backward`'s stat and context."""
    call, scratch = work.call, work.scratch
    v = call.v[0]
    L, H, num_heads, *_ = call.sizes
    _launch_stat(
        num_heads,
        strides=v.stride(),
        args=(
            v, *v.stride()[:3], scratch.matrices, scratch.vectors, contexts, dstat, work.dcontext,
            work.dv, work.dsums, *work.partials, L, H, num_heads, contexts.shape[1],
        ),
        constexprs={"D": v.shape[-1]},
        config=configs.hopper_kernel(v, call.config)._replace(num_warps=4),
    )  # fmt: skip
