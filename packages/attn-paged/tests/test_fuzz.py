"""Random batches against the reference."""

from __future__ import annotations

from itertools import accumulate

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_core.testing import embedded, random_tensor
from attn_core.testing.strategies import lengths, orders, windows
from attn_paged import paged_attention, reference
from attn_paged.options import AttentionOptions

STALE = 2**30


@settings(max_examples=80, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 5), lengths(16, 40)), max_size=4),
    padding=st.integers(0, 2),
    block_size=st.sampled_from([1, 3, 16]),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dims=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    layout=orders(4),
    window=windows(40),
    terms=st.sets(st.sampled_from(["alibi_slopes", "sinks", "softcap", "tree_mask", "causal"])),
    is_flat=st.booleans(),
    is_invariant=st.booleans(),
)
def test_any_batch(
    sequences,
    padding,
    block_size,
    heads,
    dims,
    layout,
    window,
    terms,
    is_flat,
    is_invariant,
):
    (H_KV, group), D, B = heads, dims[0], len(sequences)
    lens_q, lens_k = ([pair[side] for pair in sequences] for side in (0, 1))
    bounds = torch.tensor([*accumulate(lens_q, initial=0)], dtype=torch.int32)
    tokens, H = sum(lens_q) + padding, H_KV * group
    tables, is_used = tables_of(lens_k, block_size)
    caches = []
    for seed, dim in enumerate(dims):
        cache = tensor((*is_used.shape, H_KV, dim), seed)
        cache[~is_used] = torch.nan
        caches.append(embedded(cache, order=layout))
    trees = (sum(n * n for n in lens_q),) if is_flat else (tokens, 7)
    tensors = {
        "alibi_slopes": tensor((B, H), 2).float().abs(),
        "sinks": tensor((H,), 3),
        "tree_mask": tensor(trees, 4) > -0.5,
    }
    tensors = {name: value for name, value in tensors.items() if name in terms}
    softcap = 2.0 if "softcap" in terms else 0.0
    is_causal = tensor((B,), 5) > 0 if "causal" in terms else None
    context_lens = torch.tensor(lens_k, dtype=torch.int32)
    places = (tensor((tokens, H, D), 6), *caches, tables, context_lens)

    actual = paged_attention(
        *places,
        cu_seqlens_q=bounds,
        causal=False if is_causal is None else is_causal,
        window_size=window,
        softcap=softcap,
        batch_invariant=is_invariant,
        return_lse=True,
        **tensors,
    )
    options = AttentionOptions(
        D**-0.5, window, softcap, cu_seqlens_q=bounds, is_causal=is_causal, **tensors
    )
    torch.testing.assert_close(actual, reference.attention(*places, options))


def tables_of(lens_k, block_size):
    """Block tables that use a cache backwards and end in stale entries, and its slots in use."""
    counts = [-(-length // block_size) for length in lens_k]
    tables = torch.full((len(lens_k), max(counts, default=0) + 1), STALE, dtype=torch.int32)
    is_used = torch.zeros(sum(counts) + 1, block_size, dtype=torch.bool)
    first = len(is_used)
    for table, length, count in zip(tables, lens_k, counts, strict=True):
        table[:count] = torch.arange(first - 1, first - 1 - count, -1)
        is_used[table[:count].long()] = (
            torch.arange(count * block_size).view(count, block_size) < length
        )
        first -= count
    return tables, is_used


def tensor(size, seed):
    return random_tensor(size, seed=seed, dtype=torch.float64)
