"""Forward pass for sm_90a: one warp copies, two or three warpgroups compute 64 queries each.

Scores, softmax and output follow FlashAttention's recurrence over blocks of keys, from the last
block that a tile of queries sees to the first:

    S = Q K^T,   m' = max(m, rowmax S),   P = exp(scale (S - m')),
    l = exp(scale (m - m')) l + rowsum P,   O = exp(scale (m - m')) O + P V,

but m, which only has to keep P in range, may stay as it is until scores pass it by 8 powers of two.

This file has what a program's roles share, the kernel and its launcher. `forward_producer` and
`forward_consumer` are the roles, `forward_tiles` says which tiles they work on.
docs/attn-flash-hopper.md draws the protocol of the barriers between them.

Ragged sequences lie one after the other in a batch of one. The copy engine ends each where it ends:
rows past it arrive as zeros and are not written.

Shah et al., "FlashAttention-3", 2024.
"""

import functools
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from attn_core.gluon_launch import GluonLauncher
from attn_core.tiles.hopper import record
from attn_flash._hopper import problem
from attn_flash._hopper.descriptors import Rows
from attn_flash._hopper.forward_consumer import attend
from attn_flash._hopper.forward_producer import load
from attn_flash._hopper.forward_tiles import TILE_WORDS
from attn_flash._hopper.schedules import Schedule
from attn_flash._hopper.softmax import ROWS

# Named barriers; those below 6 are the compiler's, and those from 12 on the consumers' turns.
_K_EMPTY = gl.constexpr(6)  # and the next two
_V_EMPTY = gl.constexpr(9)  # and the next two


@record
class _Tensors:
    """What the copy engine reads and writes, as [B, H or H_KV, M or N, D]."""

    q: tma.tensor_descriptor  # in tiles of ROWS, as out
    k: tma.tensor_descriptor  # in tiles of BLOCK_N, as v
    v: tma.tensor_descriptor
    out: tma.tensor_descriptor
    out_ptr: gl.tensor  # [B, M, H, HEAD_DIM], contiguous


@record
class _Ring:
    """Buffers that the producer fills, in turn, with blocks of keys or of values."""

    buffers: gl.shared_memory_descriptor  # [STAGES, BLOCK_N, BLOCK_D]
    full: gl.shared_memory_descriptor  # an mbarrier of each
    EMPTY: gl.constexpr  # the first one's named barrier; those of the others follow it
    THREADS: gl.constexpr  # that meet there: the consumers' and the producer's


@record
class _Shared:
    """Shared memory of a program, and the barriers that say what is in it."""

    q: gl.shared_memory_descriptor  # [Q_STAGES * CONSUMERS, ROWS, BLOCK_D]
    q_full: gl.shared_memory_descriptor  # of each buffer of q, as the two that follow
    q_empty: gl.shared_memory_descriptor
    tile: gl.shared_memory_descriptor  # its tile, TILE_WORDS numbers
    k: _Ring
    v: _Ring
    out: gl.shared_memory_descriptor  # [CONSUMERS, ROWS, BLOCK_D], with STAGES_OUT


@record
class _Problem:
    """Sizes and window of the call, and the order of its tiles."""

    starts_q_ptr: gl.tensor  # [B + 1] of ragged sequences, as starts_k_ptr
    starts_k_ptr: gl.tensor
    used_ptr: gl.tensor  # [B], with HAS_USED: how many keys of a sequence count
    B: gl.tensor  # ragged sequences
    M: gl.tensor  # queries of a batch entry; of all ragged sequences, as N
    N: gl.tensor
    H: gl.tensor
    group: gl.tensor  # query heads of a key head
    num_tiles: gl.tensor  # of a head of a batch entry
    num_heads: gl.tensor  # of all batch entries; of a ragged sequence
    heads_per_group: gl.tensor
    left: gl.tensor
    right: gl.tensor
    scale_log2: gl.tensor
    next_ptr: gl.tensor  # counts the tiles that programs have taken beyond their first
    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr
    IS_RAGGED: gl.constexpr
    HAS_USED: gl.constexpr
    HAS_LEFT: gl.constexpr
    HAS_RIGHT: gl.constexpr
    EVEN_N: gl.constexpr
    NEGATE: gl.constexpr
    DYNAMIC: gl.constexpr
    TAKES_TURNS: gl.constexpr
    STAGES_OUT: gl.constexpr
    SCORES_FIRST: gl.constexpr
    STORES_FIRST: gl.constexpr
    SKIPS: gl.constexpr
    KEEPS_PIVOTS: gl.constexpr
    HEAD_DIM: gl.constexpr


