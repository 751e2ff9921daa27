"""The meaning of the operators, in plain PyTorch.

For the query at position p of a sequence with N keys:

    s_j = cap(scale q k_j) - slope |p - j|,   cap(s) = softcap tanh(s / softcap),
    lse = log(exp(sink) + sum_j exp(s_j)),    out = sum_j exp(s_j - lse) v_j,    j in window(p)

The M queries of a sequence are its last tokens, so the i-th has position p = i + N - M. A query
that sees no key has out = 0. Kwon et al., "Efficient Memory Management for Large Language Model
Serving with PagedAttention", 2023.
"""

from __future__ import annotations

from typing import Any

import torch


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    window: tuple[int, int],
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence without pages: q (M, H, D) over k (N, H_KV, D): out (M, H, D_v), lse (H, M)."""
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
    cu_seqlens_q: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    window: tuple[int, int],
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q (T, H, D) over paged sequences: out (T, H, D_v) and lse (H, T)."""
    tokens, heads, _ = q.shape
    block_size = k_cache.shape[1]
    bounds = range(tokens + 1) if cu_seqlens_q is None else cu_seqlens_q.tolist()
    out = q.new_zeros((tokens, heads, v_cache.shape[3]))
    lse = q.new_full((heads, tokens), -torch.inf)
    slopes: Any = [None] * len(context_lens)  # of each sequence
    if alibi_slopes is not None:
        slopes = alibi_slopes.expand(len(context_lens), heads)
    for b, len_k in enumerate(context_lens.tolist()):
        rows = slice(bounds[b], bounds[b + 1])
        blocks = block_tables[b, : -(-len_k // block_size)].long()
        k, v = (cache[blocks].flatten(0, 1)[:len_k] for cache in (k_cache, v_cache))
        out[rows], lse[:, rows] = dense_attention(
            q[rows], k, v, slopes[b], sinks, scale, window, softcap
        )
    return out, lse


def append_to_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write k (T, H_KV, D) and v (T, H_KV, D_v) to their slots; a negative slot skips its token."""
    block_size = k_cache.shape[1]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            k_cache[slot // block_size, slot % block_size] = k[token]
            v_cache[slot // block_size, slot % block_size] = v[token]
