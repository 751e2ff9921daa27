"""Device functions that the kernels for Hopper share.

Results of a product lie in the accumulators of warpgroups, 64 columns in each.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
)

W_Q = gl.constexpr(0)
W_L = gl.constexpr(1)
W_F = gl.constexpr(2)
W_G = gl.constexpr(3)
NORM_WEIGHT = gl.constexpr(4)
NORM_BIAS = gl.constexpr(5)

BIAS_ROWS = gl.constexpr(16)
STAGES = gl.constexpr(2)  # tiles of v in shared memory
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
_MINUS_2_LOG2_E = gl.constexpr(-2.8853900817779268)
_LARGEST_HALF = gl.constexpr(65504.0)


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
def _tanh(x):
    return gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def reciprocal(x):
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def twice_gated(y, x, IS_BFLOAT16: gl.constexpr):
    """2 sigmoid(2 x) y; next to bfloat16 the 2.5e-4 that tanh.approx errs are nothing."""
    if IS_BFLOAT16:
        gated = _tanh(x) * y + y
    else:
        gated = 2.0 * reciprocal(1.0 + gl.exp2(x * _MINUS_2_LOG2_E)) * y
    return gated


@gluon.jit
def start_copy(tile, ptr, stride, num_rows, ROWS: gl.constexpr, D: gl.constexpr):
    """Start to copy the first `num_rows` rows of [ROWS, D]; the others arrive as zeros."""
    LAYOUT: gl.constexpr = copied(D)
    offs_row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    offs_d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    ptrs = ptr + (offs_row[:, None] * stride + offs_d[None, :])
    mask = (offs_row < num_rows)[:, None] & (offs_d < D)[None, :]
    async_copy.async_copy_global_to_shared(tile, ptrs, mask=mask)


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
def rounded(x, dtype: gl.constexpr):
    """Round; near a pole float16 takes its largest number for infinity."""
    if dtype == gl.float16:
        x = gl.minimum(gl.maximum(x, -_LARGEST_HALF), _LARGEST_HALF)
    return x.to(dtype)
