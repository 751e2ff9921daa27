"""The backends this package brings, and what each of them takes."""

from __future__ import annotations

import torch

from attn_core import backends
from attn_core.device import device_info, gluon_refusal, triton_refusal, triton_version
from attn_triangle.checks import GateProblem, TriangleProblem
from attn_triangle.ops import ATTENTION, ATTENTION_BACKWARD, GATE, GATE_BACKWARD

_HOPPER_MAX_HEAD_DIM = 64
_HOPPER_MIN_KEYS = 128  # with fewer, backend triton is as fast or faster
# Far below any in use. Smaller ones would let keys that the mask hides reappear.
_HOPPER_MIN_SCALE = 1e-3


def _torch_supports(op: str, problem: TriangleProblem | GateProblem) -> str | None:
    return None


def _triton_supports(op: str, problem: TriangleProblem | GateProblem) -> str | None:
    if problem.dtype == torch.float64:
        return "it computes in float16, bfloat16 and float32, not float64"
    return triton_refusal(problem.device)


def _hopper_supports(op: str, problem: TriangleProblem | GateProblem) -> str | None:
    info = device_info(problem.device)
    if info.arch != "sm_90":
        return f"it is made for compute capability 9.0, not for {info.arch or info.type}"
    version = triton_version()
    if version is None:
        return triton_refusal(problem.device)
    if (refusal := gluon_refusal(version)) is not None:
        return refusal
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return "it computes in float16 and bfloat16"
    return None if isinstance(problem, GateProblem) else _hopper_refusal(problem)


def _hopper_refusal(problem: TriangleProblem) -> str | None:
    if problem.head_dim > _HOPPER_MAX_HEAD_DIM or problem.head_dim % 8:
        return (
            f"it takes head dimensions to {_HOPPER_MAX_HEAD_DIM} in steps of 8, got "
            f"{problem.head_dim}"
        )
    if problem.len_k < _HOPPER_MIN_KEYS:
        return f"it gains nothing below {_HOPPER_MIN_KEYS} keys, got {problem.len_k}"
    if problem.mask_is_additive:
        return "it takes masks of bool, not additive ones"
    if not problem.is_aligned:
        return (
            "q, k and v must have a dense last dimension and all other strides, and their first "
            "element, at multiples of 16 bytes; none may be expanded"
        )
    if problem.scale < _HOPPER_MIN_SCALE:
        return f"scale must be at least {_HOPPER_MIN_SCALE}, got {problem.scale}"
    return None


def _typical_problem(device: torch.device) -> TriangleProblem:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return TriangleProblem(
        device, dtype, dtype, 1, 4, 384, 384, 384, 32, True, "mean", needs_grad=True
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
    backends.register(
        backends.Backend(
            name="hopper",
            ops={
                ATTENTION: "attn_triangle._hopper.forward:attention",
                ATTENTION_BACKWARD: "attn_triangle._hopper.backward:attention_backward",
                GATE: "attn_triangle._triton.gate:gate",
                GATE_BACKWARD: "attn_triangle._triton.gate:gate_backward",
            },
            priority=20,
            supports=_hopper_supports,
        )
    )
    backends.register_example(ATTENTION, _typical_problem)
