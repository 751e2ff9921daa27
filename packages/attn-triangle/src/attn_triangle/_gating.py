"""The sigmoid gate of the module: which backend computes it, and the call."""

from __future__ import annotations

import torch

from attn_core import backends, environment
from attn_triangle import checks, ops


def sigmoid_gate(out: torch.Tensor, logits: torch.Tensor, backend: str) -> torch.Tensor:
    """Compute out * sigmoid(logits), both of one shape.

    A backend that computes attention alone leaves the gate to PyTorch.
    """
    if backend == backends.AUTO:
        backend = environment.backend()
    if backend != backends.AUTO and backend not in backends.available(ops.GATE):
        backend = "torch"
    needs_grad = torch.is_grad_enabled() and (out.requires_grad or logits.requires_grad)
    problem = checks.GateProblem(out.device, out.dtype, needs_grad)
    name = backends.resolve(ops.GATE, problem, backend)
    gated: torch.Tensor = ops.gate(out, logits, name)
    return gated
