"""Clocks: how long a call takes on a device, and how fast the device itself is.

A GPU call is timed by events. Before each repeat so much memory is read that nothing of the call's
own is left in the L2 cache; writing would do so too, but the call would then wait for what was
written to leave the cache. Where the host is slower than that, the device also spins, until all
that the call launches is queued: its time is then that of the kernels, on a busy host too. Calls
that are compared take turns, a few repeats each, so that a drift of the clocks meets all of them
alike.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

Call = Callable[[], object]
Context = Callable[[], contextlib.AbstractContextManager[object]]
_Events = tuple[torch.cuda.Event, torch.cuda.Event]
_READ_BYTES = 256 << 20  # more than the L2 cache of any GPU
_HOST_CALLS = 20
_LONGEST_SPIN_MS = 2.0  # a call that waits for the device itself is never ahead of it
_SPIN_CYCLES = 1 << 20  # to find out how long a cycle is
_COPIED_BYTES = 2 << 30
_GEMM_SIZE = 8192
_CEILING_REPEATS = 20


@dataclass(frozen=True)
class Effort:
    """How much time one measurement may take."""

    rounds: int = 5
    milliseconds: float = 60.0
    repeats: int = 40  # of one call in one round, at most

    @classmethod
    def quick(cls) -> Effort:
        """Return the least effort whose medians still mean something."""
        return cls(rounds=3, milliseconds=15.0, repeats=10)


class CpuClock:
    """Times calls by the clock of the host."""

    def samples(self, call: Call, count: int) -> list[float]:
        """Return the milliseconds of `count` calls, one by one."""
        times = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return times

    def synchronize(self) -> None:
        """Wait for nothing: a CPU call has ended when it returns."""

    def ceilings(self) -> dict[str, float]:
        """Return nothing: no rate of a CPU is compared with."""
        return {}


class CudaClock:
    """Times the kernels of calls by events on the current stream of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._read = torch.zeros(_READ_BYTES // 4, dtype=torch.float32, device=device)
        self._sum = torch.empty((), dtype=torch.float32, device=device)

    def samples(self, call: Call, count: int) -> list[float]:
        """Return the milliseconds of `count` calls, each from a cold L2 cache.

        One whose start the device passed before all of the call was queued is repeated, behind a
        spin of twice the time that the host took.
        """
        pairs: list[_Events] = []
        wait_ms = 0.0
        while len(pairs) < count:
            is_idle = not pairs or pairs[-1][1].query()
            spin_ms = wait_ms if is_idle else 0.0
            begun = time.perf_counter()
            start, end = self._enqueue(call, spin_ms)
            host_ms = (time.perf_counter() - begun) * 1e3
            if start.query() and spin_ms < _LONGEST_SPIN_MS:
                wait_ms = min(_LONGEST_SPIN_MS, max(wait_ms, 2 * spin_ms, 2 * host_ms))
                continue
            pairs.append((start, end))
        return self._milliseconds(pairs)

    def eager_samples(self, call: Call, count: int) -> list[float]:
        """Return the milliseconds of `count` calls, waits for the host among them."""
        return self._milliseconds([self._enqueue(call) for _ in range(count)])

    def _enqueue(self, call: Call, spin_ms: float = 0.0) -> _Events:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.sum(self._read, dim=0, out=self._sum)
        if spin_ms:
            torch.cuda._sleep(int(spin_ms * self._cycles_per_ms))
        start.record()
        call()
        end.record()
        return start, end

    def _milliseconds(self, pairs: Sequence[_Events]) -> list[float]:
        self.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    @functools.cached_property
    def _cycles_per_ms(self) -> float:
        spins = self.eager_samples(lambda: torch.cuda._sleep(_SPIN_CYCLES), 3)
        return _SPIN_CYCLES / min(spins)

    def synchronize(self) -> None:
        """Wait until the device has nothing left to do."""
        torch.cuda.synchronize(self._device)

    def ceilings(self) -> dict[str, float]:
        """Measure what the device can do: copy bandwidth and the rate of a bf16 matrix product."""
        copied = torch.empty(_COPIED_BYTES, dtype=torch.int8, device=self._device).random_()
        target = torch.empty_like(copied)
        copy_ms = _median(self, lambda: target.copy_(copied), _CEILING_REPEATS)
        shape = (2, _GEMM_SIZE, _GEMM_SIZE)
        a, b = torch.randn(shape, device=self._device).bfloat16().unbind(0)
        gemm_ms = _median(self, lambda: a @ b, _CEILING_REPEATS)
        return {
            "copy_gb_s": 2 * _COPIED_BYTES / copy_ms * 1e-6,
            "gemm_bf16_tflop_s": 2 * _GEMM_SIZE**3 / gemm_ms * 1e-9,
        }


class EagerClock:
    """Times calls on a GPU as a program meets them, with what the device waits for the host."""

    def __init__(self, clock: CudaClock) -> None:
        self._clock = clock

    def samples(self, call: Call, count: int) -> list[float]:
        """Return the milliseconds of `count` calls, each from a cold L2 cache."""
        return self._clock.eager_samples(call, count)


class HostClock:
    """Times what the host spends on a call that it does not wait for."""

    def __init__(self, clock: CpuClock | CudaClock) -> None:
        self._clock = clock

    def samples(self, call: Call, count: int) -> list[float]:
        """Return the milliseconds of one call, of about `count` in all: means of many in a row."""
        times = []
        for _ in range(max(1, count // _HOST_CALLS)):
            self._clock.synchronize()
            start = time.perf_counter()
            for _ in range(_HOST_CALLS):
                call()
            times.append((time.perf_counter() - start) * 1e3 / _HOST_CALLS)
        return times


class OtherClock(Protocol):
    """The clock of a device that torch knows nothing of."""

    def samples(self, call: Call, count: int) -> list[float]:
        """Return the milliseconds of `count` calls."""
        ...


Clock = CpuClock | CudaClock | EagerClock | HostClock


def clock_for(device: torch.device) -> CpuClock | CudaClock:
    """Return the clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


@dataclass(frozen=True)
class Job:
    """A call to time, and what has to surround it without being timed.

    `clock` times it in place of that of the other calls, where it runs on another device.
    """

    call: Call
    context: Context = contextlib.nullcontext
    clock: OtherClock | None = None


@dataclass
class Measured:
    """The repeats of one call in milliseconds, or the error that ended them."""

    samples: list[float] = field(default_factory=list)
    error: Exception | None = None

    @property
    def median(self) -> float:
        """The time to quote."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Distance of the quartiles, as a share of the median."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / self.median


def interleave(
    clock: Clock, jobs: Mapping[str, Job], effort: Effort, deadline: float = float("inf")
) -> dict[str, Measured]:
    """Time jobs in turns; one that raises drops out and leaves the others alone.

    After `deadline`, a value of time.monotonic, no further round begins.
    """
    results = {name: Measured() for name in jobs}
    names = list(jobs)
    repeats: dict[str, int] = {}
    for turn in range(effort.rounds):
        if turn and time.monotonic() > deadline:
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if results[name].error is not None:
                continue
            try:
                call, own = jobs[name].call, jobs[name].clock or clock
                with jobs[name].context():
                    if turn == 0:
                        repeats[name] = _repeats(own, call, effort)
                    results[name].samples += own.samples(call, repeats[name])
            except Exception as error:
                results[name].error = error
    return results


def peak_mib(call: Call, device: torch.device) -> float:
    """Return how much memory a GPU call takes at most beyond what is allocated before it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def captured(call: Call) -> Call:
    """Record a GPU call as a CUDA graph and return its replay."""
    gc.collect()  # gradients of old calls that wait for it tie the inputs to another stream
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return functools.partial(_replay, graph, call)


def _replay(graph: torch.cuda.CUDAGraph, call: Call) -> None:
    """Run a graph; `call` holds on to the memory that it uses."""
    graph.replay()


def _repeats(clock: Clock | OtherClock, call: Call, effort: Effort) -> int:
    call()
    estimate = _median(clock, call)
    return max(1, min(effort.repeats, int(effort.milliseconds / effort.rounds / estimate)))


def _median(clock: Clock | OtherClock, call: Call, count: int = 3) -> float:
    clock.samples(call, 1)
    return statistics.median(clock.samples(call, count))
