"""attn-evo: gated prefix sums over the values, linear in the length."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from attn_evo import EvoWeights, evo_attention
from attn_evo.reference import attention
from benchmarks.problems import Case
from benchmarks.providers.base import (
    Call,
    Expected,
    Provider,
    Subject,
    compiled,
    error_limit,
    leaf,
    nothing_compiled,
    wants_grad,
)

# Rounding of the statistics is magnified by the gate's small denominators.
_MAGNIFICATION = 10.0
_REFERENCE_ELEMENTS = 1 << 23  # of v, computed at a time


class Inputs(NamedTuple):
    """v and dout (B, H, L, D), and the ten parameters as attn_evo.EvoWeights orders them."""

    v: torch.Tensor
    dout: torch.Tensor
    weights: tuple[torch.Tensor, ...]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw random values, gradients and parameters."""
    generator = torch.Generator(device).manual_seed(case.seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=case.dtype, device=device, generator=generator)

    dim = case["D"]
    linears = [draw(*shape) * dim**-0.5 for _ in range(4) for shape in ((dim, dim), (dim,))]
    weights = (*linears, 1 + 0.1 * draw(dim), 0.1 * draw(dim))
    values, dout = draw(2, case["B"], case["H"], case["L"], dim)
    return Inputs(values, dout, weights)


def reference(case: Case, inputs: Inputs, gradients: bool) -> list[Expected]:
    """The plain formula in float64, some heads at a time: only the parameters are shared."""
    weights = [tensor.double().requires_grad_(gradients) for tensor in inputs.weights]
    out, dv = (torch.empty_like(inputs.v, dtype=torch.float64) for _ in range(2))
    totals = [torch.zeros_like(tensor, requires_grad=False) for tensor in weights]
    heads = max(1, _REFERENCE_ELEMENTS // (case["L"] * case["D"]))
    tensors = (tensor.flatten(0, 1).split(heads) for tensor in (inputs.v, inputs.dout, out, dv))
    for values, dout, out_part, dv_part in zip(*tensors, strict=True):
        v = values[None].double().requires_grad_(gradients)
        computed, _ = attention(v, EvoWeights(*weights), case["causal"])
        out_part.copy_(computed.detach()[0])
        if not gradients:
            continue
        grads = torch.autograd.grad(computed, (v, *weights), dout[None].double())
        dv_part.copy_(grads[0][0])
        torch._foreach_add_(totals, grads[1:])
    expected = [Expected("out", out, _whole, _MAGNIFICATION * error_limit(case.dtype))]
    if gradients:
        # Near the poles of the gate the gradients of rounded inputs are noise: shown, not judged.
        names = ("v", *EvoWeights._fields)
        expected += [
            Expected(f"d{name}", grad, _whole, None)
            for name, grad in zip(names, (dv, *totals), strict=True)
        ]
    return expected


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def flops(case: Case, pass_: str) -> float | None:
    """Return None: the operator is bound by memory, not by arithmetic."""
    return None


def traffic(case: Case, pass_: str) -> float:
    """Count v and out, or v, dout and dv, once."""
    tensors = 3 if pass_ == "backward" else 2
    return tensors * case["B"] * case["H"] * case["L"] * case["D"] * case.dtype.itemsize


def _leaves(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return tuple(leaf(tensor, wants_grad(case)) for tensor in (inputs.v, *inputs.weights))


def _ours(backend: str, case: Case, inputs: Inputs) -> Call:
    leaves = _leaves(case, inputs)
    v, weights = leaves[0], EvoWeights(*leaves[1:])

    def forward() -> torch.Tensor:
        return evo_attention(v, case["causal"], weights=weights, backend=backend)

    return Call(forward, leaves, inputs.dout)


def _kind(case: Case) -> tuple[Any, ...]:
    """What our kernels are compiled for: lengths share them."""
    return case.dtype, case["D"], case["causal"]


def _compiled(case: Case, inputs: Inputs) -> Call:
    compute = compiled(attention)
    leaves = _leaves(case, inputs)
    v, weights = leaves[0], EvoWeights(*leaves[1:])
    return Call(lambda: compute(v, weights, case["causal"])[0], leaves, inputs.dout)


def _evo_attn(case: Case, inputs: Inputs) -> Call:
    """Its module, which makes its parameters at the first call and then takes ours."""
    from evo_attn.evo_causal import EvoAttentionCausalTriton

    core = EvoAttentionCausalTriton()
    with torch.no_grad():
        core(inputs.v[:1, :1, :64], causal=case["causal"])
    v = leaf(inputs.v, wants_grad(case))
    names = ("q_proj", "v_proj_local", "global_stat_gate_proj", "final_gate_proj", "norm")
    layers = [getattr(core, name) for name in names]
    parameters = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
    for parameter, weight in zip(parameters, inputs.weights, strict=True):
        parameter.data.copy_(weight)
        parameter.requires_grad_(wants_grad(case))
    return Call(lambda: core(v, causal=case["causal"]), (v, *parameters), inputs.dout)


SUBJECT = Subject(
    package="attn-evo",
    providers=(
        Provider("triton", functools.partial(_ours, "triton"), "ours", kind_of=_kind),
        Provider(
            "torch",
            functools.partial(_ours, "torch"),
            "ours",
            devices=("cpu", "cuda"),
            compiles=nothing_compiled,
        ),
        Provider("torch.compile", _compiled),
        Provider("evo-attn", _evo_attn, module="evo_attn", distribution="evo-attn"),
    ),
    make_inputs=make_inputs,
    reference=reference,
    flops=flops,
    traffic=traffic,
    x_axis="L",
    warm=True,
)
