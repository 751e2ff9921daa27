"""One run: for each case every provider is prepared, checked, and timed in turn with the others."""

from __future__ import annotations

import contextlib
import functools
import gc
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from attn_core import BackendUnavailableError, UnsupportedProblemError
from benchmarks import checking, results, timing
from benchmarks.problems import Case
from benchmarks.providers.base import (
    GRAPH,
    HOST,
    TIMED,
    Call,
    Expected,
    Provider,
    Subject,
    wants_grad,
)
from benchmarks.results import Result, Row

_REASON_LENGTH = 300
_FOLDERS = re.compile(r"(?<![\w.])/(?:[\w.+-]+/)+")
OUT_OF_TIME = "the time budget is used up"

Rows = Mapping[tuple[str, str], Row]  # by pass and provider


class DeviceLostError(Exception):
    """After an error of one provider the device takes no more work."""


class Runner:
    """Measures the cases of one subject on one device.

    Parameters
    ----------
    subject : Subject
        The package and its providers.
    device : torch.device
        Where to measure.
    effort : Effort
        How long each measurement may take.
    passes : sequence of str
        Which passes to measure, of those that a case has.
    names : sequence of str
        Names of the providers to measure; none for the usual ones.
    deadline : float
        Value of time.monotonic after which nothing new begins.
    """

    def __init__(
        self,
        subject: Subject,
        device: torch.device,
        effort: timing.Effort,
        passes: Sequence[str],
        names: Sequence[str] = (),
        deadline: float = float("inf"),
    ) -> None:
        self._subject = subject
        self._device = device
        self._effort = effort
        self._passes = passes
        self._names = names
        self._deadline = deadline
        self._clock = timing.clock_for(device)

    def run(self, cases: Sequence[Case], result: Result, after: Callable[[Case], None]) -> None:
        """Add the rows of every case to `result`, calling `after` with each case that is done."""
        plan = [(case, self._rows(case)) for case in cases]
        result.rows = [row for _, rows in plan for row in rows.values()]
        _mark(result.rows, OUT_OF_TIME)
        result.ceilings = self._clock.ceilings()
        for case, rows in plan:
            if self._is_late():
                break
            try:
                self._measure(case, rows)
            except DeviceLostError as error:
                _mark(result.rows, str(error))
                break
            except Exception as error:  # inputs or reference that do not fit, above all
                _mark(rows.values(), _describe(error), results.FAILED)
            self._release()
            after(case)

    def _rows(self, case: Case) -> Rows:
        return {
            (pass_, provider.name): Row.of(case, pass_, provider)
            for pass_ in case.passes
            for provider in self._subject.chosen(case, self._device, self._names)
            if pass_ in self._passes and pass_ in provider.passes
        }

    def _measure(self, case: Case, rows: Rows) -> None:
        if not rows:
            return
        inputs = self._subject.make_inputs(case, self._device)
        gradients = any(pass_ == "backward" for pass_, _ in rows)
        expected = self._subject.reference(case, inputs, gradients)
        jobs: dict[str, dict[str, timing.Job]] = {pass_: {} for pass_, _ in rows}
        for provider in self._subject.chosen(case, self._device, self._names):
            own = {pass_: row for (pass_, name), row in rows.items() if name == provider.name}
            if own and not self._is_late():
                prepared = self._prepare(case, provider, inputs, expected, own)
                for pass_, job in prepared.items():
                    jobs[pass_][provider.name] = job
        for pass_, ready in jobs.items():
            if ready and not self._is_late():
                self._time(case, pass_, ready, rows)
            rank([row for row in rows.values() if row.pass_ == pass_])

    def _prepare(
        self,
        case: Case,
        provider: Provider,
        inputs: object,
        expected: Sequence[Expected],
        rows: Mapping[str, Row],
    ) -> dict[str, timing.Job]:
        """Return what to time, by pass; where a provider cannot or is wrong, its rows say so."""
        jobs: dict[str, timing.Job] = {}
        try:
            provider.require()
            call = provider.prepare(case, inputs)
            out, error = checking.check_forward(call, expected[0], wants_grad(case))
            for pass_ in [pass_ for pass_ in rows if pass_ not in ("backward", GRAPH)]:
                rows[pass_].error = error
                jobs[pass_] = self._forward(case, provider, call, rows[pass_])
            if "backward" in rows:
                rows["backward"].error = checking.check_backward(call, out, expected[1:])
                gradients = functools.partial(_gradients, call, out)
                jobs["backward"] = timing.Job(gradients, call.context, call.clocks.get("backward"))
            for pass_ in call.clocks.keys() & rows.keys():
                rows[pass_].timing = "timestamps"
            self._weigh(jobs, rows)
            if GRAPH in rows:
                rows[GRAPH].timing = "graph"
                # Inputs of its own: gradients of the others wait for the stream of `out`.
                own = provider.prepare(case, inputs)
                with own.context():
                    jobs[GRAPH] = timing.Job(timing.captured(functools.partial(_both, own)))
        except Exception as error:
            undone = [row for pass_, row in rows.items() if pass_ not in jobs]
            _mark(undone, _describe(error), _status(error))
            self._require_device(provider.name)
        return jobs

    def _weigh(self, jobs: Mapping[str, timing.Job], rows: Mapping[str, Row]) -> None:
        """Note what the calls allocate, in rows of subjects that want to know."""
        if not self._subject.memory or self._device.type != "cuda":
            return
        for pass_ in TIMED:
            if pass_ in jobs:
                with jobs[pass_].context():
                    rows[pass_].peak_mib = timing.peak_mib(jobs[pass_].call, self._device)

    def _forward(self, case: Case, provider: Provider, call: Call, row: Row) -> timing.Job:
        grad = wants_grad(case) and row.pass_ != "host"
        context = functools.partial(_surroundings, call, grad)
        has_graph = self._subject.graph and provider.graph and row.pass_ in TIMED
        if not (has_graph and self._device.type == "cuda"):
            return timing.Job(call.forward, context, call.clocks.get(row.pass_))
        row.timing = "graph"
        with context():
            return timing.Job(timing.captured(call.forward))

    def _time(self, case: Case, pass_: str, jobs: Mapping[str, timing.Job], rows: Rows) -> None:
        clock = self._clock_of(case, pass_)
        measured = timing.interleave(clock, jobs, self._effort, self._deadline)
        for name, times in measured.items():
            row = rows[pass_, name]
            if row.timing == "eager" and isinstance(clock, timing.CudaClock):
                row.timing = "queued"
            if times.error is None:
                self._fill(case, row, times)
                continue
            _mark([row], _describe(times.error), results.FAILED)
            self._require_device(name)

    def _clock_of(self, case: Case, pass_: str) -> timing.Clock:
        if pass_ in HOST:
            return timing.HostClock(self._clock)
        if case.eager and pass_ in TIMED and isinstance(self._clock, timing.CudaClock):
            return timing.EagerClock(self._clock)
        return self._clock

    def _fill(self, case: Case, row: Row, times: timing.Measured) -> None:
        row.status, row.reason = results.OK, ""
        row.ms, row.spread, row.samples = times.median, times.spread, len(times.samples)
        if row.pass_ in HOST:
            return
        row.floor_ms = self._subject.floor(case, row.pass_)
        if row.pass_ == GRAPH:
            return
        flops = self._subject.flops(case, row.pass_)
        row.tflop_s = flops and flops / row.ms * 1e-9
        row.gb_s = self._subject.traffic(case, row.pass_) / row.ms * 1e-6

    def _is_late(self) -> bool:
        return time.monotonic() > self._deadline

    def _require_device(self, culprit: str) -> None:
        try:
            self._clock.synchronize()
        except Exception as error:
            raise DeviceLostError(f"the device failed after {culprit}: {error}") from error

    def _release(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def rank(rows: Sequence[Row]) -> None:
    """Give the rows of one pass of one case their ratio to the fastest peer."""
    peers = [row.ms for row in rows if row.kind == "peer" and row.ms is not None]
    for row in rows:
        if peers and row.ms is not None:
            row.ratio_to_best_peer = min(peers) / row.ms


@contextlib.contextmanager
def _surroundings(call: Call, grad: bool) -> Iterator[None]:
    with torch.set_grad_enabled(grad), call.context():
        yield


def _gradients(call: Call, out: torch.Tensor) -> object:
    return torch.autograd.grad(out, call.inputs, call.grad_out, retain_graph=True)


def _both(call: Call) -> object:
    return torch.autograd.grad(call.forward(), call.inputs, call.grad_out)


def _mark(rows: Iterable[Row], reason: str, status: str = results.NOT_REACHED) -> None:
    """Say why rows were not measured; those that say so already keep their reason."""
    for row in rows:
        if row.status == results.NOT_REACHED:
            row.status, row.reason = status, reason


def _status(error: Exception) -> str:
    if isinstance(error, BackendUnavailableError):
        return results.MISSING
    if isinstance(error, UnsupportedProblemError):
        return results.UNSUPPORTED
    return results.WRONG if isinstance(error, checking.WrongResultError) else results.FAILED


def _describe(error: Exception) -> str:
    """Say what went wrong, of files their names alone: folders are this machine's."""
    text = _FOLDERS.sub("", " ".join(str(error).split()))[:_REASON_LENGTH]
    return f"{type(error).__name__}: {text}" if _status(error) == results.FAILED else text
