"""Where programs of the backward kernels work: their tiles, what those meet, and what is hidden.

`problem` is a record of the kernel with the window: HAS_LEFT and HAS_RIGHT, left and right. Records
and `tile_at` are of the kernel for heads of up to 128, which takes ragged sequences, too.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attn_core.tiles.hopper import record

KEYS = gl.constexpr(64)  # of a consumer
BLOCK_N = gl.constexpr(128)  # keys of a program


@record
class Sequence:
    """A ragged sequence; the entries of a batch are alike, and one for all of them."""

    start_q: gl.tensor  # where its queries begin
    start_k: gl.tensor
    M: gl.tensor
    N: gl.tensor
    block_q: gl.tensor  # its first block of padded queries
    block_n: gl.tensor  # and of padded keys


@record
class Tile:
    """The keys of a program, and the query blocks [first, last) of each head that see them."""

    sequence: Sequence
    n: gl.tensor
    b: gl.tensor
    h_kv: gl.tensor
    h: gl.tensor  # the first query head
    part: gl.tensor  # which of PARTS
    first: gl.tensor
    last: gl.tensor


@gluon.jit
def place(number, num_blocks, num_heads, heads_per_group):
    """Return block and head of program `number`.

    Heads alternate within groups, as many as have what they read in the L2 cache.
    """
    tiles_per_group = num_blocks * heads_per_group
    group = number // tiles_per_group
    width = gl.minimum(heads_per_group, num_heads - group * heads_per_group)
    rest = number % tiles_per_group
    return rest // width, group * heads_per_group + rest % width


@gluon.jit
def queries_that_see(problem, M, N, n, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Return the blocks [first, last) of M queries that see block n of N keys."""
    shift = M - N  # key j is at the position of query j + shift
    first = gl.to_tensor(0)
    last = gl.cdiv(M, BLOCK_M)
    if problem.HAS_RIGHT:
        first_row = gl.maximum(n * BLOCK_N + shift - problem.right, 0)
        first = gl.minimum(first_row // BLOCK_M, last)
    if problem.HAS_LEFT:
        end_row = gl.minimum((n + 1) * BLOCK_N, N) + shift + problem.left
        last = gl.minimum(gl.cdiv(gl.maximum(end_row, 0), BLOCK_M), last)
        last = gl.maximum(last, first)
    return first, last


@gluon.jit
def mask(scores, problem, count, ahead):
    """Hide what the window hides of scores [keys, queries], and keys from `count` on.

    The first key is at the position of the query `ahead` rows after the first.
    """
    ROWS: gl.constexpr = scores.shape[1]
    LAYOUT: gl.constexpr = scores.type.layout
    keys = gl.expand_dims(gl.arange(0, KEYS, layout=gl.SliceLayout(1, LAYOUT)), 1)
    rows = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(0, LAYOUT)), 0)
    # Bits 1 and 2 of a column come from the lane. On the other side of the comparison they leave an
    # immediate on this one; otherwise every column's number takes a register through the loop.
    fixed = rows & (ROWS - 7)
    ahead = keys - (rows & 6) + ahead
    if problem.HAS_LEFT:
        scores = gl.where(fixed <= ahead + problem.left, scores, float("-inf"))
    if problem.HAS_RIGHT:
        # A sum, as of a choice the compiler makes two selections for every number.
        first = ahead - problem.right + gl.where(keys < count, 0, 1 << 30)
        return gl.where(fixed >= first, scores, float("-inf"))
    else:  # noqa: RET505 - decided while compiling
        return gl.where(keys < count, scores, float("-inf"))


@gluon.jit
def crosses_edge(problem, count, ahead, ROWS: gl.constexpr):
    """Whether `mask` hides any of KEYS keys from any of ROWS queries."""
    crosses = count < KEYS
    if problem.HAS_RIGHT:
        crosses = crosses | (ahead + KEYS - 1 > problem.right)
    if problem.HAS_LEFT:
        crosses = crosses | (ahead + problem.left < ROWS - 1)
    return crosses


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
        return Sequence(
            start_q, start_k,
            gl.load(problem.starts_q_ptr + i + 1) - start_q,
            gl.load(problem.starts_k_ptr + i + 1) - start_k,
            (start_q // BLOCK_N + i) * (BLOCK_N // BLOCK_M),
            start_k // BLOCK_N + i,
        )  # fmt: skip
    else:  # noqa: RET505 - decided while compiling
        zero = gl.to_tensor(0)
        return Sequence(zero, zero, problem.M, problem.N, zero, zero)


@gluon.jit
def tile_at(problem, number, BLOCK_M: gl.constexpr):
    """Return tile `number`.

    Heads alternate, within groups whose queries the L2 cache holds. Where tiles differ in length
    the longest come first, and where the sum of dq has an order the last keys do, but for programs
    in lockstep.
    """
    n, head = place(number, problem.blocks_n, problem.num_heads, problem.heads_per_group)
    if problem.DETERMINISTIC and not problem.IS_LOCKSTEP:
        n = problem.blocks_n - 1 - n
    sequence = _sequence(problem, n, BLOCK_M)
    n -= sequence.block_n
    first, last = queries_that_see(problem, sequence.M, sequence.N, n, BLOCK_M, BLOCK_N)
    if problem.IS_RAGGED:
        last = gl.where(n * BLOCK_N < sequence.N, last, first)
    groups = problem.H // problem.group
    g = head % groups
    return Tile(
        sequence, n, head // groups, g // problem.PARTS, g * problem.group, g % problem.PARTS,
        first, last,
    )  # fmt: skip


@gluon.jit
def first_step(problem, tile):
    """Return query block and head of a tile's first step."""
    if problem.IS_LOCKSTEP:
        return tile.last - 1, tile.h
    else:  # noqa: RET505 - decided while compiling
        return tile.first, tile.h


@gluon.jit
def next_step(problem, tile, m, h):
    """Return query block and head of the step that follows the one of m and h.

    Head follows head. In lockstep block follows block, from the last one on, each for all heads.
    """
    if problem.IS_LOCKSTEP:
        h += 1
        if h == tile.h + problem.group:
            h = tile.h
            m -= 1
    else:
        m += 1
        if m == tile.last:
            m = tile.first
            h += 1
    return m, h
