"""The operators of the other packages on whatever device there is; lavapipe will do."""

from __future__ import annotations

import pytest

from attn_core.testing.conformance import Suite, installed_cases
from attn_vulkan import _backend

pytestmark = [pytest.mark.vulkan, pytest.mark.usefixtures("real_device")]

# A device made of the CPU takes seconds for each pass; the rest runs with --device=vulkan.
QUICK = ("full-b1-h2-kv1", "causal-b1-h4-kv1", "odd-head-dim", "no-keys", "mixed", "everything")


def _cases(quick):
    cases = [case for case in installed_cases() if case.op in _backend.OPERATORS]
    return [case for case in cases if case.id.startswith(QUICK) == quick]


class TestConformance(Suite):
    cases = _cases(quick=True)
    backends = ("vulkan",)


@pytest.mark.gpu
class TestTheRest(Suite):
    cases = _cases(quick=False)
    backends = ("vulkan",)
