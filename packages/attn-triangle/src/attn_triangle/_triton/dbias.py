"""Gradient of the bias: a program owns a tile of it and goes through a part of the rows.

Another kernel sums the parts.
"""

import torch
import triton
import triton.language as tl

from attn_core import tiling
from attn_core.device import device_info
from attn_core.launch import Launcher
from attn_core.tiles.offsets import load_tile, tile_offsets
from attn_core.tiles.softmax import LOG2_E
from attn_core.tuning import TileConfig
from attn_triangle._triton import configs, problem
from attn_triangle._triton.keys import VisibleKeys

_PROGRAMS_PER_SM = 8  # among as many the rows are split
_SUM_CONFIG = TileConfig(8, 256, 4, 1)  # parts and columns


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_dbias_kernel(
    q_ptr, stride_qb, stride_qh, stride_qr, stride_qm, stride_qd,
    k_ptr, stride_kb, stride_kh, stride_kr, stride_kn, stride_kd,
    v_ptr, stride_vb, stride_vh, stride_vr, stride_vn, stride_vd,
    bias_ptr, stride_bb, stride_bh, stride_bm, stride_bn,
    shut_ptr,  # [B, R, N or more], read only with HAS_MASK
    stride_sb, stride_sr,
    do_ptr, stride_dob, stride_doh, stride_dor, stride_dom, stride_dod,
    rows_ptr,  # [B, H, R, M, 2], contiguous: lse in units of log2, and delta
    dbias_ptr,  # [splits, B, H, M, N], contiguous
    M, N, R, H, num_tiles, num_tiles_n, num_heads, rows_per_split,
    scale,
    HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):
    # fmt: on
    pid = tl.program_id(0)
    tile = pid % num_tiles
    start_m = tile // num_tiles_n * BLOCK_M
    start_n = tile % num_tiles_n * BLOCK_N
    pid_bh = pid // num_tiles % num_heads
    split = pid // num_tiles // num_heads
    b = (pid_bh // H).to(tl.int64)
    h = (pid_bh % H).to(tl.int64)
    first_m = start_m.to(tl.int64)
    first_n = start_n.to(tl.int64)
    first_row = split * rows_per_split
    last_row = tl.minimum(first_row + rows_per_split, R)
    r = first_row.to(tl.int64)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    PAD_D: tl.constexpr = HEAD_DIM != BLOCK_D
    # What is past the end repeats the last one: nothing needs a mask before it would be stored.
    inner_m = tl.minimum(offs_m, M - 1 - start_m)
    inner_n = tl.minimum(offs_n, N - 1 - start_n)
    q_ptr += b * stride_qb + h * stride_qh + r * stride_qr + first_m * stride_qm
    q_offs = tile_offsets(inner_m, stride_qm, offs_d, stride_qd)
    do_ptr += b * stride_dob + h * stride_doh + r * stride_dor + first_m * stride_dom
    do_offs = tile_offsets(inner_m, stride_dom, offs_d, stride_dod)
    k_ptr += b * stride_kb + h * stride_kh + r * stride_kr + first_n * stride_kn
    k_offs = tile_offsets(inner_n, stride_kn, offs_d, stride_kd)
    v_ptr += b * stride_vb + h * stride_vh + r * stride_vr + first_n * stride_vn
    v_offs = tile_offsets(inner_n, stride_vn, offs_d, stride_vd)
    rows_ptr += 2 * ((pid_bh.to(tl.int64) * R + r) * M + start_m)
    rows_offs = tile_offsets(inner_m, 2, tl.arange(0, 2), 1)
    shut_ptr += b * stride_sb + r * stride_sr + start_n
    bias_ptr += b * stride_bb + h * stride_bh + first_m * stride_bm + first_n * stride_bn
    bias_ptrs = bias_ptr + tile_offsets(inner_m, stride_bm, inner_n, stride_bn)
    bias = tl.load(bias_ptrs).to(tl.float32)  # [BLOCK_M, BLOCK_N]

    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # With stages of its own, the loop also loads ahead what no product takes.
    for _ in tl.range(first_row, last_row, num_stages=NUM_STAGES):
        q = load_tile(q_ptr + q_offs, offs_m, mask_d, False, PAD_D)  # [BLOCK_M, BLOCK_D]
        k = load_tile(k_ptr + k_offs, offs_n, mask_d, False, PAD_D)  # [BLOCK_N, BLOCK_D]
        v = load_tile(v_ptr + v_offs, offs_n, mask_d, False, PAD_D)  # [BLOCK_N, BLOCK_D]
        do = load_tile(do_ptr + do_offs, offs_m, mask_d, False, PAD_D)  # [BLOCK_M, BLOCK_D]
        # Both in one load: two loads of BLOCK_M numbers would be made by every thread.
        lse_log2, delta = tl.split(tl.load(rows_ptr + rows_offs))
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
        if HAS_MASK:
            scores += tl.load(shut_ptr + offs_n)[None, :]
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        p = tl.math.exp2(scores * LOG2_E - lse_log2[:, None])
        dbias += p * (dp - delta[:, None])
        q_ptr += stride_qr
        k_ptr += stride_kr
        v_ptr += stride_vr
        do_ptr += stride_dor
        rows_ptr += 2 * M
        shut_ptr += stride_sr

    part = split.to(tl.int64) * num_heads + pid_bh
    dbias_ptr += (part * M + start_m) * N + start_n
    dbias_ptrs = dbias_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    mask = (offs_m < M - start_m)[:, None] & (offs_n < N - start_n)[None, :]
    tl.store(dbias_ptrs, dbias, mask=mask)


# fmt: off
@triton.jit(do_not_specialize=["M", "N", "num_splits", "num_more", "num_blocks"])
def _sum_of_splits_kernel(
    parts_ptr, stride_ps, stride_pp, stride_pm,  # [num_splits, planes, M, N]
    more_ptr,  # [num_more, planes, M, N], of the same strides
    total_ptr,  # [planes, M, N], contiguous
    M, N, num_splits, num_more, num_blocks,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    pid = tl.program_id(0)
    row = (pid // num_blocks).to(tl.int64)
    offs_n = pid % num_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_s = tl.arange(0, BLOCK_S)
    plane = row // M * stride_pp + row % M * stride_pm
    total = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        mask = (offs_s < num_splits - start)[:, None] & (offs_n < N)[None, :]
        offs = (start + offs_s).to(tl.int64)[:, None] * stride_ps + offs_n[None, :]
        total += tl.load(parts_ptr + plane + offs, mask=mask, other=0.0)
    for start in range(0, num_more, BLOCK_S):
        mask = (offs_s < num_more - start)[:, None] & (offs_n < N)[None, :]
        offs = (start + offs_s).to(tl.int64)[:, None] * stride_ps + offs_n[None, :]
        total += tl.load(more_ptr + plane + offs, mask=mask, other=0.0)
    total_ptrs = total_ptr + row * N + offs_n
    tl.store(total_ptrs, tl.sum(total, 0).to(total_ptr.dtype.element_ty), mask=offs_n < N)


_launch = Launcher(_attention_backward_dbias_kernel)
_launch_sum = Launcher(_sum_of_splits_kernel)


def dbias(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    keys: VisibleKeys,
    rows: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Sum dS over the rows: a few parts of the rows by one kernel, the parts by another."""
    B, H, R, M, D = q.shape
    N = k.shape[3]
    strides = tuple(tensor.stride() for tensor in (q, k, v, dout))
    bias_strides = problem.broadcast_strides(bias)
    sms = device_info(q.device).num_sms

    def launch(config):
        num_tiles_n = tiling.ceil_div(N, config.block_n)
        num_tiles = tiling.ceil_div(M, config.block_m) * num_tiles_n
        wanted = _PROGRAMS_PER_SM * sms // (num_tiles * B * H)
        rows_per_split = tiling.ceil_div(R, max(1, wanted))
        splits = tiling.ceil_div(R, rows_per_split)
        parts = rows.new_empty((splits, B, H, M, N))
        _launch(
            num_tiles * B * H * splits,
            strides=(bias.dtype, strides, bias_strides, keys.strides[:2]),
            args=(
                q, *strides[0],
                k, *strides[1],
                v, *strides[2],
                bias, *bias_strides,
                keys.shut, *keys.strides[:2],
                dout, *strides[3],
                rows,
                parts,
                M, N, R, H, num_tiles, num_tiles_n, B * H, rows_per_split,
                scale,
            ),
            constexprs={
                "HEAD_DIM": D, "HAS_MASK": keys.kind != "none",
                "PRECISION": tiling.dot_precision(q),
                "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
                "BLOCK_D": tiling.padded_head_dim(D), "NUM_STAGES": config.num_stages,
            },
            config=config,
        )  # fmt: skip
        return parts

    return sum_of_splits(launch(configs.tiles(configs.BACKWARD_DBIAS, q, k, launch)), bias)


def sum_of_splits(
    parts: torch.Tensor, bias: torch.Tensor, more: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum (splits, B, H, M, N) to the gradient of a bias that may have been broadcast.

    The last dimension is dense, and batches and heads are one dimension in memory. `more` are
    further splits of the same strides.
    """
    if parts.shape[1:] != bias.shape:
        total = parts.sum(0) if more is None else parts.sum(0) + more.sum(0)
        return total.sum_to_size(bias.shape).to(bias.dtype)
    dbias = bias.new_empty(bias.shape)
    splits, B, H, M, N = parts.shape
    num_more = 0 if more is None else more.shape[0]
    strides = (parts.stride(0), parts.stride(2), parts.stride(3))
    num_blocks = tiling.ceil_div(N, _SUM_CONFIG.block_n)
    _launch_sum(
        B * H * M * num_blocks,
        strides=strides,
        args=(
            parts, *strides,
            parts if more is None else more,
            dbias,
            M, N, splits, num_more, num_blocks,
        ),
        constexprs={"BLOCK_S": _SUM_CONFIG.block_m, "BLOCK_N": _SUM_CONFIG.block_n},
        config=_SUM_CONFIG,
    )  # fmt: skip
    return dbias
