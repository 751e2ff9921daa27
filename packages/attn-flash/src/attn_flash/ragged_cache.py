"""Attention over a KV cache where queries and new keys are ragged, or queries see chunks.

FlashAttention-3 has it. It is composed here of a rotation, a write to the cache and attention over
pages; no length is read back from the device.
"""

from __future__ import annotations

from typing import Any

import torch

from attn_core.arguments import require_no_grad
from attn_core.checks import (
    flag,
    may_read_values,
    require_device,
    require_dtype,
    require_rank,
    require_shape,
)
from attn_flash import kvcache_checks
from attn_flash.checks import length
from attn_flash.chunks import chunk_mask
from attn_flash.kvcache_checks import Cache
from attn_flash.layers.rotary import apply_rotary_emb
from attn_flash.ragged_queries import Tokens, check_starts, tokens_of
from attn_flash.rotary_checks import check_tables, require_values


def rotated(
    name: str,
    x: torch.Tensor | None,
    rotary: tuple[torch.Tensor | None, torch.Tensor | None, bool],
    first: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    *,
    advances: bool,
) -> torch.Tensor:
    """Rotate tokens (B, S, H, D) or (T, H, D): those of sequence b from position first[b] on.

    Without `advances` they all go to that position.
    """
    cos, sin, interleaved = rotary
    if x is None or cos is None or sin is None:
        missing = name if x is None else "rotary_sin"
        raise ValueError(f"{missing} must be given with rotary_cos, got None")
    check_tables("rotary_cos", cos, "rotary_sin", sin, name, x)
    interleaved = flag("rotary_interleaved", interleaved)
    tokens, flat = _flattened(x, cu_seqlens)
    positions = first[tokens.sequence] + (tokens.offset if advances else 0)
    positions = torch.where(tokens.is_real, positions, 0)
    turned = apply_rotary_emb(flat[:, None], cos, sin, interleaved, seqlen_offsets=positions)
    return turned.view(x.shape)


def check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cache: Cache,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k_new: torch.Tensor | None,
) -> None:
    """Check the tensors as `flash_attn_with_kvcache` does; ragged ones count as one token each."""
    if cu_seqlens_q is not None:
        require_rank("q", q, "(T_q, H, D)")
        check_starts("cu_seqlens_q", cu_seqlens_q, "q", q)
        require_no_grad(kvcache_checks.WHAT, q=q)
        q = q.new_empty((cu_seqlens_q.shape[0] - 1, 1, *q.shape[1:]))
    if cu_seqlens_k_new is not None:
        if k is None or v is None:
            raise ValueError("k and v must be given with cu_seqlens_k_new, got None")
        require_rank("k", k, "(T_new, H_KV, D)")
        require_rank("v", v, "(T_new, H_KV, D_v)")
        check_starts("cu_seqlens_k_new", cu_seqlens_k_new, "k", k)
        require_shape("cu_seqlens_k_new", cu_seqlens_k_new, "(B + 1,)", (q.shape[0] + 1,))
        require_shape("v", v, "(T_new, H_KV, D_v)", (*k.shape[:2], v.shape[-1]))
        require_no_grad(kvcache_checks.WHAT, k=k, v=v)
        k, v = (x.new_empty((q.shape[0], 0, *x.shape[1:])) for x in (k, v))
    kvcache_checks.kvcache_problem(
        q, k_cache, v_cache, k, v, None, None, cache, None, (-1, -1), 0.0
    )


def check_positions(
    first: torch.Tensor, batch: int, q: torch.Tensor, cos: torch.Tensor | None
) -> None:
    """Check where the new tokens of each sequence are rotated to."""
    require_shape("rotary_seqlens", first, "(B,)", (batch,))
    require_dtype("rotary_seqlens", first, (torch.int32, torch.int64))
    require_device("rotary_seqlens", first, "q", q)
    if isinstance(cos, torch.Tensor) and cos.dim() == 2 and may_read_values(q):
        require_values("rotary_seqlens", first, 0, len(cos) - 1)


def append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache: Cache,
    lengths: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
) -> None:
    """Write new keys and values behind those of each sequence, in place."""
    tokens, keys = _flattened(k, cu_seqlens)
    _, values = _flattened(v, cu_seqlens)
    if len(keys) == 0:
        return
    # A token of no sequence does what the first one does: writes it again, or nothing new.
    same = torch.where(tokens.is_real, torch.arange(len(keys), device=k.device), 0)
    sequence, offset, is_real = (x[same] for x in tokens)
    table, page_size = _table(k_cache, cache, len(lengths)), k_cache.shape[1]
    position = (lengths[sequence] + offset).clamp(max=table.shape[1] * page_size - 1)
    where = (table[sequence, position // page_size].long(), position % page_size)
    for new, slots in ((keys, k_cache), (values, v_cache)):
        slots.index_put_(where, torch.where(is_real[:, None, None], new[same], slots[where]))


def over_cache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache: Cache,
    lengths: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int | None,
    chunk: int,
) -> dict[str, Any]:
    """Arguments of `flash_attn_varlen_func` for the first `lengths` keys of each sequence."""
    pages = _table(k_cache, cache, len(lengths))
    room = pages.shape[1] * k_cache.shape[1]
    leftpad = cache.leftpad
    if leftpad is not None:
        k_cache, v_cache = (
            _without_leftpad(x, pages, lengths, leftpad) for x in (k_cache, v_cache)
        )
        lengths = (lengths - leftpad).clamp(min=0)
    if cu_seqlens_q is None:
        batch, max_seqlen_q = q.shape[:2]
        cu_seqlens_q = max_seqlen_q * torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        q = q.flatten(0, 1)
    max_seqlen_q = length("max_seqlen_q", max_seqlen_q)
    mask = None
    if chunk:
        counts = cu_seqlens_q.diff()[:, None, None], lengths[:, None, None]
        mask = chunk_mask(chunk, *counts, (max_seqlen_q, room), q.device)
    return {
        "q": q,
        "k": k_cache,
        "v": v_cache,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": room * torch.arange(len(cu_seqlens_q), dtype=torch.int32, device=q.device),
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": room,
        "block_table": pages if leftpad is None else None,
        "seqused_k": lengths,
        "attn_bias": mask,
    }


def _without_leftpad(
    x: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, leftpad: torch.Tensor
) -> torch.Tensor:
    """Keys of each sequence from its first that counts on, (B room, H_KV, D)."""
    page_size = x.shape[1]
    place = torch.arange(table.shape[1] * page_size, device=x.device) + leftpad[:, None]
    place = torch.where(place < lengths[:, None], place, 0)  # [B, room]
    page = table.gather(1, place // page_size).long()
    return x[page, place % page_size].flatten(0, 1)


def _flattened(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> tuple[Tokens, torch.Tensor]:
    """Tokens of a batch one after the other, (T, H, D)."""
    if cu_seqlens is not None:
        return tokens_of(cu_seqlens, x.shape[0]), x
    batch, count = x.shape[:2]
    starts = count * torch.arange(batch + 1, device=x.device)
    return tokens_of(starts, batch * count), x.flatten(0, 1)


def _table(k_cache: torch.Tensor, cache: Cache, batch: int) -> torch.Tensor:
    """The pages of each sequence (B, max_pages); a cache that is not paged has one for each."""
    rows = cache.batch_idx
    if cache.block_table is not None:
        return cache.block_table[:batch] if rows is None else cache.block_table[rows.long()]
    if rows is None:
        rows = torch.arange(batch, device=k_cache.device)
    return rows.to(torch.int32)[:, None]
