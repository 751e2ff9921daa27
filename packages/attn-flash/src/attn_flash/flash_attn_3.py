"""FlashAttention-3's functions, whose arguments differ from FlashAttention-2's in name and order.

`compat.install_as_flash_attn` puts them in the place of the module ``flash_attn_interface``. 8-bit
floats with their scales and `qv` are refused. Hints for its scheduler, `num_splits` of a call
without cache, `pack_gqa`, `sm_margin` and `scheduler_metadata`, change no result and are not needed
here. A mask is made for `attention_chunk`, in M times N memory; no kernel skips what it hides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attn_core import arguments
from attn_core.checks import (
    flag,
    require_device,
    require_dtype,
    require_rank,
    require_shape,
    require_writable,
)
from attn_core.errors import UnsupportedProblemError
from attn_flash import api, kvcache, kvcache_checks, ragged_cache
from attn_flash.checks import DTYPES, length
from attn_flash.chunks import chunk_mask
from attn_flash.ragged_queries import check_starts, check_used, unused_last

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]

_WHOLE = 2**31 - 1  # a chunk that any sequence fits in


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: None = None,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Softmax attention with FlashAttention-3's arguments, in its order.

    Parameters
    ----------
    q, k, v, softmax_scale, causal, window_size, softcap, deterministic
        As in `attn_flash.flash_attn_func`.
    qv, q_descale, k_descale, v_descale : None
        Not supported.
    attention_chunk : int, default 0
        Positions are cut into chunks of so many, and a query sees the keys of its own alone; its
        position is aligned at the bottom right. 0 for none.
    num_splits, pack_gqa, sm_margin
        Hints that change no result.
    return_attn_probs : bool, default False
        Also return lse.

    Returns
    -------
    out : Tensor, shape (B, M, H, D_v)
        Of q's dtype.
    lse : Tensor, shape (B, H, M), float32
        Only with `return_attn_probs`.

    Raises
    ------
    ValueError
        An argument does not fit; the message names it.
    UnsupportedProblemError
        An argument that must be None is not.

    Examples
    --------
    >>> import torch
    >>> from attn_flash.flash_attn_3 import flash_attn_func
    >>> q, k, v = torch.randn(3, 2, 100, 4, 64).unbind(0)
    >>> out, lse = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    >>> out.shape, lse.shape
    (torch.Size([2, 100, 4, 64]), torch.Size([2, 4, 100]))
    """
    del num_splits, pack_gqa, sm_margin
    _refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    chunk = _chunk(attention_chunk)
    out, lse, _ = api.flash_attn_func(
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        deterministic=deterministic,
        return_attn_probs=True,
        attn_bias=_dense_chunks(q, k, chunk) if chunk else None,
    )
    return (out, lse) if flag("return_attn_probs", return_attn_probs) else out


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Self-attention on queries, keys and values packed in one tensor.

    Parameters
    ----------
    qkv : Tensor, shape (B, S, 3, H, D), or (B, S, H + 2 H_KV, D) with `num_heads_q`
        Queries, keys and values; read in place.
    softmax_scale, causal, q_descale, k_descale, v_descale, window_size
        As in `flash_attn_func`.
    attention_chunk, softcap, deterministic, sm_margin, return_attn_probs
        As in `flash_attn_func`.
    num_heads_q : int, optional
        H, where qkv has four dimensions.

    Returns
    -------
    out : Tensor, shape (B, S, H, D)
        And lse with `return_attn_probs`, as in `flash_attn_func`.

    Raises
    ------
    ValueError
        An argument does not fit; the message names it.

    Examples
    --------
    >>> import torch
    >>> from attn_flash.flash_attn_3 import flash_attn_qkvpacked_func
    >>> flash_attn_qkvpacked_func(torch.randn(2, 100, 8, 64), num_heads_q=4).shape
    torch.Size([2, 100, 4, 64])
    """
    q, k, v = _unpacked(qkv, num_heads_q)
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale,
        causal,
        None,
        q_descale,
        k_descale,
        v_descale,
        window_size,
        attention_chunk,
        softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs,
    )


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: None = None,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Attention within sequences of different lengths, with FlashAttention-3's arguments.

    Parameters
    ----------
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k
        As in `attn_flash.flash_attn_varlen_func`.
    seqused_q : Tensor, shape (B,), int32, optional
        Only so many of each sequence's queries count; the others have out 0 and lse -inf.
    softmax_scale, causal, qv, q_descale, k_descale, v_descale, window_size, attention_chunk
        As in `flash_attn_func`.
    softcap, num_splits, pack_gqa, deterministic, sm_margin, return_attn_probs
        As in `flash_attn_func`.

    Returns
    -------
    out : Tensor, shape (T_q, H, D_v)
        Of q's dtype.
    lse : Tensor, shape (H, T_q), float32
        Only with `return_attn_probs`.

    Raises
    ------
    ValueError
        An argument does not fit; the message names it.
    UnsupportedProblemError
        An argument that must be None is not.

    Examples
    --------
    >>> import torch
    >>> from attn_flash.flash_attn_3 import flash_attn_varlen_func
    >>> q, k, v = torch.randn(3, 12, 4, 32).unbind(0)
    >>> starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    >>> flash_attn_varlen_func(q, k, v, starts, starts, 7, 7, causal=True).shape
    torch.Size([12, 4, 32])
    """
    del num_splits, pack_gqa, sm_margin
    _refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    chunk = _chunk(attention_chunk)
    place = None
    if seqused_q is not None:
        require_rank("q", q, "(T_q, H, D)")
        check_starts("cu_seqlens_q", cu_seqlens_q, "q", q)
        check_used("seqused_q", seqused_q, "cu_seqlens_q", cu_seqlens_q)
        token, place, cu_seqlens_q = unused_last(cu_seqlens_q, seqused_q, q.shape[0])
        q = q.index_select(0, token)
    mask = None
    if chunk:
        size = length("max_seqlen_q", max_seqlen_q), length("max_seqlen_k", max_seqlen_k)
        mask = _ragged_chunks(q, k, cu_seqlens_q, cu_seqlens_k, seqused_k, size, chunk)
    out, lse, _ = api.flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        deterministic=deterministic,
        return_attn_probs=True,
        seqused_k=seqused_k,
        attn_bias=mask,
    )
    if place is not None:
        out, lse = out.index_select(0, place), lse.index_select(1, place)
    return (out, lse) if flag("return_attn_probs", return_attn_probs) else out


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    qv: None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: torch.Tensor | None = None,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Any = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Append new keys and values to a cache in place, and attend with q to all of it.

    Parameters
    ----------
    q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx
        As in `attn_flash.flash_attn_with_kvcache`.
    cache_leftpad, softmax_scale, causal, window_size, softcap, rotary_interleaved, num_splits
        As there.
    page_table : Tensor, shape (B, max_pages), int32, optional
        What is called `block_table` there.
    cu_seqlens_q, cu_seqlens_k_new : Tensor, shape (B + 1,), int32, optional
        Queries (T_q, H, D), and new keys and values (T_new, H_KV, D), of all sequences lie one
        after the other.
    max_seqlen_q : int, optional
        At least the number of queries of every sequence; needed with `cu_seqlens_q`.
    rotary_seqlens : Tensor, shape (B,), int32, optional
        The position that the first new token of each sequence is rotated to, in place of
        `cache_seqlens`.
    qv, q_descale, k_descale, v_descale, attention_chunk
        As in `flash_attn_func`.
    scheduler_metadata, pack_gqa, sm_margin
        Hints that change no result.
    return_softmax_lse : bool, default False
        Also return lse, and None twice for the parts that FlashAttention-3 hands out.

    Returns
    -------
    out : Tensor, shape (B, M, H, D_v)
        Of q's dtype.
    lse : Tensor, shape (B, H, M), float32
        Only with `return_softmax_lse`.
    out_partial, lse_partial : None
        Only with `return_softmax_lse`.

    Raises
    ------
    ValueError
        An argument does not fit; the message names it.
    UnsupportedProblemError
        An argument that must be None is not.

    Examples
    --------
    >>> import torch
    >>> from attn_flash.flash_attn_3 import flash_attn_with_kvcache
    >>> k_cache, v_cache = torch.zeros(2, 3, 512, 4, 64).unbind(0)
    >>> flash_attn_with_kvcache(torch.randn(3, 1, 16, 64), k_cache, v_cache).shape
    torch.Size([3, 1, 16, 64])
    """
    del scheduler_metadata, pack_gqa, sm_margin
    return_softmax_lse = flag("return_softmax_lse", return_softmax_lse)
    _refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    chunk = _chunk(attention_chunk)
    options: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
    }
    rotary = (rotary_cos, rotary_sin, rotary_interleaved)
    place = (cache_seqlens, cache_batch_idx, cache_leftpad, page_table)
    is_ragged = cu_seqlens_q is not None or cu_seqlens_k_new is not None
    if is_ragged or chunk or (rotary_cos is not None and rotary_seqlens is not None):
        ragged = (cu_seqlens_q, cu_seqlens_k_new, max_seqlen_q, rotary_seqlens)
        out, lse = _composed(q, k_cache, v_cache, k, v, rotary, place, ragged, chunk, options)
    else:
        out, lse = kvcache.flash_attn_with_kvcache(
            *(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, *place),
            **options,
            rotary_interleaved=rotary_interleaved,
            num_splits=num_splits,
            return_softmax_lse=True,
        )
    return (out, lse, None, None) if return_softmax_lse else out


def _composed(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    rotary: tuple[torch.Tensor | None, torch.Tensor | None, bool],
    place: tuple[Any, ...],
    ragged: tuple[Any, ...],
    chunk: int,
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate, write to the cache and attend to its pages, one step after the other."""
    cache_seqlens, batch_idx, leftpad, page_table = place
    starts_q, starts_new, max_seqlen_q, rotary_seqlens = ragged
    capacity = kvcache_checks.capacity(k_cache, page_table)
    seqlens, number = kvcache_checks.cache_length(cache_seqlens, k, capacity)
    cache = kvcache_checks.Cache(seqlens, number, batch_idx, leftpad, page_table)
    ragged_cache.check(q, k_cache, v_cache, k, v, cache, starts_q, starts_new)
    batch = q.shape[0] if starts_q is None else starts_q.shape[0] - 1
    lengths = seqlens
    if lengths is None:
        lengths = torch.full((batch,), number, dtype=torch.int32, device=q.device)
    if rotary_seqlens is not None:
        ragged_cache.check_positions(rotary_seqlens, batch, q, rotary[0])
    kvcache_checks.check_pair(*rotary[:2])
    if rotary[0] is not None:
        first = lengths if rotary_seqlens is None else rotary_seqlens
        window = arguments.window(options["causal"], options["window_size"])
        advances = kvcache_checks.binding_window(window, capacity) != (-1, -1)
        q = ragged_cache.rotated("q", q, rotary, first, starts_q, advances=advances)
        k = ragged_cache.rotated("k", k, rotary, first, starts_new, advances=True)
    if k is not None and v is not None:
        ragged_cache.append(k, v, k_cache, v_cache, cache, lengths, starts_new)
        lengths = lengths + (k.shape[1] if starts_new is None else starts_new.diff())
    over_cache = ragged_cache.over_cache(
        q, k_cache, v_cache, cache, lengths, starts_q, max_seqlen_q, chunk
    )
    out, lse, _ = api.flash_attn_varlen_func(**over_cache, **options, return_attn_probs=True)
    if starts_q is not None:
        return out, lse
    whole = q.shape[:2]
    return out.unflatten(0, whole), lse.unflatten(1, whole).transpose(0, 1)


