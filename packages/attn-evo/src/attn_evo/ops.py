"""The operators torch.compile, torch.export and opcheck see, and the rules that differentiate them.

``attn_evo::attention`` takes v (B, H, L, D), the ten weights, a mask (B, L) of bool, and, of the
tokens before v, their sums (2, B, H, D) in `accum_dtype` and their number (). It returns the output
and the sums up to the last token. `tiles` is as in `checks.AttentionProblem`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from attn_core import backends
from attn_core.library import Function, Operator
from attn_evo import reference
from attn_evo.checks import attention_problem, prefix_sum_problem
from attn_evo.weights import EvoWeights

ATTENTION = "attn_evo::attention"
ATTENTION_BACKWARD = "attn_evo::attention_backward"
PREFIX_SUM = "attn_evo::prefix_sum"
PREFIX_SUM_BACKWARD = "attn_evo::prefix_sum_backward"


class _Call(NamedTuple):
    """The arguments of ``attn_evo::attention``, with the weights in one piece."""

    v: torch.Tensor
    weights: EvoWeights
    mask: torch.Tensor | None
    sums: torch.Tensor | None
    length: torch.Tensor | None
    causal: bool
    accum_dtype: torch.dtype
    tiles: list[int]
    backend: str


def _call(v: torch.Tensor, *args: Any) -> _Call:
    count = len(EvoWeights._fields)
    return _Call(v, EvoWeights(*args[:count]), *args[count:])


def _attention(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = _call(*args)
    compute = _implementation(ATTENTION, call)
    return compute(*call[:-1])  # type: ignore[no-any-return]


def _attention_fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = _call(*args)
    return call.v.new_empty(call.v.shape), _empty_sums(call)


def _attention_backward(
    dout: torch.Tensor, dsums_after: torch.Tensor | None, *args: Any
) -> tuple[torch.Tensor, ...]:
    call = _call(*args)
    compute = _implementation(ATTENTION_BACKWARD, call)
    dv, dsums, dweights = compute(dout, dsums_after, *call[:-1])
    return dv, dsums, *dweights


def _attention_backward_fake(
    dout: torch.Tensor, dsums_after: torch.Tensor | None, *args: Any
) -> tuple[torch.Tensor, ...]:
    call = _call(*args)
    dweights = (weight.new_empty(weight.shape) for weight in call.weights)
    return call.v.new_empty(call.v.shape), _empty_sums(call), *dweights


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, compute: Callable[..., Any], *args: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, sums_after = compute(*args)
        tensors = len(args) - _STATIC_ARGUMENTS
        ctx.save_for_backward(*args[:tensors])
        ctx.static = args[tensors:]
        ctx.set_materialize_grads(False)
        return out, sums_after

    @staticmethod
    def backward(
        ctx: Any, dout: torch.Tensor | None, dsums_after: torch.Tensor | None
    ) -> tuple[Any, ...]:
        v, *tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(v)
        dv, dsums, *dweights = attention_backward(dout, dsums_after, v, *tensors, *ctx.static)
        has_sums = ctx.needs_input_grad[1 + _SUMS_ARGUMENT]
        statics = (None,) * _STATIC_ARGUMENTS
        return None, dv, *dweights, None, dsums if has_sums else None, None, *statics


def _attention_backward_autograd(
    _: Any, dout: torch.Tensor, dsums_after: torch.Tensor | None, *args: Any
) -> tuple[torch.Tensor, ...]:
    """Gradients that can be differentiated again: those of the plain formula, recomputed."""
    call = _call(*args)
    sums = torch.zeros_like(_empty_sums(call)) if call.sums is None else call.sums
    with torch.enable_grad():
        # One tensor may serve as several arguments, each of which has a gradient of its own.
        inputs = [_node(tensor) for tensor in (call.v, sums, *call.weights)]
        v, sums, *weights = (tensor.to(call.accum_dtype) for tensor in inputs)
        out, after = reference.attention(
            v, EvoWeights(*weights), call.causal, call.mask, sums, call.length
        )
        outputs, grads = [out], [dout.to(out.dtype)]
        if dsums_after is not None:
            outputs, grads = [out, after], [*grads, dsums_after]
        return torch.autograd.grad(
            outputs, inputs, grads, create_graph=True, materialize_grads=True
        )


def _node(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


def _empty_sums(call: _Call) -> torch.Tensor:
    batch, heads, _, dim = call.v.shape
    return call.v.new_empty((2, batch, heads, dim), dtype=call.accum_dtype)


def _implementation(op: str, call: _Call) -> Any:
    """The backend's function; only a compiled graph brings what is not resolved yet."""
    name = call.backend
    if name == backends.AUTO or call.tiles:
        problem = attention_problem(
            call.v,
            call.weights,
            call.mask,
            call.sums,
            call.causal,
            call.accum_dtype,
            tuple(call.tiles),
        )._replace(needs_grad=True)
        name = backends.resolve(ATTENTION, problem, name)
    return backends.implementation(op, name)


