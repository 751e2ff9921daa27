from __future__ import annotations

import json

import pytest

from attn_vulkan import selftest
from attn_vulkan.__main__ import main


def test_table(use_loader, fake_device, capsys):
    use_loader(fake_device("GPU A"), fake_device("GPU B", type=4))
    assert main([]) == 0
    text = capsys.readouterr().out
    for word in ("GPU A", "GPU B", "discrete", "cpu", "1.3.230", "8.0 GiB"):
        assert word in text


def test_json(use_loader, fake_device, capsys):
    use_loader(fake_device("GPU A"))
    assert main(["--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["reason"] is None
    assert answer["devices"][0]["name"] == "GPU A"
    assert answer["devices"][0]["features"]["float16"] is False


def test_no_loader(no_loader, capsys):
    assert main([]) == 1
    assert "Vulkan cannot be used: no Vulkan loader found" in capsys.readouterr().out


def test_no_device_as_json(use_loader, capsys):
    use_loader()
    assert main(["--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["devices"] == []
    assert answer["reason"].startswith("no Vulkan device")


def test_a_device_that_cannot_be_used(use_loader, fake_device, capsys):
    use_loader(fake_device("Old GPU"))
    assert main(["--self-test", "--benchmark"]) == 0
    reason = "0: cannot be used: Old GPU lacks pointers to buffers"
    assert capsys.readouterr().out.count(reason) == 2


@pytest.mark.vulkan
@pytest.mark.usefixtures("real_device")
def test_a_self_test_that_fails(monkeypatch, capsys):
    monkeypatch.setenv("ATTN_VULKAN_VARIANT", "warp")
    assert main(["--self-test", "--json"]) == 1
    (line,) = json.loads(capsys.readouterr().out)["devices"][0]["self_test"]
    assert line.startswith("failed: ATTN_VULKAN_VARIANT must be one of ")


@pytest.mark.vulkan
@pytest.mark.usefixtures("real_device")
def test_self_test_and_benchmark(monkeypatch, capsys):
    monkeypatch.setattr(selftest, "_TIMED_LENGTH", {})
    monkeypatch.setattr(selftest, "_LONG", 16)
    monkeypatch.setattr(selftest, "_TIMED_DIMS", (64,))
    assert main(["--self-test", "--benchmark"]) == 0
    text = capsys.readouterr().out
    assert "0: float32, causal=True: ok, largest error" in text
    assert "0: submit and wait:" in text
    for name in ("forward", "backward"):
        assert f"0: {name} float32 n 16 d 64 scalar:" in text
