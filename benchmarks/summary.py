"""The newest result of each package in one table: ``python -m benchmarks.summary README.md``.

Brings what a Markdown file has between ``<!-- benchmarks -->`` and ``<!-- /benchmarks -->`` up to
date: a line for each package and pass, with how our fastest backend stands beside the best peer.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import report, results
from benchmarks.results import Result, Row

MACHINE = results.ROOT / "nvidia-h200"
_SECTION = "benchmarks"
_KERNELS = ("forward", "backward", "graph")  # without those that time the host
_HEAD = ("package", "pass", "cases", "mean", "least", "most", "best peer among")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary", description=__doc__)
    parser.add_argument("page", type=Path)
    page = parser.parse_args(arguments).page
    text = updated(page.read_text(encoding="utf-8"), MACHINE, page.parent)
    page.write_text(text, encoding="utf-8")
    return 0


def updated(text: str, machine: Path, folder: Path) -> str:
    """Return a page of `folder` with the table of today; ValueError without the markers."""
    return report.fill(text, _SECTION, table(newest(machine), folder))


def newest(machine: Path) -> list[Path]:
    """Return the last result of each package that was measured on a machine."""
    last: dict[str, Path] = {}
    for path in sorted(machine.glob("attn-*.json"), key=_age):
        last[results.read(path).package] = path
    return [last[package] for package in sorted(last)]


def table(paths: Iterable[Path], folder: Path) -> str:
    """Return a Markdown table whose lines link to the pages of results."""
    lines = [_HEAD, ("---", "---", *(["---:"] * 4), "---")]
    for path in paths:
        result = results.read(path)
        link = f"[{result.package}]({report.relative(path.with_suffix('.md'), folder)})"
        lines += [(link, *cells) for cells in _passes(result)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _age(path: Path) -> tuple[str, int]:
    result = results.read(path)
    return result.date, len(path.stem)  # the second of a day has a longer name


def _passes(result: Result) -> Iterable[tuple[str, ...]]:
    """Return the cells of each pass in which some peer ran."""
    for pass_ in _KERNELS:
        rows = [row for row in result.rows if row.pass_ == pass_]
        ratios = [ratio for case in _cases(rows) if (ratio := _clean_ratio(case))]
        if not ratios:
            continue
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        peers = dict.fromkeys(row.provider for row in rows if row.kind == "peer" and row.ms)
        numbers = (f"{number:.2f}" for number in (mean, min(ratios), max(ratios)))
        yield (pass_, str(len(ratios)), *numbers, ", ".join(peers))


def _cases(rows: Sequence[Row]) -> list[list[Row]]:
    names = dict.fromkeys(row.case for row in rows)
    return [[row for row in rows if row.case == name] for name in names]


def _clean_ratio(rows: Sequence[Row]) -> float | None:
    """Return the ratio of a case; None where the repeats of some provider differ much."""
    return None if any(map(report.is_rough, rows)) else report.our_ratio(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
