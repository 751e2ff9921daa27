"""attn_flash under the names of flash-attn."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest
import torch

import attn_flash
from attn_flash import compat

FUNCTIONS = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


@pytest.fixture
def installed():
    compat.install_as_flash_attn()
    yield
    compat.uninstall_as_flash_attn()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("module", ["flash_attn", "flash_attn.flash_attn_interface"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_where_flash_attn_has_them(name, module):
    assert getattr(importlib.import_module(module), name) is getattr(attn_flash, name)


@pytest.mark.usefixtures("installed")
def test_padding_and_rotary_are_where_flash_attn_has_them():
    from flash_attn import __version__
    from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
    from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
    from flash_attn.ops.triton.rotary import apply_rotary

    assert (pad_input, unpad_input) == (
        attn_flash.bert_padding.pad_input,
        attn_flash.bert_padding.unpad_input,
    )
    assert index_first_axis(torch.tensor([3, 4]), torch.tensor([1])).item() == 4
    assert RotaryEmbedding(8).dim == 8
    assert __version__ == compat.VERSION >= "2.8"
    x, angles = torch.randn(1, 5, 2, 8), torch.randn(5, 4)
    tables = angles.cos(), angles.sin()
    turned = apply_rotary_emb(x, *tables)
    torch.testing.assert_close(apply_rotary(turned, *tables, conjugate=True), x)
    assert apply_rotary(x, *tables, inplace=True) is x
    torch.testing.assert_close(x, turned)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "module, name, function",
    [
        ("bert_padding", "IndexFirstAxis", "index_first_axis"),
        ("bert_padding", "IndexFirstAxisResidual", "index_first_axis_residual"),
        ("bert_padding", "IndexPutFirstAxis", "index_put_first_axis"),
        ("layers.rotary", "ApplyRotaryEmb", "apply_rotary_emb"),
        ("layers.rotary", "ApplyRotaryEmbKV_", "apply_rotary_emb_kv_"),
        ("layers.rotary", "ApplyRotaryEmbQKV_", "apply_rotary_emb_qkv_"),
    ],
)
def test_autograd_functions_of_flash_attn_can_be_applied(module, name, function):
    module = importlib.import_module(f"flash_attn.{module}")
    assert getattr(module, name).apply is getattr(module, function)


@pytest.mark.usefixtures("installed")
def test_names_that_flash_attn_s_own_tests_take():
    from flash_attn.flash_attn_interface import _get_block_size_n
    from flash_attn.ops.triton import rotary

    assert _get_block_size_n(torch.device("cpu"), 64, True, False) > 0
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = rotary.nothing
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn_2_cuda")


@pytest.mark.usefixtures("installed")
def test_flash_attn_triton_too():
    from flash_attn_triton import FlashAttention, flash_attn_unpadded_func
    from flash_attn_triton.flash_attn_interface import flash_attn_func

    assert FlashAttention is attn_flash.FlashAttention
    assert flash_attn_unpadded_func is attn_flash.flash_attn_varlen_func
    assert flash_attn_func is attn_flash.flash_attn_func


def test_libraries_that_look_before_they_import_find_it(installed):
    assert importlib.util.find_spec("flash_attn") is not None
    assert importlib.util.find_spec("flash_attn.bert_padding") is not None
    assert importlib.metadata.version("flash_attn") == compat.VERSION
    assert importlib.metadata.version("flash-attn") == compat.VERSION
    assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
    assert importlib.metadata.version("torch")
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("no-such-distribution")


MODEL = """
import attn_flash.compat as compat; compat.install_as_flash_attn()
from transformers.utils import import_utils
import_utils.is_torch_cuda_available = lambda: True
print(import_utils.is_flash_attn_2_available(), import_utils.is_flash_attn_4_available(),
      import_utils.is_flash_attn_greater_or_equal("2.8.0"))
import torch, transformers
transformers.PreTrainedModel._flash_attn_can_dispatch = lambda *args, **options: True
torch.manual_seed(0)
model = transformers.MistralForCausalLM(transformers.MistralConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, sliding_window=5,
    num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)).eval()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
ids, mask = torch.randint(3, 97, (3, 11)), torch.ones(3, 11, dtype=torch.long)
mask[0, :4] = 0
texts, results = [], []
for name in ("eager", "flash_attention_2"):
    model.set_attn_implementation(name)
    model.zero_grad()
    logits = model(ids, attention_mask=mask).logits[mask.bool()]
    logits.tanh().square().sum().backward()
    results.append([logits, *(parameter.grad for parameter in model.parameters())])
    texts.append(model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False))
torch.testing.assert_close(*results, atol=1e-3, rtol=1e-3)
assert torch.equal(*texts)
print(model.config._attn_implementation)
"""


def test_transformers_own_flash_attention_runs_on_it():
    pytest.importorskip("transformers", reason="transformers is not installed")
    command = [sys.executable, "-W", "ignore", "-c", MODEL]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.stdout.splitlines() == ["True False True", "flash_attention_2"], answer.stderr


def test_nothing_is_left_behind():
    before = set(sys.modules)
    compat.install_as_flash_attn()
    compat.install_as_flash_attn()
    assert compat.is_installed()
    importlib.import_module("flash_attn.layers.rotary")
    compat.uninstall_as_flash_attn()
    compat.uninstall_as_flash_attn()
    assert not compat.is_installed()
    assert set(sys.modules) - before == set()
    assert importlib.util.find_spec("flash_attn") is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn.bert_padding")
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn")


def test_the_real_one_is_not_replaced_unasked(tmp_path, monkeypatch):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("answer = 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    import flash_attn as real

    assert real.answer == 42
    with pytest.raises(ImportError, match="flash_attn is installed; replace=True puts"):
        compat.install_as_flash_attn()
    compat.install_as_flash_attn(replace=True)
    try:
        import flash_attn

        assert flash_attn.flash_attn_func is attn_flash.flash_attn_func
    finally:
        compat.uninstall_as_flash_attn()
    import flash_attn

    assert flash_attn is real
    del sys.modules["flash_attn"]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("is_ragged", [False, True])
def test_passes_that_context_parallel_libraries_call(is_ragged, dropout_p):
    from flash_attn import flash_attn_interface as interface

    shape = (20, 4, 16) if is_ragged else (2, 10, 4, 16)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    bounds = torch.tensor([0, 7, 20], dtype=torch.int32)
    places = (bounds, bounds, 13, 13) if is_ragged else ()
    static = (*places, dropout_p, 0.3, True, 5, 0, 2.0)
    name = "_varlen" if is_ragged else ""
    torch.manual_seed(1)
    forward = getattr(interface, f"_wrapped_flash_attn{name}_forward")
    out, lse, _, rng_state = forward(q, k, v, *static)
    assert not out.requires_grad
    torch.manual_seed(1)
    function = interface.flash_attn_varlen_func if is_ragged else interface.flash_attn_func
    expected, lse_expected, _ = function(
        q, k, v, *places, dropout_p, 0.3, True, (5, 0), 2.0, return_attn_probs=True
    )
    torch.testing.assert_close((out, lse), (expected.detach(), lse_expected.detach()))
    dout = torch.randn_like(out)
    wanted = torch.autograd.grad(expected, (q, k, v), dout)
    grads = [torch.empty_like(x, requires_grad=False) for x in (q, k, v)]
    backward = getattr(interface, f"_flash_attn{name}_backward")
    delta = backward(dout, q, k, v, out, lse, *grads, *static, None, False, rng_state)
    torch.testing.assert_close(tuple(grads), wanted)
    torch.testing.assert_close(delta, (dout * out).sum(-1).transpose(-1, -2))
