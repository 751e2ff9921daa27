"""Hypothesis strategies for attention problems. Importing this needs hypothesis."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import strategies as st

_PRIMES = (2, 3, 7, 31, 61, 127)


class AttentionShape(NamedTuple):
    """Sizes of one attention problem; `heads` is a multiple of `heads_kv`."""

    batch: int
    len_q: int
    len_k: int
    heads: int
    heads_kv: int
    head_dim: int

    @property
    def id(self) -> str:
        """The shape as test ids spell it: ``b1-h4-hkv2-m63-n129-d64``."""
        batch, len_q, len_k, heads, heads_kv, head_dim = self
        return f"b{batch}-h{heads}-hkv{heads_kv}-m{len_q}-n{len_k}-d{head_dim}"


def lengths(
    tile: int = 64, largest: int = 130, *, allow_empty: bool = True
) -> st.SearchStrategy[int]:
    """Sequence lengths where kernels break: 0, 1, around multiples of the tile, primes.

    Parameters
    ----------
    tile : int, default 64
        Tile size of the kernel under test.
    largest : int, default 130
        No length is longer.
    allow_empty : bool, default True
        Whether 0 is among them.

    Returns
    -------
    SearchStrategy of int
        Shrinks towards the shortest.
    """
    smallest = 0 if allow_empty else 1
    around = (tile - 1, tile, tile + 1, 2 * tile, 2 * tile + 1)
    telling = sorted(n for n in (0, 1, *_PRIMES, *around) if smallest <= n <= largest)
    return st.one_of(st.sampled_from(telling), st.integers(smallest, largest))


def attention_shapes(
    tile: int = 64,
    largest: int = 130,
    *,
    allow_empty: bool = True,
    head_dims: tuple[int, ...] = (1, 8, 16, 32, 40, 64),
) -> st.SearchStrategy[AttentionShape]:
    """Whole problems: few heads, grouped or not, lengths as in `lengths`.

    Parameters
    ----------
    tile, largest, allow_empty
        As in `lengths`, for queries and keys.
    head_dims : tuple of int
        Head dimensions to draw from.

    Returns
    -------
    SearchStrategy of AttentionShape
        Small enough for a float64 reference on the CPU.
    """
    length = lengths(tile, largest, allow_empty=allow_empty)
    return st.builds(
        lambda batch, len_q, len_k, heads_kv, group, head_dim: AttentionShape(
            batch, len_q, len_k, heads_kv * group, heads_kv, head_dim
        ),
        st.integers(1, 2),
        length,
        length,
        st.integers(1, 3),
        st.integers(1, 4),
        st.sampled_from(head_dims),
    )


def orders(rank: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Orders of dimensions in memory for `attn_core.testing.embedded`; the last stays innermost.

    Parameters
    ----------
    rank : int
        Number of dimensions.

    Returns
    -------
    SearchStrategy of tuple of int
        Permutations of ``range(rank)`` that end in ``rank - 1``.
    """
    return st.permutations(range(rank - 1)).map(lambda order: (*order, rank - 1))


def windows(largest: int = 130) -> st.SearchStrategy[tuple[int, int]]:
    """Windows (left, right) of visible keys, -1 for an open side; causal ones among them.

    Parameters
    ----------
    largest : int, default 130
        No side reaches further.

    Returns
    -------
    SearchStrategy of tuple of int
        Shrinks towards the open window.
    """
    side = st.one_of(st.just(-1), st.integers(0, largest))
    return st.one_of(st.sampled_from([(-1, -1), (-1, 0)]), st.tuples(side, side))
