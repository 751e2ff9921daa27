"""What the kernels need of Hopper and Gluon does not name: barriers of threads, tiles of blocks."""

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

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


def record(cls):
    """Make a class of annotated fields an aggregate whose constructor takes them in order."""
    names = tuple(cls.__annotations__)
    constants = tuple(cls.__annotations__[name] is gl.constexpr for name in names)

    @gluon.constexpr_function
    def fill(self, *values):
        for name, is_constant, value in zip(names, constants, values, strict=True):
            setattr(self, name, gl.constexpr(value) if is_constant else value)

    cls.__init__ = fill
    return aggregate(cls)


@gluon.constexpr_function
def ceil_div(a, b):
    return -(-a // b)


@gluon.constexpr_function
def accumulator_layout(columns):
    """Layout of 64 rows of results in the registers of a warpgroup."""
    return gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def _stage_ptx(action, threads):
    return f"bar.{action} $1, {threads}; mov.u32 $0, 0;"


@gluon.jit
def meet_at_stage(FIRST: gl.constexpr, stage, THREADS: gl.constexpr):
    """Wait at the named barrier of a stage of a ring; stage 0 has barrier FIRST."""
    PTX: gl.constexpr = _stage_ptx("sync", THREADS)
    barrier = gl.to_tensor(FIRST + stage)
    gl.inline_asm_elementwise(PTX, "=r,r", [barrier], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def arrive_at_stage(FIRST: gl.constexpr, stage, THREADS: gl.constexpr):
    """Be counted at the named barrier of a stage of a ring without waiting for the others."""
    PTX: gl.constexpr = _stage_ptx("arrive", THREADS)
    barrier = gl.to_tensor(FIRST + stage)
    gl.inline_asm_elementwise(PTX, "=r,r", [barrier], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def let_next_kernel_start():
    """Start the kernel that was launched to overlap this one, once all programs have got here."""
    gl.inline_asm_elementwise(
        "mov.u32 $0, 0; griddepcontrol.launch_dependents;",
        "=r", [], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def exp2(x):
    """2**x by the hardware's instruction alone; subnormal numbers are 0."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def scale_rows(x, factor):
    LAYOUT: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    return x * gl.expand_dims(gl.convert_layout(factor, LAYOUT, assert_trivial=True), 1)


@gluon.jit
def panel(tile, i):
    """Columns [64 i, 64 i + 64) of a tile: its swizzle stores them one after another."""
    ROWS: gl.constexpr = tile.shape[0]
    PANELS: gl.constexpr = tile.shape[1] // PANEL
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    return tile._reinterpret(tile.dtype, [PANELS, ROWS, PANEL], LAYOUT).index(i)
