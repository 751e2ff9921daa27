"""Tensors as the bulk copy engine of Hopper addresses them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from attn_flash._hopper.primitives import RAGGED_END

_ALIGNMENT = 16  # bytes, of the base and of every stride but the last
_ANY = 0x7FFF0000  # more than any coordinate


def addressable(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or a copy where the copy engine cannot address it."""
    if tensor.data_ptr() % _ALIGNMENT == 0 and _are_aligned(tensor.stride(), tensor.element_size()):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


@functools.lru_cache
def _are_aligned(strides: tuple[int, ...], size: int) -> bool:
    *outer, innermost = strides
    return innermost == 1 and all(x > 0 and x * size % _ALIGNMENT == 0 for x in outer)


def rows_descriptor(
    tensor: torch.Tensor, rows: int, block_d: int, is_ragged: bool = False
) -> TensorDescriptor:
    """Describe (B, S, H, D) as [B, H, S, D] in tiles of `rows` tokens of one head."""
    if is_ragged:
        return ragged_descriptor(tensor[0], rows, block_d)
    layout = gl.NVMMASharedLayout(128, 8 * tensor.element_size(), rank=4)
    tensor = tensor.transpose(1, 2)
    return TensorDescriptor(
        tensor, list(tensor.shape), list(tensor.stride()), [1, 1, rows, block_d], layout
    )


def ragged_descriptor(tensor: torch.Tensor, rows: int, block_d: int) -> TensorDescriptor:
    """Describe (T, H, D) so that tiles end with a sequence of T, wherever it ends.

    The rows of any sequence end at row `RAGGED_END`, where the copy engine clips. The second
    coordinate moves them, as many tokens as it says. The first one moves them back by `RAGGED_END`
    tokens: the multiple of 2**64 that the address has then gained is lost in its 64 bits. The idea
    is that of Triton's `tools.ragged_tma`.
    """
    layout = gl.NVMMASharedLayout(128, 8 * tensor.element_size(), rank=5)
    _, H, D = tensor.shape
    stride_t, stride_h, stride_d = tensor.stride()
    end = RAGGED_END.value
    return TensorDescriptor(
        tensor,
        [_ANY, _ANY, H, end, D],
        [2**64 // end - stride_t, stride_t, stride_h, stride_t, stride_d],
        [1, 1, 1, rows, block_d],
        layout,
    )


def flat_descriptor(tensor: torch.Tensor, tile: tuple[int, int]) -> TensorDescriptor:
    """Describe a contiguous matrix of float32 in tiles that keep their order in shared memory."""
    layout = gl.NVMMASharedLayout(0, 32, rank=2)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(tile), layout)


class Rows(NamedTuple):
    """An argument: (B, S, H, D) in tiles of `rows` tokens of one head and `block_d` columns.

    `is_ragged` says that tiles end with sequences in it; see `ragged_descriptor`.
    """

    tensor: torch.Tensor
    rows: int
    block_d: int
    is_ragged: bool = False

    def describe(self) -> TensorDescriptor:
        """Return what Triton launches with."""
        return rows_descriptor(*self)


class Flat(NamedTuple):
    """An argument: a contiguous matrix of float32 in tiles."""

    tensor: torch.Tensor
    tile: tuple[int, int]

    def describe(self) -> TensorDescriptor:
        """Return what Triton launches with."""
        return flat_descriptor(*self)
