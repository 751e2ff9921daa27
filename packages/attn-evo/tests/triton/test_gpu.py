"""Backend "triton" through the operators on a GPU, against the reference in float64.

Kernels are compiled for every new combination of dtype, head dimension and flags, which takes some
seconds; cases share them where they can.
"""

from __future__ import annotations

import pytest
import torch

from attn_core.testing import assert_within_budget, embedded, poison_new_allocations, random_tensor
from attn_evo import (
    EvoWeights,
    UnsupportedProblemError,
    evo_attention,
    evo_attention_step,
    ops,
    prefix_sum,
    reference,
)

pytestmark = pytest.mark.gpu

BACKEND = "triton"
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
NAMES = ("out", "sums_after", "dv", "dsums", *(f"d{name}" for name in EvoWeights._fields))


def attend(case, inputs):
    """Outputs and gradients of the operators, which find nothing but NaN in fresh memory."""
    v, weights, mask, sums, length, dout, dsums = inputs
    call = (v, *weights, mask, sums, length, case.causal, FLOAT, [], BACKEND)
    with poison_new_allocations():
        outputs = ops.attention(*call)
        dv, dsums, *dweights = ops.attention_backward(dout, dsums, *call)
    return dict(zip(NAMES, (*outputs, dv, dsums, *dweights), strict=True))


def check(case, dtype, device, assert_results):
    inputs = case.inputs(dtype, device)
    assert_results(case, attend(case, inputs), inputs)


def assert_same_bits(actual, expected):
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


# --- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 1000, 4097])
def test_lengths(length, device, make_case, assert_results):
    check(make_case(2, 2, length, 64), BFLOAT, device, assert_results)


@pytest.mark.parametrize("length", [1, 65, 4097])
def test_lengths_of_full_attention(length, device, make_case, assert_results):
    check(make_case(2, 2, length, 64, causal=False), BFLOAT, device, assert_results)


@pytest.mark.parametrize("dim", [7, 16, 24, 32, 96, 128, 160, 256])
def test_head_dims(dim, device, make_case, assert_results):
    check(make_case(1, 2, 130, dim), BFLOAT, device, assert_results)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_wide_heads_of_many_tiles(causal, device, make_case, assert_results):
    check(make_case(2, 2, 4097, 128, causal=causal), BFLOAT, device, assert_results)


@pytest.mark.parametrize("length", [1, 32, 33, 65, 1000])
def test_many_wide_sequences(length, device, make_case, assert_results):
    """As many as an H200 has SMs, nearly: a program owns a whole one."""
    check(make_case(8, 16, length, 128), BFLOAT, device, assert_results)


@pytest.mark.parametrize("length", [4095, 4096, 4097])
def test_the_longest_wide_sequences_of_a_program(length, device, make_case, assert_results):
    """Those of more than 4096 tokens are cut into chunks."""
    check(make_case(7, 16, length, 128), BFLOAT, device, assert_results)


def test_many_wide_sequences_repeat_their_bits(device, make_case):
    case = make_case(8, 16, 500, 128)
    inputs = case.inputs(BFLOAT, device)
    expected = attend(case, inputs)
    for _ in range(3):
        assert_same_bits(attend(case, inputs), expected)


@pytest.mark.parametrize("sizes", [(8, 16, 97), (2, 3, 1001)], ids=str)
def test_wide_sequences_packed_with_others(sizes, device, make_case, packed, assert_results):
    """Their gradients too."""
    case = make_case(*sizes, 128)
    v, *rest, dout, dsums = inputs = case.inputs(BFLOAT, device)
    actual = attend(case, (packed(v), *rest, packed(dout), dsums))
    assert_results(case, actual, inputs)


@pytest.mark.parametrize("dtype, dim", [(BFLOAT, 64), (FLOAT, 64), (BFLOAT, 128)], ids=str)
@pytest.mark.parametrize("batch, heads", [(2, 3), (8, 16)])
def test_broadcast_values_and_gradients(batch, heads, dim, dtype, device, make_case):
    """Strides of 0, as sums and means of outputs leave them."""
    case = make_case(batch, heads, 97, dim)
    v, *rest, dout, dsums = case.inputs(dtype, device)
    v = v[:1].expand(v.shape)
    for part in (dout[:, :, :1], dout.mean()):
        dout = part.expand(v.shape)
        actual = attend(case, (v, *rest, dout, dsums))
        assert_same_bits(actual, attend(case, (v.contiguous(), *rest, dout.contiguous(), dsums)))


