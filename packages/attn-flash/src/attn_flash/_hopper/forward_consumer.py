"""The consumers of the forward kernel: warpgroups of which each computes 64 queries of a tile.

A consumer keeps S, P and O in registers. It starts S of a block together with P V of the block
before, and does its softmax while another consumer's products run. The last P V of a tile and the
first S of the next start together, so nothing drains between tiles.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._layouts import DistributedLinearLayout
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_core.tiles.hopper import (
    accumulator_layout,
    arrive_at,
    arrive_at_stage,
    exp2,
    meet_at,
    scale_rows,
)
from attn_flash._hopper.forward_tiles import (
    TILE_WORDS,
    Tile,
    mask,
    mask_last,
    seen_blocks,
    sequence_at,
)
from attn_flash._hopper.primitives import store_ragged_rows, store_rows
from attn_flash._hopper.softmax import (
    ROWS,
    fold,
    follow_scores,
    no_pivots,
    raise_pivots,
    rescale_rows,
    store_lse,
)

_TURN = gl.constexpr(12)  # named barriers, one for each consumer


@gluon.jit
def _read(buffer):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(buffer.load(LAYOUT), axis=0)


@gluon.jit
def _read_tile(shared, problem, i):
    """Return the tile of the queries in buffer i."""
    first = i * TILE_WORDS
    sequence = gl.to_tensor(0)
    if problem.IS_RAGGED:
        sequence = _read(shared.tile.index(first + 5))
    return Tile(
        sequence_at(problem, sequence), _read(shared.tile.index(first)),
        _read(shared.tile.index(first + 1)), _read(shared.tile.index(first + 2)),
        _read(shared.tile.index(first + 3)), _read(shared.tile.index(first + 4)),
    )  # fmt: skip


@gluon.jit
def _await_block(ring, count):
    """Wait for the program's block `count`, and return its buffer's number."""
    STAGES: gl.constexpr = ring.buffers.shape[0]
    i = count % STAGES
    mbarrier.wait(ring.full.index(i), (count // STAGES) & 1)
    return i


@gluon.jit
def _release(ring, count):
    """Give the buffer of the program's block `count` back."""
    arrive_at_stage(ring.EMPTY, count % ring.buffers.shape[0], ring.THREADS)


@gluon.jit
def _release_queries(shared, problem, visit, W: gl.constexpr):
    CONSUMERS: gl.constexpr = problem.BLOCK_M // ROWS
    STAGES: gl.constexpr = shared.q.shape[0] // CONSUMERS
    mbarrier.arrive(shared.q_empty.index(visit % STAGES * CONSUMERS + W), count=1)


@gluon.jit
def _skip(ring, count, number):
    """Give `number` blocks from the program's block `count` back, unused."""
    for j in range(number):
        _await_block(ring, count + j)
        _release(ring, count + j)


@gluon.jit
def _take_turn(problem, W: gl.constexpr):
    if problem.TAKES_TURNS:
        meet_at(_TURN + W, 256)


@gluon.jit
def _pass_turn(problem, W: gl.constexpr):
    CONSUMERS: gl.constexpr = problem.BLOCK_M // ROWS
    if problem.TAKES_TURNS:
        arrive_at(_TURN + (W + 1) % CONSUMERS, 256)


@gluon.jit
def _start_product(shared, problem, q, count):
    """Start S of the program's block `count`."""
    zeros = gl.zeros([ROWS, problem.BLOCK_N], gl.float32, accumulator_layout(problem.BLOCK_N))
    k = shared.k.buffers.index(count % shared.k.buffers.shape[0]).permute((1, 0))
    return warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)


@gluon.jit
def _start_scores(shared, problem, q, count, W: gl.constexpr):
    """Start S of the program's block `count`, in this consumer's turn."""
    _await_block(shared.k, count)
    _take_turn(problem, W)
    return _start_product(shared, problem, q, count)


@gluon.jit
def _await_scores(problem, s, PENDING: gl.constexpr):
    s = warpgroup_mma_wait(PENDING, deps=(s,))
    if problem.NEGATE:  # a running maximum needs a scale that is not negative
        s = -s
    return s


