"""Prefix sums along any dimension of a tensor of any strides.

Where 64 neighbours in memory belong to different sequences (columns), one kernel reads x once: a
program sums up its tile, publishes the sum, and waits for those of the tiles before its own, which
run at the same time. Tiles form groups; the last of a group publishes the sum of all up to there.
All is added in a fixed order, so the bits never change (Merrill and Garland, "Single-pass Parallel
Prefix Scan with Decoupled Look-back", 2016, adds in the order of arrival). A tile is cut into runs,
and each thread walks the runs of its own columns.

Otherwise a sequence is cut into chunks, so that few sequences occupy a whole GPU. The first kernel
sums up each chunk. The second adds the sums of the chunks before its own and scans, the threads of
a tile together. So does float64, whose sums cannot be published in one piece, and an AMD GPU,
whose parts see what others write late.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from attn_core import tiling
from attn_core.launch import Launcher
from attn_core.tiles.offsets import load_tile, tile_offsets
from attn_evo._hopper import support
from attn_evo._triton import configs, problem
from attn_evo._triton.tiles import sum_rows

_CHUNK = 2048  # elements of a chunk, unless there are too many or SMs are idle
_BLOCK_RUN = tl.constexpr(16)  # elements of a run
# Tiles of a group. Groups wait for one another, longest where few sequences have many of them.
_GROUP = 16
_GROUP_OF_FEW = 32
_FEW_COLUMNS = 8
PUBLISHED = tl.constexpr(1 << 32)
_OUTER_DIMS = 3  # dimensions beside that of the sum and that of the columns


class _Dim(NamedTuple):
    size: int
    stride_x: int
    stride_out: int


class _Layout(NamedTuple):
    """A tensor as sequences (along `dim`) times columns times the outer dimensions."""

    sequence: _Dim
    columns: _Dim
    outer: tuple[_Dim, ...]

    @property
    def num_outer(self) -> int:
        return self.outer[0].size * self.outer[1].size * self.outer[2].size

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes as the kernels take them."""
        return self.sequence.size, self.columns.size, self.outer[1].size, self.outer[2].size

    @property
    def strides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Strides of x and of the output as the kernels take them."""
        dims = (*self.outer, self.sequence, self.columns)
        return tuple(dim.stride_x for dim in dims), tuple(dim.stride_out for dim in dims)


@triton.jit
def outer_offset(index, size_1, size_2, stride_0, stride_1, stride_2):
    """Offset of one index over the three outer dimensions."""
    i_2 = index % size_2
    i_1 = index // size_2 % size_1
    i_0 = index // size_2 // size_1
    return i_0 * stride_0 + i_1 * stride_1 + i_2 * stride_2


@triton.jit
def _chunk_of_program(C, num_chunks, BLOCK_C: tl.constexpr):
    """Which chunk, block of columns and index over the outer dimensions a program owns."""
    pid_chunk = tl.program_id(0) % num_chunks
    pid_c = tl.program_id(0) // num_chunks % tl.cdiv(C, BLOCK_C)
    outer = (tl.program_id(0) // num_chunks // tl.cdiv(C, BLOCK_C)).to(tl.int64)
    return pid_chunk, pid_c, outer


@triton.jit
def _joined_sums(before_a, sum_a, before_b, sum_b):
    """Of two neighbours' sums without and with their last element, those of both together."""
    return sum_a + before_b, sum_a + sum_b


