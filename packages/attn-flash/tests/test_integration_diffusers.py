"""Attention of Hugging Face diffusers, computed here."""

from __future__ import annotations

import warnings

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
    from diffusers import FluxTransformer2DModel

from attn_flash import UnsupportedProblemError
from attn_flash.integrations import diffusers as hook

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' own


@pytest.fixture(autouse=True)
def registered():
    hook.register()
    yield
    hook.unregister()


def inputs(len_k=9, heads_kv=4):
    shapes = ((2, 9, 4, 16), (2, len_k, heads_kv, 16), (2, len_k, heads_kv, 16))
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def check(*tensors, **options):
    expected = dispatch.dispatch_attention_fn(*tensors, **options, backend="native")
    actual = dispatch.dispatch_attention_fn(*tensors, **options, backend=hook.NAME)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(out.square().sum(), tensors) for out in (actual, expected)]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("len_k", [5, 9, 14])
def test_lengths_and_causality(len_k, is_causal):
    check(*inputs(len_k), is_causal=is_causal, scale=0.3)


def test_grouped_heads():
    check(*inputs(heads_kv=2), enable_gqa=True)


@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 14), (2, 4, 9, 14), (4, 9, 14), (9, 14), (1, 14)], ids=str
)
def test_masks(shape):
    mask = torch.randn(shape)
    check(*inputs(14), attn_mask=mask)
    check(*inputs(14), attn_mask=mask > -1)


def test_a_mask_of_two_dimensions_is_padding():
    padding = torch.arange(14) < torch.tensor([[5], [14]])
    q, k, v = inputs(14)
    expected = hook.attention(q, k, v, padding[:, None, None])
    torch.testing.assert_close(hook.attention(q, k, v, padding), expected)


def test_a_model_runs_on_it():
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    arguments = {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([1.0]),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.randn(8, 3),
    }
    expected = model(**arguments).sample
    calls = []
    attend = hook.attend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hook, "attend", lambda *a, **k: calls.append(a) or attend(*a, **k))
        model.set_attention_backend(hook.NAME)
        torch.testing.assert_close(model(**arguments).sample, expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == 2
    model.reset_attention_backend()


def test_a_context_of_diffusers_takes_it():
    q, k, v = inputs()
    with dispatch.attention_backend(hook.NAME):
        out = dispatch.dispatch_attention_fn(q, k, v)
    torch.testing.assert_close(out, dispatch.dispatch_attention_fn(q, k, v), atol=1e-5, rtol=1e-5)


def test_what_it_cannot_do_is_an_error():
    q, k, v = inputs()
    with pytest.raises(UnsupportedProblemError, match="return_lse must be False"):
        hook.attention(q, k, v, return_lse=True)
    with pytest.raises(UnsupportedProblemError, match="context parallelism"):
        hook.attention(q, k, v, _parallel_config=object())
    with pytest.raises(ValueError, match="is_causal must be False"):
        hook.attention(q, k, v, torch.zeros(9, 9), is_causal=True)
    with pytest.raises(ValueError, match="without enable_gqa, got 4 and 2"):
        hook.attention(q, k[:, :, :2], v[:, :, :2])


def test_register_and_unregister():
    hook.register()
    names = dispatch.AttentionBackendName
    assert names(hook.NAME) in dispatch._AttentionBackendRegistry.list_backends()
    dispatch._AttentionBackendRegistry.set_active_backend(names(hook.NAME))
    hook.unregister()
    hook.unregister()
    assert dispatch._AttentionBackendRegistry._active_backend == names.NATIVE
    assert hook.NAME not in [name.value for name in names]
    with pytest.raises(ValueError, match="is not a valid"):
        names(hook.NAME)
    with pytest.raises(ValueError, match="which has a backend 'native'"):
        hook.register("native")
    with pytest.raises(ValueError, match="lower case"):
        hook.register("ATTN")
