"""What `flash_attn_with_kvcache` means, in plain PyTorch: one sequence after the other.

New keys are rotated and written behind those the cache holds; then query i of M sees, of N keys,
those at positions p with ``leftpad <= p < N`` and ``-left <= p - (i + N - M) <= right``:

    s_ip = softcap tanh(scale q_i k_p / softcap) - slope |i + N - M - p|,
    out_i = sum_p exp(s_ip - lse_i) v_p,    lse_i = log sum_p exp(s_ip).

Windows and slopes as in FlashAttention-2 (Dao, 2023); rotation as in `rotary_reference`.
"""

from __future__ import annotations

import torch

from attn_flash.kvcache_checks import Cache
from attn_flash.rotary_reference import rotate


def slots(cache: Cache, b: int, stop: int, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of the cache where each of the first `stop` keys of sequence b is."""
    row = b if cache.batch_idx is None else int(cache.batch_idx[b])
    n = torch.arange(stop)
    if cache.block_table is None:
        return torch.full_like(n, row), n
    return cache.block_table[row, n // page_size].long().cpu(), n % page_size


def length(cache: Cache, b: int) -> int:
    """Keys of sequence b before the append."""
    return cache.length if cache.seqlens is None else int(cache.seqlens[b])


def append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    cache: Cache,
) -> None:
    """Write k (B, S_new, H_KV, D), rotated, and v to the cache."""
    for b in range(k.shape[0]):
        start = length(cache, b)
        rows, columns = slots(cache, b, start + k.shape[1], k_cache.shape[1])
        places = (rows[start:].to(k.device), columns[start:].to(k.device))
        k_cache[places] = k[b] if cos is None else _rotated(k[b], cos, sin, start, interleaved)
        v_cache[places] = v[b]


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    cache: Cache,
    alibi_slopes: torch.Tensor | None,
    new: int,
    scale: float,
    window: tuple[int, int],
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with q (B, M, H, D) to the cache: out (B, M, H, D_v) and lse (B, H, M)."""
    outs, lses = [], []
    left, right = window
    batch, len_q, heads, _ = q.shape
    for b in range(batch):
        old = length(cache, b)
        stop = old + new
        rows, columns = slots(cache, b, stop, k_cache.shape[1])
        start = 0 if cache.leftpad is None else int(cache.leftpad[b])
        places = (rows[start:].to(q.device), columns[start:].to(q.device))
        keys, values = (
            x[places].repeat_interleave(heads // x.shape[2], 1) for x in (k_cache, v_cache)
        )
        queries = q[b]
        if cos is not None:
            queries = _rotated(queries, cos, sin, old, interleaved, together=window == (-1, -1))
        scores = torch.einsum("ihd,jhd->hij", queries, keys) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        distance = (
            torch.arange(start, max(stop, start), device=q.device)
            - torch.arange(stop - len_q, stop, device=q.device)[:, None]
        )
        if alibi_slopes is not None:
            slopes = alibi_slopes.expand(batch, heads)[b].to(scores.dtype)
            scores = scores - slopes[:, None, None] * distance.abs()
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if left >= 0:
            hidden |= distance < -left
        if right >= 0:
            hidden |= distance > right
        scores = scores.masked_fill(hidden, -torch.inf)
        lse = torch.logsumexp(scores, -1)
        probs = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
        outs.append(torch.einsum("hij,jhd->ihd", probs, values))
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)


def _rotated(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor | None,
    start: int,
    interleaved: bool,
    *,
    together: bool = False,
) -> torch.Tensor:
    assert sin is not None
    stop = start + (1 if together else x.shape[0])
    cos, sin = (table[start:stop].to(x.dtype) for table in (cos, sin))
    return rotate(x, cos[:, None], sin[:, None], interleaved)
