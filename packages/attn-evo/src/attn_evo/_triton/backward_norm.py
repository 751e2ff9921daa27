"""dx = LayerNorm'(dout) of each token: df, its part of dcontext, and gradients of W_f and norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attn_core.launch import Launcher
from attn_evo._triton import problem
from attn_evo._triton.backward_work import Work, tiles_of
from attn_evo._triton.tiles import (
    CHUNK,
    CONTEXT,
    DCONTEXT,
    NORM_BIAS,
    NORM_WEIGHT,
    W_F,
    add_column_sums,
    bias_rows,
    chunk_of_program,
    column_sums,
    linear,
    load_tokens,
    load_vector,
    matrix,
    no_column_sums,
    norm_statistics,
    rounded,
    scan,
    scratch_ptrs,
    sigmoid_of_double,
    store_partial,
    table_row,
    triangle,
    twice_gated,
)


# fmt: off
@triton.jit
def _norm_backward(
    dout, x, scale, vectors_ptr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Gradient of what the norm made x of, from that of its output; `scale` is 1 / deviation."""
    dx = dout * load_vector(vectors_ptr, NORM_WEIGHT, BLOCK_D)
    mean = tl.sum(dx, 1)[:, None] * (1.0 / HEAD_DIM)
    along_x = tl.sum(dx * x, 1)[:, None] * (1.0 / HEAD_DIM)
    return scale * (dx - mean - x * along_x)


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_norm_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl, stride_vd,
    mask_ptr, stride_mb, stride_ml,
    sums_ptr, stride_sk, stride_sb, stride_sh, stride_sd,
    length_ptr,
    matrices_ptr, biases_ptr, vectors_ptr, tile_sums_ptr, chunk_sums_ptr,
    contexts_ptr,  # [B * H, tiles, BLOCK_D]: the context before each tile, or of all in the first
    dout_ptr, stride_dob, stride_doh, stride_dol, stride_dod,
    half_ratio_ptr,  # [B * H, L, BLOCK_D], contiguous
    df_ptr,  # [B * H, L, BLOCK_D], contiguous
    dcontext_ptr,  # [B * H, L, BLOCK_D], contiguous: written where IS_CAUSAL
    partial_matrices_ptr,  # [programs, 4, BLOCK_D, BLOCK_D]
    partial_vectors_ptr,  # [programs, 6, BLOCK_D]
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
    IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_STATE: tl.constexpr, PRECISION: tl.constexpr, IS_NVIDIA: tl.constexpr,
    WEIGHTS_STAY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    pid_bh, pid_c, b, h, first, last = chunk_of_program(H, num_tiles, num_chunks, tiles_per_chunk)
    v_ptr += b * stride_vb + h * stride_vh
    mask_ptr += b * stride_mb
    dout_ptr += b * stride_dob + h * stride_doh
    dtype: tl.constexpr = v_ptr.dtype.element_ty
    IS_BFLOAT16: tl.constexpr = dtype == tl.bfloat16

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    w_f = matrix(matrices_ptr, W_F, WEIGHTS_STAY, BLOCK_D)
    b_f = bias_rows(biases_ptr, W_F, WEIGHTS_STAY, BLOCK_D)
    ones = triangle(BLOCK_M, dtype, False)
    dw_f = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    sums = no_column_sums(BLOCK_D)
    for tile in range(first, last):
        start = tile * BLOCK_M
        v = load_tokens(
            v_ptr, stride_vl, stride_vd, mask_ptr, stride_ml, start, L,
            HEAD_DIM, HAS_MASK, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        dout = load_tokens(
            dout_ptr, stride_dol, stride_dod, mask_ptr, stride_ml, start, L,
            HEAD_DIM, False, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        mask = (offs_m < L - start)[:, None]
        ptrs = scratch_ptrs(half_ratio_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
        half_ratio = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        gate = twice_gated(half_ratio * v.to(tl.float32), half_ratio, IS_BFLOAT16, IS_NVIDIA)
        gate = rounded(gate, dtype)
        final = linear(gate, w_f, b_f, PRECISION, BLOCK_D)
        final = sigmoid_of_double(final, IS_BFLOAT16, IS_NVIDIA)
        row = tile if IS_CAUSAL else 0
        row = table_row(contexts_ptr, CONTEXT, num_heads, pid_bh, num_tiles, row, BLOCK_D)
        context = tl.load(row + offs_d)[None, :]
        if IS_CAUSAL:
            context = scan(ones, v, PRECISION) + context
        x = final * context
        mean, scale = norm_statistics(x, v, HEAD_DIM, BLOCK_D)

        sums = add_column_sums(sums, dout, NORM_BIAS, PRECISION)
        normal = (x - mean) * scale
        dout = dout.to(tl.float32)
        sums = add_column_sums(sums, rounded(dout * normal, dtype), NORM_WEIGHT, PRECISION)
        dx = _norm_backward(dout, normal, scale, vectors_ptr, HEAD_DIM, BLOCK_D)
        dcontext = dx * final
        df = rounded(2.0 * dx * x * (1.0 - final), dtype)
        ptrs = scratch_ptrs(df_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
        tl.store(ptrs, df, mask=mask)
        sums = add_column_sums(sums, df, W_F, PRECISION)
        dw_f = tl.dot(tl.trans(df), gate, dw_f, input_precision=PRECISION)
        dcontext = rounded(dcontext, dtype)
        if IS_CAUSAL:
            ptrs = scratch_ptrs(dcontext_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
            tl.store(ptrs, dcontext, mask=mask)
        else:
            sums = add_column_sums(sums, dcontext, CHUNK, PRECISION)

    vectors_row = partial_vectors_ptr + tl.program_id(0).to(tl.int64) * 6 * BLOCK_D + offs_d
    tl.store(vectors_row + W_F * BLOCK_D, column_sums(sums, W_F))
    tl.store(vectors_row + NORM_WEIGHT * BLOCK_D, column_sums(sums, NORM_WEIGHT))
    tl.store(vectors_row + NORM_BIAS * BLOCK_D, column_sums(sums, NORM_BIAS))
    store_partial(partial_matrices_ptr, dw_f, W_F, BLOCK_D)
    if not IS_CAUSAL:
        row = table_row(chunk_sums_ptr, DCONTEXT, num_heads, pid_bh, num_chunks, pid_c, BLOCK_D)
        tl.store(row + offs_d, column_sums(sums, CHUNK))


_launch_norm = Launcher(_attention_backward_norm_kernel)


def backward_norm(work: Work, dout: torch.Tensor) -> None:
    call = work.call
    numerics = call.numerics_of_one_weight
    _launch_norm(
        call.num_programs,
        strides=(call.strides, dout.stride()),
        args=(
            *call.inputs, *work.scratch, dout, *dout.stride(),
            work.half_ratio, work.df, work.dcontext, *work.partials, *call.sizes,
        ),
        constexprs={"IS_CAUSAL": work.causal, **call.flags, **numerics, **call.blocks},
        config=tiles_of("norm" if work.causal else "norm_full", call),
    )  # fmt: skip
