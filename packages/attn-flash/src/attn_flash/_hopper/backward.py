"""Backward pass for sm_90a in one kernel of five matrix products.

A program owns BLOCK_N keys and values and walks the queries that see them. With P = exp(S - lse),
dP = dO V^T and delta = rowsum(dO * O) - dlse:

    dS = P * (dP - delta),   dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO.

Scores are computed transposed, keys by queries: P^T and dS^T leave the first products in the
registers from which the products of dV and dK take them. dQ is summed over programs in float32, in
the L2 cache. Three roles share a program; docs/attn-flash-hopper.md draws their protocol:

* `_load` copies K and V, then each step's Q, dO, lse and delta, two steps ahead, and at the end dK
  and dV: what it alone knows takes no register of those who compute;
* two of `_accumulate`, a warpgroup for 64 keys each, keep dK and dV in registers, and each compute
  one half of a step's dQ. They take turns: one's exponentials run under the other's products;
* `_add_dq` adds the halves to the sum in memory; with DETERMINISTIC, in the order of the keys.

Where there are few tiles, the query heads of a key head are the work of two programs.

Shah et al., "FlashAttention-3", 2024; Dao, "FlashAttention-2", 2023, algorithm 2.
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
from attn_core.tiles.hopper import accumulator_layout, arrive_at, exp2, meet_at, record
from attn_flash._hopper import backward_sums as sums
from attn_flash._hopper import problem as host
from attn_flash._hopper.backward_tiles import KEYS, crosses_edge, mask, place, queries_that_see
from attn_flash._hopper.descriptors import Flat, Rows, addressable
from attn_flash._hopper.primitives import (
    PUBLISHED,
    claim,
    columns,
    keep_branch,
    load_ragged_rows,
    load_row,
    load_rows,
    publish,
    reduce_add,
    store_ragged_rows,
    store_rows,
    wait_for_bulk_writes,
    wait_until_set,
)
from attn_flash._hopper.problem import Sequences

BLOCK_N = gl.constexpr(128)
_STAGES = gl.constexpr(2)

# Named barriers and the threads that meet there; barriers below 8 are the compiler's.
_KEYS_READ = gl.constexpr(8)
_DQ_EMPTY = gl.constexpr(9)  # 10 for the second consumer
_DQ_FULL = gl.constexpr(11)  # 12 for the second consumer
_TURN = gl.constexpr(13)  # 14 for the second consumer
_KEYS_DONE = gl.constexpr(15)
_CONSUMERS = gl.constexpr(256)
_CONSUMERS_AND_LOADER = gl.constexpr(288)
_CONSUMER_AND_ADDER = gl.constexpr(160)


@record
class _Tensors:
    """What the copy engine reads and writes, in tiles of the shape named here."""

    q: tma.tensor_descriptor  # [BLOCK_M, BLOCK_D], as do
    do: tma.tensor_descriptor
    k: tma.tensor_descriptor  # [KEYS, BLOCK_D], as v, dk and dv
    v: tma.tensor_descriptor
    dk: tma.tensor_descriptor
    dv: tma.tensor_descriptor
    lse: tma.tensor_descriptor  # [1, BLOCK_M] of the rows that `sums.prepare` made, as delta
    delta: tma.tensor_descriptor
    dq_sum: tma.tensor_descriptor  # `sums.UNIT`


@record
class _Shared:
    """Shared memory of a program, and the barriers that say what is in it."""

    k: gl.shared_memory_descriptor  # [2, KEYS, BLOCK_D], one for each consumer, as v
    v: gl.shared_memory_descriptor
    q: gl.shared_memory_descriptor  # [_STAGES, BLOCK_M, BLOCK_D], as do
    do: gl.shared_memory_descriptor
    lse: gl.shared_memory_descriptor  # [_STAGES, 1, BLOCK_M], as delta
    delta: gl.shared_memory_descriptor
    ds: gl.shared_memory_descriptor  # dS^T of [_STAGES * 2, KEYS, BLOCK_M]
    dq: gl.shared_memory_descriptor  # [2, *sums.UNIT], one for each consumer
    k_full: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor  # of each stage, as do_full and empty
    do_full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


@record
class _Problem:
    """Sizes and window of the call."""

    starts_q_ptr: gl.tensor  # [B + 1] of ragged sequences, as starts_k_ptr
    starts_k_ptr: gl.tensor
    parts_ptr: gl.tensor  # dK and dV of the first of two parts, as `_add_other_part` keeps them
    are_left_ptr: gl.tensor  # whether they are there
    B: gl.tensor  # ragged sequences
    M: gl.tensor  # queries of a batch entry, as keys
    N: gl.tensor
    H: gl.tensor
    group: gl.tensor  # query heads of a program
    blocks_m: gl.tensor  # of the rows of a head
    blocks_n: gl.tensor
    left: gl.tensor
    right: gl.tensor
    scale: gl.tensor
    scale_log2: gl.tensor
    IS_RAGGED: gl.constexpr
    HAS_LEFT: gl.constexpr
    HAS_RIGHT: gl.constexpr
    PARTS: gl.constexpr  # programs that share the query heads of a key head
    DETERMINISTIC: gl.constexpr
    IS_CLEARED: gl.constexpr  # the sum of dq is 0 at first


@record
class _Sequence:
    """A ragged sequence; the entries of a batch are alike, and one for all of them."""

    start_q: gl.tensor  # where its queries begin
    start_k: gl.tensor
    M: gl.tensor
    N: gl.tensor
    block_q: gl.tensor  # its first block of padded queries
    block_n: gl.tensor  # and of padded keys


@record
class _Tile:
    """The keys of a program, and the query blocks [first, last) of each head that see them."""

    sequence: _Sequence
    n: gl.tensor
    b: gl.tensor
    h_kv: gl.tensor
    h: gl.tensor  # the first query head
    part: gl.tensor  # which of PARTS
    first: gl.tensor
    last: gl.tensor


@gluon.jit
def _find(problem, block_n):
    """Find the sequence of a block of padded keys; the last one has those past its end too."""
    low = 0
    high = problem.B - 1
    while low < high:
        middle = (low + high + 1) // 2
        start = gl.load(problem.starts_k_ptr + middle)
        is_before = start // BLOCK_N + middle <= block_n
        low = gl.where(is_before, middle, low)
        high = gl.where(is_before, high, middle - 1)
    return low


@gluon.jit
def _sequence(problem, block_n, BLOCK_M: gl.constexpr):
    """Return the sequence of a block of padded keys."""
    if problem.IS_RAGGED:
        i = _find(problem, block_n)
        start_q = gl.load(problem.starts_q_ptr + i)
        start_k = gl.load(problem.starts_k_ptr + i)
        return _Sequence(
            start_q, start_k,
            gl.load(problem.starts_q_ptr + i + 1) - start_q,
            gl.load(problem.starts_k_ptr + i + 1) - start_k,
            (start_q // BLOCK_N + i) * (BLOCK_N // BLOCK_M),
            start_k // BLOCK_N + i,
        )  # fmt: skip
    else:  # noqa: RET505 - decided while compiling
        zero = gl.to_tensor(0)
        return _Sequence(zero, zero, problem.M, problem.N, zero, zero)


@gluon.jit
def _tile(problem, ticket, heads_per_group, num_heads, BLOCK_M: gl.constexpr):
    """Return tile number `ticket`.

    Heads alternate, within groups whose queries the L2 cache holds. Where tiles differ in length
    the longest come first, and where the sum of dq has an order the last keys do.
    """
    n, head = place(ticket, problem.blocks_n, num_heads, heads_per_group)
    if problem.DETERMINISTIC:
        n = problem.blocks_n - 1 - n
    sequence = _sequence(problem, n, BLOCK_M)
    n -= sequence.block_n
    first, last = queries_that_see(problem, sequence.M, sequence.N, n, BLOCK_M, BLOCK_N)
    if problem.IS_RAGGED:
        last = gl.where(n * BLOCK_N < sequence.N, last, first)
    groups = problem.H // problem.group
    g = head % groups
    return _Tile(
        sequence, n, head // groups, g // problem.PARTS, g * problem.group, g % problem.PARTS,
        first, last,
    )  # fmt: skip


@gluon.jit
def _load_tile(problem, tile, desc, start, length, h, row, barrier, buffer):
    """Start to copy rows of the tile's sequence, which begins at `start` where it is ragged."""
    if problem.IS_RAGGED:
        load_ragged_rows(desc, start, length, h, row, barrier, buffer)
    else:
        load_rows(desc, tile.b, h, row, barrier, buffer)


