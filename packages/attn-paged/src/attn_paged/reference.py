"""The meaning of the operators, in plain PyTorch.

For the query at position p of a sequence with N keys:

    s_j = cap(scale q k_j) - slope |p - j|,   cap(s) = softcap tanh(s / softcap),
    lse = log(exp(sink) + sum_j exp(s_j)),    out = sum_j exp(s_j - lse) v_j,    j in visible(p)

The M queries of a sequence are its last tokens, so the i-th has position p = i + N - M. It sees the
keys of its window that the tree mask, where there is one, leaves it. A query that sees no key has
out = 0. A quantised key or value is its number times the scale of its token and head. Kwon et al.,
"Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023.

Rotary embedding turns the pair (x, y) of a key at position p by p's angle, so that products of
queries and keys depend on the distance alone: Su et al., "RoFormer", 2021.
"""

from __future__ import annotations

from typing import Any

import torch

from attn_core.dtypes import accumulator_dtype
from attn_paged.options import AppendOptions, AttentionOptions, largest


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    window: tuple[int, int],
    softcap: float,
    tree: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence without pages: q (M, H, D) over k (N, H_KV, D): out (M, H, D_v), lse (H, M).

    Row i of `tree` (M, W) says which of the last W keys the i-th query may see.
    """
    (len_q, heads, _), (len_k, heads_kv, _) = q.shape, k.shape
    groups = (heads_kv, heads // heads_kv)
    p = torch.arange(len_q, device=q.device)[:, None] + (len_k - len_q)
    j = torch.arange(len_k, device=q.device)
    scores = torch.einsum("ihgd,jhd->hgij", torch.unflatten(q, 1, groups), k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores).reshape(*groups, 1, 1) * (p - j).abs()
    left, right = window
    hidden = torch.zeros(len_q, len_k, dtype=torch.bool, device=q.device)
    if left >= 0:
        hidden |= j < p - left
    if right >= 0:
        hidden |= j > p + right
    if tree is not None:
        width = min(tree.shape[1], len_k)
        hidden[:, len_k - width :] |= ~tree[:, tree.shape[1] - width :].bool()
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse).reshape(*groups, 1))
    pivot = lse.masked_fill(lse == -torch.inf, 0.0)
    out = torch.einsum("hgij,jhd->ihgd", torch.exp(scores - pivot[..., None]), v)
    return out.flatten(1, 2), lse.flatten(0, 1)


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q (T, H, D) over paged sequences: out (T, H, D_v) and lse (H, T)."""
    tokens, heads, _ = q.shape
    cu_seqlens_q = options.cu_seqlens_q
    bounds = range(tokens + 1) if cu_seqlens_q is None else cu_seqlens_q.tolist()
    out = q.new_zeros((tokens, heads, v_cache.shape[3]))
    lse = q.new_full((heads, tokens), -torch.inf)
    slopes: Any = [None] * len(context_lens)  # of each sequence
    if options.alibi_slopes is not None:
        slopes = options.alibi_slopes.expand(len(context_lens), heads)
    tree_start = 0
    for b, len_k in enumerate(context_lens.tolist()):
        rows = slice(bounds[b], bounds[b + 1])
        k = _gather(k_cache, options.k_scale, block_tables[b], len_k, q.dtype)
        v = _gather(v_cache, options.v_scale, block_tables[b], len_k, q.dtype)
        window = options.window
        if options.is_causal is not None and bool(options.is_causal[b]):
            window = (window[0], 0)
        tree = _tree_of(options.tree_mask, rows, tree_start)
        tree_start += (rows.stop - rows.start) ** 2
        out[rows], lse[:, rows] = dense_attention(
            *(q[rows], k, v, slopes[b], options.sinks),
            *(options.scale, window, options.softcap, tree),
        )
    return out, lse


def _gather(
    cache: torch.Tensor,
    scale: torch.Tensor | None,
    table: torch.Tensor,
    len_k: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Keys or values (N, H_KV, D) of one sequence."""
    blocks = table[: -(-len_k // cache.shape[1])].long()
    stored = cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache
    rows = stored[blocks].view(cache.dtype).to(dtype)  # torch 2.6 does not index float8
    if scale is not None:
        rows = rows * scale.expand(cache.shape[:3])[blocks].to(dtype)[..., None]
    return rows.flatten(0, 1)[:len_k]


def _tree_of(mask: torch.Tensor | None, rows: slice, start: int) -> torch.Tensor | None:
    if mask is None or mask.ndim == 2:
        return None if mask is None else mask[rows]
    count = rows.stop - rows.start
    return mask[start : start + count**2].view(count, count)


def append_to_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    options: AppendOptions,
) -> None:
    """Write k (T, H_KV, D) and v (T, H_KV, D_v) to their slots; a negative slot skips its token."""
    block_size = k_cache.shape[1]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        index = slot // block_size, slot % block_size
        key = k[token]
        if options.rotary is not None:
            cos, sin, positions, interleaved = options.rotary
            position = int(positions[token])
            key = rotate(key, cos[position], sin[position], interleaved=interleaved)
        for row, cache, scale in (
            (key, k_cache, options.k_scale),
            (v[token], v_cache, options.v_scale),
        ):
            cache[index] = row if scale is None else quantise(row, scale, index, cache.dtype)


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool
) -> torch.Tensor:
    """Turn the first pairs of x (.., D), as many as cos and sin (.., R / 2) have angles."""
    half = cos.shape[-1]
    dtype = accumulator_dtype(x.dtype)
    cos, sin = cos.to(dtype), sin.to(dtype)
    turned, rest = x[..., : 2 * half].to(dtype), x[..., 2 * half :]
    pairs = turned.unflatten(-1, (half, 2) if interleaved else (2, half))
    a, b = pairs.unbind(-1 if interleaved else -2)
    parts = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1 if interleaved else -2)
    return torch.cat([parts.flatten(-2).to(x.dtype), rest], dim=-1)


def quantise(
    row: torch.Tensor, scale: torch.Tensor, index: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """Numbers of `dtype` that stand for row (H_KV, D); their scales are given, or written."""
    row = row.float()
    if scale.ndim == 3:
        peak = row.abs().amax(-1)
        scale[index] = torch.where(peak > 0, peak / largest(dtype), 1.0)
        divisor = scale[index]
    else:
        divisor = scale.expand(row.shape[0])
    numbers = (row / divisor[:, None]).clamp(-largest(dtype), largest(dtype))
    return (numbers if dtype.is_floating_point else numbers.round()).to(dtype)
