"""New keys and values written to their slots of the cache."""

import torch
import triton
import triton.language as tl

from attn_core.launch import Launcher
from attn_core.tuning import TileConfig
from attn_paged._triton import problem

_TILE = 4096  # elements of keys or values that a program copies


# fmt: off
@triton.jit
def _copy_heads(
    source_ptr, stride_sh, stride_sd, cache_ptr, stride_ch, stride_cd, heads, mask_h,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_h[:, None] & (offs_d < HEAD_DIM)[None, :]
    source_ptrs = source_ptr + heads[:, None] * stride_sh + offs_d[None, :] * stride_sd
    cache_ptrs = cache_ptr + heads[:, None] * stride_ch + offs_d[None, :] * stride_cd
    tl.store(cache_ptrs, tl.load(source_ptrs, mask=mask), mask=mask)


@triton.jit
def _append_to_cache_kernel(
    k_ptr, stride_kt, stride_kh, stride_kd,
    v_ptr, stride_vt, stride_vh, stride_vd,
    k_cache_ptr, stride_kcb, stride_kcn, stride_kch, stride_kcd,
    v_cache_ptr, stride_vcb, stride_vcn, stride_vch, stride_vcd,
    slots_ptr, stride_slots,
    H_KV: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    HEAD_TILES: tl.constexpr = (H_KV + BLOCK_H - 1) // BLOCK_H
    pid = tl.program_id(0)
    token = (pid // HEAD_TILES).to(tl.int64)
    slot = tl.load(slots_ptr + token * stride_slots).to(tl.int64)
    if slot < 0:
        return
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    heads = (pid % HEAD_TILES * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    mask_h = heads < H_KV
    _copy_heads(
        k_ptr + token * stride_kt, stride_kh, stride_kd,
        k_cache_ptr + block * stride_kcb + offset * stride_kcn, stride_kch, stride_kcd,
        heads, mask_h, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    _copy_heads(
        v_ptr + token * stride_vt, stride_vh, stride_vd,
        v_cache_ptr + block * stride_vcb + offset * stride_vcn, stride_vch, stride_vcd,
        heads, mask_h, HEAD_DIM_V, BLOCK_DV,
    )  # fmt: skip


_launch = Launcher(_append_to_cache_kernel)


def append_to_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write k (T, H_KV, D) and v (T, H_KV, D_v) to their slots; a negative slot skips its token."""
    T, H_KV, D = k.shape
    D_v = v.shape[2]
    if T * H_KV == 0:
        return
    block_d, block_dv = problem.padded(D), problem.padded(D_v)
    block_h = min(triton.next_power_of_2(H_KV), max(1, _TILE // max(block_d, block_dv)))
    strides = [x.stride() for x in (k, v, k_cache, v_cache, slot_mapping)]
    k_strides, v_strides, k_cache_strides, v_cache_strides, slots_strides = strides
    _launch(
        T * problem.ceil_div(H_KV, block_h),
        strides=(*strides, slot_mapping.dtype),
        args=(
            k, *k_strides,
            v, *v_strides,
            k_cache, *k_cache_strides,
            v_cache, *v_cache_strides,
            slot_mapping, *slots_strides,
        ),
        constexprs={
            "H_KV": H_KV, "HEAD_DIM": D, "HEAD_DIM_V": D_v, "BLOCK_SIZE": k_cache.shape[1],
            "BLOCK_H": block_h, "BLOCK_D": block_d, "BLOCK_DV": block_dv,
        },
        config=TileConfig(block_h, block_d, 4, 1),
    )  # fmt: skip
