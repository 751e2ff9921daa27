"""Prefix sums along any dimension of a tensor of any strides.

A sequence is cut into chunks, so that few sequences occupy a whole GPU. The first kernel sums up
each chunk. The second adds the sums of the chunks before its own, in a fixed order, and scans.

Where neighbours in memory belong to different sequences (columns), a chunk is cut into runs, and
each thread walks the runs of its own columns: no thread waits for another. Where they belong to
the same sequence, the threads of a tile scan together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from attn_core import tiling
from attn_core.launch import Launcher
from attn_core.tiles.offsets import load_tile, tile_offsets
from attn_evo._triton import configs, problem
from attn_evo._triton.tiles import sum_rows

_CHUNK = 2048  # elements of a chunk, unless there are too many or SMs are idle
_LONGEST_RUN = 32  # elements of a run, as far as there are not too many
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


@triton.jit
def _outer_offset(index, size_1, size_2, stride_0, stride_1, stride_2):
    """Offset of one index over the three outer dimensions."""
    i_2 = index % size_2
    i_1 = index // size_2 % size_1
    i_0 = index // size_2 // size_1
    return i_0 * stride_0 + i_1 * stride_1 + i_2 * stride_2


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _prefix_sum_chunks_kernel(
    x_ptr, stride_x0, stride_x1, stride_x2, stride_xn, stride_xc,
    sums_ptr,  # [outer, chunks, C], contiguous
    N, C, size_1, size_2, num_chunks, tiles_per_chunk,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):
    # fmt: on
    pid_chunk = tl.program_id(0) % num_chunks
    pid_c = tl.program_id(0) // num_chunks % tl.cdiv(C, BLOCK_C)
    outer = (tl.program_id(0) // num_chunks // tl.cdiv(C, BLOCK_C)).to(tl.int64)

    offs_n = tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C - pid_c * BLOCK_C
    first = pid_chunk.to(tl.int64) * tiles_per_chunk * BLOCK_N
    x_ptr += _outer_offset(outer, size_1, size_2, stride_x0, stride_x1, stride_x2)
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
    pid_chunk = tl.program_id(0) % num_chunks
    pid_c = tl.program_id(0) // num_chunks % tl.cdiv(C, BLOCK_C)
    outer = (tl.program_id(0) // num_chunks // tl.cdiv(C, BLOCK_C)).to(tl.int64)

    offs_n = tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C - pid_c * BLOCK_C
    x_ptr += _outer_offset(outer, size_1, size_2, stride_x0, stride_x1, stride_x2)
    x_ptr += pid_c.to(tl.int64) * BLOCK_C * stride_xc
    out_ptr += _outer_offset(outer, size_1, size_2, stride_o0, stride_o1, stride_o2)
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
        out = tl.cumsum(x, 0, reverse=REVERSE) + carry[None, :]
        if EXCLUSIVE:
            out -= x
        mask = mask_n[:, None] & mask_c[None, :]
        out_ptrs = out_ptr + start * stride_on + out_offs
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)
        carry += tl.sum(x, 0)


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _prefix_sum_runs_kernel(
    x_ptr, stride_x0, stride_x1, stride_x2, stride_xn, stride_xc,
    sums_ptr,  # [outer, chunks, C], contiguous
    run_sums_ptr,  # [outer, chunks, BLOCK_N, C], contiguous
    N, C, size_1, size_2, num_chunks, tiles_per_chunk,
    EVEN_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):
    # fmt: on
    pid_chunk = tl.program_id(0) % num_chunks
    pid_c = tl.program_id(0) // num_chunks % tl.cdiv(C, BLOCK_C)
    outer = (tl.program_id(0) // num_chunks // tl.cdiv(C, BLOCK_C)).to(tl.int64)

    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C - pid_c * BLOCK_C
    offs_run = tl.arange(0, BLOCK_N)
    starts = (pid_chunk.to(tl.int64) * BLOCK_N + offs_run) * tiles_per_chunk
    x_ptr += _outer_offset(outer, size_1, size_2, stride_x0, stride_x1, stride_x2)
    x_ptr += pid_c.to(tl.int64) * BLOCK_C * stride_xc
    x_ptrs = x_ptr + tile_offsets(starts, stride_xn, offs_c, stride_xc)

    acc = tl.zeros([BLOCK_N, BLOCK_C], sums_ptr.dtype.element_ty)
    for step in tl.range(tiles_per_chunk, num_stages=4):
        x = load_tile(x_ptrs + step * stride_xn, starts < N - step, mask_c, True, not EVEN_C)
        acc += x.to(acc.dtype)
    sums_ptr += (outer * num_chunks + pid_chunk) * C + pid_c * BLOCK_C
    tl.store(sums_ptr + offs_c, tl.sum(acc, 0), mask=mask_c)
    run_sums_ptr += (outer * num_chunks + pid_chunk) * BLOCK_N * C + pid_c * BLOCK_C
    tl.store(run_sums_ptr + tile_offsets(offs_run, C, offs_c, 1), acc, mask=mask_c[None, :])


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _prefix_sum_columns_kernel(
    x_ptr, stride_x0, stride_x1, stride_x2, stride_xn, stride_xc,
    sums_ptr,  # [outer, chunks, C], contiguous
    run_sums_ptr,  # [outer, chunks, BLOCK_N, C], contiguous
    out_ptr, stride_o0, stride_o1, stride_o2, stride_on, stride_oc,
    N, C, size_1, size_2, num_chunks, tiles_per_chunk,
    EXCLUSIVE: tl.constexpr, REVERSE: tl.constexpr,
    EVEN_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):
    # fmt: on
    # From the last chunk on: of that, most of x is still in the cache.
    pid_chunk = num_chunks - 1 - tl.program_id(0) % num_chunks
    column_blocks = tl.cdiv(C, BLOCK_C)
    num_outer = tl.num_programs(0) // num_chunks // column_blocks
    pid_c = tl.program_id(0) // num_chunks % column_blocks
    outer = (num_outer - 1 - tl.program_id(0) // num_chunks // column_blocks).to(tl.int64)

    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C - pid_c * BLOCK_C
    offs_run = tl.arange(0, BLOCK_N)
    starts = (pid_chunk.to(tl.int64) * BLOCK_N + offs_run) * tiles_per_chunk
    x_ptr += _outer_offset(outer, size_1, size_2, stride_x0, stride_x1, stride_x2)
    x_ptr += pid_c.to(tl.int64) * BLOCK_C * stride_xc
    x_ptrs = x_ptr + tile_offsets(starts, stride_xn, offs_c, stride_xc)
    out_ptr += _outer_offset(outer, size_1, size_2, stride_o0, stride_o1, stride_o2)
    out_ptr += pid_c.to(tl.int64) * BLOCK_C * stride_oc
    out_ptrs = out_ptr + tile_offsets(starts, stride_on, offs_c, stride_oc)

    # The run before, and so its sum, lies one row up, or down where REVERSE.
    offs_before = offs_run + 1 if REVERSE else offs_run - 1
    mask_before = (offs_before >= 0) & (offs_before < BLOCK_N)
    run_sums_ptr += (outer * num_chunks + pid_chunk) * BLOCK_N * C + pid_c * BLOCK_C
    run_ptrs = run_sums_ptr + tile_offsets(offs_before, C, offs_c, 1)
    acc = tl.cumsum(load_tile(run_ptrs, mask_before, mask_c, True, not EVEN_C), 0, reverse=REVERSE)
    sums_ptr += outer * num_chunks * C + pid_c * BLOCK_C
    lo = pid_chunk + 1 if REVERSE else 0
    hi = num_chunks if REVERSE else pid_chunk
    acc += sum_rows(sums_ptr, lo, hi, C, C - pid_c * BLOCK_C, BLOCK_C)[None, :]

    for index in tl.range(tiles_per_chunk, num_stages=4):
        step = tiles_per_chunk - 1 - index if REVERSE else index
        mask_n = starts < N - step
        x = load_tile(x_ptrs + step * stride_xn, mask_n, mask_c, True, not EVEN_C).to(acc.dtype)
        out = acc if EXCLUSIVE else acc + x
        acc += x
        mask = mask_n[:, None]
        if not EVEN_C:
            mask = mask & mask_c[None, :]
        tl.store(out_ptrs + step * stride_on, out.to(out_ptr.dtype.element_ty), mask=mask)


_launch_chunks = Launcher(_prefix_sum_chunks_kernel)
_launch_scan = Launcher(_prefix_sum_scan_kernel)
_launch_runs = Launcher(_prefix_sum_runs_kernel)
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
    has_runs = layout.columns.stride_x == 1 and layout.columns.size > 1
    config = configs.prefix_sum_tiles(layout.columns.size if has_runs else None)
    N, C = layout.sequence.size, layout.columns.size
    num_columns = tiling.ceil_div(C, config.block_n) * layout.num_outer
    chunk = config.block_m * _LONGEST_RUN if has_runs else _CHUNK
    chunks = problem.chunks(x.device, N, num_columns, config.block_m, chunk, programs_per_sm=4)
    dims = (*layout.outer, layout.sequence, layout.columns)
    x_strides = tuple(dim.stride_x for dim in dims)
    out_strides = tuple(dim.stride_out for dim in dims)
    sizes = (N, C, layout.outer[1].size, layout.outer[2].size, *chunks.per_sequence)
    even = {"EVEN_C": C % config.block_n == 0} if has_runs else {}
    tiles = {**even, "BLOCK_N": config.block_m, "BLOCK_C": config.block_n}
    dtype = torch.promote_types(x.dtype, torch.float32)
    sums = x.new_empty((layout.num_outer, chunks.num_chunks, C), dtype=dtype)
    scratch: tuple[torch.Tensor, ...] = (sums,)
    if has_runs:
        runs = (layout.num_outer, chunks.num_chunks, config.block_m, C)
        scratch = (sums, x.new_empty(runs, dtype=dtype))
    if has_runs or chunks.num_chunks > 1:
        launch = _launch_runs if has_runs else _launch_chunks
        launch(
            num_columns * chunks.num_chunks,
            strides=x_strides,
            args=(x, *x_strides, *scratch, *sizes),
            constexprs=tiles,
            config=config,
        )
    launch = _launch_columns if has_runs else _launch_scan
    launch(
        num_columns * chunks.num_chunks,
        strides=(x_strides, out_strides),
        args=(x, *x_strides, *scratch, out, *out_strides, *sizes),
        constexprs={"EXCLUSIVE": exclusive, "REVERSE": reverse, **tiles},
        config=config,
    )
    return out


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
