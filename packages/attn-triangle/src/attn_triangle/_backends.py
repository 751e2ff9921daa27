"""The backends this package brings, and what each of them takes."""

from __future__ import annotations

import torch

from attn_core import backends
from attn_core.device import device_info, triton_version
from attn_triangle.checks import TriangleProblem
from attn_triangle.ops import ATTENTION, ATTENTION_BACKWARD

TRITON_MINIMUM = (3, 2)


def _torch_supports(op: str, problem: TriangleProblem) -> str | None:
    return None


def _triton_supports(op: str, problem: TriangleProblem) -> str | None:
    version = triton_version()
    if version is None:
        return "triton is not installed (pip install attn-triangle[triton])"
    if version < TRITON_MINIMUM:
        return f"triton must be at least 3.2, got {version[0]}.{version[1]}"
    device = device_info(problem.device)
    if device.type not in ("cuda", "hip"):
        return f"it runs on NVIDIA and AMD GPUs, the tensors are on {problem.device.type}"
    if device.type == "cuda" and device.capability < 80:
        return f"it needs compute capability 8.0 or newer, {device.name} has {device.arch}"
    if problem.dtype == torch.float64:
        return "it computes in float16, bfloat16 and float32, not float64"
    return None


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
            },
            priority=10,
            supports=_triton_supports,
        )
    )
    backends.register_example(ATTENTION, _typical_problem)
