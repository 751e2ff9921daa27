"""Backend "torch" of attention with a KV cache: right on every device torch has.

One sequence after the other. On the CPU the keys it has are given to backend "torch" of attention,
which knows torch's own kernel; elsewhere all that the cache has room for is looked at, with what
does not count masked, so that nothing is read back.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attn_core.dtypes import accumulator_dtype
from attn_flash import _torch, rotary_reference
from attn_flash.kvcache_checks import Cache, capacity
from attn_flash.options import Options

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
    options = Options(
        alibi_slopes=None if alibi_slopes is None else alibi_slopes.expand(batch, heads),
        scale=scale,
        window_left=window[0],
        window_right=window[1],
        softcap=softcap,
    )
    attend = _attend_to_keys if q.device.type == "cpu" else _attend_to_room
    for b in range(batch):
        own = options
        if options.alibi_slopes is not None:
            own = options._replace(alibi_slopes=options.alibi_slopes[b : b + 1])
        out[b], lse[b] = attend(q[b], k_cache, v_cache, cache, b, lengths[b] + new, own)
    return out, lse


def _attend_to_keys(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache: Cache,
    b: int,
    total: torch.Tensor,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with q (M, H, D) to the keys of sequence b alone: out (M, H, D_v) and lse (H, M)."""
    # Compiled calls come with values that nobody has checked.
    stop = min(max(int(total), 0), capacity(k_cache, cache.block_table))
    start = 0 if cache.leftpad is None else min(max(int(cache.leftpad[b]), 0), stop)
    row = b if cache.batch_idx is None else int(cache.batch_idx[b])
    if cache.block_table is None:
        keys, values = k_cache[row, start:stop], v_cache[row, start:stop]
    else:
        n = torch.arange(start, stop)
        places = (cache.block_table[row][n // k_cache.shape[1]].long(), n % k_cache.shape[1])
        keys, values = k_cache[places], v_cache[places]
    options = options.bound(q[None], keys[None])
    out, lse = _torch.attention(q[None], keys[None], values[None], options)
    return out[0], lse[0]


def _attend_to_room(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache: Cache,
    b: int,
    total: torch.Tensor,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do the same without reading anything back."""
    len_q, heads, _ = q.shape
    dtype = accumulator_dtype(q.dtype)
    keys, values, is_key = _keys_of(k_cache, v_cache, cache, b, total)
    keys, values = keys.to(dtype), values.to(dtype)
    out = q.new_empty((len_q, heads, v_cache.shape[3]))
    lse = torch.empty((heads, len_q), dtype=dtype, device=q.device)
    for rows in _query_blocks(q, keys):
        i = total - len_q + torch.arange(len_q, device=q.device)[rows, None]
        distance = torch.arange(keys.shape[0], device=q.device) - i
        scores = _scores(q[rows].to(dtype), keys, options.scale, options.softcap)
        if options.alibi_slopes is not None:
            slopes = options.alibi_slopes[0].to(dtype).unflatten(0, scores.shape[:2])
            scores = scores - slopes[..., None, None] * distance.abs()
        scores = scores.masked_fill(~(_visible(distance, options.window) & is_key), -torch.inf)
        block_lse = torch.logsumexp(scores, -1)  # [H_KV, G, rows]
        pivot = block_lse.masked_fill(block_lse == -torch.inf, 0.0)
        probs = torch.exp(scores - pivot[..., None])
        out[rows] = torch.einsum("hgij,jhd->ihgd", probs, values).flatten(1, 2).to(q.dtype)
        lse[:, rows] = block_lse.flatten(0, 1)
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
    n = torch.arange(capacity(k_cache, cache.block_table), device=k_cache.device)
    is_key = n < total
    if cache.leftpad is not None:
        is_key = is_key & (n >= cache.leftpad[b])
    row = b if cache.batch_idx is None else cache.batch_idx[b]
    if cache.block_table is None:
        keys, values = k_cache[row], v_cache[row]
    else:
        pages = cache.block_table[row][n // k_cache.shape[1]]
        places = (torch.where(is_key, pages, 0).long(), n % k_cache.shape[1])
        keys, values = k_cache[places], v_cache[places]
    return keys, values.masked_fill(~is_key[:, None, None], 0.0), is_key


def _query_blocks(q: torch.Tensor, keys: torch.Tensor) -> Iterator[slice]:
    row_bytes = 8 * q.shape[1] * max(keys.shape[0], 1)
    step = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(0, len(q), step):
        yield slice(start, min(start + step, len(q)))


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
