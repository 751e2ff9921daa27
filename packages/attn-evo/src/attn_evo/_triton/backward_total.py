"""Without `causal`: context and stat of all tokens, and what comes of their gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attn_core.launch import Launcher
from attn_evo._triton import configs, problem
from attn_evo._triton.backward_work import Work
from attn_evo._triton.tiles import (
    CONTEXT,
    DCONTEXT,
    DSTAT,
    STAT,
    W_G,
    gate_of_mean,
    load_state,
    matrix,
    store_partial,
    store_state,
    sum_rows,
    table_row,
    total_context,
    total_sums,
)


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_rows_kernel(
    matrices_ptr, vectors_ptr,
    chunk_sums_ptr,  # the first row of each head's stat is written
    contexts_ptr,  # [B * H, tiles, BLOCK_D]: the first row of each head is written
    L, num_heads, num_tiles, num_chunks,
    HEAD_DIM: tl.constexpr, IS_NVIDIA: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Context and stat of all tokens, which they share without `causal`."""
    pid_bh = tl.program_id(0)
    offs_d = tl.arange(0, BLOCK_D)
    context, stat = total_sums(
        chunk_sums_ptr, chunk_sums_ptr, 0, 0, 0, 0, chunk_sums_ptr,
        matrices_ptr, vectors_ptr, 0, 0, pid_bh, L, num_heads, num_chunks,
        HEAD_DIM, False, IS_NVIDIA, BLOCK_D,
    )  # fmt: skip
    row = table_row(contexts_ptr, CONTEXT, num_heads, pid_bh, num_tiles, 0, BLOCK_D)
    tl.store(row + offs_d, context)
    row = table_row(chunk_sums_ptr, STAT, num_heads, pid_bh, num_chunks, 0, BLOCK_D)
    tl.store(row + offs_d, stat)


_launch_rows = Launcher(_attention_backward_rows_kernel)


def backward_rows(work: Work) -> None:
    call, scratch = work.call, work.scratch
    L, _, num_heads, num_tiles, num_chunks, _ = call.sizes
    _launch_rows(
        num_heads,
        strides=(),
        args=(
            scratch.matrices, scratch.vectors, scratch.chunk_sums, scratch.contexts,
            L, num_heads, num_tiles, num_chunks,
        ),
        constexprs={
            "HEAD_DIM": call.flags["HEAD_DIM"], "IS_NVIDIA": call.numerics["IS_NVIDIA"],
            "BLOCK_D": call.blocks["BLOCK_D"],
        },
        config=configs.SUMS,
    )  # fmt: skip


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_total_kernel(
    sums_ptr, stride_sk, stride_sb, stride_sh, stride_sd,
    length_ptr,
    matrices_ptr, vectors_ptr, chunk_sums_ptr,
    dsums_after_ptr, stride_ak, stride_ab, stride_ah, stride_ad,
    drows_ptr,  # [B * H, D], contiguous: what each token gets of the sums' gradients
    dsums_ptr,  # [2, B, H, D], contiguous
    partial_matrices_ptr,  # [programs, 4, BLOCK_D, BLOCK_D]: one program a head here
    partial_vectors_ptr,  # [programs, 6, BLOCK_D]
    L, H, num_heads, num_chunks,
    HAS_DSUMS: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_STATE: tl.constexpr,
    IS_NVIDIA: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    pid_bh = tl.program_id(0)
    b = (pid_bh // H).to(tl.int64)
    h = (pid_bh % H).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    own, context, inverse_count = total_context(
        chunk_sums_ptr, sums_ptr, stride_sk, stride_sb, stride_sh, stride_sd, length_ptr,
        b, h, pid_bh, L, num_heads, num_chunks, HEAD_DIM, HAS_STATE, BLOCK_D,
    )  # fmt: skip
    mean = context * inverse_count
    w_g = matrix(matrices_ptr, W_G, True, BLOCK_D).to(tl.float32)
    gate = gate_of_mean(mean, w_g, vectors_ptr, IS_NVIDIA, BLOCK_D)

    row = table_row(chunk_sums_ptr, DSTAT, num_heads, pid_bh, num_chunks, 0, BLOCK_D)
    dstat = sum_rows(row, 0, num_chunks, BLOCK_D, BLOCK_D, BLOCK_D)
    row = table_row(chunk_sums_ptr, DCONTEXT, num_heads, pid_bh, num_chunks, 0, BLOCK_D)
    dcontext = sum_rows(row, 0, num_chunks, BLOCK_D, BLOCK_D, BLOCK_D)
    if HAS_DSUMS:
        dstat += load_state(
            dsums_after_ptr, stride_ak, stride_ab, stride_ah, stride_ad, b, h,
            STAT, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        dcontext += load_state(
            dsums_after_ptr, stride_ak, stride_ab, stride_ah, stride_ad, b, h,
            CONTEXT, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    dlogit = 2.0 * dstat * own * gate * (1.0 - gate)
    dcontext += tl.sum(w_g * dlogit[:, None], 0) * inverse_count
    drow = dcontext + gate * dstat
    tl.store(drows_ptr + pid_bh * HEAD_DIM + offs_d, drow, mask=offs_d < HEAD_DIM)
    store_state(dsums_ptr, num_heads, pid_bh, dstat, STAT, HEAD_DIM, BLOCK_D)
    store_state(dsums_ptr, num_heads, pid_bh, dcontext, CONTEXT, HEAD_DIM, BLOCK_D)
    store_partial(partial_matrices_ptr, dlogit[:, None] * mean[None, :], W_G, BLOCK_D)
    tl.store(partial_vectors_ptr + (pid_bh * 6 + W_G) * BLOCK_D + offs_d, dlogit)


_launch_total = Launcher(_attention_backward_total_kernel)


def backward_total(work: Work) -> torch.Tensor:
    """What "stat" does, for the one stat and context of a head; returns what each token gets."""
    call, scratch, dsums_after = work.call, work.scratch, work.dsums_after_args
    L, H, num_heads, _, num_chunks, _ = call.sizes
    drows = torch.empty_like(work.dsums[0])
    _launch_total(
        num_heads,
        strides=(call.sums[1:], dsums_after[1:]),
        args=(
            *call.sums, call.length, scratch.matrices, scratch.vectors, scratch.chunk_sums,
            *dsums_after, drows, work.dsums, *work.partials, L, H, num_heads, num_chunks,
        ),
        constexprs={
            "HAS_DSUMS": work.dsums_after is not None, "HEAD_DIM": call.flags["HEAD_DIM"],
            "HAS_STATE": call.flags["HAS_STATE"], "IS_NVIDIA": call.numerics["IS_NVIDIA"],
            "BLOCK_D": call.blocks["BLOCK_D"],
        },
        config=configs.SUMS,
    )  # fmt: skip
    return drows
