"""cuEquivariance's triangle attention (cuequivariance_torch 0.13)."""

from __future__ import annotations

import torch

from attn_core import arguments
from attn_core.checks import flag, require_dtype, require_rank, require_shape, require_tensor
from attn_triangle import _torch, api

FALLBACK_THRESHOLD = 0
"""Length up to which the other package leaves its kernel; ours takes any."""


def triangle_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    return_aux: bool = False,
    *,
    kv_lengths: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``cuequivariance_torch.triangle_attention``.

    Without the leading dimension B, tensors are taken as B = 1 and the results keep that dimension,
    as there. Under autocast q, k and v are cast to its dtype; the bias stays as it is if it is
    float32 or of q's dtype, and is cast to float32 otherwise.

    Parameters
    ----------
    q : Tensor, shape (B, N, H, Q, D)
        Queries.
    k, v : Tensor, shape (B, N, H, K, D)
        Keys and values.
    bias : Tensor, shape (B, 1, H, Q, K)
        Pair bias.
    mask : Tensor, shape (B, N, 1, 1, K), optional
        True or not 0 *keeps* a key.
    scale : float, default 1 / sqrt(D)
        Factor of the products of queries and keys.
    return_aux : bool, default False
        Also return lse and the largest score.
    kv_lengths : Tensor of int32, shape (B, N, 1, 1, 1), optional
        How many keys each row keeps, in place of a mask. A row that keeps none gives 0, while a
        row that the mask hides gives the mean of its values.

    Returns
    -------
    out : Tensor, shape (B, N, H, Q, D)
        Of q's dtype.
    lse, max : Tensor, shape (B, N, H, Q), float32
        Only with `return_aux`: the natural logarithm of the sum of exponentials of the scores, and
        the largest of them; -inf for a query without keys. Without gradients.

    Raises
    ------
    ValueError
        Both `mask` and `kv_lengths` are given, or as for `attn_triangle.triangle_attention`.

    Examples
    --------
    >>> import torch
    >>> from attn_triangle.compat.cuequivariance import triangle_attention
    >>> q, k, v = torch.randn(3, 1, 20, 4, 20, 32).unbind(0)
    >>> keep = torch.ones(1, 20, 1, 1, 20, dtype=torch.bool)
    >>> triangle_attention(q, k, v, torch.randn(1, 1, 4, 20, 20), keep).shape
    torch.Size([1, 20, 4, 20, 32])
    """
    if mask is not None and kv_lengths is not None:
        raise ValueError("mask must be None where kv_lengths is given, got both")
    return_aux = flag("return_aux", return_aux)
    require_tensor("q", q)
    lifted = q.dim() == 4
    q, k, v = (
        _five_dimensional(name, x, "(B, N, H, L, D)", lifted)
        for name, x in (("q", q), ("k", k), ("v", v))
    )
    bias = _five_dimensional("bias", bias, "(B, 1, H, Q, K)", lifted)
    if bias.shape[1] != 1:
        raise ValueError(f"bias must have shape (B, 1, H, Q, K), got {tuple(bias.shape)}")
    if not bias.is_floating_point():
        raise ValueError(f"bias must be added to scores, of dtype float, got {bias.dtype}")
    q, k, v = _autocast(q, k, v)
    if bias.dtype not in (q.dtype, torch.float32):
        bias = bias.float()
    hidden = _hidden_keys(mask, kv_lengths, k)
    q, k, v, bias = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias.squeeze(1)
    out, lse = api.triangle_attention(
        q,
        k,
        v,
        bias,
        hidden,
        scale=scale,
        return_lse=True,
        masked_rows="mean" if kv_lengths is None else "zero",
        deterministic=False,
    )
    out = out.transpose(1, 2)
    if not return_aux:
        return out  # type: ignore[no-any-return]
    with torch.no_grad():
        factor = arguments.softmax_scale(scale, q.shape[-1], "scale")
        largest = _torch.largest_score(q, k, bias, hidden, factor)
    return out, lse.detach().transpose(1, 2), largest.transpose(1, 2)


def mask_to_kv_lengths(mask: torch.Tensor) -> torch.Tensor:
    """``cuequivariance_torch.mask_to_kv_lengths``: how many leading keys each row keeps.

    Parameters
    ----------
    mask : Tensor, shape (B, N, 1, 1, K)
        True or not 0 keeps a key; B and N may be left out.

    Returns
    -------
    Tensor of int32, shape (B, N, 1, 1, 1)
        The lengths.

    Raises
    ------
    ValueError
        A row keeps keys behind one that it does not keep, or the shape is another.
    """
    require_tensor("mask", mask)
    keep = mask != 0
    while keep.dim() < 5:
        keep = keep[None]
    if keep.dim() != 5 or keep.shape[2:4] != (1, 1):
        raise ValueError(f"mask must have shape (B, N, 1, 1, K), got {tuple(mask.shape)}")
    lengths = keep.sum(-1, keepdim=True, dtype=torch.int32)
    if not torch.equal(keep, _keys_like(keep) < lengths):
        raise ValueError("mask must keep the first keys of each row and no others")
    return lengths


def _hidden_keys(
    mask: torch.Tensor | None, kv_lengths: torch.Tensor | None, k: torch.Tensor
) -> torch.Tensor | None:
    """The mask as `attn_triangle.triangle_attention` takes it: (B, N, K), True = masked out."""
    batch, rows, _, length, _ = k.shape
    if kv_lengths is not None:
        require_tensor("kv_lengths", kv_lengths)
        symbols = "(B, N, 1, 1, 1)"
        kv_lengths = _five_dimensional("kv_lengths", kv_lengths, symbols, kv_lengths.dim() == 4)
        require_shape("kv_lengths", kv_lengths, symbols, (batch, rows, 1, 1, 1))
        require_dtype("kv_lengths", kv_lengths, (torch.int32, torch.int64))
        keys = torch.arange(length, device=kv_lengths.device)
        return keys >= kv_lengths[:, :, 0, 0]
    if mask is None:
        return None
    require_tensor("mask", mask)
    mask = _five_dimensional("mask", mask, "(B, N, 1, 1, K)", mask.dim() == 4)
    if mask.shape[2:4] != (1, 1):
        raise ValueError(f"mask must have shape (B, N, 1, 1, K), got {tuple(mask.shape)}")
    return (mask == 0)[:, :, 0, 0]


def _five_dimensional(name: str, x: torch.Tensor, symbols: str, lifted: bool) -> torch.Tensor:
    """Check the rank, of a tensor without B where `lifted`, and return it with B."""
    require_rank(name, x, symbols.replace("B, ", "") if lifted else symbols)
    return x[None] if lifted else x


def _keys_like(keep: torch.Tensor) -> torch.Tensor:
    return torch.arange(keep.shape[-1], device=keep.device)


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    kind = tensors[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)
