"""Device functions of the kernels that multiply float32 on Hopper.

A number is cut into three of bfloat16 that add up to it, and of the nine products of two numbers'
parts the six largest keep what float32 does. Both sides of a product lie in shared memory, three
tiles each. Two warpgroups hold 32 columns of its results each: a tile takes 16 registers of a
thread, and memory is read and written as the results lie.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from attn_evo._hopper import support
from attn_evo._hopper.tiles import FLAT

WARPS = 8
BLOCK_M = gl.constexpr(support.BLOCK_M)
D = gl.constexpr(support.HELD_DIM)
PARTS = gl.constexpr(3)
_TILE = gl.constexpr(gl.NVMMASharedLayout.get_default_for([support.BLOCK_M, 64], gl.bfloat16))
RESULT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))
COLUMN = gl.constexpr(gl.SliceLayout(1, RESULT))  # a number of each row of results
ROW = gl.constexpr(gl.SliceLayout(0, RESULT))
SPREAD_ROW = gl.constexpr(gl.BlockedLayout([1], [32], [WARPS], [0]))  # in a register of a thread


@gluon.jit
def allocate_tiles(COUNT: gl.constexpr):
    return gl.allocate_shared_memory(gl.bfloat16, [COUNT, BLOCK_M, D], _TILE)


@gluon.jit
def allocate_row():
    return gl.allocate_shared_memory(gl.float32, [D], FLAT)


@gluon.jit
def _offsets(stride):
    return gl.arange(0, BLOCK_M, COLUMN)[:, None] * stride + gl.arange(0, D, ROW)[None, :]


@gluon.jit
def _mask(num_rows):
    offs_m = gl.arange(0, BLOCK_M, COLUMN)[:, None]
    return (offs_m < num_rows) & (gl.arange(0, D, ROW)[None, :] < D)


@gluon.jit
def load_rows(ptr, stride, num_rows):
    """The first `num_rows` rows of a tile; the others read as zeros."""
    return gl.load(ptr + _offsets(stride), mask=_mask(num_rows), other=0.0)


@gluon.jit
def store_rows(ptr, x, num_rows):
    """Store the first `num_rows` rows of a tile, contiguous in memory."""
    gl.store(ptr + _offsets(D), x, mask=_mask(num_rows))


@gluon.jit
def load_row(ptr, LAYOUT: gl.constexpr):
    return gl.load(ptr + gl.arange(0, D, LAYOUT))


@gluon.jit
def store_row(ptr, row):
    gl.store(ptr + gl.arange(0, D, row.type.layout), row)


@gluon.jit
def begin_with(row):
    """Results whose rows are all the same."""
    return gl.expand_dims(row, 0).broadcast_to([BLOCK_M, D])


@gluon.jit
def _upper_half(x):
    return (x.to(gl.int32, bitcast=True) & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def store_parts(tiles, first, x):
    """Store x as three tiles from `first` on, the largest parts in the first."""
    high = _upper_half(x)
    rest = x - high
    middle = _upper_half(rest)
    tiles.index(first).store(high.to(gl.bfloat16))
    tiles.index(first + 1).store(middle.to(gl.bfloat16))
    tiles.index(first + 2).store((rest - middle).to(gl.bfloat16))
    fence_async_shared()


@gluon.jit
def load_weight(tiles, first, matrices_ptr, WHICH: gl.constexpr):
    store_parts(tiles, first, gl.load(matrices_ptr + WHICH * D * D + _offsets(D)))


@gluon.jit
def _add_product(x, y, acc, IS_X_TRANSPOSED: gl.constexpr, IS_Y_TRANSPOSED: gl.constexpr):
    if IS_X_TRANSPOSED:
        x = x.permute((1, 0))
    if IS_Y_TRANSPOSED:
        y = y.permute((1, 0))
    return warpgroup_mma(x, y, acc, is_async=True)


@gluon.jit
def _add_products(
    x, i, y, j, acc, IS_X_TRANSPOSED: gl.constexpr, IS_Y_TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """Start to add the products of parts to acc, smallest ones first."""
    high, middle, low = x.index(i), x.index(i + 1), x.index(i + 2)
    acc = _add_product(low, y.index(j), acc, IS_X_TRANSPOSED, IS_Y_TRANSPOSED)
    acc = _add_product(high, y.index(j + 2), acc, IS_X_TRANSPOSED, IS_Y_TRANSPOSED)
    acc = _add_product(middle, y.index(j + 1), acc, IS_X_TRANSPOSED, IS_Y_TRANSPOSED)
    acc = _add_product(middle, y.index(j), acc, IS_X_TRANSPOSED, IS_Y_TRANSPOSED)
    acc = _add_product(high, y.index(j + 1), acc, IS_X_TRANSPOSED, IS_Y_TRANSPOSED)
    return _add_product(high, y.index(j), acc, IS_X_TRANSPOSED, IS_Y_TRANSPOSED)


@gluon.jit
def begin_linear(x, i, weights, j, bias_ptr):
    """Start x W^T + b, of the parts of x from tile i on and of W from j on."""
    return _add_products(x, i, weights, j, begin_with(load_row(bias_ptr, ROW)), False, True)


@gluon.jit
def add_input_gradient(dy, i, weights, j, dx):
    """Start dx += dy W, where y = x W^T."""
    return _add_products(dy, i, weights, j, dx, False, False)


@gluon.jit
def add_weight_gradient(dy, i, x, j, dw):
    """Start dW += dy^T x, where y = x W^T."""
    return _add_products(dy, i, x, j, dw, True, False)


@gluon.jit
def store_triangle(tile, AFTER: gl.constexpr):
    """Store the matrix that sums up a tile's rows from each one on, or to each one."""
    offs_m = gl.arange(0, BLOCK_M, COLUMN)[:, None]
    offs_k = gl.arange(0, BLOCK_M, ROW)[None, :]
    keep = offs_m <= offs_k if AFTER else offs_m >= offs_k
    tile.store(gl.where(keep, 1.0, 0.0).to(gl.bfloat16))
    fence_async_shared()


