"""Gradient of the bias for Hopper GPUs, without atomics: a warpgroup owns 64 queries by some keys.

It goes through the rows i and adds up dS in its registers. Several parts of the rows are computed
side by side to fill the GPU; another kernel sums the parts.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_core import tiling
from attn_core.device import device_info
from attn_core.launch import Launcher
from attn_core.tiles.softmax import LOG2_E
from attn_triangle._hopper import configs, problem
from attn_triangle._hopper.tiles import (
    WG_ROWS,
    exp2,
    load_bias,
    load_mask,
    load_rows,
    new_ring,
)
from attn_triangle._triton.backward import sum_of_splits

_TILES_PER_SM = 4  # at least: enough that the last ones to run do not matter


@gluon.jit
def _tile_of(step, sizes):
    """Tile `step` of this CTA: batch, head, tile of queries and of keys, and its rows i."""
    H, R, num_tiles_m, num_tiles_n, num_heads, rows_per_split, total = sizes
    t = gl.program_id(0) + step * gl.num_programs(0)
    plane = t // num_tiles_n
    tile_n = t - plane * num_tiles_n
    tile_m = plane % num_tiles_m
    part = plane // num_tiles_m
    split = part // num_heads
    bh = part - split * num_heads
    b = bh // H
    first = split * rows_per_split
    return b, bh - b * H, tile_m, tile_n, split, first, gl.minimum(first + rows_per_split, R)


@gluon.jit
def _num_steps(sizes):
    H, R, num_tiles_m, num_tiles_n, num_heads, rows_per_split, total = sizes
    return gl.cdiv(total - gl.program_id(0), gl.num_programs(0))


# fmt: off
@gluon.jit
def _load(
    descs, bufs, rings, sizes, strides,
    HAS_MASK: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    """The loading warp: the bias of a tile, then what each row adds to its gradient."""
    q_desc, do_desc, k_desc, v_desc, bias_desc, mask_desc = descs
    q_buf, do_buf, k_buf, v_buf, bias_buf, mask_buf = bufs
    bias_full, bias_empty, full, empty = rings
    bias_strides, mask_steps = strides
    bias_b, bias_h = bias_strides
    mask_bytes: gl.constexpr = mask_desc.block_type.nbytes if HAS_MASK else 0
    row_bytes: gl.constexpr = (
        2 * (WARPGROUPS * q_desc.block_type.nbytes + k_desc.block_type.nbytes) + mask_bytes
    )
    bias_bytes: gl.constexpr = WARPGROUPS * bias_desc.block_type.nbytes
    count = 0
    for step in range(_num_steps(sizes)):
        b, h, tile_m, tile_n, split, first, last = _tile_of(step, sizes)
        start_m = tile_m * (WARPGROUPS * WG_ROWS)
        start_n = tile_n * BLOCK_N
        mbarrier.wait(bias_empty.index(0), (step & 1) ^ 1)
        mbarrier.expect(bias_full.index(0), bias_bytes)
        for w in gl.static_range(WARPGROUPS):
            m = start_m + w * WG_ROWS
            load_bias(
                bias_desc, b * bias_b, h * bias_h, m, start_n, bias_full.index(0), bias_buf.index(w)
            )
        for row in range(first, last):
            i = count % STAGES
            bar = full.index(i)
            mbarrier.wait(empty.index(i), ((count // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, row_bytes)
            if HAS_MASK:
                load_mask(mask_desc, mask_steps, b, row, start_n, bar, mask_buf.index(i))
            load_rows(k_desc, b, h, row, start_n, bar, k_buf.index(i))
            load_rows(v_desc, b, h, row, start_n, bar, v_buf.index(i))
            for w in gl.static_range(WARPGROUPS):
                m = start_m + w * WG_ROWS
                load_rows(q_desc, b, h, row, m, bar, q_buf.index(i * WARPGROUPS + w))
                load_rows(do_desc, b, h, row, m, bar, do_buf.index(i * WARPGROUPS + w))
            count += 1


# fmt: off
@gluon.jit
def _sum(
    bufs, rings, sizes, M, N, lse_ptr, delta_ptr, columns, parts_ptr, scale_log2,
    WARPGROUP: gl.constexpr, HAS_MASK: gl.constexpr, WARPGROUPS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    """A computing warpgroup: 64 queries of each tile."""
    q_buf, do_buf, k_buf, v_buf, bias_buf, mask_buf = bufs
    bias_full, bias_empty, full, empty = rings
    H, R, num_tiles_m, num_tiles_n, num_heads, rows_per_split, total = sizes
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    count = 0
    for step in range(_num_steps(sizes)):
        b, h, tile_m, tile_n, split, first, last = _tile_of(step, sizes)
        start_m = (tile_m * WARPGROUPS + WARPGROUP) * WG_ROWS
        start_n = tile_n * BLOCK_N
        offs_m = start_m + gl.arange(0, WG_ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
        at = (gl.to_tensor(b * H + h).to(gl.int64) * R + first) * columns + offs_m
        lse = gl.load(lse_ptr + at)
        delta = gl.load(delta_ptr + at)
        dbias = gl.zeros([WG_ROWS, BLOCK_N], gl.float32, S_LAYOUT)
        zero = dbias
        mbarrier.wait(bias_full.index(0), step & 1)
        for row in range(first, last):
            i = count % STAGES
            own = i * WARPGROUPS + WARPGROUP
            # Those of the next row, before anything waits; behind the last row stands another one.
            at += columns
            inside = offs_m < (last - 1 - row) * columns
            next_lse = gl.load(lse_ptr + at, mask=inside, other=0.0)
            next_delta = gl.load(delta_ptr + at, mask=inside, other=0.0)
            mbarrier.wait(full.index(i), (count // STAGES) & 1)
            start = bias_buf.index(WARPGROUP).load(S_LAYOUT)
            if HAS_MASK:
                start = start + mask_buf.index(i).load(S_LAYOUT)
            k = k_buf.index(i).permute((1, 0))
            v = v_buf.index(i).permute((1, 0))
            s = warpgroup_mma(q_buf.index(own), k, start, is_async=True)
            dp = warpgroup_mma(do_buf.index(own), v, zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            p = exp2(s * scale_log2 - gl.expand_dims(lse, 1))
            dp = warpgroup_mma_wait(0, deps=(dp,))
            mbarrier.arrive(empty.index(i), count=1)
            dbias += p * (dp - gl.expand_dims(delta, 1))
            lse = next_lse
            delta = next_delta
            count += 1
        mbarrier.arrive(bias_empty.index(0), count=1)
        part = gl.to_tensor(split * num_heads + b * H + h).to(gl.int64) * M
        offs_n = start_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
        offs = gl.expand_dims(part + offs_m, 1) * N + gl.expand_dims(offs_n, 0)
        mask = (gl.expand_dims(offs_m, 1) < M) & (gl.expand_dims(offs_n, 0) < N)
        gl.store(parts_ptr + offs, dbias, mask=mask)


# fmt: off
@gluon.jit
def _sum_first(
    bufs, rings, sizes, M, N, lse_ptr, delta_ptr, columns, parts_ptr, scale_log2,
    HAS_MASK: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    _sum(
        bufs, rings, sizes, M, N, lse_ptr, delta_ptr, columns, parts_ptr, scale_log2,
        0, HAS_MASK, WARPGROUPS, BLOCK_N, STAGES,
    )


@gluon.jit
def _sum_second(
    bufs, rings, sizes, M, N, lse_ptr, delta_ptr, columns, parts_ptr, scale_log2,
    HAS_MASK: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    _sum(
        bufs, rings, sizes, M, N, lse_ptr, delta_ptr, columns, parts_ptr, scale_log2,
        1, HAS_MASK, WARPGROUPS, BLOCK_N, STAGES,
    )


@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_dbias_kernel(
    q_desc, k_desc, v_desc,
    bias_desc, bias_b, bias_h,  # strides of its batches and heads: 1, or 0 where it is broadcast
    mask_desc, mask_b, mask_r,  # rows of the mask between batches and rows; may be unread
    do_desc,
    lse_ptr, delta_ptr, columns,  # [B, H, R, columns], as of rows.query_rows
    parts_ptr,  # [splits, B, H, M, N], contiguous
    M, N, R, H, num_tiles, num_tiles_n, num_heads, rows_per_split, total,
    scale_log2,
    HAS_MASK: gl.constexpr, WARPGROUPS: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    dtype: gl.constexpr = q_desc.dtype
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(min(128, 2 * BLOCK_D), 16, rank=2)
    BITS: gl.constexpr = bias_desc.dtype.primitive_bitwidth
    BIAS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(min(128, BLOCK_N * BITS // 8), BITS, rank=2)
    queries: gl.constexpr = [STAGES * WARPGROUPS, WG_ROWS, BLOCK_D]
    q_buf = gl.allocate_shared_memory(dtype, queries, LAYOUT)
    do_buf = gl.allocate_shared_memory(dtype, queries, LAYOUT)
    k_buf = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], LAYOUT)
    v_buf = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], LAYOUT)
    bias_buf = gl.allocate_shared_memory(
        bias_desc.dtype, [WARPGROUPS, WG_ROWS, BLOCK_N], BIAS_LAYOUT
    )
    mask_buf = k_buf
    if HAS_MASK:
        mask_buf = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_N], mask_desc.layout)
    bias_full, bias_empty = new_ring(1, WARPGROUPS)
    full, empty = new_ring(STAGES, WARPGROUPS)
    gl.thread_barrier()
    descs = (q_desc, do_desc, k_desc, v_desc, bias_desc, mask_desc)
    bufs = (q_buf, do_buf, k_buf, v_buf, bias_buf, mask_buf)
    rings = (bias_full, bias_empty, full, empty)
    sizes = (H, R, num_tiles, num_tiles_n, num_heads, rows_per_split, total)
    strides = ((bias_b, bias_h), (mask_b, mask_r))
    gl.warp_specialize(
        [
            (_sum_first, (
                bufs, rings, sizes, M, N, lse_ptr, delta_ptr, columns, parts_ptr,
                scale_log2, HAS_MASK, WARPGROUPS, BLOCK_N, STAGES,
            )),
            (_sum_second, (
                bufs, rings, sizes, M, N, lse_ptr, delta_ptr, columns, parts_ptr,
                scale_log2, HAS_MASK, WARPGROUPS, BLOCK_N, STAGES,
            )),
            (_load, (descs, bufs, rings, sizes, strides, HAS_MASK, WARPGROUPS, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


# With 168 registers a thread to share out, both computing warpgroups can have 240.
_launch = Launcher(_attention_backward_dbias_kernel, maxnreg=168)


def dbias(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    scaled_bias: torch.Tensor,
    keys: problem.KeyRows,
    rows: tuple[torch.Tensor, torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """Return the gradient of the bias; `rows` are those of `rows.query_rows`."""
    B, H, R, M, D = q.shape
    N = k.shape[3]
    block_d = tiling.padded_head_dim(D)
    config = configs.BACKWARD_DBIAS[block_d]
    block_n = config.block_n
    num_sms = device_info(q.device).num_sms
    num_tiles_m = tiling.ceil_div(M, config.block_m)
    num_tiles_n = tiling.ceil_div(N, block_n)
    tiles = num_tiles_m * num_tiles_n * B * H
    rows_per_split = tiling.ceil_div(R, tiling.ceil_div(_TILES_PER_SM * num_sms, tiles))
    splits = tiling.ceil_div(R, rows_per_split)
    lse_log2, delta = rows
    parts = delta.new_empty((splits, B, H, M, N))
    _launch(
        min(tiles * splits, num_sms),
        strides=(),
        args=(
            problem.tile_descriptor(q, 64, block_d),
            problem.tile_descriptor(k, block_n, block_d),
            problem.tile_descriptor(v, block_n, block_d),
            problem.bias_descriptor(scaled_bias, 64, block_n),
            *problem.broadcast_steps(scaled_bias),
            problem.row_descriptor(keys.rows, block_n), *keys.steps,
            problem.tile_descriptor(dout, 64, block_d),
            lse_log2, delta, delta.shape[1],
            parts,
            M, N, R, H, num_tiles_m, num_tiles_n, B * H, rows_per_split, tiles * splits,
            scale * LOG2_E.value,
        ),
        constexprs={
            "HAS_MASK": keys.has_mask, "WARPGROUPS": config.block_m // 64,
            "BLOCK_N": block_n, "BLOCK_D": block_d, "STAGES": config.num_stages,
        },
        config=config,
    )  # fmt: skip
    return sum_of_splits(parts, bias)
