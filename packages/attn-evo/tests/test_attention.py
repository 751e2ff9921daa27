"""Backend "torch" through evo_attention, against the reference in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from attn_core.testing import assert_within_budget, embedded, random_tensor
from attn_evo import EvoWeights, UnsupportedProblemError, evo_attention, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Case(NamedTuple):
    B: int
    H: int
    L: int
    D: int

    def __str__(self):
        return f"b{self.B}-h{self.H}-l{self.L}-d{self.D}"

    def values(self, dtype=torch.float32, device="cpu", scale=1.0):
        return random_tensor(self, seed=str(self), dtype=dtype, device=device, scale=scale)


CASES = [
    Case(1, 1, 1, 1),
    Case(1, 1, 1, 8),
    Case(2, 3, 2, 5),
    Case(2, 2, 63, 24),
    Case(1, 2, 65, 64),
    Case(2, 1, 64, 1),
    Case(1, 2, 1000, 16),
    Case(1, 1, 1025, 7),
    Case(1, 1, 17, 256),
]
EMPTY = [Case(0, 2, 3, 8), Case(2, 0, 3, 8), Case(2, 2, 0, 8)]
SMALL = Case(2, 3, 17, 8)


def show_dtype(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.fixture(params=[True, False], ids=["causal", "full"])
def causal(request):
    return request.param


def with_grad(v, weights):
    return v.detach().requires_grad_(), EvoWeights(*(w.detach().requires_grad_() for w in weights))


def cast(tensors, dtype):
    return EvoWeights(*(tensor.to(dtype) for tensor in tensors))


def gradients(out, dout, v, weights):
    return torch.autograd.grad(out, (v, *weights), dout.to(out.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=show_dtype)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_is_the_formula(case, dtype, causal, device, make_weights):
    v, weights = case.values(dtype, device), make_weights(str(case), case.D, dtype, device)
    out = evo_attention(v, causal, weights=weights)
    same_dtype, _ = reference.attention(v, weights, causal)
    exact, _ = reference.attention(v.double(), cast(weights, torch.float64), causal)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_within_budget(out, same_dtype, exact, name="out", factor=4.0)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=show_dtype)
@pytest.mark.parametrize("case", [case for case in CASES if case.D > 1], ids=str)
def test_gradients_are_those_of_the_formula(case, dtype, causal, device, make_weights):
    weights = make_weights(str(case), case.D, dtype, device)
    v, weights = with_grad(case.values(dtype, device), weights)
    dout = random_tensor(case, seed=f"{case}-dout", dtype=dtype, device=device)
    actual = gradients(evo_attention(v, causal, weights=weights), dout, v, weights)
    plain = gradients(reference.attention(v, weights, causal)[0], dout, v, weights)
    v, weights = with_grad(v.double(), cast(weights, torch.float64))
    exact = gradients(reference.attention(v, weights, causal)[0], dout, v, weights)
    for name, *grads in zip(("v", *EvoWeights._fields), actual, plain, exact, strict=True):
        assert grads[0].dtype == dtype
        assert_within_budget(*grads, name=f"d{name}", factor=4.0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_in_float64(case, causal, device, make_weights):
    weights = make_weights(str(case), case.D, torch.float64, device)
    v, weights = with_grad(case.values(torch.float64, device), weights)
    dout = random_tensor(case, seed=f"{case}-dout", dtype=torch.float64, device=device)
    actual = gradients(evo_attention(v, causal, weights=weights), dout, v, weights)
    expected = gradients(reference.attention(v, weights, causal)[0], dout, v, weights)
    # Poles magnify the last bit, and a norm of one feature cancels to an exact zero.
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=show_dtype)
def test_the_norm_of_one_feature_is_its_bias(dtype, causal, device, make_weights):
    case = Case(2, 1, 64, 1)
    v, weights = with_grad(case.values(dtype, device), make_weights("one", 1, dtype, device))
    out = evo_attention(v, causal, weights=weights)
    assert torch.equal(out, weights.norm_bias.expand_as(out))
    grads = EvoWeights(*torch.autograd.grad(out.sum(), weights))
    assert grads.norm_bias.item() == out.numel()
    for grad in grads[:-1]:
        torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-3, rtol=0)


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_no_tokens(case, causal, device):
    v, weights = with_grad(case.values(device=device), EvoWeights.identity(8, device=device))
    out = evo_attention(v, causal, weights=weights)
    assert out.shape == case
    dv, *dweights = gradients(out, torch.ones_like(out), v, weights)
    assert dv.shape == case
    assert all((grad == 0).all() for grad in dweights)


@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_values_of_any_size(scale, causal, device, make_weights):
    v, weights = SMALL.values(device=device, scale=scale), make_weights("scale", SMALL.D)
    weights = EvoWeights(*(w.to(device) for w in weights))
    same_dtype, _ = reference.attention(v, weights, causal)
    exact, _ = reference.attention(v.double(), cast(weights, torch.float64), causal)
    out = evo_attention(v, causal, weights=weights)
    assert_within_budget(out, same_dtype, exact, factor=4.0)


def test_weights_may_be_wider_than_the_values(causal, make_weights):
    v, weights = with_grad(SMALL.values(torch.bfloat16), make_weights("wide", SMALL.D))
    out = evo_attention(v, causal, weights=weights)
    exact, _ = reference.attention(v.double(), cast(weights, torch.float64), causal)
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=2**-8)
    dv, *dweights = gradients(out, torch.ones_like(out), v, weights)
    assert dv.dtype == torch.bfloat16
    assert {grad.dtype for grad in dweights} == {torch.float32}


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (3, 2, 1, 0), (0, 1, 3, 2)], ids=str)
def test_strides_change_nothing(order, causal, make_weights):
    weights = make_weights("strides", SMALL.D)
    v, weights = with_grad(SMALL.values(), weights)
    dout = random_tensor(SMALL, seed="dout")
    out = evo_attention(v, causal, weights=weights)
    grads = gradients(out, dout, v, weights)
    strided = EvoWeights(*(embedded(w).requires_grad_() for w in weights))
    hostile = embedded(v, order=order).requires_grad_()
    hostile_out = evo_attention(hostile, causal, weights=strided)
    hostile_dout = embedded(dout, order=order)
    torch.testing.assert_close(hostile_out, out)
    hostile_grads = gradients(hostile_out, hostile_dout, hostile, strided)
    torch.testing.assert_close(hostile_grads, grads, atol=1e-5, rtol=1e-4)


def test_expanded_values(causal, make_weights):
    one, weights = random_tensor((1, 1, 9, 4), seed="one"), make_weights("expanded", 4)
    out = evo_attention(one.expand(2, 3, 9, 4), causal, weights=weights)
    torch.testing.assert_close(out, evo_attention(one, causal, weights=weights).expand_as(out))


def test_a_batch_element_alone_is_the_one_in_the_batch(causal, make_weights):
    v, weights = SMALL.values(torch.float64), make_weights("batch", SMALL.D, torch.float64)
    out = evo_attention(v, causal, weights=weights)
    torch.testing.assert_close(evo_attention(v[1:, 2:], causal, weights=weights), out[1:, 2:])


def test_causal_output_ignores_what_comes_later(make_weights):
    v, weights = SMALL.values(), make_weights("future", SMALL.D)
    poisoned = v.clone()
    poisoned[:, :, 9:] = float("nan")
    out = evo_attention(poisoned, weights=weights)
    torch.testing.assert_close(out[:, :, :9], evo_attention(v, weights=weights)[:, :, :9])
    assert out[:, :, 9:].isnan().all()


def test_full_output_does_not_depend_on_the_order_of_tokens(make_weights):
    v, weights = SMALL.values(torch.float64), make_weights("order", SMALL.D, torch.float64)
    order = torch.randperm(SMALL.L)
    out = evo_attention(v, causal=False, weights=weights)
    moved = evo_attention(v[:, :, order], causal=False, weights=weights)
    torch.testing.assert_close(moved, out[:, :, order])


def test_no_weights_are_the_identity_every_time(causal):
    v = SMALL.values(torch.bfloat16)
    identity = EvoWeights.identity(SMALL.D, dtype=torch.bfloat16)
    first, second = evo_attention(v, causal), evo_attention(v, causal)
    assert torch.equal(first, second)
    assert torch.equal(first, evo_attention(v, causal, weights=identity))


def test_one_tensor_as_several_weights_gets_the_sum_of_gradients(causal, make_weights):
    weights = make_weights("shared", SMALL.D, torch.float64)
    v, dout = SMALL.values(torch.float64), random_tensor(SMALL, seed="dout", dtype=torch.float64)
    matrix = weights.w_q.requires_grad_()
    tied = weights._replace(w_l=matrix, w_g=matrix, w_f=matrix)
    out = evo_attention(v, causal, weights=tied)
    expected, _ = reference.attention(v, tied, causal)
    torch.testing.assert_close(
        torch.autograd.grad(out, matrix, dout), torch.autograd.grad(expected, matrix, dout)
    )


@pytest.mark.parametrize("shape", ["(B, L)", "(B, 1, L)", "(B, 1, L, 1)"])
@pytest.mark.parametrize(
    "mask_dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16], ids=show_dtype
)
def test_a_mask_multiplies_the_values(shape, mask_dtype, causal, make_weights):
    keep = random_tensor((SMALL.B, SMALL.L), seed="mask") > 0
    mask = {"(B, L)": keep, "(B, 1, L)": keep[:, None], "(B, 1, L, 1)": keep[:, None, :, None]}
    weights = make_weights("mask", SMALL.D)
    v, weights = with_grad(SMALL.values(), weights)
    dout = random_tensor(SMALL, seed="dout")
    out = evo_attention(v, causal, mask[shape].to(mask_dtype), weights=weights)
    expected = evo_attention(v * keep[:, None, :, None], causal, weights=weights)
    assert torch.equal(out, expected)
    dead = ~keep[:, None].expand(SMALL[:3])
    assert torch.equal(out[dead], weights.norm_bias.expand_as(out[dead]))
    actual = gradients(out, dout, v, weights)
    torch.testing.assert_close(actual, gradients(expected, dout, v, weights))
    assert (actual[0][dead] == 0).all()


def test_a_floating_mask_scales(causal):
    v, mask = SMALL.values(), torch.full((SMALL.B, SMALL.L), 0.5)
    assert torch.equal(evo_attention(v, causal, mask), evo_attention(v * 0.5, causal))


def test_a_bool_mask_hides_nan(causal):
    v, keep = SMALL.values(), torch.arange(SMALL.L).expand(SMALL.B, -1) % 3 > 0
    hidden = v.masked_fill(~keep[:, None, :, None], float("nan")).requires_grad_()
    out = evo_attention(hidden, causal, keep)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert hidden.grad.isfinite().all()


def test_nothing_is_kept(causal):
    v = SMALL.values()
    assert (evo_attention(v, causal, torch.zeros(SMALL.B, SMALL.L)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=show_dtype)
def test_float64_accumulation(dtype, causal, make_weights):
    v = Case(1, 1, 3000, 4).values(dtype) + 3
    weights = make_weights("accum", 4, torch.float64)
    exact, _ = reference.attention(v.double(), weights, causal)
    out = evo_attention(v, causal, accum_dtype=torch.float64, weights=weights)
    assert torch.equal(out, exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=show_dtype)
def test_token_counts_are_exact_beyond_what_the_dtype_holds(dtype):
    # With v = 1 the mean is 1 at every token, and so the statistic is sigmoid(1) t.
    v = torch.ones(1, 1, 3001, 2, dtype=dtype)
    identity = EvoWeights.identity(2, dtype=dtype)
    _, sums = torch.ops.attn_evo.attention(
        v, *identity, None, None, None, True, torch.float32, [], "torch"
    )
    expected = 3001 * torch.sigmoid(torch.ones(1, 1, 2))
    torch.testing.assert_close(sums[1], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=show_dtype)
def test_poles_are_finite(dtype, causal):
    # Without a local part the denominator is |stat| + 1e-8, and stat = 0 at every second token.
    sign = torch.tensor([1.0, -1.0]).repeat(8)
    v = (sign[:, None] * torch.ones(16, 4)).to(dtype)[None, None].requires_grad_()
    identity = EvoWeights.identity(4)
    zero = torch.zeros(4, 4)
    weights = identity._replace(w_l=zero, w_g=zero)
    _, weights = with_grad(v, weights)
    out = evo_attention(v, causal, weights=weights)
    assert out.isfinite().all()
    for grad in torch.autograd.grad(out.float().square().sum(), (v, *weights)):
        assert grad.isfinite().all()


def test_poles_in_bfloat16_are_far_better_than_plain_torch(make_weights):
    case = Case(1, 2, 1000, 32)
    v, weights = with_grad(
        case.values(torch.bfloat16), make_weights("pole", case.D, torch.bfloat16)
    )
    dout = random_tensor(case, seed="dout", dtype=torch.bfloat16)
    actual = gradients(evo_attention(v, weights=weights), dout, v, weights)[0]
    plain = gradients(reference.attention(v, weights, True)[0], dout, v, weights)[0]
    v, weights = with_grad(v.double(), cast(weights, torch.float64))
    exact = gradients(reference.attention(v, weights, True)[0], dout, v, weights)[0]
    error, plain_error = ((grad.double() - exact).norm() for grad in (actual, plain))
    assert error <= plain_error / 4


@pytest.mark.parametrize("cast_dtype", [torch.bfloat16, torch.float16], ids=show_dtype)
def test_autocast_stays_out_of_the_formula(cast_dtype, causal, make_weights):
    v, weights = with_grad(SMALL.values(), make_weights("autocast", SMALL.D))
    out = evo_attention(v, causal, weights=weights)
    dout = random_tensor(SMALL, seed="dout")
    grads = gradients(out, dout, v, weights)
    with torch.autocast("cpu", cast_dtype):
        inside = evo_attention(v, causal, weights=weights)
        inside_grads = gradients(inside, dout, v, weights)
    assert torch.equal(inside, out)
    for inside_grad, grad in zip(inside_grads, grads, strict=True):
        assert torch.equal(inside_grad, grad)


@pytest.mark.parametrize("hint", ["block_m", "num_warps", "num_stages"])
def test_torch_takes_no_tile_hints(hint):
    with pytest.raises(UnsupportedProblemError, match="torch: it has no tiles: block_m, num_warps"):
        evo_attention(SMALL.values(), **{hint: 4})
    with pytest.raises(UnsupportedProblemError, match="it has no tiles"):
        evo_attention(SMALL.values(), **{hint: 4}, backend="torch")
