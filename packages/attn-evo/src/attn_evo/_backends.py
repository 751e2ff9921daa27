"""The backends this package brings, and what each of them takes."""

from __future__ import annotations

import torch

from attn_core import backends
from attn_evo.checks import AttentionProblem, PrefixSumProblem
from attn_evo.ops import ATTENTION, ATTENTION_BACKWARD, PREFIX_SUM, PREFIX_SUM_BACKWARD


def _torch_supports(op: str, problem: AttentionProblem | PrefixSumProblem) -> str | None:
    if isinstance(problem, AttentionProblem) and problem.tiles:
        return "it has no tiles: block_m, num_warps and num_stages must be None"
    return None


def _typical_attention(device: torch.device) -> AttentionProblem:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return AttentionProblem(
        device,
        dtype,
        dtype,
        torch.float32,
        batch=2,
        heads=8,
        length=4096,
        head_dim=64,
        causal=True,
        has_mask=False,
        has_state=False,
        tiles=(),
        needs_grad=True,
    )


def _typical_prefix_sum(device: torch.device) -> PrefixSumProblem:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return PrefixSumProblem(
        device, dtype, (2, 8, 4096, 64), 2, exclusive=False, reverse=False, needs_grad=True
    )


def register() -> None:
    """Make the package's backends and typical problems known to attn-core."""
    backends.register(
        backends.Backend(
            name="torch",
            ops={
                ATTENTION: "attn_evo._torch:attention",
                ATTENTION_BACKWARD: "attn_evo._torch:attention_backward",
                PREFIX_SUM: "attn_evo._torch:prefix_sum",
                PREFIX_SUM_BACKWARD: "attn_evo._torch:prefix_sum_backward",
            },
            priority=0,
            supports=_torch_supports,
        )
    )
    backends.register_example(ATTENTION, _typical_attention)
    backends.register_example(PREFIX_SUM, _typical_prefix_sum)
