"""Sphinx directive ``benchmark-results``: the tables that the benchmark reporter has written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
NONE_YET = "No result is committed yet."


class BenchmarkResults(SphinxDirective):
    """Include every Markdown file below ``benchmarks/results``, or say that there is none."""

    def run(self) -> list[Any]:
        """Return the parsed pages."""
        lines = [
            line
            for page in sorted(RESULTS.rglob("*.md"))
            for line in _section(page, self.env.srcdir)
        ]
        self.content = StringList(lines or [NONE_YET], source=__file__)
        return self.parse_content_to_nodes(allow_section_headings=True)


def _section(page: Path, docs: Path) -> list[str]:
    """Markdown that includes a page, whose own headings begin at level 2, under one of level 3."""
    return [
        f"### {page.stem} on {page.parent.name}",
        "",
        f"```{{include}} {os.path.relpath(page, docs)}",
        ":heading-offset: 2",
        ":relative-images:",
        "```",
        "",
    ]


def setup(app: Any) -> dict[str, bool]:
    """Register the directive with Sphinx."""
    app.add_directive("benchmark-results", BenchmarkResults)
    return {"parallel_read_safe": True}
