"""The exact softmax for the few tiles in which the Hopper forward kernel leaves NaN for an lse.

It does so where a query's scores are so far apart that the largest of the first keys is no good
estimate of the largest of all. Here every query is computed with the running maximum, by plain
loads: slow, and rarely called for.
"""

import torch
import triton
import triton.language as tl

from attn_core import tiling
from attn_core.launch import Launcher
from attn_core.tiles.offsets import load_tile, tile_offsets
from attn_core.tiles.softmax import LOG2_E
from attn_core.tuning import TileConfig
from attn_triangle._triton import problem

_CHUNK = 4096  # queries that one program looks through
_CONFIG = TileConfig(64, 32, 4, 1)
_NOT_SPECIALIZED = ["M", "N", "R", "H", "num_queries"]


# fmt: off
@triton.jit
def _redo_tile(
    q_ptr, stride_qm, stride_qd,
    k_ptr, stride_kn, stride_kd,
    v_ptr, stride_vn, stride_vd,
    bias_ptr, stride_bm, stride_bn,
    mask_ptr, stride_mn,
    out_ptr, stride_om, stride_od,
    lse_ptr,
    start_m, M, N, scale,
    HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr, IS_MEAN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Compute BLOCK_M queries of one row; the pointers are those of the row."""
    offs_m = (start_m + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < M
    mask_d = offs_d < HEAD_DIM
    q = load_tile(q_ptr + tile_offsets(offs_m, stride_qm, offs_d, stride_qd), mask_m, mask_d, 1, 1)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    values = tl.zeros([BLOCK_D], tl.float32)
    for start_n in range(0, N, BLOCK_N):
        offs_n = (start_n + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask_n = offs_n < N
        k_ptrs = k_ptr + tile_offsets(offs_n, stride_kn, offs_d, stride_kd)
        v_ptrs = v_ptr + tile_offsets(offs_n, stride_vn, offs_d, stride_vd)
        k = load_tile(k_ptrs, mask_n, mask_d, True, True)
        v = load_tile(v_ptrs, mask_n, mask_d, True, True)
        bias_ptrs = bias_ptr + tile_offsets(offs_m, stride_bm, offs_n, stride_bn)
        inside = mask_m[:, None] & mask_n[None, :]
        bias = tl.load(bias_ptrs, mask=inside, other=0.0).to(tl.float32)
        visible = mask_n
        if HAS_MASK:
            visible &= tl.load(mask_ptr + offs_n * stride_mn, mask=mask_n, other=1) == 0
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias
        scores = tl.where(visible[None, :], scores, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(scores, 1))
        pivot = tl.where(m_new == -float("inf"), 0.0, m_new) * LOG2_E
        p = tl.math.exp2(scores * LOG2_E - pivot[:, None])
        alpha = tl.math.exp2(m_i * LOG2_E - pivot)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        values += tl.sum(v.to(tl.float32), 0)
        m_i = m_new
    sees_none = l_i == 0.0
    out = acc / tl.where(sees_none, 1.0, l_i)[:, None]
    if IS_MEAN:
        out = tl.where(sees_none[:, None], values[None, :] / N, out)
    tl.store(lse_ptr + offs_m, m_i + tl.log(l_i), mask=mask_m)
    out_ptrs = out_ptr + tile_offsets(offs_m, stride_om, offs_d, stride_od)
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_d[None, :])


@triton.jit
def _is_nan(x):
    """1 where x is NaN."""
    return (x != x).to(tl.int32)  # noqa: PLR0124


# fmt: off
@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _redo_kernel(
    q_ptr, stride_qb, stride_qh, stride_qr, stride_qm, stride_qd,
    k_ptr, stride_kb, stride_kh, stride_kr, stride_kn, stride_kd,
    v_ptr, stride_vb, stride_vh, stride_vr, stride_vn, stride_vd,
    bias_ptr, stride_bb, stride_bh, stride_bm, stride_bn,
    mask_ptr, stride_mb, stride_mr, stride_mn,  # read only with HAS_MASK
    out_ptr, stride_ob, stride_oh, stride_or, stride_om, stride_od,
    lse_ptr,  # [B, H, R, M], contiguous
    M, N, R, H, num_queries,
    scale,
    HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr, IS_MEAN: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    start = tl.program_id(0).to(tl.int64) * CHUNK
    offs = start + tl.arange(0, CHUNK)
    lse = tl.load(lse_ptr + offs, mask=offs < num_queries, other=0.0)
    if tl.max(_is_nan(lse), 0) == 0:
        return
    end = tl.minimum(start + CHUNK, num_queries)
    for row in range(start // M, tl.cdiv(end, M)):
        first = tl.maximum(start - row * M, 0) // BLOCK_M * BLOCK_M
        for start_m in range(first, tl.minimum(end - row * M, M), BLOCK_M):
            offs_m = start_m + tl.arange(0, BLOCK_M)
            own_lse = tl.load(lse_ptr + row * M + offs_m, mask=offs_m < M, other=0.0)
            if tl.max(_is_nan(own_lse), 0) == 1:
                r = row % R
                h = row // R % H
                b = row // R // H
                _redo_tile(
                    q_ptr + b * stride_qb + h * stride_qh + r * stride_qr, stride_qm, stride_qd,
                    k_ptr + b * stride_kb + h * stride_kh + r * stride_kr, stride_kn, stride_kd,
                    v_ptr + b * stride_vb + h * stride_vh + r * stride_vr, stride_vn, stride_vd,
                    bias_ptr + b * stride_bb + h * stride_bh, stride_bm, stride_bn,
                    mask_ptr + b * stride_mb + r * stride_mr, stride_mn,
                    out_ptr + b * stride_ob + h * stride_oh + r * stride_or, stride_om, stride_od,
                    lse_ptr + row * M,
                    start_m, M, N, scale,
                    HEAD_DIM, HAS_MASK, IS_MEAN, BLOCK_M, BLOCK_N, BLOCK_D,
                )  # fmt: skip


_launch = Launcher(_redo_kernel)


def redo(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    masked_rows: str,
) -> None:
    """Compute the tiles of out and lse again that hold NaN for an lse."""
    B, H, R, M, D = q.shape
    strides = (q.stride(), k.stride(), v.stride(), out.stride())
    bias_strides = problem.broadcast_strides(bias)
    hidden = lse if mask is None else mask.view(torch.uint8)
    mask_strides = (0, 0, 0) if mask is None else problem.broadcast_strides(mask)
    _launch(
        tiling.ceil_div(lse.numel(), _CHUNK),
        strides=(bias.dtype, strides, bias_strides, mask_strides),
        args=(
            q, *strides[0],
            k, *strides[1],
            v, *strides[2],
            bias, *bias_strides,
            hidden, *mask_strides,
            out, *strides[3],
            lse,
            M, k.shape[3], R, H, lse.numel(),
            scale,
        ),
        constexprs={
            "HEAD_DIM": D, "HAS_MASK": mask is not None, "IS_MEAN": masked_rows == "mean",
            "CHUNK": _CHUNK,
            "BLOCK_M": _CONFIG.block_m, "BLOCK_N": _CONFIG.block_n,
            "BLOCK_D": tiling.padded_head_dim(D),
        },
        config=_CONFIG,
    )  # fmt: skip