@gluon.jit
def _load_keys(problem, tile, desc, barrier, buffers):
    sequence = tile.sequence
    mbarrier.expect(barrier, 2 * desc.block_type.nbytes)
    for w in gl.static_range(2):
        row = tile.n * BLOCK_N + w * KEYS
        _load_tile(
            problem, tile, desc, sequence.start_k, sequence.N, tile.h_kv, row,
            barrier, buffers.index(w),
        )  # fmt: skip


@gluon.jit
def _load_queries(problem, tile, desc, row_desc, barrier, buffer, row_buffer, h, m):
    BLOCK_M: gl.constexpr = desc.block_shape[len(desc.block_shape) - 2]
    sequence = tile.sequence
    mbarrier.expect(barrier, desc.block_type.nbytes + row_desc.block_type.nbytes)
    _load_tile(problem, tile, desc, sequence.start_q, sequence.M, h, m * BLOCK_M, barrier, buffer)
    coord = [tile.b * problem.H + h, (sequence.block_q + m) * BLOCK_M]
    tma.async_copy_global_to_shared(row_desc, coord, barrier, row_buffer)


@gluon.jit
def _store_keys(problem, tile, desc, buffers):
    sequence = tile.sequence
    for w in gl.static_range(2):
        row = tile.n * BLOCK_N + w * KEYS
        if problem.IS_RAGGED:
            store_ragged_rows(desc, sequence.start_k, sequence.N, tile.h_kv, row, buffers.index(w))
        else:
            store_rows(desc, tile.b, tile.h_kv, row, buffers.index(w))


