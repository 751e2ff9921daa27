from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from attn_core import BackendUnavailableError, UnsupportedProblemError, backends
from attn_vulkan import _backend
from attn_vulkan._version import __version__

OPERATORS = ["attn_flash::attention", "attn_paged::attention"]


class Problem(NamedTuple):
    device: torch.device = torch.device("cpu")
    needs_grad: bool = False


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


def test_refusal_with_a_device(registered, use_loader, fake_device):
    use_loader(fake_device("Fake GPU"))
    reason = f"attn-vulkan {__version__} finds devices (Fake GPU) but has no kernels yet"
    (verdict,) = backends.explain(OPERATORS[0], Problem())
    assert verdict == backends.Verdict("vulkan", reason, chosen=False)


def test_refusal_of_a_broken_driver(use_loader):
    use_loader(create=-3)
    assert _backend.supports(OPERATORS[0], Problem()) == "vkCreateInstance failed with VkResult -3"


def test_a_compiled_graph_that_names_it_gets_the_reason(registered, no_loader):
    run = backends.implementation(OPERATORS[0], "vulkan")
    with pytest.raises(BackendUnavailableError, match="'vulkan' cannot run: no Vulkan loader"):
        run(torch.ones(1), 1.0)
