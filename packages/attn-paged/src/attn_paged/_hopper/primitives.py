"""What the kernels need of Hopper and Gluon does not name: tiles of blocks, early launches."""

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from attn_core.tiles.gluon_names import reinterpret

PANEL = gl.constexpr(64)  # columns of 16-bit numbers that a 128-byte swizzle keeps together


class Blocks(NamedTuple):
    """An argument: a cache (blocks, block size, H_KV, D) in tiles of `rows` slots of a head."""

    tensor: torch.Tensor
    rows: int

    def describe(self) -> TensorDescriptor:
        """Return what Triton launches with: [blocks, H_KV, block size, D] in panels of columns."""
        cache = self.tensor.transpose(1, 2)
        layout = gl.NVMMASharedLayout(128, 8 * cache.element_size(), rank=4)
        tile = [1, 1, self.rows, PANEL.value]
        return TensorDescriptor(cache, list(cache.shape), list(cache.stride()), tile, layout)


@gluon.constexpr_function
def ceil_div(a, b):
    return -(-a // b)


@gluon.jit
def let_next_kernel_start():
    """Start the kernel that was launched to overlap this one, once all programs have got here."""
    gl.inline_asm_elementwise(
        "mov.u32 $0, 0; griddepcontrol.launch_dependents;",
        "=r", [], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def panel(tile, i):
    """Columns [64 i, 64 i + 64) of a tile: its swizzle stores them one after another."""
    ROWS: gl.constexpr = tile.shape[0]
    PANELS: gl.constexpr = tile.shape[1] // PANEL
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    return reinterpret(tile, tile.dtype, [PANELS, ROWS, PANEL], LAYOUT).index(i)
