"""Threads that stand for the partitions of programs, and how they wait for one another."""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

PATIENCE = 20.0  # seconds a thread waits before it is stuck
LATENESS = 0.001  # seconds, at most, of a thread
_WARP = 32


class ProtocolError(AssertionError):
    """A thread waited in vain, or arrived where nobody expected it."""


class Program:
    """What the partitions of one program share."""

    def __init__(self, number: int, count: int) -> None:
        self.number = number
        self.count = count
        self.named: dict[int, list[int]] = {}  # threads at a named barrier, how often it opened
        self.unfenced: list[tuple[str, Any]] = []  # memory, and the partition that wrote it


class _Partition(threading.local):
    """What the threads of one partition know."""

    name = "the copy engine"
    program: Program
    threads: int
    products: list[Callable[[], None]]
    copies: list[list[Callable[[], None]]]  # in groups, of which the last one is not committed yet
    reads: list[Callable[[], Callable[[], None]]]  # of stores, each of which returns its write
    writes: list[Callable[[], None]]

    def enter(self, program: Program, name: str, warps: int) -> None:
        self.program, self.name, self.threads = program, name, warps * _WARP
        self.products, self.reads, self.writes = [], [], []
        self.copies = [[]]


here = _Partition()
changed = threading.Condition()
late_writes: list[Callable[[], None]] = []  # that only the end of the launch waits for
failed = threading.Event()  # a thread of this launch has raised: nobody needs to go on


class _Abandoned(BaseException):
    """Another thread has failed."""


def lateness() -> float:
    """Seconds by which a thread falls behind this time."""
    return random.random() * LATENESS


def dawdle() -> None:
    """Let other threads go ahead, now and then."""
    if failed.is_set():
        raise _Abandoned
    if random.random() < 0.05:
        time.sleep(lateness())


def wait(condition: Callable[[], bool], what: str) -> None:
    dawdle()
    with changed:
        if not changed.wait_for(lambda: condition() or failed.is_set(), PATIENCE):
            raise ProtocolError(f"{here.name} waits in vain for {what}")
    dawdle()


def at_named_barrier(stay: bool, barrier: int, threads: int) -> None:
    dawdle()
    with changed:
        state = here.program.named.setdefault(barrier, [0, 0])
        opened = state[1]
        state[0] += here.threads
        if state[0] > threads:
            raise ProtocolError(f"{here.name} is too much for named barrier {barrier}")
        if state[0] == threads:
            state[0] = 0
            state[1] += 1
            changed.notify_all()
    if stay:
        wait(lambda: state[1] != opened, f"named barrier {barrier}")


def end_of_work() -> None:
    """Leave to global memory what is on its way there; nothing else may be in flight."""
    if here.products or here.reads:
        raise ProtocolError(f"{here.name} ends with work in flight")
    late_writes.extend(here.writes)


def warp_specialize(
    partitions: Sequence[tuple[Callable[..., None], tuple[Any, ...]]],
    warps: Sequence[int],
    registers: Sequence[int],
) -> None:
    program = here.program

    def work(number: int, function: Any, args: tuple[Any, ...], count: int) -> None:
        here.enter(program, f"{function.__name__} of partition {number}", count)
        function(*args)
        end_of_work()

    run_at_once(
        [
            functools.partial(work, number, *partition, count)
            for number, (partition, count) in enumerate(zip(partitions, (4, *warps), strict=True))
        ]
    )
    if any(state[0] for state in program.named.values()):
        raise ProtocolError(f"named barriers are left half full: {program.named}")


def run_at_once(jobs: Sequence[Callable[[], None]]) -> None:
    """Run each job in a thread of its own; raise what one of them raised."""
    errors: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            with changed:
                failed.set()
                changed.notify_all()
                errors.append(error)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((x for x in errors if not isinstance(x, _Abandoned)), errors[0])
