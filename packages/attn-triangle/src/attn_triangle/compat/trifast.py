"""TriFast's functions (trifast 0.1): its one operator, its test oracle and its helpers."""

from __future__ import annotations

import torch

from attn_core import backends
from attn_triangle import api, ops
from attn_triangle.utils import clone_and_clear_grad, disable_tf32, enable_tf32, gen_tensors

__all__ = [
    "attention_reference",
    "clone_and_clear_grad",
    "disable_tf32",
    "enable_tf32",
    "gen_tensors",
    "triangle_attention",
    "triangle_attention_bwd",
    "triangle_attention_with_lse",
]

_library = torch.library.Library("attn_triangle", "FRAGMENT")
_library.define(
    "trifast(Tensor q, Tensor k, Tensor v, Tensor b, Tensor mask) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


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


def _attention_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = ops.attention(q, k, v, b, mask, _scale(q), "mean", True, backends.AUTO)
    return out, lse


_library.impl("trifast", _attention_with_lse, "CompositeImplicitAutograd")
triangle_attention_with_lse = torch.ops.attn_triangle.trifast.default
"""``trifast.torch._triangle_attention``, an operator as there.

It returns out and the natural logarithm of the sum of exponentials, (b, h, n, n) in float32.
"""


def triangle_attention_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    b: torch.Tensor,
    o: torch.Tensor,
    l: torch.Tensor,  # noqa: E741  (its name there)
    mask: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """``trifast.torch.triangle_attention_bwd``: dq, dk, dv, db and zeros like the mask.

    Parameters
    ----------
    do : Tensor, shape (b, h, n, n, d)
        Gradient of the output.
    q, k, v, b, mask : Tensor
        As for `triangle_attention`.
    o, l : Tensor
        What `triangle_attention_with_lse` returned for them.

    Returns
    -------
    tuple of Tensor
        Gradients shaped as q, k, v, b and mask.
    """
    static = (_scale(q), "mean", "dq dk_dv dbias", True, backends.AUTO)
    dq, dk, dv, db, _ = ops.attention_backward(do, None, q, k, v, b, mask, o, l, *static)
    return dq, dk, dv, db, torch.zeros_like(mask)


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """``trifast.equiv.attention_reference``: the formula in n^3 memory, in the dtype of q."""
    scores = torch.einsum("...ijd,...ikd->...ijk", q, k) * _scale(q) + bias.unsqueeze(-3)
    hidden = mask.unsqueeze(-2).unsqueeze(-4)  # [*, 1, n, 1, n]
    scores = scores.masked_fill(hidden, torch.finfo(q.dtype).min)
    return torch.einsum("...ijk,...ikd->...ijd", torch.softmax(scores, dim=-1), v)


def _scale(q: torch.Tensor) -> float:
    return float(q.shape[-1] ** -0.5)
