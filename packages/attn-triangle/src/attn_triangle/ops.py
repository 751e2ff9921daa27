"""The operators torch.compile, torch.export and opcheck see, and the rules that differentiate them.

``attn_triangle::attention`` and ``attn_triangle::attention_backward`` are the one pair behind every
public function of the package. q is (B, H, R, M, D), k and v are (B, H, R, N, D), of any strides;
bias is (B, H, M, N) and mask (B, R, N), each with 1 in place of any size; a mask is of bool, True =
masked out, or is added to the scores. Results are laid out as `layout` says; `lse` is (B, H, R, M)
in float32 (float64 for float64 inputs); dbias and dmask have the shapes of bias and mask.

``attn_triangle::gate`` and ``attn_triangle::gate_backward`` are the epilogue of the module:
out * sigmoid(logits) of two tensors of one shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attn_core import backends
from attn_core.library import Function, Operator
from attn_triangle import checks, reference
from attn_triangle.layout import new_heads_last, new_lse, new_unwanted

ATTENTION = "attn_triangle::attention"
ATTENTION_BACKWARD = "attn_triangle::attention_backward"
GATE = "attn_triangle::gate"
GATE_BACKWARD = "attn_triangle::gate_backward"

Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    masked_rows: str,
    deterministic: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    compute = _implementation(ATTENTION, backend, q, k, v, bias, mask, scale, masked_rows)
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
    wanted: str,
    deterministic: bool,
    backend: str,
) -> Grads:
    compute = _implementation(ATTENTION_BACKWARD, backend, q, k, v, bias, mask, scale, masked_rows)
    return compute(  # type: ignore[no-any-return]
        dout, dlse, q, k, v, bias, mask, out, lse, scale, masked_rows, wanted, deterministic
    )


def _attention_backward_fake(
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
    wanted: str,
    *_: Any,
) -> Grads:
    return (
        new_heads_last(q) if "dq" in wanted else new_unwanted(q),
        new_heads_last(k) if "dk_dv" in wanted else new_unwanted(k),
        new_heads_last(v) if "dk_dv" in wanted else new_unwanted(v),
        bias.new_empty(bias.shape) if "dbias" in wanted else new_unwanted(bias),
        mask.new_empty(mask.shape) if mask is not None and "dmask" in wanted else new_unwanted(q),
    )


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, compute: Callable[..., Any], *args: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = compute(*args)
        q, k, v, bias, mask, *static = args
        ctx.save_for_backward(q, k, v, bias, mask, out, lse)
        ctx.static = static
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
        q, k, v, bias, mask, out, lse = ctx.saved_tensors
        scale, masked_rows, deterministic, backend = ctx.static
        if dout is None:
            dout = torch.zeros_like(out)
        grads = attention_backward(
            dout, dlse, q, k, v, bias, mask, out, lse,
            scale, masked_rows, _wanted(ctx.needs_input_grad[1:]), deterministic, backend,
        )  # fmt: skip
        needed = zip(grads, ctx.needs_input_grad[1:], strict=False)
        return None, *(grad if need else None for grad, need in needed), None, None, None, None


def _wanted(needs: tuple[bool, ...]) -> str:
    """Which of dq, dk_dv, dbias and dmask the backward pass has to compute, as words."""
    q, k, v, bias, mask = needs[:5]
    words = {"dq": q, "dk_dv": k or v, "dbias": bias, "dmask": mask}
    return " ".join(word for word, need in words.items() if need)


def _attention_backward_autograd(
    _: Any,
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
    wanted: str,
    deterministic: bool,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    """Gradients that can be differentiated again: the plain formula, recomputed in n^3 memory."""
    words = {"q": "dq", "k": "dk_dv", "v": "dk_dv", "bias": "dbias", "mask": "dmask"}
    with torch.enable_grad():
        leaves: dict[str, Any] = {"q": q, "k": k, "v": v, "bias": bias, "mask": mask}
        for name, leaf in leaves.items():
            # autograd.grad refuses an input that needs no gradient of its own.
            if words[name] in wanted and leaf is not None and not leaf.requires_grad:
                leaves[name] = leaf.detach().requires_grad_()
        out, lse = reference.attention(**leaves, scale=scale, masked_rows=masked_rows)
        outputs, grads = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse.to(lse)])
        asked = [name for name in leaves if words[name] in wanted]
        found = torch.autograd.grad(
            outputs, [leaves[name] for name in asked], grads, create_graph=True
        )
    results = dict(zip(asked, found, strict=True))
    return tuple(results.get(name, new_unwanted(q)) for name in leaves)


def _implementation(
    op: str,
    backend: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    masked_rows: str,
) -> Any:
    """The backend's function; "auto" reaches this far only from a compiled graph."""
    if backend == backends.AUTO:
        problem = checks.describe(q, k, v, bias, mask, scale, masked_rows, needs_grad=True)
        backend = backends.resolve(ATTENTION, problem)
    return backends.implementation(op, backend)


