"""Attention to prefixes that many sequences share, for sm_90a: a dense product in all but address.

One warp copies blocks of keys and values, two warpgroups compute 64 rows each: queries of a group
of sequences times heads that share a key head. A program takes its share of the units of work that
`worklist` has counted, as the kernel of `_triton.attention` does, and leaves the same parts. A
warpgroup starts the scores of a tile of keys together with the output of the tile before, and does
its softmax while the other's products run (Shah et al., "FlashAttention-3", 2024).
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_core import tiling
from attn_core.device import device_info
from attn_core.gluon_launch import GluonLauncher
from attn_core.tiles.gluon_names import reinterpret, thread_barrier, tma_load
from attn_core.tiles.hopper import (
    accumulator_layout,
    arrive_at_stage,
    exp2,
    meet_at_stage,
    record,
    scale_rows,
    thread_sums,
)
from attn_paged._hopper.primitives import PANEL, Blocks, ceil_div, let_next_kernel_start, panel
from attn_paged._hopper.support import BLOCK_N
from attn_paged._triton import problem, worklist
from attn_paged._triton.merge import Parts

ROWS = gl.constexpr(64)  # of a warpgroup
_K_EMPTY = gl.constexpr(6)  # named barriers, one a stage; those below are the compiler's
_V_EMPTY = gl.constexpr(10)
_THREADS = gl.constexpr(2 * 128 + 32)  # both warpgroups and the warp that copies
_LN_2 = gl.constexpr(0.6931471805599453)


@record
class _Tensors:
    """What is read and written."""

    q_ptr: gl.tensor  # [T, H, D]
    k: tma.tensor_descriptor  # [blocks, H_KV, block size, D] in boxes, as v
    v: tma.tensor_descriptor
    table_ptr: gl.tensor  # [B, blocks of a sequence]
    lens_ptr: gl.tensor  # [B], keys of each prefix
    bounds_ptr: gl.tensor  # [B + 1], where the queries of each group begin
    rows_ptr: gl.tensor  # [T], the row of q of each query
    ends_ptr: gl.tensor  # [num_tiles + 1], from `worklist`
    out_ptr: gl.tensor  # [T, H, D_v]
    lse_ptr: gl.tensor  # [H, T]
    parts_ptr: gl.tensor  # [slots, BLOCK_M, D_v]
    parts_lse_ptr: gl.tensor  # [slots, BLOCK_M], in units of log2


@record
class _Shared:
    """Shared memory of a program, and the barriers that say what is in it."""

    q: gl.shared_memory_descriptor  # [2, ROWS, BLOCK_D]
    k: gl.shared_memory_descriptor  # [STAGES, BLOCK_N, BLOCK_D]
    v: gl.shared_memory_descriptor  # [STAGES, BLOCK_N, BLOCK_DV]
    k_full: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor


@record
class _Problem:
    """Sizes, strides and the scale of the call."""

    stride_qt: gl.tensor  # in units of 8 numbers, as stride_qh
    stride_qh: gl.tensor
    stride_tb: gl.tensor
    stride_tn: gl.tensor
    T: gl.tensor
    B: gl.tensor
    num_blocks: gl.tensor  # of the cache
    num_tiles: gl.tensor
    scale_log2: gl.tensor
    NEGATE_Q: gl.constexpr
    GROUP: gl.constexpr
    TILE_GROUP: gl.constexpr
    H_KV: gl.constexpr
    HEAD_DIM: gl.constexpr
    HEAD_DIM_V: gl.constexpr
    BLOCK_SIZE: gl.constexpr
    BLOCK_T: gl.constexpr
    BLOCK_N: gl.constexpr


@record
class _Share:
    """A program's units of work, and the heads that it takes them up for."""

    head_tile: gl.tensor
    number: gl.tensor
    start: gl.tensor
    stop: gl.tensor


@record
class _Segment:
    """Those units of a share that are one tile of queries', and tiles of its keys."""

    b: gl.tensor
    first_row: gl.tensor  # place of the first query among those of all groups
    rows: gl.tensor  # queries from there on
    N: gl.tensor
    first: gl.tensor  # tiles of keys [first, last)
    last: gl.tensor
    is_whole: gl.tensor
    slot: gl.tensor
    next_unit: gl.tensor


