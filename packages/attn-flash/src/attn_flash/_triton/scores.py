"""What may be done to a tile of scores between the product and the softmax.

A tile is [BLOCK_M, BLOCK_N], or transposed; whatever is added broadcasts to it.
"""

import triton
import triton.language as tl

from attn_core.tiles.scores import tanh
from attn_core.tiles.softmax import LN_2, LOG2_E, finish_softmax

# How SOFTCAP computes tanh: 0 for no softcapping at all.
EXACT_SOFTCAP = tl.constexpr(1)
FAST_SOFTCAP = tl.constexpr(2)  # NVIDIA's instruction, good to 11 bits: for 16-bit tensors
# How HAS_DROPOUT draws its random numbers: 0 for none, 1 as any device can.
FAST_DROPOUT = tl.constexpr(2)  # with NVIDIA's instructions
# What HAS_BIAS and HAS_KEY_MASK are: 0 for neither.
ADDED = tl.constexpr(1)
BOOLEAN = tl.constexpr(2)
# Beyond what masks of the lowest finite numbers leave, and far from what units of log2 overflow at.
_LOW = tl.constexpr(-1.0e38)
# 1.5 * 2**23: what it is added to leaves its nearest integer in the lowest bits.
_ROUNDING = tl.constexpr(12582912.0)
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def load_term(ptrs, mask, MASKED: tl.constexpr, SHIFTS: tl.constexpr = False):
    """Load what is added to the scores, as float32, or whether a key is seen, as boolean.

    SHIFTS makes float32 of bfloat16 by shifts: as LLVM does it, one in two takes an instruction
    more. Where other instructions are not what a kernel waits for, that is no gain.
    """
    if MASKED:
        values = tl.load(ptrs, mask=mask, other=0)
    else:
        values = tl.load(ptrs)
    if SHIFTS and values.dtype == tl.bfloat16:
        bits = values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        values = bits.to(tl.float32, bitcast=True)
    else:
        values = as_term(values)
    return values


@triton.jit
def as_term(values):
    """Make float32 of what is added to the scores, and booleans of bytes."""
    if values.dtype == tl.uint8:
        values = values != 0
    elif values.dtype != tl.int1:
        values = values.to(tl.float32)
    return values


@triton.jit
def _tanh(x, SOFTCAP: tl.constexpr):
    if SOFTCAP == FAST_SOFTCAP:
        share = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        share = tanh(x)
    return share


# fmt: off
@triton.jit
def modify_scores(
    products, distance, bias, key_mask, scale_log2, softcap_log2, slope_log2,
    SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
):
    # fmt: on
    """Return scores, the factor that makes log2 of them, and the damping of their derivatives.

    The unit is that of the last thing that must be done: each conversion costs an instruction.
    With something ADDED it is natural, in which the lowest finite numbers stay finite.
    """
    scores = products
    factor = scale_log2
    damping = 1.0
    if SOFTCAP > 0:
        scores = _tanh(products * (scale_log2 / softcap_log2), SOFTCAP)
        factor = softcap_log2
        damping = 1.0 - scores * scores
    if HAS_ALIBI:
        scores -= (slope_log2 / factor) * tl.abs(distance)
    if (HAS_BIAS == ADDED) | (HAS_KEY_MASK == ADDED):
        scores *= factor * LN_2
        factor = LOG2_E
    if HAS_BIAS == ADDED:
        scores += bias
    if HAS_KEY_MASK == ADDED:
        scores += key_mask
    return scores, factor, damping


@triton.jit
def first_products(bias, scale_log2, HAS_BIAS: tl.constexpr):
    """What the products of queries and keys start from, so that their scores contain the bias."""
    if HAS_BIAS == BOOLEAN:
        hidden = tl.where(scale_log2 < 0, float("inf"), -float("inf"))
        first = tl.where(bias, 0.0, hidden)
    else:
        first = bias * (LOG2_E / scale_log2)
    return first


@triton.jit
def is_shown(visible, bias, key_mask, HAS_BIAS: tl.constexpr, HAS_KEY_MASK: tl.constexpr):
    """Which keys are seen, given those within the window."""
    if HAS_BIAS == BOOLEAN:
        visible = visible & bias
    if HAS_KEY_MASK == BOOLEAN:
        visible = visible & key_mask
    return visible


