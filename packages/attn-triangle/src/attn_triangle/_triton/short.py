"""Backward pass of short rows: a tile of scores holds all keys of a query, or all queries of a key.

The first kernel computes dQ, going through a few rows of a head with a sum of dS for the bias. The
last one computes dK and dV. Until then the sums lie where those will be, and a kernel between the
two adds them up, so that no memory is needed beyond results. Seven products, not nine: dQ and dB
share theirs.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from attn_core import tiling
from attn_core.device import device_info
from attn_core.launch import Launcher
from attn_core.tiles.offsets import (
    head_offsets,
    load_head,
    load_tile,
    store_head,
    tile_offsets,
)
from attn_core.tiles.softmax import LOG2_E
from attn_core.tuning import TileConfig
from attn_triangle._triton import problem
from attn_triangle._triton.dbias import sum_of_splits
from attn_triangle.layout import new_heads_last, new_unwanted, scratch

LONGEST = 128
_WIDEST = 32
_PROGRAMS_PER_SM = 2
_DQ_CONFIG = TileConfig(64, 64, 4, 2)
_DK_DV_CONFIG = TileConfig(64, 64, 4, 1)
_NOT_SPECIALIZED = [
    "M", "N", "R", "H", "num_tiles", "num_heads", "num_parts", "num_first", "rows_per_part"
]  # fmt: skip


@triton.jit
def _load_rows(ptr, stride, stride_d, offs, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load vectors of one row of the pair tensor, [., BLOCK_D], none of them past the end."""
    return load_head(ptr + head_offsets(offs, stride, stride_d, BLOCK_D), offs, False, HEAD_DIM)


@triton.jit
def _seen(mask_ptr, stride_mn, offs_n, N, HAS_MASK: tl.constexpr):
    """Which keys there are and the mask leaves visible."""
    is_seen = offs_n < N
    if HAS_MASK:
        is_seen &= tl.load(mask_ptr + offs_n * stride_mn, mask=is_seen, other=1) == 0
    return is_seen


