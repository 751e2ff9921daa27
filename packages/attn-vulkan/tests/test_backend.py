from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from attn_core import BackendUnavailableError, UnsupportedProblemError, backends
from attn_vulkan import _backend

OPERATORS = ["attn_flash::attention", "attn_paged::attention"]


class Problem(NamedTuple):
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    needs_grad: bool = False
    tricks: bool = False


# What attn-flash passes beside q, k and v.
PLAIN = {
    **dict.fromkeys(("alibi_slopes", "attn_bias", "key_mask", "sinks", "block_table")),
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "seqused_k")),
    "lengths": lambda q, k: (q.shape[1], k.shape[1]),
    "window": (-1, -1),
    "softcap": 0.0,
    "scale": 1.0,
}


@pytest.fixture
def registered(monkeypatch) -> Iterator[None]:
    """Known to attn-core as through the entry point, and to it alone."""
    monkeypatch.setattr(backends, "_backends", {})
    monkeypatch.setattr(backends, "_plugins_loaded", True)
    for backend in _backend.backends():
        backends.register(backend)
    yield
    backends._resolve.cache_clear()
    backends.implementation.cache_clear()


def test_the_backend_names_its_operators():
    (backend,) = _backend.backends()
    assert backend.name == "vulkan"
    assert set(OPERATORS) <= set(backend.ops)


def test_implementations_exist():
    (backend,) = _backend.backends()
    for target in backend.ops.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_torch_goes_first():
    assert _backend.backends()[0].priority < 0


@pytest.mark.parametrize(
    "op,needs_grad",
    [
        ("attn_flash::attention", False),
        ("attn_flash::attention", True),
        ("attn_paged::attention", False),
    ],
)
def test_refusal_without_a_loader(registered, no_loader, op, needs_grad):
    with pytest.raises(UnsupportedProblemError, match="vulkan: no Vulkan loader found"):
        backends.resolve(op, Problem(needs_grad=needs_grad), "vulkan")


def test_refusal_without_a_device(registered, use_loader, fake_device):
    use_loader()
    with pytest.raises(UnsupportedProblemError, match="vulkan: no Vulkan device"):
        backends.resolve(OPERATORS[0], Problem(), "vulkan")


@pytest.mark.parametrize(
    "problem,reason",
    [
        (Problem(dtype=torch.float64), "it computes in float32, float16, bfloat16, not float64"),
        (
            Problem(device=torch.device("meta")),
            "it takes tensors on the CPU or on a CUDA device, not on meta",
        ),
        (Problem(head_dim=257), "head dimensions must be 256 at most, got 257"),
        (Problem(tricks=True), "it does not support tricks = True"),
        (Problem(), "Fake GPU lacks pointers to buffers (bufferDeviceAddress)"),
    ],
    ids=["dtype", "device", "head-dim", "unknown-feature", "old-gpu"],
)
def test_refusals_of_problems(registered, use_loader, fake_device, problem, reason):
    use_loader(fake_device("Fake GPU"))
    (verdict,) = backends.explain(OPERATORS[0], problem)
    assert verdict == backends.Verdict("vulkan", reason, chosen=False)


def test_refusal_of_a_broken_driver(use_loader):
    use_loader(create=-3)
    reason = "vkCreateInstance failed: VK_ERROR_INITIALIZATION_FAILED (-3)"
    assert _backend.supports(OPERATORS[0], Problem()) == reason


def test_a_compiled_graph_that_names_it_gets_the_reason(registered, no_loader):
    run = backends.implementation(OPERATORS[0], "vulkan")
    q = torch.ones(1, 2, 1, 8)
    with pytest.raises(BackendUnavailableError, match="no Vulkan loader found"):
        run(q, q, q, SimpleNamespace(**PLAIN))
