"""Compare two results row by row: ``python -m benchmarks.compare OLD.json NEW.json``.

The ratio is the old time over the new one: above 1 the new result is faster.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.results import Result, Row

Key = tuple[str, str, str]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    print("\n".join(compare(results.read(options.old), results.read(options.new))))
    return 0


def compare(old: Result, new: Result) -> list[str]:
    """Return a line for each row that either result has, and the geometric means."""
    before, after = _rows(old), _rows(new)
    lines = []
    ratios: dict[str, list[float]] = {}
    for key in before | after:
        line, ratio = _compare_rows(before.get(key), after.get(key))
        lines.append(f"{'  '.join(key):60s} {line}")
        if ratio is not None:
            ratios.setdefault(key[2], []).append(ratio)
    for provider, values in ratios.items():
        mean = math.exp(sum(map(math.log, values)) / len(values))
        lines.append(f"{provider}: geometric mean {mean:.3f} of {len(values)} rows")
    return lines


def _rows(result: Result) -> dict[Key, Row]:
    return {(row.case, row.pass_, row.provider): row for row in result.rows}


def _compare_rows(old: Row | None, new: Row | None) -> tuple[str, float | None]:
    if old is None or new is None:
        return ("only in the new result" if old is None else "only in the old result"), None
    if old.ms is None or new.ms is None:
        return f"{old.status} -> {new.status}", None
    ratio = old.ms / new.ms
    return f"{old.ms:10.4f} ms -> {new.ms:10.4f} ms   {ratio:.3f}x", ratio


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
