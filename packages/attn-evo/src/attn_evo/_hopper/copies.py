"""Tiles that the copy engine moves, of whole sequences and of chunks.

A thread starts each copy, whose addresses cost the others neither instructions nor registers. Rows
past the end of a sequence arrive as zeros and are not written.
"""

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from attn_core.tiles.gluon_names import reinterpret, tma_load, tma_store

_SWIZZLE = 128  # bytes, as in the tiles that products read


class Tiles(NamedTuple):
    """A tensor [..., tokens, D] that a kernel moves in tiles of `rows` tokens."""

    tensor: torch.Tensor
    rows: int

    def describe(self) -> TensorDescriptor:
        tensor = self.tensor
        tile = [1] * (tensor.dim() - 2) + [self.rows, tensor.shape[-1]]
        layout = gl.NVMMASharedLayout(_SWIZZLE, 8 * tensor.element_size(), rank=tensor.dim())
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), tile, layout)


@gluon.jit
def load_values(desc, b, h, row, full, tile):
    """Start to load rows of [B, H, L, D]; the barrier `full`, which expects them, counts them."""
    place = reinterpret(tile, desc.dtype, desc.block_shape, desc.layout)
    tma_load(desc, [b, h, row, 0], full, place)


@gluon.jit
def load_rows(desc, head, row, full, tile):
    """Start to load rows of [B * H, L, D], as `load_values`."""
    place = reinterpret(tile, desc.dtype, desc.block_shape, desc.layout)
    tma_load(desc, [head, row, 0], full, place)


@gluon.jit
def send_rows(desc, head, row, tile):
    """Start to store rows of [B * H, L, D]; `tma.store_wait` says when they have left the tile."""
    tma_store(desc, [head, row, 0], reinterpret(tile, desc.dtype, desc.block_shape, desc.layout))
