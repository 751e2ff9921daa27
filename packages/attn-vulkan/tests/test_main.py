from __future__ import annotations

import json

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
