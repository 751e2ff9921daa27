"""The backends of the operators beside attention: KV cache and rotary embedding."""

from __future__ import annotations

import torch

from attn_core import backends
from attn_core.device import triton_refusal
from attn_flash.kvcache_checks import KVCacheProblem
from attn_flash.kvcache_ops import APPEND, ATTENTION
from attn_flash.rotary_checks import RotaryProblem
from attn_flash.rotary_ops import ROTATE, ROTATE_BACKWARD


def _torch_supports(op: str, problem: KVCacheProblem | RotaryProblem) -> str | None:
    return None


def _triton_supports(op: str, problem: KVCacheProblem | RotaryProblem) -> str | None:
    if problem.dtype == torch.float64:
        return "it computes in float16, bfloat16 and float32, not float64"
    return triton_refusal(problem.device)


def _typical_decoding(device: torch.device) -> KVCacheProblem:
    """A token of 8 sequences of up to 8192."""
    return KVCacheProblem(
        device, _typical_dtype(device), 8, 1, 1, 8192, 0, 64, 8, 128, 128, (-1, 0), 0.0, 128
    )


def _typical_rotation(device: torch.device) -> RotaryProblem:
    dtype = _typical_dtype(device)
    return RotaryProblem(
        device, dtype, (2, 1024, 16, 64), 64, interleaved=False, is_varlen=False, needs_grad=True
    )


def _typical_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def register() -> None:
    """Make the backends and typical problems of these operators known to attn-core."""
    backends.register(
        backends.Backend(
            name="torch",
            ops={
                ATTENTION: "attn_flash._kvcache_torch:attention",
                APPEND: "attn_flash._kvcache_torch:append",
                ROTATE: "attn_flash._rotary_torch:rotate",
                ROTATE_BACKWARD: "attn_flash._rotary_torch:rotate",
            },
            priority=0,
            supports=_torch_supports,
        )
    )
    backends.register(
        backends.Backend(
            name="triton",
            ops={
                ATTENTION: "attn_flash._triton.decode:attention",
                APPEND: "attn_flash._triton.append:append",
                ROTATE: "attn_flash._triton.rotary:rotate",
                ROTATE_BACKWARD: "attn_flash._triton.rotary:rotate",
            },
            priority=10,
            supports=_triton_supports,
        )
    )
    backends.register_example(ATTENTION, _typical_decoding)
    backends.register_example(ROTATE, _typical_rotation)
