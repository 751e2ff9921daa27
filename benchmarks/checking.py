"""Is it right? Every provider is compared with float64 before it is timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.providers.base import Call, Expected

# A row may err more than the whole; one that is plainly wrong errs by about 1.
_ROW_FACTOR = 15.0


class WrongResultError(Exception):
    """A provider's result is not the operator's."""


def check_forward(call: Call, expected: Expected, grad: bool) -> tuple[torch.Tensor, float]:
    """Run the forward pass over poisoned memory; return its output and relative error."""
    poison([*call.inputs, expected.value])
    with torch.set_grad_enabled(grad), call.context():
        out = call.forward()
    return out, judge(call.canonical(out), expected)


def check_backward(call: Call, out: torch.Tensor, expected: Sequence[Expected]) -> float:
    """Run the backward pass over poisoned memory; return the largest relative error."""
    poison(call.inputs)
    with call.context():
        grads = torch.autograd.grad(out, call.inputs, call.grad_out, retain_graph=True)
    pairs = zip(grads, expected, strict=True)
    return max(judge(call.canonical(grad), wanted) for grad, wanted in pairs)


def judge(actual: torch.Tensor, expected: Expected) -> float:
    """Return the relative error of a result; WrongResultError if it is beyond the limit."""
    name = expected.name
    if not bool(torch.isfinite(actual).all()):
        raise WrongResultError(f"{name} has elements that are not finite")
    part = expected.part(actual.detach())
    if part.shape != expected.value.shape:
        raise WrongResultError(
            f"{name} has shape {tuple(part.shape)}, not {tuple(expected.value.shape)}"
        )
    total, worst_row = relative_errors(part.double(), expected.value)
    if expected.limit is None:
        return total
    if total > expected.limit:
        raise WrongResultError(f"{name} errs by {total:.1e}, more than {expected.limit:.0e}")
    if worst_row > expected.limit * _ROW_FACTOR:
        raise WrongResultError(f"a row of {name} errs by {worst_row:.1e}")
    return total


def relative_errors(actual: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Return the error of the whole, and that of the worst row.

    A row's error is relative to its own norm plus the root mean square of the norms: rows that
    cancel to nearly nothing hold nothing but rounding.
    """
    errors = (actual - reference).norm(dim=-1)
    norms = reference.norm(dim=-1)
    tiny = torch.finfo(torch.float64).tiny
    total = errors.norm() / norms.norm().clamp_min(tiny)
    rows = errors / (norms + norms.square().mean().sqrt()).clamp_min(tiny)
    return float(total), float(rows.max())


def poison(tensors: Sequence[torch.Tensor]) -> None:
    """Fill blocks of these sizes with NaN and free them, so that new outputs land on NaN."""
    blocks = [
        torch.full_like(tensor, torch.nan, requires_grad=False)
        for tensor in tensors
        if tensor.is_floating_point()
    ]
    del blocks
