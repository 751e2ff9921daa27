"""Backward pass for sm_90a over few tokens: a program computes all gradients of a head at once.

Sequences of some hundred tokens leave the kernel in `backward` mostly padding, and the sum of dq
and the kernels around it cost as much as the rest. Here a program takes a head in two passes. Each
keeps two tensors of the head in shared memory, in pieces that cover its tokens to 16, or nearly,
and walks tiles of 64 rows of two others:

* the first keeps K and V and walks Q, dO and out: delta = rowsum(dO * out), dS = P * (dP - delta)
  and dQ = scale dS K. It leaves lse and delta in shared memory for
* the second, which keeps Q and dO and walks K and V: dK = scale dS^T Q and dV = P^T dO.

That is seven products instead of five, but no product waits for another warpgroup and every sum has
one owner: the gradients are the same bits every time. Two consumers take tiles in turn; one warp
copies a pass ahead. docs/attn-flash-hopper.md draws the protocol.
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
from attn_core.tiles.hopper import accumulator_layout, exp2, record
from attn_flash._hopper import problem as host
from attn_flash._hopper.descriptors import Rows, addressable
from attn_flash._hopper.primitives import load_rows, store_rows

_ROWS = gl.constexpr(64)  # of a tile and, at most, of a piece
_CONSUMERS = gl.constexpr(2)
_BUFFERS = gl.constexpr(2)  # tiles of one consumer
_LOG2_E = gl.constexpr(host.LOG2_E)


@record
class _Tensors:
    """What the copy engine reads and writes, [B, H, M, D] in tiles of _ROWS."""

    q: tma.tensor_descriptor
    do: tma.tensor_descriptor
    k: tma.tensor_descriptor
    v: tma.tensor_descriptor
    out: tma.tensor_descriptor
    q_tail: tma.tensor_descriptor  # in tiles of the last piece, as the following
    do_tail: tma.tensor_descriptor
    k_tail: tma.tensor_descriptor
    v_tail: tma.tensor_descriptor
    dq: tma.tensor_descriptor
    dk: tma.tensor_descriptor
    dv: tma.tensor_descriptor


@record
class _Shared:
    """Shared memory of a program, and the barriers that say what is in it."""

    left: gl.tuple  # pieces [2 passes, PIECE, BLOCK_D] of K in the first pass, of Q in the second
    right: gl.tuple  # of V, of dO
    a: gl.shared_memory_descriptor  # tiles [_CONSUMERS * _BUFFERS, _ROWS, BLOCK_D] of Q, of K
    b: gl.shared_memory_descriptor  # of dO, of V
    out: gl.shared_memory_descriptor  # [_CONSUMERS, _ROWS, BLOCK_D]
    lse: gl.shared_memory_descriptor  # [2 heads * TILES, _ROWS], as delta
    delta: gl.shared_memory_descriptor
    left_full: gl.shared_memory_descriptor  # of each pass, as right_full and pieces_empty
    right_full: gl.shared_memory_descriptor
    pieces_empty: gl.shared_memory_descriptor
    tile_full: gl.shared_memory_descriptor  # of each buffer of a and b, as tile_empty
    tile_empty: gl.shared_memory_descriptor
    out_full: gl.shared_memory_descriptor  # of each consumer, as out_empty
    out_empty: gl.shared_memory_descriptor
    rows_full: gl.shared_memory_descriptor  # lse and delta of each of two heads


@record
class _Problem:
    """Sizes of the call."""

    M: gl.tensor
    H: gl.tensor
    num_heads: gl.tensor  # of all batch entries
    scale: gl.tensor
    scale_log2: gl.tensor
    TILES: gl.constexpr  # of a head
    PIECES: gl.constexpr


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


@gluon.constexpr_function
def _tiles_of(consumer, tiles):
    """How many of a head's tiles a consumer has in the first pass: it takes every other."""
    return (tiles + 1 - consumer) // 2