@gluon.constexpr_function
def _vector_layout(length, warps):
    return gl.BlockedLayout([length // (32 * warps)], [32], [warps], [0])


@gluon.jit
def _share(tensors, problem):
    HEAD_TILES: gl.constexpr = problem.H_KV * ceil_div(problem.GROUP, problem.TILE_GROUP)
    pid = gl.program_id(0)
    total = gl.load(tensors.ends_ptr + (problem.num_tiles - 1))
    share = gl.load(tensors.ends_ptr + problem.num_tiles)
    number = pid // HEAD_TILES
    start = number * share
    return _Share(pid % HEAD_TILES, number, start, gl.minimum(start + share, total))


@gluon.jit
def _segment(tensors, problem, share, unit, WARPS: gl.constexpr):
    """Find the tile that a unit of work belongs to; everybody looks at all of them at once."""
    BLOCK_Q: gl.constexpr = 2 * ROWS // problem.TILE_GROUP
    LAYOUT: gl.constexpr = _vector_layout(problem.BLOCK_T, WARPS)
    offs = gl.arange(0, problem.BLOCK_T, layout=LAYOUT)
    ends = gl.load(tensors.ends_ptr + offs, mask=offs < problem.num_tiles, other=2**31 - 1)
    bounds = gl.load(tensors.bounds_ptr + offs, mask=offs <= problem.B, other=0)
    tile = gl.sum(gl.where(ends <= unit, 1, 0), axis=0)
    begin = gl.max(gl.where(ends <= unit, ends, 0), axis=0)
    is_before = (offs <= problem.B) & (bounds // BLOCK_Q + offs <= tile)
    b = gl.sum(gl.where(is_before, 1, 0), axis=0) - 1
    first = gl.load(tensors.bounds_ptr + b)
    M = gl.load(tensors.bounds_ptr + b + 1, mask=b < problem.B, other=0) - first
    start_m = (tile - first // BLOCK_Q - b) * BLOCK_Q
    N = gl.load(tensors.lens_ptr + b, mask=b < problem.B, other=0)
    tiles = gl.maximum(gl.cdiv(N, problem.BLOCK_N), 1)  # a tile of hidden keys where there are none
    last = gl.minimum(tiles, share.stop - begin)
    slot = 2 * share.number + gl.where(unit == share.start, 0, 1)
    is_whole = (unit == begin) & (last == tiles)
    # A tile may have more units than tiles of keys, so that the next one begins with a program.
    next_unit = gl.where(last == tiles, gl.load(tensors.ends_ptr + tile), begin + last)
    return _Segment(
        b, first + start_m, M - start_m, N, unit - begin, last, is_whole, slot, next_unit
    )


@gluon.jit
def _load_block(
    desc, buffers, fulls, EMPTY: gl.constexpr, problem, ids, slot, h, count,
):  # fmt: skip
    """Copy a tile of keys or values, the program's number `count`, box by box."""
    STAGES: gl.constexpr = buffers.shape[0]
    BOX: gl.constexpr = desc.block_shape[2]
    BOXES: gl.constexpr = problem.BLOCK_N // BOX
    PANELS: gl.constexpr = buffers.shape[2] // PANEL
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    i = count % STAGES
    if count >= STAGES:
        meet_at_stage(EMPTY, i, _THREADS)
    full = fulls.index(i)
    mbarrier.expect(full, desc.block_type.nbytes * (BOXES * PANELS))
    for c in gl.static_range(PANELS):
        boxes = reinterpret(panel(buffers.index(i), c), desc.dtype, [BOXES, BOX, PANEL], LAYOUT)
        for j in gl.static_range(BOXES):
            tile = reinterpret(boxes.index(j), desc.dtype, desc.block_shape, desc.layout)
            tma_load(desc, [ids[j], h, slot, c * PANEL], full, tile)


@gluon.jit
def _block_ids(tensors, problem, segment, tile):
    """Blocks of a tile of keys; past the last key a block that is not there arrives as zeros."""
    BOXES: gl.constexpr = ceil_div(problem.BLOCK_N, problem.BLOCK_SIZE)
    table_ptr = tensors.table_ptr + gl.cast(segment.b, gl.int64) * problem.stride_tb
    ids = ()
    for j in gl.static_range(BOXES):
        key = tile * problem.BLOCK_N + j * problem.BLOCK_SIZE
        place = gl.cast(key // problem.BLOCK_SIZE, gl.int64) * problem.stride_tn
        is_there = (key < segment.N) & (tile >= segment.first)
        ids = ids + (gl.load(table_ptr + place, mask=is_there, other=problem.num_blocks),)  # noqa: RUF005
    return ids


@gluon.jit
def _absorb(buffers, EMPTY: gl.constexpr, count):
    """Meet the consumers' last arrivals, which must not outlive the program."""
    STAGES: gl.constexpr = buffers.shape[0]
    for j in range(gl.maximum(count - STAGES, 0), count):
        meet_at_stage(EMPTY, j % STAGES, _THREADS)


@gluon.jit
def _load(tensors, shared, problem):
    """Copy keys and values from the last tile of each segment to the first."""
    share = _share(tensors, problem)
    h = share.head_tile % problem.H_KV
    unit = share.start
    count = 0
    while unit < share.stop:
        segment = _segment(tensors, problem, share, unit, 1)
        ids = _block_ids(tensors, problem, segment, segment.last - 1)
        for tile in range(segment.last - 1, segment.first - 1, -1):
            slot = tile * problem.BLOCK_N % problem.BLOCK_SIZE
            _load_block(tensors.k, shared.k, shared.k_full, _K_EMPTY, problem, ids, slot, h, count)
            _load_block(tensors.v, shared.v, shared.v_full, _V_EMPTY, problem, ids, slot, h, count)
            ids = _block_ids(tensors, problem, segment, tile - 1)
            count += 1
        unit = segment.next_unit
    _absorb(shared.k, _K_EMPTY, count)
    _absorb(shared.v, _V_EMPTY, count)


@gluon.jit
def _rows(tensors, problem, share, segment, offs_m):
    """Return head, row of q and whether there is one, for rows `offs_m` of a tile."""
    offs_q = offs_m // problem.TILE_GROUP
    offs_g = share.head_tile // problem.H_KV * problem.TILE_GROUP + offs_m % problem.TILE_GROUP
    BLOCK_Q: gl.constexpr = 2 * ROWS // problem.TILE_GROUP
    mask_m = (offs_q < BLOCK_Q) & (offs_q < segment.rows) & (offs_g < problem.GROUP)
    heads = share.head_tile % problem.H_KV * problem.GROUP + offs_g
    tokens = gl.load(tensors.rows_ptr + segment.first_row + offs_q, mask=mask_m, other=0)
    return heads, tokens, mask_m


@gluon.jit
def _load_queries(tensors, shared, problem, share, segment, W: gl.constexpr):
    """Gather the rows of a tile; the copy engine knows no lists."""
    BLOCK_D: gl.constexpr = shared.q.shape[2]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    offs_m = W * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    offs_d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, LAYOUT))
    heads, tokens, mask_m = _rows(tensors, problem, share, segment, offs_m)
    offs = gl.cast(tokens, gl.int64) * problem.stride_qt + heads * problem.stride_qh
    offs = gl.expand_dims(offs * 8, 1) + gl.expand_dims(offs_d, 0)
    mask = gl.expand_dims(mask_m, 1) & gl.expand_dims(offs_d < problem.HEAD_DIM, 0)
    q = gl.load(tensors.q_ptr + offs, mask=mask, other=0.0)
    if problem.NEGATE_Q:  # a running maximum needs a scale that is not negative
        q = -q
    shared.q.index(W).store(q)
    fence_async_shared()
    thread_barrier()


@gluon.jit
def _start_scores(shared, problem, count, W: gl.constexpr):
    STAGES: gl.constexpr = shared.k.shape[0]
    LAYOUT: gl.constexpr = accumulator_layout(problem.BLOCK_N)
    i = count % STAGES
    mbarrier.wait(shared.k_full.index(i), (count // STAGES) & 1)
    zeros = gl.zeros([ROWS, problem.BLOCK_N], gl.float32, LAYOUT)
    k = shared.k.index(i).permute((1, 0))
    return warpgroup_mma(shared.q.index(W), k, zeros, use_acc=False, is_async=True)


@gluon.jit
def _start_output(shared, p, acc, count):
    STAGES: gl.constexpr = shared.v.shape[0]
    i = count % STAGES
    mbarrier.wait(shared.v_full.index(i), (count // STAGES) & 1)
    return warpgroup_mma(p, shared.v.index(i), acc, is_async=True)


@gluon.jit
def _release(buffers, EMPTY: gl.constexpr, count):
    arrive_at_stage(EMPTY, count % buffers.shape[0], _THREADS)


@gluon.jit
def _softmax(s, m_i, problem):
    """Return P, the new running maximum and the factor of sums that used the old one."""
    m_new = gl.maximum(m_i, gl.max(s, axis=1))
    pivot = gl.where(m_new == float("-inf"), 0.0, m_new * problem.scale_log2)
    alpha = exp2(m_i * problem.scale_log2 - pivot)
    return exp2(s * problem.scale_log2 - gl.expand_dims(pivot, 1)), m_new, alpha


@gluon.jit
def _hide_past_end(s, N, key):
    LAYOUT: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    keys = key + gl.arange(0, s.shape[1], layout=LAYOUT)
    return gl.where(gl.expand_dims(keys < N, 0), s, float("-inf"))


@gluon.jit
def _store(tensors, problem, share, segment, acc, m_i, sums, W: gl.constexpr):
    """Write the rows of a tile to out, or to a part where other programs see keys of it too."""
    HEAD_TILES: gl.constexpr = problem.H_KV * ceil_div(problem.GROUP, problem.TILE_GROUP)
    LAYOUT: gl.constexpr = acc.type.layout
    l_i = gl.convert_layout(gl.sum(sums, axis=1), gl.SliceLayout(1, LAYOUT))
    m_i = gl.convert_layout(m_i, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    offs_m = W * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    offs_d = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    heads, tokens, mask_m = _rows(tensors, problem, share, segment, offs_m)
    out = acc * gl.expand_dims(gl.where(l_i == 0.0, 0.0, 1.0 / l_i), 1)
    lse_log2 = gl.fma(m_i, problem.scale_log2, gl.log2(l_i))
    lse_log2 = gl.where(l_i == 0.0, float("-inf"), lse_log2)
    mask = gl.expand_dims(mask_m, 1) & gl.expand_dims(offs_d < problem.HEAD_DIM_V, 0)
    if segment.is_whole:
        gl.store(tensors.lse_ptr + heads * problem.T + tokens, lse_log2 * _LN_2, mask=mask_m)
        rows = gl.cast(tokens, gl.int64) * (problem.H_KV * problem.GROUP) + heads
        offs = gl.expand_dims(rows * problem.HEAD_DIM_V, 1) + gl.expand_dims(offs_d, 0)
        gl.store(tensors.out_ptr + offs, out, mask=mask)
    else:
        first_row = gl.cast(segment.slot * HEAD_TILES + share.head_tile, gl.int64) * (2 * ROWS)
        rows = first_row + offs_m
        gl.store(tensors.parts_lse_ptr + rows, lse_log2, mask=mask_m)
        offs = gl.expand_dims(rows * problem.HEAD_DIM_V, 1) + gl.expand_dims(offs_d, 0)
        gl.store(tensors.parts_ptr + offs, out, mask=mask)


@gluon.jit
def _attend(tensors, shared, problem, W: gl.constexpr):
    """Compute rows [64 W, 64 W + 64) of each tile of the program's share."""
    BLOCK_N: gl.constexpr = problem.BLOCK_N
    BLOCK_DV: gl.constexpr = shared.v.shape[2]
    DTYPE: gl.constexpr = tensors.k.dtype
    O_LAYOUT: gl.constexpr = accumulator_layout(BLOCK_DV)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, k_width=2)
    NO_MAX: gl.constexpr = gl.SliceLayout(1, accumulator_layout(BLOCK_N))
    share = _share(tensors, problem)
    unit = share.start
    count = 0
    while unit < share.stop:
        segment = _segment(tensors, problem, share, unit, 4)
        _load_queries(tensors, shared, problem, share, segment, W)
        s = _start_scores(shared, problem, count, W)
        s = warpgroup_mma_wait(0, deps=(s,))
        _release(shared.k, _K_EMPTY, count)
        s = _hide_past_end(s, segment.N, (segment.last - 1) * BLOCK_N)
        none = gl.full([ROWS], float("-inf"), gl.float32, NO_MAX)
        p, m_i, _ = _softmax(s, none, problem)
        sums = thread_sums(p)
        p_operand = gl.convert_layout(p.to(DTYPE), P_LAYOUT, assert_trivial=True)
        acc = gl.zeros([ROWS, BLOCK_DV], gl.float32, O_LAYOUT)
        for _ in range(segment.first, segment.last - 1):
            s = _start_scores(shared, problem, count + 1, W)
            acc = _start_output(shared, p_operand, acc, count)
            s = warpgroup_mma_wait(1, deps=(s,))
            _release(shared.k, _K_EMPTY, count + 1)
            p, m_i, alpha = _softmax(s, m_i, problem)
            sums = scale_rows(sums, alpha) + thread_sums(p)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            _release(shared.v, _V_EMPTY, count)
            acc = scale_rows(acc, alpha)
            p_operand = gl.convert_layout(p.to(DTYPE), P_LAYOUT, assert_trivial=True)
            count += 1
        acc = _start_output(shared, p_operand, acc, count)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        _release(shared.v, _V_EMPTY, count)
        count += 1
        _store(tensors, problem, share, segment, acc, m_i, sums, W)
        unit = segment.next_unit


@gluon.jit
def _attend_first(tensors, shared, problem):
    _attend(tensors, shared, problem, 0)


@gluon.jit
def _attend_second(tensors, shared, problem):
    _attend(tensors, shared, problem, 1)


NOT_SPECIALIZED = [
    *("stride_qt", "stride_qh", "stride_tb", "stride_tn"),
    *("T", "B", "num_blocks", "num_tiles"),
]


# fmt: off
@gluon.jit(do_not_specialize=NOT_SPECIALIZED)
def _prefix_attention_kernel(
    k_desc, v_desc,
    q_ptr, stride_qt, stride_qh,  # in units of 8 numbers, which it loads at once
    table_ptr, stride_tb, stride_tn,
    lens_ptr, bounds_ptr, rows_ptr, ends_ptr,
    out_ptr, lse_ptr, parts_ptr, parts_lse_ptr,
    T, B, num_blocks, num_tiles, scale_log2,
    NEGATE_Q: gl.constexpr,
    GROUP: gl.constexpr, TILE_GROUP: gl.constexpr, H_KV: gl.constexpr,
    HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER: gl.constexpr,
):
    # fmt: on
    let_next_kernel_start()
    DTYPE: gl.constexpr = k_desc.dtype
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    shared = _Shared(
        gl.allocate_shared_memory(DTYPE, [2, ROWS, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, BLOCK_DV], SWIZZLED),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
    )
    for i in gl.static_range(STAGES):
        mbarrier.init(shared.k_full.index(i), count=1)
        mbarrier.init(shared.v_full.index(i), count=1)
    tensors = _Tensors(
        q_ptr, k_desc, v_desc, table_ptr, lens_ptr, bounds_ptr, rows_ptr, ends_ptr,
        out_ptr, lse_ptr, parts_ptr, parts_lse_ptr,
    )  # fmt: skip
    problem = _Problem(
        stride_qt, stride_qh, stride_tb, stride_tn,
        T, B, num_blocks, num_tiles, scale_log2,
        NEGATE_Q, GROUP, TILE_GROUP, H_KV, HEAD_DIM, HEAD_DIM_V, BLOCK_SIZE, BLOCK_T, BLOCK_N,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_attend_first, (tensors, shared, problem)),
            (_attend_second, (tensors, shared, problem)),
            (_load, (tensors, shared, problem)),
        ],
        [4, 1],
        [REGISTERS, PRODUCER],
    )


_launch = GluonLauncher(_prefix_attention_kernel)
_BLOCK_M = 2 * ROWS.value
_STAGES = 3
_REGISTERS = {"REGISTERS": 144, "PRODUCER": 24}  # of a thread that computes, and of one that copies
_MAX_REGISTERS = 104  # of a thread at the start: room for a program beside it
_LEAST_VECTOR = 256
_ANY = 2**30  # more queries than any group has


def start(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    lens: torch.Tensor,
    bounds: torch.Tensor,
    rows: torch.Tensor,
    rest_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> Parts:
    """Start writing attention to out (T, H, D_v) and lse (H, T); return what is to be merged.

    Group b has the queries ``rows[bounds[b]:bounds[b + 1]]`` and the first ``lens[b]`` keys that
    ``block_tables[b]`` leads to. `rest_lens` (B,) are the keys of each sequence after them, which
    a launch beside this one attends to.
    """
    (T, H, D), (num_blocks, block_size, H_KV, D_v), B = q.shape, v_cache.shape, len(lens)
    group = H // H_KV
    tile_group = min(group, _BLOCK_M)
    block_q = _BLOCK_M // tile_group
    head_tiles = H_KV * tiling.ceil_div(group, tile_group)
    num_tiles = T // block_q + B + 1
    shares = max(1, device_info(q.device).num_sms // head_tiles)
    limits = {"least_m": 0, "most_m": _ANY, "steps": B.bit_length()}
    schedule = {"IS_RAGGED": True, "ONE_TILE_EACH": False, "HAS_LEFT": False, "HAS_RIGHT": False}
    ends = worklist.count_work(
        lens, bounds, None, {**schedule, "BLOCK_Q": block_q, "BLOCK_N": BLOCK_N},
        beside=rest_lens, T=T, B=B, num_tiles=num_tiles, num_shares=shares,
        **limits, left=-1, right=-1,
    )  # fmt: skip
    parts = q.new_empty((2 * shares * head_tiles, _BLOCK_M, D_v), dtype=torch.float32)
    parts_lse = q.new_empty(parts.shape[:2], dtype=torch.float32)
    shape = {"GROUP": group, "TILE_GROUP": tile_group, "H_KV": H_KV}
    box = min(block_size, BLOCK_N)
    _launch(
        shares * head_tiles,
        args=(
            Blocks(k_cache, box), Blocks(v_cache, box),
            q, *(stride // 8 for stride in q.stride()[:2]),
            block_tables, *block_tables.stride(),
            lens, bounds, rows, ends, out, lse, parts, parts_lse,
            T, B, num_blocks, num_tiles, abs(scale) * problem.LOG2_E,
        ),
        constants={
            "NEGATE_Q": scale < 0, **shape,
            "HEAD_DIM": D, "HEAD_DIM_V": D_v, "BLOCK_SIZE": block_size,
            "BLOCK_T": max(_LEAST_VECTOR, 1 << (num_tiles - 1).bit_length()),
            "BLOCK_N": BLOCK_N, "BLOCK_D": _width(D), "BLOCK_DV": _width(D_v),
            "STAGES": _STAGES, **_REGISTERS,
        },
        maxnreg=_MAX_REGISTERS,
    )  # fmt: skip
    sizes = {"T": T, "B": B, "num_tiles": num_tiles, "num_splits": shares, **limits}
    tiles = {**shape, "BLOCK_M": _BLOCK_M, "BLOCK_Q": block_q}
    return Parts(
        *(parts, parts_lse, bounds, rows, ends, out, lse, sizes, tiles), head_tiles
    )


def _width(head_dim: int) -> int:
    """Columns of the panels that hold a head."""
    return tiling.ceil_div(head_dim, PANEL.value) * PANEL.value