def _prefix_sum(
    x: torch.Tensor, dim: int, exclusive: bool, reverse: bool, backend: str
) -> torch.Tensor:
    compute = _prefix_sum_implementation(PREFIX_SUM, backend, x, dim, exclusive, reverse)
    return compute(x, dim, exclusive, reverse)  # type: ignore[no-any-return]


def _prefix_sum_backward(
    dout: torch.Tensor, dim: int, exclusive: bool, reverse: bool, backend: str
) -> torch.Tensor:
    compute = _prefix_sum_implementation(
        PREFIX_SUM_BACKWARD, backend, dout, dim, exclusive, reverse
    )
    return compute(dout, dim, exclusive, reverse)  # type: ignore[no-any-return]


def _prefix_sum_fake(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


class _PrefixSum(Function):
    @staticmethod
    def forward(
        ctx: Any, compute: Callable[..., torch.Tensor], x: torch.Tensor, *static: Any
    ) -> torch.Tensor:
        ctx.static = static
        return compute(x, *static)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        return None, prefix_sum_backward(dout, *ctx.static), None, None, None, None


def _prefix_sum_backward_autograd(
    _: Any, dout: torch.Tensor, dim: int, exclusive: bool, reverse: bool, backend: str
) -> torch.Tensor:
    return prefix_sum(dout, dim, exclusive, not reverse, backend)  # type: ignore[no-any-return]


def _prefix_sum_implementation(
    op: str, backend: str, x: torch.Tensor, dim: int, exclusive: bool, reverse: bool
) -> Any:
    if backend == backends.AUTO:
        problem = prefix_sum_problem(x, dim, exclusive, reverse)._replace(needs_grad=True)
        backend = backends.resolve(PREFIX_SUM, problem)
    return backends.implementation(op, backend)


_SUMS_ARGUMENT = 12
_STATIC_ARGUMENTS = 4
_ARGUMENTS = (
    f"Tensor v, {', '.join(f'Tensor {name}' for name in EvoWeights._fields)}, Tensor? mask,"
    " Tensor? sums, Tensor? length, bool causal, ScalarType accum_dtype, int[] tiles, str backend"
)

attention = Operator(
    ATTENTION,
    f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    _attention,
    _attention_fake,
    autograd=_Attention.apply,
)
attention_backward = Operator(
    ATTENTION_BACKWARD,
    f"(Tensor dout, Tensor? dsums_after, {_ARGUMENTS})"
    f" -> ({', '.join(['Tensor'] * (2 + len(EvoWeights._fields)))})",
    _attention_backward,
    _attention_backward_fake,
    autograd=_attention_backward_autograd,
)
prefix_sum = Operator(
    PREFIX_SUM,
    "(Tensor x, int dim, bool exclusive, bool reverse, str backend) -> Tensor",
    _prefix_sum,
    _prefix_sum_fake,
    autograd=_PrefixSum.apply,
)
prefix_sum_backward = Operator(
    PREFIX_SUM_BACKWARD,
    "(Tensor dout, int dim, bool exclusive, bool reverse, str backend) -> Tensor",
    _prefix_sum_backward,
    _prefix_sum_fake,
    autograd=_prefix_sum_backward_autograd,
)
