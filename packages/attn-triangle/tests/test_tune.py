"""The tuner's command line and what it leaves on disk; measuring itself is replaced."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from attn_core import tuning
from attn_core.tuning import TileConfig
from attn_triangle import tune

pytest.importorskip("triton")

from attn_triangle._triton import configs

BEST = TileConfig(64, 128, 4, 3)


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Calls of the operator, which measure nothing but prefer one row; an empty cache."""
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("ATTN_TUNE", raising=False)
    made = []

    def attend(q, k, v, bias, mask, *, backend):
        made.append(tuple(q.shape))
        for table in configs.TABLES:
            tuning.pick(table, q.device, configs.key_of(q, k), lambda config: float(config != BEST))
        return q * k * v * bias[..., None]

    monkeypatch.setattr(tune, "triangle_attention", attend)
    monkeypatch.setattr(tune, "triton_refusal", lambda device: None)
    tuning.forget()
    yield made
    tuning.forget()


def run(*arguments):
    return tune.main(["--device", "cpu", *arguments])


def test_every_problem_is_measured_and_kept(calls, capsys):
    assert run("--min-n", "50", "--max-n", "65", "--d", "8,32", "--h", "2") == 0
    gradients = 2  # of queries, keys and values, and of the bias
    assert calls == [(1, 2, n, n, d) for d in (8, 32) for n in (64, 128) for _ in range(gradients)]
    printed = capsys.readouterr().out
    assert "n64-h2-d32-bfloat16" in printed
    assert "64 x 128" in printed
    for table in configs.TABLES:
        rows = tuning.measured(table, torch.device("cpu"))
        assert rows == {(d, 2, length): BEST for d in (16, 32) for length in (64, 128)}
    tuning.forget()
    assert tuning.pick(configs.FORWARD, torch.device("cpu"), (32, 2, 64)) == BEST


def test_measured_problems_are_skipped_unless_forced(calls):
    for arguments, expected in ((), 2), ((), 2), (("--force",), 4):
        run("--min-n", "64", "--max-n", "64", *arguments)
        assert len(calls) == expected


def test_all_dtypes(calls):
    run("--min-n", "16", "--max-n", "16", "--h", "1", "--dtype", "all")
    assert len(calls) == 4  # float16 and bfloat16 share their rows
    run("--min-n", "16", "--max-n", "16", "--h", "1", "--dtype", "all", "--force")
    assert len(calls) == 10


def test_nothing_to_tune_without_a_gpu(capsys):
    assert tune.main(["--device", "cpu"]) == 1
    assert "NVIDIA and AMD GPUs" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_build_of_torch_without_gpus_is_no_crash(capsys):
    assert tune.main([]) == 1
    assert capsys.readouterr().err == "there is nothing to tune: torch finds no NVIDIA or AMD GPU\n"


def test_an_unknown_device_is_named(capsys):
    with pytest.raises(SystemExit):
        tune.main(["--device", "h200"])
    assert "argument --device: must be cuda or cuda:N, got 'h200'" in capsys.readouterr().err


def test_runs_as_a_module():
    ran = subprocess.run(
        [sys.executable, "-m", "attn_triangle.tune", "--dtype", "int8"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    assert "must be of bfloat16, float16, float32 or all, got ['int8']" in ran.stderr


def test_buckets():
    assert [configs.bucket(n) for n in (1, 64, 65, 512, 513, 5000)] == [
        64, 64, 128, 512, 1024, 1024,
    ]  # fmt: skip