@triton.jit
def _sums(x, axis: tl.constexpr, EXCLUSIVE: tl.constexpr, REVERSE: tl.constexpr = False):
    """Prefix sums; where an element is left out it is never added, so that none has to cancel."""
    if EXCLUSIVE:
        before, _ = tl.associative_scan((tl.zeros_like(x), x), axis, _joined_sums, REVERSE)
        return before
    return tl.cumsum(x, axis, REVERSE)


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _prefix_sum_chunks_kernel(
    x_ptr, stride_x0, stride_x1, stride_x2, stride_xn, stride_xc,
    sums_ptr,  # [outer, chunks, C], contiguous
    N, C, size_1, size_2, num_chunks, tiles_per_chunk,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):
    # fmt: on
    pid_chunk, pid_c, outer = _chunk_of_program(C, num_chunks, BLOCK_C)
    offs_n = tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C - pid_c * BLOCK_C
    first = pid_chunk.to(tl.int64) * tiles_per_chunk * BLOCK_N
    x_ptr += outer_offset(outer, size_1, size_2, stride_x0, stride_x1, stride_x2)
    x_ptr += pid_c.to(tl.int64) * BLOCK_C * stride_xc + first * stride_xn
    x_offs = tile_offsets(offs_n, stride_xn, offs_c, stride_xc)

    sums_type = sums_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_C], sums_type)
    for tile in range(tiles_per_chunk):
        mask_n = offs_n < N - first - tile * BLOCK_N
        x = load_tile(x_ptr + x_offs, mask_n, mask_c, True, True)  # [BLOCK_N, BLOCK_C]
        acc += tl.sum(x.to(sums_type), 0)
        x_ptr += BLOCK_N * stride_xn
    sums_ptr += (outer * num_chunks + pid_chunk) * C + pid_c * BLOCK_C
    tl.store(sums_ptr + offs_c, acc, mask=mask_c)


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _prefix_sum_scan_kernel(
    x_ptr, stride_x0, stride_x1, stride_x2, stride_xn, stride_xc,
    sums_ptr,  # [outer, chunks, C], contiguous
    out_ptr, stride_o0, stride_o1, stride_o2, stride_on, stride_oc,
    N, C, size_1, size_2, num_chunks, tiles_per_chunk,
    EXCLUSIVE: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):
    # fmt: on
    pid_chunk, pid_c, outer = _chunk_of_program(C, num_chunks, BLOCK_C)
    offs_n = tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C - pid_c * BLOCK_C
    x_ptr += outer_offset(outer, size_1, size_2, stride_x0, stride_x1, stride_x2)
    x_ptr += pid_c.to(tl.int64) * BLOCK_C * stride_xc
    out_ptr += outer_offset(outer, size_1, size_2, stride_o0, stride_o1, stride_o2)
    out_ptr += pid_c.to(tl.int64) * BLOCK_C * stride_oc
    x_offs = tile_offsets(offs_n, stride_xn, offs_c, stride_xc)
    out_offs = tile_offsets(offs_n, stride_on, offs_c, stride_oc)

    sums_ptr += outer * num_chunks * C + pid_c * BLOCK_C
    lo = pid_chunk + 1 if REVERSE else 0
    hi = num_chunks if REVERSE else pid_chunk
    carry = sum_rows(sums_ptr, lo, hi, C, C - pid_c * BLOCK_C, BLOCK_C)
    for step in range(tiles_per_chunk):
        tile = tiles_per_chunk - 1 - step if REVERSE else step
        start = (pid_chunk.to(tl.int64) * tiles_per_chunk + tile) * BLOCK_N
        mask_n = offs_n < N - start
        x = load_tile(x_ptr + start * stride_xn + x_offs, mask_n, mask_c, True, True)
        x = x.to(sums_ptr.dtype.element_ty)  # [BLOCK_N, BLOCK_C]
        out = _sums(x, 0, EXCLUSIVE, REVERSE) + carry[None, :]
        mask = mask_n[:, None] & mask_c[None, :]
        out_ptrs = out_ptr + start * stride_on + out_offs
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)
        carry += tl.sum(x, 0)