@gluon.jit
def _operand(p, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """P as the operand of P V."""
    p = gl.reshape(p.to(DTYPE), [ROWS, p.shape[1] * 8])
    return gl.convert_layout(p, LAYOUT, assert_trivial=True)


@gluon.jit
def _start_output(shared, p, acc, count):
    """Start O + P V of the program's block `count`."""
    i = _await_block(shared.v, count)
    return warpgroup_mma(p, shared.v.buffers.index(i), acc, is_async=True)


@gluon.jit
def _await_output(shared, acc, count):
    acc = warpgroup_mma_wait(0, deps=(acc,))
    _release(shared.v, count)
    return acc


@gluon.jit
def _advance(shared, problem, q, p, acc, count, W: gl.constexpr):
    """In this consumer's turn start S of block `count + 1` and P V of the one before; await S."""
    s = _start_scores(shared, problem, q, count + 1, W)
    acc = _start_output(shared, p, acc, count)
    _pass_turn(problem, W)
    s = _await_scores(problem, s, 1)
    _release(shared.k, count + 1)
    return s, acc


@gluon.jit
def _softmax(s, pivot, problem):
    """Return P, the new pivots in powers of two, and the factors of sums that used the old ones."""
    top = gl.max(s, axis=1) * problem.scale_log2
    if problem.KEEPS_PIVOTS:
        pivot, alpha = raise_pivots(pivot, top)
    else:
        pivot, alpha = follow_scores(pivot, top)
    finite = pivot
    if problem.HAS_LEFT or problem.HAS_RIGHT or problem.IS_RAGGED:
        finite = gl.where(pivot == float("-inf"), 0.0, pivot)
    p = exp2(s * problem.scale_log2 - gl.expand_dims(finite, 1))
    return p, pivot, alpha


@gluon.jit
def _begin(s, problem, tile, row, last):
    """The softmax of a tile's first block, the last one of `last`."""
    s = fold(mask_last(s, problem, tile.sequence, row, (last - 1) * problem.BLOCK_N))
    p, pivot, _ = _softmax(s, no_pivots(s), problem)
    return p, pivot


@gluon.constexpr_function
def _row_layout(columns, FIRST, SECOND):
    """Layout of ROWS rows of results, of which four threads share each.

    From one of a row's threads to the next, and to the one after that, are FIRST and SECOND columns
    of 2, 4, 8 and 16; in an accumulator those are 2 and 4.
    """
    own = [[0, x] for x in (2, 4, 8, 16) if x not in (FIRST, SECOND)]
    following = [[0, 32 << i] for i in range((columns // 32).bit_length() - 1)]
    return DistributedLinearLayout(
        reg_bases=[[0, 1], *own, [8, 0], *following],
        lane_bases=[[0, FIRST], [0, SECOND], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[ROWS.value, columns],
    )


@gluon.jit
def _side_by_side(out):
    """Give each thread 8 columns of a row that lie side by side, by exchange between four of them.

    In one step Triton 3.6 would go by way of shared memory.
    """
    out = gl.convert_layout(out, _row_layout(out.shape[1], 8, 4))
    return gl.convert_layout(out, _row_layout(out.shape[1], 8, 16))


@gluon.jit
def _store_registers(tensors, problem, tile, row, out):
    """Write rows of out straight from registers, 16 bytes of a thread at a time."""
    out = _side_by_side(out)
    LAYOUT: gl.constexpr = out.type.layout
    stride_m = problem.H * problem.HEAD_DIM
    token = gl.cast(tile.b, gl.int64) * problem.M + tile.sequence.start_q + row
    first = token * stride_m + tile.h * problem.HEAD_DIM
    rows = gl.arange(0, out.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    offs_d = gl.arange(0, out.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    mask_m = (row + rows >= 0) & (row + rows < tile.sequence.M)
    mask = gl.expand_dims(mask_m, 1) & gl.expand_dims(offs_d < problem.HEAD_DIM, 0)
    offs = gl.expand_dims(rows * stride_m, 1) + gl.expand_dims(offs_d, 0)
    gl.store(tensors.out_ptr + first + offs, out, mask=mask)


@gluon.jit
def _store(tensors, shared, problem, tile, lse_ptr, acc, pivot, sums, W: gl.constexpr):
    """Normalise a tile's output, and write it and lse."""
    pivot = gl.max(pivot, axis=1)
    l_i = gl.sum(sums, axis=1)
    row = tile.row + W * ROWS
    sequence = tile.sequence
    head = gl.cast(tile.b * problem.H + tile.h, gl.int64) * problem.M + sequence.start_q
    store_lse(lse_ptr + head, pivot + gl.log2(l_i), l_i, row, sequence.M)
    out = scale_rows(acc, gl.where(l_i == 0.0, 0.0, 1.0 / l_i)).to(tensors.q.dtype)
    if problem.STAGES_OUT:
        tma.store_wait(0)  # the last tile has left the buffer
        shared.out.index(W).store(out)
        fence_async_shared()
        if problem.IS_RAGGED:
            store_ragged_rows(
                tensors.out, sequence.start_q, sequence.M, tile.h, row, shared.out.index(W)
            )
        elif row >= 0:  # the copy engine writes from the first row of a tensor on
            store_rows(tensors.out, tile.b, tile.h, row, shared.out.index(W))
    else:
        _store_registers(tensors, problem, tile, row, out)


@gluon.jit
def attend(tensors, shared, problem, lse_ptr, W: gl.constexpr):
    """Compute rows [64 W, 64 W + 64) of each of the program's tiles."""
    CONSUMERS: gl.constexpr = problem.BLOCK_M // ROWS
    Q_STAGES: gl.constexpr = shared.q.shape[0] // CONSUMERS
    BLOCK_D: gl.constexpr = shared.q.shape[2]
    DTYPE: gl.constexpr = tensors.q.dtype
    O_LAYOUT: gl.constexpr = accumulator_layout(BLOCK_D)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, k_width=2)
    if problem.TAKES_TURNS and W == CONSUMERS - 1:
        arrive_at(_TURN, 256)

    visit = 0
    count = 0  # blocks of keys so far
    q = shared.q.index(W)
    mbarrier.wait(shared.q_full.index(W), 0)
    tile = _read_tile(shared, problem, W)
    row = tile.row + W * ROWS
    first, last = seen_blocks(problem, tile, row)
    if problem.SKIPS:
        skipped = tile.last - last
        _skip(shared.k, count, skipped)
        count += skipped
    s = _start_scores(shared, problem, q, count, W)
    _pass_turn(problem, W)
    s = _await_scores(problem, s, 0)
    _release(shared.k, count)
    if problem.SKIPS:
        _skip(shared.v, 0, count)
    p, pivot = _begin(s, problem, tile, row, last)
    sums = gl.sum(p, axis=1)
    p_operand = _operand(p, DTYPE, P_LAYOUT)
    acc = gl.zeros([ROWS, BLOCK_D], gl.float32, O_LAYOUT)
    while tile.last > 0:
        for block in range(last - 2, first - 1, -1):
            s, acc = _advance(shared, problem, q, p_operand, acc, count, W)
            if Q_STAGES == 1:  # noqa: SIM102 - known to the compiler
                if block == first:
                    _release_queries(shared, problem, visit, W)
            s = mask(s, problem, tile.sequence, row, block * problem.BLOCK_N)
            p, pivot, alpha = _softmax(fold(s), pivot, problem)
            sums = sums * alpha + gl.sum(p, axis=1)
            acc = _await_output(shared, acc, count)
            acc = rescale_rows(acc, alpha, problem.KEEPS_PIVOTS)
            p_operand = _operand(p, DTYPE, P_LAYOUT)
            count += 1
        if Q_STAGES > 1 or last - first == 1:
            _release_queries(shared, problem, visit, W)

        # Between two tiles: the last output of this one and the first scores of the next. After the
        # last tile these are of what is left in the buffers, for nobody.
        if not problem.SCORES_FIRST:
            _take_turn(problem, W)
            acc = _start_output(shared, p_operand, acc, count)
        visit += 1
        i = visit % Q_STAGES * CONSUMERS + W
        mbarrier.wait(shared.q_full.index(i), (visit // Q_STAGES) & 1)
        following = _read_tile(shared, problem, i)
        next_row = following.row + W * ROWS
        next_first, next_last = seen_blocks(problem, following, next_row)
        ahead = count + 1
        if problem.SKIPS:
            skipped = first - tile.first + gl.maximum(following.last - next_last, 0)
            _skip(shared.k, ahead, skipped)
            ahead += skipped
        if following.last > 0:
            _await_block(shared.k, ahead)
        q = shared.q.index(i)
        if problem.SCORES_FIRST:
            _take_turn(problem, W)
            s = _start_product(shared, problem, q, ahead)
            acc = _start_output(shared, p_operand, acc, count)
            _pass_turn(problem, W)
            s = _await_scores(problem, s, 1)
        else:
            s = _start_product(shared, problem, q, ahead)
            _pass_turn(problem, W)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            _release(shared.v, count)
            if problem.STORES_FIRST:
                _store(tensors, shared, problem, tile, lse_ptr, acc, pivot, sums, W)
            s = _await_scores(problem, s, 0)
        if following.last > 0:
            _release(shared.k, ahead)
        if problem.SKIPS:
            _skip(shared.v, count + 1, skipped)
        p, next_pivot = _begin(s, problem, following, next_row, next_last)
        if problem.SCORES_FIRST:
            acc = _await_output(shared, acc, count)
        if problem.SCORES_FIRST or not problem.STORES_FIRST:
            _store(tensors, shared, problem, tile, lse_ptr, acc, pivot, sums, W)
        pivot = next_pivot
        sums = gl.sum(p, axis=1)
        acc = gl.zeros([ROWS, BLOCK_D], gl.float32, O_LAYOUT)
        p_operand = _operand(p, DTYPE, P_LAYOUT)
        count = ahead
        tile = following
        row = next_row
        first = next_first
        last = next_last
    tma.store_wait(0)
    if problem.TAKES_TURNS and W == 0:  # the turn that the last consumer passed on
        meet_at(_TURN, 256)
