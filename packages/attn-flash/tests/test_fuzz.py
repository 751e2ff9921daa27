"""Random problems: the right answer or a clear error."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_core.testing import embedded, random_tensor
from attn_flash import flash_attn_func, flash_attn_varlen_func, reference
from attn_flash.options import Options

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
    fitting = k.shape[0] == B and k.shape[3] == D and v.shape[:3] == k.shape[:3]
    return fitting and D > 0 and v.shape[3] > 0 and k.shape[2] > 0 and H % k.shape[2] == 0


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
    # All values are 1, and so is their mean; without keys it is 0.
    expected = q.new_full((*q.shape[:3], v.shape[3]), float(k.shape[1] > 0))
    torch.testing.assert_close(out, expected)


BROKEN = st.sampled_from([None, 1.0, -1, math.nan, "x", torch.ones(3), torch.ones(2, 2, 2, 2, 2)])


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.tuples(SIZES, SIZES), max_size=3),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    dims=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    terms=st.sets(
        st.sampled_from(["softcap", "alibi_slopes", "attn_bias", "key_mask", "sinks", "dropout_p"])
    ),
    bias_dims=st.tuples(*[st.booleans()] * 4),
    is_bool=st.booleans(),
    window=st.tuples(SIDES, SIDES),
    broken=st.one_of(st.none(), st.tuples(st.integers(0, 5), BROKEN)),
)
def test_any_features(lengths, heads, dims, terms, bias_dims, is_bool, window, broken):
    (H_KV, group), (D, D_v), B = heads, dims, len(lengths)
    H, M, N = H_KV * group, *(max((x[side] for x in lengths), default=0) for side in (0, 1))
    q, k, v = (
        random_tensor((sum(x[side] for x in lengths), *sizes), seed=seed, dtype=torch.float64)
        for seed, (side, *sizes) in enumerate([(0, H, D), (1, H_KV, D), (1, H_KV, D_v)])
    )
    starts_q, starts_k = (
        torch.tensor([0, *(x[side] for x in lengths)]).cumsum(0).int() for side in (0, 1)
    )
    bias = tuple(n if whole else 1 for n, whole in zip((B, H, M, N), bias_dims, strict=True))
    values = {
        "softcap": 2.0,
        "alibi_slopes": torch.rand(B, H),
        "attn_bias": random_tensor(bias, seed=5, dtype=torch.float64),
        "key_mask": random_tensor((B, N), seed=6) > -1,
        "sinks": random_tensor((H,), seed=7, dtype=torch.float64),
        "dropout_p": 0.5,
    }
    if is_bool:
        values["attn_bias"] = values["attn_bias"] > -1
    options = {name: values[name] for name in sorted(terms)}
    state = torch.tensor([1, 2])
    arguments = (q, k, v, starts_q, starts_k, M, N)
    if broken is not None:
        name = [*values][broken[0]]
        try:
            out = flash_attn_varlen_func(*arguments, **options | {name: broken[1]})
        except ValueError as error:
            if name not in str(error):
                raise
        else:  # None and -1 may be what a caller means, and three ones may be slopes or sinks
            assert not out.isnan().any()
        return
    out, lse, _ = flash_attn_varlen_func(
        *arguments, window_size=window, return_attn_probs=True, rng_state=state, **options
    )
    expected = reference.attention_with(
        q, k, v,
        Options(
            cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, scale=D**-0.5, rng_state=state,
            window_left=max(window[0], -1), window_right=max(window[1], -1), **options,
        ),
    )  # fmt: skip
    torch.testing.assert_close((out, lse), expected)
