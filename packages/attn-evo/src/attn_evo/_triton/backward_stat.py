"""dgated_t = sum_{s >= t} dstat_s, and through the gate of v on to the mean."""

from __future__ import annotations

import triton
import triton.language as tl

from attn_core.launch import Launcher
from attn_evo._triton import problem
from attn_evo._triton.backward_work import Work, tiles_of
from attn_evo._triton.tiles import (
    CHUNK,
    CONTEXT,
    DCONTEXT,
    DSTAT,
    STAT,
    W_G,
    add_column_sums,
    bias_rows,
    chunk_of_program,
    column_sums,
    inverse_counts,
    linear,
    load_matrix,
    load_state,
    load_tokens,
    matrix,
    no_column_sums,
    product,
    rounded,
    scan,
    scratch_ptrs,
    sigmoid_of_double,
    store_partial,
    store_state,
    sum_rows,
    table_row,
    triangle,
    values_ptrs,
)


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_stat_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl, stride_vd,
    mask_ptr, stride_mb, stride_ml,
    length_ptr,
    matrices_ptr, biases_ptr, chunk_sums_ptr,
    contexts_ptr,  # [B * H, tiles, BLOCK_D]: the context before each tile
    dsums_after_ptr, stride_sk, stride_sb, stride_sh, stride_sd,
    dstat_ptr,  # [B * H, L, BLOCK_D], contiguous
    dcontext_ptr,  # [B * H, L, BLOCK_D], contiguous
    dv_ptr,  # [B, H, L, D], contiguous
    dsums_ptr,  # [2, B, H, D], contiguous
    partial_matrices_ptr,  # [programs, 4, BLOCK_D, BLOCK_D]
    partial_vectors_ptr,  # [programs, 6, BLOCK_D]
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
    HAS_DSUMS: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_STATE: tl.constexpr, PRECISION: tl.constexpr, IS_NVIDIA: tl.constexpr,
    WEIGHTS_STAY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    pid_bh, pid_c, b, h, first, last = chunk_of_program(H, num_tiles, num_chunks, tiles_per_chunk)
    v_ptr += b * stride_vb + h * stride_vh
    mask_ptr += b * stride_mb
    dtype: tl.constexpr = v_ptr.dtype.element_ty

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    w_g = matrix(matrices_ptr, W_G, WEIGHTS_STAY, BLOCK_D)
    b_g = bias_rows(biases_ptr, W_G, WEIGHTS_STAY, BLOCK_D)
    ones = triangle(BLOCK_M, dtype, False)
    ones_after = triangle(BLOCK_M, dtype, True)
    chunk_sums = table_row(chunk_sums_ptr, DSTAT, num_heads, pid_bh, num_chunks, 0, BLOCK_D)
    dstat_i = sum_rows(chunk_sums, pid_c + 1, num_chunks, BLOCK_D, BLOCK_D, BLOCK_D)
    if HAS_DSUMS:
        dstat_i += load_state(
            dsums_after_ptr, stride_sk, stride_sb, stride_sh, stride_sd, b, h,
            STAT, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    dw_g = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    sums = no_column_sums(BLOCK_D)
    for step in range(last - first):
        tile = last - 1 - step
        start = tile * BLOCK_M
        v = load_tokens(
            v_ptr, stride_vl, stride_vd, mask_ptr, stride_ml, start, L,
            HEAD_DIM, HAS_MASK, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        row = table_row(contexts_ptr, CONTEXT, num_heads, pid_bh, num_tiles, tile, BLOCK_D)
        inverse_count = inverse_counts(length_ptr, start, HAS_STATE, BLOCK_M)
        context = scan(ones, v, PRECISION) + tl.load(row + offs_d)[None, :]
        mean = (context * inverse_count).to(dtype)  # [BLOCK_M, BLOCK_D]
        gate = linear(mean, w_g, b_g, PRECISION, BLOCK_D)
        gate = sigmoid_of_double(gate, dtype == tl.bfloat16, IS_NVIDIA)

        mask = (offs_m < L - start)[:, None]
        ptrs = scratch_ptrs(dstat_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
        dstat = tl.load(ptrs, mask=mask, other=0.0)
        dgated = (scan(ones_after, dstat, PRECISION) + dstat_i[None, :]) * gate
        dstat_i += tl.sum(dstat.to(tl.float32), 0)
        dv_ptrs, inside = values_ptrs(dv_ptr, pid_bh, start, L, HEAD_DIM, BLOCK_M, BLOCK_D)
        dv = tl.load(dv_ptrs, mask=inside, other=0.0).to(tl.float32) + dgated
        tl.store(dv_ptrs, rounded(dv, dtype), mask=inside)

        dlogit = rounded(2.0 * dgated * v.to(tl.float32) * (1.0 - gate), dtype)
        sums = add_column_sums(sums, dlogit, W_G, PRECISION)
        dw_g = tl.dot(tl.trans(dlogit), mean, dw_g, input_precision=PRECISION)
        dmean = product(dlogit, load_matrix(w_g, BLOCK_D), PRECISION)
        ptrs = scratch_ptrs(dcontext_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
        dcontext = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32) + dmean * inverse_count
        dcontext = rounded(dcontext, dtype)
        tl.store(ptrs, dcontext, mask=mask)
        sums = add_column_sums(sums, dcontext, CHUNK, PRECISION)

    row = table_row(chunk_sums_ptr, DCONTEXT, num_heads, pid_bh, num_chunks, pid_c, BLOCK_D)
    tl.store(row + offs_d, column_sums(sums, CHUNK))
    vectors_row = partial_vectors_ptr + tl.program_id(0).to(tl.int64) * 6 * BLOCK_D + offs_d
    tl.store(vectors_row + W_G * BLOCK_D, column_sums(sums, W_G))
    store_partial(partial_matrices_ptr, dw_g, W_G, BLOCK_D)
    if pid_c == 0:
        store_state(dsums_ptr, num_heads, pid_bh, dstat_i, STAT, HEAD_DIM, BLOCK_D)


_launch_stat = Launcher(_attention_backward_stat_kernel)


def backward_stat(work: Work) -> None:
    call, scratch, dsums_after = work.call, work.scratch, work.dsums_after_args
    _launch_stat(
        call.num_programs,
        strides=(call.strides, dsums_after[1:]),
        args=(
            *call.v, *call.mask, call.length,
            scratch.matrices, scratch.biases, scratch.chunk_sums, scratch.contexts,
            *dsums_after, work.df, work.dcontext, work.dv, work.dsums, *work.partials, *call.sizes,
        ),
        constexprs={
            "HAS_DSUMS": work.dsums_after is not None,
            **call.flags, **call.numerics_of_one_weight, **call.blocks,
        },
        config=tiles_of("stat", call),
    )  # fmt: skip
