"""What a run shows while it lasts: a bar where rich is installed and watched, else plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.results import MISSING, OK, Row


class Progress:
    """Counts cases and prints a line for each pass of each."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._start = time.monotonic()
        self._bar = _rich_bar(total)

    def start(self) -> None:
        """Show the bar."""
        if self._bar is not None:
            self._bar.start()

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print one line."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
            return
        print(f"[{time.monotonic() - self._start:6.1f} s] {text}", flush=True)

    def advance(self, rows: Sequence[Row]) -> None:
        """Print what one case gave and count it."""
        self._done += 1
        for line in lines(rows):
            self.say(f"{self._done}/{self._total} {line}")
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0])


def lines(rows: Sequence[Row]) -> list[str]:
    """Return one line for each pass: who took how long, and who did not run though it is here."""
    rows = [row for row in rows if row.status != MISSING]
    passes = dict.fromkeys(row.pass_ for row in rows)
    return [
        f"{rows[0].case} {pass_}: " + ", ".join(_cell(row) for row in rows if row.pass_ == pass_)
        for pass_ in passes
    ]


def _cell(row: Row) -> str:
    if row.status != OK or row.ms is None:
        return f"{row.provider} {row.status}"
    time_ = f"{row.ms:.3f} ms" if row.ms >= 0.1 else f"{row.ms * 1e3:.1f} us"
    rate = f" {row.tflop_s:.3g} TFLOP/s" if row.tflop_s else ""
    ratio = ""
    if row.kind == "ours" and row.ratio_to_best_peer:
        ratio = f" ({row.ratio_to_best_peer:.2f}x)"
    return f"{row.provider} {time_}{rate}{ratio}"


def _rich_bar(total: int) -> Any:
    if not sys.stderr.isatty():
        return None
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return None
    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    bar.add_task("cases", total=total)
    return bar
