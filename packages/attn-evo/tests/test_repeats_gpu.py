"""Calls that are repeated, on a GPU: both passes have the bits of calls in full."""

from __future__ import annotations

import pytest
import torch

from attn_core.testing import random_tensor
from attn_core.testing.repeats import assert_repeats
from attn_evo import EvoWeights, evo_attention, evo_attention_step, prefix_sum

pytestmark = pytest.mark.gpu

B, H, L, D = 2, 4, 600, 64


def draw(i, *shape, device, n=0):
    return random_tensor(shape, seed=f"{i}-{n}", dtype=torch.bfloat16, device=device)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_both_passes(causal, device):
    weights = EvoWeights.identity(D, dtype=torch.bfloat16, device=device)

    def function(v, dout, w_q):
        v, w_q = v.detach().requires_grad_(), w_q.detach().requires_grad_()
        out = evo_attention(v, causal, weights=weights._replace(w_q=w_q), backend="triton")
        return out, *torch.autograd.grad(out, (v, w_q), dout)

    assert_repeats(
        function,
        lambda i: (
            *(draw(i, B, H, L, D, device=device, n=n) for n in range(2)),
            weights.w_q + draw(i, D, D, device=device, n=2) / 8,
        ),
        passes=2,
    )


def test_steps(device):
    def function(*tokens):
        outputs, state = [], None
        for token in tokens:
            out, state = evo_attention_step(token, state, backend="triton")
            outputs.append(out)
        return *outputs, *state

    assert_repeats(function, lambda i: [draw(i, B, H, 1, D, device=device, n=n) for n in range(5)])


def test_prefix_sum(device):
    assert_repeats(
        lambda x: prefix_sum(x, exclusive=True, backend="triton"),
        lambda i: [draw(i, B, H, L, D, device=device)],
    )
