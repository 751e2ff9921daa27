"""What may be done to a tile of scores between the product and the softmax, and to its weights.

A tile is [BLOCK_M, BLOCK_N], or transposed: the indices i of queries and j of keys, counted within
their sequence of M and N tokens, come with the dimensions they lie along.
"""

import triton
import triton.language as tl

from attn_core.tiles.dropout import keep_tile
from attn_core.tiles.scores import tanh
from attn_core.tiles.softmax import LOG2_E

# A finite bias stays finite in units of log2, so that a row of nothing else has a mean.
_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _load_term(ptrs, mask):
    """Load what is added to the scores, in units of log2; a boolean False hides a key."""
    values = tl.load(ptrs, mask=mask, other=0)
    if values.dtype == tl.int1:
        term = tl.where(values, 0.0, -float("inf"))
    else:
        values = values.to(tl.float32)
        term = tl.maximum(values * LOG2_E, _LOWEST)
        term = tl.where(values == -float("inf"), values, term)
    return term


# fmt: off
@triton.jit
def modify_scores(
    products, i, j, M, N, scale_log2, softcap_log2, slope_log2,
    bias_ptr, stride_bm, stride_bn,
    key_mask_ptr, stride_mn,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
):
    # fmt: on
    """Return scores in units of log2, and what softcapping multiplies their derivatives by."""
    scores = products * scale_log2
    damping = 1.0
    if HAS_SOFTCAP:
        share = tanh(products * (scale_log2 / softcap_log2))
        scores = softcap_log2 * share
        damping = 1.0 - share * share
    if HAS_ALIBI:
        distance = tl.abs((i + (N - M)).to(tl.float32) - j.to(tl.float32))
        scores -= slope_log2 * distance
    if HAS_BIAS:
        offsets = i.to(tl.int64) * stride_bm + j.to(tl.int64) * stride_bn
        scores += _load_term(bias_ptr + offsets, (i < M) & (j < N))
    if HAS_KEY_MASK:
        scores += _load_term(key_mask_ptr + j.to(tl.int64) * stride_mn, j < N)
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
