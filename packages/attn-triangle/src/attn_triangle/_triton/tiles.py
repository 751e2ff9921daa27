"""Device functions that the forward and the backward kernels share."""

import triton
import triton.language as tl


@triton.jit
def load_bias(bias_ptrs, mask_col, MASKED: tl.constexpr):
    """Load a tile of the bias; columns outside the mask are -inf, which hides their scores."""
    if MASKED:
        bias = tl.load(bias_ptrs, mask=mask_col[None, :], other=-float("inf"))
    else:
        bias = tl.load(bias_ptrs)
    return bias.to(tl.float32)


@triton.jit
def load_shut(shut_ptrs, mask, MASKED: tl.constexpr, HAS_MASK: tl.constexpr):
    """Load what a row's mask adds to scores: 0, or -inf where a key is masked out."""
    shut = 0.0
    if HAS_MASK:
        shut = tl.load(shut_ptrs, mask=mask, other=0.0) if MASKED else tl.load(shut_ptrs)
    return shut


@triton.jit
def key_bounds(range0_ptr, range1_ptr, N, HAS_MASK: tl.constexpr, BLOCK_N: tl.constexpr):
    """Cut the keys that either of two rows sees into full blocks and the ragged last block.

    Returns lo, full_hi, tail, hi: the blocks in [lo, full_hi) are full, [tail, hi) is the last one
    or empty.
    """
    tail = N // BLOCK_N * BLOCK_N
    if not HAS_MASK:
        return 0, tail, tail, N
    first = tl.minimum(tl.load(range0_ptr), tl.load(range1_ptr))
    hi = tl.maximum(tl.load(range0_ptr + 1), tl.load(range1_ptr + 1))
    lo = first // BLOCK_N * BLOCK_N
    full_hi = tl.minimum((hi + BLOCK_N - 1) // BLOCK_N * BLOCK_N, tail)
    return lo, full_hi, tail, hi
