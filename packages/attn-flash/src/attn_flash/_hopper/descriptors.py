"""Tensors as the bulk copy engine of Hopper addresses them."""

from __future__ import annotations

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_ALIGNMENT = 16  # bytes, of the base and of every stride but the last


def addressable(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or a copy where the copy engine cannot address it."""
    *strides, innermost = tensor.stride()
    size = tensor.element_size()
    is_aligned = all(stride * size % _ALIGNMENT == 0 and stride > 0 for stride in strides)
    if innermost == 1 and is_aligned and tensor.data_ptr() % _ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def rows_descriptor(tensor: torch.Tensor, rows: int, block_d: int) -> TensorDescriptor:
    """Describe (B, S, H, D) as [B, H, S, D] in tiles of `rows` tokens of one head."""
    layout = gl.NVMMASharedLayout(128, 8 * tensor.element_size(), rank=4)
    tensor = tensor.transpose(1, 2)
    return TensorDescriptor(
        tensor, list(tensor.shape), list(tensor.stride()), [1, 1, rows, block_d], layout
    )


def flat_descriptor(tensor: torch.Tensor, tile: tuple[int, int]) -> TensorDescriptor:
    """Describe a contiguous matrix of float32 in tiles that keep their order in shared memory."""
    layout = gl.NVMMASharedLayout(0, 32, rank=2)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(tile), layout)
