"""The packages of this checkout, for machines where they are not installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

PACKAGES = Path(__file__).parents[1] / "packages"


def use() -> None:
    """Make every package importable; those that are installed stay as they are."""
    for source in sorted(PACKAGES.glob("*/src")):
        module = source.parent.name.replace("-", "_")
        if importlib.util.find_spec(module) is None:
            sys.path.append(str(source))
