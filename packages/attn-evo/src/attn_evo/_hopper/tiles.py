"""Device functions that the kernels for Hopper share.

Results of a product lie in the accumulators of warpgroups, 64 columns in each.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
)

from attn_core.tiles.gluon_names import async_load
from attn_core.tiles.hopper import reciprocal
from attn_evo._triton.tiles import BIAS_ROWS, twice_gated

STAGES = gl.constexpr(2)  # tiles of v in shared memory
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.constexpr_function
def accumulators(D):
    """Layout of a tile of results: 64 columns in each warpgroup."""
    return gl.NVMMADistributedLayout([3, 0], [4, D // 64], [16, 64, 16])


@gluon.constexpr_function
def copied(D):
    """Layout of a tile in which neighbours in a warp copy whole rows, 16 bytes each."""
    return gl.BlockedLayout([256 // D, 8], [256 // D, D // 8], [D // 16, 1], [1, 0])


@gluon.constexpr_function
def operand(D):
    return gl.DotOperandLayout(0, accumulators(D), 2)


@gluon.jit
def start_copy(tile, ptr, stride, num_rows, ROWS: gl.constexpr, D: gl.constexpr):
    """Start to copy the first `num_rows` rows of [ROWS, D]; the others arrive as zeros."""
    LAYOUT: gl.constexpr = copied(D)
    offs_row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    offs_d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    ptrs = ptr + (offs_row[:, None] * stride + offs_d[None, :])
    mask = (offs_row < num_rows)[:, None] & (offs_d < D)[None, :]
    async_load(tile, ptrs, mask=mask)


@gluon.jit
def sum_rows(ptr, num_rows, D: gl.constexpr, LAYOUT: gl.constexpr):
    """Sum of the first rows of a table [rows, D], always in the same order."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 4], [128 // D, D // 4], [D // 16, 1], [1, 0])
    offs_row = gl.arange(0, 32, gl.SliceLayout(1, ROWS))
    offs_d = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    acc = gl.zeros([32, D], gl.float32, ROWS)
    for start in range(0, num_rows, 32):
        mask = (start + offs_row < num_rows)[:, None] & (offs_d < D)[None, :]
        ptrs = ptr + (start + offs_row)[:, None] * D + offs_d[None, :]
        acc += gl.load(ptrs, mask=mask, other=0.0)
    return gl.convert_layout(gl.sum(acc, 0), LAYOUT)


@gluon.jit
def half_triangle(BLOCK_M: gl.constexpr, dtype: gl.constexpr, D: gl.constexpr):
    """The matrix that sums up a tile's rows to each one, halved.

    It depends on the program's id along a dimension that the grid does not have, 0: where ptxas
    knows what a register of an operand holds, it may set it too late for the first product.
    """
    LAYOUT: gl.constexpr = operand(D)
    offs_m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, LAYOUT))
    offs_k = gl.arange(0, BLOCK_M, gl.SliceLayout(0, LAYOUT)) + gl.program_id(1)
    return gl.where(offs_m[:, None] >= offs_k[None, :], 0.5, 0.0).to(dtype)


@gluon.jit
def twice_inverse(counts):
    """[rows, 1]: 2 / count of the tokens up to each row."""
    return gl.expand_dims(2.0 * reciprocal(counts.to(gl.float32)), 1)


@gluon.jit
def widened(x):
    """16-bit numbers in float32; of bfloat16 in one instruction each."""
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&r,=r,r", [x],
            dtype=gl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:  # noqa: RET505 - decided while compiling
        return x.to(gl.float32)


@gluon.jit
def begin_with(row, BLOCK_M: gl.constexpr, D: gl.constexpr):
    """Accumulators whose rows are all the one [D] in shared memory."""
    row = row.load(gl.SliceLayout(0, accumulators(D)))
    return gl.expand_dims(row, 0).broadcast_to([BLOCK_M, D])


