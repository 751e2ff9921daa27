"""The backends this package brings, and what each of them takes."""

from __future__ import annotations

import torch

from attn_core import backends
from attn_core.device import triton_refusal
from attn_paged.checks import AppendProblem, AttentionProblem
from attn_paged.ops import APPEND, ATTENTION


def _torch_supports(op: str, problem: AttentionProblem | AppendProblem) -> str | None:
    return None


def _triton_supports(op: str, problem: AttentionProblem | AppendProblem) -> str | None:
    if problem.dtype == torch.float64:
        return "it computes in float16, bfloat16 and float32, not float64"
    return triton_refusal(problem.device)


def _typical_attention(device: torch.device) -> AttentionProblem:
    """Decoding a token of 64 sequences of up to 8192."""
    return AttentionProblem(
        device,
        _typical_dtype(device),
        tokens=64,
        sequences=64,
        heads=32,
        heads_kv=8,
        head_dim=128,
        head_dim_v=128,
        block_size=16,
        max_blocks=512,
        is_ragged=False,
        window=(-1, 0),
        softcap=0.0,
        has_alibi=False,
        has_sinks=False,
    )


def _typical_append(device: torch.device) -> AppendProblem:
    return AppendProblem(
        device,
        _typical_dtype(device),
        tokens=64,
        heads_kv=8,
        head_dim=128,
        head_dim_v=128,
        block_size=16,
    )


def _typical_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def register() -> None:
    """Make the package's backends and typical problems known to attn-core."""
    backends.register(
        backends.Backend(
            name="torch",
            ops={
                ATTENTION: "attn_paged._torch:attention",
                APPEND: "attn_paged._torch:append_to_cache",
            },
            priority=0,
            supports=_torch_supports,
        )
    )
    backends.register(
        backends.Backend(
            name="triton",
            ops={
                ATTENTION: "attn_paged._triton.attention:attention",
                APPEND: "attn_paged._triton.append:append_to_cache",
            },
            priority=10,
            supports=_triton_supports,
        )
    )
    backends.register_example(ATTENTION, _typical_attention)
    backends.register_example(APPEND, _typical_append)
