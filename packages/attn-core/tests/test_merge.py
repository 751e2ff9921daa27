"""Merging attention states, for whole tensors."""

import pytest
import torch

from attn_core.merge import merge_attention_states
from attn_core.testing import random_tensor

B, M, H, N, D = 2, 5, 3, 12, 4


def attend(q, k, v):
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    lse = torch.logsumexp(scores, -1)
    return torch.einsum("bhij,bjhd->bihd", (scores - lse[..., None]).exp(), v), lse


def state(seed, dtype=torch.float64):
    out = random_tensor((B, M, H, D), seed=f"out-{seed}", dtype=dtype)
    return out, random_tensor((B, H, M), seed=f"lse-{seed}", dtype=torch.float64, scale=10.0)


def empty_state():
    return torch.zeros(B, M, H, D).double(), torch.full((B, H, M), -torch.inf).double()


@pytest.mark.parametrize("cut", [1, 6, 11])
def test_split_keys_merge_to_the_whole(cut):
    q = random_tensor((B, M, H, D), seed="q", dtype=torch.float64, scale=10.0)
    k, v = (random_tensor((B, N, H, D), seed=name, dtype=torch.float64) for name in "kv")
    merged = merge_attention_states(
        *attend(q, k[:, :cut], v[:, :cut]), *attend(q, k[:, cut:], v[:, cut:])
    )
    torch.testing.assert_close(merged, attend(q, k, v), rtol=1e-12, atol=1e-12)


def test_order_does_not_matter():
    a, b, c = (state(seed) for seed in "abc")
    left = merge_attention_states(*merge_attention_states(*a, *b), *c)
    right = merge_attention_states(*a, *merge_attention_states(*c, *b))
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_empty_part_changes_nothing():
    a = state("a")
    for merged in (
        merge_attention_states(*a, *empty_state()),
        merge_attention_states(*empty_state(), *a),
    ):
        assert torch.equal(merged[0], a[0])
        assert torch.equal(merged[1], a[1])


def test_lse_of_inf_is_that_of_an_empty_part():
    (out_a, lse_a), (out_b, lse_b) = state("a"), state("b")
    of_a, of_b = lse_a.clone(), lse_b.clone()
    of_a[0], of_b[1, 0] = torch.inf, torch.inf
    empty = [lse.masked_fill(lse == torch.inf, -torch.inf) for lse in (of_a, of_b)]
    merged = merge_attention_states(out_a, of_a, out_b, of_b)
    wanted = merge_attention_states(out_a, empty[0], out_b, empty[1])
    assert all(map(torch.equal, merged, wanted))
    assert torch.equal(merged[0][0], out_b[0])


def test_two_empty_parts_stay_empty_and_have_gradients_of_zero():
    inputs = [x.requires_grad_() for x in (*empty_state(), *empty_state())]
    out, lse = merge_attention_states(*inputs)
    assert torch.equal(out, torch.zeros_like(out))
    assert (lse == -torch.inf).all()
    grads = torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), torch.ones_like(lse)))
    for grad in grads:
        assert torch.equal(grad, torch.zeros_like(grad))


def test_gradients_with_some_queries_empty():
    (out_a, lse_a), (out_b, lse_b) = state("a"), state("b")
    lse_a[0, :, 1], lse_b[0, :, 1], lse_b[1, 0, 2] = -torch.inf, -torch.inf, -torch.inf
    inputs = [x.requires_grad_() for x in (out_a, lse_a, out_b, lse_b)]
    out, lse = merge_attention_states(*inputs)
    grads = torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), torch.ones_like(lse)))
    share_a = torch.sigmoid(lse_a - lse_b).nan_to_num(0.0)
    torch.testing.assert_close(grads[0], share_a.transpose(1, 2)[..., None].expand_as(out))
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[1][0, :, 1] == 0).all()


def test_gradcheck():
    inputs = [x.requires_grad_() for x in (*state("a"), *state("b"))]
    inputs[1].data /= 10
    inputs[3].data /= 10
    assert torch.autograd.gradcheck(merge_attention_states, inputs)
    assert torch.autograd.gradgradcheck(merge_attention_states, inputs)


def test_extreme_lse_does_not_overflow():
    (out_a, lse_a), (out_b, lse_b) = state("a"), state("b")
    out, lse = merge_attention_states(out_a, lse_a + 1e4, out_b, lse_b - 1e4)
    torch.testing.assert_close(out, out_a)
    torch.testing.assert_close(lse, lse_a + 1e4)


def test_dtypes_are_kept():
    out, lse = state("a", torch.float16)
    merged, merged_lse = merge_attention_states(out, lse.float(), out, lse.float())
    assert merged.dtype == torch.float16
    assert merged_lse.dtype == torch.float32


@pytest.mark.parametrize(
    "argument, replace, message",
    [
        (0, lambda x: x[0], r"out_a must have 4 dimensions \(B, M, H, D\), got shape"),
        (1, lambda x: x.mT, r"lse_a must have shape \(B, H, M\) = \(2, 3, 5\), got \(2, 5, 3\)"),
        (1, lambda x: x.half(), "lse_a must have dtype float32, float64, got float16"),
        (2, lambda x: x.float(), "out_b must have the dtype of out_a"),
        (2, lambda x: x[:, 1:], r"out_b must have shape \(B, M, H, D\) = \(2, 5, 3, 4\)"),
        (3, lambda x: x.float(), "lse_b must have the dtype of lse_a"),
    ],
)
def test_errors(argument, replace, message):
    arguments = [*state("a"), *state("b")]
    arguments[argument] = replace(arguments[argument])
    with pytest.raises(ValueError, match=message):
        merge_attention_states(*arguments)
