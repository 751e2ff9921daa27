"""Online softmax (Milakov and Gimelshein, 2018) in base 2, with float32 statistics.

m_i is the running maximum of the scaled scores in units of log2, l_i the running sum of
exp2(score - m_i) and acc the running sum of exp2(score - m_i) * v.
"""

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def online_softmax(m_i, l_i, scores, scale_log2):
    """Take in a tile of finite scores, unscaled; return m_i, l_i, the factor for acc, and p."""
    m_new = tl.maximum(m_i, tl.max(scores, 1) * scale_log2)
    p = tl.math.exp2(scores * scale_log2 - m_new[:, None])
    alpha = tl.math.exp2(m_i - m_new)
    return m_new, l_i * alpha + tl.sum(p, 1), alpha, p


@triton.jit
def online_softmax_masked(m_i, l_i, scores, scale_log2, visible):
    """The same where some scores, or all of a row, are not visible."""
    # Scaled before masking: 0 * -inf is NaN.
    scores = tl.where(visible, scores * scale_log2, -float("inf"))
    m_new = tl.maximum(m_i, tl.max(scores, 1))
    pivot = tl.where(m_new == -float("inf"), 0.0, m_new)
    p = tl.math.exp2(scores - pivot[:, None])
    alpha = tl.math.exp2(m_i - pivot)
    return m_new, l_i * alpha + tl.sum(p, 1), alpha, p


@triton.jit
def finish_softmax(m_i, l_i, acc):
    """Return the output rows and their natural-log lse; a row without keys gives 0 and -inf."""
    out = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    return out, (m_i + tl.math.log2(l_i)) * LN_2
