"""What a problem with a KV cache is, and the checks that turn arguments into one."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from attn_core import arguments, checks
from attn_flash.rotary_checks import check_tables, require_values

WHAT = "attention with a KV cache"
MAX_HEAD_DIM = 256
MAX_SPLITS = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DENSE, _PAGED = "(B_cache, S_cache, H_KV, D)", "(num_pages, page_size, H_KV, D)"


class KVCacheProblem(NamedTuple):
    """The static facts of one call: all that a backend needs to accept or refuse it.

    `capacity` is the number of slots a sequence has, `page_size` 0 for a cache that is not paged,
    `new` the number of tokens to append, and `window` (left, right) as in
    `checks.AttentionProblem`.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    len_q: int
    new: int
    capacity: int
    page_size: int
    heads: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    window: tuple[int, int]
    softcap: float
    rotary_dim: int
    needs_grad: bool = False


class Cache(NamedTuple):
    """Where the keys of each sequence are: the tensors both operators take, validated.

    Sequence b has `seqlens`[b] keys, or `length` where there is no such tensor, of which the first
    `leftpad`[b] do not count. It is entry `batch_idx`[b] of the cache, or that row of
    `block_table`; b itself by default.
    """

    seqlens: torch.Tensor | None
    length: int
    batch_idx: torch.Tensor | None
    leftpad: torch.Tensor | None
    block_table: torch.Tensor | None


def kvcache_problem(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
    cache: Cache,
    alibi_slopes: torch.Tensor | None,
    window: tuple[int, int],
    softcap: float,
) -> KVCacheProblem:
    """Validate the tensors of `flash_attn_with_kvcache` and describe the problem they pose."""
    checks.require_rank("q", q, "(B, M, H, D)")
    checks.require_dtype("q", q, DTYPES)
    _check_caches(q, k_cache, v_cache, is_paged=cache.block_table is not None)
    _check_block_table(q, cache.block_table)
    _check_places(q, k_cache, cache)
    room = capacity(k_cache, cache.block_table)
    _check_new_tokens(q, k_cache, v_cache, k, v, room)
    _check_rotary(q, k, rotary_cos, rotary_sin, room)
    if alibi_slopes is not None:
        arguments.require_slopes(alibi_slopes, q.shape[0], q.shape[2], q)
    problem = describe(q, k_cache, v_cache, k, cache.block_table, rotary_cos, window, softcap)
    _check_lengths(cache, problem, k_cache)
    arguments.require_no_grad(
        WHAT, q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v, alibi_slopes=alibi_slopes
    )
    return problem


def cache_length(
    cache_seqlens: Any, k: torch.Tensor | None, capacity: int
) -> tuple[torch.Tensor | None, int]:
    """Split cache_seqlens into a tensor and a number; without either, every slot holds a key."""
    if isinstance(cache_seqlens, torch.Tensor):
        return cache_seqlens, 0
    if cache_seqlens is None:
        if k is not None:
            raise ValueError(
                "cache_seqlens must be given with k: it says where the new keys go, got None"
            )
        return None, capacity
    try:
        return None, operator.index(cache_seqlens)
    except TypeError:
        raise ValueError(
            f"cache_seqlens must be an integer or an int32 tensor (B,), got {cache_seqlens!r}"
        ) from None


def capacity(k_cache: torch.Tensor, block_table: torch.Tensor | None) -> int:
    """How many tokens the cache has room for in each sequence."""
    checks.require_rank("k_cache", k_cache, _DENSE if block_table is None else _PAGED)
    if block_table is None:
        return k_cache.shape[1]
    checks.require_rank("block_table", block_table, "(B, max_pages)")
    return block_table.shape[1] * k_cache.shape[1]


def num_splits(value: Any) -> int:
    """Return the number of parts that keys are cut into, 0 to choose it."""
    try:
        splits = operator.index(value)
    except TypeError:
        splits = -1
    if not 0 <= splits <= MAX_SPLITS:
        raise ValueError(f"num_splits must be an integer from 0 to {MAX_SPLITS}, got {value!r}")
    return splits


def binding_window(window: Sequence[int], capacity: int) -> tuple[int, int]:
    """Return the window with -1 for a side so wide that the cache cannot hold what it hides."""
    left, right = window
    return (left if left < capacity else -1), (right if right < capacity else -1)