@gluon.jit
def _load(tensors, shared, problem, tile):
    """Fill the stages of shared memory with what each step needs; write dK and dV at the end."""
    steps = (tile.last - tile.first) * problem.group
    _load_keys(problem, tile, tensors.k, shared.k_full, shared.k)
    m = tile.first
    h = tile.h
    # The last rounds only wait: the consumers' arrivals must not outlive the program.
    for step in range(steps + _STAGES):
        i = step % _STAGES
        if step >= _STAGES:
            mbarrier.wait(shared.empty.index(i), (step // _STAGES + 1) & 1)
        if step < steps:
            _load_queries(
                problem, tile, tensors.q, tensors.lse, shared.q_full.index(i),
                shared.q.index(i), shared.lse.index(i), h, m,
            )  # fmt: skip
            if step == 0:
                _load_keys(problem, tile, tensors.v, shared.v_full, shared.v)
            _load_queries(
                problem, tile, tensors.do, tensors.delta, shared.do_full.index(i),
                shared.do.index(i), shared.delta.index(i), h, m,
            )  # fmt: skip
        m += 1
        if m == tile.last:
            m = tile.first
            h += 1
    if tile.part == problem.PARTS - 1:
        meet_at(_KEYS_DONE, _CONSUMERS_AND_LOADER)
        _store_keys(problem, tile, tensors.dv, shared.v)
        _store_keys(problem, tile, tensors.dk, shared.k)
        tma.store_wait(0)


@gluon.jit
def _start_dq(shared, step, W: gl.constexpr):
    """Start this consumer's half of dS K: its columns of 64 queries, or its 64 of 128 queries."""
    BLOCK_M: gl.constexpr = shared.ds.shape[2]
    BLOCK_D: gl.constexpr = shared.k.shape[2]
    dq = gl.zeros([64, 64], gl.float32, accumulator_layout(64))
    for w in gl.static_range(2):
        ds = shared.ds.index(step % _STAGES * 2 + w)
        if BLOCK_M == 64:
            k = columns(shared.k.index(w), W, KEYS, BLOCK_D)
        else:
            ds = columns(ds, W, KEYS, BLOCK_M)
            k = shared.k.index(w)
        dq = warpgroup_mma(ds.permute((1, 0)), k, dq, use_acc=w > 0, is_async=True)
    return dq


@gluon.jit
def _hand_over(shared, dq, W: gl.constexpr):
    """Let the adder add this consumer's half of dQ."""
    meet_at(_DQ_EMPTY + W, _CONSUMER_AND_ADDER)
    shared.dq.index(W).store(sums.to_unit(dq))
    fence_async_shared()
    arrive_at(_DQ_FULL + W, _CONSUMER_AND_ADDER)


@gluon.jit
def _add_other_part(problem, tile, dk, dv, W: gl.constexpr):
    """Leave dK and dV of the first part to the second, which adds them to its own."""
    BLOCK_D: gl.constexpr = dk.shape[1]
    LAYOUT: gl.constexpr = dk.type.layout
    heads_kv = problem.H // (problem.group * problem.PARTS)
    head = tile.b * heads_kv + tile.h_kv
    number = (head * problem.blocks_n + tile.sequence.block_n + tile.n) * 2 + W
    offs_n = gl.expand_dims(gl.arange(0, KEYS, layout=gl.SliceLayout(1, LAYOUT)), 1)
    offs_d = gl.expand_dims(gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, LAYOUT)), 0)
    # There are few tiles: 32 bits hold this.
    ptrs = problem.parts_ptr + number * (2 * KEYS * BLOCK_D) + offs_n * BLOCK_D + offs_d
    if tile.part == 1:
        wait_until_set(problem.are_left_ptr + number)
        dv += gl.load(ptrs, volatile=True)
        dk += gl.load(ptrs + KEYS * BLOCK_D, volatile=True)
    else:
        gl.store(ptrs, dv)
        gl.store(ptrs + KEYS * BLOCK_D, dk)
        gl.thread_barrier()
        gl.atomic_add(problem.are_left_ptr + number, 1, sem="release")
    return dk, dv


