"""What a paged problem is, and the checks that turn arguments into one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from attn_core import arguments, checks
from attn_core.errors import UnsupportedProblemError
from attn_paged.options import QUANTISED_DTYPES, AppendOptions, AttentionOptions, Rotary

MAX_HEAD_DIM = 576
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CACHE_SYMBOLS = "(num_blocks, block_size, H_KV, D)"


class AttentionProblem(NamedTuple):
    """The static facts of one call of attention: all that a backend needs to accept or refuse it.

    `window` is (left, right): the query at position p sees keys ``p - left`` to ``p + right``, both
    included; -1 leaves a side open. Causal attention is a window closed on the right, (-1, 0).
    """

    device: torch.device
    dtype: torch.dtype
    tokens: int
    sequences: int
    heads: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    block_size: int
    max_blocks: int
    is_ragged: bool
    window: tuple[int, int]
    softcap: float
    has_alibi: bool
    has_sinks: bool
    cache_dtype: torch.dtype
    has_tree: bool = False
    is_causal_by_sequence: bool = False
    batch_invariant: bool = False
    shared_prefix: bool = False
    needs_grad: bool = False


class AppendProblem(NamedTuple):
    """The static facts of one call of append_to_cache."""

    device: torch.device
    dtype: torch.dtype
    tokens: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    block_size: int
    cache_dtype: torch.dtype
    needs_grad: bool = False


def attention_problem(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    options: AttentionOptions,
) -> AttentionProblem:
    """Validate the arguments of `paged_attention` and describe the problem they pose."""
    checks.require_rank("q", q, "(T, H, D)")
    checks.require_dtype("q", q, DTYPES)
    _check_caches(k_cache, v_cache, options.k_scale, options.v_scale, "q", q)
    _check_heads(q, k_cache)
    _check_tables(q, block_tables, context_lens, options.cu_seqlens_q)
    sequences = block_tables.shape[0]
    for name, scale in (("k_scale", options.k_scale), ("v_scale", options.v_scale)):
        if scale is not None:
            _check_scale(name, scale, k_cache)
    if options.alibi_slopes is not None:
        arguments.require_slopes(options.alibi_slopes, sequences, q.shape[1], q)
    if options.sinks is not None:
        checks.require_shape("sinks", options.sinks, "(H,)", (q.shape[1],))
        checks.require_dtype("sinks", options.sinks, (torch.float32, q.dtype))
        checks.require_device("sinks", options.sinks, "q", q)
    if options.is_causal is not None:
        checks.require_shape("causal", options.is_causal, "(B,)", (sequences,))
        checks.require_dtype("causal", options.is_causal, (torch.bool,))
        checks.require_device("causal", options.is_causal, "q", q)
    if options.tree_mask is not None:
        _check_tree_mask(options.tree_mask, q)
    if options.shared_prefix:
        _check_shared_prefix(options)
    arguments.require_no_grad(
        "a paged cache",
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        alibi_slopes=options.alibi_slopes,
        sinks=options.sinks,
        k_scale=options.k_scale,
        v_scale=options.v_scale,
    )
    if checks.may_read_values(q):
        _check_lengths(q, k_cache, block_tables, context_lens, options)
    return describe_attention(q, k_cache, v_cache, block_tables, options)


def describe_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    options: AttentionOptions,
) -> AttentionProblem:
    """Describe valid arguments of `paged_attention`."""
    tokens, heads, head_dim = q.shape
    _, block_size, heads_kv, head_dim_v = v_cache.shape
    sequences, max_blocks = block_tables.shape
    return AttentionProblem(
        q.device,
        q.dtype,
        tokens,
        sequences,
        heads,
        heads_kv,
        head_dim,
        head_dim_v,
        block_size,
        max_blocks,
        options.cu_seqlens_q is not None,
        options.window,
        options.softcap,
        options.alibi_slopes is not None,
        options.sinks is not None,
        k_cache.dtype,
        options.tree_mask is not None,
        options.is_causal is not None,
        options.batch_invariant,
        options.shared_prefix,
    )


def append_problem(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    options: AppendOptions,
) -> AppendProblem:
    """Validate the arguments of `append_to_cache` and describe the problem they pose."""
    checks.require_rank("k", k, "(T, H_KV, D)")
    checks.require_dtype("k", k, DTYPES)
    _check_caches(k_cache, v_cache, options.k_scale, options.v_scale, "k", k)
    checks.require_like("v", v, "k", k)
    checks.require_writable("k_cache", k_cache)
    checks.require_writable("v_cache", v_cache)
    tokens = k.shape[0]
    checks.require_shape("k", k, "(T, H_KV, D)", (tokens, *k_cache.shape[2:]))
    checks.require_shape("v", v, "(T, H_KV, D_v)", (tokens, *v_cache.shape[2:]))
    checks.require_shape("slot_mapping", slot_mapping, "(T,)", (tokens,))
    checks.require_dtype("slot_mapping", slot_mapping, (torch.int64, torch.int32))
    checks.require_device("slot_mapping", slot_mapping, "k", k)
    for name, scale in (("k_scale", options.k_scale), ("v_scale", options.v_scale)):
        if scale is not None:
            _check_scale(name, scale, k_cache)
            if scale.ndim == 3:
                checks.require_writable(name, scale)
    if options.rotary is not None:
        _check_rotary(options.rotary, k)
    arguments.require_no_grad(
        "a paged cache",
        k=k,
        v=v,
        k_cache=k_cache,
        v_cache=v_cache,
        k_scale=options.k_scale,
        v_scale=options.v_scale,
    )
    if checks.may_read_values(k):
        _check_slots(slot_mapping, k_cache, options.rotary)
    return describe_append(k, v, k_cache)


def describe_append(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor) -> AppendProblem:
    """Describe valid arguments of `append_to_cache`."""
    tokens, heads_kv, head_dim = k.shape
    return AppendProblem(
        *(k.device, k.dtype, tokens, heads_kv, head_dim, v.shape[2]),
        *(k_cache.shape[1], k_cache.dtype),
    )


def rotary(
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    interleaved: bool,
) -> Rotary | None:
    """Return the rotation of keys, None for none."""
    given = {"rotary_cos": cos, "rotary_sin": sin, "positions": positions}
    missing = [name for name, tensor in given.items() if tensor is None]
    if len(missing) == len(given):
        return None
    if cos is None or sin is None or positions is None:
        raise ValueError(
            "rotary_cos, rotary_sin and positions must be given together, got None for "
            f"{' and '.join(missing)}"
        )
    return Rotary(cos, sin, positions, interleaved)


def window(
    causal: bool | torch.Tensor, window_size: Sequence[int]
) -> tuple[tuple[int, int], torch.Tensor | None]:
    """Return (left, right), -1 for an open side, and which sequences close the right one at 0."""
    if isinstance(causal, torch.Tensor):
        return arguments.window(False, window_size), causal
    return arguments.window(causal, window_size), None


def _check_caches(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    rows_name: str,
    rows: torch.Tensor,
) -> None:
    checks.require_rank("k_cache", k_cache, CACHE_SYMBOLS)
    checks.require_rank("v_cache", v_cache, "(num_blocks, block_size, H_KV, D_v)")
    if k_cache.dtype in QUANTISED_DTYPES:
        checks.require_device("k_cache", k_cache, rows_name, rows)
        if k_scale is None or v_scale is None:
            name = "k_scale" if k_scale is None else "v_scale"
            raise ValueError(f"{name} must be given where the cache is {k_cache.dtype}, got None")
    else:
        checks.require_like("k_cache", k_cache, rows_name, rows)
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if scale is not None:
                raise ValueError(f"{name} must be None where the cache is {k_cache.dtype}")
    checks.require_like("v_cache", v_cache, "k_cache", k_cache)
    expected = (*k_cache.shape[:3], v_cache.shape[3])
    checks.require_shape("v_cache", v_cache, "(num_blocks, block_size, H_KV, D_v)", expected)
    if 0 in k_cache.shape[:2]:
        raise ValueError(f"k_cache must have a slot, got shape {tuple(k_cache.shape)}")
    checks.require_range("the head dimension of k_cache", k_cache.shape[3], 1, MAX_HEAD_DIM)
    checks.require_range("the head dimension of v_cache", v_cache.shape[3], 1, MAX_HEAD_DIM)


def _check_scale(name: str, scale: torch.Tensor, cache: torch.Tensor) -> None:
    checks.require_tensor(name, scale)
    slots = tuple(cache.shape[:3])
    if tuple(scale.shape) not in ((), slots[2:], slots):
        raise ValueError(
            f"{name} must have shape (num_blocks, block_size, H_KV) = {slots}, (H_KV,) or (), got "
            f"{tuple(scale.shape)}"
        )
    checks.require_dtype(name, scale, (torch.float32,))
    checks.require_device(name, scale, "k_cache", cache)


def _check_tree_mask(mask: torch.Tensor, q: torch.Tensor) -> None:
    checks.require_tensor("tree_mask", mask)
    if mask.ndim not in (1, 2):
        raise ValueError(
            f"tree_mask must have shape (T, W) or one dimension, got {tuple(mask.shape)}"
        )
    if mask.ndim == 2:
        checks.require_shape("tree_mask", mask, "(T, W)", (q.shape[0], mask.shape[1]))
    checks.require_dtype("tree_mask", mask, (torch.bool,))
    checks.require_device("tree_mask", mask, "q", q)


def _check_shared_prefix(options: AttentionOptions) -> None:
    """A prefix is attended to by queries at several positions at once, so none may matter."""
    for is_given, name in (
        (options.alibi_slopes is not None, "alibi_slopes"),
        (options.window[0] >= 0, "a window closed on the left"),
        (options.tree_mask is not None and options.tree_mask.ndim == 2, "a tree_mask (T, W)"),
        (options.batch_invariant, "batch_invariant"),
    ):
        if is_given:
            raise UnsupportedProblemError(f"shared_prefix and {name} do not go together")


def _check_rotary(rotary: Rotary, k: torch.Tensor) -> None:
    cos, sin, positions, _ = rotary
    checks.require_rank("rotary_cos", cos, "(positions, R / 2)")
    checks.require_dtype("rotary_cos", cos, (torch.float32, k.dtype))
    checks.require_like("rotary_sin", sin, "rotary_cos", cos)
    checks.require_shape("rotary_sin", sin, "(positions, R / 2)", cos.shape)
    checks.require_range("twice the columns of rotary_cos", 2 * cos.shape[1], 2, k.shape[2])
    checks.require_shape("positions", positions, "(T,)", (k.shape[0],))
    checks.require_dtype("positions", positions, (torch.int64, torch.int32))
    for name, tensor in (("rotary_cos", cos), ("positions", positions)):
        checks.require_device(name, tensor, "k", k)


def _check_heads(q: torch.Tensor, k_cache: torch.Tensor) -> None:
    if q.shape[2] != k_cache.shape[3]:
        raise ValueError(
            f"q and k_cache must have the same head dimension, got {q.shape[2]} and "
            f"{k_cache.shape[3]}"
        )
    checks.require_multiple(
        "the number of heads of q", q.shape[1], "that of k_cache", k_cache.shape[2]
    )


def _check_tables(
    q: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
) -> None:
    checks.require_rank("block_tables", block_tables, "(B, max_blocks)")
    sequences = block_tables.shape[0]
    checks.require_shape("context_lens", context_lens, "(B,)", (sequences,))
    integers = {"block_tables": block_tables, "context_lens": context_lens}
    if cu_seqlens_q is None:
        if q.shape[0] != sequences:
            raise ValueError(
                "q must have one query for each row of block_tables where cu_seqlens_q is None, "
                f"got {q.shape[0]} queries and {sequences} rows"
            )
    else:
        checks.require_shape("cu_seqlens_q", cu_seqlens_q, "(B + 1,)", (sequences + 1,))
        integers["cu_seqlens_q"] = cu_seqlens_q
    for name, tensor in integers.items():
        checks.require_dtype(name, tensor, (torch.int32,))
        checks.require_device(name, tensor, "q", q)


def _check_lengths(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    options: AttentionOptions,
) -> None:
    """Check what lengths and tables hold, as far as a query may lead there."""
    num_blocks, block_size = k_cache.shape[:2]
    lengths = context_lens.tolist()
    room = block_tables.shape[1] * block_size
    for b, length in enumerate(lengths):
        checks.require_range(f"context_lens[{b}]", length, 0, room)
    queries = _numbers_of_queries(q, lengths, options.cu_seqlens_q)
    tree = options.tree_mask
    if tree is not None and tree.ndim == 1:
        checks.require_shape("tree_mask", tree, "(sum of M * M,)", (sum(m * m for m in queries),))
    left = options.window[0]
    for b, (length, count) in enumerate(zip(lengths, queries, strict=True)):
        first = 0 if left < 0 else max(length - count - left, 0)
        blocks = range(first // block_size, -(-length // block_size) if count else 0)
        for block in block_tables[b, blocks.start : blocks.stop].tolist():
            checks.require_range(f"an entry of block_tables[{b}]", block, 0, num_blocks - 1)


def _numbers_of_queries(
    q: torch.Tensor, lengths: Sequence[int], cu_seqlens_q: torch.Tensor | None
) -> list[int]:
    if cu_seqlens_q is None:
        return [1] * len(lengths)
    starts = cu_seqlens_q.tolist()
    counts = [stop - start for start, stop in pairwise(starts)]
    if starts[0] != 0 or min(counts, default=0) < 0 or starts[-1] > q.shape[0]:
        raise ValueError(
            f"cu_seqlens_q must grow from 0 to at most the {q.shape[0]} queries of q, got {starts}"
        )
    return counts


def _check_slots(slot_mapping: torch.Tensor, k_cache: torch.Tensor, rotary: Rotary | None) -> None:
    kept = slot_mapping[slot_mapping >= 0]
    if kept.numel() == 0:
        return
    slots = k_cache.shape[0] * k_cache.shape[1]
    checks.require_range("an entry of slot_mapping", int(kept.max()), 0, slots - 1)
    if kept.unique().numel() != kept.numel():
        raise ValueError(f"slot_mapping must hold every slot once, got {slot_mapping.tolist()}")
    if rotary is not None:
        smallest, largest = (int(x) for x in rotary.positions[slot_mapping >= 0].aminmax())
        for position in (smallest, largest):
            checks.require_range("an entry of positions", position, 0, rotary.cos.shape[0] - 1)
