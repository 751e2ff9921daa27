"""The public functions: each validates its arguments, resolves a backend and calls the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attn_core import backends
from attn_core.checks import (
    flag,
    require_dtype,
    require_like,
    require_range,
    require_rank,
    require_tensor,
)
from attn_core.dropout import keep_mask
from attn_core.replay import repeatable
from attn_flash import checks, ops
from attn_flash.options import Options
from attn_flash.paging import gathered

OPEN_WINDOW = (-1, -1)


@repeatable
def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = OPEN_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attn_bias: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    rng_state: torch.Tensor | None = None,
    backend: str = backends.AUTO,
) -> Any:
    """Softmax attention with FlashAttention-2's arguments, in its order.

    Parameters
    ----------
    q : Tensor, shape (B, M, H, D)
        Queries, float16, bfloat16 or float32 (float64 on backend "torch"). D from 1 to 256; any
        strides.
    k : Tensor, shape (B, N, H_KV, D)
        Keys, of q's dtype and device. H must be a multiple of H_KV: query head h reads key head
        ``h // (H // H_KV)``.
    v : Tensor, shape (B, N, H_KV, D_v)
        Values; D_v from 1 to 256.
    dropout_p : float, default 0.0
        Probability that a weight is dropped, from 0 to below 1. Which are is a function of
        `rng_state` and the weight's indices alone, see `dropout_mask`.
    softmax_scale : float, default 1 / sqrt(D)
        Factor of the scores.
    causal : bool, default False
        Query i sees keys up to ``i + N - M``: the mask is aligned at the bottom right.
    window_size : pair of int, default (-1, -1)
        Query i sees keys ``i + N - M - left`` to ``i + N - M + right``; -1 leaves a side open.
        Blocks of keys outside every window are skipped. Anything of two integers, a tensor too.
    softcap : float, default 0.0
        Scores become ``softcap * tanh(scores / softcap)``; 0 for none.
    alibi_slopes : Tensor, shape (H,) or (B, H), float32, optional
        ``slope * |i + N - M - j|`` is subtracted from the score of query i and key j.
    deterministic : bool, default False
        Gradients must have the same bits every time, as under
        ``torch.use_deterministic_algorithms``. On backends "torch" and "triton" they have with
        either value; on "hopper" order costs up to a tenth of the speed of the backward pass, a
        quarter where heads share keys.
    return_attn_probs : bool, default False
        Also return lse and probs.
    attn_bias : Tensor, optional
        Added to the scores, or boolean and True where a key is seen. Broadcasts to (B, H, M, N);
        of any supported dtype. Its gradient has its own shape.
    key_mask : Tensor, shape (B, N), optional
        For every query and head: boolean, True where a key is seen, or added to the scores.
    sinks : Tensor, shape (H,), optional
        A score that takes part in the softmax of every query of its head, as one more key with the
        value 0. It has a gradient.
    rng_state : Tensor, shape (2,), int64, optional
        Seed and offset of dropout. Drawn from torch's default generator of the device where None,
        so that torch.manual_seed repeats it.
    backend : str, default "auto"
        "torch", "triton", another registered backend, or "auto" for the best that supports the
        problem. A named backend is never replaced.

    Returns
    -------
    out : Tensor, shape (B, M, H, D_v)
        Of q's dtype. A query without keys has out 0.
    lse : Tensor, shape (B, H, M), float32
        Only with `return_attn_probs`: natural logarithm of the sum of exponentials of the scores,
        -inf for a query without keys or sink. Differentiable. float64 for float64 inputs.
    probs : Tensor, shape (B, H, M, N)
        Only with `return_attn_probs`: the probabilities before dropout, negative where it drops
        them, of q's dtype and without gradient. Shape (0,) if `dropout_p` is 0, as in flash-attn.

    Raises
    ------
    ValueError
        A shape, dtype, device or number does not fit; the message names it.
    UnsupportedProblemError
        No backend computes the problem, or a gradient is asked for that there is none of.
    BackendUnavailableError
        No backend of that name exists.

    References
    ----------
    Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023.

    Examples
    --------
    >>> import torch
    >>> from attn_flash import flash_attn_func
    >>> q = torch.randn(2, 197, 12, 64)
    >>> k, v = torch.randn(2, 2, 197, 4, 64).unbind(0)
    >>> flash_attn_func(q, k, v, causal=True).shape
    torch.Size([2, 197, 12, 64])
    """
    settings = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    options = checks.options_of(q, *settings, attn_bias, key_mask, sinks, rng_state)
    return _attend(q, k, v, options, return_attn_probs, backend)


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = OPEN_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **extras: Any,
) -> Any:
    """Self-attention on queries, keys and values packed in one tensor.

    Parameters
    ----------
    qkv : Tensor, shape (B, S, 3, H, D)
        Queries, keys and values along dimension 2; read in place.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes
        As in `flash_attn_func`.
    deterministic, return_attn_probs
        As in `flash_attn_func`.
    **extras
        Keyword arguments of `flash_attn_func`: attn_bias, key_mask, sinks, rng_state, backend.

    Returns
    -------
    out : Tensor, shape (B, S, H, D)
        And lse and probs with `return_attn_probs`, as in `flash_attn_func`.

    Examples
    --------
    >>> import torch
    >>> from attn_flash import flash_attn_qkvpacked_func
    >>> flash_attn_qkvpacked_func(torch.randn(2, 197, 3, 12, 64)).shape
    torch.Size([2, 197, 12, 64])
    """
    q, k, v = _unpacked("qkv", qkv, "(B, S, 3, H, D)", 3)
    settings = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return flash_attn_func(q, k, v, *settings, return_attn_probs, **extras)


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = OPEN_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **extras: Any,
) -> Any:
    """Attention over keys and values packed in one tensor.

    Parameters
    ----------
    q : Tensor, shape (B, M, H, D)
        Queries.
    kv : Tensor, shape (B, N, 2, H_KV, D)
        Keys and values along dimension 2; read in place.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes
        As in `flash_attn_func`.
    deterministic, return_attn_probs
        As in `flash_attn_func`.
    **extras
        Keyword arguments of `flash_attn_func`: attn_bias, key_mask, sinks, rng_state, backend.

    Returns
    -------
    out : Tensor, shape (B, M, H, D)
        And lse and probs with `return_attn_probs`, as in `flash_attn_func`.

    Examples
    --------
    >>> import torch
    >>> from attn_flash import flash_attn_kvpacked_func
    >>> q, kv = torch.randn(2, 5, 8, 64), torch.randn(2, 100, 2, 2, 64)
    >>> flash_attn_kvpacked_func(q, kv, causal=True).shape
    torch.Size([2, 5, 8, 64])
    """
    k, v = _unpacked("kv", kv, "(B, N, 2, H_KV, D)", 2, q)
    settings = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return flash_attn_func(q, k, v, *settings, return_attn_probs, **extras)


@repeatable
def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = OPEN_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    *,
    seqused_k: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    rng_state: torch.Tensor | None = None,
    backend: str = backends.AUTO,
) -> Any:
    """Attention within sequences of different lengths that lie one after the other.

    Parameters
    ----------
    q : Tensor, shape (T_q, H, D)
        Queries of all sequences.
    k : Tensor, shape (T_k, H_KV, D)
        Keys; (num_pages, page_size, H_KV, D) with `block_table`.
    v : Tensor, shape (T_k, H_KV, D_v)
        Values; (num_pages, page_size, H_KV, D_v) with `block_table`.
    cu_seqlens_q, cu_seqlens_k : Tensor, shape (B + 1,), int32
        Sequence b has the queries ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1] - 1`` and keys
        likewise. Both begin with 0 and do not decrease. With `block_table` only the differences of
        `cu_seqlens_k` count. On a GPU their values are not checked, which would have to wait for
        it, unless the environment variable ATTN_CHECK_VALUES is 1.
    max_seqlen_q, max_seqlen_k : int
        At least the length of the longest sequence.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes
        As in `flash_attn_func`; M, N, i and j are those of each sequence.
    deterministic : bool, default False
        As in `flash_attn_func`.
    return_attn_probs : bool, default False
        Also return lse and probs.
    block_table : Tensor, shape (B, max_pages), int32, optional
        Key j of sequence b is in slot ``j % page_size`` of page ``block_table[b, j // page_size]``.
        Pages may be of any size. Where a gradient is asked for, keys and values are gathered into
        (B max_seqlen_k, H_KV, D) first; theirs is that of the pages.
    seqused_k : Tensor, shape (B,), int32, optional
        Only so many of each sequence's keys count.
    attn_bias : Tensor, optional
        As in `flash_attn_func`; broadcasts to (B, H, max_seqlen_q, max_seqlen_k).
    key_mask : Tensor, shape (B, max_seqlen_k), optional
        As in `flash_attn_func`.
    sinks, rng_state, backend
        As in `flash_attn_func`.

    Returns
    -------
    out : Tensor, shape (T_q, H, D_v)
        Of q's dtype; 0 for queries without keys and tokens of no sequence.
    lse : Tensor, shape (H, T_q), float32
        Only with `return_attn_probs`, as in `flash_attn_func`.
    probs : Tensor, shape (B, H, max_seqlen_q, max_seqlen_k)
        Only with `return_attn_probs`, as in `flash_attn_func`; 0 outside the sequences.

    Raises
    ------
    ValueError
        A shape, dtype, device or number does not fit; the message names it.
    UnsupportedProblemError
        No backend computes the problem, or a gradient is asked for that there is none of.

    Examples
    --------
    >>> import torch
    >>> from attn_flash import flash_attn_varlen_func
    >>> q, k, v = torch.randn(3, 12, 4, 32).unbind(0)
    >>> starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    >>> flash_attn_varlen_func(q, k, v, starts, starts, 7, 7, causal=True).shape
    torch.Size([12, 4, 32])
    """
    for name, starts in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        require_rank(name, starts, "(B + 1,)")
    settings = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    options = checks.options_of(
        q,
        *settings,
        attn_bias,
        key_mask,
        sinks,
        rng_state,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        block_table=block_table,
        max_seqlen_q=checks.length("max_seqlen_q", max_seqlen_q),
        max_seqlen_k=checks.length("max_seqlen_k", max_seqlen_k),
    )
    return _attend(q, k, v, options, return_attn_probs, backend)


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = OPEN_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **extras: Any,
) -> Any:
    """Self-attention within ragged sequences, on queries, keys and values in one tensor.

    Parameters
    ----------
    qkv : Tensor, shape (T, 3, H, D)
        Queries, keys and values along dimension 1; read in place.
    cu_seqlens : Tensor, shape (B + 1,), int32
        Where sequences begin, as in `flash_attn_varlen_func`.
    max_seqlen : int
        At least the length of the longest sequence.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes
        As in `flash_attn_func`.
    deterministic, return_attn_probs
        As in `flash_attn_func`.
    **extras
        Keyword arguments of `flash_attn_varlen_func`, such as attn_bias, sinks or backend.

    Returns
    -------
    out : Tensor, shape (T, H, D)
        And lse and probs with `return_attn_probs`, as in `flash_attn_varlen_func`.

    Examples
    --------
    >>> import torch
    >>> from attn_flash import flash_attn_varlen_qkvpacked_func
    >>> starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    >>> flash_attn_varlen_qkvpacked_func(torch.randn(12, 3, 4, 32), starts, 7).shape
    torch.Size([12, 4, 32])
    """
    q, k, v = _unpacked("qkv", qkv, "(T, 3, H, D)", 3)
    settings = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        *settings, return_attn_probs, **extras,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = OPEN_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **extras: Any,
) -> Any:
    """Attention within ragged sequences, over keys and values in one tensor.

    Parameters
    ----------
    q : Tensor, shape (T_q, H, D)
        Queries.
    kv : Tensor, shape (T_k, 2, H_KV, D)
        Keys and values along dimension 1; read in place.
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        As in `flash_attn_varlen_func`.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes
        As in `flash_attn_func`.
    deterministic, return_attn_probs
        As in `flash_attn_func`.
    **extras
        Keyword arguments of `flash_attn_varlen_func`, such as attn_bias, sinks or backend.

    Returns
    -------
    out : Tensor, shape (T_q, H, D)
        And lse and probs with `return_attn_probs`, as in `flash_attn_varlen_func`.

    Examples
    --------
    >>> import torch
    >>> from attn_flash import flash_attn_varlen_kvpacked_func
    >>> starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    >>> q, kv = torch.randn(12, 4, 32), torch.randn(12, 2, 2, 32)
    >>> flash_attn_varlen_kvpacked_func(q, kv, starts, starts, 7, 7).shape
    torch.Size([12, 4, 32])
    """
    k, v = _unpacked("kv", kv, "(T_k, 2, H_KV, D)", 2, q)
    settings = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        *settings, return_attn_probs, **extras,
    )  # fmt: skip


def dropout_mask(
    shape: tuple[int, int, int, int], dropout_p: float, rng_state: torch.Tensor
) -> torch.Tensor:
    """Which weights dropout keeps: those of a call with the same `dropout_p` and `rng_state`.

    The weight of query i and key j, head h, batch element b stays where

        half  >=  floor(dropout_p 2**16),

    the low half for even j, the high one for odd j, of word (j mod 32) div 8 of Philox4x32-7 with
    the key `seed` and the counter (4 (j div 32) + (j mod 8) div 2, i, offset, 65536 b + h): on
    every backend and device. In ragged sequences i and j count from the start of sequence b.

    Parameters
    ----------
    shape : tuple of int
        (B, H, M, N).
    dropout_p : float
        Probability that a weight is dropped, from 0 to below 1.
    rng_state : Tensor, shape (2,), int64
        Seed and offset, on the device where to compute the mask.

    Returns
    -------
    Tensor, shape (B, H, M, N), bool
        True where the weight stays, multiplied by ``1 / (1 - dropout_p)``.

    Raises
    ------
    ValueError
        An argument does not fit; the message names it.

    References
    ----------
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Examples
    --------
    >>> import torch
    >>> from attn_flash import dropout_mask
    >>> dropout_mask((1, 1, 2, 6), 0.5, torch.tensor([0, 0])).long()
    tensor([[[[1, 0, 0, 1, 0, 0],
              [0, 1, 0, 1, 0, 1]]]])
    """
    dropout_p = checks.probability(dropout_p)
    if not isinstance(shape, Sequence) or len(shape) != 4:
        raise ValueError(f"shape must be (B, H, M, N), got {shape}")
    require_tensor("rng_state", rng_state)
    device = rng_state.device
    checks.dropout_state(rng_state, dropout_p, device)
    seed, offset = rng_state.unbind()
    return keep_mask(shape, dropout_p, seed, offset, device)


def get_available_backends() -> list[str]:
    """Names of the backends that can run on this machine, the preferred first.

    Returns
    -------
    list of str
        For example ``["triton", "torch"]`` on an NVIDIA GPU.

    Examples
    --------
    >>> from attn_flash import get_available_backends
    >>> "torch" in get_available_backends()
    True
    """
    return backends.runnable(ops.ATTENTION)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: Options,
    return_attn_probs: bool,
    backend: str,
) -> Any:
    return_attn_probs = flag("return_attn_probs", return_attn_probs)
    problem = checks.attention_problem(q, k, v, options)
    if problem.needs_grad and options.block_table is not None:
        k, v, options = gathered(k, v, options)
        problem = checks.attention_problem(q, k, v, options)
    name = backends.resolve(ops.ATTENTION, problem, backend)
    out, lse = ops.attention(q, k, v, *options, name)
    if not return_attn_probs:
        return out
    if options.dropout_p == 0.0:
        return out, lse, q.new_empty(0)
    with torch.no_grad():
        return out, lse, ops.attention_probs(q, k, lse, *options)


def _unpacked(
    name: str, packed: torch.Tensor, symbols: str, parts: int, q: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Take apart a tensor whose third dimension from the end is of queries, keys and values."""
    if q is not None:
        require_tensor("q", q)
        require_like(name, packed, "q", q)
    require_rank(name, packed, symbols)
    if packed.shape[-3] != parts:
        raise ValueError(f"{name} must have shape {symbols}, got {tuple(packed.shape)}")
    require_dtype(name, packed, checks.DTYPES)
    require_range(f"the head dimension of {name}", packed.shape[-1], 1, checks.MAX_HEAD_DIM)
    return packed.unbind(-3)
