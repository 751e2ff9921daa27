"""The consumers of the backward kernel: two warpgroups of 64 keys each."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_core.tiles.gluon_names import thread_barrier
from attn_core.tiles.hopper import accumulator_layout, arrive_at, exp2, meet_at
from attn_flash._hopper.backward_sums import to_unit
from attn_flash._hopper.backward_tiles import (
    BLOCK_N,
    KEYS,
    crosses_edge,
    first_step,
    mask,
    next_step,
    tile_at,
)
from attn_flash._hopper.primitives import columns, keep_branch, load_row, wait_until_set

# Named barriers and the threads that meet there; barriers below 8 are the compiler's.
_KEYS_READ = gl.constexpr(8)  # of a program with one tile
KEYS_WRITTEN = gl.constexpr(8)  # of one with many
DQ_EMPTY = gl.constexpr(9)  # 10 for the second consumer
DQ_FULL = gl.constexpr(11)  # 12 for the second consumer
_TURN = gl.constexpr(13)  # 14 for the second consumer
KEYS_DONE = gl.constexpr(15)
_CONSUMERS = gl.constexpr(256)
CONSUMERS_AND_LOADER = gl.constexpr(288)
CONSUMER_AND_ADDER = gl.constexpr(160)


@gluon.jit
def _start_dq(shared, step, keys, W: gl.constexpr):
    """Start this consumer's half of dS K: its columns of 64 queries, or its 64 of 128 queries."""
    BLOCK_M: gl.constexpr = shared.ds.shape[2]
    BLOCK_D: gl.constexpr = shared.k.shape[2]
    STAGES: gl.constexpr = shared.q.shape[0]
    dq = gl.zeros([64, 64], gl.float32, accumulator_layout(64))
    for w in gl.static_range(2):
        ds = shared.ds.index(step % STAGES * 2 + w)
        if BLOCK_M == 64:
            k = columns(shared.k.index(keys * 2 + w), W, KEYS, BLOCK_D)
        else:
            ds = columns(ds, W, KEYS, BLOCK_M)
            k = shared.k.index(keys * 2 + w)
        dq = warpgroup_mma(ds.permute((1, 0)), k, dq, use_acc=w > 0, is_async=True)
    return dq


@gluon.jit
def _widen(p):
    """Convert probabilities to float32, those of bfloat16 two at a time."""
    if p.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r", [p], dtype=gl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:  # noqa: RET505 - decided while compiling
        return p.to(gl.float32)


@gluon.jit
def _hand_over(shared, dq, W: gl.constexpr):
    """Let the adder add this consumer's half of dQ."""
    meet_at(DQ_EMPTY + W, CONSUMER_AND_ADDER)
    shared.dq.index(W).store(to_unit(dq))
    fence_async_shared()
    arrive_at(DQ_FULL + W, CONSUMER_AND_ADDER)


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
        thread_barrier()
        gl.atomic_add(problem.are_left_ptr + number, 1, sem="release")
    return dk, dv


@gluon.jit
def staged_keys(shared, problem, step, W: gl.constexpr):
    """Where consumer W leaves dK and dV for the loader, when the next step is number `step`.

    Between tiles that is where the next step's dS will be.
    """
    BLOCK_M: gl.constexpr = shared.ds.shape[2]
    STAGES: gl.constexpr = shared.q.shape[0]
    if problem.IS_PERSISTENT:
        staged = shared.ds.index(step % STAGES * 2 + W)
        return columns(staged, 0, KEYS, BLOCK_M), columns(staged, 1, KEYS, BLOCK_M)
    else:  # noqa: RET505 - decided while compiling
        return shared.k.index(W), shared.v.index(W)


@gluon.jit
def _stage_keys(shared, problem, dk, dv, step, W: gl.constexpr):
    """Leave dK and dV for the loader."""
    DTYPE: gl.constexpr = shared.k.dtype
    staged_dk, staged_dv = staged_keys(shared, problem, step, W)
    staged_dv.store(dv.to(DTYPE))
    if not problem.IS_PERSISTENT:
        meet_at(_KEYS_READ, _CONSUMERS)  # by the other consumer's last dQ
    staged_dk.store((dk * problem.scale).to(DTYPE))
    fence_async_shared()
    arrive_at(KEYS_DONE, CONSUMERS_AND_LOADER)