def flash_attn_combine(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention to disjoint parts of the keys; differentiable.

    Parameters
    ----------
    out_partial : Tensor, shape (S, B, M, H, D) or (S, T, H, D)
        Output over each of S parts, normalised over that part.
    lse_partial : Tensor, shape (S, B, M, H) or (S, T, H)
        Log-sum-exp of its scores; -inf where a query sees no key of the part.
    out : Tensor, shape (B, M, H, D) or (T, H, D), optional
        Where to write the output.
    out_dtype : torch.dtype, optional
        Of the output; that of `out_partial` by default.

    Returns
    -------
    out : Tensor, shape (B, M, H, D) or (T, H, D)
        0 where no part has a key.
    lse : Tensor, shape (B, M, H) or (T, H)
        Of the whole; -inf where no part has a key.

    Raises
    ------
    ValueError
        A shape does not fit; the message names it.

    Examples
    --------
    >>> import torch
    >>> from attn_flash.flash_attn_3 import flash_attn_combine
    >>> out, lse = flash_attn_combine(torch.ones(3, 1, 5, 2, 8), torch.zeros(3, 1, 5, 2))
    >>> out.unique().item(), round(lse[0, 0, 0].exp().item(), 4)
    (1.0, 3.0)
    """
    symbols = "(S, T, H, D)" if getattr(out_partial, "ndim", 0) == 4 else "(S, B, M, H, D)"
    require_rank("out_partial", out_partial, symbols)
    require_dtype("out_partial", out_partial, DTYPES)
    require_shape("lse_partial", lse_partial, symbols[:-4] + ")", out_partial.shape[:-1])
    require_dtype("lse_partial", lse_partial, DTYPES)
    require_device("lse_partial", lse_partial, "out_partial", out_partial)
    if out_dtype not in (None, *DTYPES):
        raise ValueError(f"out_dtype must be a floating dtype or None, got {out_dtype!r}")
    lse = torch.logsumexp(lse_partial, 0)
    weights = torch.exp(lse_partial - lse.masked_fill(lse == -torch.inf, 0.0))
    merged = (weights[..., None] * out_partial).sum(0).to(out_dtype or out_partial.dtype)
    if out is None:
        return merged, lse
    require_shape("out", out, "(B, M, H, D)", merged.shape)
    require_writable("out", out)
    return out.copy_(merged), lse


def get_scheduler_metadata(*args: Any, **kwargs: Any) -> None:
    """Prepare nothing: lengths are read where attention is computed.

    Parameters
    ----------
    *args, **kwargs
        As in FlashAttention-3.

    Examples
    --------
    >>> from attn_flash.flash_attn_3 import get_scheduler_metadata
    >>> get_scheduler_metadata(1, 1, 512, 16, 4, 64) is None
    True
    """


def _refuse(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise UnsupportedProblemError(f"{name} must be None, got {type(value).__name__}")


def _chunk(value: Any) -> int:
    return min(length("attention_chunk", value), _WHOLE)


def _dense_chunks(q: torch.Tensor, k: torch.Tensor, chunk: int) -> torch.Tensor:
    require_rank("q", q, "(B, M, H, D)")
    require_rank("k", k, "(B, N, H_KV, D)")
    size = (q.shape[1], k.shape[1])
    return chunk_mask(chunk, *size, size, q.device)


def _ragged_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    starts_q: torch.Tensor,
    starts_k: torch.Tensor,
    used: torch.Tensor | None,
    size: tuple[int, int],
    chunk: int,
) -> torch.Tensor:
    require_rank("k", k, "(T_k, H_KV, D)")
    check_starts("cu_seqlens_q", starts_q, "q", q)
    check_starts("cu_seqlens_k", starts_k, "k", k)
    require_shape("cu_seqlens_k", starts_k, "(B + 1,)", starts_q.shape)
    if used is not None:
        check_used("seqused_k", used, "cu_seqlens_k", starts_k)
    counts_q, counts_k = starts_q.diff(), starts_k.diff() if used is None else used
    return chunk_mask(chunk, counts_q[:, None, None], counts_k[:, None, None], size, q.device)


def _unpacked(qkv: torch.Tensor, num_heads_q: int | None) -> Sequence[torch.Tensor]:
    if num_heads_q is None:
        require_rank("qkv", qkv, "(B, S, 3, H, D)")
        require_shape("qkv", qkv, "(B, S, 3, H, D)", (*qkv.shape[:2], 3, *qkv.shape[3:]))
        return qkv.unbind(2)
    require_rank("qkv", qkv, "(B, S, H + 2 H_KV, D)")
    heads = length("num_heads_q", num_heads_q)
    heads_kv, rest = divmod(qkv.shape[2] - heads, 2)
    if rest or heads_kv < 1:
        raise ValueError(
            f"qkv must have num_heads_q + 2 H_KV heads along dimension 2, got {qkv.shape[2]} heads "
            f"and num_heads_q = {heads}"
        )
    parts: Sequence[torch.Tensor] = qkv.split((heads, heads_kv, heads_kv), 2)
    return parts
