"""The functions of other packages against plain formulas in float64, and `install_as`."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest
import torch

from attn_core.testing import random_tensor
from attn_triangle import compat
from attn_triangle.compat import cuequivariance, installing, trifast

B, N, H, Q, K, D = 2, 5, 2, 7, 9, 8


def softmax_attention(q, k, v, added, scale):
    """q, k, v (B, N, H, L, D), `added` to their scores."""
    scores = q.double() @ k.double().mT * scale + added.double()
    return torch.softmax(scores, -1) @ v.double()


def cue_inputs(device):
    shapes = {"q": (B, N, H, Q, D), "k": (B, N, H, K, D), "v": (B, N, H, K, D)}
    shapes["bias"] = (B, 1, H, Q, K)
    tensors = [random_tensor(shape, seed=name, device=device) for name, shape in shapes.items()]
    keep = random_tensor((B, N, 1, 1, K), seed="keep", device=device) > 0
    keep[0, 1] = False
    return [x.requires_grad_() for x in tensors], keep


def gradients(out, inputs):
    weights = random_tensor(out.shape, seed="dout", device=out.device).to(out.dtype)
    return torch.autograd.grad(out, inputs, weights)


def assert_same(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-5)


def test_cuequivariance(device):
    inputs, keep = cue_inputs(device)
    q, k, v, bias = inputs
    out = cuequivariance.triangle_attention(q, k, v, bias, keep, 0.3)
    added = bias + torch.where(keep, 0.0, -1e9)
    expected = softmax_attention(q, k, v, added, 0.3)
    inner = keep.any(-1, keepdim=True)
    assert_same(out * inner, expected * inner)
    assert_same(out[0, 1], v[0, 1].mean(-2, keepdim=True).expand(H, Q, D))
    for grad, other in zip(
        gradients(out * inner, inputs), gradients(expected * inner, inputs), strict=True
    ):
        assert_same(grad, other)


def test_cuequivariance_auxiliary_results(device):
    (q, k, v, bias), keep = cue_inputs(device)
    keep[0, 1] = True
    out, lse, largest = cuequivariance.triangle_attention(q, k, v, bias, keep, return_aux=True)
    scores = (q @ k.mT * D**-0.5 + bias).masked_fill(~keep, -torch.inf)
    assert out.shape == (B, N, H, Q, D)
    assert lse.dtype == largest.dtype == torch.float32
    assert_same(lse, scores.logsumexp(-1))
    assert_same(largest, scores.amax(-1))


def test_cuequivariance_takes_a_scale_of_zero_and_a_wider_bias(device):
    (q, k, v, bias), _ = cue_inputs(device)
    out, _, largest = cuequivariance.triangle_attention(
        q, k, v, bias.double(), scale=0.0, return_aux=True
    )
    assert_same(out, softmax_attention(q, k, v, bias, 0.0))
    assert_same(largest, bias.amax(-1).expand_as(largest))


def test_cuequivariance_keeps_the_dimension_it_adds(device):
    (q, k, v, bias), keep = cue_inputs(device)
    out = cuequivariance.triangle_attention(q[0], k[0], v[0], bias[0], keep[0])
    assert out.shape == (1, N, H, Q, D)
    assert torch.equal(out, cuequivariance.triangle_attention(q, k, v, bias, keep)[:1])


def test_cuequivariance_lengths(device):
    (q, k, v, bias), _ = cue_inputs(device)
    lengths = torch.arange(N, device=device, dtype=torch.int32).expand(B, N).reshape(B, N, 1, 1, 1)
    keep = torch.arange(K, device=device) < lengths
    assert torch.equal(cuequivariance.mask_to_kv_lengths(keep), lengths)
    out = cuequivariance.triangle_attention(q, k, v, bias, kv_lengths=lengths)
    masked = cuequivariance.triangle_attention(q, k, v, bias, keep)
    assert torch.equal(out[:, 1:], masked[:, 1:])
    assert not out[:, 0].any()  # no keys; the mask gives the mean of the values
    assert_same(masked[:, 0], v[:, 0].mean(-2, keepdim=True).expand_as(masked[:, 0]))
    with pytest.raises(ValueError, match="got both"):
        cuequivariance.triangle_attention(q, k, v, bias, keep, kv_lengths=lengths)
    with pytest.raises(ValueError, match="first keys of each row"):
        cuequivariance.mask_to_kv_lengths(keep.flip(-1))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("q", lambda x: None, "q must be a tensor, got NoneType"),
        ("k", lambda x: x[0], r"k must have 5 dimensions \(B, N, H, L, D\)"),
        ("bias", lambda x: x.expand(-1, H, -1, -1, -1), r"bias must have shape \(B, 1, H, Q, K\)"),
        ("bias", lambda x: x > 0, "bias must be added to scores"),
        ("mask", lambda x: x.expand(B, N, H, Q, K), r"mask must have shape \(B, N, 1, 1, K\)"),
        ("kv_lengths", lambda x: x[..., 0], r"kv_lengths must have shape \(B, N, 1, 1, 1\)"),
        ("kv_lengths", lambda x: x.float(), "kv_lengths must have dtype int32"),
        ("return_aux", lambda x: x, "return_aux must be True or False"),
    ],
)
def test_cuequivariance_names_a_bad_argument(name, change, message, device):
    (q, k, v, bias), keep = cue_inputs(device)
    arguments = {"q": q, "k": k, "v": v, "bias": bias}
    lengths = torch.full((B, N, 1, 1, 1), 3, dtype=torch.int32, device=device)
    others = {"mask": keep, "kv_lengths": lengths, "return_aux": "no"}
    arguments[name] = change({**arguments, **others}[name])
    with pytest.raises(ValueError, match=message):
        cuequivariance.triangle_attention(**arguments)


def test_cuequivariance_under_autocast(device):
    (q, k, v, bias), keep = cue_inputs(device)
    with torch.autocast(device.type, torch.bfloat16):
        out = cuequivariance.triangle_attention(q, k, v, bias, keep)
    assert out.dtype == torch.bfloat16


def evoformer_inputs(device):
    shapes = dict.fromkeys("qkv", (B, N, Q, H, D))
    shapes |= {"row": (B, N, 1, 1, Q), "pair": (B, 1, H, Q, Q)}
    tensors = {
        name: random_tensor(shape, seed=f"evo-{name}", device=device)
        for name, shape in shapes.items()
    }
    tensors["row"][:, 1:3, ..., 4:] = -1e9
    return [x.requires_grad_() for x in tensors.values()]


EVOFORMERS = {
    "deepspeed": (lambda q, k, v, a, b: compat.DS4Sci_EvoformerAttention(q, k, v, [a, b]), D**-0.5),
    "megafold": (compat.TritonEvoformer.apply, D**-0.5),
    "protenix": (compat.TriAttentionFunction.apply, 1.0),
}


@pytest.mark.parametrize("name", EVOFORMERS)
def test_additive_masks_and_their_gradients(name, device):
    inputs = evoformer_inputs(device)
    function, scale = EVOFORMERS[name]
    out = function(*inputs)
    q, k, v, row, pair = inputs
    expected = softmax_attention(*(x.transpose(2, 3) for x in (q, k, v)), row + pair, scale)
    expected = expected.transpose(2, 3)
    assert out.is_contiguous()
    assert_same(out, expected)
    for grad, other in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        assert_same(grad, other)


@pytest.mark.parametrize("kept", ["neither", "row", "pair"])
def test_deepspeed_biases_may_be_none(kept, device):
    q, k, v, row, pair = evoformer_inputs(device)
    biases = [row if kept == "row" else None, pair if kept == "pair" else None]
    before = list(biases)
    out = compat.DS4Sci_EvoformerAttention(q, k, v, biases)
    assert all(x is y for x, y in zip(biases, before, strict=True))
    added = sum((x for x in biases if x is not None), torch.zeros((), device=device))
    heads_first = [x.transpose(2, 3) for x in (q, k, v)]
    assert_same(out, softmax_attention(*heads_first, added, D**-0.5).transpose(2, 3))
    if kept != "pair":
        assert torch.equal(compat.DS4Sci_EvoformerAttention(q, k, v, biases[:1]), out)


def test_bad_biases_are_named(device):
    q, k, v, row, pair = evoformer_inputs(device)
    with pytest.raises(ValueError, match=r"first of biases must have shape \(2, 5, 1, 1, 7\)"):
        compat.DS4Sci_EvoformerAttention(q, k, v, [pair, row])
    with pytest.raises(ValueError, match=r"Q must have shape .*, got \(5, 7, 2\)"):
        compat.DS4Sci_EvoformerAttention(*(x[0, ..., 0] for x in (q, k, v)), [])
    with pytest.raises(ValueError, match="Bias1 must be added to scores, of dtype float, got bool"):
        compat.TriAttentionFunction.apply(q, k, v, row == 0, pair)
    with pytest.raises(ValueError, match=r"Bias1 must have shape \(\*, N, 1, 1, L\), got"):
        compat.TriAttentionFunction.apply(q, k, v, pair, row)
    with pytest.raises(ValueError, match="pair_bias must be a tensor, got int"):
        compat.TritonEvoformer.apply(q, k, v, row, 1)
    with pytest.raises(ValueError, match="biases must be a sequence of at most two tensors"):
        compat.DS4Sci_EvoformerAttention(q, k, v, None)
    with pytest.raises(ValueError, match="at most two"):
        compat.DS4Sci_EvoformerAttention(q, k, v, [row, pair, pair])
    with pytest.raises(ValueError, match="got bool"):
        compat.TritonEvoformer.apply(q, k, v, row == 0, pair)


def test_trifast(device):
    q, k, v, b, mask = trifast.gen_tensors(11, 8, 2, True, device, torch.float32, batch=2)
    mask[:, 2] = True
    out = trifast.triangle_attention(q, k, v, b, mask)
    assert_same(out, trifast.attention_reference(q, k, v, b, mask))
    assert torch.equal(trifast.triangle_attention_with_lse(q, k, v, b, mask)[0], out)


def test_trifast_operator(device):
    inputs = trifast.gen_tensors(5, 8, 2, True, device, torch.float32)
    torch.library.opcheck(trifast.triangle_attention_with_lse, inputs)


def test_trifast_gradients(device):
    *leaves, mask = trifast.gen_tensors(7, 8, 2, True, device, torch.float32, batch=2)
    mask[:, 2] = True
    out, lse = trifast.triangle_attention_with_lse(*leaves, mask)
    dout = random_tensor(out.shape, seed="dout", device=device)
    *grads, dmask = trifast.triangle_attention_bwd(dout, *leaves, out, lse, mask)
    assert dmask.shape == mask.shape
    assert not dmask.any()
    expected = torch.autograd.grad(trifast.attention_reference(*leaves, mask), leaves, dout)
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)


MODULES = [(name, module) for name, places in installing._NAMES.items() for module in places]


@pytest.mark.parametrize("package, module", MODULES, ids=[module for _, module in MODULES])
def test_install_as_makes_modules_and_takes_them_back(package, module):
    before = set(sys.modules)
    with compat.install_as(package):
        found = sys.modules[module]
        assert importlib.import_module(module) is found
        assert importlib.util.find_spec(module) is not None
        for name, value in installing._NAMES[package][module].items():
            assert getattr(found, name) is value
    left = {name for name in set(sys.modules) - before if name.split(".")[0] == package}
    assert not left


def test_install_as_replaces_in_a_real_module(monkeypatch):
    real = type(sys)("trifast")
    real.triangle_attention = original = object()
    monkeypatch.setitem(sys.modules, "trifast", real)
    installed = compat.install_as("trifast")
    assert real.triangle_attention is trifast.triangle_attention
    installed.undo()
    installed.undo()
    assert real.triangle_attention is original


def test_install_as_names_what_it_knows():
    with pytest.raises(ValueError, match="package must be one of .*'trifast'.*got 'openfold'"):
        compat.install_as("openfold")
