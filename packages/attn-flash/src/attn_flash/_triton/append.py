"""New keys and values written to their slots of a KV cache, the keys rotated on the way."""

import torch
import triton
import triton.language as tl

from attn_core import tiling
from attn_core.launch import Launcher
from attn_core.tuning import TileConfig
from attn_flash._triton.rotary import load_rotated
from attn_flash.kvcache_checks import Cache

_TILE = 4096  # elements of keys or values that a program copies
NOT_SPECIALIZED = [
    "S_NEW",
    "length",
    "capacity",
    "num_row_tiles",
    "table_rows",
    "stride_tb",
    "stride_kb",
    "stride_vb",
]


@triton.jit
def cache_row(b, batch_idx_ptr, stride_idx, HAS_BATCH_IDX: tl.constexpr):
    """Entry of the cache, or row of the block table, that belongs to sequence b."""
    row = b.to(tl.int64)
    if HAS_BATCH_IDX:
        row = tl.load(batch_idx_ptr + b * stride_idx).to(tl.int64)
    return row


@triton.jit
def old_length(b, seqlens_ptr, stride_lens, length, HAS_SEQLENS: tl.constexpr):
    """Number of keys that sequence b has before the append."""
    if HAS_SEQLENS:
        length = tl.load(seqlens_ptr + b * stride_lens)
    return length


# fmt: off
@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _append_to_kvcache_kernel(
    k_ptr, stride_kb, stride_ks, stride_kh, stride_kd,
    v_ptr, stride_vb, stride_vs, stride_vh, stride_vd,
    cos_ptr, stride_cos_m, stride_cos_d,
    sin_ptr, stride_sin_m, stride_sin_d,
    seqlens_ptr, stride_lens,
    batch_idx_ptr, stride_idx,
    table_ptr, stride_tb, stride_tn,
    k_cache_ptr, stride_kcb, stride_kcn, stride_kch, stride_kcd,
    v_cache_ptr, stride_vcb, stride_vcn, stride_vch, stride_vcd,
    S_NEW, length, capacity, num_row_tiles, table_rows,
    H_KV: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, PAGE_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_SEQLENS: tl.constexpr, HAS_BATCH_IDX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    # fmt: on
    """Copy BLOCK_M rows of one sequence: a row is one head of one token."""
    pid = tl.program_id(0)
    b = pid // num_row_tiles
    rows = pid % num_row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    s = rows // H_KV
    h = (rows % H_KV).to(tl.int64)
    positions = old_length(b, seqlens_ptr, stride_lens, length, HAS_SEQLENS) + s
    mask_m = (s < S_NEW) & (positions >= 0) & (positions < capacity)
    cache_b = cache_row(b, batch_idx_ptr, stride_idx, HAS_BATCH_IDX)
    slots = positions.to(tl.int64)
    if PAGE_SIZE > 0:
        table_ptrs = table_ptr + cache_b * stride_tb + slots // PAGE_SIZE * stride_tn
        cache_b = tl.load(table_ptrs, mask=mask_m, other=0).to(tl.int64)
        slots = slots % PAGE_SIZE

    sources = b.to(tl.int64) * stride_kb + s.to(tl.int64) * stride_ks + h * stride_kh
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    if ROTARY_DIM > 0:
        k = load_rotated(
            k_ptr, sources, stride_kd, mask_m, positions,
            cos_ptr, stride_cos_m, stride_cos_d, sin_ptr, stride_sin_m, stride_sin_d, table_rows,
            HEAD_DIM, ROTARY_DIM, INTERLEAVED, BLOCK_D,
        )  # fmt: skip
    else:
        k = tl.load(k_ptr + sources[:, None] + offs_d[None, :] * stride_kd, mask=mask, other=0.0)
    targets = cache_b * stride_kcb + slots * stride_kcn + h * stride_kch
    tl.store(k_cache_ptr + targets[:, None] + offs_d[None, :] * stride_kcd, k, mask=mask)

    sources = b.to(tl.int64) * stride_vb + s.to(tl.int64) * stride_vs + h * stride_vh
    offs_d = tl.arange(0, BLOCK_DV)
    mask = mask_m[:, None] & (offs_d < HEAD_DIM_V)[None, :]
    v = tl.load(v_ptr + sources[:, None] + offs_d[None, :] * stride_vd, mask=mask, other=0.0)
    targets = cache_b * stride_vcb + slots * stride_vcn + h * stride_vch
    tl.store(v_cache_ptr + targets[:, None] + offs_d[None, :] * stride_vcd, v, mask=mask)


_launch = Launcher(_append_to_kvcache_kernel)


def append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    cache: Cache,
) -> None:
    """Write k (B, S_new, H_KV, D), rotated, and v to the cache."""
    B, S_new, H_KV, D = k.shape
    D_v = v.shape[3]
    if B * S_new * H_KV == 0:
        return
    table = cache.block_table
    page_size = 0 if table is None else k_cache.shape[1]
    block_d, block_dv = tiling.padded_head_dim(D), tiling.padded_head_dim(D_v)
    block_m = min(
        triton.next_power_of_2(S_new * H_KV), max(1, _TILE // max(block_d, block_dv))
    )
    num_row_tiles = tiling.ceil_div(S_new * H_KV, block_m)
    strides = [x.stride() for x in (k, v, k_cache, v_cache)]
    k_strides, v_strides, k_cache_strides, v_cache_strides = strides
    table_strides = (0, 0) if table is None else table.stride()
    rotary = [(0, 0) if x is None else x.stride() for x in (cos, sin)]
    ids = [(0,) if x is None else x.stride() for x in (cache.seqlens, cache.batch_idx)]
    dtypes = [None if x is None else x.dtype for x in (cos, cache.batch_idx)]
    _launch(
        B * num_row_tiles,
        strides=(
            k_strides[1:], v_strides[1:], k_cache_strides, v_cache_strides, table_strides[1],
            *rotary, *ids, *dtypes,
        ),
        args=(
            k, *k_strides,
            v, *v_strides,
            cos, *rotary[0],
            sin, *rotary[1],
            cache.seqlens, *ids[0],
            cache.batch_idx, *ids[1],
            table, *table_strides,
            k_cache, *k_cache_strides,
            v_cache, *v_cache_strides,
            S_new, cache.length,
            k_cache.shape[1] * (1 if table is None else table.shape[1]),
            num_row_tiles, 0 if cos is None else cos.shape[0],
        ),
        constexprs={
            "H_KV": H_KV, "HEAD_DIM": D, "HEAD_DIM_V": D_v, "PAGE_SIZE": page_size,
            "ROTARY_DIM": 0 if cos is None else 2 * cos.shape[1], "INTERLEAVED": interleaved,
            "HAS_SEQLENS": cache.seqlens is not None,
            "HAS_BATCH_IDX": cache.batch_idx is not None,
            "BLOCK_M": block_m, "BLOCK_D": block_d, "BLOCK_DV": block_dv,
        },
        config=TileConfig(block_m, block_d, 4, 1),
    )  # fmt: skip
