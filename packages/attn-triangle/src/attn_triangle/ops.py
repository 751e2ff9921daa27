"""The operators torch.compile, torch.export and opcheck see, and the rule that differentiates them.

``attn_triangle::attention`` and ``attn_triangle::attention_backward`` are the one pair behind every
public function of the package. q is (B, H, R, M, D), k and v are (B, H, R, N, D), of any strides;
bias is (B, H, M, N) with 1 in place of any size, mask (B, R, N). Results are laid out as `layout`
says; `lse` is (B, H, R, M) in float32 (float64 for float64 inputs); dbias has bias's own shape.
"""

from __future__ import annotations

from typing import Any

import torch

from attn_core import backends
from attn_core.library import Operator
from attn_triangle import checks, reference
from attn_triangle.layout import new_heads_last, new_lse

ATTENTION = "attn_triangle::attention"
ATTENTION_BACKWARD = "attn_triangle::attention_backward"


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    masked_rows: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    compute = _implementation(ATTENTION, backend, q, k, bias, mask, masked_rows)
    return compute(q, k, v, bias, mask, scale, masked_rows)  # type: ignore[no-any-return]


def _attention_fake(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return new_heads_last(q), new_lse(q)


def _attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    masked_rows: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    compute = _implementation(ATTENTION_BACKWARD, backend, q, k, bias, mask, masked_rows)
    return compute(  # type: ignore[no-any-return]
        dout, dlse, q, k, v, bias, mask, out, lse, scale, masked_rows
    )


def _attention_backward_fake(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return new_heads_last(q), new_heads_last(k), new_heads_last(v), bias.new_empty(bias.shape)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = attention.below_autograd(*args)
        q, k, v, bias, mask, *static = args
        ctx.save_for_backward(q, k, v, bias, mask, out, lse)
        ctx.static = static
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
        q, k, v, bias, mask, out, lse = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        grads = attention_backward(dout, dlse, q, k, v, bias, mask, out, lse, *ctx.static)
        return *grads, None, None, None, None


def _attention_backward_autograd(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    masked_rows: str,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    """Gradients that can be differentiated again: the plain formula, recomputed in n^3 memory."""
    with torch.enable_grad():
        # autograd.grad refuses an input that needs no gradient; nobody reads what it gets.
        q, k, v, bias = (
            x if x.requires_grad else x.detach().requires_grad_() for x in (q, k, v, bias)
        )
        out, lse = reference.attention(q, k, v, bias, mask, scale, masked_rows)
        outputs, grads = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse.to(lse)])
        return torch.autograd.grad(outputs, (q, k, v, bias), grads, create_graph=True)


def _implementation(
    op: str,
    backend: str,
    q: torch.Tensor,
    k: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    masked_rows: str,
) -> Any:
    """The backend's function; "auto" reaches this far only from a compiled graph."""
    if backend == backends.AUTO:
        problem = checks.describe(q, k, bias, mask, masked_rows, needs_grad=True)
        backend = backends.resolve(ATTENTION, problem)
    return backends.implementation(op, backend)


attention = Operator(
    ATTENTION,
    "(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor? mask, float scale, str masked_rows,"
    " str backend) -> (Tensor, Tensor)",
    _attention,
    _attention_fake,
    autograd=_Attention.apply,
)
attention_backward = Operator(
    ATTENTION_BACKWARD,
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor bias, Tensor? mask,"
    " Tensor out, Tensor lse, float scale, str masked_rows, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _attention_backward,
    _attention_backward_fake,
    autograd=_attention_backward_autograd,
)
