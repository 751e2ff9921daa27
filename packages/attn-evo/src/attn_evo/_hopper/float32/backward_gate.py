"""The gate backward in float32 on Hopper, as `_hopper.backward_gate` in 16 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from attn_core.launch import Launcher
from attn_core.tiles.gluon_names import thread_barrier
from attn_evo._hopper.float32.tiles import (
    BLOCK_M,
    PARTS,
    RESULT,
    WARPS,
    D,
    add_input_gradient,
    add_weight_gradient,
    allocate_tiles,
    begin_linear,
    column_sums,
    load_rows,
    load_weight,
    no_column_sums,
    rows_of_threads,
    store_partial,
    store_parts,
    store_row,
    store_rows,
)
from attn_evo._hopper.tiles import magnitude, opaque_zero, times_sign, with_sign
from attn_evo._triton import problem
from attn_evo._triton.tiles import DSTAT, W_F, W_L, W_Q, chunk_of_program, sigmoid_of_double

if TYPE_CHECKING:
    from attn_evo._triton.backward_work import Work


@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_gate_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl,
    matrices_ptr, vectors_ptr, chunk_sums_ptr,
    half_ratio_ptr,  # [B * H, L, D], contiguous
    inverse_ptr,  # [B * H, L, D], contiguous
    df_ptr,  # [B * H, L, D], contiguous; dstat takes its place
    dv_ptr,  # [B, H, L, D], contiguous
    partial_matrices_ptr,  # [programs, 4, D, D]
    partial_vectors_ptr,  # [programs, 6, D]
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
):  # fmt: skip
    pid_bh, pid_c, b, h, first, last = chunk_of_program(H, num_tiles, num_chunks, tiles_per_chunk)
    v_ptr += b * stride_vb + h * stride_vh + (first * BLOCK_M).to(gl.int64) * stride_vl
    head = pid_bh.to(gl.int64)
    rows = L - first * BLOCK_M
    token = (head * L + first * BLOCK_M) * D
    v = load_rows(v_ptr, stride_vl, rows)
    df = load_rows(df_ptr + token, D, rows)
    half_ratio = load_rows(half_ratio_ptr + token, D, rows)
    inverse = load_rows(inverse_ptr + token, D, rows)

    weights = allocate_tiles(3 * PARTS)
    v_parts = allocate_tiles(PARTS)
    dq_parts = allocate_tiles(PARTS)  # before that, df
    dlocal_parts = allocate_tiles(PARTS)
    for which in gl.static_range(3):  # W_Q, W_L and W_F
        load_weight(weights, which * PARTS, matrices_ptr, which)
    dw_q = gl.zeros([D, D], gl.float32, RESULT)
    dw_l = gl.zeros([D, D], gl.float32, RESULT)
    db_q = no_column_sums()
    db_l = no_column_sums()
    db_f = no_column_sums()
    dstat_sums = no_column_sums()
    for tile in range(first, last):
        rows = L - tile * BLOCK_M
        zero = opaque_zero(rows)
        token = (head * L + tile * BLOCK_M + zero) * D
        store_parts(dq_parts, zero, df)
        store_parts(v_parts, zero, v)
        dgate = gl.zeros([BLOCK_M, D], gl.float32, RESULT)
        dgate = add_input_gradient(dq_parts, zero, weights, W_F * PARTS + zero, dgate)
        local = begin_linear(v_parts, zero, weights, W_L * PARTS + zero, vectors_ptr + W_L * D)
        db_f += rows_of_threads(df)
        s = sigmoid_of_double(half_ratio, False)
        silu = 2.0 * half_ratio * s
        dgate, local = warpgroup_mma_wait(0, deps=(dgate, local))
        dv = dgate * silu
        dq = 2.0 * dgate * v * (s + silu * (1.0 - s)) * magnitude(inverse)
        ddenominator = -dq * half_ratio
        dstat = with_sign(ddenominator, inverse)
        dlocal = times_sign(ddenominator, local)
        thread_barrier()  # the other warpgroup's products have read what is overwritten now
        store_parts(dq_parts, zero, dq)
        store_parts(dlocal_parts, zero, dlocal)
        dv = add_input_gradient(dq_parts, zero, weights, W_Q * PARTS + zero, dv)
        dv = add_input_gradient(dlocal_parts, zero, weights, W_L * PARTS + zero, dv)
        dw_q = add_weight_gradient(dq_parts, zero, v_parts, zero, dw_q)
        dw_l = add_weight_gradient(dlocal_parts, zero, v_parts, zero, dw_l)
        store_rows(df_ptr + token, dstat, rows)
        db_q += rows_of_threads(dq)
        db_l += rows_of_threads(dlocal)
        dstat_sums += rows_of_threads(dstat)
        num_rows = gl.where(tile + 1 < last, rows - BLOCK_M, 0)
        v_ptr += BLOCK_M * stride_vl
        next_token = token + BLOCK_M * D
        v = load_rows(v_ptr, stride_vl, num_rows)
        df = load_rows(df_ptr + next_token, D, num_rows)
        half_ratio = load_rows(half_ratio_ptr + next_token, D, num_rows)
        inverse = load_rows(inverse_ptr + next_token, D, num_rows)
        dv, dw_q, dw_l = warpgroup_mma_wait(0, deps=(dv, dw_q, dw_l))
        thread_barrier()
        store_rows(dv_ptr + token, dv, rows)

    row = (DSTAT * num_heads.to(gl.int64) + pid_bh) * num_chunks + pid_c
    store_row(chunk_sums_ptr + row * D, column_sums(dstat_sums))
    row = partial_vectors_ptr + gl.program_id(0).to(gl.int64) * 6 * D
    store_row(row + W_Q * D, column_sums(db_q))
    store_row(row + W_L * D, column_sums(db_l))
    store_row(row + W_F * D, column_sums(db_f))
    store_partial(partial_matrices_ptr, dw_q, W_Q)
    store_partial(partial_matrices_ptr, dw_l, W_L)


_launch_gate = Launcher(_attention_backward_gate_kernel)


def backward_gate(work: Work) -> None:
    """As `_hopper.backward_gate`'s, and the gradient of b_f."""
    call, scratch = work.call, work.scratch
    v = call.v[0]
    _launch_gate(
        call.num_programs,
        strides=v.stride(),
        args=(
            v, *v.stride()[:3], scratch.matrices, scratch.vectors, scratch.chunk_sums,
            work.half_ratio, work.inverse, work.df, work.dv, *work.partials, *call.sizes,
        ),
        constexprs={},
        config=call.config._replace(num_warps=WARPS, num_stages=1),
    )  # fmt: skip
