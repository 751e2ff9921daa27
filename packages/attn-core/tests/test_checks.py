"""The text of errors: the argument, what is allowed, what it got."""

import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attn_core import checks
from attn_core.errors import BackendUnavailableError, UnsupportedProblemError

x = torch.empty(2, 3)


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its interface a prototype
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


@pytest.mark.parametrize(
    "check, message",
    [
        (lambda: checks.require_tensor("q", 3), "q must be a tensor, got int"),
        (
            lambda: checks.require_tensor("q", x.to_sparse()),
            "q must be a strided tensor, got layout torch.sparse_coo",
        ),
        (
            lambda: checks.require_tensor("q", nested()),
            "q must be a strided tensor, got a nested one",
        ),
        (
            lambda: checks.require_rank("q", x, "(B, M, D)"),
            "q must have 3 dimensions (B, M, D), got shape (2, 3)",
        ),
        (
            lambda: checks.require_shape("q", x, "(B, M)", (2, 4)),
            "q must have shape (B, M) = (2, 4), got (2, 3)",
        ),
        (
            lambda: checks.require_dtype("q", x, (torch.float16, torch.bfloat16)),
            "q must have dtype float16, bfloat16, got float32",
        ),
        (
            lambda: checks.require_like("k", x.half(), "q", x),
            "k must have the dtype of q, torch.float32, got torch.float16",
        ),
        (
            lambda: checks.require_like("k", x.to("meta"), "q", x),
            "k must be on the device of q, cpu, got meta",
        ),
        (
            lambda: checks.require_device("k", x.to("meta"), "q", x),
            "k must be on the device of q, cpu, got meta",
        ),
        (
            lambda: checks.require_multiple("heads", 5, "heads_kv", 2),
            "heads must be a multiple of heads_kv, got heads = 5 and heads_kv = 2",
        ),
        (
            lambda: checks.require_multiple("heads", 5, "heads_kv", 0),
            "heads must be a multiple of heads_kv, got heads = 5 and heads_kv = 0",
        ),
        (
            lambda: checks.require_range("head_dim", 257, 1, 256),
            "head_dim must be between 1 and 256, got 257",
        ),
        (
            lambda: checks.require_writable("k_cache", x[:1].expand(2, 3)),
            "k_cache must not be broadcast, it is written to, got strides (0, 1)",
        ),
        (
            lambda: checks.require_writable("k_cache", torch.empty(2).cfloat().conj().imag),
            "k_cache must not be the negative of other memory, it is written to",
        ),
        (
            lambda: checks.require_positive("heads", 1.5),
            "heads must be a positive integer, got 1.5",
        ),
        (lambda: checks.require_positive("heads", 0), "heads must be a positive integer, got 0"),
        (lambda: checks.flag("causal", "no"), "causal must be True or False, got 'no'"),
        (lambda: checks.flag("causal", 2), "causal must be True or False, got 2"),
        (lambda: checks.flag("causal", [1]), "causal must be True or False, got [1]"),
    ],
)
def test_message(check, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check()


def test_what_is_allowed_passes():
    checks.require_tensor("q", x)
    checks.require_rank("q", x, "(B, M)")
    checks.require_rank("q", torch.empty(3), "(M,)")
    checks.require_shape("q", x, "(B, M)", x.shape)
    checks.require_dtype("q", x, (torch.float32,))
    checks.require_like("k", x + 1, "q", x)
    checks.require_multiple("heads", 6, "heads_kv", 3)
    checks.require_range("head_dim", 256, 1, 256)
    checks.require_positive("heads", 1)
    checks.require_writable("x", x[:1].expand(1, 3))


@pytest.mark.parametrize("value", [0, -1.5, True, 2**70 + 1, np.float32(2), np.int64(3)])
def test_finite_numbers(value):
    assert checks.is_finite(value)


@pytest.mark.parametrize(
    "value",
    [None, "1", np.nan, np.inf, np.float32(-np.inf), 1j, [1], np.ones(1), torch.tensor(1.0)],
    ids=repr,
)
def test_what_is_no_finite_number(value):
    assert not checks.is_finite(value)


def test_an_integer_that_no_float_holds_is_not_finite():
    assert not checks.is_finite(10**400)


@pytest.mark.parametrize("value", [True, 1, np.bool_(True)], ids=repr)
def test_flags(value):
    assert checks.flag("causal", value) is True


def test_errors_are_caught_as_their_builtin_kin():
    assert issubclass(UnsupportedProblemError, ValueError)
    assert issubclass(BackendUnavailableError, RuntimeError)


@pytest.mark.parametrize(
    "device, wish, expected",
    [("cpu", "0", True), ("cuda", "0", False), ("cuda", "1", True), ("meta", "1", False)],
)
def test_values_on_a_gpu_are_read_where_the_user_asks(device, wish, expected, monkeypatch):
    monkeypatch.setenv("ATTN_CHECK_VALUES", wish)
    tensor = SimpleNamespace(device=torch.device(device))
    assert checks.may_read_values(tensor) is expected


def test_fake_tensors_have_no_values():
    with FakeTensorMode():
        assert not checks.may_read_values(torch.empty(2))
