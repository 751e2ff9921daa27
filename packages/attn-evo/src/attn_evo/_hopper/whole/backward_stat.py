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
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_core.gluon_launch import GluonLauncher
from attn_core.tiles.gluon_names import thread_barrier
from attn_core.tiles.hopper import arrive_at, arrive_at_stage, meet_at, meet_at_stage
from attn_evo._hopper import support
from attn_evo._hopper.copies import Tiles, load_rows, load_values, send_rows
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
    results,
    sixteen,
    square,
    start_copy,
    start_input_gradient,
    start_linear,
    start_scan,
    store_ones,
    store_transposed,
    store_triangle,
)
from attn_evo._triton import problem
from attn_evo._triton.tiles import W_G, fast_tanh

if TYPE_CHECKING:
    from attn_evo._triton.backward_work import Work

# Named barriers, of the first group and of the second: Triton takes those below 4.
_DLOGIT_FULL = gl.constexpr(4)  # its piece of dlogit, and of the mean, is there
_DLOGIT_EMPTY = gl.constexpr(6)  # and has been multiplied
_DSTAT_FROM = gl.constexpr(8)  # the sum that it leaves the other one
_DCONTEXT_FROM = gl.constexpr(10)


@gluon.jit
def _walk(
    v_desc, dstat_desc, dcontext_desc, dv_desc, contexts_ptr, dsums_ptr, head, b, h, num_heads,
    weight, bias, v_tiles, dstat_tiles, dv_tiles, dcontext_tiles, means, dlogits, triangles,
    dstat_rows, dcontext_rows, full, num_pieces,
    D: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Every other piece, from the last one on or from that before it."""
    FIRST: gl.constexpr = STAGES * GROUP
    BYTES: gl.constexpr = dstat_desc.block_type.nbytes
    ROW: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    offs_row = gl.arange(0, D, gl.SliceLayout(1, results()))
    offs_t = gl.arange(0, PIECE, gl.SliceLayout(0, results()))
    start = (num_pieces - 1 - GROUP) * PIECE
    now = full.index(FIRST)
    mbarrier.expect(now, 4 * BYTES)
    load_values(v_desc, b, h, start, now, v_tiles.index(FIRST))
    load_rows(dstat_desc, head, start, now, dstat_tiles.index(FIRST))
    load_rows(dcontext_desc, head, start, now, dcontext_tiles.index(FIRST))
    load_rows(dv_desc, head, start, now, dv_tiles.index(FIRST))
    before = gl.load(contexts_ptr + gl.maximum(num_pieces - 1 - GROUP, 0) * D + offs_row)
    if GROUP == 1:  # after the last piece there is nothing
        arrive_at(_DSTAT_FROM + 1, THREADS)
        arrive_at(_DCONTEXT_FROM + 1, THREADS)
    for step in range(GROUP, num_pieces, GROUPS):
        piece = num_pieces - 1 - step
        start = piece * PIECE
        zero = opaque_zero(piece + 1)
        use = step // GROUPS
        stage = FIRST + use % STAGES + zero
        other = 2 * FIRST + 1 - stage
        v = v_tiles.index(stage)
        dv_tile = dv_tiles.index(stage)
        dcontext_tile = dcontext_tiles.index(stage)
        mean_tile = means.index(GROUP + zero)
        dlogit_tile = dlogits.index(GROUP + zero)
        mbarrier.wait(full.index(stage), (use // STAGES) & 1)
        context = start_scan(v, triangles.index(zero), D)
        dgated = start_scan(dstat_tiles.index(stage), triangles.index(1 + zero), D)
        # The next one; before the first one there are zeros.
        after = start - GROUPS * PIECE
        full_next = full.index(other)
        mbarrier.expect(full_next, 4 * BYTES)
        load_values(v_desc, b, h, after, full_next, v_tiles.index(other))
        load_rows(dstat_desc, head, after, full_next, dstat_tiles.index(other))
        load_rows(dcontext_desc, head, after, full_next, dcontext_tiles.index(other))
        inverse_count = gl.expand_dims(1.0 / (start + 1 + offs_t).to(gl.float32), 0)
        context, dgated = warpgroup_mma_wait(0, deps=(context, dgated))
        context += gl.expand_dims(before, 1)
        before = gl.load(contexts_ptr + gl.maximum(piece - GROUPS, 0) * D + offs_row)
        if step >= GROUPS:
            meet_at(_DLOGIT_EMPTY + GROUP, THREADS)
        store_transposed(mean_tile, context * (2.0 * inverse_count))
        fence_async_shared()
        thread_barrier()
        logit = start_linear(mean_tile, weight.index(zero), bias.index(zero), D)
        tma.store_wait(0)  # dv of the piece before has left its tile
        load_rows(dv_desc, head, after, full_next, dv_tiles.index(other))
        meet_at(_DSTAT_FROM + (1 - GROUP), THREADS)
        dgated += load_column(dstat_rows.index(1 - GROUP))
        dstat_rows.index(GROUP).store(first_token(dgated))
        if piece > 0:
            arrive_at(_DSTAT_FROM + GROUP, THREADS)
        logit = warpgroup_mma_wait(0, deps=(logit,))
        t = fast_tanh(logit)  # of which sigmoid(2 logit) is (1 + t) / 2
        dgated *= 0.5 * t + 0.5
        dlogit = dgated * load_transposed(v) * (1.0 - t)
        store_transposed(dlogit_tile, dlogit)
        fence_async_shared()
        arrive_at(_DLOGIT_FULL + GROUP, THREADS)
        thread_barrier()
        dmean = start_input_gradient(dlogit_tile, weight.index(zero), D)
        dmean = warpgroup_mma_wait(0, deps=(dmean,))
        dcontext = load_transposed(dcontext_tile) + dmean * inverse_count
        store_transposed(dcontext_tile, dcontext)
        fence_async_shared()
        thread_barrier()
        dcontext = start_scan(dcontext_tile, triangles.index(1 + zero), D)
        dgated += load_transposed(dv_tile)
        dcontext = warpgroup_mma_wait(0, deps=(dcontext,))
        meet_at(_DCONTEXT_FROM + (1 - GROUP), THREADS)
        dcontext += load_column(dcontext_rows.index(1 - GROUP))
        dcontext_rows.index(GROUP).store(first_token(dcontext))
        if piece > 0:
            arrive_at(_DCONTEXT_FROM + GROUP, THREADS)
        store_transposed(dv_tile, dgated + dcontext)
        fence_async_shared()
        thread_barrier()
        send_rows(dv_desc, head, start, dv_tile)
    # What was loaded ahead must have come before the program ends.
    uses = (num_pieces - GROUP + 1) // GROUPS
    mbarrier.wait(full.index(FIRST + uses % STAGES), (uses // STAGES) & 1)
    tma.store_wait(0)
    if (num_pieces - 1) % GROUPS == GROUP:  # it had the first piece
        offs_d = gl.arange(0, D, ROW)
        gl.store(dsums_ptr + offs_d, dcontext_rows.index(GROUP).load(ROW))
        row = dsums_ptr + num_heads.to(gl.int64) * D
        gl.store(row + offs_d, dstat_rows.index(GROUP).load(ROW))


@gluon.jit
def _add_products(
    partial_matrices_ptr, partial_vectors_ptr, means, dlogits, ones, num_pieces, D: gl.constexpr
):
    """The gradients of W_g and of its bias, of the pieces of both groups."""
    dw_g = gl.zeros([D, D], gl.float32, square(D))
    sums = gl.zeros([D, 16], gl.float32, sixteen())
    for step in range(num_pieces):
        group = step % GROUPS
        meet_at_stage(_DLOGIT_FULL, group, THREADS)
        mean_tile = means.index(group)
        dlogit_tile = dlogits.index(group)
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
    v_desc, dstat_desc, dcontext_desc, dv_desc,
    matrices_ptr, vectors_ptr,
    contexts_ptr,  # [B * H, pieces, D]: half the context before each piece
    dsums_ptr,  # [2, B, H, D], contiguous
    partial_matrices_ptr,  # [programs, 4, D, D]
    partial_vectors_ptr,  # [programs, 6, D]
    H, num_heads, num_pieces,
    D: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = v_desc.dtype
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PIECE, D], dtype)
    WEIGHT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([D, D], dtype)
    ONES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([16, 16], dtype)
    TRIANGLE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PIECE, PIECE], dtype)
    ROW: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    pid = gl.program_id(0)
    head = pid.to(gl.int64)
    b = pid // H
    h = pid % H
    contexts_ptr += head * num_pieces * D
    dsums_ptr += head * D
    partial_matrices_ptr += (head * 4 + W_G) * D * D
    partial_vectors_ptr += (head * 6 + W_G) * D

    weight = gl.allocate_shared_memory(dtype, [1, D, D], WEIGHT)
    bias = gl.allocate_shared_memory(gl.float32, [1, D], FLAT)
    v_tiles = gl.allocate_shared_memory(dtype, [GROUPS * STAGES, PIECE, D], TILE)
    dstat_tiles = gl.allocate_shared_memory(dtype, [GROUPS * STAGES, PIECE, D], TILE)
    dv_tiles = gl.allocate_shared_memory(dtype, [GROUPS * STAGES, PIECE, D], TILE)
    dcontext_tiles = gl.allocate_shared_memory(dtype, [GROUPS * STAGES, PIECE, D], TILE)
    means = gl.allocate_shared_memory(dtype, [GROUPS, PIECE, D], TILE)
    dlogits = gl.allocate_shared_memory(dtype, [GROUPS, PIECE, D], TILE)
    ones = gl.allocate_shared_memory(dtype, [16, 16], ONES)
    triangles = gl.allocate_shared_memory(dtype, [2, PIECE, PIECE], TRIANGLE)
    dstat_rows = gl.allocate_shared_memory(gl.float32, [GROUPS, D], FLAT)
    dcontext_rows = gl.allocate_shared_memory(gl.float32, [GROUPS, D], FLAT)
    full = gl.allocate_shared_memory(gl.int64, [GROUPS * STAGES, 1], BARRIER)
    for i in gl.static_range(GROUPS * STAGES):
        mbarrier.init(full.index(i), count=1)
    offs_d = gl.arange(0, D, ROW)
    start_copy(weight.index(0), matrices_ptr + W_G * D * D, D, D)
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
                    v_desc, dstat_desc, dcontext_desc, dv_desc, contexts_ptr, dsums_ptr, pid, b, h,
                    num_heads, weight, bias, v_tiles, dstat_tiles, dv_tiles, dcontext_tiles, means,
                    dlogits, triangles, dstat_rows, dcontext_rows, full, num_pieces, D, 0,
                ),
            ),
            (
                _walk,
                (
                    v_desc, dstat_desc, dcontext_desc, dv_desc, contexts_ptr, dsums_ptr, pid, b, h,
                    num_heads, weight, bias, v_tiles, dstat_tiles, dv_tiles, dcontext_tiles, means,
                    dlogits, triangles, dstat_rows, dcontext_rows, full, num_pieces, D, 1,
                ),
            ),
            (
                _add_products,
                (partial_matrices_ptr, partial_vectors_ptr, means, dlogits, ones, num_pieces, D),
            ),
        ],
        [4, 4],
        [160, 184],
    )  # fmt: skip


# Registers of a thread at the start, which warp_specialize shares out: 160 where two take turns.
_REGISTERS = 168
_launch_stat = GluonLauncher(_attention_backward_whole_stat_kernel)


def backward_stat(work: Work, contexts: torch.Tensor, dstat: torch.Tensor) -> None:
    """As `_triton.backward`'s stat and context."""
    call, scratch = work.call, work.scratch
    v = call.v[0]
    _, H, num_heads, *_ = call.sizes
    tensors = v, dstat, work.dcontext, work.dv.view(dstat.shape)
    _launch_stat(
        num_heads,
        args=(
            *(Tiles(x, support.PIECE) for x in tensors), scratch.matrices, scratch.vectors,
            contexts, work.dsums, *work.partials, H, num_heads, contexts.shape[1],
        ),
        constants={"D": v.shape[-1]},
        maxnreg=_REGISTERS,
    )  # fmt: skip
