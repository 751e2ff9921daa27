"""Suffix sums of dstat in float32 on Hopper, as `_hopper.backward_stat` in 16 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from attn_core.launch import Launcher
from attn_core.tiles.gluon_names import thread_barrier
from attn_evo._hopper.float32.tiles import (
    BLOCK_M,
    COLUMN,
    PARTS,
    RESULT,
    ROW,
    WARPS,
    D,
    add_input_gradient,
    add_weight_gradient,
    allocate_tiles,
    begin_linear,
    column_sums,
    load_row,
    load_rows,
    load_weight,
    no_column_sums,
    rows_of_threads,
    start_scan,
    store_partial,
    store_parts,
    store_row,
    store_rows,
    store_triangle,
    sum_rows,
)
from attn_evo._hopper.tiles import opaque_zero
from attn_evo._triton import problem
from attn_evo._triton.tiles import DCONTEXT, DSTAT, W_G, chunk_of_program, sigmoid_of_double

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
):  # fmt: skip
    pid_bh, pid_c, b, h, first, last = chunk_of_program(H, num_tiles, num_chunks, tiles_per_chunk)
    head = pid_bh.to(gl.int64)
    heads = num_heads.to(gl.int64)
    v_ptr += b * stride_vb + h * stride_vh + ((last - 1) * BLOCK_M).to(gl.int64) * stride_vl
    contexts_ptr += (head * num_tiles + last - 1) * D
    rows = L - (last - 1) * BLOCK_M
    v = load_rows(v_ptr, stride_vl, rows)
    dstat = load_rows(dstat_ptr + (head * L + (last - 1) * BLOCK_M) * D, D, rows)

    weight = allocate_tiles(PARTS)
    v_parts = allocate_tiles(PARTS)
    mean_parts = allocate_tiles(PARTS)
    work = allocate_tiles(PARTS)  # dstat, later dlogit
    triangles = allocate_tiles(2)
    load_weight(weight, 0, matrices_ptr, W_G)
    store_triangle(triangles.index(0), False)
    store_triangle(triangles.index(1), True)
    after_ptr = chunk_sums_ptr + ((DSTAT * heads + pid_bh) * num_chunks + pid_c + 1) * D
    dstat_after = sum_rows(after_ptr, num_chunks - pid_c - 1, ROW)
    dw_g = gl.zeros([D, D], gl.float32, RESULT)
    db_g = no_column_sums()
    dcontext_sums = no_column_sums()
    for step in range(last - first):
        start = (last - 1 - step) * BLOCK_M
        rows = L - start
        zero = opaque_zero(rows)
        token = (head * L + start + zero) * D
        store_parts(v_parts, zero, v)
        store_parts(work, zero, dstat)
        context = start_scan(triangles.index(zero), v_parts, zero)
        dgated = start_scan(triangles.index(1 + zero), work, zero)
        dcontext = load_rows(dcontext_ptr + token, D, rows)
        dv = load_rows(dv_ptr + token, D, rows)
        dstat_sum = gl.sum(dstat, 0)
        context = warpgroup_mma_wait(3, deps=(context,))
        context += gl.expand_dims(load_row(contexts_ptr, ROW), 0)
        count = (start + 1 + gl.arange(0, BLOCK_M, COLUMN)).to(gl.float32)
        inverse_count = gl.expand_dims(1.0 / count, 1)
        store_parts(mean_parts, zero, context * inverse_count)
        logit = begin_linear(mean_parts, zero, weight, zero, vectors_ptr + W_G * D)
        is_next = start > first * BLOCK_M
        back = gl.where(is_next, BLOCK_M, 0)
        contexts_ptr -= gl.where(is_next, D, 0)
        v_ptr -= back * stride_vl
        next_v = load_rows(v_ptr, stride_vl, back)
        dstat = load_rows(dstat_ptr + token - back * D, D, back)
        logit, dgated = warpgroup_mma_wait(0, deps=(logit, dgated))
        dgated += gl.expand_dims(dstat_after, 0)
        dstat_after += dstat_sum
        gate = sigmoid_of_double(logit, False)
        dgated *= gate
        dlogit = 2.0 * dgated * v * (1.0 - gate)
        v = next_v
        thread_barrier()  # the other warpgroup's products have read what is overwritten now
        store_parts(work, zero, dlogit)
        dmean = gl.zeros([BLOCK_M, D], gl.float32, RESULT)
        dmean = add_input_gradient(work, zero, weight, zero, dmean)
        dw_g = add_weight_gradient(work, zero, mean_parts, zero, dw_g)
        db_g += rows_of_threads(dlogit)
        store_rows(dv_ptr + token, dv + dgated, rows)
        dmean, dw_g = warpgroup_mma_wait(0, deps=(dmean, dw_g))
        dcontext += dmean * inverse_count
        dcontext_sums += rows_of_threads(dcontext)
        store_rows(dcontext_ptr + token, dcontext, rows)
        thread_barrier()

    row = (DCONTEXT * heads + pid_bh) * num_chunks + pid_c
    store_row(chunk_sums_ptr + row * D, column_sums(dcontext_sums))
    row = partial_vectors_ptr + gl.program_id(0).to(gl.int64) * 6 * D
    store_row(row + W_G * D, column_sums(db_g))
    if pid_c == 0:
        store_row(dsums_ptr + (heads + pid_bh) * D, dstat_after)
    store_partial(partial_matrices_ptr, dw_g, W_G)


_launch_stat = Launcher(_attention_backward_stat_kernel)


def backward_stat(work: Work) -> None:
    """As `_hopper.backward_stat`'s."""
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
        constexprs={},
        config=call.config._replace(num_warps=WARPS, num_stages=1),
    )  # fmt: skip
