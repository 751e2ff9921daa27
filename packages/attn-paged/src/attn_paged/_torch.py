"""Backend "torch": right on every device torch has.

Queries are cut into tiles of one sequence each, whose number follows from shapes alone, and the
keys of each tile's sequence are gathered from the cache. So nothing is read back from the device,
and the memory of one step is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from attn_core.dtypes import accumulator_dtype
from attn_paged.options import AppendOptions, AttentionOptions, largest
from attn_paged.reference import rotate

_CHUNK_BYTES = 1 << 27  # of gathered keys, values and scores
_MAX_TILE_ROWS = 64


class _Tiles(NamedTuple):
    """Tiles of M consecutive queries of one sequence."""

    sequence: torch.Tensor  # [tiles]
    rows: torch.Tensor  # [tiles, M], row of q, or T where the tile has no query
    positions: torch.Tensor  # [tiles, M], of the query in its sequence


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q (T, H, D) over paged sequences: out (T, H, D_v) and lse (H, T)."""
    if options.batch_invariant:
        return _each_alone(q, k_cache, v_cache, block_tables, context_lens, options)
    tokens, heads, _ = q.shape
    heads_kv, head_dim_v = v_cache.shape[2:]
    dtype = accumulator_dtype(q.dtype)
    # One row more than q has takes what tiles compute past the end of their sequence.
    out = q.new_zeros((tokens + 1, heads, head_dim_v))
    lse = torch.full((tokens + 1, heads), -torch.inf, dtype=dtype, device=q.device)
    if tokens == 0 or block_tables.shape[0] == 0:
        return out[:tokens], lse[:tokens].t().contiguous()

    num_keys = _num_keys(block_tables, context_lens, k_cache.shape[1])
    offs_n = torch.arange(num_keys, device=q.device)
    padded_q = torch.cat([q, q.new_zeros((1, *q.shape[1:]))])
    tiles = _tile_queries(tokens, context_lens, options.cu_seqlens_q)
    tree = _Tree.of(options, tokens, len(context_lens))
    for tile in _chunks(tiles, num_keys * _elements_per_key(q, v_cache, tiles) * dtype.itemsize):
        is_visible = _visible(tile, tokens, context_lens, offs_n, options)  # [C, M, N]
        if tree is not None:
            is_visible &= tree.visible(tile, context_lens, offs_n)
        is_read = is_visible.any(1)  # [C, N]
        tables = block_tables[tile.sequence]
        keys = _gather(k_cache, options.k_scale, tables, is_read, dtype)
        values = _gather(v_cache, options.v_scale, tables, is_read, dtype)
        scores = _scores(padded_q[tile.rows].to(dtype), keys, options.scale, options.softcap)
        if options.alibi_slopes is not None:
            slopes = options.alibi_slopes.expand(context_lens.shape[0], heads)[tile.sequence]
            scores = scores + _alibi(slopes.to(dtype), tile.positions, offs_n, heads_kv)
        scores = scores.masked_fill(~is_visible[:, :, None, None], -torch.inf)
        tile_out, tile_lse = _softmax(scores, values, options.sinks)
        out[tile.rows] = tile_out.flatten(2, 3).to(q.dtype)
        lse[tile.rows] = tile_lse.flatten(2, 3)
    return out[:tokens], lse[:tokens].t().contiguous()


