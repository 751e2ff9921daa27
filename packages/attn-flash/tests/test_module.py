from __future__ import annotations

import copy

import pytest
import torch

from attn_core.testing import random_tensor
from attn_flash import BackendUnavailableError, FlashAttention, flash_attn_func


@pytest.fixture
def qkv():
    return random_tensor((3, 2, 7, 4, 8), seed=0).unbind(0)


def test_it_is_the_function(qkv):
    module = FlashAttention(softmax_scale=0.3)
    actual = module(*qkv, causal=True, window_size=(2, 2))
    expected = flash_attn_func(*qkv, softmax_scale=0.3, causal=True, window_size=(2, 2))
    assert torch.equal(actual, expected)


def test_it_is_full_and_scaled_by_default(qkv):
    assert torch.equal(FlashAttention()(*qkv), flash_attn_func(*qkv))


def test_arguments_go_to_the_function(qkv):
    out, lse, _ = FlashAttention()(*qkv, return_attn_probs=True)
    assert lse.shape == (2, 4, 7)
    assert torch.equal(out, flash_attn_func(*qkv))


def test_the_backend_is_used(qkv):
    with pytest.raises(BackendUnavailableError, match="got 'nonesuch'"):
        FlashAttention(backend="nonesuch")(*qkv)


def test_an_unknown_argument_is_refused(qkv):
    with pytest.raises(TypeError, match="bias_of_keys"):
        FlashAttention()(*qkv, bias_of_keys=None)


@pytest.mark.parametrize(
    "name, value", [("attention_dropout", 1.0), ("softmax_scale", float("nan"))]
)
def test_a_wrong_number_is_refused_at_once(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*, got {value}$"):
        FlashAttention(**{name: value})


def test_it_has_no_parameters_and_can_be_copied(qkv):
    module = FlashAttention(softmax_scale=0.3)
    assert not list(module.parameters())
    assert not module.state_dict()
    assert torch.equal(copy.deepcopy(module)(*qkv), module(*qkv))


def test_repr():
    module = FlashAttention(softmax_scale=0.5, backend="torch")
    assert repr(module) == "FlashAttention(softmax_scale=0.5, backend='torch')"


def test_it_trains_inside_a_model():
    layer, attend = torch.nn.Linear(8, 24), FlashAttention()
    x = random_tensor((2, 5, 8), seed=1)
    q, k, v = layer(x).view(2, 5, 3, 2, 4).unbind(2)
    attend(q, k, v, causal=True).square().sum().backward()
    assert layer.weight.grad.isfinite().all()
    assert layer.weight.grad.any(dim=1).all()
