"""``python -m attn_core``, as tables and as JSON."""

import json
import subprocess
import sys

import pytest

import attn_core
from attn_core import __main__ as program
from attn_core import backends


@pytest.fixture
def family(registry, monkeypatch):
    """One operator with three backends, and a package that does not import."""
    registry.add("fast", 10, reason="it needs extra[fast]: none here")
    registry.add("plain", 5)
    registry.add("slow", 0)
    backends.register_example(registry.op, registry.Problem)
    monkeypatch.setattr(program, "MODULES", ("attn_core", "broken_module", "absent_module"))
    monkeypatch.setattr(program.importlib.util, "find_spec", lambda name: "absent" not in name)
    return registry


def printed(capsys, *arguments):
    program.main(arguments)
    return capsys.readouterr().out


def test_json(family, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path))
    found = json.loads(printed(capsys, "--json"))
    assert found["packages"][:2] == [
        {"name": "attn-core", "version": attn_core.__version__, "error": None},
        {
            "name": "broken-module",
            "version": None,
            "error": "ModuleNotFoundError: No module named 'broken_module'",
        },
    ]
    assert found["environment"] == {
        "ATTN_BACKEND": None,
        "ATTN_TUNE": None,
        "ATTN_CACHE_DIR": str(tmp_path),
        "ATTN_CHECK_VALUES": None,
    }
    assert found["tile_cache"] == str(tmp_path)
    assert found["devices"][0]["device"] == "cpu"
    assert set(found["backends"]) == {"fast", "plain", "slow"}
    choice = found["operators"][0]
    assert (choice["operator"], choice["device"]) == (family.op, "cpu")
    assert choice["backend"] == "plain"
    assert choice["verdicts"] == [
        {"backend": "fast", "chosen": False, "reason": "it needs extra[fast]: none here"},
        {"backend": "plain", "chosen": True, "reason": None},
        {"backend": "slow", "chosen": False, "reason": None},
    ]


def test_tables(family, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = printed(capsys)
    assert "broken: ModuleNotFoundError: No module named 'broken_module'" in text
    assert "cannot: it needs extra[fast]: none here" in text
    assert "could, but plain goes before it" in text
    assert family.op in text
    assert "ATTN_TUNE" in text


def test_environment_decides(family, capsys, monkeypatch):
    monkeypatch.setenv("ATTN_BACKEND", "slow")
    assert json.loads(printed(capsys, "--json"))["operators"][0]["backend"] == "slow"
    monkeypatch.setenv("ATTN_BACKEND", "fast")
    monkeypatch.setenv("COLUMNS", "200")
    assert "could, but ATTN_BACKEND goes before it" in printed(capsys)


def test_runs_as_a_program():
    command = [sys.executable, "-m", "attn_core", "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