def test_no_tokens(device, make_case):
    case = make_case(2, 2, 0, 64, has_state=True)
    inputs = case.inputs(BFLOAT, device)
    actual = attend(case, inputs)
    assert torch.equal(actual["sums_after"], inputs[3])
    assert torch.equal(actual["dsums"], inputs[6])


# --- dtypes and options -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT], ids=str)
@pytest.mark.parametrize(
    "flags",
    [{"has_mask": True, "has_state": True}, {"causal": False, "has_mask": True, "has_state": True}],
    ids=["mask-state", "full-mask-state"],
)
def test_masks_and_streams(flags, dtype, device, make_case, assert_results):
    check(make_case(2, 3, 201, 64, **flags), dtype, device, assert_results)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_dtypes_one_after_the_other(causal, device, make_case, assert_results):
    """The sums of a stream are float32 whatever v is: its dtype must still choose the kernel."""
    case = make_case(1, 2, 130, 64, causal, has_state=True)
    for dtype in (HALF, BFLOAT, FLOAT):
        check(case, dtype, device, assert_results)


@pytest.mark.parametrize("dim", [16, 32, 64, 128])
def test_float32(dim, device, make_case, assert_results):
    check(make_case(1, 2, 300, dim), FLOAT, device, assert_results)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 4097])
def test_lengths_of_float32(length, device, make_case, assert_results):
    check(make_case(2, 2, length, 64), FLOAT, device, assert_results)


@pytest.mark.parametrize(
    "dim, dtype", [(64, HALF), (64, BFLOAT), (64, FLOAT), (128, HALF), (128, BFLOAT)], ids=str
)
def test_values_packed_with_others(dim, dtype, device, make_case, assert_results):
    """Heads between heads, as one projection makes them: what Hopper's own kernel takes."""
    case = make_case(2, 3, 1001, dim)
    v, *rest = case.inputs(dtype, device)
    packed = v.new_full((2, 1001, 3, 3, dim), torch.nan)
    packed[:, :, 1] = v.transpose(1, 2)
    inputs = (packed[:, :, 1].transpose(1, 2), *rest)
    results = attend(case, inputs)
    if dtype is HALF:  # PyTorch's own gradients overflow near the poles
        results = {name: results[name] for name in ("out", "sums_after")}
    assert_results(case, results, (v, *rest))


@pytest.mark.parametrize("dim", [-2, -1])
def test_prefix_sums_of_one_size_after_another(dim, device):
    """A kernel that is compiled for one block of columns serves many."""
    for size in (16, 1000, 16):
        shape = (3, 500, size) if dim == -2 else (3, size, 500)
        x = random_tensor(shape, seed=f"columns {size} {dim}", device=device)
        assert (prefix_sum(x, dim, backend=BACKEND) - x.double().cumsum(dim)).abs().max() < 1e-3


@pytest.mark.parametrize("length", [11_000, 15_000])
def test_chunks_of_several_tiles(length, device, make_case):
    """Three and four on 132 SMs: of an odd number the last has no neighbour to go with."""
    v, weights, *_ = make_case(1, 4, length, 64).inputs(BFLOAT, device)
    out, sums = ops.attention(v, *weights, None, None, None, True, FLOAT, [], BACKEND)
    exact = EvoWeights(*(weight.double() for weight in weights))
    exact_out, exact_sums = reference.attention(v.double(), exact, True)
    assert (out - exact_out).norm() < 3e-2 * exact_out.norm()
    assert (sums - exact_sums).norm() < 1e-2 * exact_sums.norm()


def test_gradients_through_the_public_function(device, make_case):
    case = make_case(2, 2, 300, 64)
    inputs = case.inputs(BFLOAT, device)
    v, weights, *_, dout, _ = inputs
    leaves = [x.detach().requires_grad_() for x in (v, *weights)]
    out = evo_attention(leaves[0], weights=EvoWeights(*leaves[1:]), backend=BACKEND)
    grads = torch.autograd.grad(out, leaves, dout)
    expected = attend(case, inputs)
    names = ("dv", *(f"d{name}" for name in EvoWeights._fields))
    assert_same_bits(dict(zip(names, grads, strict=True)), {name: expected[name] for name in names})


def test_float32_weights_of_bfloat16_values(device, make_case):
    case = make_case(1, 2, 100, 64)
    v, weights, *rest = case.inputs(BFLOAT, device)
    wide = EvoWeights(*(weight.float() for weight in weights))
    expected, actual = attend(case, (v, weights, *rest)), attend(case, (v, wide, *rest))
    assert torch.equal(actual["out"], expected["out"])
    assert torch.equal(actual["dw_q"].bfloat16(), expected["dw_q"])


