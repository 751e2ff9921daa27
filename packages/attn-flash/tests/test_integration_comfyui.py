"""ComfyUI's attention functions, against a stand-in with the names and the contract of its module.

ComfyUI is an application, not a library that could be installed here.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from attn_flash.integrations import comfyui


def attention_pytorch(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False
):
    """What each of ComfyUI's attention functions computes."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        mask = mask[None] if mask.dim() == 2 else mask
        mask = mask[:, None] if mask.dim() == 3 else mask
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


@pytest.fixture
def comfy(monkeypatch):
    """The module comfy.ldm.modules.attention, and a model's that binds its default."""
    for name in ("comfy", "comfy.ldm", "comfy.ldm.modules"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module, model = ModuleType("comfy.ldm.modules.attention"), ModuleType("comfy.model")
    module.REGISTERED_ATTENTION_FUNCTIONS = registered = {}
    module.register_attention_function = registered.__setitem__
    for name in ("optimized_attention", "optimized_attention_masked"):
        setattr(module, name, attention_pytorch)
    model.optimized_attention = attention_pytorch
    monkeypatch.setitem(sys.modules, "comfy.ldm.modules.attention", module)
    sys.modules["comfy.ldm.modules"].attention = module
    sys.modules["comfy.ldm"].modules = sys.modules["comfy.ldm.modules"]
    sys.modules["comfy"].ldm = sys.modules["comfy.ldm"]
    monkeypatch.setitem(sys.modules, "comfy.model", model)
    return module, model


def test_register(comfy):
    module, _ = comfy
    comfyui.register()
    comfyui.register()
    registered = module.REGISTERED_ATTENTION_FUNCTIONS
    assert registered == {comfyui.NAME: comfyui.attention}


def test_use_reaches_models_and_restore_ends_it(comfy):
    module, model = comfy
    comfyui.use()
    comfyui.use()
    assert module.optimized_attention is comfyui.attention
    assert module.optimized_attention_masked is comfyui.attention
    assert model.optimized_attention is comfyui.attention
    comfyui.restore()
    comfyui.restore()
    assert module.optimized_attention is model.optimized_attention is attention_pytorch


MASKS = {
    "none": lambda: None,
    "2d": lambda: torch.randn(7, 9),
    "3d": lambda: torch.randn(2, 7, 9),
    "4d": lambda: torch.randn(2, 1, 1, 9),
    "bool": lambda: torch.rand(2, 7, 9) > 0.2,
}


@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("make_mask", [*MASKS.values()], ids=[*MASKS])
def test_it_computes_what_comfyui_does(make_mask, skip_reshape, skip_output_reshape):
    shapes = ((2, 4, 7, 16), (2, 4, 9, 16)) if skip_reshape else ((2, 7, 64), (2, 9, 64))
    q, k, v = torch.randn(shapes[0]), torch.randn(shapes[1]), torch.randn(shapes[1])
    options = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    mask = make_mask()
    expected = attention_pytorch(q, k, v, 4, mask, **options)
    actual = comfyui.attention(q, k, v, 4, mask, transformer_options={}, **options)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    actual = comfyui.override(attention_pytorch, q, k, v, 4, mask, **options)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_precision_is_raised_where_asked():
    q, k, v = (torch.randn(1, 7, 64).half() for _ in range(3))
    out = comfyui.attention(q, k, v, 4, attn_precision=torch.float32)
    exact = attention_pytorch(q.float(), k.float(), v.float(), 4)
    assert out.dtype == torch.float16
    assert torch.equal(out, exact.half())