@gluon.jit
def start_scan(triangle, x, i):
    """Start to sum up the rows of x that a triangle picks.

    Not on top of the sums before the tile: tensor cores cut off what they do not round.
    """
    acc = gl.zeros([BLOCK_M, D], gl.float32, RESULT)
    acc = warpgroup_mma(triangle, x.index(i + 2), acc, use_acc=False, is_async=True)
    acc = warpgroup_mma(triangle, x.index(i + 1), acc, is_async=True)
    return warpgroup_mma(triangle, x.index(i), acc, is_async=True)


@gluon.jit
def sum_rows(ptr, num_rows, LAYOUT: gl.constexpr):
    """Sum of the first rows of a table [rows, D], always in the same order."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [8, 1], [1, 0])
    offs_row = gl.arange(0, 32, gl.SliceLayout(1, ROWS))
    offs_d = gl.arange(0, D, gl.SliceLayout(0, ROWS))[None, :]
    acc = gl.zeros([32, D], gl.float32, ROWS)
    for start in range(0, num_rows, 32):
        rows = (start + offs_row)[:, None]
        acc += gl.load(ptr + rows * D + offs_d, mask=(rows < num_rows) & (offs_d < D), other=0.0)
    return gl.convert_layout(gl.sum(acc, 0), LAYOUT)


@gluon.jit
def no_column_sums():
    """Sums of no rows, as they are continued by adding `rows_of_threads`."""
    return rows_of_threads(gl.zeros([BLOCK_M, D], gl.float32, RESULT))


@gluon.jit
def rows_of_threads(x):
    """The sums of the two rows that share a thread, which take half of the registers."""
    return gl.sum(gl.reshape(x, [BLOCK_M // 16, 2, 8, D]), 1)


@gluon.jit
def column_sums(sums):
    """[D]: what has been added up."""
    return gl.convert_layout(gl.sum(gl.reshape(sums, [BLOCK_M // 2, D]), 0), ROW)


@gluon.jit
def store_partial(partial_matrices_ptr, dw, WHICH: gl.constexpr):
    """Store a program's share of a weight's gradient in [programs, 4, D, D]."""
    row = gl.program_id(0).to(gl.int64) * 4 + WHICH
    gl.store(partial_matrices_ptr + row * D * D + _offsets(D), dw)
