"""What may be done to a tile of scores between the product and the softmax."""

import triton
import triton.language as tl

from attn_core.tiles.softmax import LOG2_E


@triton.jit
def tanh(x):
    """1 - 2 / (exp(2 x) + 1), exact at both infinities, and a series where that would cancel."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    far = 1.0 - 2.0 / (tl.math.exp2(x * (2.0 * LOG2_E)) + 1.0)
    return tl.where(square < 0.0625, series, far)


@triton.jit
def first_state(sinks_ptrs, mask_m, HAS_SINKS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Running maximum and sum before the first key: a sink is a key whose value is 0."""
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    if HAS_SINKS:
        sinks = tl.load(sinks_ptrs, mask=mask_m, other=-float("inf"))
        m_i = sinks.to(tl.float32) * LOG2_E
    return m_i, tl.where(m_i == -float("inf"), 0.0, 1.0)


# fmt: off
@triton.jit
def bend(
    scores, position, offs_n, slopes, scale_log2, softcap_log2,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
):
    # fmt: on
    """Scale scores to units of log2, cap them and add the bias of distance."""
    if HAS_SOFTCAP:
        scores = softcap_log2 * tanh(scores * (scale_log2 / softcap_log2))
    else:
        scores = scores * scale_log2
    if HAS_ALIBI:
        distance = tl.abs(position[:, None] - offs_n[None, :]).to(tl.float32)
        scores -= slopes[:, None] * distance
    return scores
