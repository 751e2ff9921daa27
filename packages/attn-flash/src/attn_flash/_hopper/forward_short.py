"""Forward pass for sm_90a over few keys: a program holds all keys and values of a head at once.

Sequences of some hundred tokens, such as those of vision transformers, leave a pipeline over blocks
of keys nothing to overlap, and blocks of 128 tokens mostly padding. Here keys come in pieces of
128, 64, 32 and 16 that cover them to 16, or nearly, and each of two consumers takes every other 64
queries of the program's heads. A consumer sees all scores of a query at once, so its softmax needs
one pass. The products of one, P V of a tile and Q K^T of its next, run under the softmax of the
other. One warp copies a head ahead.
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
from attn_core.tiles.gluon_names import reinterpret
from attn_core.tiles.hopper import (
    accumulator_layout,
    arrive_at,
    exp2,
    log2,
    meet_at,
    reciprocal,
    record,
    scale_rows,
    thread_sums,
)
from attn_flash._hopper import problem as host
from attn_flash._hopper.descriptors import Rows
from attn_flash._hopper.primitives import load_rows, store_rows
from attn_flash._hopper.softmax import ROWS, store_lse

_CONSUMERS = gl.constexpr(2)
_TURN = gl.constexpr(12)  # named barriers, one for each consumer


@record
class _Tensors:
    """What the copy engine reads and writes, as [B, H or H_KV, M or N, D]."""

    q: tma.tensor_descriptor  # in tiles of ROWS, as the others
    k: tma.tensor_descriptor
    v: tma.tensor_descriptor
    out: tma.tensor_descriptor


@record
class _Shared:
    """Shared memory of a program, and the barriers that say what is in it."""

    q: gl.shared_memory_descriptor  # [Q_STAGES * _CONSUMERS, ROWS, BLOCK_D]
    k: gl.tuple  # of [STAGES, PIECE or at least ROWS, BLOCK_D], as v
    v: gl.tuple
    out: gl.shared_memory_descriptor  # [_CONSUMERS, ROWS, BLOCK_D]
    q_full: gl.shared_memory_descriptor  # of each buffer of q, as q_empty
    q_empty: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor  # of each stage, as v_full and empty
    v_full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


@record
class _Problem:
    """Sizes of the call."""

    M: gl.tensor
    N: gl.tensor
    H: gl.tensor
    group: gl.tensor  # query heads of a key head
    num_heads: gl.tensor  # of all batch entries
    scale_log2: gl.tensor
    TILES: gl.constexpr  # of a head
    STAGES: gl.constexpr  # heads whose keys and values are in shared memory
    PIECES: gl.constexpr
    NEGATE: gl.constexpr


@gluon.constexpr_function
def total(pieces):
    """Keys of all pieces."""
    return sum(pieces)


@gluon.constexpr_function
def copies(pieces):
    """How many copies of 64 keys fill all pieces."""
    return sum(-(-piece // 64) for piece in pieces)


@gluon.jit
def _heads(problem):
    """How many heads this program computes: every num_programs-th."""
    return gl.cdiv(problem.num_heads - gl.program_id(0), gl.num_programs(0))


@gluon.jit
def _head(problem, visit):
    """Batch entry and head of the program's head number `visit`."""
    number = gl.program_id(0) + visit * gl.num_programs(0)
    b = number // problem.H
    return b, number - b * problem.H


@gluon.jit
def _load_piece(desc, buffer, barrier, b, h, start):
    COPIES: gl.constexpr = buffer.shape[0] // ROWS
    SHAPE: gl.constexpr = [COPIES, ROWS, buffer.shape[1]]
    parts = reinterpret(buffer, buffer.dtype, SHAPE, buffer.layout)
    for i in gl.static_range(COPIES):
        load_rows(desc, b, h, start + i * ROWS, barrier, parts.index(i))


@gluon.jit
def _load_pieces(desc, pieces, barrier, b, h, stage, PIECES: gl.constexpr):
    start = 0
    mbarrier.expect(barrier, copies(PIECES) * desc.block_type.nbytes)
    for i in gl.static_range(len(PIECES)):
        _load_piece(desc, pieces[i].index(stage), barrier, b, h, start)
        start += PIECES[i]


