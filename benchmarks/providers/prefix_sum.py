"""attn-evo's prefix_sum: sums along the tokens, limited by what the memory moves."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from benchmarks.problems import Case
from benchmarks.providers.base import (
    Call,
    Expected,
    Provider,
    Subject,
    compiled,
    error_limit,
    leaf,
    wants_grad,
)

_TOKENS = -2


class Inputs(NamedTuple):
    """x and dout (B, H, L, D)."""

    x: torch.Tensor
    dout: torch.Tensor


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw random values and gradients."""
    generator = torch.Generator(device).manual_seed(case.seed)
    shape = (2, case["B"], case["H"], case["L"], case["D"])
    return Inputs(*torch.randn(shape, dtype=case.dtype, device=device, generator=generator))


def reference(case: Case, inputs: Inputs, gradients: bool) -> list[Expected]:
    """Sums in float64; an element's gradient is the sum of those from its own on."""
    sums = {"out": _sums(inputs.x)}
    if gradients:
        sums["dx"] = _sums(inputs.dout.flip(_TOKENS)).flip(_TOKENS)
    limit = error_limit(case.dtype)
    return [Expected(name, value, lambda tensor: tensor, limit) for name, value in sums.items()]


def _sums(x: torch.Tensor) -> torch.Tensor:
    return x.double().cumsum(_TOKENS)


def flops(case: Case, pass_: str) -> float | None:
    """Return None: sums are bound by memory, not by arithmetic."""
    return None


def traffic(case: Case, pass_: str) -> float:
    """Count what is summed up and its sums, once."""
    return 2 * case["B"] * case["H"] * case["L"] * case["D"] * case.dtype.itemsize


def _ours(backend: str, case: Case, inputs: Inputs) -> Call:
    from attn_evo import prefix_sum

    x = leaf(inputs.x, wants_grad(case))
    return Call(lambda: prefix_sum(x, _TOKENS, backend=backend), (x,), inputs.dout)


def _cumsum(x: torch.Tensor) -> torch.Tensor:
    """Torch's, told to sum in float32: in bfloat16 it loses what is smaller than a sum's bits."""
    return x.cumsum(_TOKENS, dtype=torch.float32).to(x.dtype)


def _torch(case: Case, inputs: Inputs) -> Call:
    x = leaf(inputs.x, wants_grad(case))
    return Call(lambda: _cumsum(x), (x,), inputs.dout)


def _compiled(case: Case, inputs: Inputs) -> Call:
    compute = compiled(_cumsum)
    x = leaf(inputs.x, wants_grad(case))
    return Call(lambda: compute(x), (x,), inputs.dout)


def _copy(case: Case, inputs: Inputs) -> Call:
    """Reads and writes as much and adds nothing; whether it is whole its sums tell."""
    out = torch.empty_like(inputs.x)
    return Call(lambda: out.copy_(inputs.x), canonical=_sums)


def _backend(name: str, **options: Any) -> Provider:
    return Provider(name, functools.partial(_ours, name), "ours", "attn_evo", **options)


SUBJECT = Subject(
    package="attn-evo-prefix-sum",
    providers=(
        _backend("triton"),
        _backend("torch", devices=("cpu", "cuda")),
        Provider("torch.cumsum", _torch, devices=("cpu", "cuda")),
        Provider("torch.compile", _compiled),
        Provider("copy", _copy, "bound", devices=("cpu", "cuda"), passes=("forward",)),
    ),
    make_inputs=make_inputs,
    reference=reference,
    flops=flops,
    traffic=traffic,
    x_axis="L",
    warm=True,
)
