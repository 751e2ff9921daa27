"""Random problems against the reference: results, every gradient, and streams in pieces."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_core.testing import embedded, random_tensor
from attn_core.testing.strategies import lengths, orders
from attn_evo import EvoWeights, evo_attention, evo_attention_step, prefix_sum, reference

SIZES = st.tuples(st.integers(1, 2), st.integers(1, 3), lengths(16, 40), st.integers(2, 9))


@settings(max_examples=60, deadline=None)
@given(size=SIZES, layout=orders(4), is_masked=st.booleans(), causal=st.booleans())
def test_any_fitting_arguments(size, layout, is_masked, causal):
    B, _, L, D = size
    v = embedded(values(size), order=layout).requires_grad_()
    weights = random_weights(D)
    mask = random_tensor((B, L), seed=1) > -1 if is_masked else None
    actual = evo_attention(v, causal, mask, weights=weights)
    expected, _ = reference.attention(v, weights, causal, mask)
    torch.testing.assert_close(actual, expected)
    dout = random_tensor(size, seed=2, dtype=torch.float64)
    leaves = (v, *weights)
    grads = (
        torch.autograd.grad(out, leaves, dout, allow_unused=True, materialize_grads=True)
        for out in (actual, expected)
    )
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(size=SIZES, cuts=st.lists(st.integers(0, 40), max_size=4))
def test_a_stream_in_any_pieces(size, cuts):
    v = values(size)
    weights = random_weights(size[3])
    state, outputs = None, []
    for piece in v.tensor_split(sorted(min(cut, size[2]) for cut in cuts), dim=2):
        out, state = evo_attention_step(piece, state, weights=weights)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=2), evo_attention(v, weights=weights))
    assert state.length == size[2]


@settings(max_examples=60, deadline=None)
@given(
    size=st.lists(lengths(8, 20), min_size=1, max_size=4),
    dim=st.integers(-4, 3),
    exclusive=st.booleans(),
    reverse=st.booleans(),
)
def test_any_prefix_sum(size, dim, exclusive, reverse):
    x = random_tensor(size, seed=3, dtype=torch.float64)
    dim %= len(size)
    actual = prefix_sum(x, dim, exclusive, reverse)
    torch.testing.assert_close(actual, reference.prefix_sum(x, dim, exclusive, reverse))


def values(size):
    return random_tensor(size, seed=0, dtype=torch.float64) + 0.1


def random_weights(dim):
    sizes = [(dim, dim), (dim,)] * 4 + [(dim,)] * 2
    return EvoWeights(
        *(
            random_tensor(size, seed=seed, dtype=torch.float64, scale=dim**-0.5).requires_grad_()
            for seed, size in enumerate(sizes)
        )
    )
