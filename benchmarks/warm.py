"""Compile ahead: several processes run every provider once, so that a run finds warm disk caches.

Compilers of this kind keep what they made on disk, and one process at a time uses one core of many.
Nothing is measured meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.problems import Case
from benchmarks.providers.base import Subject, wants_grad

WORKER = "ATTN_BENCH_WARM"  # "k/n" in the environment of the k-th of n workers
_MOST_WORKERS = 12
_POLL_SECONDS = 0.2


def workers() -> int:
    """Return how many processes this machine can feed; one or none are not worth it."""
    return min(_MOST_WORKERS, (os.cpu_count() or 1) - 2)


def run(arguments: Sequence[str], count: int, seconds: float) -> None:
    """Start workers with the arguments of this run, and end those that are not done in time."""
    if count < 2:
        return
    started = [_start(arguments, index, count) for index in range(count)]
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(worker.poll() is None for worker in started):
        time.sleep(_POLL_SECONDS)
    for worker in started:
        if worker.poll() is None:
            worker.kill()
        worker.wait()


def work(
    share: str, subject: Subject, cases: Sequence[Case], device: torch.device, names: Sequence[str]
) -> None:
    """Run each provider of a share of the cases once; the run itself will see their errors."""
    index, count = map(int, share.split("/"))
    pairs = [
        (provider, case)
        for provider in subject.providers
        for case in cases
        if provider in subject.chosen(case, device, names)
    ]
    for provider, case in pairs[index::count]:
        with contextlib.suppress(Exception):
            provider.require()
            call = provider.prepare(case, subject.make_inputs(case, device))
            with torch.set_grad_enabled(wants_grad(case)), call.context():
                out = call.forward()
            if "backward" in case.passes:
                torch.autograd.grad(out, call.inputs, call.grad_out)
        torch.cuda.empty_cache()


def _start(arguments: Sequence[str], index: int, count: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {WORKER: f"{index}/{count}", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *arguments],
        env=environment,
        cwd=Path(__file__).parents[1],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