@triton.jit
def online_softmax_shown(m_i, l_i, scores, factor, visible):
    """`attn_core.tiles.softmax.online_softmax_masked` with a factor above 0, which saves a step."""
    scores = tl.where(visible, scores, -float("inf"))
    m_new = tl.maximum(m_i, tl.max(scores, 1) * factor)
    pivot = tl.where(m_new == -float("inf"), 0.0, m_new)
    p = tl.math.exp2(scores * factor - pivot[:, None])
    alpha = tl.math.exp2(m_i - pivot)
    return m_new, l_i * alpha + tl.sum(p, 1), alpha, p


@triton.jit
def exp2_bounded(x, factor):
    """Return 2**(x factor), of a tile's numbers between 2**-126 and 2**127, to 1 part in 13,000.

    With as many tanh, the units for special functions would take longer than the products of narrow
    heads do. So every other number is split into the nearest integer and a rest, of which a
    polynomial makes a power.
    """
    pairs = tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2])
    even, odd = tl.split(pairs)
    shifted = odd * factor + _ROUNDING
    rest = odd * factor - (shifted - _ROUNDING)
    power = 0.05517166 * rest + 0.24261112
    power = power * rest + 0.69326099
    power = power * rest + 0.99992807
    whole = (shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000  # the bits of 2**integer
    odd = power * whole.to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(tl.math.exp2(even * factor), odd), x.shape)


@triton.jit
def add_columns(sums, p, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add a tile to sums of its rows, [BLOCK_M, 4], within the threads that hold both."""
    return sums + tl.sum(tl.sum(tl.reshape(p, [BLOCK_M, BLOCK_N // 8, 4, 2]), 3), 1)


@triton.jit
def first_maximum_added(m_i):
    """Convert what m_i starts from to natural units, and make it a pivot that is finite."""
    return tl.maximum(m_i * LN_2, _LOWEST)


@triton.jit
def online_softmax_added(m_i, l_i, scores, visible):
    """`attn_core.tiles.softmax.online_softmax_masked` in natural units, m_i being finite."""
    scores = tl.where(visible, scores, -float("inf"))
    pivot = tl.maximum(m_i, tl.max(scores, 1))
    # A row of nothing but the lowest numbers is their mean: there log2 would overflow, and any
    # rate tells the pivot from what is less.
    rate = tl.where(pivot < _LOW, 0.5, LOG2_E)
    p = tl.math.exp2(scores * rate[:, None] - (pivot * rate)[:, None])
    alpha = tl.math.exp2((m_i - pivot) * rate)
    return pivot, l_i * alpha + tl.sum(p, 1), alpha, p


@triton.jit
def finish_softmax_added(m_i, l_i, acc):
    """`attn_core.tiles.softmax.finish_softmax` with m_i in natural units."""
    out, log_sum = finish_softmax(tl.zeros_like(m_i), l_i, acc)
    return out, m_i + log_sum


@triton.jit
def order_heads(pid_bh, num_heads, H, stride_bb, HAS_BIAS: tl.constexpr):
    """Let the batch run fastest where all of it shares a bias, which is then read but once."""
    if HAS_BIAS > 0:
        num_b = num_heads // H
        batch_first = pid_bh % num_b * H + pid_bh // num_b
        pid_bh = tl.where(stride_bb == 0, batch_first, pid_bh)
    return pid_bh


@triton.jit
def load_slope(slopes_ptr, stride_sb, stride_sh, b, h, HAS_ALIBI: tl.constexpr):
    """Return the slope of one head, in units of log2."""
    slope_log2 = 0.0
    if HAS_ALIBI:
        slope_log2 = tl.load(slopes_ptr + b * stride_sb + h * stride_sh) * LOG2_E
    return slope_log2


@triton.jit
def load_state(rng_ptr, HAS_DROPOUT: tl.constexpr):
    """Return seed and offset of dropout."""
    seed = 0
    offset = 0
    if HAS_DROPOUT:
        seed = tl.load(rng_ptr)
        offset = tl.load(rng_ptr + 1)
    return seed, offset
