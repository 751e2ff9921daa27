"""Small problems compared with numpy, and a few timed ones, for ``python -m attn_vulkan``."""

from __future__ import annotations

import ctypes
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from attn_vulkan import launch, variants
from attn_vulkan.api import attention, attention_backward
from attn_vulkan.device import Device
from attn_vulkan.parameters import Tensors, View
from attn_vulkan.problem import ITEM_BYTES, Problem
from attn_vulkan.runtime.context import Context, open_context
from attn_vulkan.runtime.memory import Buffer

_DTYPES = ("float32", "float16")
_TOLERANCES = {"float32": 2e-5, "float16": 5e-3}
_SIZES = (2, 33, 65, 4, 2, 40)  # B M N H H_KV D
# Long enough to fill a GPU; a CPU would take minutes.
_TIMED_LENGTH = {"cpu": 256}
_LONG = 4096
_TIMED_DIMS = (128, 64)
_REPEATS = 8
_ROUND_TRIPS = 200
_LSE_BYTES = 4
_NUMBERS = 1 << 20  # different ones in a tensor; a host takes seconds for as many as a GPU holds
# An idle GPU has lowered its clocks, to a fifth on an H200.
_WARMING_SECONDS = 0.3


@dataclass(frozen=True)
class Outcome:
    """What one comparison with numpy found."""

    dtype: str
    causal: bool
    error: float

    @property
    def passed(self) -> bool:
        """Whether the largest error is what rounding explains."""
        return self.error < _TOLERANCES[self.dtype]

    def __str__(self) -> str:
        word = "ok" if self.passed else "WRONG"
        return f"{self.dtype}, causal={self.causal}: {word}, largest error {self.error:.1e}"


def check(device: Device) -> Iterator[Outcome]:
    """Compare outputs and gradients of a small problem with numpy's in float64."""
    import numpy as np

    batch, len_q, len_k, heads, heads_kv, dim = _SIZES
    random = np.random.default_rng(0)
    for dtype in _DTYPES:
        if variants.refusal(open_context(device.index).device, dtype):
            continue
        q, dout = (random.standard_normal((batch, len_q, heads, dim)).astype(dtype) for _ in "qo")
        k, v = (random.standard_normal((batch, len_k, heads_kv, dim)).astype(dtype) for _ in "kv")
        for causal in (False, True):
            out, lse = attention(q, k, v, causal=causal, return_lse=True, device=device.index)
            grads = attention_backward(dout, q, k, v, out, lse, causal=causal, device=device.index)
            wide = [x.astype(np.float64) for x in (q, k, v, dout)]
            expected = _reference(*wide, causal=causal)
            errors = [abs(a - b).max() for a, b in zip((out, lse, *grads), expected, strict=True)]
            yield Outcome(dtype, causal, float(max(errors)))


def benchmark(device: Device) -> Iterator[str]:
    """Time a round trip, and both passes of a problem with each variant, 16-bit dtypes first."""
    context = open_context(device.index)
    yield f"submit and wait: {round_trip(context) * 1e6:.3g} us"
    length = _TIMED_LENGTH.get(device.type, _LONG)
    for dtype, dim in itertools.product(
        sorted(ITEM_BYTES, key=ITEM_BYTES.__getitem__), _TIMED_DIMS
    ):
        if variants.refusal(context.device, dtype):
            continue
        problem = Problem(dtype, 1, length, length, 16, 16, dim, dim, is_aligned=True)
        products = 4 * problem.heads * length**2 * dim * 1e-12
        for name, (record, fits, work) in _PASSES.items():
            for variant in launch.runnable(context, problem, fits):
                seconds = time_pass(context, problem, functools.partial(record, variant=variant))
                rate = f"{products * work / seconds:.3g} TFLOP/s"
                yield f"{name} {dtype} n {length} d {dim} {variant}: {rate}"


_PASSES: dict[str, Any] = {
    "forward": (launch.record_forward, variants.fits_forward, 1.0),
    "backward": (launch.record_backward, variants.fits_backward, 2.5),
}


def round_trip(context: Context) -> float:
    """Seconds of the host from recording a barrier to the device's word that it has ended."""
    times = []
    for _ in range(_ROUND_TRIPS):
        start = time.perf_counter()
        with context.commands() as commands:
            commands.barrier()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def time_pass(context: Context, problem: Problem, record: Callable[..., Any]) -> float:
    """Seconds of one pass by the device's own clock, once it runs at its full speed."""
    with Timer(context, problem) as timer:
        start = time.monotonic()
        while True:
            seconds = statistics.median(timer.seconds(record, _REPEATS))
            if time.monotonic() - start > _WARMING_SECONDS:
                return seconds


