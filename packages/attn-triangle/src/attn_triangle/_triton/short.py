"""Backward pass of short rows: one kernel for all gradients, and one that sums those of the bias.

A row of up to 128 queries and keys fits into one program, scores and all. It goes through a few
rows of a head, and each product of the backward pass is made once: five, not nine.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attn_core import tiling
from attn_core.device import device_info
from attn_core.launch import Launcher
from attn_core.tiles.offsets import load_tile, tile_offsets
from attn_core.tiles.softmax import LOG2_E
from attn_core.tuning import TileConfig
from attn_triangle._triton import problem
from attn_triangle._triton.dbias import sum_of_splits
from attn_triangle.layout import new_heads_last, new_unwanted

LONGEST = 128
_WIDEST = 32
_KEYS = 64  # of a tile of scores: registers hold no more beside the sums for the bias


# fmt: off
@triton.jit
def _differentiate(
    dq, dbias, q, do, lse_log2, delta, unseeing,
    k_ptr, stride_kn, stride_kd,
    v_ptr, stride_vn, stride_vd,
    bias_ptr, stride_bm, stride_bn,
    mask_ptr, stride_mn,
    dk_ptr, stride_dkn, stride_dkd,
    dv_ptr, stride_dvn, stride_dvd,
    start_n, M, N, scale,
    HEAD_DIM: tl.constexpr, EVEN_N: tl.constexpr, HAS_MASK: tl.constexpr, IS_MEAN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Go through BLOCK_N keys of one row: store dK and dV, add to dQ and dB."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_n = offs_n < N
    mask_d = offs_d < HEAD_DIM
    PAD_D: tl.constexpr = HEAD_DIM != BLOCK_D
    inner_n = tl.minimum(offs_n, N - 1)
    offs_m = tl.arange(0, BLOCK_M)
    inner_m = tl.minimum(offs_m, M - 1)
    k_ptrs = k_ptr + tile_offsets(inner_n, stride_kn, offs_d, stride_kd)
    v_ptrs = v_ptr + tile_offsets(inner_n, stride_vn, offs_d, stride_vd)
    k = load_tile(k_ptrs, mask_n, mask_d, False, PAD_D)  # [BLOCK_N, BLOCK_D]
    v = load_tile(v_ptrs, mask_n, mask_d, False, PAD_D)  # [BLOCK_N, BLOCK_D]
    bias_ptrs = bias_ptr + tile_offsets(inner_m, stride_bm, offs_n, stride_bn)
    bias = load_tile(bias_ptrs, offs_m < M, mask_n, False, not EVEN_N)  # [BLOCK_M, BLOCK_N]
    is_seen = mask_n
    if HAS_MASK:
        is_seen &= tl.load(mask_ptr + offs_n * stride_mn, mask=mask_n, other=1) == 0
    scores = tl.dot(q, tl.trans(k)) * scale + bias.to(tl.float32)
    p = tl.math.exp2(scores * LOG2_E - lse_log2[:, None])  # [BLOCK_M, BLOCK_N]
    if HAS_MASK or not EVEN_N:
        p = tl.where(is_seen[None, :], p, 0.0)
    weights = p
    if IS_MEAN:
        weights = tl.where(unseeing[:, None], 1.0 / N, p)
    dv = tl.dot(tl.trans(weights.to(do.dtype)), do)
    dp = tl.dot(do, tl.trans(v))
    ds = p * (dp - delta[:, None])
    dbias += ds
    ds = ds.to(q.dtype)
    dq = tl.dot(ds, k, dq)
    dk = tl.dot(tl.trans(ds), q) * scale
    mask = mask_n[:, None] & mask_d[None, :]
    dk_ptrs = dk_ptr + tile_offsets(offs_n, stride_dkn, offs_d, stride_dkd)
    dv_ptrs = dv_ptr + tile_offsets(offs_n, stride_dvn, offs_d, stride_dvd)
    tl.store(dk_ptrs, dk.to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=mask)
    return dq, dbias


# fmt: off
@triton.jit(do_not_specialize=["M", "N", "R", "H", "num_heads", "num_parts", "rows_per_part"])
def _attention_backward_short_kernel(
    q_ptr, stride_qb, stride_qh, stride_qr, stride_qm, stride_qd,
    k_ptr, stride_kb, stride_kh, stride_kr, stride_kn, stride_kd,
    v_ptr, stride_vb, stride_vh, stride_vr, stride_vn, stride_vd,
    bias_ptr, stride_bb, stride_bh, stride_bm, stride_bn,
    mask_ptr, stride_mb, stride_mr, stride_mn,  # read only with HAS_MASK
    out_ptr, stride_ob, stride_oh, stride_or, stride_om, stride_od,
    do_ptr, stride_dob, stride_doh, stride_dor, stride_dom, stride_dod,
    lse_ptr,  # [B, H, R, M], contiguous
    dlse_ptr,  # the same, read only with HAS_DLSE
    dq_ptr, stride_dqb, stride_dqh, stride_dqr, stride_dqm, stride_dqd,
    dk_ptr, stride_dkb, stride_dkh, stride_dkr, stride_dkn, stride_dkd,
    dv_ptr, stride_dvb, stride_dvh, stride_dvr, stride_dvn, stride_dvd,
    parts_ptr,  # [num_parts, B, H, M, N], contiguous
    M, N, R, H, num_heads, num_parts, rows_per_part,
    scale,
    HEAD_DIM: tl.constexpr, EVEN_N: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DLSE: tl.constexpr,
    IS_MEAN: tl.constexpr, TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    pid = tl.program_id(0)
    part = pid % num_parts
    bh = pid // num_parts
    h = (bh % H).to(tl.int64)
    b = (bh // H).to(tl.int64)
    first_row = part * rows_per_part
    last_row = tl.minimum(first_row + rows_per_part, R)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < M
    mask_d = offs_d < HEAD_DIM
    PAD_D: tl.constexpr = HEAD_DIM != BLOCK_D
    inner_m = tl.minimum(offs_m, M - 1)  # what is past the end repeats the last one
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    bias_ptr += b * stride_bb + h * stride_bh
    mask_ptr += b * stride_mb
    out_ptr += b * stride_ob + h * stride_oh
    do_ptr += b * stride_dob + h * stride_doh
    dq_ptr += b * stride_dqb + h * stride_dqh
    dk_ptr += b * stride_dkb + h * stride_dkh
    dv_ptr += b * stride_dvb + h * stride_dvh
    dbias0 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias1 = dbias0
    for row in range(first_row, last_row):
        r = tl.cast(row, tl.int64)
        q_ptrs = q_ptr + r * stride_qr + tile_offsets(inner_m, stride_qm, offs_d, stride_qd)
        do_ptrs = do_ptr + r * stride_dor + tile_offsets(inner_m, stride_dom, offs_d, stride_dod)
        out_ptrs = out_ptr + r * stride_or + tile_offsets(inner_m, stride_om, offs_d, stride_od)
        q = load_tile(q_ptrs, mask_m, mask_d, False, PAD_D)  # [BLOCK_M, BLOCK_D]
        do = load_tile(do_ptrs, mask_m, mask_d, False, PAD_D)  # [BLOCK_M, BLOCK_D]
        out = load_tile(out_ptrs, mask_m, mask_d, False, PAD_D)  # [BLOCK_M, BLOCK_D]
        delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
        at = (bh.to(tl.int64) * R + r) * M + offs_m
        if HAS_DLSE:
            delta -= tl.load(dlse_ptr + at, mask=mask_m, other=0.0)
        lse = tl.load(lse_ptr + at, mask=mask_m, other=float("inf"))
        unseeing = lse == -float("inf")
        # +inf makes the probabilities of a query without keys 0 instead of NaN.
        lse_log2 = tl.where(unseeing, float("inf"), lse * LOG2_E)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        dq, dbias0 = _differentiate(
            dq, dbias0, q, do, lse_log2, delta, unseeing,
            k_ptr + r * stride_kr, stride_kn, stride_kd,
            v_ptr + r * stride_vr, stride_vn, stride_vd,
            bias_ptr, stride_bm, stride_bn, mask_ptr + r * stride_mr, stride_mn,
            dk_ptr + r * stride_dkr, stride_dkn, stride_dkd,
            dv_ptr + r * stride_dvr, stride_dvn, stride_dvd,
            0, M, N, scale,
            HEAD_DIM, EVEN_N, HAS_MASK, IS_MEAN, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        if TILES == 2:
            dq, dbias1 = _differentiate(
                dq, dbias1, q, do, lse_log2, delta, unseeing,
                k_ptr + r * stride_kr, stride_kn, stride_kd,
                v_ptr + r * stride_vr, stride_vn, stride_vd,
                bias_ptr, stride_bm, stride_bn, mask_ptr + r * stride_mr, stride_mn,
                dk_ptr + r * stride_dkr, stride_dkn, stride_dkd,
                dv_ptr + r * stride_dvr, stride_dvn, stride_dvd,
                BLOCK_N, M, N, scale,
                HEAD_DIM, EVEN_N, HAS_MASK, IS_MEAN, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        dq_ptrs = dq_ptr + r * stride_dqr + tile_offsets(offs_m, stride_dqm, offs_d, stride_dqd)
        mask = mask_m[:, None] & mask_d[None, :]
        tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask)
    plane = part.to(tl.int64) * num_heads + bh
    parts_ptrs = parts_ptr + (plane * M + offs_m[:, None]) * N
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    tl.store(parts_ptrs + offs_n, dbias0, mask=mask_m[:, None] & (offs_n < N))
    if TILES == 2:
        offs_n += BLOCK_N
        tl.store(parts_ptrs + offs_n, dbias1, mask=mask_m[:, None] & (offs_n < N))


_launch = Launcher(_attention_backward_short_kernel)


def takes(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, wanted: str) -> bool:
    """Whether rows are short enough, and all gradients wanted but that of a mask."""
    is_short = max(q.shape[3], k.shape[3]) <= LONGEST and q.shape[4] <= _WIDEST
    is_plain = q.element_size() == 2 and (mask is None or mask.dtype == torch.bool)
    return is_short and is_plain and all(word in wanted for word in ("dq", "dk_dv", "dbias"))


def short_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    masked_rows: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """All that `backward.attention_backward` returns, deterministic."""
    B, H, R, M, D = q.shape
    N = k.shape[3]
    dq, dk, dv = new_heads_last(q), new_heads_last(k), new_heads_last(v)
    most = max(1, device_info(q.device).num_sms // (B * H))
    rows_per_part = tiling.ceil_div(R, most)
    num_parts = tiling.ceil_div(R, rows_per_part)
    parts = lse.new_empty((num_parts, B, H, M, N))
    strides = tuple(x.stride() for x in (q, k, v, out, dout, dq, dk, dv))
    bias_strides = problem.broadcast_strides(bias)
    mask_strides = (0, 0, 0) if mask is None else problem.broadcast_strides(mask)
    config = TileConfig(64 if M <= 64 else 128, _KEYS, 8, 2)
    _launch(
        num_parts * B * H,
        strides=(bias.dtype, strides, bias_strides, mask_strides),
        args=(
            q, *strides[0],
            k, *strides[1],
            v, *strides[2],
            bias, *bias_strides,
            lse if mask is None else mask.view(torch.uint8), *mask_strides,
            out, *strides[3],
            dout, *strides[4],
            lse,
            lse if dlse is None else dlse.contiguous(),
            dq, *strides[5],
            dk, *strides[6],
            dv, *strides[7],
            parts,
            M, N, R, H, B * H, num_parts, rows_per_part,
            scale,
        ),
        constexprs={
            "HEAD_DIM": D, "EVEN_N": N % _KEYS == 0,
            "HAS_MASK": mask is not None, "HAS_DLSE": dlse is not None,
            "IS_MEAN": masked_rows == "mean", "TILES": tiling.ceil_div(N, _KEYS),
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
            "BLOCK_D": tiling.padded_head_dim(D),
        },
        config=config,
    )  # fmt: skip
    return dq, dk, dv, sum_of_splits(parts, bias), new_unwanted(q)
