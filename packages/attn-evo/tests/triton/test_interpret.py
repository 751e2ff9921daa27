"""The Triton kernels in the interpreter, on tiles small enough for it, against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attn_core import tuning
from attn_core.testing import assert_within_budget, embedded, poison_new_allocations, random_tensor
from attn_core.tuning import TileConfig
from attn_evo import EvoWeights, reference

pytest.importorskip("triton")

from attn_evo._triton import backward, configs, forward, prefix_sum, problem

pytestmark = pytest.mark.interpret

DTYPES = [torch.float32, torch.float16]
BLOCK = 16
PICK = configs._pick


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16 tokens and chunks of two, so that few tokens make several of both."""
    monkeypatch.setattr(configs, "_pick", lambda *_: TileConfig(BLOCK, 2 * BLOCK))
    monkeypatch.setattr(configs, "PREFIX_SUM", TileConfig(BLOCK, BLOCK))
    monkeypatch.setattr(configs, "PREFIX_SUM_COLUMNS", TileConfig(16, 8))
    monkeypatch.setattr(prefix_sum, "_CHUNK", 2 * BLOCK)


def show_dtype(dtype):
    return str(dtype).removeprefix("torch.")


def attend(case, inputs):
    """Outputs and gradients of the kernels, which find nothing but NaN in fresh memory."""
    v, weights, mask, sums, length, dout, dsums = inputs
    call = (v, weights, mask, sums, length, case.causal, torch.float32, ())
    with poison_new_allocations():
        out, sums_after = forward.attention(*call)
        dv, dsums, dweights = backward.attention_backward(dout, dsums, *call)
    names = ("out", "sums_after", "dv", "dsums", *(f"d{name}" for name in EvoWeights._fields))
    return dict(zip(names, (out, sums_after, dv, dsums, *dweights), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=show_dtype)
@pytest.mark.parametrize(
    "sizes, flags",
    [
        ((1, 2, 70, 16), {}),
        ((2, 2, 49, 24), {"has_mask": True, "has_state": True}),
        ((1, 1, 33, 40), {"causal": False}),
        ((2, 1, 50, 16), {"causal": False, "has_mask": True, "has_state": True}),
        ((1, 2, 70, 136), {"has_state": True}),
    ],
    ids=["causal", "mask-state-d24", "full-d40", "full-mask-state", "wide"],
)
def test_outputs_and_gradients(sizes, flags, dtype, make_case, assert_results):
    case = make_case(*sizes, **flags)
    inputs = case.inputs(dtype)
    actual = attend(case, inputs)
    assert actual["out"].dtype == actual["dv"].dtype == actual["dw_q"].dtype == dtype
    assert_results(case, actual, inputs)


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_lengths(causal, length, make_case, assert_results):
    case = make_case(1, 1, length, 8, causal)
    inputs = case.inputs(torch.float32)
    assert_results(case, attend(case, inputs), inputs)


def test_no_tokens(make_case):
    case = make_case(2, 1, 0, 8, has_state=True)
    inputs = case.inputs(torch.float32)
    actual = attend(case, inputs)
    assert torch.equal(actual["sums_after"], inputs[3])
    assert torch.equal(actual["dsums"], inputs[6])
    assert all(not actual[f"d{name}"].any() for name in EvoWeights._fields)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_any_strides_and_nothing_beside_the_tensors(causal, make_case):
    case = make_case(2, 2, 37, 12, causal, has_mask=True, has_state=causal)
    inputs = case.inputs(torch.float32)
    v, weights, mask, sums, length, dout, dsums = inputs
    strided = (
        embedded(v, order=(3, 1, 0, 2)),
        EvoWeights(*(embedded(w, order=(*reversed(range(w.dim())),)) for w in weights)),
        mask.T.contiguous().T,
        None if sums is None else embedded(sums, order=(3, 2, 1, 0)),
        length,
        embedded(dout, order=(0, 2, 3, 1)),
        None if dsums is None else embedded(dsums, order=(3, 2, 1, 0)),
    )
    expected, actual = attend(case, inputs), attend(case, strided)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_weights_of_another_dtype(make_case):
    case = make_case(1, 1, 20, 16)
    v, weights, *rest = case.inputs(torch.float16)
    wide = EvoWeights(*(weight.float() for weight in weights))
    expected, actual = attend(case, (v, weights, *rest)), attend(case, (v, wide, *rest))
    assert torch.equal(actual["out"], expected["out"])
    assert actual["dw_f"].dtype == torch.float32
    assert torch.equal(actual["dw_f"].half(), expected["dw_f"])


def test_masked_tokens_and_zeros_give_the_bias(make_case):
    case = make_case(1, 2, 40, 16, has_mask=True)
    inputs = case.inputs(torch.float32)
    v, weights, mask, *_ = inputs
    v[:, :, 5] = 0
    actual = attend(case, inputs)
    dead = ~mask[0]
    dead[5] = True
    assert torch.equal(actual["out"][0, :, dead], weights.norm_bias.expand(2, dead.sum(), 16))
    assert not actual["dv"][0, :, ~mask[0]].any()


def test_a_stream_in_two_parts_is_one_call(make_case):
    case = make_case(1, 2, 60, 16)
    v, weights, *_ = case.inputs(torch.float32)
    options = (True, torch.float32, ())
    whole, sums_whole = forward.attention(v, weights, None, None, None, *options)
    first, sums = forward.attention(v[:, :, :21], weights, None, None, None, *options)
    second, sums = forward.attention(v[:, :, 21:], weights, None, sums, torch.tensor(21), *options)
    torch.testing.assert_close(torch.cat((first, second), 2), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sums, sums_whole, atol=1e-5, rtol=1e-5)


def test_causal_outputs_do_not_depend_on_later_tokens(make_case):
    case, now = make_case(1, 1, 50, 16), 23
    inputs = case.inputs(torch.float32)
    expected = attend(case, inputs)
    inputs[0][:, :, now:] *= -50
    actual = attend(case, inputs)
    assert torch.equal(actual["out"][:, :, :now], expected["out"][:, :, :now])


@pytest.mark.parametrize("config", [(32, 32), (16, 64), (64, 64)], ids=str)
def test_tiles(config, monkeypatch, make_case, assert_results):
    monkeypatch.setattr(configs, "_pick", lambda *_: TileConfig(*config))
    case = make_case(1, 1, 83, 16)
    inputs = case.inputs(torch.float32)
    assert_results(case, attend(case, inputs), inputs)


@pytest.mark.parametrize("variable, mode", [("EVO_AUTOTUNE", "1"), ("ATTN_TUNE", "force")])
def test_tuning_runs_both_passes_and_keeps_the_fastest(
    variable, mode, tmp_path, monkeypatch, make_case, assert_results
):
    fastest, others = TileConfig(32, 64, 4, 1), [TileConfig(16, 64, 4, 1)]
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv(variable, mode)
    measured = []

    def milliseconds(launch, config):
        measured.append(config)
        launch(config)
        return float(config != fastest)

    monkeypatch.setattr(configs, "_pick", PICK)
    monkeypatch.setattr(configs, "time_launch", milliseconds)
    for name in ("FORWARD", "BACKWARD"):
        table = dataclasses.replace(getattr(configs, name), rows={}, candidates=[*others, fastest])
        monkeypatch.setattr(configs, name, table)
    tuning.forget()
    case = make_case(1, 1, 40, 16)
    inputs = case.inputs(torch.float32)
    assert_results(case, attend(case, inputs), inputs)
    assert measured == [*others, fastest] * 2
    key = (16, 4, "causal")
    assert tuning.measured(configs.FORWARD, inputs[0].device) == {key: fastest}
    tuning.forget()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_weights_stay_in_shared_memory(causal, monkeypatch, make_case):
    case = make_case(1, 1, 40, 16, causal)
    inputs = case.inputs(torch.float16)
    expected = attend(case, inputs)
    monkeypatch.setattr(problem, "weights_stay", lambda v: True)
    actual = attend(case, inputs)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_large_values_near_a_pole_stay_finite(make_case):
    case = make_case(1, 1, 20, 16)
    v, weights, *rest = case.inputs(torch.float16)
    weights = weights._replace(w_l=0 * weights.w_l, b_l=0 * weights.b_l)
    v[:, :, 0] *= 1e-4
    for name, value in attend(case, (v, weights, *rest)).items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=show_dtype)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("exclusive", [False, True], ids=["inclusive", "exclusive"])
