"""Backward pass in three kernels and without atomics, so that its bits never change.

With P = exp(S - lse), dP = dO V^T and delta = rowsum(dO * O) - dlse, in every row:

    dS = P * (dP - delta),   dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO,

and dB is the sum of dS over the rows. The first kernel owns BLOCK_M queries of one or two rows,
computes their delta and dQ; the second owns BLOCK_N keys of a row and computes dK and dV; the third
owns a tile of the bias and goes through the rows. Nine products instead of the five that atomics
would allow.
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
from attn_triangle._triton.keys import visible_keys
from attn_triangle._triton.tiles import key_bounds, load_shut
from attn_triangle.layout import new_heads_last, new_unwanted

_PROGRAMS_PER_SM = 8  # of the kernel for dB, which splits its rows among as many
_SUM_CONFIG = TileConfig(1, 1024, 4, 2)


# fmt: off
@triton.jit
def _add_dq(
    dq, q, do, lse_log2, delta, bias, shut, k_ptrs, v_ptrs, mask_n, mask_d, scale,
    MASKED: tl.constexpr, PAD_D: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """Add dS K of one block of keys of one row."""
    k = load_tile(k_ptrs, mask_n, mask_d, MASKED, PAD_D)  # [BLOCK_N, BLOCK_D]
    v = load_tile(v_ptrs, mask_n, mask_d, MASKED, PAD_D)  # [BLOCK_N, BLOCK_D]
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
    if HAS_MASK:
        scores += shut[None, :]
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    p = tl.math.exp2(scores * LOG2_E - lse_log2[:, None])
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


# fmt: off
@triton.jit
def _accumulate_dq(
    dq0, q0, do0, lse0, delta0,
    dq1, q1, do1, lse1, delta1,
    k_ptr, stride_kr, stride_kn, stride_kd,
    v_ptr, stride_vr, stride_vn, stride_vd,
    bias_ptr, stride_bn, bias_offs,
    shut_ptr, stride_sr,
    lo, hi, N, scale, next_row,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Go through the key blocks in [lo, hi) of each row; the pointers are those of the first."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    PAD_D: tl.constexpr = HEAD_DIM != BLOCK_D
    k_offs = tile_offsets(offs_n, stride_kn, offs_d, stride_kd)
    v_offs = tile_offsets(offs_n, stride_vn, offs_d, stride_vd)
    first_key = tl.cast(lo, tl.int64)
    k_ptr += first_key * stride_kn
    v_ptr += first_key * stride_vn
    bias_ptr += first_key * stride_bn
    for start_n in range(lo, hi, BLOCK_N):
        mask_n = offs_n < N - start_n
        bias = tl.load(bias_ptr + bias_offs).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        shut0, shut1 = load_shut(shut_ptr, next_row * stride_sr, start_n + offs_n, ROWS, HAS_MASK)
        dq0 = _add_dq(
            dq0, q0, do0, lse0, delta0, bias, shut0, k_ptr + k_offs, v_ptr + v_offs,
            mask_n, mask_d, scale, MASKED, PAD_D, HAS_MASK, PRECISION,
        )  # fmt: skip
        if ROWS == 2:
            k_ptrs = k_ptr + next_row * stride_kr + k_offs
            v_ptrs = v_ptr + next_row * stride_vr + v_offs
            dq1 = _add_dq(
                dq1, q1, do1, lse1, delta1, bias, shut1, k_ptrs, v_ptrs,
                mask_n, mask_d, scale, MASKED, PAD_D, HAS_MASK, PRECISION,
            )  # fmt: skip
        k_ptr += BLOCK_N * stride_kn
        v_ptr += BLOCK_N * stride_vn
        bias_ptr += BLOCK_N * stride_bn
    return dq0, dq1


# fmt: off
@triton.jit
def _start_row(
    q_ptrs, do_ptrs, out_ptrs, lse_ptrs, dlse_ptrs, rows_ptrs, mask_m, mask_d,
    PAD_D: tl.constexpr, HAS_DLSE: tl.constexpr,
):
    # fmt: on
    """Load the queries of one row; compute and store what the other kernels read of them."""
    q = load_tile(q_ptrs, mask_m, mask_d, False, PAD_D)  # [BLOCK_M, BLOCK_D]
    do = load_tile(do_ptrs, mask_m, mask_d, False, PAD_D)  # [BLOCK_M, BLOCK_D]
    out = load_tile(out_ptrs, mask_m, mask_d, False, PAD_D)  # [BLOCK_M, BLOCK_D]
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptrs, mask=mask_m, other=0.0)
    lse_log2 = tl.load(lse_ptrs, mask=mask_m, other=float("inf")) * LOG2_E
    # A query without keys has lse -inf; +inf makes its probabilities 0 instead of NaN.
    lse_log2 = tl.where(lse_log2 == -float("inf"), float("inf"), lse_log2)
    tl.store(rows_ptrs, lse_log2, mask=mask_m)
    tl.store(rows_ptrs + 1, delta, mask=mask_m)
    return q, do, lse_log2, delta


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_dq_kernel(
    q_ptr, stride_qb, stride_qh, stride_qr, stride_qm, stride_qd,
    k_ptr, stride_kb, stride_kh, stride_kr, stride_kn, stride_kd,
    v_ptr, stride_vb, stride_vh, stride_vr, stride_vn, stride_vd,
    bias_ptr, stride_bb, stride_bh, stride_bm, stride_bn,
    shut_ptr,  # [B, R, N or more]; as range_ptr, read only with HAS_MASK
    range_ptr,  # [B, R, 2]
    stride_sb, stride_sr, stride_rb, stride_rr,
    out_ptr, stride_ob, stride_oh, stride_or, stride_om, stride_od,
    do_ptr, stride_dob, stride_doh, stride_dor, stride_dom, stride_dod,
    lse_ptr,  # [B, H, R, M], contiguous
    dlse_ptr,  # the same, read only with HAS_DLSE
    dq_ptr, stride_dqb, stride_dqh, stride_dqr, stride_dqm, stride_dqd,
    rows_ptr,  # [B, H, R, M, 2], contiguous: lse in units of log2, and delta
    M, N, R, H, num_tiles, num_groups,
    scale,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, EVEN_N: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_DLSE: tl.constexpr, NEEDS_DQ: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    pid = tl.program_id(0)
    start_m = pid % num_tiles * BLOCK_M
    pid_bh = pid // num_tiles // num_groups
    r0 = pid // num_tiles % num_groups * ROWS
    next_row = (tl.minimum(r0 + ROWS, R) - 1 - r0).to(tl.int64)  # 0 where there is no second row
    b = (pid_bh // H).to(tl.int64)
    h = (pid_bh % H).to(tl.int64)
    r = r0.to(tl.int64)
    first_m = start_m.to(tl.int64)
    k_ptr += b * stride_kb + h * stride_kh + r * stride_kr
    v_ptr += b * stride_vb + h * stride_vh + r * stride_vr
    shut_ptr += b * stride_sb + r * stride_sr
    range_ptr += b * stride_rb + r * stride_rr

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < M - start_m
    mask_d = offs_d < HEAD_DIM
    PAD_D: tl.constexpr = HEAD_DIM != BLOCK_D
    # Queries past the end repeat the last one: nothing needs a mask before they would be stored.
    inner_m = tl.minimum(offs_m, M - 1 - start_m)
    q_ptr += b * stride_qb + h * stride_qh + r * stride_qr + first_m * stride_qm
    q_ptrs = q_ptr + tile_offsets(inner_m, stride_qm, offs_d, stride_qd)
    do_ptr += b * stride_dob + h * stride_doh + r * stride_dor + first_m * stride_dom
    do_ptrs = do_ptr + tile_offsets(inner_m, stride_dom, offs_d, stride_dod)
    out_ptr += b * stride_ob + h * stride_oh + r * stride_or + first_m * stride_om
    out_ptrs = out_ptr + tile_offsets(inner_m, stride_om, offs_d, stride_od)
    row = (pid_bh.to(tl.int64) * R + r) * M + start_m + offs_m
    q0, do0, lse0, delta0 = _start_row(
        q_ptrs, do_ptrs, out_ptrs, lse_ptr + row, dlse_ptr + row, rows_ptr + 2 * row,
        mask_m, mask_d, PAD_D, HAS_DLSE,
    )  # fmt: skip
    q1, do1, lse1, delta1 = q0, do0, lse0, delta0
    if ROWS == 2:
        row += next_row * M
        q1, do1, lse1, delta1 = _start_row(
            q_ptrs + next_row * stride_qr, do_ptrs + next_row * stride_dor,
            out_ptrs + next_row * stride_or, lse_ptr + row, dlse_ptr + row, rows_ptr + 2 * row,
            mask_m, mask_d, PAD_D, HAS_DLSE,
        )  # fmt: skip
    if not NEEDS_DQ:
        return
    bias_ptr += b * stride_bb + h * stride_bh + first_m * stride_bm
    bias_offs = tile_offsets(inner_m, stride_bm, tl.arange(0, BLOCK_N), stride_bn)

    dq0 = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq1 = dq0
    lo, hi = key_bounds(range_ptr, range_ptr + next_row * stride_rr, N, HAS_MASK, BLOCK_N)
    if lo < hi:  # without this branch ptxas does not overlap the products (its remark C7515)
        dq0, dq1 = _accumulate_dq(
            dq0, q0, do0, lse0, delta0, dq1, q1, do1, lse1, delta1,
            k_ptr, stride_kr, stride_kn, stride_kd, v_ptr, stride_vr, stride_vn, stride_vd,
            bias_ptr, stride_bn, bias_offs, shut_ptr, stride_sr, lo, hi, N, scale, next_row,
            HEAD_DIM, ROWS, not EVEN_N, HAS_MASK, PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip

    dq_ptr += b * stride_dqb + h * stride_dqh + r * stride_dqr + first_m * stride_dqm
    dq_ptrs = dq_ptr + tile_offsets(offs_m, stride_dqm, offs_d, stride_dqd)
    mask = mask_m[:, None] & mask_d[None, :]
    tl.store(dq_ptrs, (dq0 * scale).to(dq_ptr.dtype.element_ty), mask=mask)
    if ROWS == 2:
        dq_ptrs += next_row * stride_dqr
        mask = tl.where(next_row == 1, mask, False)
        tl.store(dq_ptrs, (dq1 * scale).to(dq_ptr.dtype.element_ty), mask=mask)


# fmt: off
@triton.jit
def _accumulate_dk_dv(
    dk, dv, dshut, k, v, shut,
    q_ptr, stride_qm, stride_qd,
    do_ptr, stride_dom, stride_dod,
    bias_ptr, stride_bm, bias_offs,
    row_ptr,
    hi, M, scale,
    HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, IS_ADDITIVE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Add dS^T Q, P^T dO and, for an additive mask, the sums of dS^T over the queries up to hi.

    Tiles of scores are transposed.
    """
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    PAD_D: tl.constexpr = HEAD_DIM != BLOCK_D
    q_offs = tile_offsets(offs_m, stride_qm, offs_d, stride_qd)
    do_offs = tile_offsets(offs_m, stride_dom, offs_d, stride_dod)
    for start_m in range(0, hi, BLOCK_M):
        mask_m = offs_m < M - start_m
        q = load_tile(q_ptr + q_offs, mask_m, mask_d, MASKED, PAD_D)  # [BLOCK_M, BLOCK_D]
        do = load_tile(do_ptr + do_offs, mask_m, mask_d, MASKED, PAD_D)  # [BLOCK_M, BLOCK_D]
        bias_t = tl.load(bias_ptr + bias_offs).to(tl.float32)  # [BLOCK_N, BLOCK_M]
        # Both in one load: two loads of BLOCK_M numbers would be made by every thread.
        row_ptrs = row_ptr + 2 * (start_m + offs_m)[:, None] + tl.arange(0, 2)[None, :]
        lse_log2, delta = tl.split(load_tile(row_ptrs, mask_m, mask_m, MASKED, False))
        scores_t = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale + bias_t
        if IS_ADDITIVE:
            scores_t += shut[:, None]
        dp_t = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        p_t = tl.math.exp2(scores_t * LOG2_E - lse_log2[None, :])
        ds_t = p_t * (dp_t - delta[None, :])
        dv = tl.dot(p_t.to(do.dtype), do, dv, input_precision=PRECISION)
        dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=PRECISION)
        if IS_ADDITIVE:
            dshut += tl.sum(ds_t, 1)
        q_ptr += BLOCK_M * stride_qm
        do_ptr += BLOCK_M * stride_dom
        bias_ptr += BLOCK_M * stride_bm
    return dk, dv, dshut


