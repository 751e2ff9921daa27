"""Partial attention states merged by their natural-log LSE.

A state is (out, lse) over some of the keys, out normalised over them; lse is -inf where a query
sees none of them. The twin for whole tensors is `attn_core.merge.merge_attention_states`.
"""

import triton
import triton.language as tl


@triton.jit
def merge_lse(lse_a, lse_b):
    """Return the lse of both sets of keys together and the share of each set in the sum."""
    pivot = tl.maximum(lse_a, lse_b)
    pivot = tl.where(pivot == -float("inf"), 0.0, pivot)
    weight_a = tl.exp(lse_a - pivot)
    weight_b = tl.exp(lse_b - pivot)
    total = weight_a + weight_b
    divisor = tl.where(total == 0.0, 1.0, total)
    return pivot + tl.log(total), weight_a / divisor, weight_b / divisor


@triton.jit
def merge_states(out_a, lse_a, out_b, lse_b):
    """Merge two tiles of states, out [BLOCK_M, D] and lse [BLOCK_M]; return out and lse."""
    lse, share_a, share_b = merge_lse(lse_a, lse_b)
    return share_a[:, None] * out_a + share_b[:, None] * out_b, lse
