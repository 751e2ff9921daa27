"""prefix_sum, its gradient and its errors."""

from __future__ import annotations

import pytest
import torch

from attn_core.testing import assert_within_budget, embedded, random_tensor
from attn_evo import prefix_sum, reference

SHAPES = [(1, 1), (5, 3), (2, 3, 1000, 2), (1025, 2), (2, 2049, 3), (0, 4), (3, 0)]
FLAGS = [(False, False), (True, False), (False, True), (True, True)]


def show_shape(shape):
    return "x".join(map(str, shape))


def show_dtype(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.fixture(params=FLAGS, ids=["inclusive", "exclusive", "reverse", "exclusive-reverse"])
def flags(request):
    return request.param


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=show_dtype
)
@pytest.mark.parametrize("shape", SHAPES, ids=show_shape)
def test_prefix_sum(shape, dtype, flags, device):
    x = random_tensor(shape, seed=show_shape(shape), dtype=dtype, device=device)
    out = prefix_sum(x, -2, *flags)
    assert out.dtype == dtype
    same_dtype = reference.prefix_sum(x, -2, *flags)
    exact = reference.prefix_sum(x.double(), -2, *flags)
    assert_within_budget(out, same_dtype, exact)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_any_dimension_and_strides(dim, flags):
    x = random_tensor((4, 1030, 3), seed="dim").movedim(1, dim)
    expected = reference.prefix_sum(x.double(), dim, *flags).float()
    for strided in (x, embedded(x, order=(2, 0, 1)), x[:1].expand_as(x[:1])):
        torch.testing.assert_close(
            prefix_sum(strided, dim, *flags),
            expected if strided.shape == x.shape else reference.prefix_sum(strided, dim, *flags),
            atol=1e-4,
            rtol=1e-5,
        )


def test_gradient(flags):
    x = random_tensor((2, 5, 3), seed="x", dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: prefix_sum(x, 1, *flags), x)
    assert torch.autograd.gradgradcheck(lambda x: prefix_sum(x.sin(), 1, *flags).square(), x)


def test_gradient_of_a_long_sum(flags):
    x = random_tensor((2500, 2), seed="x").requires_grad_()
    dout = random_tensor((2500, 2), seed="dout")
    (dx,) = torch.autograd.grad(prefix_sum(x, 0, *flags), x, dout)
    exclusive, reverse = flags
    exact = reference.prefix_sum(dout.double(), 0, exclusive, not reverse)
    torch.testing.assert_close(dx, exact.float(), atol=1e-4, rtol=1e-5)


def test_an_exclusive_sum_does_not_touch_the_element_itself():
    x = torch.tensor([1.0, float("inf")])
    assert prefix_sum(x, 0, exclusive=True).tolist() == [0.0, 1.0]


def test_low_precision_is_rounded_once():
    x = torch.ones(5000, dtype=torch.bfloat16)
    assert torch.equal(prefix_sum(x, 0), torch.arange(1, 5001).bfloat16())


@pytest.mark.parametrize("dim", [-3, 2, 0.5, None])
def test_a_dimension_that_is_not_there(dim):
    with pytest.raises(ValueError, match=rf"dim must be a dimension of x, .*got {dim}"):
        prefix_sum(torch.zeros(2, 3), dim)


@pytest.mark.parametrize(
    "x, message",
    [
        ([1.0], "x must be a tensor, got list"),
        (torch.zeros(2, 2, dtype=torch.int64), "x must have dtype float16, .*, got int64"),
        (torch.tensor(1.0), r"dim must be a dimension of x, of shape \(\), got -2"),
    ],
    ids=["list", "int64", "scalar"],
)
def test_an_argument_that_does_not_fit(x, message):
    with pytest.raises(ValueError, match=message):
        prefix_sum(x)
