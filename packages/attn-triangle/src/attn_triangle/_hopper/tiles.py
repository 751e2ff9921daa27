"""Device functions and layouts that the Hopper kernels share.

Every kernel is persistent: a CTA goes through tiles, one warp loads by TMA and three or four
warpgroups compute, each on 64 rows of its own. A warpgroup waits for its products before it goes
on; the others have work meanwhile, and with registers for few tiles of scores there are enough of
them. In the forward pass and for dQ the rows of a tile are queries and the loop runs over keys; for
dK and dV it is the other way round, and tiles of scores are transposed; for dB a warpgroup owns a
tile of scores and the loop runs over the rows i of the pair tensor.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
)

from attn_core.tiles.gluon_names import reinterpret, thread_barrier, tma_load, tma_store
from attn_core.tiles.softmax import LOG2_E as _LOG2_E

WG_ROWS = gl.constexpr(64)  # rows of one warpgroup's tile
LOG2_E = gl.constexpr(_LOG2_E.value)

# Added to scores. Powers of two: what is added to them rounds away, and their products with the
# scale cancel exactly, so all hidden keys of a query have the same score.
HIDDEN = gl.constexpr(-float(2**100))
ABSENT = gl.constexpr(-float(2**101))
SEES_NONE = gl.constexpr(-1e26)  # above it lies the largest score of any query that sees a key
CLOSED = gl.constexpr(float(2**110))  # an lse that makes all probabilities 0


@gluon.jit
def load_wide(buf, LAYOUT: gl.constexpr):
    """Read a tile in float32. Of bfloat16 a number takes one instruction, by Triton's cast more."""
    x = buf.load(LAYOUT)
    if buf.dtype == gl.bfloat16:
        wide = gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=f,=f,r", [x], dtype=gl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        wide = x.to(gl.float32)
    return wide


@gluon.jit
def load_lse(ptrs, mask):
    """Read the lse of queries; -inf where there is none."""
    return gl.load(ptrs, mask=mask, other=-float("inf"))


@gluon.jit
def closed(lse):
    """An lse in units of log2; that of a query without keys leaves no weight."""
    return gl.where(lse == -float("inf"), CLOSED, lse * LOG2_E)


@gluon.jit
def place_of(t, sizes):
    """Batch, head, group of rows i and tile, given the number of a tile."""
    H, R, num_tiles, num_groups, total = sizes
    plane = t // num_tiles
    bh = plane // num_groups
    b = bh // H
    return b, bh - b * H, plane - bh * num_groups, t - plane * num_tiles


@gluon.jit
def _carried(x, size):
    """A digit that may be too large by its size, once, and what the next one gets."""
    carry = gl.where(x >= size, 1, 0)
    return x - carry * size, carry


@gluon.jit
def moved(place, distance, sizes):
    """The sum of two places, without the divisions that it takes to find one."""
    H, R, num_tiles, num_groups, total = sizes
    b, h, group, tile = place
    tile, carry = _carried(tile + distance[3], num_tiles)
    group, carry = _carried(group + distance[2] + carry, num_groups)
    h, carry = _carried(h + distance[1] + carry, H)
    return b + distance[0] + carry, h, group, tile


@gluon.jit
def rows_of(group, sizes, ROWS: gl.constexpr):
    """First and last row i of a group."""
    H, R, num_tiles, num_groups, total = sizes
    return group * ROWS, gl.minimum(group * ROWS + ROWS, R) - 1


@gluon.jit
def num_steps(sizes):
    """How many tiles this CTA computes, of as many as the last of sizes says."""
    total = sizes[-1]
    return gl.cdiv(total - gl.program_id(0), gl.num_programs(0))


@gluon.jit
def load_rows(desc, b, h, row, start, bar, buf):
    """Load a tile of q, k, v or dout, (B, H, R, N, D) in memory, into a [., D] buffer."""
    shape: gl.constexpr = desc.block_type.shape
    view = reinterpret(buf, desc.dtype, shape, desc.layout)
    tma_load(desc, [b, h, row, start, 0], bar, view)


@gluon.jit
def store_rows(x, buf, desc, b, h, row, start):
    """Store 64 rows of a result (B, H, R, N, D) by way of `buf`, as many as there are.

    The copy engine still reads `buf` when this returns.
    """
    buf.store(x.to(desc.dtype))
    fence_async_shared()
    shape: gl.constexpr = desc.block_type.shape
    view = reinterpret(buf, desc.dtype, shape, desc.layout)
    tma_store(desc, [b, h, row, start, 0], view)


