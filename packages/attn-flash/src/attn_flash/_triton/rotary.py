"""Rotary embedding: a kernel of its own, and tiles that other kernels rotate as they load them."""

import torch
import triton
import triton.language as tl

from attn_core.launch import Launcher
from attn_core.tuning import TileConfig

_PAIRS_PER_PROGRAM = 2048
_NOT_SPECIALIZED = ["S", "H", "B", "num_rows", "table_rows", "offset", "search_steps"]


@triton.jit
def load_rotated(
    x_ptr, row_offsets, stride_d, mask_m, positions,
    cos_ptr, stride_cos_m, stride_cos_d,
    sin_ptr, stride_sin_m, stride_sin_d,
    table_rows,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Load rows [BLOCK_M, BLOCK_D] of x, rotated to their positions [BLOCK_M].

    The other half of each pair is a second load: cheap for the few rows of a tile that is loaded
    once, and the tile stays in one piece.
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    offs_d = tl.arange(0, BLOCK_D)
    turns = offs_d < ROTARY_DIM
    if INTERLEAVED:
        is_second = offs_d % 2 == 1
        partners = tl.where(is_second, offs_d - 1, offs_d + 1)
        pairs = offs_d // 2
    else:
        is_second = offs_d >= HALF
        partners = tl.where(is_second, offs_d - HALF, offs_d + HALF)
        pairs = tl.where(is_second, offs_d - HALF, offs_d)
    mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    mask_turns = mask & turns[None, :]
    x = tl.load(x_ptr + row_offsets[:, None] + offs_d[None, :] * stride_d, mask=mask, other=0.0)
    partner_ptrs = x_ptr + row_offsets[:, None] + partners[None, :] * stride_d
    partner = tl.load(partner_ptrs, mask=mask_turns, other=0.0)
    mask_table = mask_turns & (positions < table_rows)[:, None]
    rows = positions.to(tl.int64)[:, None]
    cos_ptrs = cos_ptr + rows * stride_cos_m + pairs[None, :] * stride_cos_d
    sin_ptrs = sin_ptr + rows * stride_sin_m + pairs[None, :] * stride_sin_d
    cos = tl.load(cos_ptrs, mask=mask_table, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptrs, mask=mask_table, other=0.0).to(tl.float32)
    sin = tl.where(is_second[None, :], sin, -sin)
    rotated = x.to(tl.float32) * cos + partner.to(tl.float32) * sin
    return rotated.to(x.dtype)


@triton.jit
def _sequence_of(tokens, mask, cu_seqlens_ptr, stride_cu, B, search_steps):
    """The sequence that each token belongs to, by bisection; B for tokens past the last one."""
    low = tokens * 0
    high = low + B
    for _ in range(search_steps):
        middle = (low + high) // 2
        end = tl.load(cu_seqlens_ptr + (middle + 1) * stride_cu, mask=mask & (middle < B), other=0)
        is_past = (tokens >= end) & (low < high)
        low = tl.where(is_past, middle + 1, low)
        high = tl.where(is_past, high, tl.minimum(middle, high))
    return low


# fmt: off
@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _rotate_kernel(
    x_ptr, stride_xb, stride_xs, stride_xh, stride_xd,
    cos_ptr, stride_cos_m, stride_cos_d,
    sin_ptr, stride_sin_m, stride_sin_d,
    offsets_ptr, stride_offsets,  # [B], with HAS_OFFSETS
    cu_seqlens_ptr, stride_cu,  # [B + 1], with IS_VARLEN
    out_ptr, stride_ob, stride_os, stride_oh, stride_od,
    S, H, B, num_rows, table_rows, offset, search_steps,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
    CONJUGATE: tl.constexpr, HAS_OFFSETS: tl.constexpr, IS_VARLEN: tl.constexpr,
    COPY_REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):
    # fmt: on
    """Rotate BLOCK_M rows: a row is one head of one token."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < num_rows
    tokens = rows // H
    h = rows % H
    b = tokens // S
    s = tokens % S
    positions = s
    sequence = b
    is_placed = mask_m
    if IS_VARLEN:
        sequence = _sequence_of(s, mask_m, cu_seqlens_ptr, stride_cu, B, search_steps)
        is_placed = mask_m & (sequence < B)
        positions -= tl.load(cu_seqlens_ptr + sequence * stride_cu, mask=is_placed, other=0)
    if HAS_OFFSETS:
        positions += tl.load(offsets_ptr + sequence * stride_offsets, mask=is_placed, other=0)
    else:
        positions += offset

    HALF: tl.constexpr = ROTARY_DIM // 2
    pairs = tl.arange(0, BLOCK_HALF)
    mask = mask_m[:, None] & (pairs < HALF)[None, :]
    mask_table = mask & (is_placed & (positions < table_rows))[:, None]
    cos_ptrs = cos_ptr + positions[:, None] * stride_cos_m + pairs[None, :] * stride_cos_d
    sin_ptrs = sin_ptr + positions[:, None] * stride_sin_m + pairs[None, :] * stride_sin_d
    cos = tl.load(cos_ptrs, mask=mask_table, other=1.0).to(tl.float32)  # [BLOCK_M, BLOCK_HALF]
    sin = tl.load(sin_ptrs, mask=mask_table, other=0.0).to(tl.float32)
    if CONJUGATE:
        sin = -sin

    x_rows = x_ptr + (b * stride_xb + s * stride_xs + h * stride_xh)[:, None]
    out_rows = out_ptr + (b * stride_ob + s * stride_os + h * stride_oh)[:, None]
    if INTERLEAVED:
        offs_d = tl.arange(0, 2 * BLOCK_HALF)
        mask = mask_m[:, None] & (offs_d < ROTARY_DIM)[None, :]
        x = tl.load(x_rows + offs_d[None, :] * stride_xd, mask=mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, [BLOCK_M, BLOCK_HALF, 2]))
        turned = tl.join(first * cos - second * sin, second * cos + first * sin)
        turned = tl.reshape(turned, [BLOCK_M, 2 * BLOCK_HALF]).to(out_ptr.dtype.element_ty)
        tl.store(out_rows + offs_d[None, :] * stride_od, turned, mask=mask)
    else:
        x_ptrs = x_rows + pairs[None, :] * stride_xd
        first = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x_ptrs + HALF * stride_xd, mask=mask, other=0.0).to(tl.float32)
        out_ptrs = out_rows + pairs[None, :] * stride_od
        turned = first * cos - second * sin
        tl.store(out_ptrs, turned.to(out_ptr.dtype.element_ty), mask=mask)
        turned = second * cos + first * sin
        tl.store(out_ptrs + HALF * stride_od, turned.to(out_ptr.dtype.element_ty), mask=mask)
    if COPY_REST:
        offs_d = ROTARY_DIM + tl.arange(0, BLOCK_REST)
        mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
        rest = tl.load(x_rows + offs_d[None, :] * stride_xd, mask=mask, other=0.0)
        tl.store(out_rows + offs_d[None, :] * stride_od, rest, mask=mask)


_launch = Launcher(_rotate_kernel)


def rotate(
    out: torch.Tensor,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    offsets: torch.Tensor | None,
    offset: int,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    interleaved: bool,
    conjugate: bool,
) -> None:
    """Write to `out`, which may be x (B, S, H, D) or (T, H, D), the rotated x."""
    if x.numel() == 0:
        return
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if cu_seqlens is not None:
        x, out = x[None], out[None]
    B, S, H, D = x.shape
    half = cos.shape[1]
    block_half = triton.next_power_of_2(max(half, 1))
    config = TileConfig(max(1, _PAIRS_PER_PROGRAM // block_half), block_half, 4, 1)
    x_strides, out_strides = x.stride(), out.stride()
    cos_strides, sin_strides = cos.stride(), sin.stride()
    offsets_strides = (0,) if offsets is None else offsets.stride()
    cu_strides = (0,) if cu_seqlens is None else cu_seqlens.stride()
    dtypes = (cos.dtype, None if offsets is None else offsets.dtype)
    _launch(
        -(-B * S * H // config.block_m),
        strides=(
            x_strides, out_strides, cos_strides, sin_strides, offsets_strides, cu_strides, dtypes,
        ),
        args=(
            x, *x_strides,
            cos, *cos_strides,
            sin, *sin_strides,
            offsets, *offsets_strides,
            cu_seqlens, *cu_strides,
            out, *out_strides,
            S, H, sequences, B * S * H, cos.shape[0], offset, sequences.bit_length(),
        ),
        constexprs={
            "HEAD_DIM": D, "ROTARY_DIM": 2 * half, "INTERLEAVED": interleaved,
            "CONJUGATE": conjugate, "HAS_OFFSETS": offsets is not None,
            "IS_VARLEN": cu_seqlens is not None, "COPY_REST": out is not x and 2 * half < D,
            "BLOCK_M": config.block_m, "BLOCK_HALF": block_half,
            "BLOCK_REST": triton.next_power_of_2(max(D - 2 * half, 1)),
        },
        config=config,
    )  # fmt: skip
