"""Which attention weights dropout keeps: a function of (seed, offset, b, h, i, j) alone.

`attn_core.dropout` defines it and computes the same bits for whole tensors. Forward and backward
kernels may tile differently and still agree.
"""

import triton
import triton.language as tl


@triton.jit
def keep_tile(seed, offset, b, h, offs_m, start_n, threshold, BLOCK_N: tl.constexpr):
    """Return [BLOCK_M, BLOCK_N] bool, True where the weight stays.

    The columns are start_n ... start_n + BLOCK_N - 1, both multiples of 8: one call of Philox
    decides eight neighbours. `threshold` is `attn_core.dropout.threshold(p)`.
    """
    eighths = start_n // 8 + tl.arange(0, BLOCK_N // 8)
    row = offs_m.to(tl.uint32)[:, None]
    eighth = eighths.to(tl.uint32)[None, :]
    zero = row * 0 + eighth * 0
    call = tl.cast(offset, tl.uint32)
    head = tl.cast(b, tl.uint32) * 65536 + tl.cast(h, tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, eighth + zero, row + zero, call + zero, head + zero, 7)
    low = tl.interleave(
        tl.interleave(_low(w0, threshold), _low(w2, threshold)),
        tl.interleave(_low(w1, threshold), _low(w3, threshold)),
    )
    high = tl.interleave(
        tl.interleave(_high(w0, threshold), _high(w2, threshold)),
        tl.interleave(_high(w1, threshold), _high(w3, threshold)),
    )
    return tl.interleave(low, high)  # [BLOCK_M, BLOCK_N]


@triton.jit
def _low(word, threshold):
    return (word & 0xFFFF).to(tl.int32) >= threshold


@triton.jit
def _high(word, threshold):
    return (word >> 16).to(tl.int32) >= threshold
