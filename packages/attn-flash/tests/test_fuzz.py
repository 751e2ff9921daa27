"""Random problems: the right answer or a clear error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_core.testing import embedded, random_tensor
from attn_flash import flash_attn_func, reference

SIZES = st.integers(0, 9)
SIDES = st.integers(-2, 10)
ORDERS = st.permutations(range(4))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(SIZES, SIZES, SIZES),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    head_dim=st.integers(1, 33),
    window=st.tuples(SIDES, SIDES),
    causal=st.booleans(),
    scale=st.one_of(st.none(), st.floats(-2, 2)),
    orders=st.tuples(ORDERS, ORDERS, ORDERS),
)
def test_any_fitting_arguments(sizes, heads, head_dim, window, causal, scale, orders):
    (B, M, N), (H_KV, group) = sizes, heads
    shapes = [(B, M, H_KV * group, head_dim), *[(B, N, H_KV, head_dim)] * 2]
    q, k, v = (
        embedded(random_tensor(shape, seed=seed, dtype=torch.float64), order=order).requires_grad_()
        for seed, (shape, order) in enumerate(zip(shapes, orders, strict=True))
    )
    out, lse, _ = flash_attn_func(q, k, v, 0.0, scale, causal, window, return_attn_probs=True)
    right = 0 if causal else window[1]
    expected = reference.attention(
        q, k, v, head_dim**-0.5 if scale is None else scale, (max(window[0], -1), max(right, -1))
    )
    torch.testing.assert_close((out, lse), expected)
    dout = random_tensor(out.shape, seed=9, dtype=torch.float64)
    actual = torch.autograd.grad(out, (q, k, v), dout)
    torch.testing.assert_close(actual, torch.autograd.grad(expected[0], (q, k, v), dout))


def fits(q, k, v):
    if any(x.dim() != 4 or x.dtype != q.dtype for x in (q, k, v)) or q.dtype == torch.int64:
        return False
    B, _, H, D = q.shape
    fitting = k.shape[0] == B and k.shape[3] == D and v.shape == k.shape
    return fitting and D > 0 and k.shape[2] > 0 and H % k.shape[2] == 0


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.one_of(
        st.tuples(*[st.lists(st.integers(0, 3), min_size=2, max_size=5)] * 3),
        st.tuples(*[st.lists(st.integers(1, 2), min_size=4, max_size=4)] * 3),
    ),
    dtypes=st.one_of(
        st.tuples(*[st.sampled_from([torch.float32, torch.float16, torch.int64])] * 3),
        st.just((torch.float32,) * 3),
    ),
)
def test_any_tensors(shapes, dtypes):
    q, k, v = (torch.ones(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    if not fits(q, k, v):
        with pytest.raises(ValueError, match=r"^([qkv]|the (number|head).*) must "):
            flash_attn_func(q, k, v)
        return
    out = flash_attn_func(q, k, v)
    assert out.shape == q.shape
    # All values are 1, and so is their mean; without keys it is 0.
    torch.testing.assert_close(out, torch.full_like(q, float(k.shape[1] > 0)))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["dropout_p", "softcap"]), st.floats(allow_nan=True, allow_infinity=True))
def test_later_features_are_never_ignored(name, value):
    q = torch.ones(1, 2, 1, 4)
    if value == 0.0:
        assert flash_attn_func(q, q, q, **{name: value}).shape == q.shape
        return
    with pytest.raises(ValueError, match=f"{name} must be 0"):
        flash_attn_func(q, q, q, **{name: value})
