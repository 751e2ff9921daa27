"""What backend "hopper" takes, and the reasons it gives for what it does not."""

from __future__ import annotations

import pytest
import torch

from attn_core import backends
from attn_core.device import DeviceInfo
from attn_flash._hopper import support
from attn_flash.checks import AttentionProblem
from attn_flash.ops import ATTENTION

H200 = DeviceInfo("cuda", "NVIDIA H200", "sm_90", 132, 140 << 30)
PROBLEM = AttentionProblem(
    device=torch.device("cuda", 0),
    dtype=torch.bfloat16,
    batch=2,
    len_q=1024,
    len_k=1024,
    heads=16,
    heads_kv=16,
    head_dim=64,
    head_dim_v=64,
    window=(-1, 0),
    features=frozenset(),
    needs_grad=True,
)


@pytest.fixture
def on_an_h200(monkeypatch):
    monkeypatch.setattr(support, "device_info", lambda device: H200)
    monkeypatch.setattr(support, "triton_version", lambda: (3, 6))


@pytest.mark.parametrize("head_dim", [8, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_takes(dtype, head_dim, on_an_h200):
    problem = PROBLEM._replace(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim)
    assert support.refusal(problem) is None


def test_takes_ragged_sequences(on_an_h200):
    features = frozenset({"cu_seqlens_q", "seqused_k"})
    assert support.refusal(PROBLEM._replace(features=features)) is None


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"dtype": torch.float32}, "float16 and bfloat16, not float32"),
        ({"head_dim": 63, "head_dim_v": 63}, "multiple of 8, got 63"),
        ({"head_dim_v": 128}, "must be equal, got 64 and 128"),
        ({"features": frozenset({"softcap", "alibi_slopes"})}, "alibi_slopes, softcap"),
        ({"features": frozenset({"cu_seqlens_q", "block_table"})}, "not take block_table"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses(change, reason, on_an_h200):
    assert reason in support.refusal(PROBLEM._replace(**change))


@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "gfx942"])
def test_refuses_other_devices(arch, on_an_h200, monkeypatch):
    monkeypatch.setattr(support, "device_info", lambda device: DeviceInfo("cuda", "other", arch))
    assert f"not on {arch}" in support.refusal(PROBLEM)


@pytest.mark.parametrize("version", [(3, 2), (3, 5), (3, 10)], ids=str)
def test_refuses_versions_whose_gluon_differs(version, on_an_h200, monkeypatch):
    monkeypatch.setattr(support, "triton_version", lambda: version)
    assert f"triton 3.6, 3.7, 3.8, 3.9, got 3.{version[1]}" in support.refusal(PROBLEM)


def test_refuses_without_triton(on_an_h200, monkeypatch):
    monkeypatch.setattr(support, "triton_version", lambda: None)
    assert "triton is not installed" in support.refusal(PROBLEM)


def test_explain_says_why():
    problem = PROBLEM._replace(device=torch.device("cpu"))
    reasons = {verdict.backend: verdict.reason for verdict in backends.explain(ATTENTION, problem)}
    assert reasons["hopper"] == "it runs on NVIDIA Hopper GPUs (sm_90), not on cpu"
