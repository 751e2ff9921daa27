"""The public functions on tensors (B, H, S, D), as PyTorch and other libraries lay them out."""

from __future__ import annotations

from typing import Any

import torch

from attn_core import arguments, backends
from attn_core.checks import flag, require_rank
from attn_core.errors import UnsupportedProblemError
from attn_flash.api import flash_attn_func
from attn_flash.layers.rotary import rotate_heads_first


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = True,
    scale: float | None = None,
    window_size: int = -1,
    *,
    rot_cos: torch.Tensor | None = None,
    rot_sin: torch.Tensor | None = None,
    return_lse: bool = False,
    **extras: Any,
) -> Any:
    """Attention on tensors whose heads come before the sequence; causal unless told otherwise.

    Parameters
    ----------
    q : Tensor, shape (B, H, M, D)
        Queries, as in `flash_attn_func` but for the order of dimensions.
    k : Tensor, shape (B, H_KV, N, D)
        Keys.
    v : Tensor, shape (B, H_KV, N, D_v)
        Values.
    causal : bool, default True
        Query i sees keys up to ``i + N - M``.
    scale : float, default 1 / sqrt(D)
        Factor of the scores.
    window_size : int, default -1
        A query sees the `window_size` last keys up to its own position, and without `causal` as
        many after it; -1 for no window.
    rot_cos, rot_sin : Tensor, shape (S_rotary, D_rotary / 2), optional
        Rotate queries and keys to their positions first, as `flash_attention_rope` does.
    return_lse : bool, default False
        Also return lse.
    **extras
        Keyword arguments of `flash_attn_func`: softcap, alibi_slopes, attn_bias, key_mask, sinks,
        dropout_p, rng_state, deterministic, backend.

    Returns
    -------
    out : Tensor, shape (B, H, M, D_v)
        Of q's dtype; its memory is laid out as (B, M, H, D_v).
    lse : Tensor, shape (B, H, M), float32
        Only with `return_lse`, as in `flash_attn_func`.

    Examples
    --------
    >>> import torch
    >>> from attn_flash import flash_attention
    >>> q, k, v = torch.randn(3, 1, 4, 100, 32).unbind(0)
    >>> flash_attention(q, k, v, window_size=16).shape
    torch.Size([1, 4, 100, 32])
    """
    _require_heads_first(q, k, v)
    return_lse = flag("return_lse", return_lse)
    reach = arguments.reach(window_size)
    if rot_cos is not None or rot_sin is not None:
        backend = extras.get("backend", backends.AUTO)
        tables = ("rot_cos", "rot_sin")
        q, k = rotate_heads_first(
            q, k, rot_cos, rot_sin, interleaved=False, backend=backend, tables=tables
        )
    out, lse = _attend_heads_first(
        q, k, v, softmax_scale=scale, causal=causal, window_size=(reach, reach), **extras
    )
    return (out, lse) if return_lse else out


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
    k : Tensor, shape (B, H_KV, N, D)
        Keys.
    v : Tensor, shape (B, H_KV, N, D_v)
        Values.
    attn_mask : Tensor, optional
        Broadcasts to (B, H, M, N): boolean, True where a key is seen, or added to the scores.
    dropout_p : float, default 0.0
        Probability that a weight is dropped.
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
    Tensor, shape (B, H, M, D_v)
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
    _require_heads_first(q, k, v)
    is_causal = flag("is_causal", is_causal)
    if not flag("enable_gqa", enable_gqa) and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"q and k must have the same number of heads without enable_gqa, got {q.shape[1]} "
            f"and {k.shape[1]}"
        )
    if is_causal and q.shape[2] != k.shape[2]:
        raise UnsupportedProblemError(
            "is_causal is aligned at the top left and needs as many queries as keys, got "
            f"{q.shape[2]} and {k.shape[2]}"
        )
    out, _ = _attend_heads_first(
        q,
        k,
        v,
        dropout_p=dropout_p,
        softmax_scale=scale,
        causal=is_causal,
        attn_bias=attn_mask,
        backend=backend,
    )
    return out


def _attend_heads_first(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, _ = flash_attn_func(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), return_attn_probs=True, **arguments
    )
    return out.transpose(1, 2), lse


def _require_heads_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_rank(name, tensor, "(B, H, S, D)")
