"""The reference against the formula written token by token, feature by feature."""

from __future__ import annotations

import math

import pytest
import torch

from attn_core.testing import random_tensor
from attn_evo import reference


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def linear(x, weight, bias):
    return [
        sum(w * y for w, y in zip(row, x, strict=True)) + b
        for row, b in zip(weight, bias, strict=True)
    ]


def layer_norm(x, weight, bias):
    mean = sum(x) / len(x)
    scale = (sum((y - mean) ** 2 for y in x) / len(x) + 1e-5) ** -0.5
    return [(y - mean) * scale * w + b for y, w, b in zip(x, weight, bias, strict=True)]


def evo_head(v, w, causal):
    """EvoAttention of one head: v is a list of tokens, each a list of features."""
    length, dim = len(v), len(v[0])
    contexts = [[sum(v[s][d] for s in range(t + 1)) for d in range(dim)] for t in range(length)]
    if not causal:
        contexts = [contexts[-1]] * length
    counts = [t + 1 if causal else length for t in range(length)]
    stat_gates = [
        [sigmoid(x) for x in linear([c / n for c in context], w.w_g, w.b_g)]
        for context, n in zip(contexts, counts, strict=True)
    ]
    out = []
    for t in range(length):
        stat = [sum(stat_gates[s][d] * v[s][d] for s in range(counts[t])) for d in range(dim)]
        local = linear(v[t], w.w_l, w.b_l)
        query = linear(v[t], w.w_q, w.b_q)
        ratio = [q / (abs(s) + abs(x) + 1e-8) for q, s, x in zip(query, stat, local, strict=True)]
        gate = [r * sigmoid(r) * x for r, x in zip(ratio, v[t], strict=True)]
        alive = any(x != 0 for x in v[t])
        final = linear(gate, w.w_f, w.b_f)
        product = [sigmoid(f) * c * alive for f, c in zip(final, contexts[t], strict=True)]
        out.append(layer_norm(product, w.norm_weight, w.norm_bias))
    return out


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_reference_is_the_formula(length, causal, make_weights):
    v = random_tensor((1, 1, length, 3), seed=f"l{length}", dtype=torch.float64)
    v[0, 0, length // 2] = 0
    weights = make_weights(f"l{length}", 3, torch.float64)
    expected = evo_head(v[0, 0].tolist(), type(weights)(*(w.tolist() for w in weights)), causal)
    out, sums = reference.attention(v, weights, causal)
    torch.testing.assert_close(out[0, 0], torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(sums[0], v.sum(dim=2))


@pytest.mark.parametrize(
    "exclusive, reverse, expected",
    [
        (False, False, [1.0, 3.0, 7.0]),
        (True, False, [0.0, 1.0, 3.0]),
        (False, True, [7.0, 6.0, 4.0]),
        (True, True, [6.0, 4.0, 0.0]),
    ],
)
def test_reference_of_the_prefix_sum(exclusive, reverse, expected):
    x = torch.tensor([1.0, 2.0, 4.0])
    assert reference.prefix_sum(x, 0, exclusive, reverse).tolist() == expected
