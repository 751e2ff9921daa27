"""The backends this package brings, and what each of them takes."""

from __future__ import annotations

import torch

from attn_core import backends
from attn_core.device import triton_refusal
from attn_triangle.checks import TriangleProblem
from attn_triangle.ops import ATTENTION, ATTENTION_BACKWARD, GATE, GATE_BACKWARD


def _torch_supports(op: str, problem: TriangleProblem) -> str | None:
    return None


def _triton_supports(op: str, problem: TriangleProblem) -> str | None:
    if problem.dtype == torch.float64:
        return "it computes in float16, bfloat16 and float32, not float64"
    return triton_refusal(problem.device)


def _typical_problem(device: torch.device) -> TriangleProblem:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return TriangleProblem(
        device, dtype, dtype, 1, 4, 256, 256, 256, 32, True, "mean", needs_grad=True
    )


def register() -> None:
    """Make the package's backends and a typical problem known to attn-core."""
    backends.register(
        backends.Backend(
            name="torch",
            ops={
                ATTENTION: "attn_triangle._torch:attention",
                ATTENTION_BACKWARD: "attn_triangle._torch:attention_backward",
                GATE: "attn_triangle._torch:gate",
                GATE_BACKWARD: "attn_triangle._torch:gate_backward",
            },
            priority=0,
            supports=_torch_supports,
        )
    )
    backends.register(
        backends.Backend(
            name="triton",
            ops={
                ATTENTION: "attn_triangle._triton.forward:attention",
                ATTENTION_BACKWARD: "attn_triangle._triton.backward:attention_backward",
                GATE: "attn_triangle._triton.gate:gate",
                GATE_BACKWARD: "attn_triangle._triton.gate:gate_backward",
            },
            priority=10,
            supports=_triton_supports,
        )
    )
    backends.register_example(ATTENTION, _typical_problem)
