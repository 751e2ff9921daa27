"""Which attention weights dropout keeps: a function of (seed, offset, b, h, i, j) alone.

`attn_core.dropout` defines it and computes the same bits for whole tensors. Forward and backward
kernels may tile differently and still agree.
"""

import triton
import triton.language as tl


@triton.jit
def keep_tile(seed, offset, b, h, offs_m, start_n, threshold, BLOCK_N: tl.constexpr):
    """Return [BLOCK_M, BLOCK_N] bool, True where the weight stays.

    The columns are start_n ... start_n + BLOCK_N - 1, both multiples of 4: one round of Philox
    decides four neighbours. `threshold` is `attn_core.dropout.threshold(p)`.
    """
    quads = start_n // 4 + tl.arange(0, BLOCK_N // 4)
    row = offs_m.to(tl.uint32)[:, None]
    quad = quads.to(tl.uint32)[None, :]
    zero = row * 0 + quad * 0
    call = tl.cast(offset, tl.uint32)
    head = tl.cast(b, tl.uint32) * 65536 + tl.cast(h, tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, quad + zero, row + zero, call + zero, head + zero)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # [BLOCK_M, BLOCK_N]
    return (words >> 1).to(tl.int32) >= threshold
