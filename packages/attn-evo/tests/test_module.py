"""The module EvoAttention."""

from __future__ import annotations

import pytest
import torch

from attn_core.testing import random_tensor
from attn_evo import EvoAttention, EvoWeights, evo_attention

GATES = ("q_proj", "v_proj_local", "global_stat_gate_proj", "final_gate_proj")


def peer_state(dim, *, with_copy=False):
    """State dict as evo-attn's module writes it after its first call."""
    shapes = {f"{gate}.weight": (dim, dim) for gate in GATES}
    shapes |= {f"{gate}.bias": (dim,) for gate in GATES}
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    state = {f"core.{name}": random_tensor(shape, seed=name) for name, shape in shapes.items()}
    if with_copy:
        state |= {name.replace("core.", "ref."): tensor for name, tensor in state.items()}
    return state


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_heads_read_slices_of_the_embedding(causal):
    layer = EvoAttention(24, 3, bias=True)
    x = random_tensor((2, 11, 24), seed="x")
    heads = torch.stack(x.split(8, dim=-1), dim=1)
    out = evo_attention(heads, causal, weights=layer.weights)
    expected = layer.out_proj(torch.cat(out.unbind(1), dim=-1))
    torch.testing.assert_close(layer(x, causal=causal), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_bias_and_out_proj_are_honoured(bias):
    names = dict(EvoAttention(24, 3, bias=bias).named_parameters())
    assert ("out_proj.bias" in names) is bias
    assert names["out_proj.weight"].shape == (24, 24)
    assert len(names) == 10 + 1 + bias
    assert len(list(EvoAttention(24, 3, out_proj=False).parameters())) == 10


def test_a_bias_without_projection_is_one_vector():
    layer, plain = (
        EvoAttention(24, 3, bias=True, out_proj=False),
        EvoAttention(24, 3, out_proj=False),
    )
    assert layer.out_proj.bias.shape == (24,)
    x = random_tensor((1, 6, 24), seed="x")
    plain.load_state_dict(layer.state_dict(), strict=False)
    assert torch.equal(layer(x), plain(x))
    with torch.no_grad():
        layer.out_proj.bias += 2
    assert torch.equal(layer(x), plain(x) + 2)


def test_an_optimiser_made_before_the_first_call_trains_everything():
    layer = EvoAttention(16, 2, bias=True)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = [parameter.clone() for parameter in layer.parameters()]
    layer(random_tensor((2, 9, 16), seed="x")).square().sum().backward()
    optimiser.step()
    for old, (name, new) in zip(before, layer.named_parameters(), strict=True):
        assert not torch.equal(old, new), name


def test_evaluation_is_training():
    layer, x = EvoAttention(16, 2), random_tensor((2, 9, 16), seed="x")
    assert torch.equal(layer(x), layer.eval()(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out_proj", [True, False])
@pytest.mark.parametrize("with_copy", [True, False])
def test_state_of_the_peer(bias, out_proj, with_copy):
    state = peer_state(8, with_copy=with_copy)
    names = set(state)
    layer = EvoAttention(24, 3, bias=bias, out_proj=out_proj)
    layer.load_state_dict(state)
    assert set(state) == names
    x = random_tensor((1, 6, 24), seed="x")
    out = evo_attention(x.unflatten(-1, (3, 8)).transpose(1, 2), weights=layer.weights)
    torch.testing.assert_close(layer(x), out.transpose(1, 2).flatten(2))
    assert torch.equal(layer.weights.w_l, state["core.v_proj_local.weight"])
    assert torch.equal(layer.weights.norm_bias, state["core.norm.bias"])


def test_state_of_the_peer_inside_a_model():
    model = torch.nn.Sequential(torch.nn.Identity(), EvoAttention(24, 3, bias=True))
    model.load_state_dict({f"1.{name}": tensor for name, tensor in peer_state(8).items()})
    assert (model[1].out_proj.bias == 0).all()


def test_own_state_needs_its_output_projection():
    state = EvoAttention(24, 3, out_proj=False).state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*out_proj\.weight"):
        EvoAttention(24, 3).load_state_dict(state)
    own = EvoAttention(24, 3, bias=True)
    copy = EvoAttention(24, 3, bias=True)
    copy.load_state_dict(own.state_dict())
    x = random_tensor((1, 6, 24), seed="x")
    assert torch.equal(copy(x), own(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_dtype(dtype):
    layer = EvoAttention(16, 2, dtype=dtype)
    assert layer(random_tensor((2, 9, 16), seed="x", dtype=dtype)).dtype == dtype


def test_a_bias_without_projection_keeps_the_dtype():
    layer, x = EvoAttention(16, 2, bias=True, out_proj=False), random_tensor((1, 9, 16), seed="x")
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_accum_dtype_and_mask_reach_the_function():
    layer, x = EvoAttention(16, 2, out_proj=False), random_tensor((1, 9, 16), seed="x")
    keep = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1, 1]])
    out = layer(x, attention_mask=keep, accum_dtype=torch.float64)
    v = x.unflatten(-1, (2, 8)).transpose(1, 2)
    expected = evo_attention(
        v, attention_mask=keep, accum_dtype=torch.float64, weights=layer.weights
    )
    assert torch.equal(out, expected.transpose(1, 2).flatten(2))


def test_errors():
    with pytest.raises(ValueError, match=r"embed_dim must be a multiple of num_heads, got .* 10 "):
        EvoAttention(10, 3)
    with pytest.raises(ValueError, match="num_heads must be a positive integer, got 1.5"):
        EvoAttention(24, 1.5)
    with pytest.raises(ValueError, match=r"x must have shape \(B, L, 24\), got \(2, 3, 25\)"):
        EvoAttention(24, 3)(torch.zeros(2, 3, 25))
    with pytest.raises(ValueError, match=r"x must have 3 dimensions \(B, L, E\), got"):
        EvoAttention(24, 3)(torch.zeros(3, 24))
    with pytest.raises(ValueError, match="x must have dtype float16, .*, got int64"):
        EvoAttention(24, 3)(torch.zeros(2, 3, 24).long())
    for name in ("bias", "out_proj"):
        with pytest.raises(ValueError, match=f"{name} must be True or False, got 'no'"):
            EvoAttention(24, 3, **{name: "no"})
    with pytest.raises(ValueError, match="head_dim must be a positive integer, got -1"):
        EvoWeights.identity(-1)


def test_repr_shows_the_settings():
    assert "embed_dim=24, num_heads=3, backend='auto'" in repr(EvoAttention(24, 3))
