"""Attention over a KV cache that grows in place, with FlashAttention-2's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attn_core import arguments, backends
from attn_core.checks import flag
from attn_core.replay import repeatable
from attn_flash import kvcache_checks, kvcache_ops


@repeatable
def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    backend: str = backends.AUTO,
) -> Any:
    """Append new keys and values to a cache in place, and attend with q to all of it.

    The step of a model that generates text: rotation, append and attention in one call, with
    FlashAttention-2's arguments in its order. Any combination of them works. Lengths, indices and
    tables are read on the device, so a captured CUDA graph follows what is written to them.

    Parameters
    ----------
    q : Tensor, shape (B, M, H, D)
        Queries of the newest M tokens, float16, bfloat16 or float32 (float64 on backend "torch"). D
        from 1 to 256; any strides.
    k_cache : Tensor, shape (B_cache, S_cache, H_KV, D), or (num_pages, page_size, H_KV, D)
        Keys, of q's dtype and device; the second shape with `block_table`, any page size. Any
        strides. H must be a multiple of H_KV.
    v_cache : Tensor, shape (B_cache, S_cache, H_KV, D_v), or (num_pages, page_size, H_KV, D_v)
        Values; D_v from 1 to 256.
    k : Tensor, shape (B, S_new, H_KV, D), optional
        Keys to write to the cache, after the `cache_seqlens` that it holds.
    v : Tensor, shape (B, S_new, H_KV, D_v), optional
        Values to write; given with `k`.
    rotary_cos, rotary_sin : Tensor, shape (S_rotary, D_rotary / 2), optional
        Tables of rotary embedding, of q's dtype or float32, with a row for each position the cache
        has room for. The i-th new key is rotated by row ``cache_seqlens + i``. So is the i-th query
        where there is `causal` or a window; without either all are rotated by row `cache_seqlens`.
        Need `k`.
    cache_seqlens : int or Tensor, shape (B,), int32, optional
        Number of keys of each sequence before the append. With neither this nor `k`, every slot
        holds a key.
    cache_batch_idx : Tensor, shape (B,), int32 or int64, optional
        Entry of the cache, or row of the block table, of each sequence; by default its own number.
    cache_leftpad : Tensor, shape (B,), int32, optional
        Slot of the first key of each sequence; no query sees the slots before. Lengths, positions
        and rows of the rotary tables count them.
    block_table : Tensor, shape (B, max_pages), int32, optional
        Key j of sequence b is in slot ``j % page_size`` of page ``block_table[b, j // page_size]``.
    softmax_scale : float, default 1 / sqrt(D)
        Factor of the scores.
    causal : bool, default False
        Query i sees keys up to ``i + N - M``, where N counts the appended keys too.
    window_size : pair of int, default (-1, -1)
        Query i sees keys ``i + N - M - left`` to ``i + N - M + right``; -1 leaves a side open.
    softcap : float, default 0.0
        Where positive, scores become ``softcap * tanh(score / softcap)``.
    rotary_interleaved : bool, default True
        Rotate dimensions 2 i and 2 i + 1 together, as GPT-J does; otherwise i and
        ``i + D_rotary / 2``, as GPT-NeoX does.
    alibi_slopes : Tensor, shape (H,) or (B, H), float32, optional
        The score of key j gets ``-slope * abs(i + N - M - j)`` added.
    num_splits : int, default 0
        Number of parts into which the keys are cut, each for a program of its own; 0 chooses it
        from the shapes. Backend "torch" has no use for it.
    return_softmax_lse : bool, default False
        Also return lse.
    backend : str, default "auto"
        As in `flash_attn_func`.

    Returns
    -------
    out : Tensor, shape (B, M, H, D_v)
        Of q's dtype. A query without keys has out 0.
    lse : Tensor, shape (B, H, M), float32
        Only with `return_softmax_lse`: natural logarithm of the sum of exponentials of the scores,
        -inf for a query without keys.

    Raises
    ------
    ValueError
        A shape, dtype, device or number does not fit; the message names it. Values of tensors are
        checked on the CPU alone: reading them elsewhere would wait for the device, and happens
        where ``ATTN_CHECK_VALUES`` says so. Without it lengths beyond the room of the cache are
        cut there, and what does not fit is not written.
    UnsupportedProblemError
        A tensor requires a gradient: there is no backward pass. Or no backend computes the problem.

    References
    ----------
    Dao et al., "Flash-Decoding for long-context inference", 2023.

    Examples
    --------
    >>> import torch
    >>> from attn_flash import flash_attn_with_kvcache
    >>> k_cache, v_cache = torch.zeros(2, 3, 512, 4, 64).unbind(0)
    >>> lengths = torch.tensor([17, 0, 300], dtype=torch.int32)
    >>> q, k, v = torch.randn(3, 1, 16, 64), torch.randn(3, 1, 4, 64), torch.randn(3, 1, 4, 64)
    >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths).shape
    torch.Size([3, 1, 16, 64])
    >>> bool((k_cache[2, 300] == k[2, 0]).all())
    True
    """
    return_softmax_lse = flag("return_softmax_lse", return_softmax_lse)
    splits = kvcache_checks.num_splits(num_splits)
    capacity = kvcache_checks.capacity(k_cache, block_table)
    window = arguments.window(causal, window_size)
    window = kvcache_checks.binding_window(window, capacity)
    softcap = arguments.softcap(softcap)
    seqlens, length = kvcache_checks.cache_length(cache_seqlens, k, capacity)
    cache = kvcache_checks.Cache(seqlens, length, cache_batch_idx, cache_leftpad, block_table)
    problem = kvcache_checks.kvcache_problem(
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos,
        rotary_sin,
        cache,
        alibi_slopes,
        window,
        softcap,
    )
    scale = arguments.softmax_scale(softmax_scale, problem.head_dim)
    rotary = (rotary_cos, rotary_sin, flag("rotary_interleaved", rotary_interleaved))
    name = backends.resolve(kvcache_ops.ATTENTION, problem, backend)
    if k is not None:
        kvcache_ops.append(k, v, k_cache, v_cache, *rotary, *cache, name)
    out, lse = kvcache_ops.attention(
        q,
        k_cache,
        v_cache,
        *rotary,
        *cache,
        alibi_slopes,
        problem.new,
        scale,
        *window,
        softcap,
        splits,
        name,
    )
    return (out, lse) if return_softmax_lse else out
