"""Gradients of queries and of the bias in one kernel for Hopper GPUs.

A warpgroup owns 64 queries of four rows i. It adds up dS over them in its registers and the sum to
memory: a quarter of the traffic of dS. That leaves room for narrow tiles of scores only, and for
heads of up to 32 channels.

Where the order of additions may not change, the rows are cut into parts that have a sum each, and a
CTA stays with its queries through a part. It goes through the keys forth and back: what it added to
last is still in the L2 cache. Where the order may change, all add to one sum.
"""

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_core import tiling
from attn_core.device import device_info
from attn_core.gluon_launch import GluonLauncher
from attn_core.tiles.hopper import accumulator_layout, exp2
from attn_core.tiles.softmax import LOG2_E as _LOG2_E
from attn_triangle._hopper import configs, problem
from attn_triangle._hopper.tiles import (
    LOG2_E,
    WG_ROWS,
    block_of,
    closed,
    key_blocks,
    load_lse,
    load_queries_and_keys,
    load_wide,
    new_query_buffers,
    num_steps,
    store_rows,
)
from attn_triangle.layout import scratch

_ROUNDS = 3  # of all processors, at most about: more parts would balance little and take memory


@gluon.jit
def _tile_of(step, sizes, ROWS: gl.constexpr):
    """Tile `step` of this CTA: batch, head, first and last row i, number of the tile, and part.

    A part has `groups` groups of rows, in turn. Those of the last one may lie past the last row.
    """
    H, R, num_tiles, num_parts, groups, total = sizes
    turn = step // groups
    t = gl.program_id(0) + turn * gl.num_programs(0)
    plane = t // num_tiles
    bh = plane // num_parts
    part = plane - bh * num_parts
    row0 = (part * groups + step - turn * groups) * ROWS
    last = gl.minimum(row0 + ROWS - 1, R - 1)
    b = bh // H
    return b, bh - b * H, row0, last, t - plane * num_tiles, part


@gluon.jit
def _num_steps(sizes):
    """How many tiles this CTA computes."""
    H, R, num_tiles, num_parts, groups, total = sizes
    return num_steps(sizes) * groups


