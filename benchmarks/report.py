"""Plots and tables of a result: ``python -m benchmarks.report RESULT.json [--readme README.md]``.

Writes beside the result a Markdown file with every row and, where matplotlib is installed, a PNG of
the rates and one of the ratios to the best peer over the length of series, and one of the rates of
single cases. With ``--readme`` the headline rows also replace what stands between
``<!-- benchmarks:<package> -->`` and ``<!-- /benchmarks:<package> -->``.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.results import Result, Row

_PASS_TITLES = {
    "forward": "Forward",
    "backward": "Backward",
    "graph": "Both passes in a CUDA graph",
    "host": "Host time of a call, without gradient",
    "host_grad": "Host time of a call, with gradient",
}
_QUEUED = (
    "The kernels of a call are timed, queued before the device comes to them. In cases marked "
    "eager the device may wait for the host, as in a program with few calls to make."
)
_WIDE_SPREAD = 0.25  # distance of the quartiles, as a share of the median


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--readme", type=Path, help="Markdown file with a marked section to fill")
    options = parser.parse_args(arguments)
    result = results.read(options.result)
    pictures = plot(result, options.result)
    page = options.result.with_suffix(".md")
    page.write_text(markdown(result, result.rows, pictures, page.parent), encoding="utf-8")
    written = [*pictures, page]
    if options.readme:
        headline = [row for row in result.rows if row.headline]
        body = markdown(result, headline, pictures, options.readme.parent, heading="####")
        text = options.readme.read_text(encoding="utf-8")
        text = fill(text, f"benchmarks:{result.package}", body)
        options.readme.write_text(text, encoding="utf-8")
        written.append(options.readme)
    for path in written:
        print(path)
    return 0


def fill(text: str, section: str, body: str) -> str:
    """Return `text` with `body` in the marked section of that name; ValueError without one."""
    begin, end = f"<!-- {section} -->", f"<!-- /{section} -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"the file must have a section {begin} ... {end}")
    return f"{before}{begin}\n{body.strip()}\n{end}{after}"


def markdown(
    result: Result,
    rows: Sequence[Row],
    pictures: Sequence[Path],
    folder: Path,
    heading: str = "##",
) -> str:
    """Return where and when it was measured, the pictures, and a table for each pass."""
    parts = [_origin(result)]
    parts += [f"![{picture.stem}]({relative(picture, folder)})" for picture in pictures]
    for pass_, title in _PASS_TITLES.items():
        chosen = [row for row in rows if row.pass_ == pass_]
        if any(row.status == results.OK for row in chosen):
            parts.append(f"{heading} {title}{_unit(chosen)}\n\n{table(chosen)}")
    for pass_ in ("forward", "backward"):
        weighed = [row for row in rows if row.pass_ == pass_ and row.peak_mib is not None]
        if weighed:
            title = f"{_PASS_TITLES[pass_]}: memory beyond the inputs (MiB)"
            parts.append(f"{heading} {title}\n\n{memory_table(weighed)}")
    if any(row.timing == "queued" for row in rows):
        parts.append(_QUEUED)
    if any(map(is_rough, rows)):
        parts.append("~: half of the repeats differ by over a quarter, as where the host is busy.")
    reasons = _reasons(rows)
    if reasons:
        parts.append(f"{heading} Not measured\n\n{reasons}")
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table: a line for each case, a column for each provider.

    The last columns are the ratio of our fastest backend to the best peer and, where the hardware's
    limit is known, that of its time to the limit.
    """
    providers = _providers(rows)
    has_floor = any(row.floor_ms for row in rows)
    last = ["ours / best peer", *(["our time / floor"] if has_floor else [])]
    lines = [
        "| " + " | ".join(["case", *providers, *last]) + " |",
        "|---|" + "---:|" * (len(providers) + len(last)),
    ]
    for case in _unique(row.case for row in rows):
        by_provider = {row.provider: row for row in rows if row.case == case}
        cells = [_cell(by_provider.get(name)) for name in providers]
        ratio = our_ratio(by_provider.values())
        cells.append(f"{ratio:.2f}" if ratio else "")
        if has_floor:
            cells.append(_over_floor(by_provider.values()))
        label = f"{case} (eager)" if _is_eager(by_provider.values(), rows) else case
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(lines)


def _is_eager(rows: Iterable[Row], others: Iterable[Row]) -> bool:
    """Whether the host counts in some rows of a case, unlike in others."""
    timings = {row.timing for row in rows if row.status == results.OK}
    return "eager" in timings and any(row.timing == "queued" for row in others)


def _over_floor(rows: Iterable[Row]) -> str:
    times = [
        row.ms / row.floor_ms for row in rows if row.kind == "ours" and row.ms and row.floor_ms
    ]
    return f"{min(times):.2f}" if times else ""