# fmt: off
@triton.jit
def tile_of_program(
    C, num_columns, num_tiles,
    REVERSE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):
    # fmt: on
    """Block of columns, place in the order of the sum, and where its elements are, of a program.

    Programs start in the order of their ids: none waits for one that has not started.
    """
    column = tl.program_id(0) % num_columns
    place = tl.program_id(0) // num_columns
    pid_c = column % (C // BLOCK_C)
    outer = (column // (C // BLOCK_C)).to(tl.int64)
    tile = num_tiles - 1 - place if REVERSE else place
    return column, place, pid_c, outer, tile.to(tl.int64) * BLOCK_N


@triton.jit
def published(x):
    """Numbers in float32, each in a word that tells that it is there."""
    return (x.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF) | PUBLISHED


@triton.jit
def _sum_before(words_ptr, place, num_tiles, GROUP: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum of all tiles before one: those of its group and, in the first row, all groups before."""
    group = place // GROUP
    offs_row = tl.arange(0, GROUP)
    offs_c = tl.arange(0, BLOCK_C)
    rows = tl.where(offs_row == 0, num_tiles + group - 1, group * GROUP + offs_row - 1)
    wanted = (rows < place) | ((offs_row == 0) & (offs_row < group))
    ptrs = words_ptr + tile_offsets(rows, BLOCK_C, offs_c, 1)
    mask = wanted[:, None] & (offs_c < BLOCK_C)[None, :]
    words = tl.load(ptrs, mask=mask, other=PUBLISHED, volatile=True)
    while tl.min(tl.min(words >> 32, 1), 0) == 0:
        words = tl.load(ptrs, mask=mask, other=PUBLISHED, volatile=True)
    return tl.sum(words.to(tl.int32).to(tl.float32, bitcast=True), 0)


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _prefix_sum_columns_kernel(
    x_ptr, stride_x0, stride_x1, stride_x2, stride_xn, stride_xc,
    words_ptr,  # [outer, blocks of columns, tiles + groups of GROUP, BLOCK_C], zeros at first
    out_ptr, stride_o0, stride_o1, stride_o2, stride_on, stride_oc,
    N, C, size_1, size_2, num_columns, num_tiles,
    EXCLUSIVE: tl.constexpr, REVERSE: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):
    # fmt: on
    column, place, pid_c, outer, start = tile_of_program(
        C, num_columns, num_tiles, REVERSE, BLOCK_N, BLOCK_C
    )
    x_ptr += outer_offset(outer, size_1, size_2, stride_x0, stride_x1, stride_x2)
    x_ptr += pid_c.to(tl.int64) * BLOCK_C * stride_xc + start * stride_xn
    out_ptr += outer_offset(outer, size_1, size_2, stride_o0, stride_o1, stride_o2)
    out_ptr += pid_c.to(tl.int64) * BLOCK_C * stride_oc + start * stride_on

    # A tile [runs, BLOCK_RUN, BLOCK_C]: what lies in one thread is summed up without the others.
    # In reverse it is loaded so: Triton's own way turns it around in registers.
    offs_run = tl.arange(0, BLOCK_N // _BLOCK_RUN)[:, None, None]
    offs_step = tl.arange(0, _BLOCK_RUN)[None, :, None]
    if REVERSE:
        offs_run = BLOCK_N // _BLOCK_RUN - 1 - offs_run
        offs_step = _BLOCK_RUN - 1 - offs_step
    offs_c = tl.arange(0, BLOCK_C)
    mask = offs_run * _BLOCK_RUN + offs_step < N - start
    x_offs = offs_step * stride_xn + offs_run * (_BLOCK_RUN * stride_xn)
    x = tl.load(x_ptr + x_offs + offs_c[None, None, :] * stride_xc, mask=mask, other=0.0)
    x = x.to(tl.float32)
    runs = tl.sum(x, 1)
    total = tl.sum(runs, 0)

    words_ptr += column.to(tl.int64) * (num_tiles + tl.cdiv(num_tiles, GROUP)) * BLOCK_C
    tl.store(words_ptr + place * BLOCK_C + offs_c, published(total))
    carry = _sum_before(words_ptr, place, num_tiles, GROUP, BLOCK_C)
    if place % GROUP == GROUP - 1:
        row = words_ptr + (num_tiles + place // GROUP) * BLOCK_C
        tl.store(row + offs_c, published(carry + total))

    carries = _sums(runs, 0, True) + carry[None, :]
    out = _sums(x, 1, EXCLUSIVE) + carries[:, None, :]
    out_offs = offs_step * stride_on + offs_run * (_BLOCK_RUN * stride_on)
    out_ptrs = out_ptr + out_offs + offs_c[None, None, :] * stride_oc
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


_launch_chunks = Launcher(_prefix_sum_chunks_kernel)
_launch_scan = Launcher(_prefix_sum_scan_kernel)
_launch_columns = Launcher(_prefix_sum_columns_kernel)


def prefix_sum(x: torch.Tensor, dim: int, exclusive: bool, reverse: bool) -> torch.Tensor:
    """Prefix sum of x along `dim`, accumulated in float32 at least."""
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    layout = _layout(x, out, dim)
    if len(layout.outer) > _OUTER_DIMS:  # more dimensions than the kernels have strides for
        x = x.contiguous()
        layout = _layout(x, out, dim)
    sum_up = _sum_columns if _has_columns(x, layout) else _sum_chunks
    sum_up(x, out, layout, {"EXCLUSIVE": exclusive, "REVERSE": reverse})
    return out


def _has_columns(x: torch.Tensor, layout: _Layout) -> bool:
    are_neighbours = layout.columns.stride_x == 1
    are_whole = layout.columns.size % configs.PREFIX_SUM_COLUMNS.block_n == 0
    is_amd = problem.device_info(x.device).type == "hip"
    return are_neighbours and are_whole and x.dtype != torch.float64 and not is_amd


def _sum_columns(
    x: torch.Tensor, out: torch.Tensor, layout: _Layout, flags: dict[str, bool]
) -> None:
    C = layout.columns.size
    launch, config = _launch_columns, configs.PREFIX_SUM_COLUMNS
    if support.takes_columns(x, out, layout.strides):
        from attn_evo._hopper import prefix_sum as hopper

        launch, config = hopper.launch_columns, configs.HOPPER_PREFIX_SUM_COLUMNS
    num_columns = C // config.block_n * layout.num_outer
    num_tiles = tiling.ceil_div(layout.sequence.size, config.block_m)
    group = _GROUP if num_columns >= _FEW_COLUMNS else _GROUP_OF_FEW
    rows = num_tiles + tiling.ceil_div(num_tiles, group)
    words = x.new_zeros((num_columns, rows, config.block_n), dtype=torch.int64)
    x_strides, out_strides = layout.strides
    launch(
        num_columns * num_tiles,
        strides=layout.strides,
        args=(x, *x_strides, words, out, *out_strides, *layout.sizes, num_columns, num_tiles),
        constexprs={
            **flags, "GROUP": group, "BLOCK_N": config.block_m, "BLOCK_C": config.block_n,
        },
        config=config,
    )  # fmt: skip


def _sum_chunks(
    x: torch.Tensor, out: torch.Tensor, layout: _Layout, flags: dict[str, bool]
) -> None:
    N, C = layout.sequence.size, layout.columns.size
    config = configs.PREFIX_SUM
    num_columns = tiling.ceil_div(C, config.block_n) * layout.num_outer
    chunks = problem.chunks(x.device, N, num_columns, config.block_m, _CHUNK, programs_per_sm=4)
    dtype = torch.promote_types(x.dtype, torch.float32)
    sums = x.new_empty((layout.num_outer, chunks.num_chunks, C), dtype=dtype)
    x_strides, out_strides = layout.strides
    sizes = (*layout.sizes, *chunks.per_sequence)
    tiles = {"BLOCK_N": config.block_m, "BLOCK_C": config.block_n}
    if chunks.num_chunks > 1:
        _launch_chunks(
            num_columns * chunks.num_chunks,
            strides=x_strides,
            args=(x, *x_strides, sums, *sizes),
            constexprs=tiles,
            config=config,
        )
    _launch_scan(
        num_columns * chunks.num_chunks,
        strides=layout.strides,
        args=(x, *x_strides, sums, out, *out_strides, *sizes),
        constexprs={**flags, **tiles},
        config=config,
    )


def prefix_sum_backward(
    dout: torch.Tensor, dim: int, exclusive: bool, reverse: bool
) -> torch.Tensor:
    """Gradient of x: what an element is added to lies on the other side of it."""
    return prefix_sum(dout, dim, exclusive, not reverse)


def _layout(x: torch.Tensor, out: torch.Tensor, dim: int) -> _Layout:
    """Merge the dimensions beside `dim` as far as both strides allow; the last are the columns."""
    dims = [_Dim(*sizes) for sizes in zip(x.shape, x.stride(), out.stride(), strict=True)]
    others: list[_Dim] = []
    for index, inner in enumerate(dims):
        if index == dim or inner.size == 1:
            continue
        outer_size = others.pop().size if others and _follows(others[-1], inner) else 1
        others.append(inner._replace(size=outer_size * inner.size))
    columns = others.pop() if others else _Dim(1, 0, 0)
    padding = (_Dim(1, 0, 0),) * (_OUTER_DIMS - len(others))
    return _Layout(dims[dim], columns, (*padding, *others))


def _follows(outer: _Dim, inner: _Dim) -> bool:
    return (outer.stride_x, outer.stride_out) == (
        inner.size * inner.stride_x,
        inner.size * inner.stride_out,
    )
