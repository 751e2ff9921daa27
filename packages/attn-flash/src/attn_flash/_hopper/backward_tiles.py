"""Where programs of the backward kernels work: their tiles, what those meet, and what is hidden.

`problem` is a record of the kernel with the window: HAS_LEFT and HAS_RIGHT, left and right.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

KEYS = gl.constexpr(64)  # of a consumer


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