@gluon.jit
def load_bias(desc, b, h, start_m, start_n, bar, buf):
    """Load a tile of a bias (B, H, M, N)."""
    shape: gl.constexpr = desc.block_type.shape
    view = reinterpret(buf, desc.dtype, shape, desc.layout)
    tma_load(desc, [b, h, start_m, start_n], bar, view)


@gluon.jit
def load_mask(desc, steps, b, row, start_n, bar, buf):
    """Load what the mask adds to the scores of a row's keys, [1, BLOCK]."""
    step_b, step_r = steps
    tma_load(desc, [b * step_b + row * step_r, start_n], bar, buf)


@gluon.jit
def visible_keys(range_ptr, strides, b, row0, last, ROWS: gl.constexpr):
    """From which key to which the rows of a group see any."""
    stride_b, stride_r = strides
    range_ptr += b * stride_b
    first = gl.minimum(row0, last)
    start = gl.load(range_ptr + first * stride_r)
    end = gl.load(range_ptr + first * stride_r + 1)
    for x in gl.static_range(1, ROWS):
        ptr = range_ptr + gl.minimum(row0 + x, last) * stride_r
        start = gl.minimum(start, gl.load(ptr))
        end = gl.maximum(end, gl.load(ptr + 1))
    return start, end


# fmt: off
@gluon.jit
def key_blocks(
    range_ptr, strides, b, row0, last, N,
    HAS_RANGE: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr,
):
    # fmt: on
    """The blocks of keys that any row of a group sees."""
    lo = 0
    hi = gl.cdiv(N, BLOCK)
    if HAS_RANGE:
        start, end = visible_keys(range_ptr, strides, b, row0, last, ROWS)
        lo = start // BLOCK
        hi = gl.maximum(gl.cdiv(end, BLOCK), lo)
    return lo, hi


@gluon.jit
def block_of(turn, lo, hi, is_back):
    """Which block of lo to hi has its turn, be it from the first to the last or back (1)."""
    return turn + is_back * (lo + hi - 1 - 2 * turn)


