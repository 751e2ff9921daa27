"""Gradients of keys and values: a program owns BLOCK_N keys of a row.

Tiles of scores are transposed.
"""

import torch
import triton
import triton.language as tl

from attn_core import tiling
from attn_core.launch import Launcher
from attn_core.tiles.offsets import load_tile, tile_offsets
from attn_core.tiles.softmax import LOG2_E
from attn_triangle._triton import configs, problem
from attn_triangle._triton.keys import VisibleKeys
from attn_triangle._triton.tiles import sum_of_unseeing


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
        total, _ = sum_of_unseeing(
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


_launch = Launcher(_attention_backward_dk_dv_kernel)


def dk_dv(
    dk: torch.Tensor,
    dv: torch.Tensor,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    keys: VisibleKeys,
    lse: torch.Tensor,
    rows: torch.Tensor,
    scale: float,
    is_mean: bool,
) -> torch.Tensor:
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
        _launch(
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
