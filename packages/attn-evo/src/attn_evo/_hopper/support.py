"""Which problems the kernels for Hopper take. Imports neither Triton nor Gluon."""

from __future__ import annotations

import torch

from attn_core.device import device_info, triton_version

TRITON_VERSIONS = ((3, 6),)
"""Those whose Gluon the kernels compile with: it is experimental and changes between releases."""
HEAD_DIMS = (64, 128)
BLOCK_M = 64  # tokens of a tile
HELD_DIM = 64  # of the widest heads whose kernels hold gradients of weights in their registers
_UNIT = 16  # bytes that one copy into shared memory moves


def takes(v: torch.Tensor, has_mask: bool, has_state: bool) -> bool:
    """Whether the kernels take causal values, that may be masked or continue others."""
    return (
        not has_mask
        and not has_state
        and v.shape[-1] in HEAD_DIMS
        and v.dtype in (torch.float16, torch.bfloat16)
        and _is_copied_in_units(v)
        and device_info(v.device).arch == "sm_90"
        and triton_version() in TRITON_VERSIONS
    )


def takes_backward(v: torch.Tensor, dout: torch.Tensor, has_mask: bool, has_state: bool) -> bool:
    """Whether the kernels take the gradients of values, causal or not."""
    is_taken = v.dtype == torch.bfloat16 and takes(v, has_mask, has_state)
    return is_taken and _is_copied_in_units(dout)


def _is_copied_in_units(v: torch.Tensor) -> bool:
    *strides, stride_d = v.stride()
    starts = [v.data_ptr(), *(stride * v.element_size() for stride in strides)]
    return stride_d == 1 and not any(start % _UNIT for start in starts)