# fmt: off
@triton.jit
def _add_keys(
    dq, dbias, q, do, lse_log2, delta,
    k_ptr, stride_kn, stride_kd,
    v_ptr, stride_vn, stride_vd,
    bias_ptr, stride_bm, stride_bn, inner_m,
    mask_ptr, stride_mn,
    start_n, N, scale,
    HEAD_DIM: tl.constexpr, EVEN_N: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Add what BLOCK_N keys of one row give to dQ, not scaled yet, and to dB."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    inner_n = tl.minimum(offs_n, N - 1)
    k = _load_rows(k_ptr, stride_kn, stride_kd, inner_n, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v = _load_rows(v_ptr, stride_vn, stride_vd, inner_n, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    is_seen = _seen(mask_ptr, stride_mn, offs_n, N, HAS_MASK)
    bias_ptrs = bias_ptr + tile_offsets(inner_m, stride_bm, offs_n, stride_bn)
    bias = load_tile(bias_ptrs, offs_n < N, offs_n < N, False, not EVEN_N)  # [BLOCK_M, BLOCK_N]
    scores = tl.dot(q, tl.trans(k)) * scale + bias.to(tl.float32)
    p = tl.math.exp2(scores * LOG2_E - lse_log2[:, None])
    if HAS_MASK or not EVEN_N:
        p = tl.where(is_seen[None, :], p, 0.0)
    ds = p * (tl.dot(do, tl.trans(v)) - delta[:, None])
    return tl.dot(ds.to(q.dtype), k, dq), dbias + ds


# fmt: off
@triton.jit
def _load_queries(
    q_ptr, stride_qm, stride_qd,
    do_ptr, stride_dom, stride_dod,
    out_ptr, stride_om, stride_od,
    lse_ptr, dlse_ptr, offs_m, M,
    HEAD_DIM: tl.constexpr, HAS_DLSE: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Load queries of one row and dO, [BLOCK_M, BLOCK_D], their lse in units of log2, and delta.

    The lse of a query without keys is +inf: its probabilities are 0 then, not NaN.
    """
    inner_m = tl.minimum(offs_m, M - 1)
    q = _load_rows(q_ptr, stride_qm, stride_qd, inner_m, HEAD_DIM, BLOCK_D)
    do = _load_rows(do_ptr, stride_dom, stride_dod, inner_m, HEAD_DIM, BLOCK_D)
    out = _load_rows(out_ptr, stride_om, stride_od, inner_m, HEAD_DIM, BLOCK_D)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + inner_m)
    lse = tl.load(lse_ptr + offs_m, mask=offs_m < M, other=float("inf"))
    sees_none = lse == -float("inf")
    return q, do, tl.where(sees_none, float("inf"), lse * LOG2_E), delta, sees_none


# fmt: off
@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _attention_backward_short_dq_kernel(
    q_ptr, stride_qb, stride_qh, stride_qr, stride_qm, stride_qd,
    k_ptr, stride_kb, stride_kh, stride_kr, stride_kn, stride_kd,
    v_ptr, stride_vb, stride_vh, stride_vr, stride_vn, stride_vd,
    bias_ptr, stride_bb, stride_bh, stride_bm, stride_bn,
    mask_ptr, stride_mb, stride_mr, stride_mn,  # read only with HAS_MASK
    do_ptr, stride_dob, stride_doh, stride_dor, stride_dom, stride_dod,
    out_ptr, stride_ob, stride_oh, stride_or, stride_om, stride_od,
    lse_ptr,  # [B, H, R, M], contiguous
    dlse_ptr,  # the same, read only with HAS_DLSE
    dq_ptr, stride_dqb, stride_dqh, stride_dqr, stride_dqm, stride_dqd,
    first_ptr, rest_ptr,  # [num_first, B, H, M, N] and [num_parts - num_first, B, H, M, N], float32
    M, N, R, H, num_tiles, num_heads, num_parts, num_first, rows_per_part,
    scale,
    HEAD_DIM: tl.constexpr, EVEN_N: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DLSE: tl.constexpr,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    pid = tl.program_id(0)
    start_m = pid % num_tiles * BLOCK_M
    part = pid // num_tiles % num_parts
    bh = pid // num_tiles // num_parts
    h = (bh % H).to(tl.int64)
    b = (bh // H).to(tl.int64)
    first_row = part * rows_per_part
    last_row = tl.minimum(first_row + rows_per_part, R)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    inner_m = tl.minimum(offs_m, M - 1)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    bias_ptr += b * stride_bb + h * stride_bh
    mask_ptr += b * stride_mb
    out_ptr += b * stride_ob + h * stride_oh
    do_ptr += b * stride_dob + h * stride_doh
    dq_ptr += b * stride_dqb + h * stride_dqh
    dbias0 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias1 = dbias0
    for row in range(first_row, last_row):
        r = tl.cast(row, tl.int64)
        at = (bh.to(tl.int64) * R + r) * M
        q, do, lse_log2, delta, _ = _load_queries(
            q_ptr + r * stride_qr, stride_qm, stride_qd,
            do_ptr + r * stride_dor, stride_dom, stride_dod,
            out_ptr + r * stride_or, stride_om, stride_od,
            lse_ptr + at, dlse_ptr + at, offs_m, M, HEAD_DIM, HAS_DLSE, BLOCK_D,
        )  # fmt: skip
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        dq, dbias0 = _add_keys(
            dq, dbias0, q, do, lse_log2, delta,
            k_ptr + r * stride_kr, stride_kn, stride_kd,
            v_ptr + r * stride_vr, stride_vn, stride_vd,
            bias_ptr, stride_bm, stride_bn, inner_m, mask_ptr + r * stride_mr, stride_mn,
            0, N, scale, HEAD_DIM, EVEN_N, HAS_MASK, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        if TILES == 2:
            dq, dbias1 = _add_keys(
                dq, dbias1, q, do, lse_log2, delta,
                k_ptr + r * stride_kr, stride_kn, stride_kd,
                v_ptr + r * stride_vr, stride_vn, stride_vd,
                bias_ptr, stride_bm, stride_bn, inner_m, mask_ptr + r * stride_mr, stride_mn,
                BLOCK_N, N, scale, HEAD_DIM, EVEN_N, HAS_MASK, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        dq_offs = head_offsets(offs_m, stride_dqm, stride_dqd, BLOCK_D)
        store_head(dq_ptr + r * stride_dqr + dq_offs, dq * scale, offs_m < M, HEAD_DIM)
    if part >= num_first:
        first_ptr = rest_ptr
        part -= num_first
    plane = part.to(tl.int64) * num_heads + bh
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    parts_ptrs = first_ptr + (plane * M + offs_m[:, None]) * N + offs_n
    tl.store(parts_ptrs, dbias0, mask=mask_m[:, None] & (offs_n < N))
    if TILES == 2:
        tl.store(parts_ptrs + BLOCK_N, dbias1, mask=mask_m[:, None] & (offs_n + BLOCK_N < N))


# fmt: off
@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _attention_backward_short_dk_dv_kernel(
    q_ptr, stride_qb, stride_qh, stride_qr, stride_qm, stride_qd,
    k_ptr, stride_kb, stride_kh, stride_kr, stride_kn, stride_kd,
    v_ptr, stride_vb, stride_vh, stride_vr, stride_vn, stride_vd,
    bias_ptr, stride_bb, stride_bh, stride_bm, stride_bn,
    mask_ptr, stride_mb, stride_mr, stride_mn,  # read only with HAS_MASK
    do_ptr, stride_dob, stride_doh, stride_dor, stride_dom, stride_dod,
    out_ptr, stride_ob, stride_oh, stride_or, stride_om, stride_od,
    lse_ptr,  # [B, H, R, M], contiguous
    dlse_ptr,  # the same, read only with HAS_DLSE
    dk_ptr, stride_dkb, stride_dkh, stride_dkr, stride_dkn, stride_dkd,
    dv_ptr, stride_dvb, stride_dvh, stride_dvr, stride_dvn, stride_dvd,
    M, N, R, H, num_tiles,
    scale,
    HEAD_DIM: tl.constexpr, EVEN_N: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DLSE: tl.constexpr,
    IS_MEAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    pid = tl.program_id(0)
    start_n = pid % num_tiles * BLOCK_N
    # Heads first: those of a key are neighbours in memory as a rule.
    h = (pid // num_tiles % H).to(tl.int64)
    r = (pid // num_tiles // H % R).to(tl.int64)
    b = (pid // num_tiles // H // R).to(tl.int64)
    q_ptr += b * stride_qb + h * stride_qh + r * stride_qr
    k_ptr += b * stride_kb + h * stride_kh + r * stride_kr
    v_ptr += b * stride_vb + h * stride_vh + r * stride_vr
    bias_ptr += b * stride_bb + h * stride_bh
    mask_ptr += b * stride_mb + r * stride_mr
    do_ptr += b * stride_dob + h * stride_doh + r * stride_dor
    out_ptr += b * stride_ob + h * stride_oh + r * stride_or
    dk_ptr += b * stride_dkb + h * stride_dkh + r * stride_dkr
    dv_ptr += b * stride_dvb + h * stride_dvh + r * stride_dvr
    offs_n = start_n + tl.arange(0, BLOCK_N)
    inner_n = tl.minimum(offs_n, N - 1)
    k = _load_rows(k_ptr, stride_kn, stride_kd, inner_n, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v = _load_rows(v_ptr, stride_vn, stride_vd, inner_n, HEAD_DIM, BLOCK_D)
    is_seen = _seen(mask_ptr, stride_mn, offs_n, N, HAS_MASK)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    at = ((b * H + h) * R + r) * M
    # Tiles of scores are transposed: P and dS are left operands straight from registers.
    for start_m in range(0, M, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        inner_m = tl.minimum(offs_m, M - 1)
        q, do, lse_log2, delta, sees_none = _load_queries(
            q_ptr, stride_qm, stride_qd, do_ptr, stride_dom, stride_dod,
            out_ptr, stride_om, stride_od, lse_ptr + at, dlse_ptr + at, offs_m, M,
            HEAD_DIM, HAS_DLSE, BLOCK_D,
        )  # fmt: skip
        bias_ptrs = bias_ptr + tile_offsets(offs_n, stride_bn, inner_m, stride_bm)
        bias = load_tile(bias_ptrs, offs_n < N, offs_n < N, not EVEN_N, False)  # [BLOCK_N, BLOCK_M]
        scores = tl.dot(k, tl.trans(q)) * scale + bias.to(tl.float32)
        p = tl.math.exp2(scores * LOG2_E - lse_log2[None, :])
        if HAS_MASK or not EVEN_N:
            p = tl.where(is_seen[:, None], p, 0.0)
        ds = p * (tl.dot(v, tl.trans(do)) - delta[None, :])
        if IS_MEAN:
            p = tl.where(sees_none[None, :], 1.0 / N, p)
        dv = tl.dot(p.to(do.dtype), do, dv)
        dk = tl.dot(ds.to(q.dtype), q, dk)
    dk_ptrs = dk_ptr + head_offsets(offs_n, stride_dkn, stride_dkd, BLOCK_D)
    dv_ptrs = dv_ptr + head_offsets(offs_n, stride_dvn, stride_dvd, BLOCK_D)
    store_head(dk_ptrs, dk * scale, offs_n < N, HEAD_DIM)
    store_head(dv_ptrs, dv, offs_n < N, HEAD_DIM)


_launch_dq = Launcher(_attention_backward_short_dq_kernel)
_launch_dk_dv = Launcher(_attention_backward_short_dk_dv_kernel)
# Four programs fit on a multiprocessor then, which wait in turn.
_launch_dk_dv_hopper = Launcher(_attention_backward_short_dk_dv_kernel, maxnreg=128)


def takes(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, wanted: str) -> bool:
    """Whether rows are short enough, and all gradients wanted but that of a mask."""
    is_short = max(q.shape[3], k.shape[3]) <= LONGEST and q.shape[4] <= _WIDEST
    is_plain = q.element_size() == 2 and (mask is None or mask.dtype == torch.bool)
    return is_short and is_plain and all(word in wanted for word in ("dq", "dk_dv", "dbias"))


def _new_parts(
    dk: torch.Tensor, dv: torch.Tensor, shape: tuple[int, ...], wanted: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sums of float32 (., *shape), `wanted` or fewer, in one or two tensors.

    They lie where dk and dv will be, or in new memory where those are too small to be of use.
    """
    lent = dk.numel() * dk.element_size() // (4 * math.prod(shape))
    if lent == 0 or 2 * lent < wanted // 2:
        return dk.new_empty((wanted, *shape), dtype=torch.float32), None
    first = scratch((min(lent, wanted), *shape), dk)
    return first, scratch((min(lent, wanted - lent), *shape), dv) if lent < wanted else None


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
    block_d = tiling.padded_head_dim(D)
    bias_strides = problem.broadcast_strides(bias)
    mask_strides = (0, 0, 0) if mask is None else problem.broadcast_strides(mask)
    read = (
        q, *q.stride(),
        k, *k.stride(),
        v, *v.stride(),
        bias, *bias_strides,
        lse if mask is None else mask.view(torch.uint8), *mask_strides,
        dout, *dout.stride(),
        out, *out.stride(),
        lse,
        lse if dlse is None else dlse.contiguous(),
    )  # fmt: skip
    strides = tuple(x.stride() for x in (q, k, v, dout, out, dq, dk, dv))
    compiled_for = (bias.dtype, strides, bias_strides, mask_strides)

    config = _DQ_CONFIG
    num_tiles = tiling.ceil_div(M, config.block_m)
    info = device_info(q.device)
    programs = _PROGRAMS_PER_SM * info.num_sms
    first, rest = _new_parts(dk, dv, (B, H, M, N), min(R, max(1, programs // (num_tiles * B * H))))
    num_first = first.shape[0]
    num_parts = num_first if rest is None else num_first + rest.shape[0]
    rows_per_part = tiling.ceil_div(R, num_parts)
    num_parts = tiling.ceil_div(R, rows_per_part)
    _launch_dq(
        num_tiles * num_parts * B * H,
        strides=compiled_for,
        args=(
            *read,
            dq, *dq.stride(),
            first, first if rest is None else rest,
            M, N, R, H, num_tiles, B * H, num_parts, num_first, rows_per_part,
            scale,
        ),
        constexprs={
            "HEAD_DIM": D, "EVEN_N": N % config.block_n == 0,
            "HAS_MASK": mask is not None, "HAS_DLSE": dlse is not None,
            "TILES": tiling.ceil_div(N, config.block_n),
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": block_d,
        },
        config=config,
    )  # fmt: skip
    more = None if num_parts <= num_first else rest[: num_parts - num_first]
    dbias = sum_of_splits(first[:num_parts], bias, more)

    config = _DK_DV_CONFIG
    num_tiles = tiling.ceil_div(N, config.block_n)
    launch = _launch_dk_dv_hopper if info.arch == "sm_90" else _launch_dk_dv
    launch(
        num_tiles * B * H * R,
        strides=compiled_for,
        args=(
            *read,
            dk, *dk.stride(),
            dv, *dv.stride(),
            M, N, R, H, num_tiles,
            scale,
        ),
        constexprs={
            "HEAD_DIM": D, "EVEN_N": N % config.block_n == 0, "HAS_MASK": mask is not None,
            "HAS_DLSE": dlse is not None, "IS_MEAN": masked_rows == "mean",
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": block_d,
        },
        config=config,
    )  # fmt: skip
    return dq, dk, dv, dbias, new_unwanted(q)