class Timer:
    """Normal numbers for one problem on a device, and the device's times of passes over them.

    Parameters
    ----------
    context : Context
        The device.
    problem : Problem
        Sequences are contiguous, and head_dim_v is head_dim.
    """

    def __init__(self, context: Context, problem: Problem) -> None:
        self._context = context
        self._problem = problem
        self._stack = ExitStack()
        self._fields: dict[str, Any] = {}

    def __enter__(self) -> Timer:
        """Allocate and fill the tensors."""
        problem = self._problem
        with self._stack:
            self._stack.enter_context(self._context.in_use())
            contents = _normal(problem.dtype)
            for name in ("q", "out", "dout", "dq"):
                self._fields[name] = self._tensor(problem.len_q, problem.heads, contents)
            for name in ("k", "v", "dk", "dv"):
                self._fields[name] = self._tensor(problem.len_k, problem.heads_kv, contents)
            lse = self._allocate(problem.batches * problem.heads * problem.len_q * _LSE_BYTES)
            strides = (problem.heads * problem.len_q, 1, problem.len_q, 0)
            self._fields["lse"] = View(lse.address, strides)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Release them."""
        self._stack.close()

    def seconds(self, record: Callable[..., Any], repeats: int) -> list[float]:
        """Times of `repeats` passes in a row; `record` is that of `launch`."""
        times: list[float] = []
        tensors, scale = Tensors(**self._fields), self._problem.head_dim**-0.5
        with self._context.commands() as commands:
            commands.timestamp()
            for _ in range(repeats):
                record(self._context, commands, self._problem, tensors, scale)
                commands.timestamp()
            commands.then(lambda: times.extend(commands.seconds()))
        return [end - start for start, end in itertools.pairwise(times)]

    def _tensor(self, length: int, heads: int, contents: bytes) -> View:
        problem = self._problem
        row = heads * problem.head_dim
        buffer = self._allocate(problem.batches * length * row * ITEM_BYTES[problem.dtype])
        _fill(self._context, buffer, contents)
        return View(buffer.address, (length * row, row, problem.head_dim, 1))

    def _allocate(self, size: int) -> Buffer:
        buffer = self._context.memory.allocate(size)
        self._stack.callback(self._context.memory.release, buffer)
        return buffer


@functools.cache
def _normal(dtype: str) -> bytes:
    """Normal numbers: those of memory as it is found may cost a GPU less power, or be NaN."""
    import numpy as np

    numbers = np.random.default_rng(0).standard_normal(_NUMBERS, np.float32)
    if dtype == "bfloat16":
        return (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return numbers.astype(dtype).tobytes()


def _fill(context: Context, buffer: Buffer, contents: bytes) -> None:
    """Repeat `contents` over a buffer."""
    size = len(contents)
    with context.commands() as commands:
        staging = commands.keep(context.memory.allocate(size, "staging"))
        ctypes.memmove(staging.pointer, contents, size)
        for start in range(0, buffer.size, size):
            commands.copy(staging, 0, buffer, start, min(size, buffer.size - start))


def _reference(q: Any, k: Any, v: Any, dout: Any, *, causal: bool) -> tuple[Any, ...]:
    """out, lse, dq, dk, dv by the formulas."""
    import numpy as np

    group = q.shape[2] // k.shape[2]
    wide_k, wide_v = (x.repeat(group, axis=2) for x in (k, v))
    scale = q.shape[3] ** -0.5
    scores = np.einsum("bihd,bjhd->bhij", q, wide_k) * scale
    if causal:
        len_q, len_k = scores.shape[2:]
        visible = np.tri(len_q, len_k, len_k - len_q, dtype=bool)
        scores = np.where(visible, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    lse = top + np.log(np.exp(scores - top).sum(-1, keepdims=True))
    weights = np.exp(scores - lse)
    out = np.einsum("bhij,bjhd->bihd", weights, wide_v)
    dweights = np.einsum("bihd,bjhd->bhij", dout, wide_v)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) * scale
    dq = np.einsum("bhij,bjhd->bihd", dscores, wide_k)
    shape = (*k.shape[:3], group, k.shape[3])
    dk, dv = (
        np.einsum("bhij,bihd->bjhd", x, y).reshape(shape).sum(3)
        for x, y in ((dscores, q), (weights, dout))
    )
    return out, lse[..., 0], dq, dk, dv