def append_to_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    options: AppendOptions,
) -> None:
    """Write k (T, H_KV, D) and v (T, H_KV, D_v) to their slots; a negative slot skips its token."""
    tokens, block_size = k.shape[0], k_cache.shape[1]
    if tokens == 0:
        return
    # Dropping skipped tokens would make a shape depend on data and wait for the device. Instead a
    # skipped token repeats the write of a kept one, or, where none is kept, what slot 0 holds.
    is_kept = slot_mapping >= 0
    any_kept = is_kept.any()
    own = torch.arange(tokens, device=k.device)
    source = torch.where(is_kept, own, is_kept.to(torch.int32).argmax())
    slots = slot_mapping[source].long().clamp(min=0)
    index = (slots // block_size, slots % block_size)
    if options.rotary is not None:
        cos, sin, positions, interleaved = options.rotary
        kept = positions[source].long()  # the position of a skipped token may be any number
        k = rotate(k, cos[kept][:, None], sin[kept][:, None], interleaved=interleaved)
    for rows, cache, scale in ((k, k_cache, options.k_scale), (v, v_cache, options.v_scale)):
        numbers, scales = rows, None
        if scale is not None:
            numbers, scales = _quantise(rows, scale, cache.dtype)
        _put(cache, index, numbers, source, any_kept)
        if scale is not None and scales is not None:
            _put(scale, index, scales, source, any_kept)


def _put(
    cache: torch.Tensor,
    index: tuple[torch.Tensor, torch.Tensor],
    rows: torch.Tensor,
    source: torch.Tensor,
    any_kept: torch.Tensor,
) -> None:
    """Write the `source` rows to their slots; bytes, as torch 2.6 does not index float8."""
    if cache.dtype == torch.float8_e4m3fn:
        cache, rows = cache.view(torch.uint8), rows.view(torch.uint8)
    cache[index] = torch.where(any_kept, rows[source], cache[index])


def _quantise(
    rows: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Numbers that stand for rows (T, H_KV, D), and their scales (T, H_KV) unless given."""
    rows = rows.float()
    limit = largest(dtype)
    if scale.ndim < 3:
        divisor, scales = scale.expand(rows.shape[1]), None
    else:
        peak = rows.abs().amax(-1)
        divisor = scales = torch.where(peak > 0, peak / limit, 1.0)
    numbers = (rows / divisor[..., None]).clamp(-limit, limit)
    return (numbers if dtype.is_floating_point else numbers.round()).to(dtype), scales


def _each_alone(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence after the other, so that no one's sums depend on its neighbours."""
    out = q.new_zeros((*q.shape[:2], v_cache.shape[3]))
    lse = q.new_full(q.shape[1::-1], -torch.inf, dtype=accumulator_dtype(q.dtype))
    bounds = list(range(len(q) + 1))
    if options.cu_seqlens_q is not None:
        bounds = options.cu_seqlens_q.tolist()
    starts = accumulate(((stop - start) ** 2 for start, stop in pairwise(bounds)), initial=0)
    for b, tree_start in zip(range(len(context_lens)), starts, strict=False):
        rows, row = slice(bounds[b], bounds[b + 1]), slice(b, b + 1)
        count = rows.stop - rows.start
        slopes, tree = options.alibi_slopes, options.tree_mask
        if tree is not None:
            tree = tree[rows] if tree.ndim == 2 else tree[tree_start : tree_start + count**2]
        alone = options._replace(
            batch_invariant=False,
            cu_seqlens_q=torch.tensor([0, count], dtype=torch.int32, device=q.device),
            alibi_slopes=slopes[row] if slopes is not None and slopes.ndim == 2 else slopes,
            is_causal=None if options.is_causal is None else options.is_causal[row],
            tree_mask=tree,
        )
        out[rows], lse[:, rows] = attention(
            q[rows], k_cache, v_cache, block_tables[row], context_lens[row], alone
        )
    return out, lse


def _num_keys(block_tables: torch.Tensor, context_lens: torch.Tensor, block_size: int) -> int:
    """Keys to look at: all that the table has room for, or on the CPU those of the longest."""
    capacity: int = block_tables.shape[1] * block_size
    if context_lens.device.type != "cpu":
        return capacity
    return min(capacity, int(context_lens.max()))


def _tile_queries(
    tokens: int, context_lens: torch.Tensor, cu_seqlens_q: torch.Tensor | None
) -> _Tiles:
    sequences = context_lens.shape[0]
    device = context_lens.device
    if cu_seqlens_q is None:
        each = torch.arange(sequences, device=device)
        return _Tiles(each, each[:, None], context_lens[:, None].long() - 1)
    size = min(_MAX_TILE_ROWS, -(-tokens // sequences))
    starts, lens = cu_seqlens_q[:-1], cu_seqlens_q.diff()
    counts = (lens + size - 1) // size
    ends = counts.cumsum(0)
    tile = torch.arange((tokens + sequences * (size - 1)) // size, device=device)
    # Tiles beyond the last one needed count as further tiles of the last sequence: without queries.
    sequence = torch.searchsorted(ends, tile, right=True).clamp(max=sequences - 1)
    first = (tile - (ends - counts)[sequence]) * size
    i = first[:, None] + torch.arange(size, device=device)
    lens = lens[sequence, None]
    rows = torch.where(i < lens, starts[sequence, None] + i, tokens)
    return _Tiles(sequence, rows, context_lens[sequence, None] - lens + i)


def _elements_per_key(q: torch.Tensor, v_cache: torch.Tensor, tiles: _Tiles) -> int:
    """Numbers that a tile holds at once for each key of its sequence."""
    heads_kv, head_dim_v = v_cache.shape[2:]
    gathered: int = 2 * heads_kv * (q.shape[2] + head_dim_v)
    scores: int = 3 * q.shape[1] * tiles.rows.shape[1]
    return gathered + scores


def _chunks(tiles: _Tiles, tile_bytes: int) -> Iterator[_Tiles]:
    step = max(1, _CHUNK_BYTES // max(tile_bytes, 1))
    for start in range(0, tiles.sequence.shape[0], step):
        yield _Tiles(*(part[start : start + step] for part in tiles))


def _visible(
    tile: _Tiles,
    tokens: int,
    context_lens: torch.Tensor,
    offs_n: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    """Which key each query of a tile sees, but for the tree: (C, M, N) bool."""
    left, right = options.window
    positions = tile.positions[:, :, None]
    mask = (offs_n < context_lens[tile.sequence, None, None]) & (tile.rows < tokens)[:, :, None]
    if left >= 0:
        mask = mask & (offs_n >= positions - left)
    if right >= 0:
        mask = mask & (offs_n <= positions + right)
    if options.is_causal is not None:
        mask = mask & ((offs_n <= positions) | ~options.is_causal[tile.sequence, None, None])
    return mask


class _Tree(NamedTuple):
    """A tree mask as a flat tensor, and where in it the row of each query begins."""

    flat: torch.Tensor
    starts: torch.Tensor  # [T + 1], of the row of each query of q
    widths: torch.Tensor  # [B], how many of a sequence's last keys its rows are about

    @staticmethod
    def of(options: AttentionOptions, tokens: int, sequences: int) -> _Tree | None:
        mask, bounds = options.tree_mask, options.cu_seqlens_q
        if mask is None:
            return None
        token = torch.arange(tokens + 1, device=mask.device)
        if mask.ndim == 2:
            width = mask.shape[1]
            widths = token.new_full((sequences,), width)
            return _Tree(mask.flatten(), token * width, widths)
        if bounds is None:
            return _Tree(mask, token, token.new_ones(sequences))
        lens = bounds.diff().long()
        sequence = torch.searchsorted(bounds[1:], token, right=True).clamp(max=sequences - 1)
        before = (lens**2).cumsum(0)[sequence] - lens[sequence] ** 2
        return _Tree(mask, before + (token - bounds[sequence]) * lens[sequence], lens)

    def visible(
        self, tile: _Tiles, context_lens: torch.Tensor, offs_n: torch.Tensor
    ) -> torch.Tensor:
        """Which key the tree leaves each query of a tile: (C, M, N) bool."""
        width = self.widths[tile.sequence, None, None]
        column = offs_n - context_lens[tile.sequence, None, None] + width
        is_about = (column >= 0) & (column < width)
        entry = (self.starts[tile.rows][:, :, None] + column).clamp(0, max(len(self.flat) - 1, 0))
        if len(self.flat) == 0:
            return ~is_about
        return self.flat[entry].bool() | ~is_about


def _gather(
    cache: torch.Tensor,
    scale: torch.Tensor | None,
    tables: torch.Tensor,
    is_read: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Keys or values (C, N, H_KV, D) by tables (C, max_blocks); 0 where no one sees them."""
    block_size = cache.shape[1]
    offs_n = torch.arange(is_read.shape[1], device=tables.device)
    blocks = torch.where(is_read, tables[:, offs_n // block_size], 0)
    slots = (offs_n % block_size).expand_as(blocks)
    if cache.dtype == torch.float8_e4m3fn:  # torch 2.6 does not index it
        rows = cache.view(torch.uint8)[blocks, slots].view(cache.dtype).to(dtype)
    else:
        rows = cache[blocks, slots].to(dtype)
    if scale is not None:
        rows = rows * scale.expand(cache.shape[:3])[blocks, slots].to(dtype)[..., None]
    return rows.masked_fill(~is_read[..., None, None], 0.0)


def _scores(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """Scaled and capped scores (C, M, H_KV, G, N) of queries (C, M, H, D)."""
    grouped = torch.unflatten(queries, 2, (keys.shape[2], -1))
    scores = torch.einsum("cmhgd,cnhd->cmhgn", grouped, keys) * scale
    return softcap * torch.tanh(scores / softcap) if softcap > 0 else scores


def _alibi(
    slopes: torch.Tensor, positions: torch.Tensor, offs_n: torch.Tensor, heads_kv: int
) -> torch.Tensor:
    """Bias (C, M, H_KV, G, N) of slopes (C, H)."""
    distance = (positions[:, :, None] - offs_n).abs()  # [C, M, N]
    slopes = torch.unflatten(slopes, 1, (heads_kv, -1))[:, None, :, :, None]
    return -slopes * distance[:, :, None, None]


def _softmax(
    scores: torch.Tensor, values: torch.Tensor, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs (C, M, H_KV, G, D_v) and their lse (C, M, H_KV, G)."""
    lse = torch.logsumexp(scores, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse).reshape(lse.shape[2:]))
    pivot = lse.masked_fill(lse == -torch.inf, 0.0)  # a number also where a query sees no key
    probs = torch.exp(scores - pivot[..., None])
    return torch.einsum("cmhgn,cnhd->cmhgd", probs, values), lse
