"""Which problems backend hopper takes, and what it says of the others."""

from __future__ import annotations

import pytest
import torch

import attn_core.device
from attn_core import backends
from attn_triangle import _backends, ops


def reason(version, monkeypatch, **changes):
    """What the backend says of a typical problem on an H100, with that version of Triton."""
    info = attn_core.device.DeviceInfo("cuda", "H100", "sm_90", 132)
    for module in (attn_core.device, _backends):
        monkeypatch.setattr(module, "device_info", lambda device: info)
        monkeypatch.setattr(module, "triton_version", lambda: version)
    problem = backends.operators()[ops.ATTENTION](torch.device("cuda"))
    return _backends._hopper_supports(ops.ATTENTION, problem._replace(**changes))


def test_it_takes_a_typical_problem(monkeypatch):
    assert reason((3, 6), monkeypatch) is None


@pytest.mark.parametrize(
    "version, message",
    [
        (None, "triton is not installed; the extra [triton] of the package brings it"),
        ((3, 5), "its kernels are written for Gluon of triton 3.6, 3.7, 3.8, 3.9, got 3.5"),
    ],
    ids=["none", "3.5"],
)
def test_another_triton_is_named(version, message, monkeypatch):
    assert reason(version, monkeypatch) == message


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": torch.float32}, "it computes in float16 and bfloat16"),
        ({"head_dim": 72}, "it takes head dimensions to 64 in steps of 8, got 72"),
        ({"head_dim": 20}, "it takes head dimensions to 64 in steps of 8, got 20"),
        ({"len_k": 127}, "it gains nothing below 128 keys, got 127"),
        ({"scale": 1e-4}, "scale must be at least 0.001, got 0.0001"),
    ],
    ids=["dtype", "wide", "odd", "short", "scale"],
)
def test_what_it_does_not_take_has_a_reason(change, message, monkeypatch):
    assert reason((3, 6), monkeypatch, **change) == message