def memory_table(rows: Sequence[Row]) -> str:
    """Return a Markdown table of what each provider allocates at most in a call."""
    providers = _providers(rows)
    lines = ["| " + " | ".join(["case", *providers]) + " |", "|---|" + "---:|" * len(providers)]
    for case in _unique(row.case for row in rows):
        peaks = {row.provider: row.peak_mib for row in rows if row.case == case}
        cells = [f"{peaks[name]:.0f}" if peaks.get(name) else "" for name in providers]
        lines.append("| " + " | ".join([case, *cells]) + " |")
    return "\n".join(lines)


def our_ratio(rows: Iterable[Row]) -> float | None:
    """Return the largest ratio to the best peer among our own rows."""
    return max(
        (row.ratio_to_best_peer for row in rows if row.kind == "ours" and row.ratio_to_best_peer),
        default=None,
    )


def plot(result: Result, path: Path) -> list[Path]:
    """Draw series over their length and single cases as bars; nothing without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return []
    mpl.use("Agg")
    measured = [row for row in result.rows if row.status == results.OK and row.pass_ != "graph"]
    rows = [row for row in measured if row.series]
    drawings: dict[str, Callable[[], Any]] = {}
    if rows:
        drawings["rates"] = functools.partial(_draw_rates, result, rows)
    if our_ratio(rows) is not None:  # some peer ran
        drawings["ratios"] = functools.partial(_draw_ratios, result, rows)
    if any(row.peak_mib for row in rows):
        for name, value, unit in (
            ("runtime", _ms, "ms"),
            ("memory", lambda row: row.peak_mib, "MiB"),
        ):
            drawings[name] = functools.partial(_draw_grid, result, rows, value, unit)
    single = [row for row in measured if not row.series and row.pass_ in ("forward", "backward")]
    if single:
        drawings["cases"] = functools.partial(_draw_cases, single)
    pictures = []
    for name, draw in drawings.items():
        picture = path.with_name(f"{path.stem}-{name}.png")
        figure = draw()
        figure.suptitle(f"{result.package} on {result.device['name']}, {result.date}")
        figure.savefig(picture, dpi=110)
        pictures.append(picture)
    return pictures


def _draw_rates(result: Result, rows: Sequence[Row]) -> Any:
    unit = "TFLOP/s" if any(row.tflop_s for row in rows) else "GB/s"
    return _draw_grid(result, rows, _rate, unit)


def _draw_grid(
    result: Result, rows: Sequence[Row], value: Callable[[Row], float | None], unit: str
) -> Any:
    """One panel for each series and pass, one line for each provider."""
    from matplotlib import pyplot as plt

    passes, series = _unique(row.pass_ for row in rows), _unique(row.series for row in rows)
    colours = {name: f"C{n}" for n, name in enumerate(_providers(rows))}
    figure, panels = plt.subplots(
        len(passes),
        len(series),
        figsize=(3.2 * len(series) + 1, 3.0 * len(passes)),
        squeeze=False,
        layout="constrained",
    )
    for i, pass_ in enumerate(passes):
        for j, name in enumerate(series):
            chosen = [row for row in rows if row.pass_ == pass_ and row.series == name]
            panels[i, j].set_visible(bool(chosen))
            for provider in _providers(chosen):
                line = [row for row in chosen if row.provider == provider]
                ours = line[0].kind == "ours"
                panels[i, j].plot(
                    *_points(result, line, value),
                    marker="o" if ours else ".",
                    linewidth=2.2 if ours else 1.1,
                    color=colours[provider],
                    label=provider,
                )
            _finish(panels[i, j], result, chosen, f"{name}, {pass_}", unit)
    _legend(figure)
    return figure


def _draw_ratios(result: Result, rows: Sequence[Row]) -> Any:
    """One panel for each pass, one line for each series: our fastest backend to the best peer."""
    from matplotlib import pyplot as plt

    passes = _unique(row.pass_ for row in rows if our_ratio([row]) is not None)
    figure, panels = plt.subplots(
        1, len(passes), figsize=(5.5 * len(passes), 4.0), squeeze=False, layout="constrained"
    )
    for panel, pass_ in zip(panels[0], passes, strict=True):
        chosen = [row for row in rows if row.pass_ == pass_]
        for name in _unique(row.series for row in chosen):
            line = [row for row in chosen if row.series == name]
            points = _points(result, _our_best(line), lambda row: row.ratio_to_best_peer)
            panel.plot(*points, "o-", label=name)
        panel.axhline(1.0, color="black", linewidth=0.8)
        _finish(panel, result, chosen, pass_, "best peer's time / ours")
    _legend(figure)
    return figure


def _draw_cases(rows: Sequence[Row]) -> Any:
    """One panel for each pass, a group of bars for each case, a bar for each provider."""
    from matplotlib import pyplot as plt

    passes, providers = _unique(row.pass_ for row in rows), _providers(rows)
    cases = _unique(row.case for row in rows)
    value, unit = (_rate, "TFLOP/s") if any(row.tflop_s for row in rows) else (_ms, "ms")
    figure, panels = plt.subplots(
        1,
        len(passes),
        figsize=(5.0 * len(passes) + 2, 1 + 0.12 * len(cases) * (len(providers) + 1)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    thickness = 1 / (len(providers) + 1)
    for panel, pass_ in zip(panels[0], passes, strict=True):
        for n, provider in enumerate(providers):
            bars = {
                row.case: value(row) or 0.0
                for row in rows
                if row.pass_ == pass_ and row.provider == provider
            }
            places = [cases.index(case) + n * thickness for case in bars]
            if bars:
                panel.barh(places, bars.values(), thickness, label=provider, color=f"C{n}")
        panel.margins(y=0.01)
        panel.set_title(pass_, fontsize=10)
        panel.set_xlabel(unit)
        panel.grid(alpha=0.3, axis="x")
    shared = panels[0, 0]  # the axis of all
    shared.set_yticks([place + 0.5 - thickness for place in range(len(cases))], cases)
    shared.invert_yaxis()
    _legend(figure)
    return figure


def _our_best(rows: Sequence[Row]) -> list[Row]:
    """Return for each case our fastest row."""
    best: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row.ratio_to_best_peer or 0.0):
        if row.kind == "ours" and row.ratio_to_best_peer:
            best[row.case] = row
    return list(best.values())


def _points(
    result: Result, rows: Sequence[Row], value: Callable[[Row], float | None]
) -> tuple[list[float], list[float]]:
    axis = result.x_axis
    points = sorted((row.sizes[axis], value(row) or math.nan) for row in rows)
    return [x for x, _ in points], [y for _, y in points]


def _finish(panel: Any, result: Result, rows: Sequence[Row], title: str, unit: str) -> None:
    axis = result.x_axis
    lengths = sorted({row.sizes[axis] for row in rows})
    panel.set_title(title, fontsize=10)
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [_short(length) for length in lengths], minor=False)
    panel.set_xlabel(axis)
    panel.set_ylabel(unit)
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)


def _legend(figure: Any) -> None:
    entries = {
        label: mark
        for panel in figure.axes
        for mark, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="outside right center", fontsize=9)


def _rate(row: Row) -> float | None:
    return row.tflop_s or row.gb_s


def _ms(row: Row) -> float | None:
    return row.ms


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _origin(result: Result) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    ceilings = "".join(
        f" {text} {result.ceilings[name]:.0f} {unit}."
        for name, text, unit in (
            ("copy_gb_s", "Copy bandwidth", "GB/s"),
            ("gemm_bf16_tflop_s", "bf16 matrix product", "TFLOP/s"),
        )
        if name in result.ceilings
    )
    commit = f", commit {result.commit[:12]}" if result.commit else ""
    origin = f"{result.device['name']}, {result.date}{commit}: {versions}.{ceilings} Medians."
    if continued := result.settings.get("continued"):
        cases, providers = (", ".join(continued[name]) for name in ("cases", "providers"))
        origin += f" Measured in a second run right after the first, of {providers} alone: {cases}."
    return origin


def _unit(rows: Sequence[Row]) -> str:
    if rows[0].pass_ in ("host", "host_grad"):
        return " (µs)"
    return " (TFLOP/s)" if any(row.tflop_s for row in rows) else " (ms)"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.status != results.OK or row.ms is None:
        return row.status
    sign = "~" if is_rough(row) else ""
    if row.pass_ in ("host", "host_grad"):
        return f"{sign}{row.ms * 1e3:.1f}"
    return f"{sign}{row.tflop_s:.3g}" if row.tflop_s else f"{sign}{row.ms:.3g}"


def is_rough(row: Row) -> bool:
    """Whether the repeats of a row differ much."""
    return row.status == results.OK and (row.spread or 0.0) > _WIDE_SPREAD


def _reasons(rows: Sequence[Row]) -> str:
    """Return one line for each provider and reason, with how many rows it holds for."""
    counts: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if row.status != results.OK:
            key = (row.provider, row.status, row.reason)
            counts[key] = counts.get(key, 0) + 1
    return "\n".join(
        f"* {provider}: {status} ({count}): {reason}"
        for (provider, status, reason), count in counts.items()
    )


def _providers(rows: Sequence[Row]) -> list[str]:
    """Names of the providers that measured anything, ours first."""
    ran = [row for row in rows if row.status == results.OK]
    return _unique(row.provider for row in sorted(ran, key=lambda row: row.kind != "ours"))


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def relative(path: Path, folder: Path) -> str:
    """Return a path as a page of `folder` links to it."""
    try:
        return path.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return path.as_posix()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
