"""TriFast's functions (trifast 0.1): its one operator, its test oracle and its helpers."""

from __future__ import annotations

import torch

from attn_triangle import api
from attn_triangle.utils import clone_and_clear_grad, disable_tf32, enable_tf32, gen_tensors

__all__ = [
    "attention_reference",
    "clone_and_clear_grad",
    "disable_tf32",
    "enable_tf32",
    "gen_tensors",
    "triangle_attention",
    "triangle_attention_with_lse",
]


def triangle_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """``trifast.triangle_attention``.

    Parameters
    ----------
    q, k, v : Tensor, shape (b, h, n, n, d)
        Queries, keys and values.
    b : Tensor, shape (b, h, n, n)
        Pair bias.
    mask : Tensor of bool, shape (b, n, n)
        True masks a key out.

    Returns
    -------
    Tensor, shape (b, h, n, n, d)
        The output; a row without keys gives the mean of its values.

    Examples
    --------
    >>> import torch
    >>> from attn_triangle.compat.trifast import gen_tensors, triangle_attention
    >>> triangle_attention(*gen_tensors(8, 4, 2, True, "cpu", torch.float32)).shape
    torch.Size([1, 2, 8, 8, 4])
    """
    out: torch.Tensor = api.triangle_attention(q, k, v, b, mask)
    return out


def triangle_attention_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``trifast.torch._triangle_attention``: out and the natural-log lse (b, h, n, n), float32."""
    out, lse = api.triangle_attention(q, k, v, b, mask, return_lse=True)
    return out, lse


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """``trifast.equiv.attention_reference``: the formula in n^3 memory, in the dtype of q."""
    scores = torch.einsum("bhijd,bhikd->bhijk", q, k) * q.shape[-1] ** -0.5 + bias[:, :, None]
    scores = scores.masked_fill(mask[:, None, :, None], torch.finfo(q.dtype).min)
    return torch.einsum("bhijk,bhikd->bhijd", torch.softmax(scores, dim=-1), v)
