"""A mask of bool as the forward kernel reads it: in place, by the loading warp.

That warp finds out which blocks of keys a tile needs, and leaves what the mask adds to the scores
of a block beside its keys: the computing warpgroups know no address of it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attn_triangle._hopper.tiles import ABSENT, HIDDEN

_CHUNK = gl.constexpr(256)  # words of a row that the warp looks at together


@gluon.jit
def _has_zero(x):
    """Whether a byte of x is zero; x is one byte or four."""
    if x.dtype == gl.int32:
        found = (x - 0x01010101) & ~x & -0x7F7F7F80
    else:
        found = (x == 0).to(gl.int32)
    return found != 0


@gluon.jit
def seen_blocks(
    words_ptr, strides, b, row0, last, N,
    IS_ZERO: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """The blocks of keys that any row of a group sees: all, for the mean of a row without keys.

    The mask is read in words of one key, or of four keys that are neighbours in memory.
    """
    stride_b, stride_r, stride_n = strides
    IS_BYTES: gl.constexpr = words_ptr.dtype.element_ty != gl.int32
    KEYS: gl.constexpr = 1 if IS_BYTES else 4
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    offs = gl.arange(0, _CHUNK, layout=LAYOUT)
    ptrs = ()
    bounds = ()
    for x in gl.static_range(ROWS):
        row = gl.to_tensor(gl.minimum(row0 + x, last)).to(gl.int64) * stride_r
        ptrs += (words_ptr + (row + gl.to_tensor(b).to(gl.int64) * stride_b),)
        bounds += (N, gl.to_tensor(0))
    for start in range(0, gl.cdiv(N, KEYS), _CHUNK):
        word = start + offs
        key = word * KEYS
        words = ()
        for x in gl.static_range(ROWS):
            own = ptrs[x] + (word.to(gl.int64) * stride_n if IS_BYTES else word)
            words += (gl.load(own, mask=key < N, other=1),)
        narrower = ()
        for x in gl.static_range(ROWS):
            sees = (key < N) & _has_zero(words[x])
            first = gl.min(gl.where(sees, key, N), axis=0)
            end = gl.max(gl.where(sees, key + KEYS, 0), axis=0)
            narrower += (gl.minimum(bounds[2 * x], first), gl.maximum(bounds[2 * x + 1], end))
        bounds = narrower
    lo = N
    hi = 0
    for x in gl.static_range(ROWS):
        is_all = (bounds[2 * x + 1] == 0) & (not IS_ZERO)
        lo = gl.minimum(lo, gl.where(is_all, 0, bounds[2 * x]))
        hi = gl.maximum(hi, gl.where(is_all, N, bounds[2 * x + 1]))
    lo = lo // BLOCK_N
    return lo, gl.maximum(gl.cdiv(hi, BLOCK_N), lo)


@gluon.jit
def store_pair(x, y, buf):
    """Leave two integers to the computing warpgroups."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    buf.store(gl.where(gl.arange(0, 2, layout=LAYOUT) == 0, x, y))


@gluon.jit
def load_pair(buf):
    """Read what `store_pair` has left."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    pair = buf.load(LAYOUT)
    is_first = gl.arange(0, 2, layout=LAYOUT) == 0
    return gl.sum(gl.where(is_first, pair, 0), axis=0), gl.sum(gl.where(is_first, 0, pair), axis=0)


@gluon.jit
def _keys(start_n, BLOCK_N: gl.constexpr):
    """The keys of a block, as the loading warp has them."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, BLOCK_N // 32], [1, 32], [1, 1], [1, 0])
    return start_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))


@gluon.jit
def load_hidden(
    mask_ptr, strides, b, row0, last, start_n, N,
    HAS_MASK: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """The mask of a block of keys in each row, every one [BLOCK_N]; nothing is waited for."""
    stride_b, stride_r, stride_n = strides
    key = _keys(start_n, BLOCK_N)
    hidden = ()
    for x in gl.static_range(ROWS):
        if HAS_MASK:
            row = gl.to_tensor(gl.minimum(row0 + x, last)).to(gl.int64) * stride_r
            row += gl.to_tensor(b).to(gl.int64) * stride_b
            ptrs = mask_ptr + row + key.to(gl.int64) * stride_n
            hidden += (gl.load(ptrs, mask=key < N, other=0),)
        else:
            hidden += (key * 0,)
    return hidden


@gluon.jit
def store_shut(hidden, start_n, N, buf, BLOCK_N: gl.constexpr):
    """Leave what is added to the scores of a block of keys of one row in a [1, BLOCK_N] buffer."""
    shut = gl.where(hidden != 0, HIDDEN, 0.0)
    shut = gl.where(_keys(start_n, BLOCK_N) < N, shut, ABSENT)
    buf.store(gl.expand_dims(shut, 0))
