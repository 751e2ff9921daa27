"""The public functions: each validates its arguments, resolves a backend and calls the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attn_core import backends
from attn_core.checks import require_rank
from attn_core.errors import UnsupportedProblemError
from attn_flash import checks, ops

OPEN_WINDOW = (-1, -1)


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
    backend: str = backends.AUTO,
) -> Any:
    """Softmax attention with FlashAttention-2's arguments, in its order.

    Parameters
    ----------
    q : Tensor, shape (B, M, H, D)
        Queries, float16, bfloat16 or float32 (float64 on backend "torch"). D from 1 to 256; any
        strides.
    k, v : Tensor, shape (B, N, H_KV, D)
        Keys and values, of q's dtype and device. H must be a multiple of H_KV: query head h reads
        key head ``h // (H // H_KV)``.
    dropout_p : float, default 0.0
        Must be 0: dropout is not supported yet.
    softmax_scale : float, default 1 / sqrt(D)
        Factor of the scores.
    causal : bool, default False
        Query i sees keys up to ``i + N - M``: the mask is aligned at the bottom right.
    window_size : pair of int, default (-1, -1)
        Query i sees keys ``i + N - M - left`` to ``i + N - M + right``; -1 leaves a side open.
        Blocks of keys outside every window are skipped.
    softcap : float, default 0.0
        Must be 0: softcapping is not supported yet.
    alibi_slopes : Tensor, optional
        Must be None: ALiBi is not supported yet.
    deterministic : bool, default False
        The backward pass gives the same bits every time with either value.
    return_attn_probs : bool, default False
        Also return lse and, as flash-attn does without dropout, an empty tensor.
    backend : str, default "auto"
        "torch", "triton", another registered backend, or "auto" for the best that supports the
        problem. A named backend is never replaced.

    Returns
    -------
    out : Tensor, shape (B, M, H, D)
        Of q's dtype. A query without keys has out 0.
    lse : Tensor, shape (B, H, M), float32
        Only with `return_attn_probs`: natural logarithm of the sum of exponentials of the scaled
        scores, -inf for a query without keys. Differentiable.
    probs : Tensor, shape (0,)
        Only with `return_attn_probs`.

    Raises
    ------
    ValueError
        A shape, dtype, device or number does not fit; the message names it.
    UnsupportedProblemError
        A feature that is not supported yet, or no backend computes the problem.
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
    _refuse_later_features(dropout_p, softcap, alibi_slopes)
    window = checks.window(causal, window_size)
    out, lse = _attend(q, k, v, softmax_scale, window, backend)
    return (out, lse, q.new_empty(0)) if return_attn_probs else out


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
    *,
    backend: str = backends.AUTO,
) -> Any:
    """Self-attention on queries, keys and values packed in one tensor.

    Parameters
    ----------
    qkv : Tensor, shape (B, S, 3, H, D)
        Queries, keys and values along dimension 2; read in place.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes
        As in `flash_attn_func`.
    deterministic, return_attn_probs, backend
        As in `flash_attn_func`.

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
    require_rank("qkv", qkv, "(B, S, 3, H, D)")
    if qkv.shape[2] != 3:
        raise ValueError(f"qkv must have shape (B, S, 3, H, D), got {tuple(qkv.shape)}")
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        backend=backend,
    )


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
    *,
    backend: str = backends.AUTO,
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
    deterministic, return_attn_probs, backend
        As in `flash_attn_func`.

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
    require_rank("kv", kv, "(B, N, 2, H_KV, D)")
    if kv.shape[2] != 2:
        raise ValueError(f"kv must have shape (B, N, 2, H_KV, D), got {tuple(kv.shape)}")
    k, v = kv.unbind(2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        backend=backend,
    )


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = True,
    scale: float | None = None,
    window_size: int = -1,
    *,
    backend: str = backends.AUTO,
) -> torch.Tensor:
    """Attention on tensors whose heads come before the sequence; causal unless told otherwise.

    Parameters
    ----------
    q : Tensor, shape (B, H, M, D)
        Queries, as in `flash_attn_func` but for the order of dimensions.
    k, v : Tensor, shape (B, H_KV, N, D)
        Keys and values.
    causal : bool, default True
        Query i sees keys up to ``i + N - M``.
    scale : float, default 1 / sqrt(D)
        Factor of the scores.
    window_size : int, default -1
        A query sees the `window_size` last keys up to its own position, and without `causal` as
        many after it; -1 for no window.
    backend : str, default "auto"
        As in `flash_attn_func`.

    Returns
    -------
    Tensor, shape (B, H, M, D)
        Of q's dtype; its memory is laid out as (B, M, H, D).

    Examples
    --------
    >>> import torch
    >>> from attn_flash import flash_attention
    >>> q, k, v = torch.randn(3, 1, 4, 100, 32).unbind(0)
    >>> flash_attention(q, k, v, window_size=16).shape
    torch.Size([1, 4, 100, 32])
    """
    _require_heads_first(q, k, v)
    if window_size == 0:
        raise ValueError("window_size must be positive, or negative for no window, got 0")
    reach = window_size - 1 if window_size > 0 else -1
    window = checks.window(causal, (reach, reach))
    return _attend_heads_first(q, k, v, scale, window, backend)


def sdpa_triton_fa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str = backends.AUTO,
) -> torch.Tensor:
    """Attention with the arguments of torch's scaled_dot_product_attention.

    Parameters
    ----------
    q : Tensor, shape (B, H, M, D)
        Queries.
    k, v : Tensor, shape (B, H_KV, N, D)
        Keys and values.
    attn_mask : Tensor, optional
        Must be None: masks are not supported yet.
    dropout_p : float, default 0.0
        Must be 0: dropout is not supported yet.
    is_causal : bool, default False
        Query i sees keys up to i: as in torch, the mask is aligned at the top left, so M must
        equal N.
    scale : float, default 1 / sqrt(D)
        Factor of the scores.
    enable_gqa : bool, default False
        Allow fewer key heads than query heads.
    backend : str, default "auto"
        As in `flash_attn_func`.

    Returns
    -------
    Tensor, shape (B, H, M, D)
        Of q's dtype.

    Examples
    --------
    >>> import torch
    >>> from attn_flash import sdpa_triton_fa
    >>> q, k, v = torch.randn(3, 1, 4, 100, 32).unbind(0)
    >>> expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> torch.allclose(sdpa_triton_fa(q, k, v, is_causal=True), expected, atol=1e-5)
    True
    """
    _refuse_later_features(dropout_p, 0.0, None)
    if attn_mask is not None:
        raise UnsupportedProblemError("attn_mask must be None: masks are not supported yet")
    _require_heads_first(q, k, v)
    if not enable_gqa and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"q and k must have the same number of heads without enable_gqa, got {q.shape[1]} "
            f"and {k.shape[1]}"
        )
    if is_causal and q.shape[2] != k.shape[2]:
        raise UnsupportedProblemError(
            "is_causal is aligned at the top left and needs as many queries as keys, got "
            f"{q.shape[2]} and {k.shape[2]}"
        )
    return _attend_heads_first(q, k, v, scale, checks.window(is_causal, OPEN_WINDOW), backend)


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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = backends.operators()[ops.ATTENTION](device)
    verdicts = backends.explain(ops.ATTENTION, problem)
    return [verdict.backend for verdict in verdicts if verdict.reason is None]


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    window: tuple[int, int],
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    problem = checks.attention_problem(q, k, v, window)
    name = backends.resolve(ops.ATTENTION, problem, backend)
    scale = checks.softmax_scale(scale, problem.head_dim)
    return ops.attention(q, k, v, scale, *window, name)  # type: ignore[no-any-return]


def _attend_heads_first(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    window: tuple[int, int],
    backend: str,
) -> torch.Tensor:
    out, _ = _attend(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale, window, backend
    )
    return out.transpose(1, 2)


def _require_heads_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_rank(name, tensor, "(B, H, S, D)")


def _refuse_later_features(
    dropout_p: float, softcap: float, alibi_slopes: torch.Tensor | None
) -> None:
    if dropout_p != 0.0:
        raise UnsupportedProblemError(f"dropout_p must be 0: no dropout yet, got {dropout_p}")
    if softcap != 0.0:
        raise UnsupportedProblemError(f"softcap must be 0: no softcapping yet, got {softcap}")
    if alibi_slopes is not None:
        raise UnsupportedProblemError("alibi_slopes must be None: no ALiBi yet, got a tensor")
