"""Measure a package against its peers: ``python -m benchmarks attn-flash``.

Writes benchmarks/results/<device>/<package>-<date>.json. ``python -m benchmarks.report`` makes
plots and tables of it, ``python -m benchmarks.compare`` compares two of them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# The default changes in Triton 3.10, and with it the last bits of results.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
# FlashAttention-4 keeps what it compiles only if told to; the warming processes rely on it.
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")

import torch

from benchmarks import problems, providers, results, warm
from benchmarks.problems import Case
from benchmarks.progress import Progress
from benchmarks.providers.base import PASSES, Subject
from benchmarks.runner import Runner
from benchmarks.timing import Effort


def main(arguments: Sequence[str]) -> int:
    start = time.monotonic()
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    subject = providers.subject(options.package)
    group = "gpu" if device.type == "cuda" else "cpu"
    cases = problems.select(
        problems.load(options.package, group), options.filter, headline=options.quick
    )
    if not cases:
        print(f"no case of {options.package} on {device.type} matches {options.filter!r}")
        return 1
    if folder := os.environ.get(warm.WORKER):
        warm.work(folder, subject, cases, device, options.provider)
        return 0
    progress = Progress(len(cases))
    progress.start()
    try:
        _measure(options, arguments, device, subject, cases, progress, start)
    finally:
        progress.stop()
    return 0


def _measure(
    options: argparse.Namespace,
    arguments: Sequence[str],
    device: torch.device,
    subject: Subject,
    cases: Sequence[Case],
    progress: Progress,
    start: float,
) -> None:
    budget = float("inf") if options.budget is None else options.budget
    if device.type == "cuda" and subject.warm:
        progress.say(f"compiling ahead in {options.warm} processes")
        late = warm.run(arguments, options.warm, budget * subject.warming_share)
        progress.say(f"compiled ahead, but for {late} processes that were not done in time")
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    result = results.new_result(subject, device, settings)
    path = results.path_for(result, options.out)
    effort = Effort.quick() if options.quick else Effort()
    runner = Runner(subject, device, effort, options.passes, options.provider, start + budget)

    def after(case: Case) -> None:
        progress.advance([row for row in result.rows if row.case == case.id])
        result.seconds = round(time.monotonic() - start, 1)
        results.write(result, path)

    runner.run(cases, result, after)
    results.write(result, path)
    progress.say(results.summary(result))
    progress.say(f"written to {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("package", choices=providers.PACKAGES)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cuda or cpu (default: %(default)s)")
    parser.add_argument("--filter", default="", help="regular expression on the ids of cases")
    parser.add_argument(
        "--provider", type=_words, default=(), help="names, comma-separated (default: the usual)"
    )
    parser.add_argument(
        "--pass",
        dest="passes",
        type=_passes,
        default=PASSES,
        help=f"of {','.join(PASSES)} (default: all)",
    )
    parser.add_argument("--quick", action="store_true", help="headline cases, short measurements")
    parser.add_argument("--out", type=Path, default=results.ROOT, help="folder of the results")
    parser.add_argument("--budget", type=float, help="seconds after which nothing new begins")
    parser.add_argument(
        "--warm", type=int, default=warm.workers(), help="processes that compile ahead on a GPU"
    )
    return parser


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _passes(text: str) -> tuple[str, ...]:
    passes = _words(text)
    if unknown := set(passes) - set(PASSES):
        raise argparse.ArgumentTypeError(f"unknown passes {sorted(unknown)}, known {list(PASSES)}")
    return passes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
