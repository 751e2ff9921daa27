"""The operators torch.compile, torch.export and opcheck see, and the rule that differentiates them.

``attn_flash::attention`` and ``attn_flash::attention_backward`` are one pair for every public
function of the package. Tensors are (B, S, H, D) and `lse` (B, H, M), or (T, H, D) and (H, T_q)
where sequences are ragged, of any strides; `lse` is float32, float64 for float64 inputs.
`Options` has the arguments beside q, k and v, which the operators take one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attn_core import backends
from attn_core.dtypes import accumulator_dtype
from attn_core.library import Function, Operator
from attn_flash import options, reference
from attn_flash.checks import describe
from attn_flash.options import Options

ATTENTION = "attn_flash::attention"
ATTENTION_BACKWARD = "attn_flash::attention_backward"
ATTENTION_PROBS = "attn_flash::attention_probs"


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    *values, backend = rest
    opts = Options(*values).bound(q, k)
    compute = _implementation(ATTENTION, backend, q, k, v, opts)
    return compute(q, k, v, opts)  # type: ignore[no-any-return]


def _attention_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    *values, backend = rest
    problem = describe(q, k, v, Options(*values), needs_grad=False)
    backends.require(ATTENTION, problem, backend)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(lse_shape(q), dtype=accumulator_dtype(q.dtype))


def _attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    needs_dbias: bool,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    *values, backend = rest
    opts = Options(*values).bound(q, k)
    compute = _implementation(ATTENTION_BACKWARD, backend, q, k, v, opts)
    grads = compute(dout, dlse, q, k, v, out, lse, needs_dbias, opts)
    return tuple(q.new_empty(0) if grad is None else grad for grad in grads)


def _attention_backward_fake(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    needs_dbias: bool,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    opts = Options(*rest[:-1])
    bias, sinks = opts.attn_bias if needs_dbias else None, opts.sinks
    return tuple(
        q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, bias, sinks)
    )


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, compute: Callable[..., Any], static: tuple[Any, ...], *tensors: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = compute(*tensors, *static)
        ctx.save_for_backward(out, lse, *tensors)
        ctx.static = static
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
        out, lse, q, k, v, *tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        _, _, *needs = ctx.needs_input_grad
        dq, dk, dv, dbias, dsinks = attention_backward(
            dout, dlse, q, k, v, out, lse, needs[_BIAS], *tensors, *ctx.static
        )
        grads = [dq, dk, dv, *[None] * (len(needs) - 3)]
        grads[_BIAS] = dbias if needs[_BIAS] else None
        grads[_SINKS] = dsinks if needs[_SINKS] else None
        return None, None, *grads


def _attention_autograd(compute: Callable[..., Any], *args: Any) -> Any:
    # Autograd looks at each of its arguments: numbers go in one.
    static, tensors = args[_FIRST_STATIC:], args[:_FIRST_STATIC]
    return _Attention.apply(compute, static, *tensors)


_BIAS = 3 + Options._fields.index("attn_bias")
_SINKS = 3 + Options._fields.index("sinks")
_FIRST_STATIC = 3 + Options._fields.index("max_seqlen_q")  # what comes before are tensors, or None


def _attention_backward_autograd(
    _: Any,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    needs_dbias: bool,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    """Gradients to differentiate again: the plain formula, recomputed in O(M N) memory."""
    opts = Options(*rest[:-1])
    bias, sinks = opts.attn_bias if needs_dbias else None, opts.sinks
    with torch.enable_grad():
        q, k, v = _leaf(q), _leaf(k), _leaf(v)
        bias, sinks = None if bias is None else _leaf(bias), None if sinks is None else _leaf(sinks)
        inputs = (q, k, v, bias, sinks)
        if bias is not None:
            opts = opts._replace(attn_bias=bias)
        out, lse = reference.attention_with(q, k, v, opts._replace(sinks=sinks))
        outputs, grads = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse.to(lse)])
        found = iter(
            torch.autograd.grad(
                outputs,
                [x for x in inputs if x is not None],
                grads,
                create_graph=True,
                materialize_grads=True,
            )
        )
        return tuple(q.new_empty(0) if x is None else next(found) for x in inputs)


def _leaf(x: torch.Tensor) -> torch.Tensor:
    """An input that needs no gradient still has to be part of the graph to be asked for."""
    return x if x.requires_grad else x.detach().requires_grad_()


def _attention_probs(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, *rest: Any
) -> torch.Tensor:
    from attn_flash import _torch  # the only one to compute them: O(M N) memory by nature

    with torch.no_grad():
        return _torch.signed_probabilities(q, k, lse, Options(*rest).bound(q, k))


def _attention_probs_fake(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, *rest: Any
) -> torch.Tensor:
    opts = Options(*rest)
    batch = q.shape[0] if opts.cu_seqlens_q is None else opts.cu_seqlens_q.shape[0] - 1
    return q.new_empty((batch, q.shape[-2], *opts.lengths(q, k)))


def lse_shape(q: torch.Tensor) -> tuple[int, ...]:
    """(B, H, M), or (H, T_q) where sequences are ragged."""
    return (*q.shape[:-3], q.shape[-2], q.shape[-3])


def _implementation(
    op: str, backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, opts: Options
) -> Any:
    """The backend's function; "auto" reaches this far only from a compiled graph."""
    if backend == backends.AUTO:
        problem = describe(q, k, v, opts, needs_grad=opts.block_table is None)
        backend = backends.resolve(ATTENTION, problem)
    return backends.implementation(op, backend)


attention = Operator(
    ATTENTION,
    f"(Tensor q, Tensor k, Tensor v, {options.SCHEMA}, str backend) -> (Tensor, Tensor)",
    _attention,
    _attention_fake,
    autograd=_attention_autograd,
)
attention_backward = Operator(
    ATTENTION_BACKWARD,
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" bool needs_dbias, {options.SCHEMA}, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _attention_backward,
    _attention_backward_fake,
    autograd=_attention_backward_autograd,
)
attention_probs = Operator(
    ATTENTION_PROBS,
    f"(Tensor q, Tensor k, Tensor lse, {options.SCHEMA}) -> Tensor",
    _attention_probs,
    _attention_probs_fake,
    autograd=None,
)