@pytest.mark.parametrize(
    "shape, dim",
    [((2, 2, 20, 5), 2), ((7, 97), 1), ((280, 8), 0), ((9,), 0), ((2, 1, 33), 2), ((3, 1), 1)],
    ids=str,
)
def test_prefix_sum(shape, dim, exclusive, reverse, dtype):
    x = random_tensor(shape, seed=f"{shape}", dtype=dtype)
    flags = (dim, exclusive, reverse)
    with poison_new_allocations():
        out = prefix_sum.prefix_sum(x, *flags)
        dx = prefix_sum.prefix_sum_backward(x, *flags)
    exact = x.double().requires_grad_()
    expected = reference.prefix_sum(exact, *flags)
    (dexpected,) = torch.autograd.grad(expected, exact, x.double())
    assert_within_budget(out, reference.prefix_sum(x, *flags), expected, factor=4.0)
    same_dtype = reference.prefix_sum(x, dim, exclusive, not reverse)
    assert_within_budget(dx, same_dtype, dexpected, factor=4.0)


def test_prefix_sum_of_float64_is_exact_to_its_bits():
    x = random_tensor((3, 70), seed="wide", dtype=torch.float64)
    torch.testing.assert_close(
        prefix_sum.prefix_sum(x, 1, False, False), x.cumsum(1), rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("exclusive", [False, True], ids=["inclusive", "exclusive"])
@pytest.mark.parametrize("large", [1e9, torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("shape, dim", [((70, 16), 0), ((2, 70), 1)], ids=str)
def test_no_prefix_sum_before_a_large_element_knows_it(shape, dim, large, exclusive, reverse):
    x, place = torch.ones(shape), 37
    x.select(dim, place).fill_(large)
    out = prefix_sum.prefix_sum(x, dim, exclusive, reverse).movedim(dim, 0)
    out = out.flip(0) if reverse else out
    steps = (shape[dim] - 1 - place if reverse else place) + exclusive
    expected = torch.arange(steps) + float(not exclusive)
    assert torch.equal(out[:steps, 0], expected)


@pytest.mark.parametrize("order", [(3, 1, 0, 2), (2, 0, 3, 1), (1, 0, 3, 2)], ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_prefix_sum_of_any_strides(dim, order):
    x = random_tensor((3, 4, 5, 6), seed="strides")
    expected = prefix_sum.prefix_sum(x, dim, False, False)
    actual = prefix_sum.prefix_sum(embedded(x, order=order), dim, False, False)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_prefix_sum_of_many_dimensions():
    x = random_tensor((2, 3, 2, 3, 2, 4, 2), seed="many").permute(6, 4, 2, 0, 5, 3, 1)
    torch.testing.assert_close(prefix_sum.prefix_sum(x, 3, False, False), x.cumsum(3))


def test_prefix_sum_of_nothing():
    assert prefix_sum.prefix_sum(torch.zeros(2, 0, 3), 1, True, False).shape == (2, 0, 3)