@gluon.jit
def _start_dp(shared, v, do, W: gl.constexpr):
    """Start V dO^T; of wide heads `v` is the first half of the columns, in registers."""
    BLOCK_M: gl.constexpr = do.shape[0]
    BLOCK_D: gl.constexpr = do.shape[1]
    zeros = gl.zeros([KEYS, BLOCK_M], gl.float32, accumulator_layout(BLOCK_M))
    first = columns(do, 0, BLOCK_M, BLOCK_D)
    dp = warpgroup_mma(v, first.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if BLOCK_D == 128:
        v = columns(shared.v.index(W), 1, KEYS, BLOCK_D)
        second = columns(do, 1, BLOCK_M, BLOCK_D)
        dp = warpgroup_mma(v, second.permute((1, 0)), dp, is_async=True)
    return dp


@gluon.jit
def _exponentiate(shared, problem, s, dp, i, count, ahead):
    """Wait for S and dP of the step in stage i and return P and dS, for products to come."""
    BLOCK_M: gl.constexpr = shared.q.shape[1]
    BLOCK_D: gl.constexpr = shared.q.shape[2]
    DTYPE: gl.constexpr = shared.q.dtype
    ROW: gl.constexpr = gl.SliceLayout(0, accumulator_layout(BLOCK_M))
    lse_log2 = load_row(shared.lse.index(i), BLOCK_M, ROW)
    s = warpgroup_mma_wait(BLOCK_D // 64, deps=(s,))  # not for those of dP
    if crosses_edge(problem, count, ahead, BLOCK_M):
        keep_branch()
        s = mask(s, problem, count, ahead)
    p = exp2(s * problem.scale_log2 - gl.expand_dims(lse_log2, 0))
    rounded_p = p.to(DTYPE)
    if problem.IS_PERSISTENT or BLOCK_D == 128:
        p = rounded_p  # from here on: registers do not suffice for both
    dp = warpgroup_mma_wait(0, deps=(dp,))
    # Not before the wait, where scores and lse still fill the registers.
    delta = load_row(shared.delta.index(i), BLOCK_M, ROW)
    ds = _widen(p) * (dp - gl.expand_dims(delta, 0))
    return rounded_p, ds.to(DTYPE)


@gluon.jit
def _end_turns(shared, steps, keys, W: gl.constexpr):
    """Pass the last turn; the first consumer computes the last dQ, after `steps` steps."""
    BLOCK_D: gl.constexpr = shared.q.shape[2]
    if BLOCK_D == 64:  # whose turns go on until the next scores
        arrive_at(_TURN + 1 - W, _CONSUMERS)
    if W == 0:
        meet_at(_TURN, _CONSUMERS)
        dq = _start_dq(shared, steps - 1, keys, W)
        _hand_over(shared, warpgroup_mma_wait(0, deps=(dq,)), W)


@gluon.jit
def _accumulate_tile(shared, problem, tile, W: gl.constexpr):
    """Compute dK and dV of consumer W's keys of the program's tile, and its half of each step's dQ.

    A turn is the products of P and dS, for narrow heads also the next scores. When the second
    consumer's comes, both have stored the dS of the step; when the first one's comes, that of the
    step before, whose dQ it computes.
    """
    BLOCK_M: gl.constexpr = shared.q.shape[1]
    BLOCK_D: gl.constexpr = shared.q.shape[2]
    S_LAYOUT: gl.constexpr = accumulator_layout(BLOCK_M)
    DK_LAYOUT: gl.constexpr = accumulator_layout(BLOCK_D)
    V_OPERAND: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, k_width=2)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, DK_LAYOUT, k_width=2)
    STAGES: gl.constexpr = shared.q.shape[0]
    IS_BEHIND: gl.constexpr = W == 0  # with dQ
    KEEPS_TURN: gl.constexpr = BLOCK_D == 64  # for the next scores
    count = tile.sequence.N - tile.n * BLOCK_N - W * KEYS
    row = tile.sequence.M - count  # of the query at the first key's position
    zeros = gl.zeros([KEYS, BLOCK_M], gl.float32, S_LAYOUT)
    dk = gl.zeros([KEYS, BLOCK_D], gl.float32, DK_LAYOUT)
    dv = gl.zeros([KEYS, BLOCK_D], gl.float32, DK_LAYOUT)
    m, h = first_step(problem, tile)
    steps = (tile.last - tile.first) * problem.group
    mbarrier.wait(shared.k_full.index(0), 0)
    if steps > 0:
        mbarrier.wait(shared.v_full.index(0), 0)
        if W == 1 and KEEPS_TURN:
            meet_at(_TURN + 1, _CONSUMERS)
        elif W == 1:
            arrive_at(_TURN, _CONSUMERS)  # the first turn is the first consumer's
    v = shared.v.index(W)
    if BLOCK_D == 128:
        # A half in registers: shared memory has fewer bytes to read for the same product.
        v = columns(v, 0, KEYS, BLOCK_D).load(V_OPERAND)
    for step in range(steps):
        i = step % STAGES
        phase = (step // STAGES) & 1
        q = shared.q.index(i)
        do = shared.do.index(i)
        mbarrier.wait(shared.q_full.index(i), phase)
        s = warpgroup_mma(shared.k.index(W), q.permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(shared.do_full.index(i), phase)
        dp = _start_dp(shared, v, do, W)
        if KEEPS_TURN:
            arrive_at(_TURN + 1 - W, _CONSUMERS)
        p, ds = _exponentiate(shared, problem, s, dp, i, count, row - m * BLOCK_M)
        p_operand = gl.convert_layout(p, OPERAND, assert_trivial=True)
        ds_operand = gl.convert_layout(ds, OPERAND, assert_trivial=True)
        shared.ds.index(i * 2 + W).store(ds)
        fence_async_shared()
        meet_at(_TURN + W, _CONSUMERS)
        dv = warpgroup_mma(p_operand, do, dv, is_async=True)
        dq = _start_dq(shared, step + 1 if IS_BEHIND else step, 0, W)
        dk = warpgroup_mma(ds_operand, q, dk, is_async=True)
        dv, dq = warpgroup_mma_wait(1, deps=(dv, dq))
        if not KEEPS_TURN:
            arrive_at(_TURN + 1 - W, _CONSUMERS)
        if not IS_BEHIND or step > 0:
            _hand_over(shared, dq, W)
        dk = warpgroup_mma_wait(0, deps=(dk,))
        mbarrier.arrive(shared.empty.index(i), count=1)
        m, h = next_step(problem, tile, m, h)
    if steps > 0:
        _end_turns(shared, steps, 0, W)
    if problem.PARTS == 2:
        dk, dv = _add_other_part(problem, tile, dk, dv, W)
    if tile.part == problem.PARTS - 1:
        _stage_keys(shared, problem, dk, dv, steps, W)


@gluon.jit
def _read(buffer):
    """Read a number that the loader wrote."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(buffer.load(LAYOUT), axis=0)


@gluon.jit
def _accumulate_tiles(shared, problem, W: gl.constexpr):
    """Compute dK and dV of consumer W's keys of tile after tile, and its half of each step's dQ.

    Steps of a tile follow those of the one before without a gap: the loader says beside the queries
    where they are. A tile's dK and dV leave while the first scores of the next one are computed.
    """
    BLOCK_M: gl.constexpr = shared.q.shape[1]
    BLOCK_D: gl.constexpr = shared.q.shape[2]
    S_LAYOUT: gl.constexpr = accumulator_layout(BLOCK_M)
    DK_LAYOUT: gl.constexpr = accumulator_layout(BLOCK_D)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, DK_LAYOUT, k_width=2)
    STAGES: gl.constexpr = shared.q.shape[0]
    IS_BEHIND: gl.constexpr = W == 0  # with dQ
    zeros = gl.zeros([KEYS, BLOCK_M], gl.float32, S_LAYOUT)
    dk = gl.zeros([KEYS, BLOCK_D], gl.float32, DK_LAYOUT)
    dv = gl.zeros([KEYS, BLOCK_D], gl.float32, DK_LAYOUT)
    step = 0
    rank = -1  # of the tile
    mbarrier.wait(shared.q_full.index(0), 0)
    begins = _read(shared.begins.index(0))
    if W == 1:  # noqa: SIM102 - known to the compiler
        if begins >= 0:
            meet_at(_TURN + 1, _CONSUMERS)
    while begins >= 0:
        i = step % STAGES
        q = shared.q.index(i)
        do = shared.do.index(i)
        keys_before = rank & 1
        rank += begins
        keys = rank & 1
        if begins > 0:
            mbarrier.wait(shared.k_full.index(keys), (rank // 2) & 1)
        s = warpgroup_mma(
            shared.k.index(keys * 2 + W), q.permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        if begins > 0:
            mbarrier.wait(shared.v_full.index(keys), (rank // 2) & 1)
        mbarrier.wait(shared.do_full.index(i), (step // STAGES) & 1)
        dp = warpgroup_mma(
            shared.v.index(keys * 2 + W), do.permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        arrive_at(_TURN + 1 - W, _CONSUMERS)
        follows = (begins > 0) & (step > 0)  # another tile
        if follows:
            if not IS_BEHIND:
                mbarrier.arrive(shared.keys_empty.index(keys_before), count=1)
            # They are complete. The compiler, which does not know, would wait for the scores too.
            done_dk, done_dv = warpgroup_mma_wait(2, deps=(dk, dv))
            _stage_keys(shared, problem, done_dk, done_dv, step, W)
        count = _read(shared.count.index(i)) - W * KEYS
        ahead = _read(shared.ahead.index(i)) + W * KEYS
        p, ds = _exponentiate(shared, problem, s, dp, i, count, ahead)
        p_operand = gl.convert_layout(p, OPERAND, assert_trivial=True)
        ds_operand = gl.convert_layout(ds, OPERAND, assert_trivial=True)
        if follows:
            meet_at(KEYS_WRITTEN, CONSUMERS_AND_LOADER)
        shared.ds.index(i * 2 + W).store(ds)
        fence_async_shared()
        meet_at(_TURN + W, _CONSUMERS)
        dv = warpgroup_mma(p_operand, do, dv, use_acc=begins == 0, is_async=True)
        if IS_BEHIND:
            dq = _start_dq(shared, step + 1, keys_before, W)
        else:
            dq = _start_dq(shared, step, keys, W)
        dk = warpgroup_mma(ds_operand, q, dk, use_acc=begins == 0, is_async=True)
        dv, dq = warpgroup_mma_wait(1, deps=(dv, dq))
        if not IS_BEHIND or step > 0:
            _hand_over(shared, dq, W)
        if IS_BEHIND and follows:
            mbarrier.arrive(shared.keys_empty.index(keys_before), count=1)
        dk = warpgroup_mma_wait(0, deps=(dk,))
        mbarrier.arrive(shared.empty.index(i), count=1)
        step += 1
        i = step % STAGES
        mbarrier.wait(shared.q_full.index(i), (step // STAGES) & 1)
        begins = _read(shared.begins.index(i))
    if step > 0:
        _end_turns(shared, step, rank & 1, W)
        mbarrier.arrive(shared.keys_empty.index(rank & 1), count=1)
        _stage_keys(shared, problem, dk, dv, step, W)


@gluon.jit
def accumulate(shared, problem, ticket, W: gl.constexpr):
    """Compute dK and dV of consumer W's keys, and its half of dQ."""
    if problem.IS_PERSISTENT:
        _accumulate_tiles(shared, problem, W)
    else:
        _accumulate_tile(shared, problem, tile_at(problem, ticket, shared.q.shape[1]), W)
