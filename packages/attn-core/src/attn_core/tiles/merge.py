"""Parts of attention put together: a part is a key whose score is its lse, its value its output.

Outputs are normalised over the keys of their part. The twin for whole tensors is
`attn_core.merge.merge_attention_states`.
"""

import triton
import triton.language as tl

from attn_core.tiles.softmax import online_softmax_masked


@triton.jit
def take_in_parts(m_i, l_i, acc, parts_lse, parts):
    """Take BLOCK_S parts of each row into the state of an online softmax.

    parts_lse [BLOCK_M, BLOCK_S] is in units of log2, parts are [BLOCK_M, BLOCK_S, BLOCK_D]. What a
    part without keys holds, whose lse is -inf, does not matter.
    """
    has_keys = parts_lse > -float("inf")
    m_i, l_i, alpha, p = online_softmax_masked(m_i, l_i, parts_lse, 1.0, has_keys)
    parts = tl.where(has_keys[:, :, None], parts, 0.0)
    return m_i, l_i, acc * alpha[:, None] + tl.sum(p[:, :, None] * parts, 1)
