"""The helpers that TriFast's users know."""

from __future__ import annotations

import pytest
import torch

from attn_triangle import triangle_attention
from attn_triangle.utils import clone_and_clear_grad, disable_tf32, enable_tf32, gen_tensors


def test_gen_tensors_makes_leaves_for_the_operator(device):
    q, k, v, bias, mask = gen_tensors(9, 4, 2, True, device, torch.bfloat16, batch=3, std=2.0)
    for x in (q, k, v, bias):
        assert x.is_leaf
        assert x.requires_grad
        assert x.dtype == torch.bfloat16
    assert q.shape == k.shape == v.shape == (3, 2, 9, 9, 4)
    assert bias.shape == (3, 2, 9, 9)
    assert mask.shape == (3, 9, 9)
    assert mask.dtype == torch.bool
    assert 1.8 < q.float().std() < 2.2
    assert 0.35 < mask.float().mean() < 0.65
    assert triangle_attention(q, k, v, bias, mask).shape == q.shape


def test_gen_tensors_without_a_mask(device):
    *_, mask = gen_tensors(4, 2, 1, False, device, torch.float32)
    assert mask.shape == (1, 4, 4)
    assert not mask.any()


def test_clone_and_clear_grad():
    with_grad, without = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    (3 * with_grad).sum().backward()
    grad, nothing = clone_and_clear_grad(with_grad, without)
    assert grad.tolist() == [3, 3]
    assert nothing is None
    assert with_grad.grad is None


@pytest.mark.parametrize(
    "wrap, inside, outside",
    [(disable_tf32, "highest", "high"), (enable_tf32, "high", "highest")],
)
def test_tf32_is_set_for_the_call_alone(wrap, inside, outside):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(outside)

    def precision(*, fails=False):
        if fails:
            raise RuntimeError(torch.get_float32_matmul_precision())
        return torch.get_float32_matmul_precision()

    try:
        assert wrap(precision)() == inside
        with pytest.raises(RuntimeError, match=inside):
            wrap(precision)(fails=True)
        assert torch.get_float32_matmul_precision() == outside
    finally:
        torch.set_float32_matmul_precision(before)
