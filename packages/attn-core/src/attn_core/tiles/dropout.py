"""Which attention weights dropout keeps: a function of (seed, offset, b, h, i, j) alone.

`attn_core.dropout` defines it and computes the same bits for whole tensors. Forward and backward
kernels may tile differently and still agree.
"""

import triton
import triton.language as tl


@triton.jit
def keep_tile(
    seed, offset, b, h, offs_m, start_n, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr = False,
):  # fmt: skip
    """Return [BLOCK_M, BLOCK_N] bool, or transposed, True where the weight stays.

    The columns are start_n ... start_n + BLOCK_N - 1, both multiples of 8: one call of Philox
    decides eight neighbours. `threshold` is `attn_core.dropout.threshold(p)`.
    """
    words = _word_tile(seed, offset, b, h, offs_m, start_n, BLOCK_N)
    low_half_up = (16 - 16 * (tl.arange(0, BLOCK_N) % 2)).to(tl.uint32)
    # Words are repeated before they are compared: half as many travel to the threads that hold the
    # weights, and as whole registers.
    if TRANSPOSED:
        words = tl.broadcast_to(tl.trans(words)[:, None, :], [BLOCK_N // 2, 2, BLOCK_M])
        halves = tl.reshape(words, [BLOCK_N, BLOCK_M]) << low_half_up[:, None]
    else:
        words = tl.broadcast_to(words[:, :, None], [BLOCK_M, BLOCK_N // 2, 2])
        halves = tl.reshape(words, [BLOCK_M, BLOCK_N]) << low_half_up[None, :]
    return halves >= (tl.cast(threshold, tl.uint32) << 16)


@triton.jit
def _word_tile(seed, offset, b, h, offs_m, start_n, BLOCK_N: tl.constexpr):
    """Return [BLOCK_M, BLOCK_N / 2] uint32: each low half is of a column, the high of the next."""
    eighths = start_n // 8 + tl.arange(0, BLOCK_N // 8)
    row = offs_m.to(tl.uint32)[:, None]
    eighth = eighths.to(tl.uint32)[None, :]
    zero = row * 0 + eighth * 0
    call = tl.cast(offset, tl.uint32)
    head = tl.cast(b, tl.uint32) * 65536 + tl.cast(h, tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, eighth + zero, row + zero, call + zero, head + zero, 7)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
