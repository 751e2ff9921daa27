"""The packages of this repository and what depends on what, for the scripts beside this file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def names() -> list[str]:
    """Every package, by name."""
    return sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))


def pyproject(package: str) -> dict[str, Any]:
    """Read a package's pyproject.toml."""
    return tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text())


def dependents(package: str) -> set[str]:
    """Packages that depend on `package`, itself among them."""
    direct = {name for name in names() if package in _dependencies(name)}
    return {package}.union(*(dependents(name) for name in direct))


def changed_files(revisions: str) -> list[str]:
    """Files that differ in a range of revisions, such as ``main...HEAD``."""
    return git("diff", "--name-only", revisions).splitlines()


def git(*args: str) -> str:
    """Output of a git command."""
    done = subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _dependencies(package: str) -> list[str]:
    lines = pyproject(package)["project"]["dependencies"]
    return [re.split(r"[^\w-]", line)[0] for line in lines]