def test_a_stream_in_parts_is_one_call(device, make_case):
    v, weights, *_ = make_case(1, 2, 500, 64).inputs(FLOAT, device)
    state, outputs = None, []
    for part in v.split((300, 1, 1, 198), dim=2):
        out, state = evo_attention_step(part, state, weights=weights, backend=BACKEND)
        outputs.append(out)
    whole = evo_attention(v, weights=weights, backend=BACKEND)
    error = (torch.cat(outputs, dim=2) - whole).norm() / whole.norm()
    assert error < 2e-5
    assert state.length == 500


@pytest.mark.parametrize("hints", [(16, None, None), (128, 8, 1), (None, 8, None)], ids=str)
def test_hints(hints, device):
    v = random_tensor((1, 2, 300, 64), seed="v", dtype=BFLOAT, device=device)
    expected = evo_attention(v, backend=BACKEND)
    actual = evo_attention(v, True, None, None, *hints, backend=BACKEND)
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    "dtype, dim, options, reason",
    [
        (BFLOAT, 129, {"block_m": 32}, "tiles for head dimensions up to 128, got 129"),
        (torch.float64, 16, {}, "not float64"),
        (FLOAT, 16, {"accum_dtype": torch.float64}, "it sums in float32, not float64"),
        (FLOAT, 16, {"block_m": 48}, "block_m must be one of"),
    ],
    ids=["d129", "float64", "accum-float64", "block48"],
)
def test_what_it_refuses(dtype, dim, options, reason, device):
    v = random_tensor((1, 1, 4, dim), seed="v", dtype=dtype, device=device)
    with pytest.raises(UnsupportedProblemError, match=reason):
        evo_attention(v, backend=BACKEND, **options)


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_repeated_runs_give_the_same_bits(causal, device, make_case):
    case = make_case(2, 8, 8192, 64, causal)
    inputs = case.inputs(BFLOAT, device)
    expected = attend(case, inputs)
    for _ in range(3):
        assert_same_bits(attend(case, inputs), expected)


def test_sums_of_a_million_tokens(device):
    v = random_tensor((1, 1, 1_000_000, 64), seed="v", dtype=BFLOAT, device=device)
    weights = EvoWeights.identity(64, dtype=BFLOAT, device=device)
    call = (v, *weights, None, None, None, True, FLOAT, [], BACKEND)
    _, sums = ops.attention(*call)
    exact = v[0, 0].double().sum(dim=0)
    assert (sums[0, 0, 0] - exact).norm() / exact.norm() < 1e-5


def test_bfloat16_gradients_are_nearer_than_those_of_torch(device, make_case):
    case = make_case(1, 4, 16384, 64)
    inputs = case.inputs(BFLOAT, device)
    exact, plain = case.plain(inputs, torch.float64)["dv"], case.plain(inputs, BFLOAT)["dv"]
    error = (attend(case, inputs)["dv"] - exact).norm()
    assert error <= (plain - exact).norm() / 4


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (3, 1, 0, 2)], ids=str)
def test_any_strides_and_nothing_beside_the_tensors(order, device, make_case, assert_results):
    case = make_case(2, 2, 65, 64, has_mask=True)
    inputs = case.inputs(BFLOAT, device)
    v, weights, mask, sums, length, dout, dsums = inputs
    weights = EvoWeights(*(embedded(w, order=(*reversed(range(w.dim())),)) for w in weights))
    strided = embedded(v, order=order), weights, mask.T.contiguous().T, sums, length
    actual = attend(case, (*strided, embedded(dout, order=order), dsums))
    assert_results(case, actual, inputs)


def test_alignment_of_pointers_may_change_between_calls(device, make_case, assert_results):
    case = make_case(1, 2, 67, 64)
    for offset in (0, 1, 0, 3):
        v, *rest = case.inputs(BFLOAT, device)
        storage = v.new_full((v.numel() + 2 * offset,), torch.nan)
        shifted = storage[offset : offset + v.numel()].view(v.shape).copy_(v)
        inputs = (shifted, *rest)
        assert_results(case, attend(case, inputs), inputs)


