"""Streaming: chunk by chunk and token by token is one call."""

from __future__ import annotations

import pytest
import torch

from attn_core.testing import assert_within_budget, random_tensor
from attn_evo import (
    EvoAttention,
    EvoState,
    EvoWeights,
    evo_attention,
    evo_attention_step,
    reference,
)

SHAPE = (2, 3, 41, 8)
CHUNKS = {"tokens": [1] * 41, "chunks": [7, 1, 0, 20, 13], "one": [41]}


@pytest.fixture(params=CHUNKS.values(), ids=CHUNKS)
def chunks(request):
    return request.param


def stream(v, chunks, mask=None, **kwargs):
    state, outputs, start = None, [], 0
    for length in chunks:
        part = slice(start, start + length)
        part_mask = None if mask is None else mask[:, part]
        out, state = evo_attention_step(v[:, :, part], state, part_mask, **kwargs)
        outputs.append(out)
        start += length
    return torch.cat(outputs, dim=2), state


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"]
)
def test_a_stream_is_one_call(chunks, dtype, make_weights):
    v, weights = random_tensor(SHAPE, seed="v", dtype=dtype), make_weights("w", 8, dtype)
    mask = random_tensor((2, 41), seed="mask") > -1
    out, state = stream(v, chunks, mask, weights=weights)
    whole = evo_attention(v, True, mask, weights=weights)
    exact, sums = reference.attention(
        v.double(), EvoWeights(*(w.double() for w in weights)), True, mask
    )
    assert_within_budget(out, whole, exact, factor=4.0)
    assert state.length.item() == 41
    assert state.sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {torch.float64: 1e-13}.get(dtype, 1e-5)
    torch.testing.assert_close(state.context.double(), sums[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state.stat.double(), sums[1], rtol=tolerance, atol=tolerance)


def test_gradients_flow_through_the_state(chunks, make_weights):
    v = random_tensor(SHAPE, seed="v", dtype=torch.float64).requires_grad_()
    weights = EvoWeights(*(w.requires_grad_() for w in make_weights("w", 8, torch.float64)))
    dout = random_tensor(SHAPE, seed="dout", dtype=torch.float64)
    dsums = random_tensor((2, 2, 3, 8), seed="dsums", dtype=torch.float64)
    out, state = stream(v, chunks, weights=weights)
    whole, sums = reference.attention(v, weights, True)
    torch.testing.assert_close(
        torch.autograd.grad((out, state.sums), (v, *weights), (dout, dsums)),
        torch.autograd.grad((whole, sums), (v, *weights), (dout, dsums)),
    )


def test_gradients_of_the_state_alone(make_weights):
    v = random_tensor(SHAPE, seed="v", dtype=torch.float64).requires_grad_()
    weights = make_weights("w", 8, torch.float64)
    _, state = evo_attention_step(v, weights=weights)
    _, sums = reference.attention(v, weights, True)
    torch.testing.assert_close(
        torch.autograd.grad(state.stat.square().sum(), v),
        torch.autograd.grad(sums[1].square().sum(), v),
    )


def test_the_state_does_not_grow():
    state = None
    for _ in range(3):
        _, state = evo_attention_step(random_tensor((1, 2, 50, 4), seed=0), state)
        assert state.sums.shape == (2, 1, 2, 4)
    assert state.length.item() == 150


def test_a_step_does_not_change_its_state():
    _, state = evo_attention_step(random_tensor(SHAPE, seed=0))
    sums, length = state.sums.clone(), state.length.clone()
    evo_attention_step(random_tensor(SHAPE, seed=1), state)
    assert torch.equal(state.sums, sums)
    assert torch.equal(state.length, length)


def test_float64_sums_stay_float64():
    v = random_tensor(SHAPE, seed="v", dtype=torch.bfloat16)
    _, state = evo_attention_step(v, accum_dtype=torch.float64)
    _, state = evo_attention_step(v, state)
    assert state.sums.dtype == torch.float64
    torch.testing.assert_close(state.context, 2 * v.double().sum(dim=2))


def test_a_million_bfloat16_tokens_are_summed_exactly_enough():
    tokens, chunk = 1_000_000, 500_000
    v = (random_tensor((1, 1, tokens, 1), seed="long") + 0.5).bfloat16()
    _, state = stream(v, [chunk] * 2)
    _, whole = evo_attention_step(v)
    exact = v.double().sum(dim=2)
    for sums in (state, whole):
        assert ((sums.context - exact).abs() / exact.abs()).max() <= 1e-6
    exact = evo_attention_step(v, accum_dtype=torch.float64)[1].stat
    assert ((whole.stat - exact).abs() / exact.abs()).max() <= 1e-5


def test_the_module_streams():
    layer = EvoAttention(24, 3)
    x = random_tensor((2, 30, 24), seed="x")
    keep = random_tensor((2, 30), seed="mask") > -1
    state, outputs = None, []
    for part, part_keep in zip(x.split(7, dim=1), keep.split(7, dim=1), strict=True):
        out, state = layer.step(part, state, attention_mask=part_keep)
        outputs.append(out)
    whole = layer(x, attention_mask=keep)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "state, message",
    [
        ("state", "state must be an EvoState or None, got str"),
        (
            EvoState(torch.zeros(2, 2, 3, 9), torch.tensor(1)),
            r"state.sums must have shape \(2, B, H, D\) = \(2, 2, 3, 8\), got \(2, 2, 3, 9\)",
        ),
        (
            EvoState(torch.zeros(2, 2, 3, 8, dtype=torch.float16), torch.tensor(1)),
            "state.sums must have dtype float32, float64, got float16",
        ),
        (
            EvoState(torch.zeros(2, 2, 3, 8), torch.tensor([1])),
            r"state.length must have shape \(\) = \(\), got \(1,\)",
        ),
        (
            EvoState(torch.zeros(2, 2, 3, 8), torch.tensor(1.0)),
            "state.length must have dtype int64, got float32",
        ),
    ],
    ids=["type", "shape", "dtype", "length-shape", "length-dtype"],
)
def test_a_state_that_does_not_fit(state, message):
    with pytest.raises(ValueError, match=message):
        evo_attention_step(torch.zeros(SHAPE), state)


def test_a_state_keeps_its_dtype():
    _, state = evo_attention_step(torch.zeros(SHAPE))
    with pytest.raises(ValueError, match=r"accum_dtype must be that of state\.sums, torch.float32"):
        evo_attention_step(torch.zeros(SHAPE), state, accum_dtype=torch.float64)
    with pytest.raises(ValueError, match="accum_dtype must be float64 for v in float64"):
        evo_attention_step(torch.zeros(SHAPE, dtype=torch.float64), state)
