"""The backends this package brings, and what each of them takes."""

from __future__ import annotations

import torch

from attn_core import backends
from attn_core.device import device_info, triton_refusal
from attn_paged.checks import AppendProblem, AttentionProblem
from attn_paged.ops import APPEND, ATTENTION

_FLOAT8_CAPABILITY = 89  # Ada: the first GPUs whose instructions convert e4m3


def _torch_supports(op: str, problem: AttentionProblem | AppendProblem) -> str | None:
    is_invariant = isinstance(problem, AttentionProblem) and problem.batch_invariant
    if is_invariant and problem.device.type != "cpu":
        return "batch_invariant needs the lengths of sequences, which are on another device"
    return None


def _triton_supports(op: str, problem: AttentionProblem | AppendProblem) -> str | None:
    if problem.dtype == torch.float64:
        return "it computes in float16, bfloat16 and float32, not float64"
    refusal = triton_refusal(problem.device)
    if refusal is None and problem.cache_dtype == torch.float8_e4m3fn:
        info = device_info(problem.device)
        if info.capability < _FLOAT8_CAPABILITY:
            return f"float8_e4m3fn needs compute capability 8.9 or newer, {info.name} has not"
    return refusal


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
        cache_dtype=_typical_dtype(device),
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
        cache_dtype=_typical_dtype(device),
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
