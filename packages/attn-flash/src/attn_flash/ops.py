"""The operators torch.compile, torch.export and opcheck see, and the rule that differentiates them.

``attn_flash::attention`` and ``attn_flash::attention_backward`` are one pair for every public
function of the package. Tensors are (B, S, H, D) of any strides, `lse` is (B, H, M) in float32
(float64 for float64 inputs), windows are as in `checks.AttentionProblem`.
"""

from __future__ import annotations

from typing import Any

import torch

from attn_core import backends
from attn_core.library import Operator
from attn_flash import reference
from attn_flash.checks import AttentionProblem, binding_window

ATTENTION = "attn_flash::attention"
ATTENTION_BACKWARD = "attn_flash::attention_backward"


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window_left: int,
    window_right: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    window = binding_window((window_left, window_right), q.shape[1], k.shape[1])
    compute = _implementation(ATTENTION, backend, q, k, window)
    return compute(q, k, v, scale, window)  # type: ignore[no-any-return]


def _attention_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, len_q, heads, _head_dim = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, len_q), dtype=lse_dtype(q.dtype))


def _attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    window_left: int,
    window_right: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    window = binding_window((window_left, window_right), q.shape[1], k.shape[1])
    compute = _implementation(ATTENTION_BACKWARD, backend, q, k, window)
    return compute(dout, dlse, q, k, v, out, lse, scale, window)  # type: ignore[no-any-return]


def _attention_backward_fake(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = attention.below_autograd(*args)
        q, k, v, *static = args
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.static = static
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        dq, dk, dv = attention_backward(dout, dlse, q, k, v, out, lse, *ctx.static)
        return dq, dk, dv, None, None, None, None


def _attention_backward_autograd(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    window_left: int,
    window_right: int,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    """Gradients to differentiate again: the plain formula, recomputed in O(M N) memory."""
    with torch.enable_grad():
        # An input that needs no gradient still has to be part of the graph to be asked for.
        q, k, v = (x if x.requires_grad else x.detach().requires_grad_() for x in (q, k, v))
        out, lse = reference.attention(q, k, v, scale, (window_left, window_right))
        outputs, grads = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse.to(lse)])
        return torch.autograd.grad(outputs, (q, k, v), grads, create_graph=True)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, except for float64 problems."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _implementation(
    op: str, backend: str, q: torch.Tensor, k: torch.Tensor, window: tuple[int, int]
) -> Any:
    """The backend's function; "auto" reaches this far only from a compiled graph."""
    if backend == backends.AUTO:
        batch, len_q, heads, head_dim = q.shape
        _, len_k, heads_kv, _ = k.shape
        problem = AttentionProblem(
            q.device, q.dtype, batch, len_q, len_k, heads, heads_kv, head_dim, window, True
        )
        backend = backends.resolve(ATTENTION, problem)
    return backends.implementation(op, backend)


attention = Operator(
    ATTENTION,
    "(Tensor q, Tensor k, Tensor v, float scale, int window_left, int window_right, str backend)"
    " -> (Tensor, Tensor)",
    _attention,
    _attention_fake,
    autograd=_Attention.apply,
)
attention_backward = Operator(
    ATTENTION_BACKWARD,
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale,"
    " int window_left, int window_right, str backend) -> (Tensor, Tensor, Tensor)",
    _attention_backward,
    _attention_backward_fake,
    autograd=_attention_backward_autograd,
)