@triton.jit
def _sum_of_unseeing(
    do_ptr, stride_dom, stride_dod, lse_ptr, M,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum dO over the queries of a row that see no key: [BLOCK_D]."""
    CHUNK: tl.constexpr = 1024
    offs_d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, M, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        lowest = tl.min(tl.load(lse_ptr + offs, mask=offs < M, other=0.0), 0)
        if lowest == -float("inf"):
            for start_m in range(start, tl.minimum(start + CHUNK, M), BLOCK_M):
                offs_m = start_m + tl.arange(0, BLOCK_M)
                lse = tl.load(lse_ptr + offs_m, mask=offs_m < M, other=0.0)
                do_ptrs = do_ptr + tile_offsets(offs_m.to(tl.int64), stride_dom, offs_d, stride_dod)
                do = load_tile(do_ptrs, lse == -float("inf"), offs_d < HEAD_DIM, True, True)
                total += tl.sum(do.to(tl.float32), 0)
    return total


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_dk_dv_kernel(
    q_ptr, stride_qb, stride_qh, stride_qr, stride_qm, stride_qd,
    k_ptr, stride_kb, stride_kh, stride_kr, stride_kn, stride_kd,
    v_ptr, stride_vb, stride_vh, stride_vr, stride_vn, stride_vd,
    bias_ptr, stride_bb, stride_bh, stride_bn, stride_bm,
    shut_ptr,  # [B, R, N or more]; as range_ptr, read only with HAS_MASK
    range_ptr,  # [B, R, 2]
    stride_sb, stride_sr, stride_rb, stride_rr,
    do_ptr, stride_dob, stride_doh, stride_dor, stride_dom, stride_dod,
    lse_ptr,  # [B, H, R, M], contiguous
    rows_ptr,  # [B, H, R, M, 2], contiguous: lse in units of log2, and delta
    dk_ptr, stride_dkb, stride_dkh, stride_dkr, stride_dkn, stride_dkd,
    dv_ptr, stride_dvb, stride_dvh, stride_dvr, stride_dvn, stride_dvd,
    dshut_ptr,  # [B, H, R, N], contiguous; written only with IS_ADDITIVE
    M, N, R, H, num_tiles,
    scale,
    HEAD_DIM: tl.constexpr, EVEN_M: tl.constexpr, HAS_MASK: tl.constexpr,
    IS_ADDITIVE: tl.constexpr, IS_MEAN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    pid = tl.program_id(0)
    start_n = pid % num_tiles * BLOCK_N
    pid_row = (pid // num_tiles).to(tl.int64)
    r = pid_row % R
    h = pid_row // R % H
    b = pid_row // R // H
    first_n = start_n.to(tl.int64)

    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_n = offs_n < N - start_n
    mask_d = offs_d < HEAD_DIM
    PAD_D: tl.constexpr = HEAD_DIM != BLOCK_D
    # Keys past the end repeat the last one: nothing needs a mask before they would be stored.
    inner_n = tl.minimum(offs_n, N - 1 - start_n)
    k_ptr += b * stride_kb + h * stride_kh + r * stride_kr + first_n * stride_kn
    k_ptrs = k_ptr + tile_offsets(inner_n, stride_kn, offs_d, stride_kd)
    k = load_tile(k_ptrs, mask_n, mask_d, False, PAD_D)  # [BLOCK_N, BLOCK_D]
    v_ptr += b * stride_vb + h * stride_vh + r * stride_vr + first_n * stride_vn
    v_ptrs = v_ptr + tile_offsets(inner_n, stride_vn, offs_d, stride_vd)
    v = load_tile(v_ptrs, mask_n, mask_d, False, PAD_D)  # [BLOCK_N, BLOCK_D]
    bias_ptr += b * stride_bb + h * stride_bh + first_n * stride_bn
    bias_offs = tile_offsets(inner_n, stride_bn, tl.arange(0, BLOCK_M), stride_bm)
    q_ptr += b * stride_qb + h * stride_qh + r * stride_qr
    do_ptr += b * stride_dob + h * stride_doh + r * stride_dor
    rows_ptr += 2 * pid_row * M

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dshut = 0.0
    shut = 0.0
    shut_ptr += b * stride_sb + r * stride_sr + start_n
    if IS_ADDITIVE:
        dshut = tl.zeros([BLOCK_N], tl.float32)
        shut = tl.load(shut_ptr + inner_n)
    hi = M
    if HAS_MASK:  # none of the queries is of use to keys that no query sees
        range_ptr += b * stride_rb + r * stride_rr
        is_outside = (start_n >= tl.load(range_ptr + 1)) | (start_n + BLOCK_N <= tl.load(range_ptr))
        hi = tl.where(is_outside, 0, M)
    dk, dv, dshut = _accumulate_dk_dv(
        dk, dv, dshut, k, v, shut, q_ptr, stride_qm, stride_qd, do_ptr, stride_dom, stride_dod,
        bias_ptr, stride_bm, bias_offs, rows_ptr, hi, M, scale,
        HEAD_DIM, not EVEN_M, IS_ADDITIVE, PRECISION, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    if IS_ADDITIVE:
        tl.store(dshut_ptr + pid_row * N + start_n + offs_n, dshut, mask=mask_n)
    elif HAS_MASK:
        # The tiles above took every key for visible. Keys do not mix: whatever a masked one
        # gathered, NaN if its scores overflowed, ends here.
        visible = tl.load(shut_ptr + inner_n) == 0.0
        dk = tl.where(visible[:, None], dk, 0.0)
        dv = tl.where(visible[:, None], dv, 0.0)
    if IS_MEAN:
        total = _sum_of_unseeing(
            do_ptr, stride_dom, stride_dod, lse_ptr + pid_row * M, M, HEAD_DIM, BLOCK_M, BLOCK_D
        )
        dv += total[None, :] / N

    mask = mask_n[:, None] & mask_d[None, :]
    dk_ptr += b * stride_dkb + h * stride_dkh + r * stride_dkr + first_n * stride_dkn
    dk_ptrs = dk_ptr + tile_offsets(offs_n, stride_dkn, offs_d, stride_dkd)
    tl.store(dk_ptrs, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    dv_ptr += b * stride_dvb + h * stride_dvh + r * stride_dvr + first_n * stride_dvn
    dv_ptrs = dv_ptr + tile_offsets(offs_n, stride_dvn, offs_d, stride_dvd)
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=mask)


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
@triton.jit(do_not_specialize=["num_splits", "num_elements"])
def _sum_of_splits_kernel(
    parts_ptr,  # [num_splits, num_elements], contiguous
    total_ptr,  # [num_elements], contiguous
    num_splits, num_elements,
    BLOCK_N: tl.constexpr,
):
    # fmt: on
    offs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < num_elements
    total = tl.zeros([BLOCK_N], tl.float32)
    for _ in range(num_splits):
        total += tl.load(parts_ptr + offs, mask=mask, other=0.0)
        parts_ptr += num_elements
    tl.store(total_ptr + offs, total.to(total_ptr.dtype.element_ty), mask=mask)


_launch_dq = Launcher(_attention_backward_dq_kernel)
_launch_dk_dv = Launcher(_attention_backward_dk_dv_kernel)
_launch_dbias = Launcher(_attention_backward_dbias_kernel)
_launch_sum = Launcher(_sum_of_splits_kernel)


def attention_backward(
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
    wanted: str,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients dq, dk, dv, dbias and dmask, given those of out (dout) and, maybe, lse (dlse).

    What is not `wanted` is an empty tensor. All are deterministic, asked or not.
    """
    N = k.shape[3]
    needs_dmask = mask is not None and "dmask" in wanted
    needs_dk_dv = "dk_dv" in wanted or needs_dmask
    dq = new_heads_last(q) if "dq" in wanted else new_unwanted(q)
    dk, dv = (new_heads_last(x) if needs_dk_dv else new_unwanted(x) for x in (k, v))
    dbias, dmask = new_unwanted(bias), new_unwanted(q)
    if q.numel() * N == 0:
        if "dbias" in wanted:
            dbias = bias.new_zeros(bias.shape)
        if needs_dmask:
            dmask = mask.new_zeros(mask.shape)
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias, dmask
    keys = visible_keys(mask, N, unread=lse)
    rows = lse.new_empty((*lse.shape, 2))
    _dq(dq if "dq" in wanted else None, rows, dout, dlse, q, k, v, bias, keys, out, lse, scale)
    if needs_dk_dv:
        dshut = _dk_dv(dk, dv, dout, q, k, v, bias, keys, lse, rows, scale, masked_rows == "mean")
    if needs_dmask:
        dmask = dshut.sum(1).sum_to_size(mask.shape).to(mask.dtype)
    if "dbias" in wanted:
        dbias = _dbias(dout, q, k, v, bias, keys, rows, scale)
    return dq, dk, dv, dbias, dmask


def _dq(dq, rows, dout, dlse, q, k, v, bias, keys, out, lse, scale):
    """Fill `rows` (B, H, R, M, 2) for the other two kernels and, unless it is None, dq."""
    B, H, R, M, D = q.shape
    N = k.shape[3]
    group = problem.rows_per_program(q)
    num_groups = tiling.ceil_div(R, group)
    needs_dq = dq is not None
    dq = dq if needs_dq else dout  # not written
    strides = tuple(tensor.stride() for tensor in (q, k, v, out, dout, dq))

    def launch(config):
        packed = problem.packed_bias(bias, N, config.block_n)
        bias_strides = problem.broadcast_strides(packed)
        num_tiles = tiling.ceil_div(M, config.block_m)
        _launch_dq(
            num_tiles * num_groups * B * H,
            strides=(packed.dtype, strides, bias_strides, keys.strides),
            args=(
                q, *strides[0],
                k, *strides[1],
                v, *strides[2],
                packed, *bias_strides,
                keys.shut, keys.range, *keys.strides,
                out, *strides[3],
                dout, *strides[4],
                lse,
                lse if dlse is None else dlse.contiguous(),
                dq, *strides[5],
                rows,
                M, N, R, H, num_tiles, num_groups,
                scale,
            ),
            constexprs={
                "HEAD_DIM": D, "ROWS": group, "EVEN_N": N % config.block_n == 0,
                "HAS_MASK": keys.kind != "none", "HAS_DLSE": dlse is not None,
                "NEEDS_DQ": needs_dq, "PRECISION": tiling.dot_precision(q),
                "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
                "BLOCK_D": tiling.padded_head_dim(D),
            },
            config=config,
        )  # fmt: skip

    launch(configs.tiles(configs.BACKWARD_DQ, q, k, launch))


def _dk_dv(dk, dv, dout, q, k, v, bias, keys, lse, rows, scale, is_mean):
    """Fill dk and dv from the `rows` that `_dq` left; return what an additive mask gets.

    That is the sum of dS over the queries, (B, H, R, N) in float32.
    """
    B, H, R, M, D = q.shape
    N = k.shape[3]
    is_additive = keys.kind == "additive"
    dshut = rows.new_empty((B, H, R, N)) if is_additive else rows
    strides = tuple(tensor.stride() for tensor in (q, k, v, dout, dk, dv))

    def launch(config):
        num_tiles = tiling.ceil_div(N, config.block_n)
        bias_t = problem.packed_bias(bias.mT, M, config.block_m)  # as tiles of scores are read
        bias_strides = problem.broadcast_strides(bias_t)
        _launch_dk_dv(
            num_tiles * B * H * R,
            strides=(bias_t.dtype, strides, bias_strides, keys.strides),
            args=(
                q, *strides[0],
                k, *strides[1],
                v, *strides[2],
                bias_t, *bias_strides,
                keys.shut, keys.range, *keys.strides,
                dout, *strides[3],
                lse,
                rows,
                dk, *strides[4],
                dv, *strides[5],
                dshut,
                M, N, R, H, num_tiles,
                scale,
            ),
            constexprs={
                "HEAD_DIM": D, "EVEN_M": M % config.block_m == 0,
                "HAS_MASK": keys.kind != "none", "IS_ADDITIVE": is_additive, "IS_MEAN": is_mean,
                "PRECISION": tiling.dot_precision(q),
                "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
                "BLOCK_D": tiling.padded_head_dim(D),
            },
            config=config,
        )  # fmt: skip

    launch(configs.tiles(configs.BACKWARD_DK_DV, q, k, launch))
    return dshut


def _dbias(dout, q, k, v, bias, keys, rows, scale):
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
        _launch_dbias(
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


def sum_of_splits(parts, bias):
    """Sum (parts, B, H, M, N) to the gradient of a bias that may have been broadcast."""
    if parts.shape[1:] != bias.shape:
        return parts.sum(0).sum_to_size(bias.shape).to(bias.dtype)
    dbias = bias.new_empty(bias.shape)
    _launch_sum(
        tiling.ceil_div(dbias.numel(), _SUM_CONFIG.block_n),
        strides=bias.dtype,
        args=(parts, dbias, parts.shape[0], dbias.numel()),
        constexprs={"BLOCK_N": _SUM_CONFIG.block_n},
        config=_SUM_CONFIG,
    )
    return dbias
