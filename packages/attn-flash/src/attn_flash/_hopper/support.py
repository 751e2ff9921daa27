"""Which problems the Hopper kernels take. Imports neither Triton nor Gluon."""

from __future__ import annotations

import torch

from attn_core.device import device_info, gluon_refusal, triton_version
from attn_flash.checks import AttentionProblem

_FEATURES = {"cu_seqlens_q", "seqused_k"}
_UNIT = 8  # 16-bit numbers of 16 bytes, in which the copy engine counts


def refusal(problem: AttentionProblem) -> str | None:
    """Say why the kernels do not take a problem; None where they do."""
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16, not {_name(problem.dtype)}"
    refused = problem.features - _FEATURES
    if refused:
        return f"it does not take {', '.join(sorted(refused))}"
    if problem.head_dim != problem.head_dim_v:
        return (
            "the head dimensions of q and v must be equal, got "
            f"{problem.head_dim} and {problem.head_dim_v}"
        )
    if problem.head_dim % _UNIT:
        return f"the head dimension must be a multiple of {_UNIT}, got {problem.head_dim}"
    return _machine_refusal(problem.device)


def _machine_refusal(device: torch.device) -> str | None:
    info = device_info(device)
    if info.arch != "sm_90":
        return f"it runs on NVIDIA Hopper GPUs (sm_90), not on {info.arch or info.type}"
    version = triton_version()
    if version is None:
        return "triton is not installed; the extra [triton] of the package brings it"
    return gluon_refusal(version)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
