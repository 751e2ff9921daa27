"""Backward pass for heads wider than 128, in two kernels whose sums have one owner each.

Gradients of 64 keys, or of 64 queries, take half of a warpgroup's registers, so no program can keep
those of both. With P = exp(S - lse), dP = dO V^T and delta = rowsum(dO * O) - dlse:

* a program of the first kernel owns 64 keys and walks the queries that see them. One consumer
  computes S^T and P^T, hands P^T to the other one and adds P^T dO to dV; the other computes dP^T
  and dS^T = P^T * (dP^T - delta), and adds dS^T Q to dK;
* a program of the second kernel owns 128 queries and walks the keys that they see. Each of two
  consumers computes S, dP, and dQ of its 64 queries.

That is seven products instead of the five of `backward.py`. A warp loads in both kernels;
docs/attn-flash-hopper.md draws their protocol. Gradients are the same bits every time.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_core.gluon_launch import GluonLauncher
from attn_core.tiles.gluon_names import tma_load
from attn_core.tiles.hopper import accumulator_layout, arrive_at_stage, exp2, meet_at_stage, record
from attn_flash._hopper import backward_sums as sums
from attn_flash._hopper import problem as host
from attn_flash._hopper.backward_tiles import crosses_edge, mask, place, queries_that_see
from attn_flash._hopper.descriptors import Flat, Rows, addressable
from attn_flash._hopper.primitives import keep_branch, load_row, load_rows, store_rows

ROWS = gl.constexpr(64)  # of every tile
_STAGES = gl.constexpr(2)

# Named barriers of the consumers; those below 8 are the compiler's.
_P_FULL = gl.constexpr(8)  # of each stage, as _P_EMPTY
_P_EMPTY = gl.constexpr(10)
_CONSUMERS = gl.constexpr(256)


@record
class _Problem:
    """Sizes and window of the call."""

    M: gl.tensor
    N: gl.tensor
    H: gl.tensor
    group: gl.tensor  # query heads of a key head
    left: gl.tensor
    right: gl.tensor
    scale: gl.tensor
    scale_log2: gl.tensor
    HAS_LEFT: gl.constexpr
    HAS_RIGHT: gl.constexpr


@record
class _Tile:
    """A block of one head's keys or queries, and the blocks [first, last) of the others to meet."""

    block: gl.tensor
    b: gl.tensor
    h: gl.tensor
    first: gl.tensor
    last: gl.tensor


# --- dK and dV ----------------------------------------------------------------------------------


@record
class _Tensors:
    """What the copy engine reads and writes for the first kernel."""

    q: tma.tensor_descriptor  # in tiles of [ROWS, BLOCK_D], as do, k, v, dk and dv
    do: tma.tensor_descriptor
    k: tma.tensor_descriptor
    v: tma.tensor_descriptor
    dk: tma.tensor_descriptor
    dv: tma.tensor_descriptor
    lse: tma.tensor_descriptor  # in rows of [1, ROWS], as delta
    delta: tma.tensor_descriptor


@record
class _SharedKeys:
    """Shared memory of a program of the first kernel, and the barriers that say what is in it."""

    k: gl.shared_memory_descriptor  # [ROWS, BLOCK_D], as v; dV and dK leave through them
    v: gl.shared_memory_descriptor
    q: gl.shared_memory_descriptor  # [_STAGES, ROWS, BLOCK_D], as do
    do: gl.shared_memory_descriptor
    lse: gl.shared_memory_descriptor  # [_STAGES, 1, ROWS], as delta
    delta: gl.shared_memory_descriptor
    p: gl.shared_memory_descriptor  # P^T of [_STAGES, ROWS, ROWS]
    k_full: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor  # of each stage, as do_full and empty
    do_full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


