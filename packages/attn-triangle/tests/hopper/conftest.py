"""What the tests of the Hopper kernels have in common."""

import pytest

from attn_triangle._hopper import configs


@pytest.fixture(autouse=True)
def _no_problem_is_small(monkeypatch):
    """Keep the Hopper kernels at problems that they would leave to those for any GPU."""
    monkeypatch.setattr(configs, "FEW_SCORES", 0)
