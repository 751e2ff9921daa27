"""Device functions and layouts that the Hopper kernels share.

Every kernel is persistent: a CTA goes through tiles of 64 rows a warpgroup of one or two rows i of
the pair tensor, one warp loads by TMA and each warpgroup computes on its own rows. In the forward
pass and for dQ the rows of a tile are queries and the loop runs over keys; for dK and dV it is the
other way round, and tiles of scores are transposed.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

ROWS = gl.constexpr(2)  # rows i that share a tile of the bias
WG_ROWS = gl.constexpr(64)  # rows of one warpgroup's tile

# Added to scores. Powers of two: what is added to them rounds away, and their products with the
# scale cancel exactly, so all hidden keys of a query have the same score.
HIDDEN = gl.constexpr(-float(2**100))
ABSENT = gl.constexpr(-float(2**101))
SEES_NONE = gl.constexpr(-1e26)  # above it lies the largest score of any query that sees a key
CLOSED = gl.constexpr(float(2**110))  # an lse that makes all probabilities 0


@gluon.jit
def exp2(x):
    """2 ** x in one instruction: gl.exp2 would add two for denormals."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def thread_sums(x):
    """Sum each thread's own 8 columns of a [64, BLOCK] tile of scores: [64, 8], no shuffles."""
    return gl.sum(gl.reshape(x, [x.shape[0], x.shape[1] // 8, 8]), axis=1)


@gluon.jit
def tile_of(step, sizes, SHARED_BY: gl.constexpr = ROWS):
    """Tile `step` of this CTA: batch, head, first and last row i, and number of the tile.

    The numbers rotate from time to time: tiles of masked keys cost nothing, and without it some
    CTAs would meet them again and again and the others never.
    """
    H, R, num_tiles, num_groups, total = sizes
    t = gl.program_id(0) + step * gl.num_programs(0)
    group = t // num_tiles
    tile = (t + group // num_tiles) % num_tiles
    bh = group // num_groups
    row0 = (group - bh * num_groups) * SHARED_BY
    row1 = gl.minimum(row0 + SHARED_BY - 1, R - 1)
    b = bh // H
    return b, bh - b * H, row0, row1, tile


@gluon.jit
def num_steps(sizes):
    """How many tiles this CTA computes."""
    H, R, num_tiles, num_groups, total = sizes
    return gl.cdiv(total - gl.program_id(0), gl.num_programs(0))


@gluon.jit
def load_rows(desc, b, h, row, start, bar, buf):
    """Load a tile of q, k, v or dout, (B, H, R, N, D) in memory, into a [., D] buffer."""
    shape: gl.constexpr = desc.block_type.shape
    view = buf._reinterpret(desc.dtype, shape, desc.layout)
    tma.async_copy_global_to_shared(desc, [b, h, row, start, 0], bar, view)


@gluon.jit
def load_bias(desc, b, h, start_m, start_n, bar, buf):
    """Load a tile of a bias (B, H, M, N)."""
    shape: gl.constexpr = desc.block_type.shape
    view = buf._reinterpret(desc.dtype, shape, desc.layout)
    tma.async_copy_global_to_shared(desc, [b, h, start_m, start_n], bar, view)


@gluon.jit
def scaled_bias(buf, factor, LAYOUT: gl.constexpr):
    """Read a loaded tile of a bias, times `factor`; see `problem.readable_bias`."""
    bias = buf.load(LAYOUT)
    if buf.dtype != gl.float32:
        bias = bias.to(gl.float32) * factor
    return bias


@gluon.jit
def load_mask(desc, steps, b, row, start_n, bar, buf):
    """Load what the mask adds to the scores of a row's keys, [1, BLOCK]."""
    step_b, step_r = steps
    tma.async_copy_global_to_shared(desc, [b * step_b + row * step_r, start_n], bar, buf)


@gluon.jit
def key_blocks(range_ptr, strides, b, row0, row1, N, HAS_RANGE: gl.constexpr, BLOCK: gl.constexpr):
    """The blocks of keys that either row sees."""
    lo = 0
    hi = gl.cdiv(N, BLOCK)
    if HAS_RANGE:
        stride_b, stride_r = strides
        ptr0 = range_ptr + b * stride_b + row0 * stride_r
        ptr1 = range_ptr + b * stride_b + row1 * stride_r
        lo = gl.minimum(gl.load(ptr0), gl.load(ptr1)) // BLOCK
        hi = gl.maximum(gl.cdiv(gl.maximum(gl.load(ptr0 + 1), gl.load(ptr1 + 1)), BLOCK), lo)
    return lo, hi


# fmt: off
@gluon.jit
def load_keys(
    descs, bufs, ring, steps, count, b, h, row0, row1, start_m, lo, hi,
    HAS_MASK: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    """Load blocks of keys and values of both rows, with the bias and mask of a tile of queries.

    `count` blocks were loaded before. Returns how many there are now.
    """
    k_desc, v_desc, bias_desc, mask_desc = descs
    k_buf, v_buf, bias_buf, mask_buf = bufs
    full, empty = ring
    bias_steps, mask_steps = steps
    bias_b, bias_h = bias_steps
    mask_bytes: gl.constexpr = ROWS * mask_desc.block_type.nbytes if HAS_MASK else 0
    block_bytes: gl.constexpr = (
        ROWS * (k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        + WARPGROUPS * bias_desc.block_type.nbytes
        + mask_bytes
    )
    for block in range(lo, hi):
        i = count % STAGES
        bar = full.index(i)
        start_n = block * BLOCK_N
        mbarrier.wait(empty.index(i), ((count // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, block_bytes)
        for w in gl.static_range(WARPGROUPS):
            load_bias(
                bias_desc, b * bias_b, h * bias_h, start_m + w * WG_ROWS, start_n,
                bar, bias_buf.index(i * WARPGROUPS + w),
            )  # fmt: skip
        for x in gl.static_range(ROWS):
            row = row0 if x == 0 else row1
            own = i * ROWS + x
            if HAS_MASK:
                load_mask(mask_desc, mask_steps, b, row, start_n, bar, mask_buf.index(own))
            load_rows(k_desc, b, h, row, start_n, bar, k_buf.index(own))
            load_rows(v_desc, b, h, row, start_n, bar, v_buf.index(own))
        count += 1
    return count


@gluon.jit
def new_ring(stages: gl.constexpr, readers: gl.constexpr):
    """Barriers of a ring of buffers: full, with one writer, and empty, with `readers`."""
    full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(stages):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=readers)
    return full, empty


# fmt: off
@gluon.jit
def store_rows(
    x, b, h, row, start, length, ptr, strides, HEAD_DIM: gl.constexpr, LAYOUT: gl.constexpr
):
    # fmt: on
    """Store 64 rows of a result (B, H, R, length, D), as many as there are."""
    stride_b, stride_h, stride_r, stride_n, stride_d = strides
    ptr += gl.to_tensor(b).to(gl.int64) * stride_b + gl.to_tensor(h).to(gl.int64) * stride_h
    ptr += gl.to_tensor(row).to(gl.int64) * stride_r + gl.to_tensor(start).to(gl.int64) * stride_n
    offs_n = gl.arange(0, WG_ROWS, layout=gl.SliceLayout(1, LAYOUT))
    offs_d = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    offs = gl.expand_dims(offs_n * stride_n, 1) + gl.expand_dims(offs_d * stride_d, 0)
    mask = (gl.expand_dims(offs_n, 1) < length - start) & (gl.expand_dims(offs_d, 0) < HEAD_DIM)
    gl.store(ptr + offs, x.to(ptr.dtype.element_ty), mask=mask)
