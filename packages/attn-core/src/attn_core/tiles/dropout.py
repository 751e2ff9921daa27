"""Which attention weights dropout keeps: a function of (seed, offset, b, h, i, j) alone.

`attn_core.dropout` defines it and computes the same bits for whole tensors. Forward and backward
kernels may tile differently and still agree.
"""

import triton
import triton.language as tl

_ROUNDS = tl.constexpr(7)
_MULTIPLIER_0, _MULTIPLIER_2 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
_WEYL_0, _WEYL_1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)


@triton.jit
def _multiply(word, MULTIPLIER: tl.constexpr):
    """High and low word of a product: one instruction of NVIDIA's, which ptxas does not find."""
    factor = tl.full(word.shape, MULTIPLIER, tl.uint32)
    return tl.inline_asm_elementwise(
        "{ .reg .b64 product; mul.wide.u32 product, $2, $3; mov.b64 {$1, $0}, product; }",
        "=r,=r,r,r", [word, factor], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _philox(seed, c0, c1, c2, c3):
    """`tl.philox` of 32-bit words, on NVIDIA GPUs."""
    seed = seed.to(tl.uint64)
    key_0, key_1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        high_0, low_0 = _multiply(c0, _MULTIPLIER_0)
        high_2, low_2 = _multiply(c2, _MULTIPLIER_2)
        c0, c1, c2, c3 = high_2 ^ c1 ^ key_0, low_2, high_0 ^ c3 ^ key_1, low_0
        key_0 += _WEYL_0
        key_1 += _WEYL_1
    return c0, c1, c2, c3


# fmt: off
@triton.jit
def draw_words(
    seed, offset, b, h, offs_m, start_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_NVIDIA: tl.constexpr = False,
):
    # fmt: on
    """Draw the random numbers of a tile, of which `keep_tile` makes its mask.

    The columns are start_n ... start_n + BLOCK_N - 1; start_n is a multiple of BLOCK_N, which is a
    power of 2 from 16 on. Returns [BLOCK_M, BLOCK_N / 2] uint32: each low half is of a column, the
    high half of the next. IS_NVIDIA draws the same numbers in fewer instructions of PTX.
    """
    IS_HALF: tl.constexpr = BLOCK_N == 16  # of the 32 columns that 4 calls are for
    numbers = start_n // 32 * 4 + tl.arange(0, 4 if IS_HALF else BLOCK_N // 8)
    row = offs_m.to(tl.uint32)[:, None]
    number = numbers.to(tl.uint32)[None, :]
    zero = row * 0 + number * 0
    call = tl.cast(offset, tl.uint32)
    head = tl.cast(b, tl.uint32) * 65536 + tl.cast(h, tl.uint32)
    number, row, call, head = number + zero, row + zero, call + zero, head + zero
    if IS_NVIDIA:
        w0, w1, w2, w3 = _philox(seed, number, row, call, head)
    else:
        w0, w1, w2, w3 = tl.philox(seed, number, row, call, head, _ROUNDS)
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
