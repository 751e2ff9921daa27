"""Weights of OpenFold, OpenFold-3, Boltz and Protenix modules, by names and shapes."""

from __future__ import annotations

import math

import pytest
import torch

from attn_triangle import TriangleAttention, convert_state_dict

C_IN, C_HIDDEN, HEADS, N = 24, 8, 4, 6
WIDTH = C_HIDDEN * HEADS
SHAPES = {
    "layer_norm.weight": (C_IN,),
    "layer_norm.bias": (C_IN,),
    "linear.weight": (HEADS, C_IN),
    "mha.linear_q.weight": (WIDTH, C_IN),
    "mha.linear_k.weight": (WIDTH, C_IN),
    "mha.linear_v.weight": (WIDTH, C_IN),
    "mha.linear_g.weight": (WIDTH, C_IN),
    "mha.linear_o.weight": (C_IN, WIDTH),
}
BIASES = {"mha.linear_g.bias": (WIDTH,), "mha.linear_o.bias": (C_IN,)}
# OpenFold's gate and output have biases, those of the others have none.
LAYOUTS = {
    "openfold": SHAPES | BIASES,
    "openfold3": {name.replace("linear.w", "linear_z.w"): x for name, x in SHAPES.items()},
    "boltz": SHAPES,
    "protenix": SHAPES,
}


def weights(layout):
    return {name: torch.randn(shape) * 0.3 for name, shape in LAYOUTS[layout].items()}


def algorithm(weights, x, keep, starting):
    """Algorithms 13 and 14 line by line, by the names of the weights."""
    w = {name.replace("linear_z", "linear"): tensor for name, tensor in weights.items()}
    x = x if starting else x.transpose(0, 1)
    keep = keep if starting else keep.T
    x = torch.nn.functional.layer_norm(x, (C_IN,), w["layer_norm.weight"], w["layer_norm.bias"])
    bias = torch.einsum("jkc,hc->hjk", x, w["linear.weight"])
    heads = {
        name: (x @ w[f"mha.linear_{name}.weight"].T).unflatten(-1, (HEADS, C_HIDDEN))
        for name in "qkvg"
    }
    if "mha.linear_g.bias" in w:
        heads["g"] = heads["g"] + w["mha.linear_g.bias"].unflatten(0, (HEADS, C_HIDDEN))
    scores = torch.einsum("ijhc,ikhc->hijk", heads["q"], heads["k"]) / math.sqrt(C_HIDDEN)
    scores = scores + bias[:, None] + torch.where(keep, 0.0, -1e9)[None, :, None]
    out = torch.einsum("hijk,ikhc->ijhc", scores.softmax(-1), heads["v"])
    gated = (torch.sigmoid(heads["g"]) * out).flatten(-2)
    update = gated @ w["mha.linear_o.weight"].T + w.get("mha.linear_o.bias", 0.0)
    return update if starting else update.transpose(0, 1)


@pytest.mark.parametrize("starting", [True, False], ids=["starting", "ending"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_module_computes_what_the_other_one_does(layout, starting):
    torch.manual_seed(0)
    own = weights(layout)
    model = {f"blocks.3.tri_att.{name}": tensor for name, tensor in own.items()}
    model["blocks.3.tri_mul.linear.weight"] = torch.ones(1)
    layer = TriangleAttention.from_state_dict(model, starting, prefix="blocks.3.tri_att")
    x, keep = torch.randn(N, N, C_IN), torch.rand(N, N) > 0.3
    torch.testing.assert_close(layer(x, keep), algorithm(own, x, keep, starting))


def test_a_module_takes_dtype_and_sizes_from_the_weights():
    half = {name: tensor.half() for name, tensor in weights("boltz").items()}
    layer = TriangleAttention.from_state_dict(half)
    assert {x.dtype for x in layer.parameters()} == {torch.float16}
    assert (layer.mha.c_hidden, layer.mha.no_heads) == (C_HIDDEN, HEADS)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("linear.weight"), r"missing \['linear.weight'\]"),
        (lambda w: w.update({"mha.linear_qkv.weight": torch.ones(1)}), "unknown .*linear_qkv"),
        (lambda w: w.clear(), "under prefix '', missing"),
    ],
    ids=["missing", "unknown", "empty"],
)
def test_other_weights_are_refused(change, message):
    wrong = weights("openfold")
    change(wrong)
    with pytest.raises(ValueError, match=message):
        convert_state_dict(wrong)


def test_weights_that_are_no_mapping_are_refused():
    with pytest.raises(ValueError, match="state_dict must be a mapping, got list"):
        convert_state_dict([*weights("openfold").values()])