# fmt: off
@gluon.jit
def _load(
    args,
    HAS_MASK: gl.constexpr, HAS_RANGE: gl.constexpr, TILES: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    """The loading warp."""
    queries, streamed, rings, sizes, N, range_ptr, strides = args
    count = 0
    for step in range(_num_steps(sizes)):
        b, h, row0, last, tile, part = _tile_of(step, sizes, ROWS)
        count = load_queries_and_keys(
            args, step, count, b, h, row0, last, tile, step & 1,
            HAS_MASK, HAS_RANGE, TILES, ROWS, BLOCK_N, STAGES,
        )  # fmt: skip


@gluon.jit
def _start(q, do, k, v, zero):
    """Begin the products that give the scores of a tile and the gradient of its weights."""
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(do, v.permute((1, 0)), zero, use_acc=False, is_async=True)
    return s, dp


@gluon.jit
def _replaced(items, x: gl.constexpr, item):
    """A tuple with another item at x."""
    return items[:x] + (item,) + items[x + 1 :]  # noqa: RUF005 - Triton unpacks no tuples


# fmt: off
@gluon.jit
def _differentiate(
    TILE: gl.constexpr, args,
    HAS_MASK: gl.constexpr, HAS_RANGE: gl.constexpr, TILES: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    """A computing warpgroup: 64 queries of all rows of each tile."""
    loading, dq_desc, query_rows, dbias, scale, scale_log2 = args
    queries, streamed, rings, sizes, N, range_ptr, strides = loading
    query_descs, query_bufs = queries
    descs, bufs = streamed
    q_buf, do_buf = query_bufs
    k_buf, v_buf, bias_buf, mask_buf = bufs
    q_full, q_empty, full, empty = rings
    range_strides, bias_strides, mask_steps = strides
    lse_ptr, M, delta_ptr, columns = query_rows
    dbias_ptr, dbias_p, dbias_bh, dbias_blocks = dbias
    dbias_columns = dbias_blocks * 128  # so that addresses are seen to be aligned
    H, R, num_tiles, num_parts, groups, total = sizes
    dtype: gl.constexpr = dq_desc.dtype
    BLOCK_D: gl.constexpr = q_buf.shape[2]
    S_LAYOUT: gl.constexpr = accumulator_layout(BLOCK_N)
    O_LAYOUT: gl.constexpr = accumulator_layout(BLOCK_D)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    zero = gl.zeros([WG_ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    count = 0
    for step in range(_num_steps(sizes)):
        b, h, row0, last, tile, part = _tile_of(step, sizes, ROWS)
        start_m = (tile * TILES + TILE) * WG_ROWS
        slot = step & 1
        own = slot * (ROWS * TILES) + TILE
        offs_m = start_m + gl.arange(0, WG_ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
        first = gl.to_tensor(b * H + h).to(gl.int64) * R + row0
        lse = ()
        delta = ()
        dq = ()
        for x in gl.static_range(ROWS):
            # Behind the last row stands another one: no weight there.
            exists = offs_m < gl.minimum(M, (last + 1 - row0 - x) * columns)
            lse_x = load_lse(lse_ptr + (first + x) * M + offs_m, exists)
            delta_x = gl.load(delta_ptr + (first + x) * columns + offs_m, mask=exists, other=0.0)
            lse += (gl.expand_dims(closed(lse_x), 1),)
            delta += (gl.expand_dims(delta_x, 1),)
            dq += (gl.zeros([WG_ROWS, BLOCK_D], gl.float32, O_LAYOUT),)
        mbarrier.wait(q_full.index(slot), (step >> 1) & 1)
        plane = gl.to_tensor(part * dbias_p + (b * H + h) * dbias_bh).to(gl.int64) * dbias_columns
        offs_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
        offs = gl.expand_dims(offs_m * dbias_columns, 1) + gl.expand_dims(offs_n, 0)
        lo, hi = key_blocks(range_ptr, range_strides, b, row0, last, N, HAS_RANGE, ROWS, BLOCK_N)
        for turn in range(lo, hi):
            block = block_of(turn, lo, hi, step & 1)
            i = count % STAGES
            mbarrier.wait(full.index(i), (count // STAGES) & 1)
            s, dp = _start(
                q_buf.index(own), do_buf.index(own),
                k_buf.index(i * ROWS), v_buf.index(i * ROWS), zero,
            )  # fmt: skip
            s = warpgroup_mma_wait(1, deps=(s,))
            sum_ds = zero
            for x in gl.static_range(ROWS):
                bias = load_wide(bias_buf.index(i * TILES + TILE), S_LAYOUT)
                offset = bias * LOG2_E - lse[x]
                if HAS_MASK:
                    offset += mask_buf.index(i * ROWS + x).load(S_LAYOUT)
                p = exp2(s * scale_log2 + offset)
                if x == 0:
                    dp = warpgroup_mma_wait(0, deps=(dp,))
                else:
                    dp, done = warpgroup_mma_wait(0, deps=(dp, dq[x - 1]))
                    dq = _replaced(dq, x - 1, done)
                ds = p * (dp - delta[x])
                ds_operand = gl.convert_layout(ds.to(dtype), P_LAYOUT, assert_trivial=True)
                sum_ds += ds
                k = k_buf.index(i * ROWS + x)
                if x + 1 < ROWS:
                    s, dp = _start(
                        q_buf.index(own + (x + 1) * TILES), do_buf.index(own + (x + 1) * TILES),
                        k_buf.index(i * ROWS + x + 1), v_buf.index(i * ROWS + x + 1), zero,
                    )  # fmt: skip
                next_dq = warpgroup_mma(ds_operand, k, dq[x], is_async=True)
                dq = _replaced(dq, x, next_dq)
                if x + 1 < ROWS:
                    s = warpgroup_mma_wait(2, deps=(s,))
            ptrs = dbias_ptr + (plane + block * BLOCK_N) + offs
            gl.atomic_add(ptrs, sum_ds, sem="relaxed")  # nothing waits for it, unlike a load
            done = warpgroup_mma_wait(0, deps=(dq[ROWS - 1],))
            dq = _replaced(dq, ROWS - 1, done)
            mbarrier.arrive(empty.index(i), count=1)
            count += 1
        for x in gl.static_range(ROWS):
            if row0 + x <= last:
                buf = q_buf.index(own + x * TILES)
                store_rows(dq[x] * scale, buf, dq_desc, b, h, row0 + x, start_m)
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(slot), count=1)


# fmt: off
@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_dq_dbias_kernel(
    q_desc, k_desc, v_desc,
    bias_desc, bias_b, bias_h,  # strides of its batches and heads: 1, or 0 where it is broadcast
    mask_desc, mask_b, mask_r,  # rows of the mask between batches and rows; as range, may be unread
    range_ptr, range_b, range_r,  # [B, R, 2]
    do_desc,
    lse_ptr,  # [B, H, R, M], contiguous
    delta_ptr, columns,  # [B, H, R, columns], contiguous
    dq_desc,
    dbias_ptr, dbias_p, dbias_bh, dbias_blocks,  # in rows of dbias_blocks * 128 columns
    M, N, R, H, num_tiles, num_parts, groups, total,
    scale, scale_log2,
    HAS_MASK: gl.constexpr, HAS_RANGE: gl.constexpr, TILES: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    query_bufs, bufs, rings = new_query_buffers(
        q_desc, bias_desc, mask_desc,
        HAS_MASK, TILES, ROWS, BLOCK_N, BLOCK_D, STAGES, READERS=TILES,
    )  # fmt: skip
    queries = ((q_desc, do_desc), query_bufs)
    streamed = ((k_desc, v_desc, bias_desc, mask_desc), bufs)
    sizes = (H, R, num_tiles, num_parts, groups, total)
    strides = ((range_b, range_r), (bias_b, bias_h), (mask_b, mask_r))
    dbias = (dbias_ptr, dbias_p, dbias_bh, dbias_blocks)
    loading = (queries, streamed, rings, sizes, N, range_ptr, strides)
    computing = (loading, dq_desc, (lse_ptr, M, delta_ptr, columns), dbias, scale, scale_log2)
    gl.warp_specialize(
        [
            (_differentiate, (0, computing, HAS_MASK, HAS_RANGE, TILES, ROWS, BLOCK_N, STAGES)),
            (_differentiate, (1, computing, HAS_MASK, HAS_RANGE, TILES, ROWS, BLOCK_N, STAGES)),
            (_load, (loading, HAS_MASK, HAS_RANGE, TILES, ROWS, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


_REGISTERS = 168  # a thread, to share out: 240 for each computing warpgroup
_launch = GluonLauncher(_attention_backward_dq_dbias_kernel)


@functools.lru_cache(maxsize=4096)
def _parts(groups: int, tiles: int, num_sms: int) -> tuple[int, int]:
    """How many parts all groups of rows make, and groups of a part: those done soonest."""
    most = max(1, min(groups, _ROUNDS * num_sms // tiles))

    def steps(parts: int) -> int:
        return tiling.ceil_div(tiles * parts, num_sms) * tiling.ceil_div(groups, parts)

    groups_of_part = tiling.ceil_div(groups, min(range(1, most + 1), key=steps))
    return tiling.ceil_div(groups, groups_of_part), groups_of_part


def _schedule(q: torch.Tensor, deterministic: bool) -> tuple[int, int, int]:
    """Tiles of queries of a row, parts of the rows, and groups of rows of a part."""
    B, H, R, M, D = q.shape
    plan = configs.BACKWARD_DQ_DBIAS[tiling.padded_head_dim(D)]
    num_tiles, groups = tiling.ceil_div(M, 64 * plan.tiles), tiling.ceil_div(R, plan.rows)
    if not deterministic:
        return num_tiles, groups, 1
    return num_tiles, *_parts(groups, num_tiles * B * H, device_info(q.device).num_sms)


def new_sums(q: torch.Tensor, N: int, deterministic: bool, lent: torch.Tensor) -> torch.Tensor:
    """Uninitialised memory for sums of dS over rows, (sums, B, H, M, N) in whole tiles, float32.

    It is that of `lent`, a result that is written later, where that is large enough.
    """
    B, H, _, M, _ = q.shape
    num_sums = _schedule(q, deterministic)[1] if deterministic else 1
    shape = (num_sums, B, H, problem.whole(M, 128), problem.whole(N, 128))
    return scratch(shape, lent)


def dq_dbias(
    dq: torch.Tensor,
    sums: torch.Tensor,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    keys: problem.KeyRows,
    lse: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
    deterministic: bool,
) -> None:
    """Fill dq and add dS to sums, one of `new_sums` filled with zeros.

    `bias` is one of `problem.readable_bias`, `delta` of `rows.deltas`.
    """
    B, H, R, M, D = q.shape
    N = k.shape[3]
    block_d = tiling.padded_head_dim(D)
    plan = configs.BACKWARD_DQ_DBIAS[block_d]
    block_n = plan.block
    num_tiles, num_parts, groups = _schedule(q, deterministic)
    total = num_tiles * num_parts * B * H
    *_, rows_of_plane, columns_of_plane = sums.shape
    _launch(
        min(total, device_info(q.device).num_sms),
        args=(
            problem.tiles(q, 64, block_d),
            problem.tiles(k, block_n, block_d),
            problem.tiles(v, block_n, block_d),
            problem.bias_tiles(bias, 64, block_n), *problem.broadcast_steps(bias),
            problem.row_pieces(keys.rows, block_n), *keys.steps,
            keys.range, *keys.range_strides,
            problem.tiles(dout, 64, block_d),
            lse,
            delta, delta.shape[1],
            problem.tiles(dq, 64, block_d),
            sums, B * H * rows_of_plane if deterministic else 0, rows_of_plane,
            columns_of_plane // 128,
            M, N, R, H, num_tiles, num_parts, groups, total,
            scale, scale * _LOG2_E.value,
        ),
        constants={
            "HAS_MASK": keys.has_mask, "HAS_RANGE": keys.has_range,
            "TILES": plan.tiles, "ROWS": plan.rows,
            "BLOCK_N": block_n, "BLOCK_D": block_d, "STAGES": plan.stages,
        },
        maxnreg=_REGISTERS,
    )  # fmt: skip
