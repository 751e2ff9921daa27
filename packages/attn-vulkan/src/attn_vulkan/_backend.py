"""Backend "vulkan" as attn-core sees it, found through the entry-point group of its plug-ins.

The operators belong to attn-flash and attn-paged. They are known here by name alone, and neither
package has to be installed.
"""

from __future__ import annotations

from typing import Any

import torch

from attn_core.backends import Backend
from attn_vulkan import variants
from attn_vulkan._vk.errors import VulkanError
from attn_vulkan.problem import ITEM_BYTES, MAX_HEAD_DIM
from attn_vulkan.runtime.context import choose_device

FLASH = "attn_flash::attention"
PAGED = "attn_paged::attention"
OPERATORS = {
    FLASH: "attn_vulkan._torch:flash_attention",
    f"{FLASH}_backward": "attn_vulkan._torch:flash_attention_backward",
    PAGED: "attn_vulkan._torch:paged_attention",
}
# Facts that the kernels take into account, or that change nothing for them.
_KNOWN = frozenset(
    (
        *("device", "dtype", "cache_dtype", "needs_grad", "window", "softcap", "shared_prefix"),
        *("batch", "len_q", "len_k", "heads", "heads_kv", "head_dim", "head_dim_v", "tokens"),
        *(
            "sequences",
            "block_size",
            "max_blocks",
            "is_ragged",
            "has_alibi",
            "has_sinks",
            "features",
        ),
    )
)
_FEATURES = frozenset(
    (
        *("alibi_slopes", "attn_bias", "key_mask", "sinks", "softcap"),
        *("cu_seqlens_q", "seqused_k", "block_table"),
    )
)
# Below "torch": tensors have to be copied to the device, so a caller must ask for it.
PRIORITY = -10


def backends() -> list[Backend]:
    """The backend this distribution adds; the entry point of its name."""
    return [Backend(name="vulkan", ops=OPERATORS, priority=PRIORITY, supports=supports)]


def supports(op: str, problem: Any) -> str | None:
    """Say why a problem cannot run: no loader, no device, or a feature that is missing."""
    try:
        device = choose_device()
    except (VulkanError, ValueError) as error:
        return str(error)
    return _refusal(problem) or variants.refusal(device, _dtype_name(problem.dtype))


def _refusal(problem: Any) -> str | None:
    """Say what the kernels lack for a problem, on any device."""
    dtype = _dtype_name(problem.dtype)
    if dtype not in ITEM_BYTES:
        return f"it computes in {', '.join(ITEM_BYTES)}, not {dtype}"
    if getattr(problem, "cache_dtype", problem.dtype) != problem.dtype:
        return f"it reads caches of q's dtype, not of {problem.cache_dtype}"
    dims = problem.head_dim, getattr(problem, "head_dim_v", problem.head_dim)
    if max(dims) > MAX_HEAD_DIM:
        return f"head dimensions must be {MAX_HEAD_DIM} at most, got {max(dims)}"
    missing = sorted(getattr(problem, "features", _FEATURES) - _FEATURES)
    if missing:
        return f"it does not support {', '.join(missing)}"
    return _unknown(problem) or _device_refusal(problem.device)


def _device_refusal(device: torch.device) -> str | None:
    """Say why tensors on `device` are out of reach."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"it takes tensors on the CPU or on a CUDA device, not on {device.type}"
    from attn_vulkan import cuda  # asks CUDA

    return cuda.refusal(device)


def _unknown(problem: Any) -> str | None:
    """Say which feature is asked for that the kernels do not have."""
    defaults = problem._field_defaults
    for name in problem._fields:
        if name not in _KNOWN and getattr(problem, name) != defaults.get(name):
            return f"it does not support {name} = {getattr(problem, name)!r}"
    return None


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
