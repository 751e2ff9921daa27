"""torch's own flash-attention operators, computed here; registered for the CPU to be tried."""

from __future__ import annotations

import pytest
import torch

from attn_flash import BackendUnavailableError, flash_attn_func, flash_attn_varlen_func
from attn_flash.integrations import torch_flash

HAS_HOOK = hasattr(torch.nn.attention, "register_flash_attention_impl")
needs_hook = pytest.mark.skipif(not HAS_HOOK, reason="torch is older than 2.11")
aten = torch.ops.aten


@pytest.fixture
def active(monkeypatch):
    """The operators of torch run here, on the CPU."""
    monkeypatch.setattr(torch_flash, "_DISPATCH_KEY", "CPU")
    torch_flash.register()
    torch.nn.attention.activate_flash_attention_impl(torch_flash.NAME)
    yield
    torch.nn.attention.restore_flash_attention_impl()


def inputs(*shape, heads_kv=None):
    kv = (*shape[:-2], heads_kv or shape[-2], shape[-1])
    return [torch.randn(size, requires_grad=True) for size in (shape, kv, kv)]


def check(actual, expected, tensors):
    torch.testing.assert_close(actual, expected)
    dout = torch.randn_like(expected)
    grads = [torch.autograd.grad(out, tensors, dout) for out in (actual, expected)]
    torch.testing.assert_close(*grads)


@needs_hook
@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("is_causal", [False, True])
def test_dense(is_causal):
    q, k, v = inputs(2, 9, 4, 16, heads_kv=2)
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, None, None, 9, 9, 0.0, is_causal, False, scale=0.3, window_size_left=5
    )
    expected, lse_expected, _ = flash_attn_func(
        q, k, v, 0.0, 0.3, is_causal, (5, -1), return_attn_probs=True
    )
    torch.testing.assert_close(lse, lse_expected)
    assert not lse.requires_grad
    check(out, expected, (q, k, v))


@needs_hook
@pytest.mark.usefixtures("active")
def test_ragged():
    q, k, v = inputs(20, 4, 16)
    bounds = torch.tensor([0, 7, 7, 20], dtype=torch.int32)
    out, *_ = aten._flash_attention_forward(q, k, v, bounds, bounds, 13, 13, 0.0, True, False)
    expected = flash_attn_varlen_func(q, k, v, bounds, bounds, 13, 13, causal=True)
    check(out, expected, (q, k, v))


@needs_hook
@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("is_causal", [False, True])
def test_sdpa_that_picks_flash(is_causal):
    q, k, v = inputs(2, 4, 9, 16)
    out, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=0.2)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=is_causal, scale=0.2
    )
    check(out, expected, (q, k, v))


@needs_hook
@pytest.mark.usefixtures("active")
def test_dropout_is_the_same_in_the_backward_pass():
    q, k, v = inputs(1, 4, 9, 16)
    torch.manual_seed(3)
    out, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.5, False)
    # Linear in v: the gradient of a sum is what comes out for one-hot values.
    [dv] = torch.autograd.grad(out.sum(), v)
    torch.manual_seed(3)
    again, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.5, False)
    assert torch.equal(out, again)
    torch.testing.assert_close((dv * v).sum(), out.sum())


@needs_hook
@pytest.mark.usefixtures("active")
def test_writing_to_a_given_output():
    q, k, v = (x.detach() for x in inputs(2, 9, 4, 16))
    out = torch.empty_like(q)
    lse = aten._flash_attention_forward_no_dropout_inplace(
        out, q, k, v, None, None, 9, 9, 0.0, False, False
    )
    expected, lse_expected, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    torch.testing.assert_close((out, lse), (expected, lse_expected))


@needs_hook
def test_torch_gets_its_own_back(active):
    torch.nn.attention.restore_flash_attention_impl()
    q, k, v = inputs(2, 9, 4, 16)
    with pytest.raises(NotImplementedError):
        aten._flash_attention_forward(q, k, v, None, None, 9, 9, 0.0, False, False)
    torch.nn.attention.activate_flash_attention_impl(torch_flash.NAME)
    assert torch.nn.attention.current_flash_attention_impl() == torch_flash.NAME


@pytest.mark.skipif(HAS_HOOK, reason="torch has the hook")
def test_an_older_torch_is_named():
    with pytest.raises(BackendUnavailableError, match="torch must be 2.11 or newer"):
        torch_flash.register()
