"""What Gluon kernels for Hopper need and Gluon does not name. Importing this imports Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate


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
def accumulator_layout(columns):
    """Layout of 64 rows of results in the registers of a warpgroup."""
    return gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def _barrier_ptx(action, barrier, threads):
    return f"bar.{action} {barrier}, {threads}; mov.u32 $0, 0;"


@gluon.jit
def meet_at(BARRIER: gl.constexpr, THREADS: gl.constexpr):
    """Wait until THREADS threads, this partition's among them, are at a named barrier."""
    PTX: gl.constexpr = _barrier_ptx("sync", BARRIER, THREADS)
    gl.inline_asm_elementwise(PTX, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def arrive_at(BARRIER: gl.constexpr, THREADS: gl.constexpr):
    """Be counted at a named barrier without waiting for the others."""
    PTX: gl.constexpr = _barrier_ptx("arrive", BARRIER, THREADS)
    gl.inline_asm_elementwise(PTX, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


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
def exp2(x):
    """2**x by the hardware's instruction alone; subnormal numbers are 0."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def log2(x):
    """The logarithm by the hardware's instruction alone: right to about 2**-22."""
    return gl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def reciprocal(x):
    """1 / x by the hardware's instruction alone: right to one unit in the last place."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def thread_sums(x):
    """Sum of each thread's own columns of 64 rows of results, [64, 8]: no shuffles."""
    return gl.sum(gl.reshape(x, [x.shape[0], x.shape[1] // 8, 8]), axis=1)


@gluon.jit
def scale_rows(x, factor):
    """Multiply each row of a tile by its factor."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    return x * gl.expand_dims(gl.convert_layout(factor, LAYOUT, assert_trivial=True), 1)
