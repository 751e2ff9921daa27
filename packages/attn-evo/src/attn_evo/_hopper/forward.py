"""Causal forward pass on Hopper, where kernels with layouts by hand are faster than Triton's."""

from __future__ import annotations

import torch

from attn_evo._hopper.float32.output import attention_output as attention_output_float32
from attn_evo._hopper.float32.stat import attention_stat as attention_stat_float32
from attn_evo._hopper.output import attention_output
from attn_evo._hopper.stat import attention_stat
from attn_evo._hopper.stat_wide import attention_stat_wide
from attn_evo._triton import configs, forward, problem
from attn_evo.weights import EvoWeights


def attention(v: torch.Tensor, weights: EvoWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_triton.forward.attention` of values without a mask and without tokens before them."""
    B, H, _, D = v.shape
    out = v.new_empty(v.shape)
    sums_after = v.new_empty((2, B, H, D), dtype=torch.float32)
    is_float32 = v.dtype == torch.float32
    config = configs.HOPPER_FORWARD_FLOAT32 if is_float32 else configs.HOPPER_FORWARD
    call = problem.call(v, None, None, None, config)
    scratch = running_sums(call, weights, sums_after)
    output = attention_output_float32 if is_float32 else attention_output
    output(call, scratch, out, sums_after)
    return out, sums_after


def running_sums(
    call: problem.Call, weights: EvoWeights, sums_after: torch.Tensor
) -> problem.Scratch:
    """As `_triton.forward.running_sums`, with `causal`."""
    scratch = forward.sums_of_values(call, weights)
    v = call.v[0]
    if v.dtype == torch.float32:
        stat = attention_stat_float32
    else:
        stat = {64: attention_stat, 128: attention_stat_wide}[v.shape[-1]]
    stat(call, scratch, sums_after)
    return scratch
