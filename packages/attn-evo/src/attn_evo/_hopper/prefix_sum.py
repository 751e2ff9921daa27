"""Prefix sums of columns on Hopper, in place of the Triton kernel that reads them once.

A tile, twice as long, waits in shared memory for the sums before it, not in registers. Otherwise
the kernels are alike.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from attn_core.launch import Launcher
from attn_core.tiles.gluon_names import async_load, reinterpret, thread_barrier
from attn_evo._triton import problem
from attn_evo._triton.prefix_sum import (
    PUBLISHED,
    outer_offset,
    published,
    tile_of_program,
)

_RUNS = gl.constexpr(16)  # of a tile: each thread walks one for eight columns


@gluon.constexpr_function
def _nth(i, count, reverse):
    """Which element of a run comes at a step."""
    return count - 1 - i if reverse else i


@gluon.jit
def _sum_before(words_ptr, place, num_tiles, GROUP: gl.constexpr, BLOCK_C: gl.constexpr):
    """Sum of all tiles before one: those of its group and, in the first row, all groups before."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([4, 2], [1, 32], [4, 1], [1, 0])
    group = place // GROUP
    offs_row = gl.arange(0, GROUP, gl.SliceLayout(1, LAYOUT))
    offs_c = gl.arange(0, BLOCK_C, gl.SliceLayout(0, LAYOUT))[None, :]
    rows = gl.where(offs_row == 0, num_tiles + group - 1, group * GROUP + offs_row - 1)
    wanted = (rows < place) | ((offs_row == 0) & (offs_row < group))
    ptrs = words_ptr + (rows[:, None] * BLOCK_C + offs_c)
    mask = wanted[:, None] & (offs_c < BLOCK_C)
    words = gl.load(ptrs, mask=mask, other=PUBLISHED, volatile=True)
    while gl.min(gl.min(words >> 32, 1), 0) == 0:
        words = gl.load(ptrs, mask=mask, other=PUBLISHED, volatile=True)
    return gl.sum(words.to(gl.int32).to(gl.float32, bitcast=True), 0)


@gluon.jit
def _sums_before_runs(runs, REVERSE: gl.constexpr):
    """Sum of the runs before each one [runs, columns], in reverse of those after it.

    Nothing is subtracted: no sum knows what comes later. A thread has whole columns, where the
    choices are known while compiling: only additions are left of them.
    """
    PAIRS: gl.constexpr = gl.BlockedLayout([_RUNS, _RUNS, 1], [1, 1, 32], [1, 1, 4], [2, 1, 0])
    run = gl.arange(0, _RUNS, gl.SliceLayout(1, gl.SliceLayout(2, PAIRS)))[:, None]
    other = gl.arange(0, _RUNS, gl.SliceLayout(0, gl.SliceLayout(2, PAIRS)))[None, :]
    is_added = other > run if REVERSE else other < run
    runs = gl.expand_dims(gl.convert_layout(runs, gl.SliceLayout(0, PAIRS)), 0)
    return gl.sum(gl.where(gl.expand_dims(is_added, 2), runs, 0.0), 1)


@gluon.jit
def _step(tile, index: gl.constexpr, LAYOUT: gl.constexpr):
    """One element of each run [runs, columns] of a tile [runs, elements, columns], in float32."""
    return gl.sum(tile.slice(index, 1, dim=1).load(LAYOUT).to(gl.float32), 1)


@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _prefix_sum_columns_kernel(
    x_ptr, stride_x0, stride_x1, stride_x2, stride_xn, stride_xc,
    words_ptr,  # [outer, blocks of columns, tiles + groups of GROUP, BLOCK_C], zeros at first
    out_ptr, stride_o0, stride_o1, stride_o2, stride_on, stride_oc,
    N, C, size_1, size_2, num_columns, num_tiles,
    EXCLUSIVE: gl.constexpr, REVERSE: gl.constexpr,
    GROUP: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_C: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    RUN: gl.constexpr = BLOCK_N // _RUNS
    COPIED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    WALKED: gl.constexpr = gl.BlockedLayout([1, 1, 8], [4, 1, 8], [4, 1, 1], [2, 1, 0])
    STEP: gl.constexpr = gl.SliceLayout(1, WALKED)
    COLUMN: gl.constexpr = gl.SliceLayout(0, STEP)
    column, place, pid_c, outer, start = tile_of_program(
        C, num_columns, num_tiles, REVERSE, BLOCK_N, BLOCK_C
    )
    x_ptr += outer_offset(outer, size_1, size_2, stride_x0, stride_x1, stride_x2)
    x_ptr += pid_c * BLOCK_C + start * stride_xn
    out_ptr += outer_offset(outer, size_1, size_2, stride_o0, stride_o1, stride_o2)
    out_ptr += pid_c * BLOCK_C + start * stride_on
    words_ptr += column.to(gl.int64) * (num_tiles + gl.cdiv(num_tiles, GROUP)) * BLOCK_C
    num_rows = (N - start).to(gl.int32)

    LAID: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 1, [1, 0])
    flat = gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_C], LAID)
    offs_n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, COPIED))[:, None]
    offs_c = gl.arange(0, BLOCK_C, gl.SliceLayout(0, COPIED))[None, :]
    mask = (offs_n < num_rows) & (offs_c < BLOCK_C)
    ptrs = x_ptr + (offs_n * stride_xn + offs_c)
    async_load(flat, ptrs, mask=mask)
    async_copy.commit_group()
    LAID_IN_RUNS: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 1, [2, 1, 0])
    runs_of_tile = reinterpret(flat, dtype, [_RUNS, RUN, BLOCK_C], LAID_IN_RUNS)
    async_copy.wait_group(0)

    runs = gl.zeros([_RUNS, BLOCK_C], gl.float32, STEP)
    for i in gl.static_range(RUN):
        runs += _step(runs_of_tile, i, WALKED)
    total = gl.sum(runs, 0)
    offs_d = gl.arange(0, BLOCK_C, COLUMN)
    gl.store(words_ptr + place * BLOCK_C + offs_d, published(total))
    carry = gl.convert_layout(_sum_before(words_ptr, place, num_tiles, GROUP, BLOCK_C), COLUMN)
    if place % GROUP == GROUP - 1:
        row = words_ptr + (num_tiles + place // GROUP) * BLOCK_C
        gl.store(row + offs_d, published(carry + total))

    thread_barrier()  # or the tile is kept in registers from the first walk on
    before = _sums_before_runs(runs, REVERSE)
    sums = gl.convert_layout(before, STEP) + gl.expand_dims(carry, 0)
    first = gl.arange(0, _RUNS, gl.SliceLayout(1, STEP))[:, None] * RUN
    offs_d = offs_d[None, :]
    out_ptrs = out_ptr + (first * stride_on + offs_d)
    for i in gl.static_range(RUN):
        out = sums
        sums += _step(runs_of_tile, _nth(i, RUN, REVERSE), WALKED)
        if not EXCLUSIVE:
            out = sums
        mask = (first + _nth(i, RUN, REVERSE) < num_rows) & (offs_d < BLOCK_C)
        gl.store(out_ptrs + _nth(i, RUN, REVERSE) * stride_on, out.to(dtype), mask=mask)


launch_columns = Launcher(_prefix_sum_columns_kernel)