@gluon.jit
def _accumulate(tensors, shared, problem, tile, W: gl.constexpr):
    """Compute dK and dV of consumer W's keys, and its half of each step's dQ.

    A turn is the products of P and dS, for narrow heads also the next scores. When the second
    consumer's comes, both have stored the dS of the step; when the first one's comes, that of the
    step before, whose dQ it computes.
    """
    BLOCK_M: gl.constexpr = shared.q.shape[1]
    BLOCK_D: gl.constexpr = shared.q.shape[2]
    DTYPE: gl.constexpr = tensors.q.dtype
    S_LAYOUT: gl.constexpr = accumulator_layout(BLOCK_M)
    DK_LAYOUT: gl.constexpr = accumulator_layout(BLOCK_D)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, DK_LAYOUT, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    IS_BEHIND: gl.constexpr = W == 0  # with dQ
    KEEPS_TURN: gl.constexpr = BLOCK_D == 64  # for the next scores
    key = tile.n * BLOCK_N + W * KEYS
    count = tile.sequence.N - key
    row = tile.sequence.M - count  # of the query at the first key's position
    k = shared.k.index(W)
    v = shared.v.index(W)
    zeros = gl.zeros([KEYS, BLOCK_M], gl.float32, S_LAYOUT)
    dk = gl.zeros([KEYS, BLOCK_D], gl.float32, DK_LAYOUT)
    dv = gl.zeros([KEYS, BLOCK_D], gl.float32, DK_LAYOUT)
    m = tile.first
    steps = (tile.last - tile.first) * problem.group
    mbarrier.wait(shared.k_full, 0)
    if steps > 0:
        mbarrier.wait(shared.v_full, 0)
        if W == 1 and KEEPS_TURN:
            meet_at(_TURN + 1, _CONSUMERS)
        elif W == 1:
            arrive_at(_TURN, _CONSUMERS)  # the first turn is the first consumer's
    for step in range(steps):
        i = step % _STAGES
        phase = (step // _STAGES) & 1
        q = shared.q.index(i)
        do = shared.do.index(i)
        mbarrier.wait(shared.q_full.index(i), phase)
        s = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(shared.do_full.index(i), phase)
        dp = warpgroup_mma(v, do.permute((1, 0)), zeros, use_acc=False, is_async=True)
        if KEEPS_TURN:
            arrive_at(_TURN + 1 - W, _CONSUMERS)
        lse_log2 = load_row(shared.lse.index(i), BLOCK_M, ROW)
        s = warpgroup_mma_wait(1, deps=(s,))
        ahead = row - m * BLOCK_M
        if crosses_edge(problem, count, ahead, BLOCK_M):
            keep_branch()
            s = mask(s, problem, count, ahead)
        p = exp2(s * problem.scale_log2 - gl.expand_dims(lse_log2, 0))
        p_operand = gl.convert_layout(p.to(DTYPE), OPERAND, assert_trivial=True)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        # Not before the wait, where scores and lse still fill the registers.
        delta = load_row(shared.delta.index(i), BLOCK_M, ROW)
        ds = (p * (dp - gl.expand_dims(delta, 0))).to(DTYPE)
        ds_operand = gl.convert_layout(ds, OPERAND, assert_trivial=True)
        shared.ds.index(i * 2 + W).store(ds)
        fence_async_shared()
        meet_at(_TURN + W, _CONSUMERS)
        dv = warpgroup_mma(p_operand, do, dv, is_async=True)
        dq = _start_dq(shared, step + 1 if IS_BEHIND else step, W)
        dk = warpgroup_mma(ds_operand, q, dk, is_async=True)
        dv, dq = warpgroup_mma_wait(1, deps=(dv, dq))
        if not KEEPS_TURN:
            arrive_at(_TURN + 1 - W, _CONSUMERS)
        if not IS_BEHIND or step > 0:
            _hand_over(shared, dq, W)
        dk = warpgroup_mma_wait(0, deps=(dk,))
        mbarrier.arrive(shared.empty.index(i), count=1)
        m += 1
        if m == tile.last:
            m = tile.first
    if KEEPS_TURN and steps > 0:
        arrive_at(_TURN + 1 - W, _CONSUMERS)
    if IS_BEHIND and steps > 0:
        meet_at(_TURN, _CONSUMERS)
        dq = _start_dq(shared, steps - 1, W)
        _hand_over(shared, warpgroup_mma_wait(0, deps=(dq,)), W)
    if problem.PARTS == 2:
        dk, dv = _add_other_part(problem, tile, dk, dv, W)
    if tile.part == problem.PARTS - 1:
        v.store(dv.to(DTYPE))
        meet_at(_KEYS_READ, _CONSUMERS)  # by the other consumer's last dQ
        k.store((dk * problem.scale).to(DTYPE))
        fence_async_shared()
        arrive_at(_KEYS_DONE, _CONSUMERS_AND_LOADER)


@gluon.jit
def _turn(problem, tile, m, BLOCK_M: gl.constexpr):
    """How many programs add to dQ of query block m before this one: those with later keys."""
    sequence = tile.sequence
    last_n = gl.cdiv(sequence.N, BLOCK_N) - 1
    if problem.HAS_RIGHT:
        end_key = (m + 1) * BLOCK_M + sequence.N - sequence.M + problem.right
        last_n = gl.minimum(last_n, (end_key - 1) // BLOCK_N)
    return last_n - tile.n


@gluon.jit
def _wait_to_add(problem, tile, m, state, state_ptr, BLOCK_M: gl.constexpr):
    """Wait until this program may add to dQ of query block m. Return whether nobody has.

    `state` is what was at `state_ptr` some time ago.
    """
    if problem.DETERMINISTIC:
        turn = _turn(problem, tile, m, BLOCK_M)
        while state != turn:
            state = gl.load(state_ptr, volatile=True)
        return turn == 0
    else:  # noqa: RET505 - decided while compiling
        if state != PUBLISHED:
            state = claim(state_ptr)
        return state == 0


@gluon.jit
def _let_others_add(problem, is_first, state_ptr):
    """Let those go on who wait for what this program has added."""
    if problem.DETERMINISTIC:
        wait_for_bulk_writes()
        gl.thread_barrier()
        gl.atomic_add(state_ptr, 1, sem="release")
    elif is_first:
        publish(state_ptr)


@gluon.jit
def _add_dq(tensors, shared, problem, tile, states_ptr):
    """Add each step's dQ to its sum in memory, whose first summand is stored."""
    BLOCK_M: gl.constexpr = shared.q.shape[1]
    UNITS: gl.constexpr = 2  # of 64 x 64: BLOCK_M * BLOCK_D is 8192
    m = tile.first
    steps = (tile.last - tile.first) * problem.group
    row = tile.b * problem.H + tile.h
    block = row * problem.blocks_m + tile.sequence.block_q + m  # of all blocks of queries
    state = 0
    is_first = False
    if steps > 0:
        arrive_at(_DQ_EMPTY + 1, _CONSUMER_AND_ADDER)
        if not problem.IS_CLEARED:
            state = gl.load(states_ptr + block, volatile=True)
    for step in range(steps):
        if not problem.IS_CLEARED:
            is_first = _wait_to_add(problem, tile, m, state, states_ptr + block, BLOCK_M)
        this_block = block
        block += 1
        m += 1
        if m == tile.last:
            m = tile.first
            block += problem.blocks_m - (tile.last - tile.first)
        is_last = step + 1 == steps
        if not problem.IS_CLEARED:
            # Looked up a step ahead, as its way from memory is long.
            state = gl.load(states_ptr + block, mask=not is_last, other=0, volatile=True)
        for w in gl.static_range(1, -1, -1):  # the first consumer's half comes later
            meet_at(_DQ_FULL + w, _CONSUMER_AND_ADDER)
            coord = [(this_block * UNITS + w) * 16, 0]
            if is_first:
                tma.async_copy_shared_to_global(tensors.dq_sum, coord, shared.dq.index(w))
            else:
                reduce_add(tensors.dq_sum, coord, shared.dq.index(w))
            tma.store_wait(1)  # the copy before this one has read the other half
            if (w == 1) | (not is_last):
                arrive_at(_DQ_EMPTY + 1 - w, _CONSUMER_AND_ADDER)
        if not problem.IS_CLEARED:
            _let_others_add(problem, is_first, states_ptr + this_block)
    tma.store_wait(0)


# fmt: off
@gluon.jit(do_not_specialize=[*host.NOT_SPECIALIZED, "blocks_m", "blocks_n"])
def _attention_backward_kernel(
    q_desc, do_desc, k_desc, v_desc,  # [B, H or H_KV, M or N, D]
    dk_desc, dv_desc,
    lse_desc, delta_desc,  # [B * H, padded M]
    dq_sum_desc,
    counters_ptr,  # see `sums.prepare`
    starts_q_ptr, starts_k_ptr,
    parts_ptr, are_left_ptr,  # with PARTS == 2
    B, M, N, H, group, blocks_m, blocks_n, num_heads, heads_per_group,
    scale, scale_log2, left, right,
    IS_RAGGED: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    PARTS: gl.constexpr, DETERMINISTIC: gl.constexpr, IS_CLEARED: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr,
):
    # fmt: on
    DTYPE: gl.constexpr = q_desc.dtype
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    FLAT: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    shared = _Shared(
        gl.allocate_shared_memory(DTYPE, [2, KEYS, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(DTYPE, [2, KEYS, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(DTYPE, [_STAGES, BLOCK_M, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(DTYPE, [_STAGES, BLOCK_M, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(gl.float32, [_STAGES, 1, BLOCK_M], FLAT),
        gl.allocate_shared_memory(gl.float32, [_STAGES, 1, BLOCK_M], FLAT),
        gl.allocate_shared_memory(DTYPE, [_STAGES * 2, KEYS, BLOCK_M], SWIZZLED),
        gl.allocate_shared_memory(gl.float32, [2, 16, 256], FLAT),
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
    tensors = _Tensors(
        q_desc, do_desc, k_desc, v_desc, dk_desc, dv_desc, lse_desc, delta_desc, dq_sum_desc
    )
    problem = _Problem(
        starts_q_ptr, starts_k_ptr, parts_ptr, are_left_ptr,
        B, M, N, H, group, blocks_m, blocks_n, left, right, scale, scale_log2,
        IS_RAGGED, HAS_LEFT, HAS_RIGHT, PARTS, DETERMINISTIC, IS_CLEARED,
    )  # fmt: skip
    ticket = gl.program_id(0)
    if DETERMINISTIC or PARTS == 2:
        # A program waits for those with lower tickets: they have begun, so they will end.
        ticket = gl.atomic_add(counters_ptr, 1)
    tile = _tile(problem, ticket, heads_per_group, num_heads, BLOCK_M)
    gl.warp_specialize(
        [
            (_accumulate, (tensors, shared, problem, tile, 0)),
            (_accumulate, (tensors, shared, problem, tile, 1)),
            (_load, (tensors, shared, problem, tile)),
            (_add_dq, (tensors, shared, problem, tile, counters_ptr + 1)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )


_launch = GluonLauncher(_attention_backward_kernel)
# Registers of a thread at the start, which warp_specialize shares out: 240 for each consumer.
_MAX_REGISTERS = 168
_L2_SHARE = 32 << 20  # bytes of Q, dO and the sum of dQ that running programs may touch at once
# Keys of a query up to which clearing the sum of dQ takes longer than asking who is first.
_CLAIMED = {64: 1024, 128: 4096}
_FEW_TILES = 4  # for every multiprocessor: fewer are split into two parts


def _most_seen(longest_k: int, window: tuple[int, int]) -> int:
    """Keys that a query sees, at most."""
    is_closed = min(window) >= 0
    return min(longest_k, sum(window) + 1) if is_closed else longest_k


def _heads_per_group(q: torch.Tensor, longest: int, group: int) -> int:
    """How many groups' queries fit the share of the L2 cache that programs work in.

    Programs walk the query heads of a group one after another, not quite in step: two count.
    """
    head_bytes = longest * q.shape[3] * (2 * q.element_size() + 4)
    return max(1, _L2_SHARE // (min(group, 2) * head_bytes))


def _parts(q, group, tiles, block_d, unused):
    """Into how many parts a key head's group is split, and what `_add_other_part` works in.

    A tile has as many steps as its group has heads. When there are few tiles, the last ones to end
    leave most multiprocessors idle.
    """
    if group % 2 or tiles >= _FEW_TILES * host.num_sms(q.device):
        return 1, unused, unused
    consumers = 2 * tiles
    part_sums = q.new_empty(consumers * 2 * KEYS.value * block_d, dtype=torch.float32)
    return 2, part_sums, q.new_zeros(consumers, dtype=torch.int32)


def attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    window: tuple[int, int],
    deterministic: bool = True,
    sequences: Sequences | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients dq, dk, dv of `attention`, given those of out (dout) and, maybe, of lse (dlse).

    Ragged `sequences` lie one after the other in a batch of one.
    """
    B, M, H, D = q.shape
    _, N, H_KV, _ = k.shape
    is_ragged = sequences is not None
    if B * M * H * N == 0 or (is_ragged and sequences.starts_q.shape[0] == 1):
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    left, right = window
    block_d = 64 if D <= 64 else 128
    block_m = 8192 // block_d
    longest_k = sequences.longest_k if is_ragged else N
    is_cleared = not deterministic and _most_seen(longest_k, window) > _CLAIMED[block_d]
    q, k, v, out, dout = (addressable(tensor) for tensor in (q, k, v, out, dout))
    dlse = None if dlse is None else dlse.contiguous()
    count, starts_q, starts_k = 0, None, None
    if is_ragged:
        count, (starts_q, starts_k, _) = sequences.arguments()
    dq = sums.new_gradient(q, starts_q)
    dk, dv = (sums.new_gradient(x, starts_k) for x in (k, v))
    rows, dq_sum, counters = sums.prepare(
        dout, dlse, out, lse, block_m, block_d, is_cleared, starts_q
    )
    blocks_m = rows.shape[-1] // block_m
    blocks_n = sums.padded_blocks(N, starts_k)
    longest = sequences.longest_k if is_ragged else M
    tiles = blocks_n * B * H_KV
    parts, part_sums, are_left = _parts(q, H // H_KV, tiles, block_d, counters)
    group = H // H_KV // parts
    _launch(
        tiles * parts,
        args=(
            *(Rows(tensor, block_m, block_d, is_ragged) for tensor in (q, dout)),
            *(Rows(tensor, KEYS.value, block_d, is_ragged) for tensor in (k, v, dk, dv)),
            *(Flat(row, (1, block_m)) for row in rows),
            Flat(dq_sum, sums.UNIT),
            counters, *((starts_q, starts_k) if is_ragged else (counters, counters)),
            part_sums, are_left, count, M, N, H, group, blocks_m, blocks_n, B * H_KV * parts,
            _heads_per_group(q, longest, group), scale, scale * host.LOG2_E, left, right,
        ),
        constants={
            "IS_RAGGED": is_ragged, "HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0,
            "PARTS": parts, "DETERMINISTIC": deterministic, "IS_CLEARED": is_cleared,
            "BLOCK_M": block_m, "BLOCK_D": block_d,
        },
        maxnreg=_MAX_REGISTERS,
    )  # fmt: skip
    sums.finish(dq_sum, None if is_cleared else counters, dq, scale, block_d, starts_q)
    return dq, dk, dv
