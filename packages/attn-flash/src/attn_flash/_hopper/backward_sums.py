"""What the backward kernel reads and writes once for each query: lse, delta and the sum of dq.

`prepare` computes the first two, as rows padded to whole blocks. `finish` turns the sum into dq.
The sum is kept in units of 64 queries by 64 columns, each in the order in which a warpgroup's
registers hold it: then a thread writes 16 bytes at a time and no two threads of a warp meet in a
bank of shared memory. A unit is 16 rows of 256 numbers.
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attn_core.launch import Launcher
from attn_core.tiles.softmax import LOG2_E
from attn_core.tuning import TileConfig
from attn_flash._triton import ragged

PADDING = tl.constexpr(128)  # tokens: rows and blocks of keys are padded to a multiple of it
UNIT = (16, 256)
_UNIT_ROWS = gl.constexpr(64)
_UNIT_SIZE = tl.constexpr(4096)


@gluon.jit
def to_unit(dq):
    """Reorder a tile [64, 64] of an accumulator, without moving a number to another thread."""
    # Row = (warp, half, lane / 4), column = (register pair, lane % 4, number).
    dq = gl.reshape(dq, [4, 2, 8, 8, 4, 2])
    return gl.reshape(gl.permute(dq, (3, 0, 2, 4, 1, 5)), [16, 256])


@triton.jit
def _from_unit(unit):
    unit = tl.permute(tl.reshape(unit, [8, 4, 8, 4, 2, 2]), [1, 4, 2, 0, 3, 5])
    return tl.reshape(unit, [64, 64])


@triton.jit
def _find(starts_ptr, B, block):
    """Find where the sequence of a block of PADDING rows starts and ends, and its first row.

    The last sequence has the blocks past its end too.
    """
    low = 0
    high = B - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(starts_ptr + middle) // PADDING + middle <= block:
            low = middle
        else:
            high = middle - 1
    start = tl.load(starts_ptr + low)
    return start, tl.load(starts_ptr + low + 1), (start // PADDING + low) * PADDING


# fmt: off
@triton.jit(do_not_specialize=["B", "M", "padded_m", "H"])
def _prepare_kernel(
    out_ptr, stride_ob, stride_om, stride_oh,
    do_ptr, stride_dob, stride_dom, stride_doh,
    lse_ptr,  # [B, H, M], contiguous
    dlse_ptr,  # the same, or None
    lse_log2_ptr, delta_ptr,  # [B * H, padded_m]
    dq_sum_ptr,  # or None, as counters_ptr: nobody sums
    counters_ptr,
    starts_ptr,  # [B + 1] of ragged sequences, or None
    B, M, padded_m, H,
    CLEARS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    blocks = padded_m // BLOCK_M
    pid = tl.program_id(0)
    start_m = pid % blocks * BLOCK_M
    pid_bh = (pid // blocks).to(tl.int64)
    b = pid_bh // H
    h = pid_bh % H
    padded_offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_m = padded_offs_m
    end = M
    if starts_ptr is not None:
        start, end, first = _find(starts_ptr, B, start_m // PADDING)
        offs_m += start - first
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < end
    mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    row = offs_m.to(tl.int64)[:, None]
    out_ptrs = out_ptr + b * stride_ob + h * stride_oh + row * stride_om + offs_d[None, :]
    out = tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
    do_ptrs = do_ptr + b * stride_dob + h * stride_doh + row * stride_dom + offs_d[None, :]
    do = tl.load(do_ptrs, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(out * do, 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + pid_bh * M + offs_m, mask=mask_m, other=0.0)
    lse = tl.load(lse_ptr + pid_bh * M + offs_m, mask=mask_m, other=-float("inf"))
    # Rows without keys and rows of padding: +inf makes their probabilities 0 instead of NaN.
    lse_log2 = tl.where(lse == -float("inf"), float("inf"), lse * LOG2_E)
    tl.store(delta_ptr + pid_bh * padded_m + padded_offs_m, delta)
    tl.store(lse_log2_ptr + pid_bh * padded_m + padded_offs_m, lse_log2)
    if counters_ptr is not None:
        tl.store(counters_ptr, 0)
        tl.store(counters_ptr + 1 + pid, 0)
    if CLEARS:
        sum_ptr = dq_sum_ptr + (pid_bh * padded_m + start_m) * BLOCK_D
        zeros = tl.zeros([BLOCK_M * BLOCK_D], tl.float32)
        tl.store(sum_ptr + tl.arange(0, BLOCK_M * BLOCK_D), zeros)


# fmt: off
@triton.jit(do_not_specialize=["B", "M", "padded_m", "H"])
def _finish_kernel(
    dq_sum_ptr,
    counters_ptr,  # or None: programs have added to all units
    dq_ptr, stride_dqb, stride_dqm, stride_dqh,
    starts_ptr,  # [B + 1] of ragged sequences, or None
    B, M, padded_m, H, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    UNITS: tl.constexpr = BLOCK_D // 64  # side by side
    units = padded_m // 64 * UNITS
    pid = tl.program_id(0)
    unit = pid % units
    pid_bh = (pid // units).to(tl.int64)
    sum_ptrs = dq_sum_ptr + pid.to(tl.int64) * _UNIT_SIZE + tl.arange(0, _UNIT_SIZE)
    if counters_ptr is None:
        dq = tl.load(sum_ptrs)
    else:
        turns = tl.full([_UNIT_SIZE], tl.load(counters_ptr + 1 + pid // 2), tl.int32)
        dq = tl.load(sum_ptrs, mask=turns > 0, other=0.0)
    dq = _from_unit(dq) * scale
    start_m = unit // UNITS * 64
    offs_m = start_m + tl.arange(0, 64)
    end = M
    if starts_ptr is not None:
        start, end, first = _find(starts_ptr, B, start_m // PADDING)
        offs_m += start - first
    offs_d = unit % UNITS * 64 + tl.arange(0, 64)
    mask = (offs_m < end)[:, None] & (offs_d < HEAD_DIM)[None, :]
    dq_ptr += pid_bh // H * stride_dqb + pid_bh % H * stride_dqh
    dq_ptrs = dq_ptr + offs_m.to(tl.int64)[:, None] * stride_dqm + offs_d[None, :]
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=mask)


_launch_prepare = Launcher(_prepare_kernel)
_launch_finish = Launcher(_finish_kernel)


def padded_blocks(length, starts):
    """Blocks of PADDING tokens that hold `length` ones, or all ragged sequences each apart.

    Sequence i begins with block `starts[i] // PADDING + i`.
    """
    if starts is None:
        return -(-length // PADDING.value)
    return length // PADDING.value + starts.shape[0] - 1


def new_gradient(x, starts):
    """Memory for the gradient of x (B, S, H, D); ragged tokens of no sequence get zeros."""
    if starts is None:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return ragged.new_gradient(x[0], starts)[None]


def prepare(dout, dlse, out, lse, block_m, block_d, clears, starts=None):
    """Return lse in units of log2 and delta, (2, B * H, padded M), the sum of dq and counters.

    The counters are 0: how many programs have begun, and then, for each block of block_m queries,
    whether somebody has added to its sum. With `clears` the sum is 0 too.
    """
    rows = _empty_rows(out, starts)
    blocks = rows[0].numel() // block_m
    dq_sum = out.new_empty((blocks * block_m * block_d // UNIT[1], UNIT[1]), dtype=torch.float32)
    counters = out.new_empty(1 + blocks, dtype=torch.int32)
    _prepare(dout, dlse, out, lse, rows, dq_sum, counters, block_m, block_d, clears, starts)
    return rows, dq_sum, counters


def prepare_rows(dout, dlse, out, lse, block_d):
    """Return lse in units of log2 and delta, (2, B * H, padded M)."""
    rows = _empty_rows(out, None)
    _prepare(dout, dlse, out, lse, rows, None, None, 8192 // block_d, block_d, False, None)
    return rows


def _empty_rows(out, starts):
    B, M, H, _ = out.shape
    padded_m = padded_blocks(M, starts) * PADDING.value
    return out.new_empty((2, B * H, padded_m), dtype=torch.float32)


def _prepare(dout, dlse, out, lse, rows, dq_sum, counters, block_m, block_d, clears, starts):
    _, M, H, D = out.shape
    strides = out.stride()[:3], dout.stride()[:3]
    _launch_prepare(
        rows[0].numel() // block_m,
        strides=strides,
        args=(
            out, *strides[0], dout, *strides[1], lse, dlse,
            rows[0], rows[1], dq_sum, counters, *_ragged(starts), M, rows.shape[2], H,
        ),
        constexprs={
            "CLEARS": clears, "HEAD_DIM": D, "BLOCK_M": block_m, "BLOCK_D": block_d
        },
        config=TileConfig(block_m, block_d),
    )  # fmt: skip


def _ragged(starts):
    """`starts` and the number of sequences, as the kernels take them."""
    return (None, 0) if starts is None else (starts, starts.shape[0] - 1)


def finish(dq_sum, counters, dq, scale, block_d, starts=None):
    """Write dq (B, M, H, D): the scaled sum, 0 where nobody has added to it."""
    _, M, H, D = dq.shape
    strides = dq.stride()[:3]
    _launch_finish(
        dq_sum.numel() // _UNIT_SIZE.value,
        strides=strides,
        args=(
            dq_sum, counters, dq, *strides, *_ragged(starts),
            M, padded_blocks(M, starts) * PADDING.value, H, scale,
        ),
        constexprs={"HEAD_DIM": D, "BLOCK_D": block_d},
        config=TileConfig(_UNIT_ROWS.value, block_d),
    )  # fmt: skip
