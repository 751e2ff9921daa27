from __future__ import annotations

import sys
import types

import pytest
import torch

from benchmarks import checking, problems
from benchmarks.providers import PACKAGES, prefix_sum, subject, triangle
from benchmarks.providers.base import wants_grad


def check(case, measured, prepare):
    inputs = measured.make_inputs(case, torch.device("cpu"))
    expected = measured.reference(case, inputs, gradients="backward" in case.passes)
    call = prepare(case, inputs)
    out, _ = checking.check_forward(call, expected[0], wants_grad(case))
    if "backward" in case.passes:
        checking.check_backward(call, out, expected[1:])
    return out


def small(package):
    return next(case for case in problems.load(package, "cpu") if case.headline)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_torch_backend_is_right(package):
    measured = subject(package)
    (ours,) = [p for p in measured.providers if p.name == "torch" and "cpu" in p.devices]
    assert torch.isfinite(check(small(package), measured, ours.prepare)).all()


@pytest.mark.parametrize("case", problems.load("attn-evo-prefix-sum", "test"), ids=lambda c: c.id)
def test_peers_of_prefix_sum_are_right_where_a_copy_is_whole(case):
    check(case, prefix_sum.SUBJECT, prefix_sum._torch)
    inputs = prefix_sum.make_inputs(case, torch.device("cpu"))
    (expected,) = prefix_sum.reference(case, inputs, gradients=False)
    copy = prefix_sum._copy(case, inputs)
    checking.check_forward(copy, expected, grad=True)
    inputs.x[..., -1, :] += 100.0
    with pytest.raises(checking.WrongResultError):
        checking.judge(copy.canonical(copy.forward()), expected)


def attend(q, k, v, bias, masked):
    """Triangle attention by the plain formula, the layout being (B, H, I, J, D)."""
    scores = q @ k.mT * q.shape[-1] ** -0.5 + bias[:, :, None]
    return torch.softmax(scores.masked_fill(masked[:, None, :, None], -torch.inf), -1) @ v


def trifast(q, k, v, bias, mask):
    return attend(q, k, v, bias, mask)


def cuequivariance(q, k, v, bias, mask):
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return attend(q, k, v, bias[:, 0], ~mask[:, :, 0, 0]).transpose(1, 2)


@pytest.mark.parametrize(
    "module, function, prepare",
    [
        ("trifast", trifast, triangle._trifast),
        ("cuequivariance_torch", cuequivariance, triangle._cuequivariance),
        (None, None, triangle._sdpa),
    ],
    ids=["trifast", "cuequivariance", "sdpa"],
)
@pytest.mark.parametrize("case", problems.load("attn-triangle", "cpu"), ids=lambda case: case.id)
def test_triangle_peers_are_called_rightly(monkeypatch, case, module, function, prepare):
    monkeypatch.setenv("CUEQ_TRIATTN_FALLBACK_THRESHOLD", "100")
    if module:
        tuners = {name: types.SimpleNamespace() for name in ("_fwd", "_bwd_kv", "_bwd_q", "_bwd_b")}
        fake = types.SimpleNamespace(
            triangle_attention=function, triton=types.SimpleNamespace(**tuners)
        )
        monkeypatch.setitem(sys.modules, module, fake)
    check(case, triangle.SUBJECT, prepare)


def test_trifast_is_compiled_part_by_part(monkeypatch):
    case = problems.load("attn-triangle", "cpu")[0]
    inputs = triangle.make_inputs(case, torch.device("cpu"))
    kernels = {
        name: types.SimpleNamespace(configs=list(range(10)), cache={})
        for name in ("_fwd", "_bwd_kv", "_bwd_q", "_bwd_b")
    }
    tuner = kernels["_fwd"]
    tried = []

    def function(*args):
        assert not tuner.cache
        tuner.do_bench(lambda: tried.extend(tuner.configs), quantiles=(0.5,))
        return trifast(*args)

    fake = types.SimpleNamespace(
        triangle_attention=function, triton=types.SimpleNamespace(**kernels)
    )
    monkeypatch.setitem(sys.modules, "trifast", fake)
    for compile_part in triangle._trifast_kernels(case).values():
        tuner.cache["of another part"] = 0
        compile_part(inputs)
    assert sorted(tried) == tuner.configs == list(range(10))


def test_cuequivariance_is_not_measured_where_it_runs_torch():
    case = next(c for c in problems.load("attn-triangle", "gpu") if c.id == "d64-n1024")
    triangle._require_cuequivariance_kernel(case)
    wide = problems.Case("wide", "attn-triangle", torch.float32, (), "", {"D": 64})
    with pytest.raises(ValueError, match="would run torch"):
        triangle._require_cuequivariance_kernel(wide)
