"""Rotary embedding on the CPU: gradients, packed tensors, the module, attention with it."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from attn_flash import flash_attention, flash_attention_rope, rotary_ops
from attn_flash.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
)

INTERLEAVED = pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "gptj"])


def tables(rows=40, half=8, dtype=torch.float32):
    angles = torch.rand(rows, half, dtype=torch.float64) * 2 * math.pi
    return angles.cos().to(dtype), angles.sin().to(dtype)


def test_the_arguments_are_those_of_flash_attn():
    def names(function):
        return list(inspect.signature(function).parameters)

    shared = ["interleaved", "inplace", "seqlen_offsets", "cu_seqlens", "max_seqlen", "backend"]
    assert names(apply_rotary_emb) == ["x", "cos", "sin", *shared]
    rest = ["cos_k", "sin_k", "interleaved", "seqlen_offsets", "num_heads_q", "backend"]
    assert names(apply_rotary_emb_qkv_) == ["qkv", "cos", "sin", *rest]
    rest = ["interleaved", "seqlen_offsets", "backend"]
    assert names(apply_rotary_emb_kv_) == ["kv", "cos", "sin", *rest]


@INTERLEAVED
@pytest.mark.parametrize("offset", ["zero", "int", "tensor"])
@pytest.mark.parametrize("inplace", [False, True])
def test_single_tensor(inplace, offset, interleaved):
    cos, sin = tables()
    x = torch.randn(3, 20, 2, 24, requires_grad=True)
    offsets = {"zero": 0, "int": 7, "tensor": torch.tensor([0, 20, 5])}[offset]
    rows = torch.arange(20) + torch.as_tensor(offsets).reshape(-1, 1)
    before = x.detach().clone().requires_grad_()
    expected = apply_rotary_emb_torch(before, cos[rows], sin[rows], interleaved)
    out = apply_rotary_emb(x, cos, sin, interleaved, inplace, offsets)
    torch.testing.assert_close(out, expected)
    assert torch.equal(x, out if inplace else before)
    dout = torch.randn_like(out)
    [dx] = torch.autograd.grad(out, x, dout.clone())
    torch.testing.assert_close(dx, torch.autograd.grad(expected, before, dout)[0])


@INTERLEAVED
@pytest.mark.parametrize("inplace", [False, True])
def test_variable_lengths(inplace, interleaved):
    cos, sin = tables()
    lens = (5, 0, 20, 1)
    padded = torch.randn(4, 20, 2, 24)
    mask = torch.arange(20) < torch.tensor(lens)[:, None]
    x = padded[mask].requires_grad_()
    bounds = torch.tensor((0, *lens)).cumsum(0).to(torch.int32)
    offsets = torch.tensor([3, 0, 20, 7], dtype=torch.int32)
    expected = apply_rotary_emb(padded, cos, sin, interleaved, False, offsets)[mask]
    dx_expected = apply_rotary_emb(padded, cos, -sin, interleaved, False, offsets)[mask]
    out = apply_rotary_emb(x, cos, sin, interleaved, inplace, offsets, bounds, 20)
    torch.testing.assert_close(out, expected)
    [dx] = torch.autograd.grad(out, x, padded[mask])
    torch.testing.assert_close(dx, dx_expected)


def test_tokens_past_the_last_sequence_stay():
    cos, sin = tables()
    x = torch.randn(9, 2, 24)
    bounds = torch.tensor([0, 4, 6], dtype=torch.int32)
    out = apply_rotary_emb(x, cos, sin, cu_seqlens=bounds, max_seqlen=4)
    assert torch.equal(out[6:], x[6:])
    assert not torch.equal(out[1:6], x[1:6])


def test_no_sequences_rotate_nothing():
    bounds = torch.tensor([0], dtype=torch.int32)
    x = torch.randn(3, 2, 24)
    assert torch.equal(apply_rotary_emb(x, *tables(), cu_seqlens=bounds, max_seqlen=0), x)


@INTERLEAVED
@pytest.mark.parametrize("layout", ["qkv", "strided", "grouped"])
@pytest.mark.parametrize("has_tables_for_k", [False, True])
def test_packed_queries_and_keys(has_tables_for_k, layout, interleaved):
    cos, sin = tables()
    tables_k = tables() if has_tables_for_k else (None, None)
    cos_k, sin_k = tables_k if has_tables_for_k else (cos, sin)
    heads = 3 if layout != "grouped" else 8
    qkv = torch.randn(2, 20, 3, heads, 16) if layout != "grouped" else torch.randn(2, 20, 8, 16)
    if layout == "strided":
        qkv = qkv.transpose(2, 3).contiguous().transpose(2, 3)
    leaf = qkv.clone().requires_grad_()
    q, k, v = leaf.unbind(2) if layout != "grouped" else leaf.split((4, 2, 2), 2)
    parts = (
        apply_rotary_emb_torch(q, cos[4:24], sin[4:24], interleaved),
        apply_rotary_emb_torch(k, cos_k[4:24], sin_k[4:24], interleaved),
        v,
    )
    expected = torch.stack(parts, 2) if layout != "grouped" else torch.cat(parts, 2)
    packed = qkv.clone().requires_grad_()
    num_heads_q = 4 if layout == "grouped" else None
    out = apply_rotary_emb_qkv_(packed, cos, sin, *tables_k, interleaved, 4, num_heads_q)
    torch.testing.assert_close(out, expected)
    assert torch.equal(packed, out)
    dout = torch.randn_like(out)
    [dx] = torch.autograd.grad(out, packed, dout)
    torch.testing.assert_close(dx, torch.autograd.grad(expected, leaf, dout)[0])


def test_packed_keys():
    cos, sin = tables()
    kv = torch.randn(2, 20, 2, 3, 16)
    expected = kv.clone()
    expected[:, :, 0] = apply_rotary_emb(kv[:, :, 0], cos, sin)
    assert apply_rotary_emb_kv_(kv, cos, sin) is kv
    torch.testing.assert_close(kv, expected)


def test_in_place_changes_reach_the_graph_of_what_came_before():
    cos, sin = tables()
    leaf = torch.randn(1, 20, 2, 16, requires_grad=True)
    x = leaf * 2
    assert apply_rotary_emb(x, cos, sin, inplace=True) is x
    out = apply_rotary_emb(leaf * 2, cos, sin)
    weights = torch.randn_like(out)
    grads = [torch.autograd.grad(y, leaf, weights)[0] for y in (x, out)]
    torch.testing.assert_close(*grads)


def test_a_tensor_saved_for_backward_is_not_overwritten_in_silence():
    leaf = torch.randn(1, 20, 2, 16, requires_grad=True)
    x = leaf.exp()  # its gradient needs x
    out = apply_rotary_emb(x, *tables(), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@INTERLEAVED
def test_second_derivatives(interleaved):
    cos, sin = tables(dtype=torch.float64)
    x = torch.randn(1, 4, 1, 18, dtype=torch.float64, requires_grad=True)

    def rotate(x):
        return apply_rotary_emb(x, cos, sin, interleaved).sin()

    assert torch.autograd.gradcheck(rotate, x)
    assert torch.autograd.gradgradcheck(rotate, x)


def test_tables_may_be_float32_beside_half_precision():
    cos, sin = tables()
    x = torch.randn(1, 20, 2, 16).half()
    expected = apply_rotary_emb(x.float(), cos, sin).half()
    torch.testing.assert_close(apply_rotary_emb(x, cos, sin), expected)


def rotary_arguments(**changes):
    cos, sin = tables()
    return {"x": torch.randn(2, 20, 2, 16), "cos": cos, "sin": sin, **changes}


BOUNDS = torch.tensor([0, 9, 20], dtype=torch.int32)
BAD = {
    "rank": ({"x": torch.zeros(2, 20, 16)}, r"x must have 4 dimensions \(B, S, H, D\)"),
    "dtype": ({"x": torch.zeros(2, 20, 2, 16).int()}, "x must have dtype float16"),
    "cos-dtype": ({"cos": torch.zeros(40, 8).half()}, "cos must have dtype float32"),
    "cos-rank": ({"cos": torch.zeros(2, 40, 8)}, "cos must have 2 dimensions"),
    "sin-shape": ({"sin": torch.zeros(40, 7)}, "sin must have shape"),
    "wide": (dict.fromkeys(("cos", "sin"), torch.zeros(40, 9)), "cos must have at most half"),
    "short": (dict.fromkeys(("cos", "sin"), torch.zeros(19, 8)), "cos must have a row for each"),
    "gradient": ({"cos": torch.zeros(40, 8, requires_grad=True)}, "cos must not require"),
    "offset-high": ({"seqlen_offsets": 21}, "seqlen_offsets must be from 0 to 20"),
    "offset-low": ({"seqlen_offsets": -1}, "seqlen_offsets must be from 0 to 20"),
    "offset-type": ({"seqlen_offsets": 1.5}, "seqlen_offsets must be an integer or a tensor"),
    "offsets-shape": ({"seqlen_offsets": torch.tensor([1])}, "seqlen_offsets must have shape"),
    "offsets-dtype": ({"seqlen_offsets": torch.zeros(2)}, "seqlen_offsets must have dtype"),
    "offsets-high": ({"seqlen_offsets": torch.tensor([0, 21])}, "must hold values from 0 to 20"),
    "no-max": ({"x": torch.zeros(20, 2, 16), "cu_seqlens": BOUNDS}, "max_seqlen must be given"),
    "bounds": (
        {"x": torch.zeros(20, 2, 16), "cu_seqlens": BOUNDS.flip(0), "max_seqlen": 20},
        "cu_seqlens must grow from 0",
    ),
    "longer": (
        {"x": torch.zeros(20, 2, 16), "cu_seqlens": BOUNDS, "max_seqlen": 10},
        "cu_seqlens must grow from 0 to at most 20 in steps of at most max_seqlen = 10",
    ),
}


@pytest.mark.parametrize("changes, message", [*BAD.values()], ids=[*BAD])
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        apply_rotary_emb(**rotary_arguments(**changes))


@pytest.mark.parametrize(
    "qkv, options, message",
    [
        (torch.zeros(2, 20, 16), {}, r"qkv must have 5 dimensions \(B, S, 3, H, D\)"),
        (torch.zeros(2, 20, 2, 2, 16), {}, "qkv must have shape"),
        (torch.zeros(2, 20, 8, 16), {}, "num_heads_q must be given"),
        (torch.zeros(2, 20, 8, 16), {"num_heads_q": 5}, "num_heads_q \\+ 2 H_KV heads"),
        (torch.zeros(2, 20, 8, 16), {"num_heads_q": 10}, "num_heads_q \\+ 2 H_KV heads"),
        (torch.zeros(2, 20, 3, 2, 16), {"cos_k": tables()[0]}, "cos_k and sin_k must be given"),
    ],
    ids=["rank", "three", "no-heads", "odd", "too-many", "cos-k-alone"],
)
def test_bad_packed_tensors_are_named(qkv, options, message):
    with pytest.raises(ValueError, match=message):
        apply_rotary_emb_qkv_(qkv, *tables(), **options)
    with pytest.raises(ValueError, match=r"kv must have (5 dimensions|shape) "):
        apply_rotary_emb_kv_(torch.zeros(2, 20, 3, 2, 16)[:, :, : qkv.dim()], *tables())


# --- the module -----------------------------------------------------------------------------------


def test_module_rotates_by_its_frequencies():
    module = RotaryEmbedding(16, base=100.0, interleaved=True)
    qkv = torch.randn(2, 9, 3, 2, 24)
    angles = torch.outer(torch.arange(12.0), 100.0 ** (-torch.arange(0, 16, 2) / 16))
    expected = qkv.clone()
    for part in (0, 1):
        rotated = apply_rotary_emb_torch(
            qkv[:, :, part], angles.cos()[3:], angles.sin()[3:], interleaved=True
        )
        expected[:, :, part] = rotated
    torch.testing.assert_close(module(qkv, seqlen_offset=3), expected)


def test_module_takes_queries_and_packed_keys():
    module = RotaryEmbedding(16)
    q, kv = torch.randn(2, 9, 4, 16), torch.randn(2, 9, 2, 2, 16)
    packed = torch.stack((q[:, :, :2], *kv.unbind(2)), 2).clone()
    expected = module(packed)
    q_out, kv_out = module(q.clone(), kv.clone(), seqlen_offset=torch.tensor([0, 0]), max_seqlen=9)
    torch.testing.assert_close(q_out[:, :, :2], expected[:, :, 0])
    torch.testing.assert_close(kv_out, expected[:, :, 1:])


def test_xpos_depends_on_distance_alone():
    module = RotaryEmbedding(16, scale_base=64.0)
    qkv = torch.ones(1, 32, 3, 1, 16)
    q, k, _ = module(qkv.clone()).unbind(2)
    scores = torch.einsum("bihd,bjhd->ij", q, k)
    assert torch.allclose(scores.diagonal(-5), scores[5, 0].expand(27), rtol=1e-4)
    assert not torch.allclose(scores.diagonal(-5)[0], scores.diagonal(5)[0], rtol=1e-3)


def test_module_keeps_its_precision_in_half():
    qkv = torch.randn(1, 3000, 3, 1, 16)
    exact = RotaryEmbedding(16)(qkv.clone())
    half = RotaryEmbedding(16).to(torch.bfloat16)(qkv.to(torch.bfloat16))
    assert (half.float() - exact).abs().max() < 0.05


@pytest.mark.parametrize("scale_base", [None, 64.0])
def test_module_turns_by_the_frequencies_it_is_given(scale_base):
    """Models stretch `inv_freq` after the module is made."""
    module = RotaryEmbedding(16, scale_base=scale_base)
    module.inv_freq.div_(4.0)
    qkv = torch.randn(1, 32, 3, 2, 16)
    positions = torch.arange(32.0) / 4
    angles = torch.outer(positions, 10000.0 ** (-torch.arange(0, 16, 2) / 16))
    stretch = 1.0
    if scale_base is not None:
        scale = (torch.arange(0, 16, 2) + 0.4 * 16) / (1.4 * 16)
        stretch = scale ** ((torch.arange(32) - 16) / scale_base)[:, None]
    q, k, v = module(qkv.clone()).unbind(2)
    for part, x, factor in ((0, q, stretch), (1, k, 1 / stretch)):
        expected = apply_rotary_emb_torch(
            qkv[:, :, part], angles.cos() * factor, angles.sin() * factor
        )
        torch.testing.assert_close(x, expected)
    assert torch.equal(v, qkv[:, :, 2])


def test_module_grows_its_tables_and_keeps_them():
    module = RotaryEmbedding(16)
    module(torch.randn(1, 9, 3, 2, 16))
    first = module._cos_cached
    module(torch.randn(1, 5, 3, 2, 16), seqlen_offset=4)
    assert module._cos_cached is first
    module(torch.randn(1, 5, 3, 2, 16), seqlen_offset=5)
    assert module._cos_cached.shape == module._sin_cached.shape == (10, 8)
    assert module._cos_k_cached is None
    module(torch.randn(1, 5, 3, 2, 16, dtype=torch.float16))
    assert module._cos_cached.dtype == torch.float16


def test_module_serves_subclasses_written_for_flash_attn():
    class Stretched(RotaryEmbedding):
        def _update_cos_sin_cache(self, seqlen, device=None, dtype=None):
            super()._update_cos_sin_cache(2 * seqlen, device, dtype)
            self._cos_cached = self._cos_cached[::2]
            self._sin_cached = self._sin_cached[::2]

    qkv = torch.randn(1, 9, 3, 2, 16)
    angles = torch.outer(2 * torch.arange(9.0), 10000.0 ** (-torch.arange(0, 16, 2) / 16))
    expected = apply_rotary_emb_torch(qkv[:, :, 0], angles.cos(), angles.sin())
    torch.testing.assert_close(Stretched(16)(qkv)[:, :, 0], expected)


def test_module_takes_tensor_offsets_up_to_where_its_tables_reach():
    module = RotaryEmbedding(16)
    qkv, offsets = torch.randn(2, 4, 3, 2, 16), torch.tensor([3, 0])
    expected = module(qkv.clone(), seqlen_offset=offsets, max_seqlen=7)
    torch.testing.assert_close(module(qkv.clone(), seqlen_offset=offsets), expected)
    with pytest.raises(ValueError, match="seqlen_offsets must hold values from 0 to 3"):
        module(qkv, seqlen_offset=torch.tensor([3, 4]))


def test_module_refuses_what_it_cannot_place():
    with pytest.raises(ValueError, match="dim must be an even integer"):
        RotaryEmbedding(15)
    with pytest.raises(ValueError, match="max_seqlen must be given"):
        RotaryEmbedding(16)(torch.zeros(1, 4, 3, 1, 16), seqlen_offset=torch.tensor([1]))


# --- attention with rotation ----------------------------------------------------------------------


@INTERLEAVED
@pytest.mark.parametrize("len_q", [20, 6])
def test_attention_with_rotation_is_both_one_after_the_other(len_q, interleaved):
    cos, sin = tables()
    q = torch.randn(2, 4, len_q, 16, requires_grad=True)
    k, v = (torch.randn(2, 2, 20, 16, requires_grad=True) for _ in range(2))
    out = flash_attention_rope(
        q, k, v, cos[None, None], sin, window_size=9, scale=0.3, interleaved=interleaved
    )
    q_rotated = apply_rotary_emb_torch(
        q.transpose(1, 2), cos[20 - len_q : 20], sin[20 - len_q : 20], interleaved
    )
    k_rotated = apply_rotary_emb_torch(k.transpose(1, 2), cos[:20], sin[:20], interleaved)
    expected = flash_attention(
        q_rotated.transpose(1, 2), k_rotated.transpose(1, 2), v, window_size=9, scale=0.3
    )
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    grads = (torch.autograd.grad(y, (q, k, v), dout) for y in (out, expected))
    for actual, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)


def test_attention_takes_the_tables_too():
    cos, sin = tables()
    q, k, v = torch.randn(3, 2, 4, 20, 16).unbind(0)
    expected = flash_attention_rope(q, k, v, cos, sin, causal=False)
    out, lse = flash_attention(q, k, v, False, rot_cos=cos, rot_sin=sin, return_lse=True)
    assert torch.equal(out, expected)
    assert lse.shape == (2, 4, 20)
    with pytest.raises(ValueError, match="sin must be given with its companion, got None"):
        flash_attention(q, k, v, rot_cos=cos)


def test_attention_with_rotation_names_bad_arguments():
    q, k = torch.zeros(1, 2, 9, 16), torch.zeros(1, 2, 8, 16)
    with pytest.raises(ValueError, match="q must have at most as many tokens as k"):
        flash_attention_rope(q, k, k, *tables())
    with pytest.raises(ValueError, match="cos must have 2 dimensions"):
        flash_attention_rope(k, k, k, torch.zeros(2, 40, 8), tables()[1])
    with pytest.raises(ValueError, match="k must have dtype float16"):
        flash_attention_rope(k, k.int(), k, *tables())


@pytest.mark.parametrize("name", ["rot_cos", "rot_sin"])
def test_attention_names_its_own_tables(name):
    x = torch.zeros(1, 2, 8, 16)
    arguments = dict(zip(("rot_cos", "rot_sin"), tables(), strict=True))
    for table, message in ((None, "given with its companion"), (torch.zeros(8), "2 dimensions")):
        with pytest.raises(ValueError, match=f"^{name} must (be|have) {message}"):
            flash_attention(x, x, x, **arguments | {name: table})
    with pytest.raises(ValueError, match="^rot_cos must have a row for each of 41 positions"):
        flash_attention(*torch.zeros(3, 1, 2, 41, 16), **arguments)


# --- torch around it ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operator", [rotary_ops.rotate, rotary_ops.rotate_], ids=["new", "inplace"]
)
def test_operators_pass_opcheck(operator):
    x = torch.randn(2, 5, 3, 16)
    args = (x, *tables(), torch.tensor([1, 2]), 0, None, 5, True, False, "auto")
    torch.library.opcheck(operator.overload, args)


def test_rotate_passes_opcheck_with_gradients():
    x = torch.randn(2, 5, 3, 16, requires_grad=True)
    args = (x, *tables(), None, 3, None, 5, False, False, "auto")
    torch.library.opcheck(rotary_ops.rotate.overload, args)


@pytest.mark.parametrize("inplace", [False, True])
def test_rotation_compiles_as_one_graph_of_any_size(inplace):
    def step(x, cos, sin, offsets):
        x = x * 2
        return apply_rotary_emb(x, cos, sin, inplace=inplace, seqlen_offsets=offsets).sin()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for length, offsets in ((5, 0), (9, 2), (9, torch.tensor([1, 2]))):
        x = torch.randn(2, length, 3, 16, requires_grad=True)
        args = (*tables(), offsets)
        actual, expected = compiled(x, *args), step(x, *args)
        torch.testing.assert_close(actual, expected)
        grads = [torch.autograd.grad(y.sum(), x)[0] for y in (actual, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("is_view", [False, True], ids=["leaf", "view"])
def test_tensors_that_refuse_changes_are_rotated_in_place(is_view, is_compiled):
    def rotate(x, *args):
        return apply_rotary_emb_qkv_(x.unbind(0)[1] if is_view else x, *args)

    torch._dynamo.reset()
    leaf = torch.randn(2, 2, 5, 3, 4, 16) if is_view else torch.randn(2, 5, 3, 4, 16)
    qkv = (leaf[1] if is_view else leaf).clone()
    cos, sin = tables(5)
    q, k = (apply_rotary_emb_torch(qkv[:, :, part], cos, sin) for part in (0, 1))
    expected = torch.stack((q, k, qkv[:, :, 2]), 2)
    leaf.requires_grad_()
    function = torch.compile(rotate, fullgraph=True, backend="aot_eager") if is_compiled else rotate
    out = function(leaf, cos, sin)
    torch.testing.assert_close(out, expected)
    assert torch.equal(leaf[1] if is_view else leaf, out)
    [grad] = torch.autograd.grad(out, leaf, torch.ones_like(out))
    back = [apply_rotary_emb_torch(torch.ones_like(q), cos, -sin)] * 2
    wanted = torch.stack((*back, torch.ones_like(q)), 2)
    torch.testing.assert_close(grad[1] if is_view else grad, wanted)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("inplace", [False, True])
def test_vmap_is_one_call_after_another(inplace):
    x, (cos, sin) = torch.randn(3, 2, 5, 4, 16), tables()
    expected = torch.stack([apply_rotary_emb(part, cos, sin) for part in x])
    out = torch.vmap(lambda x: apply_rotary_emb(x, cos, sin, inplace=inplace))(x)
    torch.testing.assert_close(out, expected)


def test_rotation_exports_for_any_length():
    class Rotation(torch.nn.Module):
        def forward(self, x, cos, sin):
            return apply_rotary_emb(x, cos, sin, seqlen_offsets=3)

    length = torch.export.Dim("length", min=2, max=37)
    args = (torch.randn(2, 5, 3, 16), *tables())
    shapes = {"x": {1: length}, "cos": None, "sin": None}
    program = torch.export.export(Rotation(), args, dynamic_shapes=shapes)
    x = torch.randn(2, 11, 3, 16)
    torch.testing.assert_close(program.module()(x, *args[1:]), Rotation()(x, *args[1:]))