# fmt: off
@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_forward_kernel(
    q_desc, k_desc, v_desc, out_desc,  # [B, H or H_KV, M or N, D]
    out_ptr,  # [B, M, H, HEAD_DIM], contiguous
    lse_ptr,  # [B, H, M], contiguous
    starts_q_ptr, starts_k_ptr, used_ptr, next_ptr,
    B, M, N, H, group, num_tiles, num_heads, heads_per_group,
    scale_log2, left, right,
    IS_RAGGED: gl.constexpr, HAS_USED: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, EVEN_N: gl.constexpr, NEGATE: gl.constexpr,
    DYNAMIC: gl.constexpr, TAKES_TURNS: gl.constexpr, STAGES_OUT: gl.constexpr,
    SCORES_FIRST: gl.constexpr, STORES_FIRST: gl.constexpr,
    SKIPS: gl.constexpr, KEEPS_PIVOTS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):
    # fmt: on
    CONSUMERS: gl.constexpr = BLOCK_M // ROWS
    THREADS: gl.constexpr = CONSUMERS * 128 + 32
    DTYPE: gl.constexpr = q_desc.dtype
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    shared = _Shared(
        gl.allocate_shared_memory(DTYPE, [Q_STAGES * CONSUMERS, ROWS, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(gl.int64, [Q_STAGES * CONSUMERS, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [Q_STAGES * CONSUMERS, 1], BARRIER),
        gl.allocate_shared_memory(gl.int32, [Q_STAGES * CONSUMERS * TILE_WORDS, 1], FLAT),
        _Ring(
            gl.allocate_shared_memory(DTYPE, [K_STAGES, BLOCK_N, BLOCK_D], SWIZZLED),
            gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], BARRIER),
            _K_EMPTY, THREADS,
        ),
        _Ring(
            gl.allocate_shared_memory(DTYPE, [V_STAGES, BLOCK_N, BLOCK_D], SWIZZLED),
            gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BARRIER),
            _V_EMPTY, THREADS,
        ),
        gl.allocate_shared_memory(
            DTYPE, [CONSUMERS if STAGES_OUT else 1, ROWS, BLOCK_D if STAGES_OUT else 64], SWIZZLED
        ),
    )  # fmt: skip
    for i in gl.static_range(Q_STAGES * CONSUMERS):
        mbarrier.init(shared.q_full.index(i), count=1)
        mbarrier.init(shared.q_empty.index(i), count=1)
    for i in gl.static_range(K_STAGES):
        mbarrier.init(shared.k.full.index(i), count=1)
    for i in gl.static_range(V_STAGES):
        mbarrier.init(shared.v.full.index(i), count=1)
    tensors = _Tensors(q_desc, k_desc, v_desc, out_desc, out_ptr)
    problem = _Problem(
        starts_q_ptr, starts_k_ptr, used_ptr, B, M, N, H, group, num_tiles, num_heads,
        heads_per_group, left, right, scale_log2, next_ptr,
        BLOCK_M, BLOCK_N, IS_RAGGED, HAS_USED, HAS_LEFT, HAS_RIGHT, EVEN_N, NEGATE, DYNAMIC,
        TAKES_TURNS, STAGES_OUT, SCORES_FIRST, STORES_FIRST, SKIPS, KEEPS_PIVOTS, HEAD_DIM,
    )  # fmt: skip
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (attend, (tensors, shared, problem, lse_ptr, 0)),
                (attend, (tensors, shared, problem, lse_ptr, 1)),
                (load, (tensors, shared, problem)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (attend, (tensors, shared, problem, lse_ptr, 0)),
                (attend, (tensors, shared, problem, lse_ptr, 1)),
                (attend, (tensors, shared, problem, lse_ptr, 2)),
                (load, (tensors, shared, problem)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )


_launch = GluonLauncher(_attention_forward_kernel)
_MAX_REGISTERS = {2: 168, 3: 128}  # of a thread at the start; warp_specialize shares them out


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    window: tuple[int, int],
    schedule: Schedule,
    sequences: problem.Sequences | None = None,
) -> None:
    """Compute out (B, M, H, D) and lse (B, H, M) of q (B, M, H, D) and k, v (B, N, H_KV, D).

    Ragged `sequences` need a dynamic schedule; B is then 1.
    """
    is_ragged = sequences is not None
    count, tensors = (0, (lse, lse, lse)) if sequences is None else sequences.arguments()
    longest_k = k.shape[1] if sequences is None else sequences.longest_k
    num_programs, sizes, constants = _plan(
        q.shape, k.shape, q.device, scale, window, schedule,
        count, longest_k, is_ragged, is_ragged and sequences.used_k is not None,
    )  # fmt: skip
    block_n, block_d = schedule.block_n, constants["BLOCK_D"]
    _launch(
        num_programs,
        args=(
            Rows(q, ROWS.value, block_d, is_ragged), Rows(k, block_n, block_d, is_ragged),
            Rows(v, block_n, block_d, is_ragged), Rows(out, ROWS.value, block_d, is_ragged),
            out, lse, *tensors, problem.tile_counter(q.device) if schedule.is_dynamic else lse,
            *sizes,
        ),
        constants=constants,
        maxnreg=_MAX_REGISTERS[schedule.consumers],
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _plan(
    shape_q: tuple[int, ...],
    shape_k: tuple[int, ...],
    device: torch.device,
    scale: float,
    window: tuple[int, int],
    schedule: Schedule,
    count: int,
    longest_k: int,
    is_ragged: bool,
    has_used: bool,
) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
    """Return how many programs to start, and the kernel's numbers and constants."""
    B, M, H, D = shape_q
    _, N, H_KV, _ = shape_k
    left, right = window
    block_m, block_n = ROWS.value * schedule.consumers, schedule.block_n
    num_tiles = -(-M // block_m)
    # The last tile of each ragged sequence may be cut short, and that of the tokens of none.
    most_tiles = num_tiles * B + (count + 1 if is_ragged else 0)
    num_programs = min(most_tiles * H, problem.num_sms(device))
    sizes = (
        count, M, N, H, H // H_KV, num_tiles, B * H, problem.heads_per_group(longest_k, D),
        problem.scale_log2(scale), left, right,
    )  # fmt: skip
    constants = {
        "IS_RAGGED": is_ragged, "HAS_USED": has_used,
        "HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0,
        "EVEN_N": not is_ragged and N % block_n == 0, "NEGATE": scale < 0,
        "DYNAMIC": schedule.is_dynamic, "TAKES_TURNS": schedule.takes_turns,
        "STAGES_OUT": schedule.stages_out,
        "SCORES_FIRST": schedule.scores_first, "STORES_FIRST": schedule.stores_first,
        "SKIPS": schedule.skips, "KEEPS_PIVOTS": schedule.keeps_pivots, "HEAD_DIM": D,
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": problem.padded_head_dim(D),
        "Q_STAGES": schedule.q_stages, "K_STAGES": schedule.k_stages,
        "V_STAGES": schedule.v_stages,
    }  # fmt: skip
    return num_programs, sizes, constants
