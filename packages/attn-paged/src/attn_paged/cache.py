"""The cache itself: tensors for keys and values, and the manager that hands out their blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any

import torch

from attn_core import backends
from attn_core.checks import require_positive
from attn_paged.api import append_to_cache, paged_attention
from attn_paged.checks import DTYPES
from attn_paged.manager import BlockManager, Moves
from attn_paged.options import QUANTISED_DTYPES

_NO_BLOCK = -1  # table entry past the end of a sequence


@dataclass(frozen=True)
class PagedBatch:
    """What one forward pass of a model needs: some tokens of some sequences, as tensors.

    Attributes
    ----------
    sequences : tuple of int
        Names of the B sequences.
    positions : Tensor, shape (T,), int64
        Position of each token in its sequence, one sequence after the other.
    slot_mapping : Tensor, shape (T,), int64
        Slot of each token, for `append_to_cache`.
    block_tables : Tensor, shape (B, max_blocks), int32
        Blocks of each sequence, padded with -1.
    context_lens : Tensor, shape (B,), int32
        Tokens of each sequence up to the last of this batch.
    cu_seqlens_q : Tensor, shape (B + 1,), int32
        Where the tokens of each sequence begin and end.
    """

    sequences: tuple[int, ...]
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    _lengths: tuple[int, ...]
    _revisions: tuple[int, ...]
    _unwritten_layers: set[int] = field(repr=False)


class PagedKVCache:
    """Keys and values of many sequences in blocks that are shared, swapped and reused.

    A step of a model: `allocate` or `append` reserves slots for new tokens, `batch` collects the
    tokens whose keys are not in the cache yet, and each layer calls `write` and `attend`. Once
    every layer is written, the tokens count as written and others may share their blocks.

    Parameters
    ----------
    num_blocks : int
        Blocks of the cache.
    block_size : int
        Tokens of a block.
    heads_kv : int
        Key heads, H_KV.
    head_dim : int
        Size of a key, D.
    head_dim_v : int, default head_dim
        Size of a value, D_v.
    num_layers : int, default 1
        Layers of the model; a block holds its tokens for all of them.
    dtype : dtype, default torch.get_default_dtype()
        float16, bfloat16, float32 or float64; or float8_e4m3fn or int8, with a scale for each token
        and head.
    device : device, default "cpu"
        Where the cache is.
    num_host_blocks : int, default 0
        Blocks of CPU memory, page-locked for a cache on a GPU, for sequences that are swapped out.
    reuse_prefixes : bool, default True
        As in `BlockManager`.
    backend : str, default "auto"
        As in `paged_attention`.

    Raises
    ------
    ValueError
        A number is out of range.

    Notes
    -----
    One lock serialises all methods that change the cache. Tensors are not waited for: on a GPU all
    calls should come from one stream, or from streams that the caller orders.

    Examples
    --------
    >>> import torch
    >>> from attn_paged import PagedKVCache
    >>> cache = PagedKVCache(num_blocks=32, block_size=16, heads_kv=2, head_dim=64)
    >>> sequence = cache.allocate(range(20))
    >>> batch = cache.batch([sequence])
    >>> q, k, v = torch.randn(20, 8, 64), torch.randn(20, 2, 64), torch.randn(20, 2, 64)
    >>> cache.write(0, k, v, batch)
    >>> cache.attend(0, q, batch).shape
    torch.Size([20, 8, 64])
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        heads_kv: int,
        head_dim: int,
        head_dim_v: int | None = None,
        *,
        num_layers: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        num_host_blocks: int = 0,
        reuse_prefixes: bool = True,
        backend: str = backends.AUTO,
    ) -> None:
        self._manager = BlockManager(
            num_blocks,
            block_size,
            num_host_blocks=num_host_blocks,
            reuse_prefixes=reuse_prefixes,
        )
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        sizes = {"heads_kv": heads_kv, "head_dim": head_dim, "head_dim_v": head_dim_v}
        for name, size in {**sizes, "num_layers": num_layers}.items():
            require_positive(name, size)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        allowed = (*DTYPES, *QUANTISED_DTYPES)
        if not isinstance(dtype, torch.dtype) or dtype not in allowed:
            raise ValueError(f"dtype must be one of {allowed} or None, got {dtype!r}")
        self.num_layers = num_layers
        self.backend = backend
        device = torch.device(device)
        # Each layer has memory of its own: a compiled model may then take the caches as inputs,
        # while PyTorch 2.13 mixes up inputs that share memory and are written to.
        dims = (head_dim, head_dim_v) * num_layers
        slots = (block_size, heads_kv)
        kinds: list[tuple[tuple[int, ...], torch.dtype]]
        kinds = [((*slots, dim), dtype) for dim in dims]
        if dtype in QUANTISED_DTYPES:
            kinds += [(slots, torch.float32)] * len(dims)
        self._storage = [
            torch.empty((num_blocks, *shape), dtype=kind, device=device) for shape, kind in kinds
        ]
        is_pinned = device.type == "cuda"
        self._host_storage = [
            torch.empty((num_host_blocks, *shape), dtype=kind, device="cpu", pin_memory=is_pinned)
            for shape, kind in kinds
        ]

    @property
    def device(self) -> torch.device:
        """Where the cache is."""
        return self._storage[0].device

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache."""
        return self._manager.num_blocks

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self._manager.block_size

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence uses."""
        return self._manager.num_free_blocks

    @property
    def num_free_host_blocks(self) -> int:
        """Host blocks that no sequence uses."""
        return self._manager.num_free_host_blocks

    @property
    def sequences(self) -> tuple[int, ...]:
        """All sequences, the oldest first."""
        return self._manager.sequences

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The caches of one layer, as `paged_attention` takes them.

        Parameters
        ----------
        index : int
            Layer, from 0.

        Returns
        -------
        k_cache : Tensor, shape (num_blocks, block_size, H_KV, D)
            The cache itself, to read and to write.
        v_cache : Tensor, shape (num_blocks, block_size, H_KV, D_v)
            Likewise.
        """
        self._require_layer(index)
        return self._storage[2 * index], self._storage[2 * index + 1]

    def scales(self, index: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The scales of one layer of a quantised cache, as `paged_attention` takes them.

        Parameters
        ----------
        index : int
            Layer, from 0.

        Returns
        -------
        k_scale, v_scale : Tensor, shape (num_blocks, block_size, H_KV), float32, or None
            The scales themselves, to read and to write; None where the cache is not quantised.
        """
        self._require_layer(index)
        if len(self._storage) == 2 * self.num_layers:
            return None, None
        first = 2 * (self.num_layers + index)
        return self._storage[first], self._storage[first + 1]

    def length(self, sequence: int) -> int:
        """Tokens that have slots."""
        return self._manager.length(sequence)

    def written(self, sequence: int) -> int:
        """Leading tokens whose keys and values are in the cache."""
        return self._manager.written(sequence)

    def is_swapped(self, sequence: int) -> bool:
        """Whether the sequence is in host memory."""
        return self._manager.is_swapped(sequence)

    def block_table(self, sequence: int) -> tuple[int, ...]:
        """Blocks of a sequence in the order of its tokens."""
        return self._manager.block_table(sequence)

    def allocate(self, tokens: Sequence[int] | int = ()) -> int:
        """Begin a sequence and reserve slots for its first tokens.

        Parameters
        ----------
        tokens : sequence of int, or int, default ()
            Token ids, or only their number; ids let the sequence reuse what others have written.

        Returns
        -------
        int
            The sequence's name. The model has to compute its tokens from `written` on.

        Raises
        ------
        OutOfBlocksError
            Too few blocks are free; nothing has changed.
        """
        return self._manager.allocate(tokens)

    def append(self, sequence: int, tokens: Sequence[int] | int) -> None:
        """Reserve slots for more tokens; a block shared with a fork is copied before it changes.

        Parameters
        ----------
        sequence : int
            Its name.
        tokens : sequence of int, or int
            Token ids, or only their number.

        Raises
        ------
        OutOfBlocksError
            Too few blocks are free; nothing has changed.
        """
        with self._manager.lock:
            self._move(self._manager.append(sequence, tokens))

    def fork(self, sequence: int) -> int:
        """Begin a sequence with the tokens of another, sharing its blocks.

        Parameters
        ----------
        sequence : int
            The sequence to continue in two ways; all its tokens must be written.

        Returns
        -------
        int
            Name of the new sequence.
        """
        return self._manager.fork(sequence)

    def free(self, sequence: int) -> None:
        """End a sequence and give its blocks back.

        Parameters
        ----------
        sequence : int
            Its name, which is unknown from now on.
        """
        self._manager.free(sequence)

    def swap_out(self, sequence: int) -> None:
        """Move a sequence to CPU memory.

        Parameters
        ----------
        sequence : int
            Its name.

        Raises
        ------
        OutOfBlocksError
            Too few host blocks are free; nothing has changed.
        """
        with self._manager.lock:
            moves = self._manager.swap_out(sequence)
            _copy_blocks(self._storage, self._host_storage, moves)

    def swap_in(self, sequence: int) -> None:
        """Move a sequence back into the cache.

        Parameters
        ----------
        sequence : int
            Its name.

        Raises
        ------
        OutOfBlocksError
            Too few blocks are free; nothing has changed.
        """
        with self._manager.lock:
            moves = self._manager.swap_in(sequence)
            _copy_blocks(self._host_storage, self._storage, moves)

    def defragment(self) -> int:
        """Move all used blocks to the front of the cache.

        Returns
        -------
        int
            Number of blocks moved.
        """
        with self._manager.lock:
            moves = self._manager.defragment()
            self._move(moves)
            return len(moves)

    def batch(self, sequences: Sequence[int], limit: int | None = None) -> PagedBatch:
        """Collect the tokens of sequences that are reserved and not yet written.

        Parameters
        ----------
        sequences : sequence of int
            Names.
        limit : int, optional
            At most so many tokens of each: a long prompt is then computed in chunks.

        Returns
        -------
        PagedBatch
            Tensors on the cache's device. It holds until a block of its sequences is replaced: by
            `swap_out`, by `defragment`, or by the copy an append to a fork makes.
        """
        if limit is not None:
            require_positive("limit", limit)
        if not isinstance(sequences, Sequence):
            raise ValueError(f"sequences must be a list of names, got {sequences!r}")
        with self._manager.lock:
            spans = [self._unwritten(name, limit) for name in sequences]
            slots = [
                self._manager.slots(name, span.start, span.stop)
                for name, span in zip(sequences, spans, strict=True)
            ]
            tables = [self._manager.block_table(name) for name in sequences]
            revisions = tuple(self._manager.revision(name) for name in sequences)
        stops = [span.stop for span in spans]
        return PagedBatch(
            tuple(sequences),
            self._tensor(list(chain.from_iterable(spans)), torch.int64),
            self._tensor(list(chain.from_iterable(slots)), torch.int64),
            self._tensor(_padded(tables), torch.int32).view(len(tables), -1 if tables else 0),
            self._tensor(stops, torch.int32),
            self._tensor(list(accumulate(map(len, spans), initial=0)), torch.int32),
            tuple(stops),
            revisions,
            set(range(self.num_layers)),
        )

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, batch: PagedBatch) -> None:
        """Write a layer's keys and values of the tokens of a batch.

        Parameters
        ----------
        layer : int
            Layer, from 0.
        k : Tensor, shape (T, H_KV, D)
            Keys.
        v : Tensor, shape (T, H_KV, D_v)
            Values.
        batch : PagedBatch
            From `batch`.
        """
        with self._manager.lock:
            self._require_current(batch)
            k_cache, v_cache = self.layer(layer)
            k_scale, v_scale = self.scales(layer)
            append_to_cache(
                *(k, v, k_cache, v_cache, batch.slot_mapping),
                k_scale=k_scale,
                v_scale=v_scale,
                backend=self.backend,
            )
            batch._unwritten_layers.discard(layer)
            if not batch._unwritten_layers:
                self.commit(batch)

    def commit(self, batch: PagedBatch) -> None:
        """Note that every layer of a batch is written.

        Only for callers that write to the slots of a batch by themselves, such as a CUDA graph;
        `write` does it.

        Parameters
        ----------
        batch : PagedBatch
            From `batch`.
        """
        with self._manager.lock:
            self._require_current(batch)
            for name, length in zip(batch.sequences, batch._lengths, strict=True):
                self._manager.commit(name, length)

    def attend(self, layer: int, q: torch.Tensor, batch: PagedBatch, **options: Any) -> Any:
        """Attention of the tokens of a batch over their sequences, by `paged_attention`.

        Parameters
        ----------
        layer : int
            Layer, from 0.
        q : Tensor, shape (T, H, D)
            Queries; the keys of the same tokens must be written.
        batch : PagedBatch
            From `batch`.
        **options
            Keyword arguments of `paged_attention`.

        Returns
        -------
        Tensor, shape (T, H, D_v)
            And lse with ``return_lse=True``.
        """
        with self._manager.lock:
            self._require_current(batch)
            k_scale, v_scale = self.scales(layer)
            return paged_attention(
                q,
                *self.layer(layer),
                batch.block_tables,
                batch.context_lens,
                cu_seqlens_q=batch.cu_seqlens_q,
                k_scale=k_scale,
                v_scale=v_scale,
                **{"backend": self.backend, **options},
            )

    def check_invariants(self) -> None:
        """Check that no block is lost, freed twice or shared by mistake; see `BlockManager`."""
        self._manager.check_invariants()

    def _require_layer(self, index: int) -> None:
        is_layer = isinstance(index, int) and 0 <= index < self.num_layers
        if not is_layer or isinstance(index, bool):
            raise ValueError(f"layer must be between 0 and {self.num_layers - 1}, got {index!r}")

    def _require_current(self, batch: PagedBatch) -> None:
        if not isinstance(batch, PagedBatch):
            raise ValueError(f"batch must be a PagedBatch, got {type(batch).__name__}")
        for name, revision in zip(batch.sequences, batch._revisions, strict=True):
            if self._manager.revision(name) != revision:
                raise ValueError(
                    f"batch must be made anew, blocks of its sequence {name} have been replaced"
                )

    def _unwritten(self, sequence: int, limit: int | None) -> range:
        start, stop = self._manager.written(sequence), self._manager.length(sequence)
        return range(start, stop if limit is None else min(stop, start + limit))

    def _tensor(self, values: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
        on_host = torch.tensor(values, dtype=dtype, device="cpu")
        return on_host.to(self.device, non_blocking=True)

    def _move(self, moves: Moves) -> None:
        """Copy blocks within the cache; no block is both read and written."""
        if not moves:
            return
        sources, targets = self._tensor(moves, torch.int64).unbind(1)
        for storage in self._storage:
            # Indexing of float8 is not everywhere.
            rows = storage.view(torch.uint8) if storage.itemsize == 1 else storage
            rows[targets] = rows[sources]


def _padded(tables: Sequence[tuple[int, ...]]) -> list[list[int]]:
    width = max(map(len, tables), default=0)
    return [[*table, *[_NO_BLOCK] * (width - len(table))] for table in tables]


def _copy_blocks(sources: list[torch.Tensor], targets: list[torch.Tensor], moves: Moves) -> None:
    """Copy blocks between the cache and the host, without waiting for a GPU."""
    for source, target in zip(sources, targets, strict=True):
        for source_block, target_block in moves:
            target[target_block].copy_(source[source_block], non_blocking=True)
