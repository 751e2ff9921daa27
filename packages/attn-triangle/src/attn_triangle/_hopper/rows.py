"""Numbers of the backward pass: delta of each query, and what queries without keys give values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attn_core import tiling
from attn_core.launch import Launcher
from attn_core.tiles.offsets import load_tile, tile_offsets
from attn_core.tuning import TileConfig
from attn_triangle._triton.tiles import sum_of_unseeing

_CONFIG = TileConfig(128, 1, 4, 1)
_UNSEEING_CONFIG = TileConfig(64, 64, 4, 1)


# fmt: off
@triton.jit(do_not_specialize=["M", "R", "H", "num_tiles", "num_zeros"])
def _deltas_kernel(
    out_ptr, stride_ob, stride_oh, stride_or, stride_om, stride_od,
    do_ptr, stride_dob, stride_doh, stride_dor, stride_dom, stride_dod,
    dlse_ptr,  # [B, H, R, M], contiguous; read only with HAS_DLSE
    delta_ptr,  # [B, H, R, M in whole blocks], contiguous
    zeros_ptr,  # [num_zeros], contiguous: filled with zeros
    M, R, H, num_tiles, num_zeros,
    HEAD_DIM: tl.constexpr, HAS_DLSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    pid = tl.program_id(0)
    for start in range(pid * BLOCK_M, num_zeros, tl.num_programs(0) * BLOCK_M):
        offs = start + tl.arange(0, BLOCK_M)
        tl.store(zeros_ptr + offs, tl.zeros([BLOCK_M], tl.float32), mask=offs < num_zeros)
    # Heads first: those of a query are neighbours in memory as a rule.
    start_m = pid // H % num_tiles * BLOCK_M
    h = (pid % H).to(tl.int64)
    r = (pid // H // num_tiles % R).to(tl.int64)
    b = (pid // H // num_tiles // R).to(tl.int64)
    row = (b * H + h) * R + r
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < M
    rows = offs_m.to(tl.int64)
    out_ptr += b * stride_ob + h * stride_oh + r * stride_or
    do_ptr += b * stride_dob + h * stride_doh + r * stride_dor
    out_ptrs = out_ptr + tile_offsets(rows, stride_om, offs_d, stride_od)
    do_ptrs = do_ptr + tile_offsets(rows, stride_dom, offs_d, stride_dod)
    out = load_tile(out_ptrs, mask_m, offs_d < HEAD_DIM, True, HEAD_DIM != BLOCK_D)
    do = load_tile(do_ptrs, mask_m, offs_d < HEAD_DIM, True, HEAD_DIM != BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + row * M + rows, mask=mask_m, other=0.0)
    tl.store(delta_ptr + row * (num_tiles * BLOCK_M) + rows, delta)


# fmt: off
@triton.jit(do_not_specialize=["M", "N", "R", "H"])
def _unseeing_kernel(
    do_ptr, stride_dob, stride_doh, stride_dor, stride_dom, stride_dod,
    lse_ptr,  # [B, H, R, M], contiguous
    dv_ptr, stride_dvb, stride_dvh, stride_dvr, stride_dvn, stride_dvd,
    M, N, R, H,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Add to dv what queries without keys give it, whose output is the mean of the row's values."""
    row = tl.program_id(0).to(tl.int64)
    r = row % R
    h = row // R % H
    b = row // R // H
    lse_ptr += row * M
    do_ptr += b * stride_dob + h * stride_doh + r * stride_dor
    dv_ptr += b * stride_dvb + h * stride_dvh + r * stride_dvr
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    total, has_unseeing = sum_of_unseeing(
        do_ptr, stride_dom, stride_dod, lse_ptr, M, HEAD_DIM, BLOCK_M, BLOCK_D
    )
    if has_unseeing == 1:
        for start_n in range(0, N, BLOCK_M):
            offs_n = (start_n + tl.arange(0, BLOCK_M)).to(tl.int64)
            dv_ptrs = dv_ptr + tile_offsets(offs_n, stride_dvn, offs_d, stride_dvd)
            mask = (offs_n < N)[:, None] & mask_d[None, :]
            dv = tl.load(dv_ptrs, mask=mask, other=0.0).to(tl.float32) + total[None, :] / N
            tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=mask)


_launch = Launcher(_deltas_kernel)
_launch_unseeing = Launcher(_unseeing_kernel)


def deltas(
    out: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    zeroed: torch.Tensor | None,
) -> torch.Tensor:
    """Return delta = rowsum(dO O) - dlse, (B H R, M in whole blocks), float32.

    `zeroed`, of float32 and contiguous, is filled with zeros on the way.
    """
    B, H, R, M, D = out.shape
    block_m = _CONFIG.block_m
    num_tiles = tiling.ceil_div(M, block_m)
    delta = out.new_empty((B * H * R, num_tiles * block_m), dtype=torch.float32)
    strides = (out.stride(), dout.stride())
    _launch(
        num_tiles * B * H * R,
        strides=strides,
        args=(
            out, *strides[0],
            dout, *strides[1],
            delta if dlse is None else dlse.contiguous(),
            delta,
            delta if zeroed is None else zeroed,
            M, R, H, num_tiles, 0 if zeroed is None else zeroed.numel(),
        ),
        constexprs={
            "HEAD_DIM": D, "HAS_DLSE": dlse is not None, "BLOCK_M": block_m,
            "BLOCK_D": tiling.padded_head_dim(D),
        },
        config=_CONFIG,
    )  # fmt: skip
    return delta


def add_unseeing(dv: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor) -> None:
    """Add to dv the share of the queries that see no key."""
    B, H, R, M, D = dout.shape
    strides = (dout.stride(), dv.stride())
    _launch_unseeing(
        B * H * R,
        strides=strides,
        args=(dout, *strides[0], lse, dv, *strides[1], M, dv.shape[3], R, H),
        constexprs={
            "HEAD_DIM": D, "BLOCK_M": _UNSEEING_CONFIG.block_m,
            "BLOCK_D": tiling.padded_head_dim(D),
        },
        config=_UNSEEING_CONFIG,
    )  # fmt: skip
