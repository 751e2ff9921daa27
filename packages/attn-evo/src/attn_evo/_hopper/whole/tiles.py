"""Device functions of kernels whose programs own a whole sequence.

Where two warpgroups take turns at its pieces, results of a product lie transposed, [D, PIECE]: so
few tokens fill the instructions of tensor cores as columns only.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from attn_core.tiles.gluon_names import async_load
from attn_evo._hopper import support

PIECE = gl.constexpr(support.PIECE)
GROUPS = gl.constexpr(2)  # of warps, which take turns
STAGES = gl.constexpr(2)  # pieces of a group in shared memory
THREADS = gl.constexpr(256)  # that meet at a barrier: those of two groups


@gluon.constexpr_function
def results():
    """Layout of [D, PIECE]."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, support.PIECE, 16])


@gluon.constexpr_function
def square(D):
    """Layout of [D, D]."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])


@gluon.constexpr_function
def sixteen():
    """Layout of [D, 16]."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])


@gluon.constexpr_function
def copied(D):
    """Layout of rows of which each thread has 16 bytes."""
    return gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])


@gluon.jit
def start_copy(tile, ptr, ROWS: gl.constexpr, D: gl.constexpr):
    """Start to copy [ROWS, D], which is contiguous."""
    LAYOUT: gl.constexpr = copied(D)
    offs_row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))[:, None]
    offs_d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :]
    async_load(tile, ptr + (offs_row * D + offs_d))


@gluon.jit
def load_transposed(tile):
    """[D, PIECE] in float32, of a tile [PIECE, D]."""
    return tile.permute((1, 0)).load(results()).to(gl.float32)


@gluon.jit
def store_transposed(tile, x):
    tile.permute((1, 0)).store(x.to(tile.dtype))


@gluon.jit
def load_column(row):
    """[D, 1] beside results, of the one [D] in shared memory."""
    return gl.expand_dims(row.load(gl.SliceLayout(1, results())), 1)


@gluon.jit
def start_linear(x, weight, bias, D: gl.constexpr):
    """Start W x^T + b of a tile x [PIECE, D]."""
    y = load_column(bias).broadcast_to([D, PIECE])
    return warpgroup_mma(weight, x.permute((1, 0)), y, is_async=True)


@gluon.jit
def start_input_gradient(dy, weight, D: gl.constexpr):
    """Start W^T dy^T of a tile dy [PIECE, D]."""
    dx = gl.zeros([D, PIECE], gl.float32, results())
    dy = dy.permute((1, 0))
    return warpgroup_mma(weight.permute((1, 0)), dy, dx, use_acc=False, is_async=True)


@gluon.jit
def start_scan(x, triangle, D: gl.constexpr):
    """Start the sums of a tile's rows up to each one, or from each one on."""
    y = gl.zeros([D, PIECE], gl.float32, results())
    return warpgroup_mma(x.permute((1, 0)), triangle, y, use_acc=False, is_async=True)


@gluon.jit
def store_triangle(tile, AFTER: gl.constexpr, dtype: gl.constexpr):
    """Store the matrix that sums up rows from each one on, or to each one, halved."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    row = gl.arange(0, PIECE, gl.SliceLayout(1, LAYOUT))[:, None]
    column = gl.arange(0, PIECE, gl.SliceLayout(0, LAYOUT))[None, :]
    if AFTER:
        triangle = gl.where(row >= column, 1.0, 0.0)
    else:
        triangle = gl.where(row <= column, 0.5, 0.0)
    tile.store(triangle.to(dtype))


@gluon.jit
def first_token(x):
    """[D]: the first column of results."""
    column = gl.arange(0, PIECE, gl.SliceLayout(0, results()))[None, :]
    return gl.sum(gl.where(column == 0, x, 0.0), 1)


@gluon.jit
def store_ones(tile, dtype: gl.constexpr):
    """Store a matrix [16, 16] that has ones in its first column."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    column = gl.arange(0, 16, gl.SliceLayout(0, LAYOUT))[None, :]
    row = gl.arange(0, 16, gl.SliceLayout(1, LAYOUT))[:, None]
    tile.store(gl.where((column == 0) & (row >= 0), 1.0, 0.0).to(dtype))


@gluon.jit
def add_row_sums(acc, tile, ones):
    """Start to add the sum of a tile's rows to the first column of acc [D, 16]."""
    for k in gl.static_range(PIECE // 16):
        part = tile.slice(16 * k, 16).permute((1, 0))
        acc = warpgroup_mma(part, ones, acc, is_async=True)
    return acc


@gluon.jit
def first_column(acc):
    """[D]: what `add_row_sums` has added up."""
    column = gl.arange(0, 16, gl.SliceLayout(0, sixteen()))[None, :]
    return gl.sum(gl.where(column == 0, acc, 0.0), 1)