@gluon.jit
def start_linear(x, weight, bias, BLOCK_M: gl.constexpr, D: gl.constexpr):
    """Start x W^T + b; the rows of a bias add up to it, as a product with ones does."""
    ones = gl.full([BLOCK_M, BIAS_ROWS], 1.0, weight.dtype, operand(D))
    y = gl.zeros([BLOCK_M, D], gl.float32, accumulators(D))
    y = warpgroup_mma(ones, bias, y, use_acc=False, is_async=True)
    return warpgroup_mma(x, weight.permute((1, 0)), y, is_async=True)


@gluon.jit
def left_operand(x, tile, D: gl.constexpr):
    """Results as the left side of a product: in registers, or where all warpgroups see them."""
    if D == 64:
        return gl.convert_layout(x, operand(D), assert_trivial=True)
    else:  # noqa: RET505 - decided while compiling
        tile.store(x)
        fence_async_shared()
        return tile


@gluon.jit
def add_magnitudes(x, y):
    """|x| + |y|, in the one instruction that the compiler would make three of."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 x, y; abs.f32 x, $1; abs.f32 y, $2; add.f32 $0, x, y; }", "=f,f,f", [x, y],
        dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def magnitude_bits(v):
    """Bits of 16-bit numbers without their signs, those of two in one and 0 in the other."""
    return gl.inline_asm_elementwise(
        "and.b32 $0, $2, 0x7fff7fff; mov.b32 $1, 0;", "=r,=r,r", [v],
        dtype=gl.int32, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def either(a, b):
    return a | b


@gluon.jit
def has_values(v):
    """Whether a row of 16-bit numbers is not all zero."""
    return gl.reduce(magnitude_bits(v), 1, either) != 0


@gluon.jit
def store_gated_values(v, logit, high_tile, low_tile, dtype: gl.constexpr, D: gl.constexpr):
    """Store 2 sigmoid(2 logit) v as two tiles that add up to it."""
    gated = twice_gated(widened(v.load(accumulators(D))), logit, dtype == gl.bfloat16)
    if dtype == gl.bfloat16:  # cut off, which is cheaper than rounding
        high = (gated.to(gl.int32, bitcast=True) & -65536).to(gl.float32, bitcast=True)
    else:
        high = gated.to(dtype).to(gl.float32)
    high_tile.store(high.to(dtype))
    low_tile.store((gated - high).to(dtype))
    fence_async_shared()


@gluon.constexpr_function
def column_accumulators(D):
    """Layout of 16 columns of D sums each, as `add_column_sums` continues them."""
    return gl.NVMMADistributedLayout([3, 0], [D // 16, 1], [16, 16, 16])


@gluon.constexpr_function
def row_group(D):
    """Layout of 16 rows, of which each thread has 16 bytes."""
    return gl.BlockedLayout([1, 8], [256 // D, D // 8], [D // 16, 1], [1, 0])


@gluon.jit
def magnitude(x):
    """|x|."""
    return gl.inline_asm_elementwise(
        "abs.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def with_sign(x, y):
    """x, negated where the sign of y is set, in the one instruction that a choice is not."""
    return gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, 0x80000000, 0x78;", "=r,r,r", [x, y],
        dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def times_sign(x, y):
    """Give x the sign of y times its own; 0 where y is 0."""
    return gl.where(y > 0, x, gl.where(y < 0, -x, 0.0))


@gluon.jit
def minus_sign(x):
    """The sign of -x in bfloat16, or 0, looking at two numbers at once."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 one, zero; mov.b32 zero, 0; set.neu.bf16x2.bf16x2 one, $1, zero;"
        " lop3.b32 $0, one, $1, 0x80008000, 0xf2; }",
        "=r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def pair_product(x, y):
    """The product of bfloat16, two at once."""
    return gl.inline_asm_elementwise(
        "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def against_sign(x, y):
    """-x, negated where the sign of y is set, of two bfloat16 at once."""
    return gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, 0x80008000, 0xd2;", "=r,r,r", [x, y],
        dtype=gl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def begin_linear(x, weights, biases, which, BLOCK_M: gl.constexpr, D: gl.constexpr):
    """Start x W^T + b, where the biases are vectors [4, D]: shorter than the rows they come as."""
    y = begin_with(biases.index(which), BLOCK_M, D)
    return warpgroup_mma(x, weights.index(which).permute((1, 0)), y, is_async=True)


@gluon.jit
def store_triangle(tile, AFTER: gl.constexpr, BLOCK_M: gl.constexpr, D: gl.constexpr):
    """Store the matrix that sums up a tile's rows from each one on, or to each one, halved."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [D // 16, 1], [1, 0])
    offs_m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, LAYOUT))[:, None]
    offs_k = gl.arange(0, BLOCK_M, gl.SliceLayout(0, LAYOUT))[None, :]
    if AFTER:
        triangle = gl.where(offs_m <= offs_k, 1.0, 0.0)
    else:
        triangle = gl.where(offs_m >= offs_k, 0.5, 0.0)
    tile.store(triangle.to(tile.dtype))
    fence_async_shared()


@gluon.jit
def store_columns_of_ones(tiles, COUNT: gl.constexpr, D: gl.constexpr):
    """Store matrices [16, 16] of which each has ones in another column."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [D // 16, 1], [1, 0])
    column = gl.arange(0, 16, gl.SliceLayout(0, LAYOUT))[None, :]
    row = gl.arange(0, 16, gl.SliceLayout(1, LAYOUT))[:, None]
    for which in gl.static_range(COUNT):
        ones = gl.where((column == which) & (row >= 0), 1.0, 0.0)
        tiles.index(which).store(ones.to(tiles.dtype))
    fence_async_shared()


@gluon.jit
def add_column_sums(acc, tile, ones, which, BLOCK_M: gl.constexpr):
    """Start to add the sum of a tile's rows to one column of acc [D, 16], on tensor cores."""
    for k in gl.static_range(BLOCK_M // 16):
        part = tile.slice(16 * k, 16).permute((1, 0))
        acc = warpgroup_mma(part, ones.index(which), acc, is_async=True)
    return acc


@gluon.jit
def column_sums(acc, WHICH: gl.constexpr, D: gl.constexpr):
    """[D]: what `add_column_sums` has added up."""
    column = gl.arange(0, 16, gl.SliceLayout(0, column_accumulators(D)))[None, :]
    return gl.sum(gl.where(column == WHICH, acc, 0.0), 1)


@gluon.jit
def store_rows(ptr, tile, num_rows, BLOCK_M: gl.constexpr, D: gl.constexpr):
    """Copy the first `num_rows` rows of a tile to memory, where they are contiguous."""
    LAYOUT: gl.constexpr = row_group(D)
    offs_m = gl.arange(0, 16, gl.SliceLayout(1, LAYOUT))[:, None]
    offs_d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :]
    for group in gl.static_range(BLOCK_M // 16):
        mask = (offs_m < num_rows - 16 * group) & (offs_d < D)
        part = tile.slice(16 * group, 16).load(LAYOUT)
        gl.store(ptr + 16 * group * D + (offs_m * D + offs_d), part, mask=mask)


@gluon.jit
def opaque_zero(positive):
    """0, which the compiler does not know.

    Addresses that hang on it are worked out where they are used. Those of all products of a loop
    would otherwise be kept over it, in registers that it needs for tiles.
    """
    return gl.minimum(positive, 0)


@gluon.jit
def store_partial(partial_matrices_ptr, dw, WHICH: gl.constexpr, D: gl.constexpr):
    """Store a program's share of a weight's gradient in [programs, 4, D, D]."""
    rows = gl.arange(0, D, gl.SliceLayout(1, accumulators(D)))[:, None]
    columns = gl.arange(0, D, gl.SliceLayout(0, accumulators(D)))[None, :]
    ptr = partial_matrices_ptr + (gl.program_id(0).to(gl.int64) * 4 + WHICH) * D * D
    gl.store(ptr + rows * D + columns, dw)
