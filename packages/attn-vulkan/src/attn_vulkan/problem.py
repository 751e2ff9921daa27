"""What is computed: the facts of one attention problem, without its tensors."""

from __future__ import annotations

from dataclasses import dataclass

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
MAX_HEAD_DIM = 256
# Sides of a window that hide nothing are this wide; positions stay far below 32 bits.
OPEN = 1 << 29


@dataclass(frozen=True)
class Problem:
    """One attention problem.

    Attributes
    ----------
    dtype : str
        "float32", "float16" or "bfloat16".
    batches, len_q, len_k : int
        Sequences, and queries and keys of the longest one.
    heads, heads_kv : int
        Query heads, and the key heads they share.
    head_dim, head_dim_v : int
        Elements of a key and of a value.
    window : tuple of int
        (left, right) as in FlashAttention-2; -1 leaves a side open.
    softcap : float
        0 for none.
    has_bias, has_slopes, has_sinks : bool
        Which optional tensors there are.
    tokens : int
        Queries of all sequences where they are packed; 0 where they are not.
    block_size : int
        Keys of a block of a paged cache; 0 where keys are contiguous.
    is_aligned : bool
        Rows of every tensor start at multiples of four elements and are dense.
    """

    dtype: str
    batches: int
    len_q: int
    len_k: int
    heads: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    has_bias: bool = False
    has_slopes: bool = False
    has_sinks: bool = False
    tokens: int = 0
    block_size: int = 0
    is_aligned: bool = False

    @property
    def group(self) -> int:
        """Query heads of one key head."""
        return self.heads // self.heads_kv

    @property
    def bounds(self) -> tuple[int, int]:
        """The window as shaders take it: finite on both sides."""
        left, right = (side if 0 <= side < OPEN else OPEN for side in self.window)
        return left, right
