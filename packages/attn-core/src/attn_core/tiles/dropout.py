"""Which attention weights dropout keeps: a function of (seed, offset, b, h, i, j) alone.

`attn_core.dropout` defines it and computes the same bits for whole tensors. Forward and backward
kernels may tile differently and still agree.
"""

import triton
import triton.language as tl


@triton.jit
def draw_words(seed, offset, b, h, offs_m, start_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Draw the random numbers of a tile, of which `keep_tile` makes its mask.

    The columns are start_n ... start_n + BLOCK_N - 1; start_n is a multiple of BLOCK_N, which is a
    power of 2 from 16 on. Returns [BLOCK_M, BLOCK_N / 2] uint32: each low half is of a column, the
    high half of the next.
    """
    IS_HALF: tl.constexpr = BLOCK_N == 16  # of the 32 columns that 4 calls are for
    numbers = start_n // 32 * 4 + tl.arange(0, 4 if IS_HALF else BLOCK_N // 8)
    row = offs_m.to(tl.uint32)[:, None]
    number = numbers.to(tl.uint32)[None, :]
    zero = row * 0 + number * 0
    call = tl.cast(offset, tl.uint32)
    head = tl.cast(b, tl.uint32) * 65536 + tl.cast(h, tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, number + zero, row + zero, call + zero, head + zero, 7)
    if IS_HALF:
        is_second = start_n % 32 != 0
        words = tl.join(tl.where(is_second, w2, w0), tl.where(is_second, w3, w1))
        words = tl.permute(words, [0, 2, 1])
    else:
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        words = tl.permute(tl.reshape(words, [BLOCK_M, BLOCK_N // 32, 4, 4]), [0, 1, 3, 2])
    return tl.reshape(words, [BLOCK_M, BLOCK_N // 2])


@triton.jit
def keep_tile(
    words, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr = False,
):  # fmt: skip
    """Return [BLOCK_M, BLOCK_N] bool, or transposed, True where the weight stays.

    `words` are those of `draw_words`, `threshold` is `attn_core.dropout.threshold(p)`.
    """
    limit = tl.cast(threshold, tl.uint32) << 16
    if TRANSPOSED:
        # Words are repeated before they are compared: half as many travel to the threads that hold
        # the weights, and as whole registers.
        words = tl.broadcast_to(tl.trans(words)[:, None, :], [BLOCK_N // 2, 2, BLOCK_M])
        low_half_up = (16 - 16 * (tl.arange(0, BLOCK_N) % 2)).to(tl.uint32)
        keep = (tl.reshape(words, [BLOCK_N, BLOCK_M]) << low_half_up[:, None]) >= limit
    else:
        keep = tl.join((words << 16) >= limit, words >= limit)
        keep = tl.reshape(keep, [BLOCK_M, BLOCK_N])
    return keep


@triton.jit
def drop(weights, keep, threshold):
    """Return the weights that stay, and 0 for the others."""
    # A zero that the compiler does not know: before a product in 16 bits, it would select among
    # numbers of 16 bits, which takes it two instructions more.
    zero = tl.cast(tl.minimum(threshold, 0), tl.float32)
    return tl.where(keep, weights, zero)
