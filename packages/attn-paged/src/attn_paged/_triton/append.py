"""New keys and values written to their slots of the cache, turned and quantised on the way."""

import torch
import triton
import triton.language as tl

from attn_core import tiling
from attn_core.launch import Launcher
from attn_core.tuning import TileConfig
from attn_paged._triton import problem
from attn_paged.options import AppendOptions, largest

_TILE = 4096  # elements of keys or values that a program copies


@triton.jit
def _rotate(
    rows, rows_ptr, cos_ptr, sin_ptr, heads, mask_h, offs_d, stride_sh, stride_sd,
    stride_cosd, stride_sind,
    ROTARY_HALF: tl.constexpr, IS_INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Turn each entry with its partner, which is loaded once more."""
    is_turned = offs_d < 2 * ROTARY_HALF
    if IS_INTERLEAVED:
        pair = offs_d // 2
        is_second = offs_d % 2 == 1
        partner = offs_d + tl.where(is_second, -1, 1)
    else:
        is_second = offs_d >= ROTARY_HALF
        pair = offs_d - tl.where(is_second, ROTARY_HALF, 0)
        partner = offs_d + tl.where(is_second, -ROTARY_HALF, ROTARY_HALF)
    cos = tl.load(cos_ptr + pair * stride_cosd, mask=is_turned, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + pair * stride_sind, mask=is_turned, other=0.0).to(tl.float32)
    partner_ptrs = rows_ptr + heads[:, None] * stride_sh + partner[None, :] * stride_sd
    partners = tl.load(partner_ptrs, mask=mask_h[:, None] & is_turned[None, :], other=0.0)
    sin = tl.where(is_second, sin, -sin)
    turned = rows.to(tl.float32) * cos[None, :] + partners.to(tl.float32) * sin[None, :]
    return turned.to(rows.dtype)


@triton.jit
def _round_half_to_even(x):
    """Adding and taking away 1.5 * 2**23 leaves no bit behind the point; for abs(x) < 2**22."""
    return (x + 12582912.0) - 12582912.0


# fmt: off
@triton.jit
def _write_heads(
    rows, cache_ptr, stride_ch, stride_cd, scale_ptr, stride_sch, heads, mask_h, offs_d, mask,
    LARGEST: tl.constexpr, GIVEN_SCALE: tl.constexpr,
):
    # fmt: on
    """Store rows of heads, as they are or as numbers of at most LARGEST and a scale for each."""
    cache_ptrs = cache_ptr + heads[:, None] * stride_ch + offs_d[None, :] * stride_cd
    if LARGEST > 0:
        scale_ptrs = scale_ptr + heads * stride_sch
        rows = tl.where(mask, rows.to(tl.float32), 0.0)
        if GIVEN_SCALE:
            scale = tl.load(scale_ptrs, mask=mask_h, other=1.0)
        else:
            peak = tl.max(tl.abs(rows), 1)
            scale = tl.where(peak > 0, peak / LARGEST, 1.0)
            tl.store(scale_ptrs, scale, mask=mask_h)
        rows = rows / scale[:, None]
        rows = tl.minimum(tl.maximum(rows, -LARGEST), LARGEST)
        if cache_ptr.dtype.element_ty.is_int():
            rows = _round_half_to_even(rows)
        rows = rows.to(cache_ptr.dtype.element_ty)
    tl.store(cache_ptrs, rows, mask=mask)


@triton.jit
def _append_to_cache_kernel(
    k_ptr, stride_kt, stride_kh, stride_kd,
    v_ptr, stride_vt, stride_vh, stride_vd,
    k_cache_ptr, stride_kcb, stride_kcn, stride_kch, stride_kcd,
    v_cache_ptr, stride_vcb, stride_vcn, stride_vch, stride_vcd,
    k_scale_ptr, stride_ksb, stride_ksn, stride_ksh,
    v_scale_ptr, stride_vsb, stride_vsn, stride_vsh,
    slots_ptr, stride_slots,
    cos_ptr, stride_cosp, stride_cosd,
    sin_ptr, stride_sinp, stride_sind,
    positions_ptr, stride_positions,
    H_KV: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROTARY_HALF: tl.constexpr, IS_INTERLEAVED: tl.constexpr,
    LARGEST: tl.constexpr, GIVEN_K_SCALE: tl.constexpr, GIVEN_V_SCALE: tl.constexpr,
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
    k_ptr += token * stride_kt
    v_ptr += token * stride_vt
    k_cache_ptr += block * stride_kcb + offset * stride_kcn
    v_cache_ptr += block * stride_vcb + offset * stride_vcn
    if LARGEST > 0:
        k_scale_ptr += block * stride_ksb + offset * stride_ksn
        v_scale_ptr += block * stride_vsb + offset * stride_vsn

    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_h[:, None] & (offs_d < HEAD_DIM)[None, :]
    k = tl.load(k_ptr + heads[:, None] * stride_kh + offs_d[None, :] * stride_kd, mask=mask)
    if ROTARY_HALF > 0:
        position = tl.load(positions_ptr + token * stride_positions).to(tl.int64)
        k = _rotate(
            k, k_ptr, cos_ptr + position * stride_cosp, sin_ptr + position * stride_sinp,
            heads, mask_h, offs_d, stride_kh, stride_kd, stride_cosd, stride_sind,
            ROTARY_HALF, IS_INTERLEAVED,
        )  # fmt: skip
    _write_heads(
        k, k_cache_ptr, stride_kch, stride_kcd, k_scale_ptr, stride_ksh,
        heads, mask_h, offs_d, mask, LARGEST, GIVEN_K_SCALE,
    )  # fmt: skip

    offs_dv = tl.arange(0, BLOCK_DV)
    mask = mask_h[:, None] & (offs_dv < HEAD_DIM_V)[None, :]
    v = tl.load(v_ptr + heads[:, None] * stride_vh + offs_dv[None, :] * stride_vd, mask=mask)
    _write_heads(
        v, v_cache_ptr, stride_vch, stride_vcd, v_scale_ptr, stride_vsh,
        heads, mask_h, offs_dv, mask, LARGEST, GIVEN_V_SCALE,
    )  # fmt: skip


_launch = Launcher(_append_to_cache_kernel)


def append_to_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    options: AppendOptions,
) -> None:
    """Write k (T, H_KV, D) and v (T, H_KV, D_v) to their slots; a negative slot skips its token."""
    T, H_KV, D = k.shape
    D_v = v.shape[2]
    if T * H_KV == 0:
        return
    rotary = options.rotary
    cos, sin, positions = (None, None, None) if rotary is None else rotary[:3]
    scales = options.k_scale, options.v_scale
    is_given = [scale is not None and scale.ndim < 3 for scale in scales]
    k_scale, v_scale = (
        None if scale is None else scale.expand(k_cache.shape[:3]) for scale in scales
    )
    block_d, block_dv = tiling.padded_head_dim(D), tiling.padded_head_dim(D_v)
    block_h = min(triton.next_power_of_2(H_KV), max(1, _TILE // max(block_d, block_dv)))
    tensors = (k, v, k_cache, v_cache, k_scale, v_scale, slot_mapping, cos, sin, positions)
    ranks = (3, 3, 4, 4, 3, 3, 1, 2, 2, 1)
    strides = [problem.strides_of(*pair) for pair in zip(tensors, ranks, strict=True)]
    arguments = [
        argument
        for tensor, own_strides in zip(tensors, strides, strict=True)
        for argument in (tensor, *own_strides)
    ]
    dtypes = [None if x is None else x.dtype for x in (k_cache, slot_mapping, cos, positions)]
    _launch(
        T * tiling.ceil_div(H_KV, block_h),
        strides=(*strides, *dtypes),
        args=arguments,
        constexprs={
            "H_KV": H_KV, "HEAD_DIM": D, "HEAD_DIM_V": D_v, "BLOCK_SIZE": k_cache.shape[1],
            "ROTARY_HALF": 0 if cos is None else cos.shape[1],
            "IS_INTERLEAVED": rotary is not None and rotary.interleaved,
            "LARGEST": 0.0 if k_scale is None else largest(k_cache.dtype),
            "GIVEN_K_SCALE": is_given[0], "GIVEN_V_SCALE": is_given[1],
            "BLOCK_H": block_h, "BLOCK_D": block_d, "BLOCK_DV": block_dv,
        },
        config=TileConfig(block_h, block_d, 4, 1),
    )  # fmt: skip
