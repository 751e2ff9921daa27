"""What torch sees: opcheck, gradcheck, torch.compile."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from attn_core import backends
from attn_core.testing import random_tensor
from attn_evo import (
    EvoWeights,
    UnsupportedProblemError,
    evo_attention,
    evo_attention_step,
    ops,
    prefix_sum,
)

OPS = torch.ops.attn_evo


@pytest.fixture(params=[True, False], ids=["causal", "full"])
def causal(request):
    return request.param


def with_grad(tensors):
    return [tensor.detach().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize(
    "length, dtype",
    [(0, torch.float32), (1, torch.bfloat16), (9, torch.float32)],
    ids=["l0-float32", "l1-bfloat16", "l9-float32"],
)
def test_opcheck_attention(length, dtype, causal, make_weights):
    v = random_tensor((2, length, 3, 4), seed="v", dtype=dtype).transpose(1, 2).requires_grad_()
    weights = with_grad(make_weights("w", 4))
    rest = (causal, torch.float32, [], "torch")
    torch.library.opcheck(OPS.attention.default, (v, *weights, None, None, None, *rest))
    mask = torch.ones(2, length, dtype=torch.bool)
    sums = random_tensor((2, 2, 3, 4), seed="sums").requires_grad_()
    state = (mask, sums, torch.tensor(5))
    torch.library.opcheck(OPS.attention.default, (v, *weights, *state, *rest))
    dout = random_tensor((2, 3, length, 4), seed="dout", dtype=dtype)
    dsums = random_tensor((2, 2, 3, 4), seed="dsums")
    args = (v.detach(), *(w.detach() for w in weights), mask, sums.detach(), state[2], *rest)
    torch.library.opcheck(OPS.attention_backward.default, (dout, dsums, *args))
    torch.library.opcheck(OPS.attention_backward.default, (dout, None, *args))


@pytest.mark.parametrize("exclusive", [True, False])
def test_opcheck_prefix_sum(exclusive):
    x = random_tensor((3, 4, 5), seed="x").transpose(0, 2).requires_grad_()
    torch.library.opcheck(OPS.prefix_sum.default, (x, 1, exclusive, False, "torch"))
    torch.library.opcheck(
        OPS.prefix_sum_backward.default, (x.detach(), 1, exclusive, True, "torch")
    )


@pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
def test_a_trace_runs_other_lengths(causal):
    traced = torch.jit.trace(lambda v: evo_attention(v, causal), torch.zeros(1, 2, 5, 4))
    v = random_tensor((2, 2, 9, 4), seed="v")
    assert torch.equal(traced(v), evo_attention(v, causal))


def test_gradcheck(causal, make_weights):
    v = random_tensor((1, 2, 4, 2), seed="v", dtype=torch.float64)
    inputs = with_grad((v, *make_weights("w", 2, torch.float64)))
    keep = torch.tensor([[1, 0, 1, 1]])

    def function(v, *weights):
        return evo_attention(v, causal, keep, weights=EvoWeights(*weights))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_gradcheck_of_the_operator_with_a_state(causal, make_weights):
    v = random_tensor((1, 2, 3, 2), seed="v", dtype=torch.float64)
    sums = random_tensor((2, 1, 2, 2), seed="sums", dtype=torch.float64)
    inputs = with_grad((v, sums, *make_weights("w", 2, torch.float64)))
    rest = (torch.tensor(7), causal, torch.float64, [], "torch")

    def function(v, sums, *weights):
        return ops.attention(v, *weights, None, sums, *rest)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_second_derivatives_without_gradients_of_everything():
    v = random_tensor((1, 1, 5, 3), seed="v", dtype=torch.float64).requires_grad_()
    (dv,) = torch.autograd.grad(evo_attention(v).square().sum(), v, create_graph=True)
    (second,) = torch.autograd.grad(dv.square().sum(), v)
    assert second.isfinite().all()
    assert second.abs().max() > 0


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")


def test_compile_attention(causal, make_weights):
    weights = EvoWeights(*with_grad(make_weights("w", 4)))

    def function(v, mask):
        return evo_attention(v, causal, mask, weights=weights)

    fast = compiled(function)
    for length in (5, 9, 13):
        v = random_tensor((2, 3, length, 4), seed=length).requires_grad_()
        mask = random_tensor((2, length), seed="mask") > -1
        out, expected = fast(v, mask), function(v, mask)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(
            torch.autograd.grad(out.square().sum(), (v, *weights)),
            torch.autograd.grad(expected.square().sum(), (v, *weights)),
        )


def test_compile_a_stream():
    fast = compiled(evo_attention_step)
    state = fast_state = None
    for length in (3, 1, 1, 4):
        v = random_tensor((1, 2, length, 4), seed=length)
        expected, state = evo_attention_step(v, state)
        out, fast_state = fast(v, fast_state)
        torch.testing.assert_close(out, expected)
    assert fast_state.length.item() == 9


def test_compile_prefix_sum():
    fast = compiled(lambda x: prefix_sum(x, exclusive=True))
    for length in (4, 7):
        x = random_tensor((2, length, 3), seed=length).requires_grad_()
        torch.testing.assert_close(fast(x), prefix_sum(x, exclusive=True))
        (dx,) = torch.autograd.grad(fast(x).square().sum(), x)
        (expected,) = torch.autograd.grad(prefix_sum(x, exclusive=True).square().sum(), x)
        torch.testing.assert_close(dx, expected)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_compiled_call_ignores_no_tile_hints(backend):
    fast = compiled(lambda v: evo_attention(v, block_m=64, backend=backend))
    with pytest.raises(UnsupportedProblemError, match="it has no tiles"):
        fast(torch.zeros(1, 1, 3, 4))


@pytest.mark.parametrize("op", [ops.ATTENTION, ops.PREFIX_SUM])
def test_the_typical_problem_has_a_backend(op):
    problem = backends.operators()[op](torch.device("cpu"))
    assert "torch" in [v.backend for v in backends.explain(op, problem) if v.reason is None]


def test_import_needs_no_triton():
    code = "import sys, attn_evo; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
