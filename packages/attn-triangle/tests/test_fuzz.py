"""Random problems against the reference: results and every gradient."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_core.testing import embedded, random_tensor
from attn_core.testing.strategies import attention_shapes, lengths, orders
from attn_triangle import reference, triangle_attention

ORDERS = orders(5)


@settings(max_examples=60, deadline=None)
@given(
    shape=attention_shapes(largest=9, head_dims=(1, 4, 8)),
    rows=lengths(largest=3),
    layouts=st.tuples(ORDERS, ORDERS, ORDERS),
    bias_dims=st.tuples(*[st.booleans()] * 4),
    mask_dims=st.tuples(*[st.booleans()] * 3),
    mask_kind=st.sampled_from(["none", "boolean", "added"]),
    masked_rows=st.sampled_from(["mean", "zero"]),
    scale=st.one_of(st.none(), st.floats(-2, 2)),
)
def test_any_fitting_arguments(
    shape, rows, layouts, bias_dims, mask_dims, mask_kind, masked_rows, scale
):
    B, M, N, H, _, D = shape
    sizes = [(B, H, rows, n, D) for n in (M, N, N)]
    q, k, v = (
        embedded(tensor(size, seed), order=order)
        for seed, (size, order) in enumerate(zip(sizes, layouts, strict=True))
    )
    bias = tensor(kept((B, H, M, N), bias_dims), 3)
    mask = None if mask_kind == "none" else tensor(kept((B, rows, N), mask_dims), 4)
    if mask_kind == "boolean":
        mask = mask > 0
    leaves = [x for x in (q, k, v, bias, mask) if x is not None and x.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()

    actual = triangle_attention(
        q, k, v, bias, mask, scale=scale, return_lse=True, masked_rows=masked_rows
    )
    factor = D**-0.5 if scale is None else scale
    expected = reference.attention(q, k, v, bias, mask, factor, masked_rows)
    torch.testing.assert_close(actual, expected)

    weights = tensor(actual[0].shape, 5), tensor(actual[1].shape, 6)
    grads = (
        torch.autograd.grad(weighted(outputs, weights), leaves) for outputs in (actual, expected)
    )
    torch.testing.assert_close(*grads)


def tensor(size, seed):
    return random_tensor(size, seed=seed, dtype=torch.float64)


def kept(size, dims):
    """A size that broadcasts to `size`: 1 where `dims` says so."""
    return tuple(n if whole else 1 for n, whole in zip(size, dims, strict=True))


def weighted(outputs, weights):
    """A number that all of out and lse weigh in, but for lse of -inf."""
    return sum(
        (x.masked_fill(x == -torch.inf, 0.0) * w).sum()
        for x, w in zip(outputs, weights, strict=True)
    )