def _gate(out: torch.Tensor, logits: torch.Tensor, backend: str) -> torch.Tensor:
    return _gate_implementation(GATE, out, backend)(out, logits)  # type: ignore[no-any-return]


def _gate_fake(out: torch.Tensor, logits: torch.Tensor, backend: str) -> torch.Tensor:
    return out.new_empty(out.shape)


def _gate_backward(
    dgated: torch.Tensor, out: torch.Tensor, logits: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    compute = _gate_implementation(GATE_BACKWARD, out, backend)
    return compute(dgated, out, logits)  # type: ignore[no-any-return]


def _gate_backward_fake(
    dgated: torch.Tensor, out: torch.Tensor, logits: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return out.new_empty(out.shape), logits.new_empty(logits.shape)


class _Gate(Function):
    @staticmethod
    def forward(
        ctx: Any,
        compute: Callable[..., torch.Tensor],
        out: torch.Tensor,
        logits: torch.Tensor,
        backend: str,
    ) -> torch.Tensor:
        ctx.save_for_backward(out, logits)
        ctx.backend = backend
        return compute(out, logits, backend)

    @staticmethod
    def backward(ctx: Any, dgated: torch.Tensor) -> tuple[Any, ...]:
        return None, *gate_backward(dgated, *ctx.saved_tensors, ctx.backend), None


def _gate_backward_autograd(
    _: Any, dgated: torch.Tensor, out: torch.Tensor, logits: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in operations that can be differentiated again."""
    opening = torch.sigmoid(logits)
    return dgated * opening, dgated * out * opening * (1.0 - opening)


def _gate_implementation(op: str, out: torch.Tensor, backend: str) -> Any:
    if backend == backends.AUTO:
        problem = checks.GateProblem(out.device, out.dtype, needs_grad=True)
        backend = backends.resolve(GATE, problem)
    return backends.implementation(op, backend)


attention = Operator(
    ATTENTION,
    "(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor? mask, float scale, str masked_rows,"
    " bool deterministic, str backend) -> (Tensor, Tensor)",
    _attention,
    _attention_fake,
    autograd=_Attention.apply,
)
attention_backward = Operator(
    ATTENTION_BACKWARD,
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor bias, Tensor? mask,"
    " Tensor out, Tensor lse, float scale, str masked_rows, str wanted, bool deterministic,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _attention_backward,
    _attention_backward_fake,
    autograd=_attention_backward_autograd,
)
gate = Operator(
    GATE,
    "(Tensor out, Tensor logits, str backend) -> Tensor",
    _gate,
    _gate_fake,
    autograd=_Gate.apply,
)
gate_backward = Operator(
    GATE_BACKWARD,
    "(Tensor dgated, Tensor out, Tensor logits, str backend) -> (Tensor, Tensor)",
    _gate_backward,
    _gate_backward_fake,
    autograd=_gate_backward_autograd,
)
