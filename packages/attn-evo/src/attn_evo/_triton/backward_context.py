"""dv_t += sum_{s >= t} dcontext_s."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attn_core.launch import Launcher
from attn_evo._triton import problem
from attn_evo._triton.backward_work import Work, tiles_of
from attn_evo._triton.tiles import (
    CONTEXT,
    DCONTEXT,
    chunk_of_program,
    is_kept,
    load_state,
    rounded,
    scan,
    scratch_ptrs,
    store_state,
    sum_rows,
    table_row,
    triangle,
    values_ptrs,
)


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_context_kernel(
    dcontext_ptr,  # [B * H, L, BLOCK_D], contiguous
    mask_ptr, stride_mb, stride_ml,
    chunk_sums_ptr,
    dsums_after_ptr, stride_sk, stride_sb, stride_sh, stride_sd,
    drows_ptr,  # [B * H, D], contiguous: what to add to each token where not IS_CAUSAL
    dv_ptr,  # [B, H, L, D], contiguous
    dsums_ptr,  # [2, B, H, D], contiguous: written where IS_CAUSAL
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
    IS_CAUSAL: tl.constexpr, HAS_DSUMS: tl.constexpr,
    HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):
    # fmt: on
    pid_bh, pid_c, b, h, first, last = chunk_of_program(H, num_tiles, num_chunks, tiles_per_chunk)
    mask_ptr += b * stride_mb
    dtype: tl.constexpr = dv_ptr.dtype.element_ty

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    if IS_CAUSAL:
        ones_after = triangle(BLOCK_M, dtype, True)
        chunk_sums = table_row(chunk_sums_ptr, DCONTEXT, num_heads, pid_bh, num_chunks, 0, BLOCK_D)
        dcontext_i = sum_rows(chunk_sums, pid_c + 1, num_chunks, BLOCK_D, BLOCK_D, BLOCK_D)
        if HAS_DSUMS:
            dcontext_i += load_state(
                dsums_after_ptr, stride_sk, stride_sb, stride_sh, stride_sd, b, h,
                CONTEXT, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
    else:
        row = drows_ptr + pid_bh.to(tl.int64) * HEAD_DIM
        dcontext_i = tl.load(row + offs_d, mask=offs_d < HEAD_DIM, other=0.0)

    # Triton pipelines loads that no product takes, those of dv, only where a loop says so.
    for step in tl.range(0, last - first, num_stages=NUM_STAGES):
        tile = last - 1 - step
        start = tile * BLOCK_M
        dv_ptrs, mask = values_ptrs(dv_ptr, pid_bh, start, L, HEAD_DIM, BLOCK_M, BLOCK_D)
        dv = tl.load(dv_ptrs, mask=mask, other=0.0).to(tl.float32) + dcontext_i[None, :]
        if IS_CAUSAL:
            ptrs = scratch_ptrs(dcontext_ptr, pid_bh, start, L, BLOCK_M, BLOCK_D)
            dcontext = tl.load(ptrs, mask=(offs_m < L - start)[:, None], other=0.0)
            dv += scan(ones_after, dcontext, PRECISION)
            dcontext_i += tl.sum(dcontext.to(tl.float32), 0)
        if HAS_MASK:
            keep = is_kept(mask_ptr, stride_ml, start, L, BLOCK_M)
            dv = tl.where(keep[:, None], dv, 0.0)
        tl.store(dv_ptrs, rounded(dv, dtype), mask=mask)
    if IS_CAUSAL and pid_c == 0:
        store_state(dsums_ptr, num_heads, pid_bh, dcontext_i, CONTEXT, HEAD_DIM, BLOCK_D)


_launch_context = Launcher(_attention_backward_context_kernel)


def backward_context(work: Work, drows: torch.Tensor) -> None:
    call, dsums_after = work.call, work.dsums_after_args
    config = tiles_of("context", call)
    _launch_context(
        call.num_programs,
        strides=(call.mask[1:], dsums_after[1:]),
        args=(
            work.dcontext, *call.mask, work.scratch.chunk_sums, *dsums_after,
            drows, work.dv, work.dsums, *call.sizes_in(config.block_m),
        ),
        constexprs={
            "IS_CAUSAL": work.causal, "HAS_DSUMS": work.dsums_after is not None,
            "HEAD_DIM": call.flags["HEAD_DIM"], "HAS_MASK": call.flags["HAS_MASK"],
            "PRECISION": call.numerics["PRECISION"], **call.blocks, "BLOCK_M": config.block_m,
            "NUM_STAGES": config.num_stages,
        },
        config=config,
    )  # fmt: skip
