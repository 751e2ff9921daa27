"""The backends this package brings, and what each of them takes."""

from __future__ import annotations

import torch

from attn_core import backends
from attn_core.device import triton_refusal
from attn_flash._hopper import support as hopper
from attn_flash.checks import AttentionProblem
from attn_flash.ops import ATTENTION, ATTENTION_BACKWARD


def _torch_supports(op: str, problem: AttentionProblem) -> str | None:
    return _refuse_paged_gradient(problem)


def _triton_supports(op: str, problem: AttentionProblem) -> str | None:
    if problem.dtype == torch.float64:
        return "it computes in float16, bfloat16 and float32, not float64"
    return _refuse_paged_gradient(problem) or triton_refusal(problem.device)


def _hopper_supports(op: str, problem: AttentionProblem) -> str | None:
    return hopper.refusal(problem)


def _refuse_paged_gradient(problem: AttentionProblem) -> str | None:
    if problem.needs_grad and "block_table" in problem.features:
        return "it has no backward pass for keys behind a block table"
    return None


def _typical_problem(device: torch.device) -> AttentionProblem:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return AttentionProblem(
        device, dtype, 2, 1024, 1024, 16, 16, 64, 64, (-1, 0), frozenset(), True
    )


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
    backends.register(
        backends.Backend(
            name="hopper",
            ops={
                ATTENTION: "attn_flash._hopper.attention:attention",
                ATTENTION_BACKWARD: "attn_flash._hopper.attention:attention_backward",
            },
            priority=20,
            supports=_hopper_supports,
        )
    )
    backends.register_example(ATTENTION, _typical_problem)
