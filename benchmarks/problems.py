"""The cases to measure, read from shared/problems.toml."""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLE = Path(__file__).parents[1] / "shared" / "problems.toml"
GROUPS = ("gpu", "cpu", "test")
_OWN = ("id", "series", "headline", "eager")


@dataclass(frozen=True)
class Case:
    """One row of the table: ``case["D"]`` is a size, the attributes are what every row has."""

    id: str
    package: str
    dtype: torch.dtype
    passes: tuple[str, ...]
    source: str
    sizes: Mapping[str, Any]
    series: str = ""
    headline: bool = False
    eager: bool = False  # the host is to be slower than the kernels, and to count

    def __getitem__(self, name: str) -> Any:
        return self.sizes[name]

    @property
    def seed(self) -> int:
        """The same for the same row in every run."""
        return zlib.crc32(f"{self.package}/{self.id}".encode())


def load(package: str, group: str, table: Path = TABLE) -> list[Case]:
    """Return the rows of one package: those for a GPU, for a CPU, or for tests."""
    if group not in GROUPS:
        raise ValueError(f"group must be one of {GROUPS}, got {group!r}")
    data = tomllib.loads(table.read_text(encoding="utf-8"))
    if package not in data:
        raise ValueError(f"package must have a section in {table.name}, got {package!r}")
    section = data[package]
    return [
        _case(package, {**section["defaults"], **row}, data["sources"]) for row in section[group]
    ]


def select(cases: Sequence[Case], pattern: str = "", headline: bool = False) -> list[Case]:
    """Keep the cases whose id matches, and put the headline ones first."""
    chosen = [case for case in cases if re.search(pattern, case.id)]
    if headline:
        chosen = [case for case in chosen if case.headline]
    return sorted(chosen, key=lambda case: not case.headline)


def _case(package: str, row: dict[str, Any], sources: Mapping[str, str]) -> Case:
    own = {name: row.pop(name) for name in _OWN if name in row}
    dtype = getattr(torch, row.pop("dtype"))
    passes = tuple(row.pop("passes"))
    source = sources[row.pop("source")]
    row.setdefault("H_KV", row["H"])
    if "M" in row:
        row.setdefault("N", row["M"])
    return Case(package=package, dtype=dtype, passes=passes, source=source, sizes=row, **own)
