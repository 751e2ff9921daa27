"""Tensors as the bulk copy engine of Hopper addresses them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


class Tiles(NamedTuple):
    """An argument: a tensor that the copy engine moves in tiles.

    Attributes
    ----------
    tensor : Tensor
        Its last dimension is dense, all other strides and its address multiples of 16 bytes.
    block : tuple of int
        Sizes of a tile.
    is_swizzled : bool
        Whether a tile is an operand of a product, or else a piece of a row of numbers.
    """

    tensor: torch.Tensor
    block: tuple[int, ...]
    is_swizzled: bool = True

    def describe(self) -> TensorDescriptor:
        """Return what Triton launches with."""
        x, block, is_swizzled = self
        layout = gl.NVMMASharedLayout(
            swizzle_byte_width=min(128, block[-1] * x.itemsize) if is_swizzled else 0,
            element_bitwidth=8 * x.itemsize,
            rank=len(block),
        )
        unit = 16 // x.itemsize
        strides = [
            unit if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)
        ]
        return TensorDescriptor(x, list(x.shape), [*strides[:-1], 1], list(block), layout)
