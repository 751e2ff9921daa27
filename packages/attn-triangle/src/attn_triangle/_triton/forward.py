"""Forward pass: one program attends with BLOCK_M queries of one or two rows to all their keys.

The rows of a program share each tile of the bias, which is the larger part of what it reads.
"""

import torch
import triton
import triton.language as tl

from attn_core import tiling
from attn_core.launch import Launcher
from attn_core.tiles.offsets import load_tile, tile_offsets
from attn_core.tiles.softmax import LOG2_E
from attn_core.tuning import TileConfig
from attn_triangle._triton import configs, problem
from attn_triangle._triton.keys import visible_keys
from attn_triangle._triton.tiles import key_bounds, load_shut, place_of_program
from attn_triangle.layout import new_heads_last, new_lse


# fmt: off
@triton.jit
def _attend(
    acc, m_i, l_i, q, bias, shut, k_ptrs, v_ptrs, mask_n, mask_d, scale,
    MASKED: tl.constexpr, PAD_D: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """Attend to one block of keys of one row: online softmax, m_i and scores in natural units."""
    k = load_tile(k_ptrs, mask_n, mask_d, MASKED, PAD_D)  # [BLOCK_N, BLOCK_D]
    v = load_tile(v_ptrs, mask_n, mask_d, MASKED, PAD_D)  # [BLOCK_N, BLOCK_D]
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
    if HAS_MASK:
        scores += shut[None, :]
    m_new = tl.maximum(m_i, tl.max(scores, 1))
    pivot = tl.where(m_new == -float("inf"), 0.0, m_new) * LOG2_E
    p = tl.math.exp2(scores * LOG2_E - pivot[:, None])  # [BLOCK_M, BLOCK_N]
    alpha = tl.math.exp2(m_i * LOG2_E - pivot)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m_new, l_i


# fmt: off
@triton.jit
def _attend_keys(
    acc0, m0, l0, q0,
    acc1, m1, l1, q1,
    k_ptr, stride_kr, stride_kn, stride_kd,
    v_ptr, stride_vr, stride_vn, stride_vd,
    bias_ptr, stride_bn, bias_offs,
    shut_ptr, stride_sr,
    lo, hi, N, scale, next_row,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Attend to the key blocks in [lo, hi) of each row; the pointers are those of the first."""
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
        acc0, m0, l0 = _attend(
            acc0, m0, l0, q0, bias, shut0, k_ptr + k_offs, v_ptr + v_offs, mask_n, mask_d, scale,
            MASKED, PAD_D, HAS_MASK, PRECISION,
        )  # fmt: skip
        if ROWS == 2:
            k_ptrs = k_ptr + next_row * stride_kr + k_offs
            v_ptrs = v_ptr + next_row * stride_vr + v_offs
            acc1, m1, l1 = _attend(
                acc1, m1, l1, q1, bias, shut1, k_ptrs, v_ptrs, mask_n, mask_d, scale,
                MASKED, PAD_D, HAS_MASK, PRECISION,
            )  # fmt: skip
        k_ptr += BLOCK_N * stride_kn
        v_ptr += BLOCK_N * stride_vn
        bias_ptr += BLOCK_N * stride_bn
    return acc0, m0, l0, acc1, m1, l1


@triton.jit
def _mean_value(
    v_ptr, stride_vn, stride_vd, N,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Average the values of one row: [BLOCK_D]."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    v_ptrs = v_ptr + tile_offsets(offs_n, stride_vn, offs_d, stride_vd)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start_n in range(0, N, BLOCK_N):
        v = load_tile(v_ptrs, offs_n < N - start_n, offs_d < HEAD_DIM, True, True)
        total += tl.sum(v.to(tl.float32), 0)
        v_ptrs += BLOCK_N * stride_vn
    return total / N


# fmt: off
@triton.jit
def _finish(
    acc, m_i, l_i,
    v_ptr, stride_vn, stride_vd,
    out_ptrs, lse_ptrs, mask_m, N,
    HEAD_DIM: tl.constexpr, IS_MEAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Normalise and store the results of one row."""
    sees_none = l_i == 0.0
    out = acc / tl.where(sees_none, 1.0, l_i)[:, None]
    if IS_MEAN and tl.max(sees_none.to(tl.int32), 0) == 1:
        mean = _mean_value(v_ptr, stride_vn, stride_vd, N, HEAD_DIM, BLOCK_N, BLOCK_D)
        out = tl.where(sees_none[:, None], mean[None, :], out)
    tl.store(lse_ptrs, m_i + tl.log(l_i), mask=mask_m)
    mask = mask_m[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    tl.store(out_ptrs, out.to(out_ptrs.dtype.element_ty), mask=mask)


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_forward_kernel(
    q_ptr, stride_qb, stride_qh, stride_qr, stride_qm, stride_qd,
    k_ptr, stride_kb, stride_kh, stride_kr, stride_kn, stride_kd,
    v_ptr, stride_vb, stride_vh, stride_vr, stride_vn, stride_vd,
    bias_ptr, stride_bb, stride_bh, stride_bm, stride_bn,
    shut_ptr,  # [B, R, N or more]; as range_ptr, read only with HAS_MASK
    range_ptr,  # [B, R, 2]
    stride_sb, stride_sr, stride_rb, stride_rr,
    out_ptr, stride_ob, stride_oh, stride_or, stride_om, stride_od,
    lse_ptr,  # [B, H, R, M], contiguous
    M, N, R, H, num_tiles, num_groups,
    scale,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, EVEN_N: tl.constexpr, HAS_MASK: tl.constexpr,
    IS_MEAN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    pid_bh, start_m, r, next_row = place_of_program(num_tiles, num_groups, R, ROWS, BLOCK_M)
    b = (pid_bh // H).to(tl.int64)
    h = (pid_bh % H).to(tl.int64)
    q_ptr += b * stride_qb + h * stride_qh + r * stride_qr
    k_ptr += b * stride_kb + h * stride_kh + r * stride_kr
    v_ptr += b * stride_vb + h * stride_vh + r * stride_vr
    bias_ptr += b * stride_bb + h * stride_bh
    shut_ptr += b * stride_sb + r * stride_sr
    range_ptr += b * stride_rb + r * stride_rr

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < M - start_m
    mask_d = offs_d < HEAD_DIM
    PAD_D: tl.constexpr = HEAD_DIM != BLOCK_D
    first_m = start_m.to(tl.int64)
    # Queries past the end repeat the last one: nothing needs a mask before they would be stored.
    inner_m = tl.minimum(offs_m, M - 1 - start_m)
    q_ptrs = q_ptr + first_m * stride_qm + tile_offsets(inner_m, stride_qm, offs_d, stride_qd)
    q0 = load_tile(q_ptrs, mask_m, mask_d, False, PAD_D)  # [BLOCK_M, BLOCK_D]
    q1 = q0
    if ROWS == 2:
        q1 = load_tile(q_ptrs + next_row * stride_qr, mask_m, mask_d, False, PAD_D)
    bias_ptr += first_m * stride_bm
    bias_offs = tile_offsets(inner_m, stride_bm, tl.arange(0, BLOCK_N), stride_bn)

    acc0 = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m0 = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l0 = tl.zeros([BLOCK_M], tl.float32)
    acc1, m1, l1 = acc0, m0, l0
    lo, hi = key_bounds(range_ptr, range_ptr + next_row * stride_rr, N, HAS_MASK, BLOCK_N)
    acc0, m0, l0, acc1, m1, l1 = _attend_keys(
        acc0, m0, l0, q0, acc1, m1, l1, q1,
        k_ptr, stride_kr, stride_kn, stride_kd, v_ptr, stride_vr, stride_vn, stride_vd,
        bias_ptr, stride_bn, bias_offs, shut_ptr, stride_sr, lo, hi, N, scale, next_row,
        HEAD_DIM, ROWS, not EVEN_N, HAS_MASK, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    out_ptr += b * stride_ob + h * stride_oh + r * stride_or
    out_ptrs = out_ptr + first_m * stride_om + tile_offsets(offs_m, stride_om, offs_d, stride_od)
    lse_ptrs = lse_ptr + (pid_bh.to(tl.int64) * R + r) * M + start_m + offs_m
    _finish(
        acc0, m0, l0, v_ptr, stride_vn, stride_vd, out_ptrs, lse_ptrs, mask_m, N,
        HEAD_DIM, IS_MEAN, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if ROWS == 2:
        _finish(
            acc1, m1, l1, v_ptr + next_row * stride_vr, stride_vn, stride_vd,
            out_ptrs + next_row * stride_or, lse_ptrs + M,
            tl.where(next_row == 1, mask_m, False), N,
            HEAD_DIM, IS_MEAN, BLOCK_N, BLOCK_D,
        )  # fmt: skip


_launch = Launcher(_attention_forward_kernel)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    masked_rows: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out like q (B, H, R, M, D) and lse (B, H, R, M), as `reference.attention` defines them."""
    B, H, R, M, D = q.shape
    N = k.shape[3]
    out, lse = new_heads_last(q), new_lse(q)
    if q.numel() * N == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    rows = problem.rows_per_program(q)
    num_groups = tiling.ceil_div(R, rows)
    keys = visible_keys(mask, N, unread=lse)
    q_strides, k_strides, v_strides, out_strides = q.stride(), k.stride(), v.stride(), out.stride()

    def launch(config: TileConfig) -> None:
        packed = problem.packed_bias(bias, N, config.block_n)
        bias_strides = problem.broadcast_strides(packed)
        num_tiles = tiling.ceil_div(M, config.block_m)
        _launch(
            num_tiles * num_groups * B * H,
            strides=(packed.dtype, q_strides, k_strides, v_strides, bias_strides, keys.strides),
            args=(
                q, *q_strides,
                k, *k_strides,
                v, *v_strides,
                packed, *bias_strides,
                keys.shut, keys.range, *keys.strides,
                out, *out_strides,
                lse,
                M, N, R, H, num_tiles, num_groups,
                scale,
            ),
            constexprs={
                "HEAD_DIM": D, "ROWS": rows, "EVEN_N": N % config.block_n == 0,
                "HAS_MASK": mask is not None, "IS_MEAN": masked_rows == "mean",
                "PRECISION": tiling.dot_precision(q),
                "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
                "BLOCK_D": tiling.padded_head_dim(D),
            },
            config=config,
        )  # fmt: skip

    launch(configs.tiles(configs.FORWARD, q, k, launch))
    return out, lse
