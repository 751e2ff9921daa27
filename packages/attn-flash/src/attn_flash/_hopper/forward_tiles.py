"""Where programs of the forward kernel work: their tiles, in which order, and the keys those see.

Tiles of queries are numbered through all heads and sequences. `problem` is the kernel's record of
sizes, window and what is known while compiling.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attn_core.tiles.hopper import record
from attn_flash._hopper.softmax import ROWS

TILE_WORDS = gl.constexpr(6)  # numbers that say what a tile is


@record
class Sequence:
    """A ragged sequence. The entries of a batch are alike, and one for all of them."""

    number: gl.tensor
    start_q: gl.tensor  # where its queries begin
    start_k: gl.tensor
    M: gl.tensor
    N: gl.tensor
    num_tiles: gl.tensor  # of a head


@record
class Tile:
    """Queries of one head, and the key blocks [first, last) that they see.

    A tile without blocks follows a program's last one.
    """

    sequence: Sequence
    row: gl.tensor  # the first query
    b: gl.tensor
    h: gl.tensor
    first: gl.tensor
    last: gl.tensor


@gluon.jit
def sequence_at(problem, number):
    """Return sequence `number`; after the last come the tokens of none, which see no keys."""
    if problem.IS_RAGGED:
        following = gl.minimum(number + 1, problem.B)
        start_q = gl.load(problem.starts_q_ptr + number)
        start_k = gl.load(problem.starts_k_ptr + number)
        M = gl.load(problem.starts_q_ptr + following) - start_q
        N = gl.load(problem.starts_k_ptr + following) - start_k
        if problem.HAS_USED:
            N = gl.load(problem.used_ptr + number, mask=number < problem.B, other=0)
        M = gl.where(number < problem.B, M, problem.M - start_q)
        return Sequence(number, start_q, start_k, M, N, gl.cdiv(M, problem.BLOCK_M))
    else:  # noqa: RET505 - decided while compiling
        zero = gl.to_tensor(0)
        return Sequence(zero, zero, zero, problem.M, problem.N, problem.num_tiles)


@gluon.jit
def find(problem, sequence, first, number):
    """Find the sequence of tile `number`, from one whose tiles begin with number `first`.

    Return it, its first tile's number, and that of the tile after its last one.
    """
    stop = first + sequence.num_tiles * problem.num_heads
    if problem.IS_RAGGED:
        while (number >= stop) & (sequence.number < problem.B):
            first = stop
            sequence = sequence_at(problem, sequence.number + 1)
            stop = first + sequence.num_tiles * problem.num_heads
    return sequence, first, stop


@gluon.jit
def _place(problem, num_tiles, rank):
    """Return head and number in the head of tile `rank`.

    Where tiles differ in length the longest come first, within groups of heads.
    """
    if problem.HAS_RIGHT:
        tiles_per_group = num_tiles * problem.heads_per_group
        group = rank // tiles_per_group
        first_head = group * problem.heads_per_group
        heads = gl.maximum(problem.num_heads - first_head, 1)  # past the last tile there are none
        width = gl.minimum(problem.heads_per_group, heads)
        place = rank - group * tiles_per_group
        head = first_head + place % width
        m = num_tiles - 1 - place // width
    else:
        head = rank // num_tiles
        m = rank - head * num_tiles
    return head, m


@gluon.jit
def tile_at(problem, sequence, rank):
    """Return the sequence's tile `rank`."""
    num_tiles = gl.maximum(sequence.num_tiles, 1)
    head, m = _place(problem, num_tiles, rank)
    first = gl.to_tensor(0)
    last = gl.cdiv(sequence.N, problem.BLOCK_N)
    if problem.IS_RAGGED:
        last = gl.maximum(last, 1)  # a block of hidden keys where there are none
        is_past = rank >= sequence.num_tiles * problem.num_heads
        m = gl.where(is_past, num_tiles, m)  # a program without a tile computes no rows
    row = m * problem.BLOCK_M
    if problem.HAS_RIGHT and not problem.IS_RAGGED:
        # Consumers without queries belong to the tile that sees the fewest keys.
        row -= (num_tiles * problem.BLOCK_M - sequence.M) // ROWS * ROWS
    start = row + sequence.N - sequence.M  # position of the first query
    if problem.HAS_RIGHT:
        end_key = gl.maximum(start + problem.BLOCK_M + problem.right, 1)
        last = gl.minimum(last, gl.cdiv(end_key, problem.BLOCK_N))
    if problem.HAS_LEFT:
        first_key = gl.maximum(start - problem.left, 0)
        first = gl.minimum(first_key // problem.BLOCK_N, last - 1)
    b = head // problem.H
    return Tile(sequence, row, b, head - b * problem.H, first, last)


@gluon.jit
def next_number(problem, number):
    """Return the number of the program's next tile; past the last one there is none."""
    if problem.DYNAMIC:
        number = gl.atomic_add(problem.next_ptr, 1, sem="relaxed")
    return number + gl.num_programs(0)


@gluon.jit
def reset_counter(problem, number, stop):
    """Leave the counter as it was, in the last of all programs.

    Each of them takes numbers until there is no tile left, those without a first tile too.
    """
    if problem.DYNAMIC:
        programs = gl.num_programs(0)
        if number == gl.maximum(stop, programs) + programs - 1:
            gl.store(problem.next_ptr, 0)


@gluon.jit
def seen_blocks(problem, tile, row):
    """Return the key blocks [first, last) that ROWS queries of a tile from `row` see.

    Without SKIPS, those of the tile.
    """
    first = tile.first
    last = tile.last
    if problem.SKIPS:
        position = row + tile.sequence.N - tile.sequence.M
        if problem.HAS_RIGHT:
            end_key = gl.maximum(position + ROWS + problem.right, 1)
            last = gl.maximum(gl.minimum(last, gl.cdiv(end_key, problem.BLOCK_N)), first + 1)
        if problem.HAS_LEFT:
            first_key = gl.maximum(position - problem.left, 0)
            first = gl.minimum(gl.maximum(first, first_key // problem.BLOCK_N), last - 1)
    return first, last


@gluon.jit
def _hide(s, problem, sequence, row, key, LEFT: gl.constexpr, RIGHT: gl.constexpr,
          END: gl.constexpr):  # fmt: skip
    """Hide what edges of the window and the end of the keys hide of scores from (row, key)."""
    LAYOUT: gl.constexpr = s.type.layout
    rows = gl.expand_dims(gl.arange(0, s.shape[0], layout=gl.SliceLayout(1, LAYOUT)), 1)
    keys = gl.expand_dims(gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, LAYOUT)), 0)
    # Bits 1 and 2 of a column come from the lane. On the other side of the comparison they leave an
    # immediate on this one; otherwise every column's number takes a register through the loop.
    fixed = keys & (s.shape[1] - 7)
    lane = keys & 6
    ahead = rows - lane + (row + sequence.N - sequence.M - key)
    if RIGHT:
        s = gl.where(fixed <= ahead + problem.right, s, float("-inf"))
    if LEFT:
        s = gl.where(fixed >= ahead - problem.left, s, float("-inf"))
    if END:
        s = gl.where(fixed < sequence.N - key - lane, s, float("-inf"))
    return s


@gluon.jit
def _hide_left(s, problem, sequence, row, key):
    if problem.HAS_LEFT:  # noqa: SIM102 - known to the compiler
        if key < row + sequence.N - sequence.M + ROWS - 1 - problem.left:
            s = _hide(s, problem, sequence, row, key, True, False, False)
    return s


@gluon.jit
def mask_last(s, problem, sequence, row, key):
    """Hide what the window and the end of the keys hide of ROWS queries' last block of keys."""
    if problem.HAS_RIGHT or not problem.EVEN_N:
        s = _hide(s, problem, sequence, row, key, False, problem.HAS_RIGHT, not problem.EVEN_N)
    return _hide_left(s, problem, sequence, row, key)


@gluon.jit
def mask(s, problem, sequence, row, key):
    """Hide what the window hides of a block of keys before the last one."""
    if problem.HAS_RIGHT:  # noqa: SIM102 - known to the compiler
        if key + problem.BLOCK_N - 1 > row + sequence.N - sequence.M + problem.right:
            s = _hide(s, problem, sequence, row, key, False, True, False)
    return _hide_left(s, problem, sequence, row, key)
