"""Compile ahead: several processes compile what the providers need, so that a run finds it on disk.

Compilers of this kind keep what they made on disk, and one process at a time uses one core of many.
Nothing is measured meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import torch

from benchmarks.problems import Case
from benchmarks.providers.base import Provider, Subject

WORKER = "ATTN_BENCH_WARM"  # in the environment of a worker: the folder of claims
_MOST_WORKERS = 14
_POLL_SECONDS = 0.2


def workers() -> int:
    """Return how many processes this machine can feed; one or none are not worth it."""
    return min(_MOST_WORKERS, (os.cpu_count() or 1) - 2)


def run(arguments: Sequence[str], count: int, seconds: float) -> int:
    """Start workers with the arguments of this run, and end those that are not done in time.

    Returns how many those were.
    """
    if count < 2:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        started = [_start(arguments, folder) for _ in range(count)]
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(worker.poll() is None for worker in started):
            time.sleep(_POLL_SECONDS)
        late = [worker for worker in started if worker.poll() is None]
        for worker in late:
            worker.kill()
        for worker in started:
            worker.wait()
    return len(late)


def work(
    folder: str, subject: Subject, cases: Sequence[Case], device: torch.device, names: Sequence[str]
) -> None:
    """Do the tasks that no other worker has claimed; the run itself will see their errors."""
    found = tasks(subject, cases, device, names).values()
    for index, (provider, case, compile_part) in enumerate(found):
        if not _claim(Path(folder, str(index))):
            continue
        with contextlib.suppress(Exception):
            provider.require()
            compile_part(subject.make_inputs(case, device))
        torch.cuda.empty_cache()


def tasks(
    subject: Subject, cases: Sequence[Case], device: torch.device, names: Sequence[str]
) -> dict[Hashable, tuple[Provider, Case, Callable[[object], object]]]:
    """Return what there is to compile, by name, with the first case that needs it.

    Whole runs take longer than parts of one, so they come first.
    """
    found: dict[Hashable, tuple[Provider, Case, Callable[[object], object]]] = {}
    for provider in sorted(subject.providers, key=lambda provider: provider.compiles is not None):
        for case in cases:
            if provider in subject.chosen(case, device, names):
                for name, compile_part in provider.tasks(case).items():
                    found.setdefault(name, (provider, case, compile_part))
    return found


def _claim(path: Path) -> bool:
    """Whether this process is the first to come."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _start(arguments: Sequence[str], folder: str) -> subprocess.Popen[bytes]:
    own = {
        WORKER: folder,
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        # What a peer tunes while others compile is not to be kept.
        "XDG_CONFIG_HOME": folder,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *arguments],
        env=os.environ | own,
        cwd=Path(__file__).parents[1],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
