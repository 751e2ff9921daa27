"""Backends and problems for tests, kept apart from those of installed packages."""

import importlib
import importlib.util
from typing import NamedTuple

import pytest
import torch

from attn_core import backends, environment
from attn_core.family import MODULES


class Problem(NamedTuple):
    """As small as a problem can be."""

    device: torch.device = torch.device("cpu")
    needs_grad: bool = False
    size: int = 1


class Registry:
    """Registers backends of one operator."""

    op = "attn_core_tests::op"
    Problem = Problem

    def add(self, name, priority=0, reason=None, *, has_backward=True, function="math:sqrt"):
        ops = {self.op: function}
        if has_backward:
            ops[f"{self.op}_backward"] = function
        added = backends.Backend(name, ops, priority, lambda op, problem: reason)
        backends.register(added)
        return added


@pytest.fixture
def registry(monkeypatch):
    """An empty set of backends: no plug-ins, nothing in the environment."""
    for module in filter(importlib.util.find_spec, MODULES):
        importlib.import_module(module)  # packages register once, so it must not be within a test
    for variable in environment.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(backends, "_backends", {})
    monkeypatch.setattr(backends, "_examples", {})
    monkeypatch.setattr(backends, "_plugins_loaded", True)
    backends._resolve.cache_clear()
    backends.implementation.cache_clear()
    yield Registry()
    backends._resolve.cache_clear()
    backends.implementation.cache_clear()
