"""What may be done to a tile of scores between the product and the softmax, and to its weights.

A tile is [BLOCK_M, BLOCK_N], or transposed; whatever is added broadcasts to it.
"""

import triton
import triton.language as tl

from attn_core.tiles.dropout import keep_tile
from attn_core.tiles.scores import tanh
from attn_core.tiles.softmax import LOG2_E

# A finite bias stays finite in units of log2, so that a row of nothing else has a mean.
_LOWEST = tl.constexpr(-3.0e38)
# How SOFTCAP computes tanh: 0 for no softcapping at all.
EXACT_SOFTCAP = tl.constexpr(1)
FAST_SOFTCAP = tl.constexpr(2)  # NVIDIA's instruction, good to 11 bits: for 16-bit tensors


@triton.jit
def load_term(ptrs, mask, MASKED: tl.constexpr):
    """Load what is added to the scores, in units of log2; a boolean False hides a key."""
    if MASKED:
        values = tl.load(ptrs, mask=mask, other=0)
    else:
        values = tl.load(ptrs)
    if values.dtype == tl.int1:
        term = tl.where(values, 0.0, -float("inf"))
    else:
        values = values.to(tl.float32)
        term = tl.maximum(values * LOG2_E, _LOWEST)
        term = tl.where(values == -float("inf"), values, term)
    return term


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
    """Return scores in units of log2, and what softcapping multiplies their derivatives by."""
    scores = products * scale_log2
    damping = 1.0
    if SOFTCAP > 0:
        share = _tanh(products * (scale_log2 / softcap_log2), SOFTCAP)
        scores = softcap_log2 * share
        damping = 1.0 - share * share
    if HAS_ALIBI:
        scores -= slope_log2 * tl.abs(distance)
    if HAS_BIAS:
        scores += bias
    if HAS_KEY_MASK:
        scores += key_mask
    return scores, damping


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


@triton.jit
def drop(weights, seed, offset, b, h, rows, start_n, threshold, BLOCK_N: tl.constexpr):
    """Zero the weights [BLOCK_M, BLOCK_N] that dropout drops; the others are not scaled yet."""
    keep = keep_tile(seed, offset, b, h, rows, start_n, threshold, BLOCK_N)
    return tl.where(keep, weights, 0.0)
