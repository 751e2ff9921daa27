from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks import results, summary
from benchmarks.results import Result, Row

README = Path(__file__).parents[2] / "README.md"


def row(case, provider, ms, *, ratio=None, spread=0.1, pass_="forward"):
    kind = "ours" if provider == "ours" else "peer"
    found = Row(case, pass_, provider, kind, {}, "bfloat16", "", False, "", results.OK)
    return dataclasses.replace(found, ms=ms, spread=spread, ratio_to_best_peer=ratio)


def write(folder, package, date, *rows, number=""):
    path = folder / f"{package}-{date}{number}.json"
    results.write(Result(package, "M", {}, {}, {}, rows=list(rows), date=date), path)
    return path


def test_a_line_for_each_pass(tmp_path):
    path = write(
        tmp_path,
        "attn-flash",
        "2026-01-01",
        *(row("a", "ours", 1.0, ratio=2.0), row("a", "peer", 2.0, ratio=1.0)),
        *(row("b", "ours", 4.0, ratio=0.5), row("b", "peer", 2.0, ratio=1.0)),
        *(row("rough", "ours", 1.0, ratio=9.0), row("rough", "peer", 9.0, spread=0.5)),
        row("alone", "ours", 1.0),
        row("tiny", "ours", 1.0, ratio=2.0, pass_="host"),
    )
    [_, _, line] = summary.table([path], tmp_path).splitlines()
    expected = (
        "| [attn-flash](attn-flash-2026-01-01.md) | forward | 2 | 1.00 | 0.50 | 2.00 | peer |"
    )
    assert line == expected


def test_the_newest_result_of_each_package(tmp_path):
    write(tmp_path, "attn-flash", "2026-01-01")
    write(tmp_path, "attn-flash", "2026-01-02")
    second = write(tmp_path, "attn-flash", "2026-01-02", number="-2")
    paged = write(tmp_path, "attn-paged", "2025-12-31")
    assert summary.newest(tmp_path) == [second, paged]


def test_the_readme_has_the_table_of_the_newest_results():
    """``python -m benchmarks.summary README.md`` brings it up to date."""
    text = README.read_text(encoding="utf-8")
    assert summary.updated(text, summary.MACHINE, README.parent) == text


def test_a_page_without_the_section_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must have a section <!-- benchmarks -->"):
        summary.updated("text", tmp_path, tmp_path)
