from __future__ import annotations

import pytest
import torch

from benchmarks import checking, warm
from benchmarks.problems import load
from benchmarks.providers import flash_terms
from benchmarks.providers.base import Call

CASES = load("attn-flash-terms", "test")


def check(case, prepare):
    inputs = flash_terms.make_inputs(case, torch.device("cpu"))
    expected = flash_terms.reference(case, inputs, gradients=True)
    call: Call = prepare(case, inputs)
    out, _ = checking.check_forward(call, expected[0], grad=True)
    checking.check_backward(call, out, expected[1:])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["term"])
def test_terms_mean_what_attn_flash_computes(case):
    (ours,) = [provider for provider in flash_terms.SUBJECT.providers if provider.name == "torch"]
    check(case, ours.prepare)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case["term"] != "dropout"], ids=lambda case: case["term"]
)
def test_flex_attention_is_asked_for_the_same(case):
    inputs = flash_terms.make_inputs(case, torch.device("cpu"))
    (expected,) = flash_terms.reference(case, inputs, gradients=False)
    out = scored(case, inputs)
    assert checking.judge(out, expected) < 1e-3


def scored(case, inputs):
    """Attention whose scores the function made for flex attention modifies."""
    q, k, v = (x.transpose(1, 2) for x in inputs[:3])
    scores = q @ k.mT * case["D"] ** -0.5
    modify = flash_terms._score_mod(case, inputs.term)
    if modify is not None:
        b, h, i, j = torch.meshgrid(*map(torch.arange, scores.shape), indexing="ij")
        scores = modify(scores, b, h, i, j)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["term"])
def test_torch_takes_masks_and_biases_alone(case):
    inputs = flash_terms.make_inputs(case, torch.device("cpu"))
    if case["term"] in ("softcap", "alibi", "dropout"):
        with pytest.raises(ValueError, match=case["term"]):
            flash_terms._efficient(case, inputs)
    else:
        flash_terms._efficient(case, inputs)


def test_kernels_of_both_passes_compile_side_by_side():
    cases = load("attn-flash-terms", "gpu")
    names = list(warm.tasks(flash_terms.SUBJECT, cases, torch.device("cuda"), ()))
    assert names[0][0] == "flex"  # what takes longest
    for case in cases:
        assert {("triton", case.id, "forward"), ("triton", case.id, "backward")} < set(names)


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_parts_are_what_a_run_compiles(part, monkeypatch):
    from attn_flash import ops

    case = next(case for case in CASES if case["term"] == "bias")
    inputs = flash_terms.make_inputs(case, torch.device("cpu"))
    calls = []
    for name in ("attention", "attention_backward"):
        monkeypatch.setattr(ops, name, lambda *args, name=name: calls.append((name, args)))
    flash_terms._compile_ours(part, case, inputs)
    ((name, args),) = calls
    assert name == {"forward": "attention", "backward": "attention_backward"}[part]
    assert args[-1] == "triton"
    assert any(x is inputs.term for x in args)
