"""dgate of each token: dn, dq, dlocal, dstat and their part of dv."""

from __future__ import annotations

import triton
import triton.language as tl

from attn_core.launch import Launcher
from attn_evo._triton import problem
from attn_evo._triton.backward_work import Work, tiles_of
from attn_evo._triton.tiles import (
    CHUNK,
    DSTAT,
    W_F,
    W_L,
    W_Q,
    add_column_sums,
    bias_rows,
    chunk_of_program,
    column_sums,
    linear,
    load_matrix,
    load_tokens,
    matrix,
    no_column_sums,
    product,
    rounded,
    scratch_ptrs,
    sigmoid_of_double,
    table_row,
    values_ptrs,
)


@triton.jit
def _times_sign(x, y):
    """Give x the sign of y times its own; 0 where y is 0."""
    return tl.where(y > 0, x, tl.where(y < 0, -x, 0.0))


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_gate_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl, stride_vd,
    mask_ptr, stride_mb, stride_ml,
    matrices_ptr, biases_ptr, chunk_sums_ptr,
    half_ratio_ptr,  # [B * H, L, BLOCK_D], contiguous; dq takes its place
    inverse_ptr,  # [B * H, L, BLOCK_D], contiguous
    dlocal_ptr,  # [B * H, L, BLOCK_D], contiguous
    df_ptr,  # [B * H, L, BLOCK_D], contiguous; where IS_CAUSAL, dstat takes its place
    dv_ptr,  # [B, H, L, D], contiguous
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
    IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr, IS_NVIDIA: tl.constexpr,
    WEIGHTS_STAY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    pid_bh, pid_c, b, h, first, last = chunk_of_program(H, num_tiles, num_chunks, tiles_per_chunk)
    v_ptr += b * stride_vb + h * stride_vh
    mask_ptr += b * stride_mb
    dtype: tl.constexpr = v_ptr.dtype.element_ty

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    w_q = matrix(matrices_ptr, W_Q, WEIGHTS_STAY, BLOCK_D)
    w_l = matrix(matrices_ptr, W_L, WEIGHTS_STAY, BLOCK_D)
    b_l = bias_rows(biases_ptr, W_L, WEIGHTS_STAY, BLOCK_D)
    w_f = matrix(matrices_ptr, W_F, WEIGHTS_STAY, BLOCK_D)
    sums = no_column_sums(BLOCK_D)
    for tile in range(first, last):
        start = tile * BLOCK_M
        v = load_tokens(
            v_ptr, stride_vl, stride_vd, mask_ptr, stride_ml, start, L,
            HEAD_DIM, HAS_MASK, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        mask = (offs_m < L - start)[:, None]
        df_ptrs = scratch_ptrs(df_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
        df = tl.load(df_ptrs, mask=mask, other=0.0)
        dq_ptrs = scratch_ptrs(half_ratio_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
        half_ratio = tl.load(dq_ptrs, mask=mask, other=0.0).to(tl.float32)
        ptrs = scratch_ptrs(inverse_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
        inverse = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)

        dgate = product(df, load_matrix(w_f, BLOCK_D), PRECISION)
        s = sigmoid_of_double(half_ratio, dtype == tl.bfloat16, IS_NVIDIA)
        silu = 2.0 * half_ratio * s
        dq = 2.0 * dgate * v.to(tl.float32) * (s + silu * (1.0 - s)) * tl.abs(inverse)
        ddenominator = -dq * half_ratio
        dv = dgate * silu
        dq = rounded(dq, dtype)
        dv = tl.dot(dq, load_matrix(w_q, BLOCK_D), dv, input_precision=PRECISION)
        tl.store(dq_ptrs, dq, mask=mask)

        dstat = rounded(tl.where(inverse < 0, -ddenominator, ddenominator), dtype)
        sums = add_column_sums(sums, dstat, CHUNK, PRECISION)
        if IS_CAUSAL:
            tl.store(df_ptrs, dstat, mask=mask)
        local = linear(v, w_l, b_l, PRECISION, BLOCK_D)
        dlocal = rounded(_times_sign(ddenominator, local), dtype)
        dv = tl.dot(dlocal, load_matrix(w_l, BLOCK_D), dv, input_precision=PRECISION)
        ptrs = scratch_ptrs(dlocal_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
        tl.store(ptrs, dlocal, mask=mask)
        dv_ptrs, inside = values_ptrs(dv_ptr, pid_bh, start, L, HEAD_DIM, BLOCK_M, BLOCK_D)
        tl.store(dv_ptrs, rounded(dv, dtype), mask=inside)

    row = table_row(chunk_sums_ptr, DSTAT, num_heads, pid_bh, num_chunks, pid_c, BLOCK_D)
    tl.store(row + offs_d, column_sums(sums, CHUNK))


_launch_gate = Launcher(_attention_backward_gate_kernel)


def backward_gate(work: Work) -> None:
    call, scratch = work.call, work.scratch
    config = tiles_of("gate", call)
    _launch_gate(
        call.num_programs,
        strides=call.strides,
        args=(
            *call.v, *call.mask, scratch.matrices, scratch.biases, scratch.chunk_sums,
            work.half_ratio, work.inverse, work.dlocal, work.df, work.dv,
            *call.sizes_in(config.block_m),
        ),
        constexprs={
            "IS_CAUSAL": work.causal, "HEAD_DIM": call.flags["HEAD_DIM"],
            "HAS_MASK": call.flags["HAS_MASK"], **call.numerics,
            **call.blocks, "BLOCK_M": config.block_m,
        },
        config=config,
    )  # fmt: skip
