"""The quick start for backend authors does what it says."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from attn_core import UnsupportedProblemError, backends, environment

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_quick_start_makes_a_backend(registry):
    backend_code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    written = {}
    exec(backend_code, written)
    for backend in written["backends"]():
        backends.register(backend)
    (op,) = backends.registered()["abacus"]

    def resolve(**facts):
        facts = {"device": torch.device("cpu"), "head_dim": 64, "needs_grad": False, **facts}
        return backends._resolve.__wrapped__(op, SimpleNamespace(**facts), "abacus")

    assert resolve() == "abacus"
    for facts, reason in (
        ({"head_dim": 128}, "it takes head dimensions up to 64, got 128"),
        ({"device": torch.device("meta")}, "the tensors are on meta"),
        ({"needs_grad": True}, "it has no backward pass"),
    ):
        with pytest.raises(UnsupportedProblemError, match=reason):
            resolve(**facts)


def test_every_environment_variable_is_told():
    assert set(re.findall(r"^\| `(ATTN_\w+)`", README, re.MULTILINE)) == set(environment.VARIABLES)