def describe(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None,
    block_table: torch.Tensor | None,
    rotary_cos: torch.Tensor | None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> KVCacheProblem:
    """Describe valid arguments of `flash_attn_with_kvcache`."""
    batch, len_q, heads, head_dim = q.shape
    return KVCacheProblem(
        q.device,
        q.dtype,
        batch,
        len_q,
        0 if k is None else k.shape[1],
        capacity(k_cache, block_table),
        0 if block_table is None else k_cache.shape[1],
        heads,
        k_cache.shape[2],
        head_dim,
        v_cache.shape[3],
        window,
        softcap,
        0 if rotary_cos is None else 2 * rotary_cos.shape[1],
    )


def _check_caches(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *, is_paged: bool
) -> None:
    symbols = _PAGED if is_paged else _DENSE
    checks.require_rank("v_cache", v_cache, symbols)
    checks.require_like("k_cache", k_cache, "q", q)
    checks.require_like("v_cache", v_cache, "q", q)
    checks.require_shape("k_cache", k_cache, symbols, (*k_cache.shape[:3], q.shape[3]))
    checks.require_shape("v_cache", v_cache, symbols, (*k_cache.shape[:3], v_cache.shape[3]))
    if is_paged and 0 in k_cache.shape[:2]:
        raise ValueError(f"k_cache must have a page of a slot, got shape {tuple(k_cache.shape)}")
    checks.require_multiple(
        "the number of heads of q", q.shape[2], "that of k_cache", k_cache.shape[2]
    )
    checks.require_range("the head dimension of q", q.shape[3], 1, MAX_HEAD_DIM)
    checks.require_range("the head dimension of v_cache", v_cache.shape[3], 1, MAX_HEAD_DIM)


def _check_block_table(q: torch.Tensor, block_table: torch.Tensor | None) -> None:
    if block_table is None:
        return
    checks.require_dtype("block_table", block_table, (torch.int32,))
    checks.require_device("block_table", block_table, "q", q)


def _check_places(q: torch.Tensor, k_cache: torch.Tensor, cache: Cache) -> None:
    """Check the integers that each sequence has one of, and that there is a row for each."""
    integers = {
        "cache_seqlens": (cache.seqlens, (torch.int32,)),
        "cache_batch_idx": (cache.batch_idx, (torch.int32, torch.int64)),
        "cache_leftpad": (cache.leftpad, (torch.int32,)),
    }
    for name, (tensor, dtypes) in integers.items():
        if tensor is not None:
            checks.require_shape(name, tensor, "(B,)", q.shape[:1])
            checks.require_dtype(name, tensor, dtypes)
            checks.require_device(name, tensor, "q", q)
    name, rows = "k_cache", k_cache.shape[0]
    if cache.block_table is not None:
        name, rows = "block_table", cache.block_table.shape[0]
    if cache.batch_idx is None and rows < q.shape[0]:
        raise ValueError(
            f"{name} must have a row for each of the {q.shape[0]} sequences of q, got {rows}"
        )


def _check_new_tokens(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    capacity: int,
) -> None:
    if k is None and v is None:
        return
    if k is None or v is None:
        given, missing = ("v", "k") if k is None else ("k", "v")
        raise ValueError(f"{missing} must be given with {given}, got None")
    checks.require_rank("k", k, "(B, S_new, H_KV, D)")
    checks.require_like("k", k, "q", q)
    checks.require_like("v", v, "q", q)
    checks.require_writable("k_cache", k_cache)
    checks.require_writable("v_cache", v_cache)
    batch, new = q.shape[0], k.shape[1]
    checks.require_shape("k", k, "(B, S_new, H_KV, D)", (batch, new, *k_cache.shape[2:]))
    checks.require_shape("v", v, "(B, S_new, H_KV, D_v)", (batch, new, *v_cache.shape[2:]))
    if new > capacity:
        raise ValueError(
            f"k must have at most as many tokens as the cache has room for, {capacity}, got {new}"
        )


def check_pair(cos: torch.Tensor | None, sin: torch.Tensor | None) -> None:
    """Check that both tables of rotation are given, or neither."""
    if (cos is None) != (sin is None):
        given, missing = ("sin", "cos") if cos is None else ("cos", "sin")
        raise ValueError(f"rotary_{missing} must be given with rotary_{given}, got None")


def _check_rotary(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    capacity: int,
) -> None:
    check_pair(cos, sin)
    if cos is None or sin is None:
        return
    if k is None:
        raise ValueError("k must be given with rotary_cos: keys in the cache are rotated already")
    check_tables("rotary_cos", cos, "rotary_sin", sin, "q", q)
    if cos.shape[0] < capacity:
        raise ValueError(
            "rotary_cos must have a row for each position that the cache has room for, "
            f"{capacity}, got {cos.shape[0]}"
        )


def _check_lengths(cache: Cache, problem: KVCacheProblem, k_cache: torch.Tensor) -> None:
    """Check values where reading them waits for no device."""
    room = problem.capacity - problem.new
    if cache.seqlens is None:
        checks.require_range("cache_seqlens", cache.length, 0, room)
    if not checks.may_read_values(k_cache):
        return
    is_paged = cache.block_table is not None
    rows = cache.block_table.shape[0] if cache.block_table is not None else k_cache.shape[0]
    require_values("cache_seqlens", cache.seqlens, 0, room)
    require_values("cache_batch_idx", cache.batch_idx, 0, rows - 1)
    require_values("cache_leftpad", cache.leftpad, 0, problem.capacity)
    if is_paged:
        for name, entries in _entries_in_use(cache, problem):
            require_values(name, entries, 0, k_cache.shape[0] - 1)


def _entries_in_use(cache: Cache, problem: KVCacheProblem) -> Iterator[tuple[str, torch.Tensor]]:
    """Entries of the block table that hold keys of each sequence."""
    assert cache.block_table is not None
    for b in range(problem.batch):
        row = b if cache.batch_idx is None else int(cache.batch_idx[b])
        length = cache.length if cache.seqlens is None else int(cache.seqlens[b])
        pages = -(-(length + problem.new) // problem.page_size)
        first = 0 if cache.leftpad is None else int(cache.leftpad[b]) // problem.page_size
        yield f"block_table[{row}]", cache.block_table[row, first:pages]
