"""Shares of the gradients of W_q and W_l, and of W_f, where no kernel before has them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attn_core.launch import Launcher
from attn_evo._triton import problem
from attn_evo._triton.backward_work import Work, tiles_of
from attn_evo._triton.tiles import (
    W_F,
    W_L,
    W_Q,
    add_column_sums,
    chunk_of_program,
    column_sums,
    load_tokens,
    no_column_sums,
    rounded,
    scratch_ptrs,
    store_partial,
    twice_gated,
)


@triton.jit
def _load(ptr, mask, pid_bh, start, L, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load a tile of scratch memory, with zeros past the last token."""
    ptrs = scratch_ptrs(ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _gate(half_ratio, v, IS_NVIDIA: tl.constexpr):
    """silu(2 half_ratio) v, rounded as the forward pass rounds it."""
    gate = half_ratio * v.to(tl.float32)
    gate = twice_gated(gate, half_ratio, v.dtype == tl.bfloat16, IS_NVIDIA)
    return rounded(gate, v.dtype)


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_products_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl, stride_vd,
    mask_ptr, stride_mb, stride_ml,
    dq_ptr,  # [B * H, L, BLOCK_D], contiguous
    dlocal_ptr,  # [B * H, L, BLOCK_D], contiguous
    partial_matrices_ptr,  # [programs, 4, BLOCK_D, BLOCK_D]
    partial_vectors_ptr,  # [programs, 6, BLOCK_D]
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
    HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    pid_bh, pid_c, b, h, first, last = chunk_of_program(H, num_tiles, num_chunks, tiles_per_chunk)
    v_ptr += b * stride_vb + h * stride_vh
    mask_ptr += b * stride_mb

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    dw_q = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    dw_l = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    sums = no_column_sums(BLOCK_D)
    for tile in range(first, last):
        start = tile * BLOCK_M
        v = load_tokens(
            v_ptr, stride_vl, stride_vd, mask_ptr, stride_ml, start, L,
            HEAD_DIM, HAS_MASK, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        mask = (offs_m < L - start)[:, None]
        dq = _load(dq_ptr, mask, pid_bh, start, L, BLOCK_M, BLOCK_D)
        dlocal = _load(dlocal_ptr, mask, pid_bh, start, L, BLOCK_M, BLOCK_D)
        sums = add_column_sums(sums, dq, W_Q, PRECISION)
        sums = add_column_sums(sums, dlocal, W_L, PRECISION)
        dw_q = tl.dot(tl.trans(dq), v, dw_q, input_precision=PRECISION)
        dw_l = tl.dot(tl.trans(dlocal), v, dw_l, input_precision=PRECISION)

    vectors_row = partial_vectors_ptr + tl.program_id(0).to(tl.int64) * 6 * BLOCK_D + offs_d
    tl.store(vectors_row + W_Q * BLOCK_D, column_sums(sums, W_Q))
    tl.store(vectors_row + W_L * BLOCK_D, column_sums(sums, W_L))
    store_partial(partial_matrices_ptr, dw_q, W_Q, BLOCK_D)
    store_partial(partial_matrices_ptr, dw_l, W_L, BLOCK_D)


_launch_products = Launcher(_attention_backward_products_kernel)


def backward_products(work: Work) -> None:
    call = work.call
    config = tiles_of("products", call)
    _launch_products(
        call.num_programs,
        strides=call.strides,
        args=(
            *call.v, *call.mask, work.half_ratio, work.dlocal, *work.partials,
            *call.sizes_in(config.block_m),
        ),
        constexprs={
            "HEAD_DIM": call.flags["HEAD_DIM"], "HAS_MASK": call.flags["HAS_MASK"],
            "PRECISION": call.numerics["PRECISION"], **call.blocks, "BLOCK_M": config.block_m,
        },
        config=config,
    )  # fmt: skip


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_final_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl, stride_vd,
    half_ratio_ptr,  # [B * H, L, BLOCK_D], contiguous
    df_ptr,  # [B * H, L, BLOCK_D], contiguous
    partial_matrices_ptr,  # [programs, 4, BLOCK_D, BLOCK_D]
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, IS_NVIDIA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    pid_bh, pid_c, b, h, first, last = chunk_of_program(H, num_tiles, num_chunks, tiles_per_chunk)
    v_ptr += b * stride_vb + h * stride_vh

    offs_m = tl.arange(0, BLOCK_M)
    dw_f = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    for tile in range(first, last):
        start = tile * BLOCK_M
        v = load_tokens(
            v_ptr, stride_vl, stride_vd, v_ptr, 0, start, L,
            HEAD_DIM, False, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        mask = (offs_m < L - start)[:, None]
        half_ratio = _load(half_ratio_ptr, mask, pid_bh, start, L, BLOCK_M, BLOCK_D).to(tl.float32)
        df = _load(df_ptr, mask, pid_bh, start, L, BLOCK_M, BLOCK_D)
        gate = _gate(half_ratio, v, IS_NVIDIA)
        dw_f = tl.dot(tl.trans(df), gate, dw_f, input_precision=PRECISION)
    store_partial(partial_matrices_ptr, dw_f, W_F, BLOCK_D)


_launch_final = Launcher(_attention_backward_final_kernel)


def backward_final(work: Work) -> None:
    call = work.call
    config = tiles_of("products", call)
    _launch_final(
        call.num_programs,
        strides=call.strides,
        args=(
            *call.v, work.half_ratio, work.df, work.partial_matrices,
            *call.sizes_in(config.block_m),
        ),
        constexprs={
            "HEAD_DIM": call.flags["HEAD_DIM"], "PRECISION": call.numerics["PRECISION"],
            "IS_NVIDIA": call.numerics["IS_NVIDIA"], **call.blocks, "BLOCK_M": config.block_m,
        },
        config=config,
    )  # fmt: skip


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_final_query_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl, stride_vd,
    half_ratio_ptr,  # [B * H, L, BLOCK_D], contiguous
    df_ptr,  # [B * H, L, BLOCK_D], contiguous
    dq_ptr,  # [B * H, L, BLOCK_D], contiguous
    partial_matrices_ptr,  # [programs, 4, BLOCK_D, BLOCK_D]
    partial_vectors_ptr,  # [programs, 6, BLOCK_D]
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, IS_NVIDIA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):
    # fmt: on
    pid_bh, pid_c, b, h, first, last = chunk_of_program(H, num_tiles, num_chunks, tiles_per_chunk)
    v_ptr += b * stride_vb + h * stride_vh

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    dw_f = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    dw_q = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    sums = no_column_sums(BLOCK_D)
    # Triton pipelines loads that no product takes, those of n, only where a loop says so.
    for tile in tl.range(first, last, num_stages=NUM_STAGES):
        start = tile * BLOCK_M
        v = load_tokens(
            v_ptr, stride_vl, stride_vd, v_ptr, 0, start, L,
            HEAD_DIM, False, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        mask = (offs_m < L - start)[:, None]
        half_ratio = _load(half_ratio_ptr, mask, pid_bh, start, L, BLOCK_M, BLOCK_D).to(tl.float32)
        df = _load(df_ptr, mask, pid_bh, start, L, BLOCK_M, BLOCK_D)
        dq = _load(dq_ptr, mask, pid_bh, start, L, BLOCK_M, BLOCK_D)
        sums = add_column_sums(sums, dq, W_Q, PRECISION)
        dw_q = tl.dot(tl.trans(dq), v, dw_q, input_precision=PRECISION)
        gate = _gate(half_ratio, v, IS_NVIDIA)
        dw_f = tl.dot(tl.trans(df), gate, dw_f, input_precision=PRECISION)

    vectors_row = partial_vectors_ptr + tl.program_id(0).to(tl.int64) * 6 * BLOCK_D + offs_d
    tl.store(vectors_row + W_Q * BLOCK_D, column_sums(sums, W_Q))
    store_partial(partial_matrices_ptr, dw_q, W_Q, BLOCK_D)
    store_partial(partial_matrices_ptr, dw_f, W_F, BLOCK_D)


_launch_final_query = Launcher(_attention_backward_final_query_kernel)


def backward_final_and_query(work: Work, dq: torch.Tensor) -> None:
    call = work.call
    config = tiles_of("final_query", call)
    _launch_final_query(
        call.num_programs,
        strides=call.strides,
        args=(
            *call.v, work.half_ratio, work.df, dq, *work.partials,
            *call.sizes_in(config.block_m),
        ),
        constexprs={
            "HEAD_DIM": call.flags["HEAD_DIM"], "PRECISION": call.numerics["PRECISION"],
            "IS_NVIDIA": call.numerics["IS_NVIDIA"], **call.blocks, "BLOCK_M": config.block_m,
            "NUM_STAGES": config.num_stages,
        },
        config=config,
    )  # fmt: skip