@gluon.jit
def _tile_of_keys(problem, number, num_heads, heads_per_group):
    """Return a program's keys and the queries that see them; the longest tiles come first."""
    n, head = place(number, gl.cdiv(problem.N, ROWS), num_heads, heads_per_group)
    first, last = queries_that_see(problem, problem.M, problem.N, n, ROWS, ROWS)
    heads_kv = problem.H // problem.group
    return _Tile(n, head // heads_kv, head % heads_kv, first, last)


@gluon.jit
def _load_tile(desc, full, buffer, b, h, row):
    mbarrier.expect(full, desc.block_type.nbytes)
    load_rows(desc, b, h, row, full, buffer)


@gluon.jit
def _load_queries(desc, row_desc, full, buffer, row_buffer, b, h, H, start_m):
    mbarrier.expect(full, desc.block_type.nbytes + row_desc.block_type.nbytes)
    load_rows(desc, b, h, start_m, full, buffer)
    tma_load(row_desc, [b * H + h, start_m], full, row_buffer)


@gluon.jit
def _load_for_keys(tensors, shared, problem, tile):
    steps = (tile.last - tile.first) * problem.group
    _load_tile(tensors.k, shared.k_full, shared.k, tile.b, tile.h, tile.block * ROWS)
    m = tile.first
    h = tile.h * problem.group
    # The last rounds only wait: the consumers' arrivals must not outlive the program.
    for step in range(steps + _STAGES):
        i = step % _STAGES
        if step >= _STAGES:
            mbarrier.wait(shared.empty.index(i), (step // _STAGES + 1) & 1)
        if step < steps:
            _load_queries(
                tensors.q, tensors.lse, shared.q_full.index(i),
                shared.q.index(i), shared.lse.index(i), tile.b, h, problem.H, m * ROWS,
            )  # fmt: skip
            if step == 0:
                _load_tile(tensors.v, shared.v_full, shared.v, tile.b, tile.h, tile.block * ROWS)
            _load_queries(
                tensors.do, tensors.delta, shared.do_full.index(i),
                shared.do.index(i), shared.delta.index(i), tile.b, h, problem.H, m * ROWS,
            )  # fmt: skip
        m += 1
        if m == tile.last:
            m = tile.first
            h += 1


@gluon.jit
def _store_tile(desc, buffer, tile, row, x):
    buffer.store(x.to(desc.dtype))
    fence_async_shared()
    store_rows(desc, tile.b, tile.h, row, buffer)
    tma.store_wait(0)


@gluon.jit
def _accumulate_dv(tensors, shared, problem, tile):
    """Compute P^T of each step for both consumers, and dV."""
    BLOCK_D: gl.constexpr = tensors.q.block_shape[3]
    DTYPE: gl.constexpr = tensors.q.dtype
    S_LAYOUT: gl.constexpr = accumulator_layout(ROWS)
    DV_LAYOUT: gl.constexpr = accumulator_layout(BLOCK_D)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, DV_LAYOUT, k_width=2)
    count = problem.N - tile.block * ROWS
    row = problem.M - count  # of the query at the first key's position
    zeros = gl.zeros([ROWS, ROWS], gl.float32, S_LAYOUT)
    dv = gl.zeros([ROWS, BLOCK_D], gl.float32, DV_LAYOUT)
    m = tile.first
    steps = (tile.last - tile.first) * problem.group
    mbarrier.wait(shared.k_full, 0)
    for step in range(steps):
        i = step % _STAGES
        phase = (step // _STAGES) & 1
        mbarrier.wait(shared.q_full.index(i), phase)
        q = shared.q.index(i)
        s = warpgroup_mma(shared.k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
        lse_log2 = load_row(shared.lse.index(i), ROWS, gl.SliceLayout(0, S_LAYOUT))
        s = warpgroup_mma_wait(0, deps=(s,))
        ahead = row - m * ROWS
        if crosses_edge(problem, count, ahead, ROWS):
            keep_branch()
            s = mask(s, problem, count, ahead)
        p = exp2(s * problem.scale_log2 - gl.expand_dims(lse_log2, 0)).to(DTYPE)
        if step >= _STAGES:
            meet_at_stage(_P_EMPTY, i, _CONSUMERS)
        shared.p.index(i).store(p)
        arrive_at_stage(_P_FULL, i, _CONSUMERS)
        mbarrier.wait(shared.do_full.index(i), phase)
        p_operand = gl.convert_layout(p, OPERAND, assert_trivial=True)
        dv = warpgroup_mma(p_operand, shared.do.index(i), dv, is_async=True)
        dv = warpgroup_mma_wait(0, deps=(dv,))
        mbarrier.arrive(shared.empty.index(i), count=1)
        m += 1
        if m == tile.last:
            m = tile.first
    _store_tile(tensors.dv, shared.k, tile, tile.block * ROWS, dv)


@gluon.jit
def _accumulate_dk(tensors, shared, problem, tile):
    """Compute dS^T of each step, and dK."""
    BLOCK_D: gl.constexpr = tensors.q.block_shape[3]
    DTYPE: gl.constexpr = tensors.q.dtype
    S_LAYOUT: gl.constexpr = accumulator_layout(ROWS)
    DK_LAYOUT: gl.constexpr = accumulator_layout(BLOCK_D)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, DK_LAYOUT, k_width=2)
    zeros = gl.zeros([ROWS, ROWS], gl.float32, S_LAYOUT)
    dk = gl.zeros([ROWS, BLOCK_D], gl.float32, DK_LAYOUT)
    steps = (tile.last - tile.first) * problem.group
    if steps > 0:
        mbarrier.wait(shared.v_full, 0)
    for step in range(steps):
        i = step % _STAGES
        phase = (step // _STAGES) & 1
        mbarrier.wait(shared.do_full.index(i), phase)
        do = shared.do.index(i)
        dp = warpgroup_mma(shared.v, do.permute((1, 0)), zeros, use_acc=False, is_async=True)
        delta = load_row(shared.delta.index(i), ROWS, gl.SliceLayout(0, S_LAYOUT))
        meet_at_stage(_P_FULL, i, _CONSUMERS)
        p = shared.p.index(i).load(S_LAYOUT).to(gl.float32)
        if step + _STAGES < steps:
            arrive_at_stage(_P_EMPTY, i, _CONSUMERS)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        ds = (p * (dp - gl.expand_dims(delta, 0))).to(DTYPE)
        mbarrier.wait(shared.q_full.index(i), phase)
        ds_operand = gl.convert_layout(ds, OPERAND, assert_trivial=True)
        dk = warpgroup_mma(ds_operand, shared.q.index(i), dk, is_async=True)
        dk = warpgroup_mma_wait(0, deps=(dk,))
        mbarrier.arrive(shared.empty.index(i), count=1)
    _store_tile(tensors.dk, shared.v, tile, tile.block * ROWS, dk * problem.scale)


# fmt: off
@gluon.jit(do_not_specialize=host.NOT_SPECIALIZED)
def _attention_backward_dk_dv_kernel(
    q_desc, do_desc, k_desc, v_desc, dk_desc, dv_desc,  # [B, H or H_KV, M or N, D]
    lse_desc, delta_desc,  # [B * H, padded M]
    M, N, H, group, num_heads, heads_per_group, left, right, scale, scale_log2,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, BLOCK_D: gl.constexpr,
):
    # fmt: on
    DTYPE: gl.constexpr = q_desc.dtype
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    FLAT: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    shared = _SharedKeys(
        gl.allocate_shared_memory(DTYPE, [ROWS, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(DTYPE, [ROWS, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(DTYPE, [_STAGES, ROWS, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(DTYPE, [_STAGES, ROWS, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(gl.float32, [_STAGES, 1, ROWS], FLAT),
        gl.allocate_shared_memory(gl.float32, [_STAGES, 1, ROWS], FLAT),
        gl.allocate_shared_memory(DTYPE, [_STAGES, ROWS, ROWS], SWIZZLED),
        gl.allocate_shared_memory(gl.int64, [1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER),
    )
    mbarrier.init(shared.k_full, count=1)
    mbarrier.init(shared.v_full, count=1)
    for i in gl.static_range(_STAGES):
        mbarrier.init(shared.q_full.index(i), count=1)
        mbarrier.init(shared.do_full.index(i), count=1)
        mbarrier.init(shared.empty.index(i), count=2)
    tensors = _Tensors(q_desc, do_desc, k_desc, v_desc, dk_desc, dv_desc, lse_desc, delta_desc)
    problem = _Problem(M, N, H, group, left, right, scale, scale_log2, HAS_LEFT, HAS_RIGHT)
    tile = _tile_of_keys(problem, gl.program_id(0), num_heads, heads_per_group)
    gl.warp_specialize(
        [
            (_accumulate_dv, (tensors, shared, problem, tile)),
            (_accumulate_dk, (tensors, shared, problem, tile)),
            (_load_for_keys, (tensors, shared, problem, tile)),
        ],
        [4, 1],
        [240, 24],
    )


# --- dQ -----------------------------------------------------------------------------------------


@record
class _QueryTensors:
    """What the second kernel reads and writes."""

    q: tma.tensor_descriptor  # in tiles of [ROWS, BLOCK_D], as do, k, v and dq
    do: tma.tensor_descriptor
    k: tma.tensor_descriptor
    v: tma.tensor_descriptor
    dq: tma.tensor_descriptor
    lse_ptr: gl.tensor  # [B * H, padded_m], as delta
    delta_ptr: gl.tensor
    padded_m: gl.tensor


@record
class _SharedQueries:
    """Shared memory of a program of the second kernel, and the barriers that say what is in it."""

    q: gl.shared_memory_descriptor  # [2, ROWS, BLOCK_D], one for each consumer, as do
    do: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor  # [_STAGES, ROWS, BLOCK_D]
    v: gl.shared_memory_descriptor  # [ROWS, BLOCK_D]
    q_full: gl.shared_memory_descriptor  # of each consumer: queries and gradients
    k_full: gl.shared_memory_descriptor  # of each stage, as k_empty
    k_empty: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor


@gluon.jit
def _tile_of_queries(problem, number, num_heads, heads_per_group):
    """Return a program's queries and the keys that they see, the longest tiles first."""
    BLOCK_M: gl.constexpr = 2 * ROWS
    num_blocks = gl.cdiv(problem.M, BLOCK_M)
    n, head = place(number, num_blocks, num_heads, heads_per_group)
    m = num_blocks - 1 - n
    start = m * BLOCK_M + problem.N - problem.M  # position of the first query
    first = gl.to_tensor(0)
    last = gl.cdiv(problem.N, ROWS)
    if problem.HAS_RIGHT:
        end_key = gl.maximum(start + BLOCK_M + problem.right, 0)
        last = gl.minimum(last, gl.cdiv(end_key, ROWS))
    if problem.HAS_LEFT:
        first = gl.minimum(gl.maximum(start - problem.left, 0) // ROWS, last)
    return _Tile(m, head // problem.H, head % problem.H, first, last)


@gluon.jit
def _load_for_queries(tensors, shared, problem, tile):
    h_kv = tile.h // problem.group
    for w in gl.static_range(2):
        full = shared.q_full.index(w)
        row = tile.block * 2 * ROWS + w * ROWS
        mbarrier.expect(full, 2 * tensors.q.block_type.nbytes)
        load_rows(tensors.q, tile.b, tile.h, row, full, shared.q.index(w))
        load_rows(tensors.do, tile.b, tile.h, row, full, shared.do.index(w))
    steps = tile.last - tile.first
    # The last rounds only wait: the consumers' arrivals must not outlive the program.
    for step in range(steps + _STAGES):
        i = step % _STAGES
        row = (tile.first + step) * ROWS
        if step >= _STAGES:
            mbarrier.wait(shared.k_empty.index(i), (step // _STAGES + 1) & 1)
        if step < steps:
            _load_tile(tensors.k, shared.k_full.index(i), shared.k.index(i), tile.b, h_kv, row)
        if (step >= 1) & (step <= steps):
            mbarrier.wait(shared.v_empty, (step + 1) & 1)
        if step < steps:
            _load_tile(tensors.v, shared.v_full, shared.v, tile.b, h_kv, row)


@gluon.jit
def _mask_keys(scores, row, key, problem):
    """Hide what the window hides of scores [queries, keys] that start at (row, key)."""
    LAYOUT: gl.constexpr = scores.type.layout
    rows = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT)), 1)
    keys = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(0, LAYOUT)), 0)
    # Bits 1 and 2 of a column come from the lane. On the other side of the comparison they leave an
    # immediate on this one; otherwise every column's number takes a register through the loop.
    fixed = keys & (ROWS - 7)
    lane = keys & 6
    ahead = rows - lane + (row + problem.N - problem.M - key)
    if problem.HAS_RIGHT:
        scores = gl.where(fixed <= ahead + problem.right, scores, float("-inf"))
    if problem.HAS_LEFT:
        scores = gl.where(fixed >= ahead - problem.left, scores, float("-inf"))
    return gl.where(fixed < problem.N - key - lane, scores, float("-inf"))


@gluon.jit
def _accumulate_dq(tensors, shared, problem, tile, W: gl.constexpr):
    """Compute dQ of queries [64 W, 64 W + 64) of the tile."""
    BLOCK_D: gl.constexpr = tensors.q.block_shape[3]
    DTYPE: gl.constexpr = tensors.q.dtype
    S_LAYOUT: gl.constexpr = accumulator_layout(ROWS)
    DQ_LAYOUT: gl.constexpr = accumulator_layout(BLOCK_D)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, DQ_LAYOUT, k_width=2)
    row = tile.block * 2 * ROWS + W * ROWS
    offs = (tile.b * problem.H + tile.h) * tensors.padded_m + row
    offs += gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    lse_log2 = gl.expand_dims(gl.load(tensors.lse_ptr + offs), 1)
    delta = gl.expand_dims(gl.load(tensors.delta_ptr + offs), 1)
    q = shared.q.index(W)
    do = shared.do.index(W)
    zeros = gl.zeros([ROWS, ROWS], gl.float32, S_LAYOUT)
    dq = gl.zeros([ROWS, BLOCK_D], gl.float32, DQ_LAYOUT)
    mbarrier.wait(shared.q_full.index(W), 0)
    steps = tile.last - tile.first
    for step in range(steps):
        i = step % _STAGES
        key = (tile.first + step) * ROWS
        k = shared.k.index(i)
        mbarrier.wait(shared.k_full.index(i), (step // _STAGES) & 1)
        s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(shared.v_full, step & 1)
        dp = warpgroup_mma(do, shared.v.permute((1, 0)), zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        ahead = key + problem.M - problem.N - row
        if crosses_edge(problem, problem.N - key, ahead, ROWS):
            keep_branch()
            s = _mask_keys(s, row, key, problem)
        p = exp2(s * problem.scale_log2 - lse_log2)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        mbarrier.arrive(shared.v_empty, count=1)
        ds = (p * (dp - delta)).to(DTYPE)
        ds_operand = gl.convert_layout(ds, OPERAND, assert_trivial=True)
        dq = warpgroup_mma(ds_operand, k, dq, is_async=True)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        mbarrier.arrive(shared.k_empty.index(i), count=1)
    _store_tile(tensors.dq, q, tile, row, dq * problem.scale)


# fmt: off
@gluon.jit(do_not_specialize=[*host.NOT_SPECIALIZED, "padded_m"])
def _attention_backward_dq_kernel(
    q_desc, do_desc, k_desc, v_desc, dq_desc,  # [B, H or H_KV, M or N, D]
    lse_ptr, delta_ptr,  # [B * H, padded_m]
    M, N, H, group, num_heads, heads_per_group, left, right, padded_m, scale, scale_log2,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, BLOCK_D: gl.constexpr,
):
    # fmt: on
    DTYPE: gl.constexpr = q_desc.dtype
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    shared = _SharedQueries(
        gl.allocate_shared_memory(DTYPE, [2, ROWS, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(DTYPE, [2, ROWS, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(DTYPE, [_STAGES, ROWS, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(DTYPE, [ROWS, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [1], BARRIER),
    )
    for i in gl.static_range(2):
        mbarrier.init(shared.q_full.index(i), count=1)
        mbarrier.init(shared.k_full.index(i), count=1)
        mbarrier.init(shared.k_empty.index(i), count=2)
    mbarrier.init(shared.v_full, count=1)
    mbarrier.init(shared.v_empty, count=2)
    tensors = _QueryTensors(
        q_desc, do_desc, k_desc, v_desc, dq_desc, lse_ptr, delta_ptr, padded_m
    )
    problem = _Problem(M, N, H, group, left, right, scale, scale_log2, HAS_LEFT, HAS_RIGHT)
    tile = _tile_of_queries(problem, gl.program_id(0), num_heads, heads_per_group)
    gl.warp_specialize(
        [
            (_accumulate_dq, (tensors, shared, problem, tile, 0)),
            (_accumulate_dq, (tensors, shared, problem, tile, 1)),
            (_load_for_queries, (tensors, shared, problem, tile)),
        ],
        [4, 1],
        [240, 24],
    )


_launch_dk_dv = GluonLauncher(_attention_backward_dk_dv_kernel)
_launch_dq = GluonLauncher(_attention_backward_dq_kernel)
# Registers of a thread at the start, which warp_specialize shares out: 240 for each consumer.
_MAX_REGISTERS = 168


def attention_backward_wide(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    window: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients dq, dk, dv of `attention`, given those of out (dout) and, maybe, of lse (dlse)."""
    B, M, H, D = q.shape
    _, N, H_KV, _ = k.shape
    if B * M * H * N == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    left, right = window
    rows, block_d = ROWS.value, host.padded_head_dim(D)
    q, k, v, out, dout = (addressable(tensor) for tensor in (q, k, v, out, dout))
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    lse_log2, delta = sums.prepare_rows(dout, dlse, out, lse, block_d)
    inputs = tuple(Rows(tensor, rows, block_d) for tensor in (q, dout, k, v))
    constants = {"HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0, "BLOCK_D": block_d}
    scales = scale, scale * host.LOG2_E
    _launch_dk_dv(
        -(-N // rows) * B * H_KV,
        args=(
            *inputs, *(Rows(tensor, rows, block_d) for tensor in (dk, dv)),
            *(Flat(row, (1, rows)) for row in (lse_log2, delta)),
            M, N, H, H // H_KV, B * H_KV, host.heads_per_group(M, D), left, right, *scales,
        ),
        constants=constants,
        maxnreg=_MAX_REGISTERS,
    )  # fmt: skip
    _launch_dq(
        -(-M // (2 * rows)) * B * H,
        args=(
            *inputs, Rows(dq, rows, block_d),
            lse_log2, delta, M, N, H, H // H_KV, B * H, host.heads_per_group(N, D), left, right,
            lse_log2.shape[1], *scales,
        ),
        constants=constants,
        maxnreg=_MAX_REGISTERS,
    )  # fmt: skip
    return dq, dk, dv
