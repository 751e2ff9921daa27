"""Gradients of queries, and what the other kernels of the backward pass read of each query."""

import torch
import triton
import triton.language as tl

from attn_core import tiling
from attn_core.launch import Launcher
from attn_core.tiles.offsets import load_tile, tile_offsets
from attn_core.tiles.softmax import LOG2_E
from attn_triangle._triton import configs, problem
from attn_triangle._triton.keys import VisibleKeys
from attn_triangle._triton.tiles import key_bounds, load_shut, place_of_program


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
    pid_bh, start_m, r, next_row = place_of_program(num_tiles, num_groups, R, ROWS, BLOCK_M)
    b = (pid_bh // H).to(tl.int64)
    h = (pid_bh % H).to(tl.int64)
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


_launch = Launcher(_attention_backward_dq_kernel)


def dq(
    dq: torch.Tensor | None,
    rows: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    keys: VisibleKeys,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> None:
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
        _launch(
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
