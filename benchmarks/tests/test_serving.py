"""The serving benchmark on a tiny model."""

from __future__ import annotations

import json

import pytest

from benchmarks import serving


def test_both_ways_generate_all_tokens(tmp_path, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    sizes = ["--requests", "3", "--prompt", "9", "--answer", "5", "--batch", "2"]
    assert serving.main(["--device", "cpu", "--size", "tiny", *sizes, "--out", str(tmp_path)]) == 0
    [path] = tmp_path.glob("cpu/serving-*.json")
    total = sum(request.count for request in serving.requests(3, 9, 5))
    points = json.loads(path.read_text())["points"]
    assert [points[name][-1][1] for name in ("paged", "padded")] == [total, total]
    assert path.with_suffix(".png").exists()
    assert "tokens/s" in capsys.readouterr().out
