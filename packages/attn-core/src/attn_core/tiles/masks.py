"""Windows of visible keys, aligned at the bottom right: query i is at position i + N - M.

A query at position p sees the keys p - left ... p + right. Each side is compiled in only where it
exists; causal attention is HAS_RIGHT with right = 0.
"""

import triton
import triton.language as tl


@triton.jit
def is_visible(position, offs_n, N, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Whether a query at `position` sees key `offs_n`; the arguments broadcast."""
    visible = offs_n < N
    if HAS_LEFT:
        visible = visible & (offs_n >= position - left)
    if HAS_RIGHT:
        visible = visible & (offs_n <= position + right)
    return visible


@triton.jit
def key_blocks(
    start_m, M, N, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Cut the keys that the queries from `start_m` on may see into three runs of blocks.

    Returns lo, full_lo, full_hi, hi. In [full_lo, full_hi) every query of the block sees every
    key; [lo, full_lo) and [full_hi, hi) need the mask. All but hi are multiples of BLOCK_N.
    """
    first = start_m + N - M
    last = tl.minimum(start_m + BLOCK_M, M) - 1 + N - M
    lo = 0
    full_lo = 0
    hi = N
    full_hi = N // BLOCK_N * BLOCK_N
    if HAS_RIGHT:
        hi = tl.minimum(hi, tl.maximum(last + right + 1, 0))
        full_hi = tl.minimum(full_hi, tl.maximum(first + right + 1, 0) // BLOCK_N * BLOCK_N)
    if HAS_LEFT:
        lo = tl.maximum(first - left, 0) // BLOCK_N * BLOCK_N
        full_lo = (tl.maximum(last - left, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        full_lo = tl.maximum(lo, tl.minimum(full_lo, (hi + BLOCK_N - 1) // BLOCK_N * BLOCK_N))
        full_hi = tl.maximum(full_hi, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def query_blocks(
    start_n, M, N, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Cut the queries that may see the keys from `start_n` on into three runs of blocks.

    Returns lo, full_lo, full_hi, hi as `key_blocks` does, in queries and multiples of BLOCK_M.
    Keys past the end count as visible: what they gather is never stored.
    """
    first = start_n - (N - M)
    last = start_n + BLOCK_N - 1 - (N - M)
    lo = 0
    full_lo = 0
    hi = M
    full_hi = M // BLOCK_M * BLOCK_M
    if HAS_RIGHT:
        lo = tl.maximum(first - right, 0) // BLOCK_M * BLOCK_M
        full_lo = (tl.maximum(last - right, 0) + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    if HAS_LEFT:
        hi = tl.minimum(hi, tl.maximum(last + left + 1, 0))
        full_hi = tl.minimum(full_hi, tl.maximum(first + left + 1, 0) // BLOCK_M * BLOCK_M)
    full_lo = tl.maximum(lo, tl.minimum(full_lo, (hi + BLOCK_M - 1) // BLOCK_M * BLOCK_M))
    full_hi = tl.maximum(full_hi, full_lo)
    return lo, full_lo, full_hi, hi
