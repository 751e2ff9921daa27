"""What importing costs, and what it leaves alone."""

import subprocess
import sys

import pytest

LAZY = ("triton", "rich", "platformdirs", "pytest", "hypothesis", "numpydoc")


def imported(statement, *names):
    """Which of the modules are loaded after a statement that loads torch first."""
    code = (
        "import sys, torch; before = set(sys.modules); "
        f"{statement}; print([n for n in {names!r} if n in sys.modules and n not in before])"
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    "modules",
    [
        "attn_core, attn_core.tuning, attn_core.library, attn_core.merge, attn_core.dropout",
        "attn_core.testing, attn_core.testing.conformance, attn_core.testing.compilation",
    ],
    ids=["what operator packages use", "testing"],
)
def test_import_loads_no_optional_library(modules):
    assert imported(f"import {modules}", *LAZY) == "[]"


def test_import_writes_nothing_and_ignores_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_TUNE", "nonsense")
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path / "cache"))
    imported("import attn_core, attn_core.tuning")
    assert not (tmp_path / "cache").exists()


def test_names_are_listed_before_they_are_imported():
    code = (
        "import sys, attn_core; "
        "print({*attn_core.__all__} <= {*dir(attn_core)}, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert printed.split() == ["True", "False"]
