"""The two structures under the block manager: the blocks of one memory, and blocks by content."""

from __future__ import annotations

from collections import OrderedDict

ROOT = 0  # the prefix before a sequence's first block


class OutOfBlocksError(RuntimeError):
    """Fewer blocks are free than a call needs. The call has changed nothing.

    Parameters
    ----------
    needed : int
        Blocks the call would take.
    free : int
        Blocks that are free.
    memory : str
        "cache" or "host".
    """

    def __init__(self, needed: int, free: int, memory: str) -> None:
        super().__init__(f"{needed} {memory} blocks are needed and {free} are free")
        self.needed = needed
        self.free = free


class Pool:
    """Blocks of one memory: how many sequences use each, and the free ones in order of taking."""

    def __init__(self, num_blocks: int, memory: str) -> None:
        self.references = [0] * num_blocks
        self.free = OrderedDict.fromkeys(range(num_blocks))
        self._memory = memory

    def require(self, count: int) -> None:
        if count > len(self.free):
            raise OutOfBlocksError(count, len(self.free), self._memory)

    def take(self, count: int) -> list[int]:
        self.require(count)
        blocks = [self.free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self.references[block] = 1
        return blocks

    def share(self, block: int) -> None:
        self.free.pop(block, None)
        self.references[block] += 1

    def release(self, block: int, *, keep: bool = False) -> None:
        """Drop one use; a free block to `keep` is taken again after all others."""
        self.references[block] -= 1
        if self.references[block] == 0:
            self.free[block] = None
            self.free.move_to_end(block, last=keep)

    def move(self, source: int, target: int) -> None:
        """Hand the uses of `source` to the free block `target`."""
        del self.free[target]
        self.references[target], self.references[source] = self.references[source], 0
        self.free[source] = None
        self.free.move_to_end(source, last=False)


class PrefixIndex:
    """Full blocks by their content: the tokens in them and the prefix before them.

    Prefixes are numbered, so a hash collision cannot join different texts: a key compares the
    tokens of its block and the number that stands for all tokens before.
    """

    def __init__(self) -> None:
        self.blocks: dict[tuple[int, tuple[int, ...]], int] = {}
        self.keys: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._prefixes: dict[int, int] = {}
        self._last = ROOT

    def __contains__(self, block: int) -> bool:
        return block in self.keys

    def find(self, prefix: int, tokens: tuple[int, ...]) -> tuple[int, int] | None:
        """The block with these tokens after `prefix`, and the prefix it ends."""
        block = self.blocks.get((prefix, tokens))
        return None if block is None else (block, self._prefixes[block])

    def add(self, prefix: int, tokens: tuple[int, ...], block: int) -> int:
        """Enter a block, unless another holds the same, and return the prefix it ends."""
        found = self.find(prefix, tokens)
        if found is not None:
            return found[1]
        self._last += 1
        self.blocks[prefix, tokens] = block
        self.keys[block] = (prefix, tokens)
        self._prefixes[block] = self._last
        return self._last

    def forget(self, block: int) -> None:
        if block in self.keys:
            del self.blocks[self.keys.pop(block)], self._prefixes[block]

    def move(self, source: int, target: int) -> None:
        if source in self.keys:
            self.keys[target] = self.keys.pop(source)
            self.blocks[self.keys[target]] = target
            self._prefixes[target] = self._prefixes.pop(source)
