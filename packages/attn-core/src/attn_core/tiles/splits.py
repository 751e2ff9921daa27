"""Keys cut into parts that programs of their own attend to."""

import triton
import triton.language as tl


@triton.jit
def keys_of_split(lo, full_lo, full_hi, hi, split, num_splits, BLOCK_N: tl.constexpr):
    """Cut the runs of `masks.key_blocks` down to one of `num_splits` equal parts."""
    key_tiles = tl.cdiv(tl.maximum(hi - lo, 0), BLOCK_N)
    size = tl.cdiv(key_tiles, num_splits) * BLOCK_N
    lo += split * size
    hi = tl.maximum(tl.minimum(hi, lo + size), lo)
    full_lo = tl.minimum(tl.maximum(full_lo, lo), hi)
    full_hi = tl.minimum(tl.maximum(full_hi, full_lo), hi)
    return lo, full_lo, full_hi, hi
