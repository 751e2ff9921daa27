from __future__ import annotations

from attn_core.testing.conformance import Suite
from attn_flash.kvcache_conformance import CASES


class TestConformance(Suite):
    cases = CASES
