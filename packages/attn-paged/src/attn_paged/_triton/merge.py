"""The parts of attention that splits of the keys give, put together in the order of the splits."""

import torch
import triton
import triton.language as tl

from attn_core.launch import Launcher
from attn_core.tiles.softmax import LOG2_E, finish_softmax, online_softmax_masked
from attn_core.tuning import TileConfig
from attn_paged._triton import problem

_TILE = 4096  # elements of parts that a program holds


@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _merge_splits_kernel(
    parts_ptr,  # [num_splits, T, H, D_v], contiguous
    parts_lse_ptr,  # [num_splits, H, T], contiguous
    out_ptr,  # [T, H, D_v], contiguous
    lse_ptr,  # [H, T], contiguous
    T, H, num_splits,
    HEAD_DIM_V: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Merge one row: a split is a key whose score is its lse and whose value is its output."""
    row = tl.program_id(0).to(tl.int64)
    num_rows = T.to(tl.int64) * H
    lse_row = row % H * T + row // H
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_DV)
    mask_d = (offs_d < HEAD_DIM_V)[None, :]
    m_i = tl.full([1], -float("inf"), tl.float32)
    l_i = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, BLOCK_DV], tl.float32)
    for start_s in range(0, num_splits, BLOCK_S):
        splits = start_s + offs_s
        mask_s = splits < num_splits
        lse = tl.load(parts_lse_ptr + splits * num_rows + lse_row, mask=mask_s, other=-float("inf"))
        rows = (splits * num_rows + row) * HEAD_DIM_V
        parts_ptrs = parts_ptr + rows[:, None] + offs_d[None, :]
        parts = tl.load(parts_ptrs, mask=mask_s[:, None] & mask_d, other=0.0)  # [BLOCK_S, BLOCK_DV]
        m_i, l_i, alpha, p = online_softmax_masked(m_i, l_i, lse[None, :], LOG2_E, mask_s[None, :])
        acc = acc * alpha[:, None] + tl.sum(tl.trans(p) * parts, 0)[None, :]

    out, lse = finish_softmax(m_i, l_i, acc)
    tl.store(lse_ptr + lse_row + tl.arange(0, 1), lse)
    out_ptrs = out_ptr + row * HEAD_DIM_V + offs_d[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_d)


_launch = Launcher(_merge_splits_kernel)


def merge_splits(
    parts: torch.Tensor, parts_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Merge parts (S, T, H, D_v) by parts_lse (S, H, T) into out (T, H, D_v) and lse (H, T)."""
    num_splits, T, H, D_v = parts.shape
    block_dv = problem.padded(D_v)
    config = TileConfig(max(1, _TILE // block_dv), block_dv, 4, 1)
    _launch(
        T * H,
        strides=(out.dtype,),
        args=(parts, parts_lse, out, lse, T, H, num_splits),
        constexprs={"HEAD_DIM_V": D_v, "BLOCK_S": config.block_m, "BLOCK_DV": block_dv},
        config=config,
    )
