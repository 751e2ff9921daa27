"""Which block holds which tokens: the bookkeeping of a paged cache, without its tensors."""

from __future__ import annotations

import operator
import threading
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from attn_core.checks import flag
from attn_paged._pool import ROOT, Pool, PrefixIndex

Moves = list[tuple[int, int]]


@dataclass
class _Sequence:
    """One sequence; `tokens` is None where its tokens are not known and cannot be matched."""

    blocks: list[int] = field(default_factory=list)
    length: int = 0
    written: int = 0
    tokens: list[int] | None = None
    prefix: int = ROOT  # of the blocks entered into the prefix index so far
    num_indexed: int = 0
    is_swapped: bool = False
    revision: int = 0


class BlockManager:
    """Hands out the blocks of a paged cache to sequences.

    A sequence is named by the number that `allocate` or `fork` returns, which is never used again.
    Methods that need blocks take all of them or raise `OutOfBlocksError` and change nothing. One
    lock, `lock`, serialises all methods.

    Parameters
    ----------
    num_blocks : int
        Blocks of the cache.
    block_size : int
        Tokens of a block.
    num_host_blocks : int, default 0
        Blocks of CPU memory for sequences that are swapped out.
    reuse_prefixes : bool, default True
        Let a new sequence share full blocks whose tokens, and all tokens before, are the same.

    Raises
    ------
    ValueError
        A number is out of range.

    Notes
    -----
    The manager knows tokens as *reserved* (they have slots) and *written* (`commit` was told that
    their keys and values are in the cache). Only written blocks are shared. A free block keeps its
    content for reuse until it is needed for something else, the longest unused first.

    Examples
    --------
    >>> from attn_paged import BlockManager
    >>> manager = BlockManager(num_blocks=8, block_size=4)
    >>> first = manager.allocate([1, 2, 3, 4, 5, 6])
    >>> manager.block_table(first), manager.slots(first, 3, 6)
    ((0, 1), [3, 4, 5])
    >>> manager.commit(first, 6)
    >>> second = manager.allocate([1, 2, 3, 4, 9])
    >>> manager.block_table(second), manager.written(second)
    ((0, 2), 4)
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        num_host_blocks: int = 0,
        reuse_prefixes: bool = True,
    ) -> None:
        for name, value, least in (
            ("num_blocks", num_blocks, 1),
            ("block_size", block_size, 1),
            ("num_host_blocks", num_host_blocks, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_host_blocks = num_host_blocks
        self.reuse_prefixes = flag("reuse_prefixes", reuse_prefixes)
        self.lock = threading.RLock()
        self._pool = Pool(num_blocks, "cache")
        self._host = Pool(num_host_blocks, "host")
        self._prefixes = PrefixIndex()
        self._sequences: dict[int, _Sequence] = {}
        self._num_named = 0

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy begins with: all but the lock, of which it makes its own."""
        with self.lock:
            return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.RLock())

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence uses."""
        return len(self._pool.free)

    @property
    def num_free_host_blocks(self) -> int:
        """Host blocks that no sequence uses."""
        return len(self._host.free)

    @property
    def sequences(self) -> tuple[int, ...]:
        """All sequences, the oldest first."""
        with self.lock:
            return tuple(self._sequences)

    def length(self, sequence: int) -> int:
        """Tokens that have slots."""
        with self.lock:
            return self._find(sequence).length

    def written(self, sequence: int) -> int:
        """Leading tokens whose keys and values are in the cache."""
        with self.lock:
            return self._find(sequence).written

    def revision(self, sequence: int) -> int:
        """A number that changes whenever a block of the sequence is replaced by another."""
        with self.lock:
            return self._find(sequence).revision

    def is_swapped(self, sequence: int) -> bool:
        """Whether the sequence is in host memory."""
        with self.lock:
            return self._find(sequence).is_swapped

    def block_table(self, sequence: int) -> tuple[int, ...]:
        """Blocks of a sequence in the order of its tokens."""
        with self.lock:
            return tuple(self._resident(sequence).blocks)

    def slots(self, sequence: int, start: int, stop: int) -> list[int]:
        """Slots of tokens `start` to ``stop - 1``, each ``block * block_size + offset``."""
        with self.lock:
            state = self._resident(sequence)
            if not 0 <= start <= stop <= state.length:
                raise ValueError(
                    f"start and stop must lie in order between 0 and the length {state.length} of "
                    f"sequence {sequence}, got {start} and {stop}"
                )
            size = self.block_size
            return [state.blocks[i // size] * size + i % size for i in range(start, stop)]

    def allocate(self, tokens: Sequence[int] | int = ()) -> int:
        """Begin a sequence and reserve slots for its first tokens.

        Parameters
        ----------
        tokens : sequence of int, or int, default ()
            Token ids, or only their number. Known ids let the sequence share written blocks of
            others; at least its last token stays to be computed.

        Returns
        -------
        int
            The sequence's name. `written` tells how many tokens it found in the cache.

        Raises
        ------
        OutOfBlocksError
            Too few blocks are free.
        """
        count, ids = _count(tokens)
        with self.lock:
            state = _Sequence(tokens=ids if self.reuse_prefixes else None)
            self._match_prefix(state, (count - 1) // self.block_size)
            idle = sum(self._pool.references[block] == 0 for block in state.blocks)
            missing = self._blocks_for(count) - len(state.blocks)
            self._pool.require(missing + idle)
            for block in state.blocks:
                self._pool.share(block)
            state.blocks += self._take(missing)
            state.length = count
            return self._name(state)

    def append(self, sequence: int, tokens: Sequence[int] | int) -> Moves:
        """Reserve slots for more tokens of a sequence.

        Parameters
        ----------
        sequence : int
            Its name.
        tokens : sequence of int, or int
            Token ids, or only their number.

        Returns
        -------
        list of (int, int)
            Blocks (from, to) whose content must be copied before the new slots are written: the
            sequence had shared its last, partly filled block with a fork.

        Raises
        ------
        OutOfBlocksError
            Too few blocks are free.
        """
        count, ids = _count(tokens)
        with self.lock:
            state = self._resident(sequence)
            must_copy = count > 0 and self._shares_partial_block(state)
            grown = self._blocks_for(state.length + count) - len(state.blocks)
            fresh = self._take(grown + must_copy)
            copies = []
            if must_copy:
                shared, own = state.blocks[-1], fresh.pop(0)
                self._replace_blocks(state, [*state.blocks[:-1], own])
                self._release([shared])
                copies.append((shared, own))
            state.blocks += fresh
            state.length += count
            if state.tokens is not None:
                state.tokens = None if ids is None else state.tokens + ids
            return copies

    def commit(self, sequence: int, length: int) -> None:
        """Note that the keys and values of the first `length` tokens are in the cache.

        Parameters
        ----------
        sequence : int
            Its name.
        length : int
            Number of tokens; fewer than are known to be written changes nothing.
        """
        with self.lock:
            state = self._resident(sequence)
            if length > state.length:
                raise ValueError(
                    f"length must be at most the {state.length} tokens of sequence {sequence}, got "
                    f"{length}"
                )
            state.written = max(state.written, length)
            self._index_full_blocks(state)

    def fork(self, sequence: int) -> int:
        """Begin a sequence with the tokens of another, sharing all its blocks.

        The first of the two that appends to a shared, partly filled block gets a copy of it.

        Parameters
        ----------
        sequence : int
            The sequence to continue in two ways; all its tokens must be written.

        Returns
        -------
        int
            Name of the new sequence.
        """
        with self.lock:
            state = self._resident(sequence)
            if state.written < state.length:
                raise ValueError(
                    f"sequence {sequence} must be written before it is forked, "
                    f"{state.length - state.written} of its tokens are not"
                )
            for block in state.blocks:
                self._pool.share(block)
            tokens = None if state.tokens is None else list(state.tokens)
            return self._name(replace(state, blocks=list(state.blocks), tokens=tokens, revision=0))

    def free(self, sequence: int) -> None:
        """End a sequence and give its blocks back.

        Parameters
        ----------
        sequence : int
            Its name, which is unknown from now on.
        """
        with self.lock:
            state = self._find(sequence)
            del self._sequences[sequence]
            if state.is_swapped:
                self._release_host(state.blocks)
            else:
                self._release(state.blocks)

    def swap_out(self, sequence: int) -> Moves:
        """Give a sequence host blocks in place of its cache blocks.

        Returns
        -------
        list of (int, int)
            (cache block, host block) to copy before a cache block is taken again.

        Raises
        ------
        OutOfBlocksError
            Too few host blocks are free.
        """
        with self.lock:
            state = self._resident(sequence)
            blocks = state.blocks
            self._replace_blocks(state, self._host.take(len(blocks)))
            self._release(blocks)
            state.is_swapped = True
            return list(zip(blocks, state.blocks, strict=True))

    def swap_in(self, sequence: int) -> Moves:
        """Give a sequence cache blocks in place of its host blocks.

        Returns
        -------
        list of (int, int)
            (host block, cache block) to copy before a host block is taken again.

        Raises
        ------
        OutOfBlocksError
            Too few blocks are free.
        """
        with self.lock:
            state = self._find(sequence)
            if not state.is_swapped:
                raise ValueError(f"sequence {sequence} must be swapped out, it is in the cache")
            blocks = state.blocks
            self._replace_blocks(state, self._take(len(blocks)))
            self._release_host(blocks)
            state.is_swapped = False
            return list(zip(blocks, state.blocks, strict=True))

    def defragment(self) -> Moves:
        """Move all used blocks to the front of the cache and rewrite the tables.

        Returns
        -------
        list of (int, int)
            Blocks (from, to) to copy before the cache is used again; no block is in both places.
        """
        with self.lock:
            used = self.num_blocks - self.num_free_blocks
            holes = [block for block in range(used) if block in self._pool.free]
            strays = [
                block for block in range(used, self.num_blocks) if block not in self._pool.free
            ]
            moves = list(zip(strays, holes, strict=True))
            for source, target in reversed(moves):  # frees the first stray last: it is next
                self._prefixes.forget(target)
                self._prefixes.move(source, target)
                self._pool.move(source, target)
            targets = dict(moves)
            for state in self._sequences.values():
                if not state.is_swapped and not targets.keys().isdisjoint(state.blocks):
                    blocks = [targets.get(block, block) for block in state.blocks]
                    self._replace_blocks(state, blocks)
            return moves

    def check_invariants(self) -> None:
        """Check that no block is lost, freed twice or shared by mistake.

        Raises
        ------
        RuntimeError
            The first contradiction found.
        """
        with self.lock:
            for pool, is_host in ((self._pool, False), (self._host, True)):
                states = [s for s in self._sequences.values() if s.is_swapped == is_host]
                _check_pool(pool, Counter(block for state in states for block in state.blocks))
            for name, state in self._sequences.items():
                self._check_sequence(name, state)
            for key, block in self._prefixes.blocks.items():
                _ensure(self._prefixes.keys.get(block) == key, f"block {block} has two contents")
            _ensure(
                len(self._prefixes.blocks) == len(self._prefixes.keys),
                "a block is known by its content and cannot be found by it",
            )

    def _check_sequence(self, name: int, state: _Sequence) -> None:
        _ensure(
            len(state.blocks) == self._blocks_for(state.length),
            f"sequence {name} has {len(state.blocks)} blocks for {state.length} tokens",
        )
        _ensure(len(set(state.blocks)) == len(state.blocks), f"sequence {name} uses a block twice")
        _ensure(
            0 <= state.num_indexed * self.block_size <= state.written <= state.length,
            f"sequence {name} has {state.written} of {state.length} tokens written",
        )
        if state.is_swapped:
            return
        for block in state.blocks[state.written // self.block_size :]:
            is_open = state.written < state.length
            _ensure(
                not is_open or self._pool.references[block] == 1,
                f"block {block} of sequence {name} is shared and not yet written",
            )
            _ensure(
                block not in self._prefixes,
                f"block {block} of sequence {name} is reused and not yet full",
            )

    def _find(self, sequence: int) -> _Sequence:
        state = self._sequences.get(sequence) if isinstance(sequence, Hashable) else None
        if state is None:
            raise ValueError(f"sequence must be one that is allocated, got {sequence!r}")
        return state

    def _resident(self, sequence: int) -> _Sequence:
        state = self._find(sequence)
        if state.is_swapped:
            raise ValueError(f"sequence {sequence} must be in the cache, it is swapped out")
        return state

    def _name(self, state: _Sequence) -> int:
        self._num_named += 1
        self._sequences[self._num_named] = state
        return self._num_named

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _shares_partial_block(self, state: _Sequence) -> bool:
        is_partial = state.length % self.block_size != 0
        return is_partial and self._pool.references[state.blocks[-1]] > 1

    def _take(self, count: int) -> list[int]:
        blocks = self._pool.take(count)
        for block in blocks:
            self._prefixes.forget(block)
        return blocks

    def _release(self, blocks: list[int]) -> None:
        # From the last to the first, so that the end of a prefix is overwritten before its start.
        for block in reversed(blocks):
            self._pool.release(block, keep=block in self._prefixes)

    def _release_host(self, blocks: list[int]) -> None:
        for block in blocks:
            self._host.release(block)

    def _replace_blocks(self, state: _Sequence, blocks: list[int]) -> None:
        state.blocks = blocks
        state.revision += 1

    def _match_prefix(self, state: _Sequence, max_blocks: int) -> None:
        """Let a new sequence begin with the blocks that hold its first tokens already."""
        for index in range(max_blocks if state.tokens is not None else 0):
            found = self._prefixes.find(state.prefix, self._tokens_of(state, index))
            if found is None:
                return
            block, state.prefix = found
            state.blocks.append(block)
            state.num_indexed += 1
            state.written += self.block_size

    def _index_full_blocks(self, state: _Sequence) -> None:
        if state.tokens is None:
            return
        for index in range(state.num_indexed, state.written // self.block_size):
            tokens = self._tokens_of(state, index)
            state.prefix = self._prefixes.add(state.prefix, tokens, state.blocks[index])
            state.num_indexed += 1

    def _tokens_of(self, state: _Sequence, index: int) -> tuple[int, ...]:
        if state.tokens is None:
            raise RuntimeError("the tokens of this sequence are not known")
        return tuple(state.tokens[index * self.block_size : (index + 1) * self.block_size])


def _count(tokens: Sequence[int] | int) -> tuple[int, list[int] | None]:
    """Number of tokens and their ids, None where only the number is given."""
    if isinstance(tokens, int) and tokens >= 0:
        return tokens, None
    try:
        ids = [operator.index(token) for token in tokens]  # type: ignore[union-attr]
    except TypeError:
        raise ValueError(
            f"tokens must be integer ids or a number of at least 0, got {tokens!r}"
        ) from None
    return len(ids), ids


def _check_pool(pool: Pool, uses: Counter[int]) -> None:
    for block, references in enumerate(pool.references):
        _ensure(
            references == uses[block],
            f"block {block} is used by {uses[block]} sequences and counts {references}",
        )
        _ensure(
            (references == 0) == (block in pool.free),
            f"block {block} counts {references} uses and is {'' if block in pool.free else 'not '}"
            "free",
        )
    _ensure(
        all(0 <= block < len(pool.references) for block in (*uses, *pool.free)),
        "a block is out of range",
    )


def _ensure(holds: bool, contradiction: str) -> None:
    if not holds:
        raise RuntimeError(f"the block manager contradicts itself: {contradiction}")
