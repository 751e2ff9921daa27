"""TriangleAttention against Algorithms 13 and 14 written out on the pair tensor as it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attn_triangle import TriangleAttention, triangle_attention

C_IN, C_HIDDEN, HEADS, N = 10, 6, 3, 7

STATE = {
    "layer_norm.weight": (C_IN,),
    "layer_norm.bias": (C_IN,),
    "linear.weight": (HEADS, C_IN),
    "mha.linear_q.weight": (HEADS * C_HIDDEN, C_IN),
    "mha.linear_k.weight": (HEADS * C_HIDDEN, C_IN),
    "mha.linear_v.weight": (HEADS * C_HIDDEN, C_IN),
    "mha.linear_g.weight": (HEADS * C_HIDDEN, C_IN),
    "mha.linear_g.bias": (HEADS * C_HIDDEN,),
    "mha.linear_o.weight": (C_IN, HEADS * C_HIDDEN),
    "mha.linear_o.bias": (C_IN,),
}
ORIENTATIONS = pytest.mark.parametrize("starting", [True, False], ids=["starting", "ending"])


def make(device, *, starting, dtype=torch.float64):
    layer = TriangleAttention(C_IN, C_HIDDEN, HEADS, starting).to(device, dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def algorithm(layer, z, keep, *, starting):
    """Lines 1 to 7 with the indices of the paper; keep is 1 for pairs that may be attended to."""
    state = layer.state_dict()
    z = F.layer_norm(z, (C_IN,), state["layer_norm.weight"], state["layer_norm.bias"])

    def project(name):
        x = z @ state[f"mha.linear_{name}.weight"].T + state.get(f"mha.linear_{name}.bias", 0.0)
        return x.unflatten(-1, (HEADS, C_HIDDEN))

    q, k, v, gate = project("q"), project("k"), project("v"), project("g").sigmoid()
    bias = z @ state["linear.weight"].T
    if starting:
        scores = torch.einsum("...ijhc,...ikhc->...ijkh", q, k) * C_HIDDEN**-0.5
        scores = scores + torch.einsum("...jkh->...jkh", bias)[..., None, :, :, :]
        scores = scores.masked_fill((keep == 0)[..., :, None, :, None], -1e9)
        update = torch.einsum("...ijkh,...ikhc->...ijhc", scores.softmax(-2), v)
    else:
        scores = torch.einsum("...ijhc,...kjhc->...ijkh", q, k) * C_HIDDEN**-0.5
        scores = scores + torch.einsum("...kih->...ikh", bias)[..., :, None, :, :]
        is_masked = (keep == 0).transpose(-1, -2)  # [*, J, K]
        scores = scores.masked_fill(is_masked[..., None, :, :, None], -1e9)
        update = torch.einsum("...ijkh,...kjhc->...ijhc", scores.softmax(-2), v)
    return (gate * update).flatten(-2) @ state["mha.linear_o.weight"].T + state["mha.linear_o.bias"]


@ORIENTATIONS
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("mask", ["none", "float", "bool", "rows"])
def test_is_the_algorithm(mask, batch, starting, device):
    layer = make(device, starting=starting)
    z = torch.randn(*batch, N, N, C_IN, dtype=torch.float64, device=device)
    keep = torch.ones(*batch, N, N, dtype=torch.float64, device=device)
    if mask != "none":
        keep.bernoulli_(0.7)
        keep[..., 0, 0] = 0
    if mask == "rows":
        keep[..., 2, :] = keep[..., :, 3] = 0
    expected = algorithm(layer, z, keep, starting=starting)
    given = {"none": None, "bool": keep.bool()}.get(mask, keep)
    torch.testing.assert_close(layer(z, given), expected)


@ORIENTATIONS
def test_gradients_are_those_of_the_algorithm(starting, device):
    layer = make(device, starting=starting)
    z = torch.randn(1, N, N, C_IN, dtype=torch.float64, device=device, requires_grad=True)
    keep = torch.ones(1, N, N, dtype=torch.float64, device=device).bernoulli_(0.7)
    (grad,) = torch.autograd.grad(layer(z, keep).square().sum(), z)
    expected = algorithm(layer, z, keep, starting=starting).square().sum()
    torch.testing.assert_close(grad, torch.autograd.grad(expected, z)[0])
    layer(z, keep).sum().backward()
    assert all(parameter.grad.any() for parameter in layer.parameters())


@ORIENTATIONS
def test_ending_node_is_the_starting_node_of_the_transposed_pair(starting, device):
    layer, other = make(device, starting=starting), make(device, starting=not starting)
    other.load_state_dict(layer.state_dict())
    z = torch.randn(N, N, C_IN, dtype=torch.float64, device=device)
    torch.testing.assert_close(other(z.transpose(0, 1)).transpose(0, 1), layer(z))


def test_parameters_have_the_names_and_shapes_of_openfold():
    layer = TriangleAttention(C_IN, C_HIDDEN, HEADS)
    assert {name: tuple(x.shape) for name, x in layer.state_dict().items()} == STATE


def test_fresh_module_changes_nothing_and_can_learn(device):
    layer = TriangleAttention(C_IN, C_HIDDEN, HEADS).to(device)
    out = layer(torch.randn(1, N, N, C_IN, device=device))
    assert not out.any()
    out.sum().backward()
    assert layer.mha.linear_o.weight.grad.any()


def test_heads_are_read_and_written_without_a_copy(device, monkeypatch):
    layer = make(device, starting=True)
    seen = {}

    def spy(q, k, v, bias, mask, **kwargs):
        seen["q"], seen["out"] = q, triangle_attention(q, k, v, bias, mask, **kwargs)
        return seen["out"]

    monkeypatch.setattr("attn_triangle.module.triangle_attention", spy)
    layer(torch.randn(2, N, N, C_IN, dtype=torch.float64, device=device))
    assert seen["q"].movedim(-4, -2).is_contiguous()
    assert seen["out"].stride() == seen["q"].stride()


def test_autocast(device):
    layer = make(device, starting=True, dtype=torch.float32)
    z = torch.randn(1, N, N, C_IN, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = layer(z)
    assert out.dtype == torch.bfloat16
    expected = layer(z)
    assert (out - expected).norm() < 0.05 * expected.norm()


@ORIENTATIONS
def test_compiles_without_a_graph_break(starting, device):
    torch._dynamo.reset()
    layer = make(device, starting=starting)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (5, 6):
        z = torch.randn(2, n, n, C_IN, dtype=torch.float64, device=device)
        keep = torch.ones(2, n, n, device=device).bernoulli_(0.7)
        torch.testing.assert_close(compiled(z, keep), layer(z, keep))


@pytest.mark.parametrize(
    "x_shape, mask_shape, message",
    [
        ((N, C_IN), None, r"x must have shape \(\*, N, N, c_in\) with c_in = 10, got \(7, 10\)"),
        ((N, N + 1, C_IN), None, r"x must have shape .*, got \(7, 8, 10\)"),
        ((N, N, 4), None, r"x must have shape .*, got \(7, 7, 4\)"),
        ((2, N, N, C_IN), (N, N), r"mask must have shape \(\*, N, N\) = \(2, 7, 7\), got \(7, 7\)"),
    ],
)
def test_a_bad_shape_is_named(x_shape, mask_shape, message):
    layer = TriangleAttention(C_IN, C_HIDDEN, HEADS)
    mask = None if mask_shape is None else torch.ones(mask_shape)
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(x_shape), mask)


@pytest.mark.parametrize("sizes", [(0, 4, 2), (8, -4, 2), (8, 4, 1.5), (8, None, 2)], ids=str)
def test_a_bad_size_is_named(sizes):
    with pytest.raises(ValueError, match=r"(c_in|c_hidden|no_heads) must be a positive integer"):
        TriangleAttention(*sizes)


def test_a_node_that_is_neither_is_named():
    with pytest.raises(ValueError, match="starting must be True or False, got 'ending'"):
        TriangleAttention(8, 4, 2, "ending")
