"""Causal forward pass on Hopper, where kernels with layouts by hand are faster than Triton's."""

from __future__ import annotations

import torch

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
    call = problem.call(v, None, None, None, configs.HOPPER_FORWARD)
    scratch = running_sums(call, weights, sums_after)
    attention_output(call, scratch, out, sums_after)
    return out, sums_after


def running_sums(
    call: problem.Call, weights: EvoWeights, sums_after: torch.Tensor
) -> problem.Scratch:
    """As `_triton.forward.running_sums`, with `causal`."""
    scratch = forward.sums_of_values(call, weights)
    stat = {64: attention_stat, 128: attention_stat_wide}[call.flags["HEAD_DIM"]]
    stat(call, scratch, sums_after)
    return scratch
