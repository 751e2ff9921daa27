"""Forward pass on Hopper, where kernels with layouts by hand are faster than Triton's."""

from __future__ import annotations

import torch

from attn_core.tiling import ceil_div
from attn_evo._hopper import support
from attn_evo._hopper.float32.output import attention_output as attention_output_float32
from attn_evo._hopper.float32.stat import attention_stat as attention_stat_float32
from attn_evo._hopper.output import attention_output
from attn_evo._hopper.output_full import attention_output as attention_output_full
from attn_evo._hopper.stat import attention_stat
from attn_evo._hopper.stat_wide import attention_stat_wide
from attn_evo._triton import configs, forward, problem
from attn_evo.weights import EvoWeights

_MOST_TOKENS = 4096  # of a sequence that one program adds up: longer ones are cut into chunks
_HELD_PROGRAMS = 3  # on an SM, of heads that a warpgroup holds
_FULL_PROGRAMS = 4  # and without `causal`
_LEAST_TOKENS = 512  # of a program where that many share an SM: fewer are not worth its start
_LEAST_USE = 0.8  # of SMs, by programs that own a sequence: else they own chunks


def attention(v: torch.Tensor, weights: EvoWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_triton.forward.attention` of causal values without a mask or tokens before them."""
    B, H, _, D = v.shape
    out = v.new_empty(v.shape)
    sums_after = v.new_empty((2, B, H, D), dtype=torch.float32)
    if v.dtype == torch.float32:
        call = problem.call(v, None, None, None, configs.HOPPER_FORWARD_FLOAT32)
        attention_output_float32(call, running_sums(call, weights, sums_after), out, sums_after)
        return out, sums_after
    call = _call(v)
    own_sequences = _own_sequences(call)
    if own_sequences:
        call = call.undivided
        scratch = forward.sums_of_values(call, weights, only_packs=True)
    else:
        scratch = running_sums(call, weights, sums_after)
    attention_output(call, scratch, out, sums_after, own_sequences)
    return out, sums_after


def full_attention(v: torch.Tensor, weights: EvoWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attention`, of values that are not causal."""
    B, H, _, D = v.shape
    out = v.new_empty(v.shape)
    sums_after = v.new_empty((2, B, H, D), dtype=torch.float32)
    call = problem.call(v, None, None, None, configs.HOPPER_FORWARD_FULL, _FULL_PROGRAMS)
    attention_output_full(call, forward.sums_of_values(call, weights), out, sums_after)
    return out, sums_after


def owns_sequences(v: torch.Tensor) -> bool:
    """Whether programs of the backward pass own a whole sequence each, as those of this pass."""
    return _own_sequences(_call(v))


def _call(v: torch.Tensor) -> problem.Call:
    """Describe a call for 16-bit values, of as many programs as an SM holds, of long sequences."""
    B, H, L, D = v.shape
    num_programs = _HELD_PROGRAMS * support.device_info(v.device).num_sms
    tokens_of_program = B * H * L / num_programs
    are_long = tokens_of_program >= _LEAST_TOKENS
    programs_per_sm = _HELD_PROGRAMS if D == support.HELD_DIM and are_long else 2
    return problem.call(v, None, None, None, configs.HOPPER_FORWARD[D], programs_per_sm)


def _own_sequences(call: problem.Call) -> bool:
    """Whether programs own a whole sequence each: where they occupy the GPU, or do so anyway.

    Narrower heads leave them no registers for that. One of wider ones fills an SM.
    """
    v = call.v[0]
    if v.shape[-1] <= support.HELD_DIM:
        return False
    num_sms = support.device_info(v.device).num_sms
    rounds = ceil_div(call.num_heads, num_sms)
    is_used = call.num_heads >= _LEAST_USE * rounds * num_sms
    return call.num_programs == call.num_heads or (is_used and v.shape[-2] <= _MOST_TOKENS)


def running_sums(
    call: problem.Call, weights: EvoWeights, sums_after: torch.Tensor
) -> problem.Scratch:
    """As `_triton.forward.running_sums`, with `causal`."""
    v = call.v[0]
    if v.dtype == torch.float32:
        stat = attention_stat_float32
    else:
        stat = {64: attention_stat, 128: attention_stat_wide}[v.shape[-1]]
    scratch = forward.sums_of_values(call, weights, starts_next=stat is attention_stat)
    stat(call, scratch, sums_after)
    return scratch
