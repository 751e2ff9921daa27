"""Error messages, backends by name and by environment, and the examples of the README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from attn_evo import (
    BackendUnavailableError,
    EvoWeights,
    environment,
    evo_attention,
    get_available_backends,
    prefix_sum,
)

V = torch.zeros(2, 3, 5, 4)
IDENTITY = EvoWeights.identity(4)
BAD_VALUES = {
    "list": ([1.0], "v must be a tensor, got list"),
    "rank": (V[0], r"v must have 4 dimensions \(B, H, L, D\), got shape \(3, 5, 4\)"),
    "dtype": (V.long(), "v must have dtype float16, bfloat16, float32, float64, got int64"),
    "no-features": (V[..., :0], "v must have a head dimension of at least 1, got shape"),
}
BAD_ARGUMENTS = {
    "causal": ({"causal": "no"}, "causal must be True or False, got 'no'"),
    "accum": ({"accum_dtype": torch.bfloat16}, "accum_dtype must be None, float32 or float64, got"),
    "block": ({"block_m": 0}, "block_m must be a positive integer or None, got 0"),
    "warps": ({"num_warps": "4"}, "num_warps must be a positive integer or None, got '4'"),
    "stages": ({"num_stages": True}, "num_stages must be a positive integer or None, got True"),
    "mask-dtype": (
        {"attention_mask": torch.ones(2, 5, dtype=torch.complex64)},
        "attention_mask must be of bool or real numbers, got torch.complex64",
    ),
    "mask-type": ({"attention_mask": [1]}, "attention_mask must be a tensor, got list"),
    "mask-shape": (
        {"attention_mask": torch.ones(2, 3, 5)},
        r"attention_mask must have shape \(B, L\), .* with B = 2 and L = 5, got \(2, 3, 5\)",
    ),
    "weights-type": ({"weights": (1,)}, "weights must be EvoWeights or None, got tuple"),
    "weights-shape": (
        {"weights": IDENTITY._replace(b_g=torch.zeros(5))},
        r"weights.b_g must have shape \(D,\) = \(4,\), got \(5,\)",
    ),
    "weights-rank": (
        {"weights": IDENTITY._replace(w_q=torch.zeros(4))},
        r"weights.w_q must have 2 dimensions \(D, D\), got shape \(4,\)",
    ),
    "weights-dtype": (
        {"weights": IDENTITY._replace(w_f=torch.zeros(4, 4, dtype=torch.float64))},
        "weights.w_f must have the dtype of weights.w_q, torch.float32, got torch.float64",
    ),
    "weights-device": (
        {"weights": EvoWeights.identity(4, device="meta")},
        "weights.w_q must be on the device of v, cpu, got meta",
    ),
}


@pytest.mark.parametrize("v, message", BAD_VALUES.values(), ids=BAD_VALUES)
def test_values_that_do_not_fit(v, message):
    with pytest.raises(ValueError, match=message):
        evo_attention(v)


@pytest.mark.parametrize("arguments, message", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        evo_attention(V, **arguments)


def test_float64_values_need_float64_sums():
    with pytest.raises(ValueError, match="accum_dtype must be float64 for v in float64, got"):
        evo_attention(V.double(), accum_dtype=torch.float32)


@pytest.mark.parametrize("name", ["exclusive", "reverse"])
def test_a_switch_of_prefix_sum_that_is_none(name):
    with pytest.raises(ValueError, match=f"{name} must be True or False, got \\[1\\]"):
        prefix_sum(V, **{name: [1]})


@pytest.mark.parametrize("function", [evo_attention, prefix_sum])
def test_an_unknown_backend(function):
    with pytest.raises(BackendUnavailableError, match=r"backend must be one of .*got 'abacus'"):
        function(V, backend="abacus")


@pytest.mark.parametrize("function", [evo_attention, prefix_sum])
@pytest.mark.parametrize("variable", ["EVO_BACKEND", "ATTN_BACKEND"])
def test_the_environment_names_a_backend(variable, function, monkeypatch):
    monkeypatch.setenv(variable, "abacus")
    with pytest.raises(BackendUnavailableError, match="got 'abacus'"):
        function(V)
    function(V, backend="torch")


@pytest.mark.parametrize("value", ["", "auto", "AUTO", "torch"])
def test_evo_backend_as_evo_attn_writes_it(value, monkeypatch):
    monkeypatch.setenv("EVO_BACKEND", value)
    assert evo_attention(V).shape == V.shape


def test_attn_backend_wins_over_evo_backend(monkeypatch):
    monkeypatch.setenv("EVO_BACKEND", "abacus")
    monkeypatch.setenv("ATTN_BACKEND", "torch")
    assert evo_attention(V).shape == V.shape


@pytest.mark.parametrize(
    "variables, mode",
    [
        ({}, "off"),
        ({"EVO_AUTOTUNE": "0"}, "off"),
        ({"EVO_AUTOTUNE": "1"}, "on"),
        ({"EVO_AUTOTUNE": "force"}, "force"),
        ({"EVO_AUTOTUNE": "1", "ATTN_TUNE": "off"}, "off"),
    ],
    ids=str,
)
def test_evo_autotune(variables, mode, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.tune_mode() == mode


def test_evo_autotune_of_nonsense(monkeypatch):
    monkeypatch.setenv("EVO_AUTOTUNE", "maybe")
    with pytest.raises(ValueError, match=r"EVO_AUTOTUNE must be one of 0, 1, .*, got 'maybe'"):
        environment.tune_mode()


def test_available_backends():
    assert "torch" in get_available_backends()


def test_the_readme_runs():
    readme = Path(__file__).parents[1] / "README.md"
    code = "\n".join(re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL))
    assert "evo_attention" in code
    exec(compile(code, str(readme), "exec"), {})