@gluon.jit
def _buffer(tile_number):
    """Buffer of a consumer's tile, in the order of its tiles, and the phase of its barriers."""
    return tile_number % _BUFFERS, (tile_number // _BUFFERS) & 1


# --- the producer -------------------------------------------------------------------------------


@gluon.jit
def _load_pieces(desc, tail_desc, pieces, barrier, b, h, PASS: gl.constexpr):
    LAST: gl.constexpr = len(pieces) - 1
    mbarrier.expect(barrier, LAST * desc.block_type.nbytes + tail_desc.block_type.nbytes)
    for i in gl.static_range(LAST):
        load_rows(desc, b, h, i * _ROWS, barrier, pieces[i].index(PASS))
    load_rows(tail_desc, b, h, LAST * _ROWS, barrier, pieces[LAST].index(PASS))


@gluon.jit
def _load_tile(a_desc, b_desc, shared, unit, b, h, row):
    """Start to copy a tile of each of two tensors for the consumer whose turn it is."""
    w = unit % _CONSUMERS
    buffer, phase = _buffer(unit // _CONSUMERS)
    i = w * _BUFFERS + buffer
    mbarrier.wait(shared.tile_empty.index(i), phase ^ 1)
    barrier = shared.tile_full.index(i)
    mbarrier.expect(barrier, 2 * a_desc.block_type.nbytes)
    load_rows(a_desc, b, h, row, barrier, shared.a.index(i))
    load_rows(b_desc, b, h, row, barrier, shared.b.index(i))


@gluon.jit
def _load_out(tensors, shared, problem, visit, tile: gl.constexpr, b, h):
    """Start to copy a tile of out to the buffer of the consumer that takes it."""
    W: gl.constexpr = tile % _CONSUMERS
    number = visit * _tiles_of(W, problem.TILES) + tile // _CONSUMERS
    mbarrier.wait(shared.out_empty.index(W), (number + 1) & 1)
    barrier = shared.out_full.index(W)
    mbarrier.expect(barrier, tensors.out.block_type.nbytes)
    load_rows(tensors.out, b, h, tile * _ROWS, barrier, shared.out.index(W))


@gluon.jit
def _load(tensors, shared, problem):
    """Copy each pass's pieces, and its tiles as consumers ask for them."""
    TILES: gl.constexpr = problem.TILES
    for visit in range(_heads(problem)):
        b, h = _head(problem, visit)
        unit = visit * (2 * TILES)
        mbarrier.wait(shared.pieces_empty.index(0), (visit & 1) ^ 1)
        for tile in gl.static_range(TILES):
            _load_tile(tensors.q, tensors.do, shared, unit + tile, b, h, tile * _ROWS)
            if tile == 0:
                _load_pieces(
                    tensors.k, tensors.k_tail, shared.left, shared.left_full.index(0), b, h, 0
                )
                _load_pieces(
                    tensors.v, tensors.v_tail, shared.right, shared.right_full.index(0), b, h, 0
                )
            _load_out(tensors, shared, problem, visit, tile, b, h)
        mbarrier.wait(shared.pieces_empty.index(1), (visit & 1) ^ 1)
        for tile in gl.static_range(TILES):
            _load_tile(tensors.k, tensors.v, shared, unit + TILES + tile, b, h, tile * _ROWS)
            if tile == 0:
                _load_pieces(
                    tensors.q, tensors.q_tail, shared.left, shared.left_full.index(1), b, h, 1
                )
                _load_pieces(
                    tensors.do, tensors.do_tail, shared.right, shared.right_full.index(1), b, h, 1
                )


# --- the consumers ------------------------------------------------------------------------------


@gluon.jit
def _unforeseen(i: gl.constexpr):
    """The number i, unknown until a step needs it.

    Otherwise the compiler computes the address of every piece ahead of the loop over tiles, and no
    registers are left for the products.
    """
    PTX: gl.constexpr = "mov.u32 $0, 0;"
    return i + gl.inline_asm_elementwise(PTX, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _start_products(a, b, left, right):
    """Start a tile's scores against one piece, and what becomes their gradient."""
    PIECE: gl.constexpr = left.shape[0]
    zeros = gl.zeros([_ROWS, PIECE], gl.float32, accumulator_layout(PIECE))
    s = warpgroup_mma(a, left.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dp = warpgroup_mma(b, right.permute((1, 0)), zeros, use_acc=False, is_async=True)
    return s, dp


@gluon.jit
def _operand(x, DTYPE: gl.constexpr):
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(64), k_width=2)
    return gl.convert_layout(x.to(DTYPE), OPERAND, assert_trivial=True)


@gluon.jit
def _beside(rows, scores):
    """A number of each row, as a column in the layout of scores."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    return gl.expand_dims(gl.convert_layout(rows, LAYOUT, assert_trivial=True), 1)


@gluon.jit
def _below(row, PIECE: gl.constexpr):
    """A number of each of a piece's tokens, as a row in the layout of scores."""
    LAYOUT: gl.constexpr = gl.SliceLayout(0, accumulator_layout(PIECE))
    return gl.expand_dims(row.slice(0, PIECE).load(LAYOUT), 0)


@gluon.jit
def _hide_end(p, length):
    """Make the columns from `length` on 0."""
    columns = gl.arange(0, p.shape[1], layout=gl.SliceLayout(0, p.type.layout))
    return gl.where(gl.expand_dims(columns < length, 0), p, 0.0)


@gluon.jit
def _load_lse(lse_ptr, problem, visit, tile):
    """Load a tile's lse in units of log2; rows past the end have inf, which hides them."""
    ROW: gl.constexpr = gl.SliceLayout(1, accumulator_layout(_ROWS))
    b, h = _head(problem, visit)
    offs_m = tile * _ROWS + gl.arange(0, _ROWS, layout=ROW)
    is_row = (offs_m < problem.M) & (visit < _heads(problem))
    row_ptr = lse_ptr + gl.cast(b * problem.H + h, gl.int64) * problem.M
    return gl.load(row_ptr + offs_m, mask=is_row, other=float("inf")) * _LOG2_E


@gluon.jit
def _start_tile(shared, visit, unit, W: gl.constexpr, PASS: gl.constexpr):
    """Wait for a tile and the pieces of its pass, and start its first products."""
    buffer, phase = _buffer(unit // _CONSUMERS)
    i = W * _BUFFERS + buffer
    mbarrier.wait(shared.tile_full.index(i), phase)
    mbarrier.wait(shared.left_full.index(PASS), visit & 1)
    mbarrier.wait(shared.right_full.index(PASS), visit & 1)
    a = shared.a.index(i)
    b = shared.b.index(i)
    stage = _unforeseen(PASS)
    s, dp = _start_products(a, b, shared.left[0].index(stage), shared.right[0].index(stage))
    return a, b, stage, s, dp


@gluon.jit
def _give_back(shared, unit, W: gl.constexpr):
    """Give back the buffers of this consumer's tile before `unit`, whose results have left them."""
    number = unit // _CONSUMERS
    if number > 0:
        buffer, _ = _buffer(number - 1)
        tma.store_wait(0)
        mbarrier.arrive(shared.tile_empty.index(W * _BUFFERS + buffer), count=1)


@gluon.jit
def _delta(shared, do, visit, turn, W: gl.constexpr, TILES: gl.constexpr):
    """rowsum(dO * out) of the consumer's tile number `turn` of a head."""
    LAYOUT: gl.constexpr = accumulator_layout(64)
    number = visit * _tiles_of(W, TILES) + turn
    mbarrier.wait(shared.out_full.index(W), number & 1)
    products = do.load(LAYOUT).to(gl.float32) * shared.out.index(W).load(LAYOUT).to(gl.float32)
    mbarrier.arrive(shared.out_empty.index(W), count=1)
    return gl.sum(products, axis=1)


@gluon.jit
def _compute_dq(tensors, shared, problem, lse_log2, visit, tile, W: gl.constexpr):
    """Compute dQ of one tile; leave its lse and delta in shared memory."""
    PIECES: gl.constexpr = problem.PIECES
    LAST: gl.constexpr = len(PIECES) - 1
    DTYPE: gl.constexpr = tensors.q.dtype
    unit = visit * (2 * problem.TILES) + tile
    q, do, stage, s, dp = _start_tile(shared, visit, unit, W, 0)
    _give_back(shared, unit, W)
    delta = _delta(shared, do, visit, tile // _CONSUMERS, W, problem.TILES)
    head = visit & 1
    shared.lse.index(head * problem.TILES + tile).store(lse_log2)
    shared.delta.index(head * problem.TILES + tile).store(delta)
    mbarrier.arrive(shared.rows_full.index(head), count=1)
    dq = gl.zeros([_ROWS, 64], gl.float32, accumulator_layout(64))
    for i in gl.static_range(len(PIECES)):
        if i > 0:
            s, dp = _start_products(
                q, do, shared.left[i].index(stage), shared.right[i].index(stage)
            )
        s = warpgroup_mma_wait(1, deps=(s,))
        p = exp2(s * problem.scale_log2 - _beside(lse_log2, s))
        if i == LAST:
            p = _hide_end(p, problem.M - LAST * _ROWS)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        ds = _operand(p * (dp - _beside(delta, s)), DTYPE)
        dq = warpgroup_mma(ds, shared.left[i].index(stage), dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=(dq,))
    mbarrier.arrive(shared.pieces_empty.index(0), count=1)
    b, h = _head(problem, visit)
    q.store((dq * problem.scale).to(DTYPE))
    fence_async_shared()
    store_rows(tensors.dq, b, h, tile * _ROWS, q)


@gluon.jit
def _compute_dk_dv(tensors, shared, problem, visit, tile, W: gl.constexpr):
    """Compute dK and dV of one tile."""
    PIECES: gl.constexpr = problem.PIECES
    DTYPE: gl.constexpr = tensors.q.dtype
    unit = visit * (2 * problem.TILES) + problem.TILES + tile
    k, v, stage, s, dp = _start_tile(shared, visit, unit, W, 1)
    _give_back(shared, unit, W)
    head = visit & 1
    mbarrier.wait(shared.rows_full.index(head), (visit // 2) & 1)
    dk = gl.zeros([_ROWS, 64], gl.float32, accumulator_layout(64))
    dv = gl.zeros([_ROWS, 64], gl.float32, accumulator_layout(64))
    for i in gl.static_range(len(PIECES)):
        lse_log2 = _below(shared.lse.index(head * problem.TILES + i), PIECES[i])
        delta = _below(shared.delta.index(head * problem.TILES + i), PIECES[i])
        if i > 0:
            s, dp = _start_products(k, v, shared.left[i].index(stage), shared.right[i].index(stage))
        s = warpgroup_mma_wait(1, deps=(s,))
        p = exp2(s * problem.scale_log2 - lse_log2)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        dv = warpgroup_mma(_operand(p, DTYPE), shared.right[i].index(stage), dv, is_async=True)
        ds = _operand(p * (dp - delta), DTYPE)
        dk = warpgroup_mma(ds, shared.left[i].index(stage), dk, is_async=True)
    dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
    mbarrier.arrive(shared.pieces_empty.index(1), count=1)
    b, h = _head(problem, visit)
    k.store((dk * problem.scale).to(DTYPE))
    v.store(dv.to(DTYPE))
    fence_async_shared()
    store_rows(tensors.dk, b, h, tile * _ROWS, k)
    store_rows(tensors.dv, b, h, tile * _ROWS, v)


@gluon.jit
def _compute(tensors, shared, problem, lse_ptr, W: gl.constexpr):
    """Compute every other tile of the program's heads."""
    TILES: gl.constexpr = problem.TILES
    FIRST: gl.constexpr = (TILES + W) % _CONSUMERS  # tile of the second pass
    lse_log2 = _load_lse(lse_ptr, problem, 0, W)
    for visit in range(_heads(problem)):
        for tile in range(W, TILES, _CONSUMERS):
            # Asked for a tile ahead, as its way from memory is long.
            is_last = tile + _CONSUMERS >= TILES
            next_visit = visit + gl.where(is_last, 1, 0)
            next_tile = gl.where(is_last, W, tile + _CONSUMERS)
            next_lse = _load_lse(lse_ptr, problem, next_visit, next_tile)
            _compute_dq(tensors, shared, problem, lse_log2, visit, tile, W)
            lse_log2 = next_lse
        for tile in range(FIRST, TILES, _CONSUMERS):
            _compute_dk_dv(tensors, shared, problem, visit, tile, W)
    tma.store_wait(0)


@gluon.jit
def _new_pieces(DTYPE: gl.constexpr, PIECES: gl.constexpr, BLOCK_D: gl.constexpr):
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    pieces = ()
    for i in gl.static_range(len(PIECES)):
        pieces += (gl.allocate_shared_memory(DTYPE, [2, PIECES[i], BLOCK_D], SWIZZLED),)
    return pieces


@gluon.jit
def _new_barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


# fmt: off
@gluon.jit(do_not_specialize=["M", "H", "num_heads"])
def _attention_backward_short_kernel(
    q_desc, do_desc, k_desc, v_desc, out_desc,  # [B, H, M, D]
    q_tail_desc, do_tail_desc, k_tail_desc, v_tail_desc,
    dq_desc, dk_desc, dv_desc,
    lse_ptr,  # [B, H, M], contiguous
    M, H, num_heads, scale, scale_log2,
    TILES: gl.constexpr, PIECES: gl.constexpr,
):
    # fmt: on
    DTYPE: gl.constexpr = q_desc.dtype
    BLOCK_D: gl.constexpr = q_desc.block_shape[3]
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BUFFERS: gl.constexpr = _CONSUMERS * _BUFFERS
    shared = _Shared(
        _new_pieces(DTYPE, PIECES, BLOCK_D),
        _new_pieces(DTYPE, PIECES, BLOCK_D),
        gl.allocate_shared_memory(DTYPE, [BUFFERS, _ROWS, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(DTYPE, [BUFFERS, _ROWS, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(DTYPE, [_CONSUMERS, _ROWS, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(gl.float32, [2 * TILES, _ROWS], FLAT),
        gl.allocate_shared_memory(gl.float32, [2 * TILES, _ROWS], FLAT),
        _new_barriers(2, 1),
        _new_barriers(2, 1),
        _new_barriers(2, TILES),
        _new_barriers(BUFFERS, 1),
        _new_barriers(BUFFERS, 1),
        _new_barriers(_CONSUMERS, 1),
        _new_barriers(_CONSUMERS, 1),
        _new_barriers(2, TILES),
    )
    tensors = _Tensors(
        q_desc, do_desc, k_desc, v_desc, out_desc,
        q_tail_desc, do_tail_desc, k_tail_desc, v_tail_desc,
        dq_desc, dk_desc, dv_desc,
    )  # fmt: skip
    problem = _Problem(M, H, num_heads, scale, scale_log2, TILES, PIECES)
    gl.warp_specialize(
        [
            (_compute, (tensors, shared, problem, lse_ptr, 0)),
            (_compute, (tensors, shared, problem, lse_ptr, 1)),
            (_load, (tensors, shared, problem)),
        ],
        [4, 1],
        [240, 24],
    )


_launch = GluonLauncher(_attention_backward_short_kernel)
_BLOCK_D = 64
_MAX_REGISTERS = 168  # of a thread at the start; warp_specialize shares them out


def attention_backward_short(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients dq, dk, dv of q, k, v (B, M, H, D), given that of out (dout)."""
    B, M, H, _ = q.shape
    q, k, v, out, dout = (addressable(tensor) for tensor in (q, k, v, out, dout))
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    pieces = pieces_of(M)
    inputs = (q, dout, k, v)
    _launch(
        min(B * H, host.num_sms(q.device)),
        args=(
            *(Rows(tensor, _ROWS.value, _BLOCK_D) for tensor in (*inputs, out)),
            *(Rows(tensor, pieces[-1], _BLOCK_D) for tensor in inputs),
            *(Rows(tensor, _ROWS.value, _BLOCK_D) for tensor in (dq, dk, dv)),
            lse, M, H, B * H, scale, scale * host.LOG2_E,
        ),
        constants={"TILES": len(pieces), "PIECES": pieces},
        maxnreg=_MAX_REGISTERS,
    )
    return dq, dk, dv


def pieces_of(length: int) -> tuple[int, ...]:
    """Pieces of 64 tokens, and a last one of 16, 32 or 64, that cover `length`."""
    full = (length - 1) // 64
    rest = length - 64 * full
    return (64,) * full + (16 if rest <= 16 else 32 if rest <= 32 else 64,)
