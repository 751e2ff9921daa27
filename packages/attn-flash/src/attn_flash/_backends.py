"""The backends this package brings, and what each of them takes."""

from __future__ import annotations

import torch

from attn_core import backends
from attn_core.device import triton_refusal
from attn_flash.checks import AttentionProblem
from attn_flash.ops import ATTENTION, ATTENTION_BACKWARD


def _torch_supports(op: str, problem: AttentionProblem) -> str | None:
    return None


def _triton_supports(op: str, problem: AttentionProblem) -> str | None:
    if problem.dtype == torch.float64:
        return "it computes in float16, bfloat16 and float32, not float64"
    return triton_refusal(problem.device)


def _typical_problem(device: torch.device) -> AttentionProblem:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return AttentionProblem(device, dtype, 2, 1024, 1024, 16, 16, 64, (-1, 0), needs_grad=True)


def register() -> None:
    """Make the package's backends and a typical problem known to attn-core."""
    backends.register(
        backends.Backend(
            name="torch",
            ops={
                ATTENTION: "attn_flash._torch:attention",
                ATTENTION_BACKWARD: "attn_flash._torch:attention_backward",
            },
            priority=0,
            supports=_torch_supports,
        )
    )
    backends.register(
        backends.Backend(
            name="triton",
            ops={
                ATTENTION: "attn_flash._triton.forward:attention",
                ATTENTION_BACKWARD: "attn_flash._triton.backward:attention_backward",
            },
            priority=10,
            supports=_triton_supports,
        )
    )
    backends.register_example(ATTENTION, _typical_problem)
