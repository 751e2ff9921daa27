"""Backward pass for sm_90a in one kernel of five matrix products.

A program owns BLOCK_N keys and values and walks the queries that see them. With P = exp(S - lse),
dP = dO V^T and delta = rowsum(dO * O) - dlse:

    dS = P * (dP - delta),   dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO.

Scores are computed transposed, keys by queries: P^T and dS^T leave the first products in the
registers from which the products of dV and dK take them. dQ is summed over programs in float32, in
the L2 cache. Three roles share a program; docs/attn-flash-hopper.md draws their protocol:

* `backward_loader` copies K and V, then each step's Q, dO, lse and delta, two steps ahead, and at
  the end dK and dV: what it alone knows takes no register of those who compute;
* two of `backward_consumer`, a warpgroup for 64 keys each, keep dK and dV in registers, and each
  compute one half of a step's dQ. They take turns: one's exponentials run under the other's
  products;
* `backward_adder` adds the halves to the sum in memory; with DETERMINISTIC, in the order of the
  keys.

For narrow heads and few keys a program computes tile after tile, with the loader a tile ahead.
Where there are few tiles, the query heads of a key head are the work of two programs, of one tile
each: with a next tile the adder could claim a sum for it while consumers wait for the other
program, and that for the sum.

This file has what they share, the kernel and its launcher, and `backward_tiles` which keys and
queries a program works on.

Shah et al., "FlashAttention-3", 2024; Dao, "FlashAttention-2", 2023, algorithm 2.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from attn_core.gluon_launch import GluonLauncher
from attn_core.tiles.hopper import record
from attn_flash._hopper import backward_sums as sums
from attn_flash._hopper import problem as host
from attn_flash._hopper.backward_adder import add_dq
from attn_flash._hopper.backward_consumer import accumulate
from attn_flash._hopper.backward_loader import load
from attn_flash._hopper.backward_tiles import KEYS
from attn_flash._hopper.descriptors import Flat, Rows, addressable
from attn_flash._hopper.problem import Sequences

_STAGES = gl.constexpr(2)


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

    k: gl.shared_memory_descriptor  # [BUFFERS * 2, KEYS, BLOCK_D], two for the consumers, as v
    v: gl.shared_memory_descriptor
    q: gl.shared_memory_descriptor  # [_STAGES, BLOCK_M, BLOCK_D], as do
    do: gl.shared_memory_descriptor
    lse: gl.shared_memory_descriptor  # [_STAGES, 1, BLOCK_M], as delta
    delta: gl.shared_memory_descriptor
    ds: gl.shared_memory_descriptor  # dS^T of [_STAGES * 2, KEYS, BLOCK_M]
    dq: gl.shared_memory_descriptor  # [2, *sums.UNIT], one for each consumer
    number: gl.shared_memory_descriptor  # of the tile whose keys are in each buffer
    begins: gl.shared_memory_descriptor  # [_STAGES, 1], as count and ahead: where queries are
    count: gl.shared_memory_descriptor
    ahead: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor  # of each buffer of keys, as v_full and keys_empty
    v_full: gl.shared_memory_descriptor
    keys_empty: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor  # of each stage, as do_full and empty
    do_full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


@record
class _Problem:
    """Sizes and window of the call."""

    starts_q_ptr: gl.tensor  # [B + 1] of ragged sequences, as starts_k_ptr
    starts_k_ptr: gl.tensor
    parts_ptr: gl.tensor  # dK and dV of the first of two parts, as consumers keep them
    are_left_ptr: gl.tensor  # whether they are there
    B: gl.tensor  # ragged sequences
    M: gl.tensor  # queries of a batch entry, as keys
    N: gl.tensor
    H: gl.tensor
    group: gl.tensor  # query heads of a program
    blocks_m: gl.tensor  # of the rows of a head
    blocks_n: gl.tensor
    num_heads: gl.tensor  # of keys, times PARTS and B
    heads_per_group: gl.tensor  # that have what they read in the L2 cache
    left: gl.tensor
    right: gl.tensor
    scale: gl.tensor
    scale_log2: gl.tensor
    IS_RAGGED: gl.constexpr
    HAS_LEFT: gl.constexpr
    HAS_RIGHT: gl.constexpr
    PARTS: gl.constexpr  # programs that share the query heads of a key head
    DETERMINISTIC: gl.constexpr
    IS_LOCKSTEP: gl.constexpr  # programs walk query blocks from the last, each for all heads
    IS_CLEARED: gl.constexpr  # the sum of dq is 0 at first
    IS_PERSISTENT: gl.constexpr  # programs compute tile after tile


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
    PARTS: gl.constexpr, DETERMINISTIC: gl.constexpr, IS_LOCKSTEP: gl.constexpr,
    IS_CLEARED: gl.constexpr, IS_PERSISTENT: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr,
):
    # fmt: on
    DTYPE: gl.constexpr = q_desc.dtype
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    FLAT: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=2)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    BUFFERS: gl.constexpr = 2 if IS_PERSISTENT else 1
    shared = _Shared(
        gl.allocate_shared_memory(DTYPE, [BUFFERS * 2, KEYS, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(DTYPE, [BUFFERS * 2, KEYS, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(DTYPE, [_STAGES, BLOCK_M, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(DTYPE, [_STAGES, BLOCK_M, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(gl.float32, [_STAGES, 1, BLOCK_M], FLAT),
        gl.allocate_shared_memory(gl.float32, [_STAGES, 1, BLOCK_M], FLAT),
        gl.allocate_shared_memory(DTYPE, [_STAGES * 2, KEYS, BLOCK_M], SWIZZLED),
        gl.allocate_shared_memory(gl.float32, [2, 16, 256], FLAT),
        gl.allocate_shared_memory(gl.int32, [BUFFERS, 1], PLAIN),
        gl.allocate_shared_memory(gl.int32, [_STAGES, 1], PLAIN),
        gl.allocate_shared_memory(gl.int32, [_STAGES, 1], PLAIN),
        gl.allocate_shared_memory(gl.int32, [_STAGES, 1], PLAIN),
        gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER),
    )
    for i in gl.static_range(BUFFERS):
        mbarrier.init(shared.k_full.index(i), count=1)
        mbarrier.init(shared.v_full.index(i), count=1)
        mbarrier.init(shared.keys_empty.index(i), count=3)
    for i in gl.static_range(_STAGES):
        mbarrier.init(shared.q_full.index(i), count=1)
        mbarrier.init(shared.do_full.index(i), count=1)
        mbarrier.init(shared.empty.index(i), count=2)
    tensors = _Tensors(
        q_desc, do_desc, k_desc, v_desc, dk_desc, dv_desc, lse_desc, delta_desc, dq_sum_desc
    )
    problem = _Problem(
        starts_q_ptr, starts_k_ptr, parts_ptr, are_left_ptr,
        B, M, N, H, group, blocks_m, blocks_n, num_heads, heads_per_group,
        left, right, scale, scale_log2,
        IS_RAGGED, HAS_LEFT, HAS_RIGHT, PARTS, DETERMINISTIC, IS_LOCKSTEP, IS_CLEARED,
        IS_PERSISTENT,
    )  # fmt: skip
    ticket = gl.program_id(0)
    if IS_PERSISTENT or DETERMINISTIC or PARTS == 2:
        # A program waits for those with lower tickets: they have begun, so they will end.
        ticket = gl.atomic_add(counters_ptr, 1)
    gl.warp_specialize(
        [
            (accumulate, (shared, problem, ticket, 0)),
            (accumulate, (shared, problem, ticket, 1)),
            (load, (tensors, shared, problem, ticket, counters_ptr)),
            (add_dq, (tensors, shared, problem, ticket, counters_ptr + 1)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )


_launch = GluonLauncher(_attention_backward_kernel)
# Registers of a thread at the start, which warp_specialize shares out: 240 for each consumer.
_MAX_REGISTERS = 168
_L2_SHARE = 32 << 20  # bytes of Q, dO and the sum of dQ that running programs may touch at once
# Keys of a query up to which clearing the sum of dQ takes longer than asking who is first, where
# every tile has a program.
_CLAIMED = {64: 1024, 128: 4096}
# Those up to which programs for narrow heads compute tile after tile, and ask.
_PERSISTENT = 4096
_FEW_TILES = 4  # for every multiprocessor: fewer are split into two parts


def _most_seen(longest_k: int, window: tuple[int, int]) -> int:
    """Keys that a query sees, at most."""
    is_closed = min(window) >= 0
    return min(longest_k, sum(window) + 1) if is_closed else longest_k


def _heads_per_group(q: torch.Tensor, longest: int, group: int) -> int:
    """How many groups' queries fit the share of the L2 cache that programs work in.

    Programs walk the query heads of a group one after another, not quite in step: two count, and
    of programs in lockstep one.
    """
    head_bytes = max(longest, 1) * q.shape[3] * (2 * q.element_size() + 4)
    return max(1, _L2_SHARE // (min(group, 2) * head_bytes))


def _parts(group: int, tiles: int, device: torch.device) -> int:
    """Into how many parts a key head's group is split.

    A tile has as many steps as its group has heads. When there are few tiles, the last ones to end
    leave most multiprocessors idle.
    """
    return 1 if group % 2 or tiles >= _FEW_TILES * host.num_sms(device) else 2


def _part_sums(q: torch.Tensor, tiles: int, block_d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the first of two parts leaves dK and dV, and says that they are there."""
    consumers = 2 * tiles
    part_sums = q.new_empty(consumers * 2 * KEYS.value * block_d, dtype=torch.float32)
    return part_sums, q.new_zeros(consumers, dtype=torch.int32)


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
    seen = _most_seen(longest_k, window)
    q, k, v, out, dout = (addressable(tensor) for tensor in (q, k, v, out, dout))
    dlse = None if dlse is None else dlse.contiguous()
    count, starts_q, starts_k = 0, None, None
    if is_ragged:
        count, (starts_q, starts_k, _) = sequences.arguments()
    blocks_n = sums.padded_blocks(N, starts_k)
    tiles = blocks_n * B * H_KV
    parts = _parts(H // H_KV, tiles, q.device)
    is_persistent = block_d == 64 and seen <= _PERSISTENT and parts == 1
    is_cleared = not (deterministic or is_persistent) and seen > _CLAIMED[block_d]
    dq = sums.new_gradient(q, starts_q)
    dk, dv = (sums.new_gradient(x, starts_k) for x in (k, v))
    rows, dq_sum, counters = sums.prepare(
        dout, dlse, out, lse, block_m, block_d, is_cleared, starts_q
    )
    blocks_m = rows.shape[-1] // block_m
    longest = sequences.longest_k if is_ragged else M
    part_sums = _part_sums(q, tiles, block_d) if parts == 2 else (counters, counters)
    group = H // H_KV // parts
    is_lockstep = deterministic and group > 1 and right >= 0
    heads_per_group = _heads_per_group(q, longest, 1 if is_lockstep else group)
    programs = tiles * parts
    if is_persistent:
        programs = min(programs, host.num_sms(q.device))
    _launch(
        programs,
        args=(
            *(Rows(tensor, block_m, block_d, is_ragged) for tensor in (q, dout)),
            *(Rows(tensor, KEYS.value, block_d, is_ragged) for tensor in (k, v, dk, dv)),
            *(Flat(row, (1, block_m)) for row in rows),
            Flat(dq_sum, sums.UNIT),
            counters, *((starts_q, starts_k) if is_ragged else (counters, counters)),
            *part_sums, count, M, N, H, group, blocks_m, blocks_n, B * H_KV * parts,
            heads_per_group, scale, scale * host.LOG2_E, left, right,
        ),
        constants={
            "IS_RAGGED": is_ragged, "HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0,
            "PARTS": parts, "DETERMINISTIC": deterministic, "IS_LOCKSTEP": is_lockstep,
            "IS_CLEARED": is_cleared, "IS_PERSISTENT": is_persistent,
            "BLOCK_M": block_m, "BLOCK_D": block_d,
        },
        maxnreg=_MAX_REGISTERS,
    )  # fmt: skip
    sums.finish(dq_sum, None if is_cleared else counters, dq, scale, block_d, starts_q)
    return dq, dk, dv
