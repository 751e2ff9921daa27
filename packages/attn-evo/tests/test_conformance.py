from __future__ import annotations

from attn_core.testing.conformance import Suite
from attn_evo.conformance import CASES


class TestConformance(Suite):
    cases = CASES
