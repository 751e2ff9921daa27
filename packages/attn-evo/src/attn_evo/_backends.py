"""The backends this package brings, and what each of them takes."""

from __future__ import annotations

import torch

from attn_core import backends
from attn_core.device import triton_refusal
from attn_evo.checks import AttentionProblem, PrefixSumProblem
from attn_evo.ops import ATTENTION, ATTENTION_BACKWARD, PREFIX_SUM, PREFIX_SUM_BACKWARD

# Of what one program keeps in registers: tiles of several tokens and the four products' weights.
TRITON_MAX_HEAD_DIM = 128
TRITON_MAX_HEAD_DIM_FLOAT32 = 64
TRITON_BLOCK_M = (16, 32, 64, 128)
TRITON_NUM_WARPS = (1, 2, 4, 8, 16)


def _torch_supports(op: str, problem: AttentionProblem | PrefixSumProblem) -> str | None:
    if isinstance(problem, AttentionProblem) and problem.tiles:
        return "it has no tiles: block_m, num_warps and num_stages must be None"
    return None


def _triton_supports(op: str, problem: AttentionProblem | PrefixSumProblem) -> str | None:
    refusal = triton_refusal(problem.device)
    if refusal is not None:
        return refusal
    if isinstance(problem, AttentionProblem):
        return _triton_attention_supports(problem)
    return None


def _triton_attention_supports(problem: AttentionProblem) -> str | None:
    if torch.float64 in (problem.dtype, problem.weight_dtype):
        return "it computes in float16, bfloat16 and float32, not float64"
    if problem.accum_dtype != torch.float32:
        return f"it sums in float32, not {str(problem.accum_dtype).removeprefix('torch.')}"
    limit = most_head_dim(problem.dtype)
    if problem.tiles and problem.head_dim > limit:
        return f"it has tiles for head dimensions up to {limit}, got {problem.head_dim}"
    return _triton_tiles_support(problem.tiles)


def most_head_dim(dtype: torch.dtype) -> int:
    """The widest head that Triton's fused kernels take; wider ones go through matrix products."""
    return TRITON_MAX_HEAD_DIM_FLOAT32 if dtype == torch.float32 else TRITON_MAX_HEAD_DIM


def _triton_tiles_support(tiles: tuple[int, ...]) -> str | None:
    if not tiles:
        return None
    block_m, num_warps, _ = tiles
    if block_m not in (0, *TRITON_BLOCK_M):
        return f"block_m must be one of {TRITON_BLOCK_M}, got {block_m}"
    if num_warps not in (0, *TRITON_NUM_WARPS):
        return f"num_warps must be one of {TRITON_NUM_WARPS}, got {num_warps}"
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
    backends.register(
        backends.Backend(
            name="triton",
            ops={
                ATTENTION: "attn_evo._triton.forward:attention",
                ATTENTION_BACKWARD: "attn_evo._triton.backward:attention_backward",
                PREFIX_SUM: "attn_evo._triton.prefix_sum:prefix_sum",
                PREFIX_SUM_BACKWARD: "attn_evo._triton.prefix_sum:prefix_sum_backward",
            },
            priority=10,
            supports=_triton_supports,
        )
    )
    backends.register_example(ATTENTION, _typical_attention)
    backends.register_example(PREFIX_SUM, _typical_prefix_sum)