# fmt: off
@gluon.jit
def load_keys(
    descs, bufs, ring, steps, count, b, h, row0, last, start_m, lo, hi, is_back,
    HAS_MASK: gl.constexpr, TILES: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    # fmt: on
    """Load blocks of the keys and values of all rows, with the bias and mask of their queries.

    With `is_back` the last block comes first. `count` blocks were loaded before. Returns how many
    there are now.
    """
    k_desc, v_desc, bias_desc, mask_desc = descs
    k_buf, v_buf, bias_buf, mask_buf = bufs
    full, empty = ring
    bias_steps, mask_steps = steps
    bias_b, bias_h = bias_steps
    mask_bytes: gl.constexpr = mask_desc.block_type.nbytes if HAS_MASK else 0
    row_bytes: gl.constexpr = k_desc.block_type.nbytes + v_desc.block_type.nbytes + mask_bytes
    block_bytes: gl.constexpr = ROWS * row_bytes + TILES * bias_desc.block_type.nbytes
    for turn in range(lo, hi):
        i = count % STAGES
        bar = full.index(i)
        start_n = block_of(turn, lo, hi, is_back) * BLOCK_N
        mbarrier.wait(empty.index(i), ((count // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, block_bytes)
        for x in gl.static_range(ROWS):
            row = gl.minimum(row0 + x, last)
            load_rows(k_desc, b, h, row, start_n, bar, k_buf.index(i * ROWS + x))
            load_rows(v_desc, b, h, row, start_n, bar, v_buf.index(i * ROWS + x))
            if HAS_MASK:
                load_mask(mask_desc, mask_steps, b, row, start_n, bar, mask_buf.index(i * ROWS + x))
        for w in gl.static_range(TILES):
            load_bias(
                bias_desc, b * bias_b, h * bias_h, start_m + w * WG_ROWS, start_n,
                bar, bias_buf.index(i * TILES + w),
            )  # fmt: skip
        count += 1
    return count


@gluon.jit
def new_ring(stages: gl.constexpr, readers: gl.constexpr, WRITERS: gl.constexpr = 1):
    """Barriers of a ring of buffers: full, with WRITERS, and empty, with `readers`."""
    full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(stages):
        mbarrier.init(full.index(s), count=WRITERS)
        mbarrier.init(empty.index(s), count=readers)
    return full, empty


@gluon.jit
def new_tiles(dtype, count, rows, columns):
    """Memory for tiles of rows by columns that products read."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)
    return gl.allocate_shared_memory(dtype, [count, rows, columns], LAYOUT)


@gluon.jit
def new_mask_rows(desc, unread, HAS_MASK: gl.constexpr, COUNT: gl.constexpr, BLOCK: gl.constexpr):
    """Memory for what a mask adds to the scores of BLOCK keys, or `unread` without a mask."""
    rows = unread
    if HAS_MASK:
        rows = gl.allocate_shared_memory(gl.float32, [COUNT, 1, BLOCK], desc.layout)
    return rows


# fmt: off
@gluon.jit
def new_query_buffers(
    q_desc, bias_desc, mask_desc,
    HAS_MASK: gl.constexpr, TILES: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, READERS: gl.constexpr,
):
    # fmt: on
    """Memory for two tiles of queries and dO and for blocks of what streams by, with barriers."""
    dtype: gl.constexpr = q_desc.dtype
    q_buf = new_tiles(dtype, 2 * TILES * ROWS, WG_ROWS, BLOCK_D)
    do_buf = new_tiles(dtype, 2 * TILES * ROWS, WG_ROWS, BLOCK_D)
    k_buf = new_tiles(dtype, STAGES * ROWS, BLOCK_N, BLOCK_D)
    v_buf = new_tiles(dtype, STAGES * ROWS, BLOCK_N, BLOCK_D)
    bias_buf = new_tiles(bias_desc.dtype, STAGES * TILES, WG_ROWS, BLOCK_N)
    mask_buf = new_mask_rows(mask_desc, k_buf, HAS_MASK, STAGES * ROWS, BLOCK_N)
    q_full, q_empty = new_ring(2, READERS)
    full, empty = new_ring(STAGES, READERS)
    thread_barrier()
    rings = (q_full, q_empty, full, empty)
    return (q_buf, do_buf), (k_buf, v_buf, bias_buf, mask_buf), rings


@gluon.jit
def load_queries(
    queries, ring, step, b, h, row0, last, start_m, TILES: gl.constexpr, ROWS: gl.constexpr
):
    """Load the queries of the program's tile `step`, and dO if it is among them."""
    descs, bufs = queries
    full, empty = ring
    OPERANDS: gl.constexpr = len(descs)
    slot = step & 1
    bar = full.index(slot)
    mbarrier.wait(empty.index(slot), ((step >> 1) & 1) ^ 1)
    mbarrier.expect(bar, OPERANDS * ROWS * TILES * descs[0].block_type.nbytes)
    for x in gl.static_range(ROWS):
        row = gl.minimum(row0 + x, last)
        for w in gl.static_range(TILES):
            own = (slot * ROWS + x) * TILES + w
            start = start_m + w * WG_ROWS
            for o in gl.static_range(OPERANDS):
                load_rows(descs[o], b, h, row, start, bar, bufs[o].index(own))


# fmt: off
@gluon.jit
def load_queries_and_keys(
    args, step, count, b, h, row0, last, tile, is_back,
    HAS_MASK: gl.constexpr, HAS_RANGE: gl.constexpr, TILES: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    """Load queries of a tile, dO too if it is among them, then blocks of keys, values and so on.

    `count` blocks were loaded before. Returns how many there are now.
    """
    queries, streamed, rings, sizes, N, range_ptr, strides = args
    descs, bufs = streamed
    q_full, q_empty, full, empty = rings
    range_strides, bias_strides, mask_steps = strides
    start_m = tile * (TILES * WG_ROWS)
    load_queries(queries, (q_full, q_empty), step, b, h, row0, last, start_m, TILES, ROWS)
    lo, hi = key_blocks(range_ptr, range_strides, b, row0, last, N, HAS_RANGE, ROWS, BLOCK_N)
    return load_keys(
        descs, bufs, (full, empty), (bias_strides, mask_steps), count, b, h, row0, last,
        start_m, lo, hi, is_back, HAS_MASK, TILES, ROWS, BLOCK_N, STAGES,
    )  # fmt: skip


# fmt: off
@gluon.jit
def load_tiles(
    args,
    HAS_MASK: gl.constexpr, HAS_RANGE: gl.constexpr, TILES: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    """The loading warp: queries of a tile, then its blocks of keys, values, bias and mask."""
    queries, streamed, rings, sizes, N, range_ptr, strides = args
    count = 0
    place = place_of(gl.program_id(0), sizes)
    distance = place_of(gl.num_programs(0), sizes)
    for step in range(num_steps(sizes)):
        b, h, group, tile = place
        row0, last = rows_of(group, sizes, ROWS)
        count = load_queries_and_keys(
            args, step, count, b, h, row0, last, tile, 0,
            HAS_MASK, HAS_RANGE, TILES, ROWS, BLOCK_N, STAGES,
        )  # fmt: skip
        place = moved(place, distance, sizes)
