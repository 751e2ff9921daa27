"""Device functions that the forward and the backward kernels share."""

import triton
import triton.language as tl

from attn_core.tiles.offsets import load_tile, tile_offsets


@triton.jit
def load_shut(shut_ptr, row_step, offs_n, ROWS: tl.constexpr, HAS_MASK: tl.constexpr):
    """Load what the masks of one or two rows add to scores, each [BLOCK_N]: 0 or -inf."""
    shut0 = 0.0
    shut1 = 0.0
    if HAS_MASK and ROWS == 1:
        shut0 = tl.load(shut_ptr + offs_n)
    if HAS_MASK and ROWS == 2:
        # Both in one load: two loads of BLOCK_N numbers would be made by every thread.
        both = tl.load(shut_ptr + offs_n[:, None] + row_step * tl.arange(0, 2)[None, :])
        shut0, shut1 = tl.split(both)
    return shut0, shut1


@triton.jit
def place_of_program(num_tiles, num_groups, R, ROWS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where a program starts: batch and head, query, row, and from there to the second row or 0."""
    pid = tl.program_id(0)
    start_m = pid % num_tiles * BLOCK_M
    pid_bh = pid // num_tiles // num_groups
    r0 = pid // num_tiles % num_groups * ROWS
    next_row = tl.minimum(r0 + ROWS, R) - 1 - r0
    return pid_bh, start_m, r0.to(tl.int64), next_row.to(tl.int64)


@triton.jit
def key_bounds(range0_ptr, range1_ptr, N, HAS_MASK: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return lo and hi of the keys that either of two rows sees; lo is a multiple of BLOCK_N."""
    lo = 0
    hi = N
    if HAS_MASK:
        lo = tl.minimum(tl.load(range0_ptr), tl.load(range1_ptr)) // BLOCK_N * BLOCK_N
        hi = tl.maximum(tl.load(range0_ptr + 1), tl.load(range1_ptr + 1))
    return lo, hi


@triton.jit
def sum_of_unseeing(
    do_ptr, stride_dom, stride_dod, lse_ptr, M,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum dO over the queries of a row that see no key, [BLOCK_D]; 1 if there are any, or 0.

    Such a query's output is the mean of the row's values.
    """
    CHUNK: tl.constexpr = 1024
    offs_d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    has_unseeing = 0
    for start in range(0, M, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        lowest = tl.min(tl.load(lse_ptr + offs, mask=offs < M, other=0.0), 0)
        if lowest == -float("inf"):
            has_unseeing = 1
            for start_m in range(start, tl.minimum(start + CHUNK, M), BLOCK_M):
                offs_m = start_m + tl.arange(0, BLOCK_M)
                lse = tl.load(lse_ptr + offs_m, mask=offs_m < M, other=0.0)
                do_ptrs = do_ptr + tile_offsets(offs_m.to(tl.int64), stride_dom, offs_d, stride_dod)
                do = load_tile(do_ptrs, lse == -float("inf"), offs_d < HEAD_DIM, True, True)
                total += tl.sum(do.to(tl.float32), 0)
    return total, has_unseeing
