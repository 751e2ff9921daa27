"""FlashAttention-3's functions, whose arguments differ from FlashAttention-2's in name and order.

`compat.install_as_flash_attn` puts them in the place of the module ``flash_attn_interface``. What
FlashAttention-3 has of features that FlashAttention-2 has not is refused: 8-bit floats with their
scales, `qv`, `attention_chunk`, and ragged queries over a cache. Hints for its scheduler,
`num_splits` of a call without cache, `pack_gqa`, `sm_margin` and `scheduler_metadata`, change no
result and are not needed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attn_core.checks import (
    flag,
    is_number,
    require_dtype,
    require_rank,
    require_shape,
    require_writable,
)
from attn_core.errors import UnsupportedProblemError
from attn_flash import api, kvcache
from attn_flash.checks import DTYPES, length

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]


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
        Must be 0.
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
    _refuse_chunks(attention_chunk)
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
    seqused_q: None = None,
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
    seqused_q : None
        Not supported.
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
    _refuse(seqused_q=seqused_q, qv=qv)
    _refuse(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    _refuse_chunks(attention_chunk)
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
    )
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
    cu_seqlens_q: None = None,
    cu_seqlens_k_new: None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: None = None,
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
    cu_seqlens_q, cu_seqlens_k_new, rotary_seqlens : None
        Not supported.
    qv, q_descale, k_descale, v_descale, attention_chunk
        As in `flash_attn_func`.
    max_seqlen_q, scheduler_metadata, pack_gqa, sm_margin
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
    del max_seqlen_q, scheduler_metadata, pack_gqa, sm_margin
    return_softmax_lse = flag("return_softmax_lse", return_softmax_lse)
    _refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    _refuse(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k_new=cu_seqlens_k_new)
    _refuse(rotary_seqlens=rotary_seqlens)
    _refuse_chunks(attention_chunk)
    out, lse = kvcache.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos,
        rotary_sin,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        page_table,
        softmax_scale,
        causal,
        window_size,
        softcap,
        rotary_interleaved,
        num_splits=num_splits,
        return_softmax_lse=True,
    )
    return (out, lse, None, None) if return_softmax_lse else out


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


def _refuse_chunks(attention_chunk: int) -> None:
    if not is_number(attention_chunk) or attention_chunk != 0:
        raise UnsupportedProblemError(f"attention_chunk must be 0, got {attention_chunk!r}")


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
