"""Which problems the kernels for Hopper take. Imports neither Triton nor Gluon."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attn_core.device import GLUON_VERSIONS, device_info, triton_version

HEAD_DIMS = {torch.float16: (64, 128), torch.bfloat16: (64, 128), torch.float32: (64,)}
BLOCK_M = 64  # tokens of a tile
PIECE = 32  # those that one of two warpgroups has, which take turns
HELD_DIM = 64  # of heads that one warpgroup holds, with gradients of weights in its registers
_UNIT = 16  # bytes that one copy into shared memory moves
_MOST_STRIDE = 1 << 22  # elements between rows: within a tile of prefix sums int32 counts them
_MOST_HEADS = 1 << 22  # of the batch: int32 counts their rows of sums


def takes(v: torch.Tensor, has_mask: bool, has_state: bool) -> bool:
    """Whether the kernels take causal values, that may be masked or continue others."""
    return (
        not has_mask
        and not has_state
        and v.shape[-1] in HEAD_DIMS.get(v.dtype, ())
        and v.shape[0] * v.shape[1] <= _MOST_HEADS
        and _is_copied_in_units(v)
        and device_info(v.device).arch == "sm_90"
        and triton_version() in GLUON_VERSIONS
    )


def takes_full(v: torch.Tensor, has_mask: bool, has_state: bool) -> bool:
    """Whether the kernels take values that are not causal: of heads that a warpgroup holds."""
    is_held = v.element_size() == 2 and v.shape[-1] <= HELD_DIM
    return is_held and takes(v, has_mask, has_state)


def takes_backward(v: torch.Tensor, has_mask: bool, has_state: bool, causal: bool) -> bool:
    """Whether the kernels take the gradients of values: in float32 of causal ones alone."""
    has_kernels = v.dtype == torch.bfloat16 or (v.dtype == torch.float32 and causal)
    return has_kernels and takes(v, has_mask, has_state)


def in_units(dout: torch.Tensor) -> torch.Tensor:
    """Return it, or a copy that the kernels can address: sums leave gradients without strides."""
    return dout if _is_copied_in_units(dout) else _copy(dout)


def in_tiles(x: torch.Tensor) -> torch.Tensor:
    """Return it, or a copy that the copy engine can address, which wants strides that are not 0."""
    return x if all(x.stride()) else _copy(x)


def takes_columns(x: torch.Tensor, out: torch.Tensor, strides: Sequence[Sequence[int]]) -> bool:
    """Whether the kernel takes prefix sums of columns in multiples of 64, neighbours in x.

    `strides` are those of x and out as the kernel takes them, of rows and columns last.
    """
    starts = [tensor.data_ptr() for tensor in (x, out)]
    starts += [stride * x.element_size() for *outer, _ in strides for stride in outer]
    return (
        all(stride_c == 1 for *_, stride_c in strides)
        and x.element_size() == 2
        and not any(start % _UNIT for start in starts)
        and max(stride_n for *_, stride_n, _ in strides) < _MOST_STRIDE
        and device_info(x.device).arch == "sm_90"
        and triton_version() in GLUON_VERSIONS
    )


def _copy(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape).copy_(x)


def _is_copied_in_units(v: torch.Tensor) -> bool:
    *strides, stride_d = v.stride()
    starts = [v.data_ptr(), *(stride * v.element_size() for stride in strides)]
    return stride_d == 1 and not any(start % _UNIT for start in starts)