def test_cuda_graph(device):
    v = random_tensor((1, 2, 300, 64), seed="v", dtype=BFLOAT, device=device)
    expected = evo_attention(v, backend=BACKEND)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = evo_attention(v, weights=None, backend=BACKEND)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("sizes", [(1, 2, 300, 64), (8, 16, 300, 128)], ids=str)
def test_cuda_graph_of_both_passes(sizes, device, make_case):
    """With values that come later, too."""

    def step(v, *weights, dout):
        leaves = [x.detach().requires_grad_() for x in (v, *weights)]
        out = evo_attention(leaves[0], weights=EvoWeights(*leaves[1:]), backend=BACKEND)
        return out, *torch.autograd.grad(out, leaves, dout)

    v, weights, *_, dout, _ = make_case(*sizes).inputs(BFLOAT, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(v, *weights, dout=dout)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(v, *weights, dout=dout)
    for _ in range(2):
        graph.replay()
        for actual, expected in zip(results, step(v, *weights, dout=dout), strict=True):
            assert torch.equal(actual, expected)
        v.mul_(-0.5)


def test_compile(device, make_case):
    v, weights, *_ = make_case(1, 2, 130, 64).inputs(BFLOAT, device)
    compiled = torch.compile(evo_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    actual = compiled(v, weights=weights)
    assert torch.equal(actual, evo_attention(v, weights=weights, backend=BACKEND))


# --- prefix sums --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT], ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(
    "shape, dim",
    [((2, 4, 5000, 64), -2), ((3, 1537, 192), 1), ((3, 7, 129), -1), ((4097, 5), 0)],
    ids=str,
)
def test_prefix_sum(shape, dim, reverse, dtype, device):
    x = random_tensor(shape, seed="x", dtype=dtype, device=device).requires_grad_()
    dout = random_tensor(shape, seed="dout", dtype=dtype, device=device)
    out = prefix_sum(x, dim, True, reverse, backend=BACKEND)
    (dx,) = torch.autograd.grad(out, x, dout)
    for actual, source, back in ((out, x.detach(), reverse), (dx, dout, not reverse)):
        plain, exact = (reference.prefix_sum(y, dim, True, back) for y in (source, source.double()))
        assert_within_budget(actual, plain, exact, factor=8.0)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)
def test_prefix_sum_of_columns_between_others(dtype, device):
    """What Hopper's own kernel copies by 16 bytes, and what begins 2 bytes later."""
    x = random_tensor((2, 1000, 64), seed="x", dtype=dtype, device=device)
    expected = prefix_sum(x, 1, backend=BACKEND)
    for first in (64, 65):
        packed = x.new_full((2, 1000, 192), torch.nan)
        part = packed[:, :, first : first + 64]
        part.copy_(x)
        torch.testing.assert_close(prefix_sum(part, 1, backend=BACKEND), expected)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT], ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("exclusive", [False, True], ids=["inclusive", "exclusive"])
@pytest.mark.parametrize("shape, dim", [((2, 1200, 64), 1), ((3, 1200), -1)], ids=str)
def test_no_prefix_sum_before_a_large_element_knows_it(
    shape, dim, exclusive, reverse, dtype, device
):
    x, place = torch.full(shape, 2**-5, dtype=dtype, device=device), 700
    for large in (6e4, torch.inf, torch.nan):
        x.select(dim, place).fill_(large)
        out = prefix_sum(x, dim, exclusive, reverse, backend=BACKEND).movedim(dim, 0)
        out = out.flip(0) if reverse else out
        steps = (shape[1] - 1 - place if reverse else place) + exclusive
        expected = (torch.arange(steps, device=device) + float(not exclusive)) * 2**-5
        assert (out[:steps] == expected.to(dtype).view(-1, *[1] * (out.dim() - 1))).all()


@pytest.mark.parametrize("dtype", [BFLOAT, FLOAT], ids=str)
@pytest.mark.parametrize("shape", [(4, 100_000, 16), (2, 40_000, 64), (8, 40_000, 64)], ids=str)
def test_prefix_sums_of_repeated_runs_have_the_same_bits(shape, dtype, device):
    """Of chunks, and of columns, a few and many, in groups of tiles that wait for one another."""
    x = random_tensor(shape, seed="x", dtype=dtype, device=device)
    expected = prefix_sum(x, 1, backend=BACKEND)
    plain, exact = (reference.prefix_sum(y, 1, False, False) for y in (x, x.double()))
    assert_within_budget(expected, plain, exact, factor=8.0)
    assert all(torch.equal(prefix_sum(x, 1, backend=BACKEND), expected) for _ in range(3))
