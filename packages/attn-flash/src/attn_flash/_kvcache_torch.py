"""Backend "torch" of attention with a KV cache: right on every device torch has.

One sequence after the other. On the CPU only the keys it has are looked at; elsewhere all that the
cache has room for, with those beyond its length masked, so that nothing is read back.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attn_core.dtypes import accumulator_dtype
from attn_flash import rotary_reference
from attn_flash.kvcache_checks import Cache, capacity

_BLOCK_BYTES = 1 << 27  # of one block of scores


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
    batch, new = k.shape[:2]
    if batch * new == 0:
        return
    positions = _old_lengths(cache, k)[:, None] + torch.arange(new, device=k.device)
    if cos is not None:
        k = _rotated(k, cos, sin, positions, interleaved)
    places = _places(cache, positions, k_cache.shape[1])
    k_cache[places] = k
    v_cache[places] = v


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
    num_splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with q (B, M, H, D) to the cache: out (B, M, H, D_v) and lse (B, H, M)."""
    batch, len_q, heads, _ = q.shape
    dtype = accumulator_dtype(q.dtype)
    out = q.new_zeros((batch, len_q, heads, v_cache.shape[3]))
    lse = torch.full((batch, heads, len_q), -torch.inf, dtype=dtype, device=q.device)
    if batch * len_q * heads == 0:
        return out, lse
    lengths = _old_lengths(cache, q)
    if cos is not None:
        steps = torch.arange(len_q, device=q.device) * (window != (-1, -1))
        q = _rotated(q, cos, sin, lengths[:, None] + steps, interleaved)
    slopes = None if alibi_slopes is None else alibi_slopes.expand(batch, heads).to(dtype)
    for b in range(batch):
        total = lengths[b] + new
        keys, values, is_key = _keys_of(k_cache, v_cache, cache, b, total)
        keys, values = keys.to(dtype), values.to(dtype)
        for rows in _query_blocks(q, keys):
            i = total - len_q + torch.arange(len_q, device=q.device)[rows, None]
            distance = torch.arange(keys.shape[0], device=q.device) - i
            scores = _scores(q[b, rows].to(dtype), keys, scale, softcap)  # [H_KV, G, rows, N]
            if slopes is not None:
                bend = slopes[b].unflatten(0, scores.shape[:2])[..., None, None]
                scores = scores - bend * distance.abs()
            scores = scores.masked_fill(~(_visible(distance, window) & is_key), -torch.inf)
            block_lse = torch.logsumexp(scores, -1)
            pivot = block_lse.masked_fill(block_lse == -torch.inf, 0.0)
            probs = torch.exp(scores - pivot[..., None])
            block = torch.einsum("hgij,jhd->ihgd", probs, values)
            out[b, rows] = block.flatten(1, 2).to(q.dtype)
            lse[b, :, rows] = block_lse.flatten(0, 1)
    return out, lse


def _old_lengths(cache: Cache, like: torch.Tensor) -> torch.Tensor:
    """Keys of each sequence before the append: (B,) int64."""
    if cache.seqlens is None:
        return torch.full((like.shape[0],), cache.length, device=like.device)
    return cache.seqlens.long()


def _rotated(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor | None,
    positions: torch.Tensor,
    interleaved: bool,
) -> torch.Tensor:
    """Rotate x (B, S, H, D) to positions (B, S), in float32 at least."""
    assert sin is not None
    dtype = accumulator_dtype(x.dtype)
    positions = positions.clamp(max=cos.shape[0] - 1)
    cos, sin = (table[positions].to(dtype)[:, :, None] for table in (cos, sin))
    return rotary_reference.rotate(x.to(dtype), cos, sin, interleaved).to(x.dtype)


def _places(
    cache: Cache, positions: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of the cache where positions (B, S) of each sequence are."""
    if cache.batch_idx is None:
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
    else:
        rows = cache.batch_idx[:, None]
    if cache.block_table is None:
        return rows.expand_as(positions), positions
    return cache.block_table[rows, positions // page_size].long(), positions % page_size


def _keys_of(
    k_cache: torch.Tensor, v_cache: torch.Tensor, cache: Cache, b: int, total: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values (N, H_KV, D) of sequence b, and which count; values of the others are 0."""
    room = capacity(k_cache, cache.block_table)
    stop = min(room, int(total)) if k_cache.device.type == "cpu" else room
    n = torch.arange(stop, device=k_cache.device)
    is_key = n < total
    if cache.leftpad is not None:
        is_key = is_key & (n >= cache.leftpad[b])
    row = b if cache.batch_idx is None else cache.batch_idx[b]
    if cache.block_table is None:
        keys, values = k_cache[row][:stop], v_cache[row][:stop]
    else:
        pages = cache.block_table[row][n // k_cache.shape[1]]
        places = (torch.where(is_key, pages, 0).long(), n % k_cache.shape[1])
        keys, values = k_cache[places], v_cache[places]
    if not _are_all(is_key):
        values = values.masked_fill(~is_key[:, None, None], 0.0)
    return keys, values, is_key


def _are_all(is_key: torch.Tensor) -> bool:
    """Whether every key counts, as far as that can be known without waiting for a device."""
    return is_key.device.type == "cpu" and bool(is_key.all())


def _query_blocks(q: torch.Tensor, keys: torch.Tensor) -> Iterator[slice]:
    row_bytes = 8 * q.shape[2] * max(keys.shape[0], 1)
    step = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(0, q.shape[1], step):
        yield slice(start, min(start + step, q.shape[1]))


def _scores(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """Scaled and capped scores (H_KV, G, M, N) of queries (M, H, D)."""
    grouped = queries.unflatten(1, (keys.shape[1], -1))
    scores = torch.einsum("ihgd,jhd->hgij", grouped, keys) * scale
    return softcap * torch.tanh(scores / softcap) if softcap > 0 else scores


def _visible(distance: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """Which key each query sees, from the distance (M, N) of the key to the query."""
    left, right = window
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        visible &= distance >= -left
    if right >= 0:
        visible &= distance <= right
    return visible
