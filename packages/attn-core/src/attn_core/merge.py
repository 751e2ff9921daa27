"""Merging attention over parts of the keys into attention over all of them."""

from __future__ import annotations

import torch

from attn_core import checks


def merge_attention_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the attention of the same queries to two disjoint sets of keys.

        lse = log(exp(lse_a) + exp(lse_b)),    out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

    Differentiable. The merge is associative and commutative, so any number of parts may be merged
    in any order; a part without keys (out 0, lse -inf) changes nothing.

    Parameters
    ----------
    out_a : Tensor, shape (B, M, H, D)
        Output over the one set of keys, normalised over these.
    lse_a : Tensor, shape (B, H, M), float32 or float64
        Log-sum-exp of its scaled scores, natural logarithm; -inf where a query sees no key, or inf,
        as FlashAttention-2 writes it there.
    out_b : Tensor, shape (B, M, H, D)
        Output over the other set.
    lse_b : Tensor, shape (B, H, M), float32 or float64
        Its log-sum-exp.

    Returns
    -------
    out : Tensor, shape (B, M, H, D)
        Of out_a's dtype; 0 where neither part has a key.
    lse : Tensor, shape (B, H, M)
        Of lse_a's dtype; -inf where neither part has a key.

    Raises
    ------
    ValueError
        A shape, dtype or device does not fit.

    Notes
    -----
    Used for split keys, prefix caches and ring attention: Juravsky et al., "Hydragen", 2024.

    Examples
    --------
    >>> import torch
    >>> from attn_core.merge import merge_attention_states
    >>> out, lse = torch.randn(1, 5, 2, 8), torch.randn(1, 2, 5)
    >>> merged, merged_lse = merge_attention_states(out, lse, out, lse)
    >>> torch.allclose(merged, out), torch.allclose(merged_lse, lse + torch.tensor(2.0).log())
    (True, True)
    """
    _require_states(out_a, lse_a, out_b, lse_b)
    lse_a, lse_b = (lse.masked_fill(lse == torch.inf, -torch.inf) for lse in (lse_a, lse_b))
    pivot = torch.maximum(lse_a, lse_b).detach()
    is_empty = pivot == -torch.inf
    pivot = pivot.masked_fill(is_empty, 0.0)
    weight_a, weight_b = torch.exp(lse_a - pivot), torch.exp(lse_b - pivot)  # [B, H, M]
    total = (weight_a + weight_b).masked_fill(is_empty, 1.0)
    lse = (pivot + torch.log(total)).masked_fill(is_empty, -torch.inf)
    share_a, share_b = (
        (weight / total).transpose(1, 2)[..., None]  # [B, M, H, 1]
        for weight in (weight_a, weight_b)
    )
    return (share_a * out_a + share_b * out_b).to(out_a.dtype), lse


def _require_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> None:
    checks.require_rank("out_a", out_a, "(B, M, H, D)")
    batch, length, heads, _ = out_a.shape
    checks.require_like("out_b", out_b, "out_a", out_a)
    checks.require_shape("out_b", out_b, "(B, M, H, D)", out_a.shape)
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        checks.require_shape(name, lse, "(B, H, M)", (batch, heads, length))
        checks.require_dtype(name, lse, (torch.float32, torch.float64))
        checks.require_device(name, lse, "out_a", out_a)
    checks.require_like("lse_b", lse_b, "lse_a", lse_a)