@gluon.jit
def _load(tensors, shared, problem):
    """Copy each head's keys and values, and its queries as consumers ask for them."""
    Q_STAGES: gl.constexpr = shared.q.shape[0] // _CONSUMERS
    unit = 0
    for visit in range(_heads(problem)):
        b, h = _head(problem, visit)
        h_kv = h // problem.group
        stage = visit % problem.STAGES
        mbarrier.wait(shared.empty.index(stage), (visit // problem.STAGES + 1) & 1)
        _load_pieces(
            tensors.k, shared.k, shared.k_full.index(stage), b, h_kv, stage, problem.PIECES
        )
        for tile in gl.static_range(problem.TILES):
            i = unit % (Q_STAGES * _CONSUMERS)
            turn = unit // (Q_STAGES * _CONSUMERS)
            mbarrier.wait(shared.q_empty.index(i), (turn + 1) & 1)
            mbarrier.expect(shared.q_full.index(i), tensors.q.block_type.nbytes)
            load_rows(tensors.q, b, h, tile * ROWS, shared.q_full.index(i), shared.q.index(i))
            if tile == 0:
                _load_pieces(
                    tensors.v, shared.v, shared.v_full.index(stage), b, h_kv, stage,
                    problem.PIECES,
                )  # fmt: skip
            unit += 1


@gluon.jit
def _start_product(q, buffer, PIECE: gl.constexpr):
    """Start the scores of one piece."""
    zeros = gl.zeros([ROWS, PIECE], gl.float32, accumulator_layout(PIECE))
    k = buffer.slice(0, PIECE).permute((1, 0))
    return warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)


@gluon.jit
def _start_rest(q, pieces, stage, PIECES: gl.constexpr):
    """Start the scores of all pieces but the first."""
    scores = ()
    for i in gl.static_range(1, len(PIECES)):
        scores += (_start_product(q, pieces[i].index(stage), PIECES[i]),)
    return scores


@gluon.jit
def _await_scores(started):
    scores = ()
    for i in gl.static_range(len(started)):
        scores += (warpgroup_mma_wait(len(started) - 1 - i, deps=(started[i],)),)
    return scores


@gluon.jit
def _hide(scores, problem):
    """Hide what lies past the last key, and find each row's maximum."""
    PIECES: gl.constexpr = problem.PIECES
    LAST: gl.constexpr = len(PIECES) - 1
    TOTAL: gl.constexpr = total(PIECES)
    ROW: gl.constexpr = gl.SliceLayout(1, accumulator_layout(PIECES[0]))
    hidden_scores = ()
    m_i = gl.full([ROWS], -float("inf"), gl.float32, ROW)
    for i in gl.static_range(len(PIECES)):
        s = scores[i]
        if problem.NEGATE:  # a maximum needs a scale that is not negative
            s = -s
        if i == LAST:
            keys = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
            is_hidden = keys >= problem.N - (TOTAL - s.shape[1])
            s = gl.where(gl.expand_dims(is_hidden, 0), -float("inf"), s)
        m_i = gl.maximum(m_i, gl.convert_layout(gl.max(s, axis=1), ROW, assert_trivial=True))
        hidden_scores += (s,)
    return hidden_scores, m_i


@gluon.jit
def _softmax(scores, m_i, problem, DTYPE: gl.constexpr, OPERAND: gl.constexpr):
    """Exponentials of the scores as operands, and each thread's share of their sums."""
    PIECES: gl.constexpr = problem.PIECES
    pivot = m_i * problem.scale_log2
    operands = ()
    for i in gl.static_range(len(PIECES)):
        s = scores[i]
        row = gl.convert_layout(pivot, gl.SliceLayout(1, s.type.layout), assert_trivial=True)
        p = exp2(s * problem.scale_log2 - gl.expand_dims(row, 1))
        part = thread_sums(p)
        if i == 0:
            sums = part
        else:
            sums += gl.convert_layout(part, sums.type.layout, assert_trivial=True)
        operands += (gl.convert_layout(p.to(DTYPE), OPERAND, assert_trivial=True),)
    return operands, sums


@gluon.jit
def _start_output(operands, pieces, stage, BLOCK_D: gl.constexpr):
    """Start P V of all pieces."""
    acc = gl.zeros([ROWS, BLOCK_D], gl.float32, accumulator_layout(BLOCK_D))
    for i in gl.static_range(len(operands)):
        v = pieces[i].index(stage).slice(0, operands[i].shape[1])
        acc = warpgroup_mma(operands[i], v, acc, use_acc=i > 0, is_async=True)
    return acc


@gluon.jit
def _store(tensors, shared, problem, lse_ptr, b, h, row, acc, m_i, sums, W: gl.constexpr):
    """Normalise a tile's output, and write it and lse."""
    l_i = gl.convert_layout(gl.sum(sums, axis=1), m_i.type.layout)
    head = gl.cast(b * problem.H + h, gl.int64) * problem.M
    lse_log2 = gl.fma(m_i, problem.scale_log2, log2(l_i))
    store_lse(lse_ptr + head, lse_log2, l_i, row, problem.M)
    out = scale_rows(acc, reciprocal(l_i)).to(tensors.q.dtype)
    tma.store_wait(0)  # the last tile has left the buffer
    shared.out.index(W).store(out)
    fence_async_shared()
    store_rows(tensors.out, b, h, row, shared.out.index(W))


@gluon.jit
def _await_inputs(shared, problem, unit, turn, W: gl.constexpr):
    """Wait for the queries of a tile and the keys of its head; return their buffers' numbers."""
    Q_STAGES: gl.constexpr = shared.q.shape[0] // _CONSUMERS
    visit = unit // problem.TILES
    stage = visit % problem.STAGES
    i = turn % Q_STAGES * _CONSUMERS + W
    if unit < _heads(problem) * problem.TILES:
        mbarrier.wait(shared.q_full.index(i), (turn // Q_STAGES) & 1)
        mbarrier.wait(shared.k_full.index(stage), (visit // problem.STAGES) & 1)
    return i, stage


@gluon.jit
def _attend(tensors, shared, problem, lse_ptr, W: gl.constexpr):
    """Compute every other tile of the program's heads."""
    BLOCK_D: gl.constexpr = shared.q.shape[2]
    PIECES: gl.constexpr = problem.PIECES
    DTYPE: gl.constexpr = tensors.q.dtype
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(BLOCK_D), k_width=2)
    units = _heads(problem) * problem.TILES
    if W == 1:
        arrive_at(_TURN, 256)
    i, stage = _await_inputs(shared, problem, W, 0, W)
    first = _start_product(shared.q.index(i), shared.k[0].index(stage), PIECES[0])
    rest = _start_rest(shared.q.index(i), shared.k, stage, PIECES)
    scores = _await_scores((first,) + rest)  # noqa: RUF005
    turn = 0
    for unit in range(W, units, _CONSUMERS):
        mbarrier.arrive(shared.q_empty.index(i), count=1)
        visit = unit // problem.TILES
        scores, m_i = _hide(scores, problem)
        operands, sums = _softmax(scores, m_i, problem, DTYPE, OPERAND)
        mbarrier.wait(shared.v_full.index(stage), (visit // problem.STAGES) & 1)
        v_stage = stage
        turn += 1  # noqa: SIM113 - not of Python
        i, stage = _await_inputs(shared, problem, unit + _CONSUMERS, turn, W)
        b, h = _head(problem, visit)
        row = (unit - visit * problem.TILES) * ROWS
        meet_at(_TURN + W, 256)
        acc = _start_output(operands, shared.v, v_stage, BLOCK_D)
        # After the last tile these run on what is left in the buffers, for nobody.
        first = _start_product(shared.q.index(i), shared.k[0].index(stage), PIECES[0])
        acc = warpgroup_mma_wait(1, deps=(acc,))
        rest = _start_rest(shared.q.index(i), shared.k, stage, PIECES)
        arrive_at(_TURN + 1 - W, 256)
        mbarrier.arrive(shared.empty.index(v_stage), count=1)
        _store(tensors, shared, problem, lse_ptr, b, h, row, acc, m_i, sums, W)
        scores = _await_scores((first,) + rest)  # noqa: RUF005
    tma.store_wait(0)
    if W == 0:
        meet_at(_TURN, 256)  # the turn that the other consumer passed on
    elif units % _CONSUMERS == 1:  # the other one has a tile more
        meet_at(_TURN + 1, 256)
        arrive_at(_TURN, 256)


@gluon.jit
def _new_pieces(
    DTYPE: gl.constexpr, PIECES: gl.constexpr, STAGES: gl.constexpr, BLOCK_D: gl.constexpr
):
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    pieces = ()
    for i in gl.static_range(len(PIECES)):
        pieces += (
            gl.allocate_shared_memory(DTYPE, [STAGES, max(PIECES[i], ROWS), BLOCK_D], SWIZZLED),
        )
    return pieces


# fmt: off
@gluon.jit(do_not_specialize=["M", "N", "H", "group", "num_heads"])
def _attention_forward_short_kernel(
    q_desc, k_desc, v_desc, out_desc,  # [B, H or H_KV, M or N, D]
    lse_ptr,  # [B, H, M], contiguous
    M, N, H, group, num_heads, scale_log2,
    TILES: gl.constexpr, PIECES: gl.constexpr, NEGATE: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
):
    # fmt: on
    DTYPE: gl.constexpr = q_desc.dtype
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    shared = _Shared(
        gl.allocate_shared_memory(DTYPE, [Q_STAGES * _CONSUMERS, ROWS, BLOCK_D], SWIZZLED),
        _new_pieces(DTYPE, PIECES, STAGES, BLOCK_D),
        _new_pieces(DTYPE, PIECES, STAGES, BLOCK_D),
        gl.allocate_shared_memory(DTYPE, [_CONSUMERS, ROWS, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(gl.int64, [Q_STAGES * _CONSUMERS, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [Q_STAGES * _CONSUMERS, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
    )
    for i in gl.static_range(Q_STAGES * _CONSUMERS):
        mbarrier.init(shared.q_full.index(i), count=1)
        mbarrier.init(shared.q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(shared.k_full.index(i), count=1)
        mbarrier.init(shared.v_full.index(i), count=1)
        mbarrier.init(shared.empty.index(i), count=TILES)
    tensors = _Tensors(q_desc, k_desc, v_desc, out_desc)
    problem = _Problem(
        M, N, H, group, num_heads, scale_log2, TILES, STAGES, PIECES, NEGATE
    )
    gl.warp_specialize(
        [
            (_attend, (tensors, shared, problem, lse_ptr, 0)),
            (_attend, (tensors, shared, problem, lse_ptr, 1)),
            (_load, (tensors, shared, problem)),
        ],
        [4, 1],
        [240, 24],
    )


_launch = GluonLauncher(_attention_forward_short_kernel)
_BLOCK_D = 64
_Q_STAGES = 2
_MAX_REGISTERS = 168  # of a thread at the start; warp_specialize shares them out
# Pieces for a number of 16 keys.
_TAILS = ((), (16,), (32,), (64,), (64,), (64, 16), (64, 32), (128,), (128,))


def forward_short(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> None:
    """Compute out (B, M, H, D) and lse (B, H, M) of q (B, M, H, D) and k, v (B, N, H_KV, D)."""
    B, M, H, _ = q.shape
    _, N, H_KV, _ = k.shape
    _launch(
        min(B * H, host.num_sms(q.device)),
        args=(
            Rows(q, ROWS.value, _BLOCK_D), Rows(k, ROWS.value, _BLOCK_D),
            Rows(v, ROWS.value, _BLOCK_D), Rows(out, ROWS.value, _BLOCK_D),
            lse, M, N, H, H // H_KV, B * H, host.scale_log2(scale),
        ),
        constants={
            "TILES": -(-M // ROWS.value), "PIECES": pieces_of(N), "NEGATE": scale < 0,
            "BLOCK_D": _BLOCK_D, "STAGES": stages_of(M), "Q_STAGES": _Q_STAGES,
        },
        maxnreg=_MAX_REGISTERS,
    )  # fmt: skip


def pieces_of(length: int) -> tuple[int, ...]:
    """Pieces of keys, powers of two, that cover `length` to the next multiple of 16, or nearly."""
    return (128,) * (length // 128) + _TAILS[-(-(length % 128) // 16)]


def stages_of(len_q: int) -> int:
    """Heads in shared memory: a consumer asks for its next tile before it is done with this one."""
    return 3 if len_q <= 64 else 2
