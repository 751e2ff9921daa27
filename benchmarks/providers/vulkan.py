"""attn-vulkan: softmax attention on a Vulkan device, beside torch and aule on the same GPU.

On a GPU its variants are timed by the timestamps of the device: between a kernel of CUDA and one of
Vulkan it changes its context, which events of CUDA would count. `call` is the call that torch sees.
"""

from __future__ import annotations

import contextlib
import functools
import os
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from attn_core import UnsupportedProblemError, backends
from attn_vulkan import Device, _backend, launch, selftest, variants
from attn_vulkan.problem import Problem
from attn_vulkan.quirks import usable
from attn_vulkan.runtime.context import choose_device, open_context
from benchmarks import problems
from benchmarks.problems import Case
from benchmarks.providers import flash
from benchmarks.providers.base import TIMED, Call, Provider, Subject, leaf, wants_grad
from benchmarks.providers.flash import Inputs

_AULE_HEAD_DIM = 64
_IN_A_ROW = 8

for backend in _backend.backends():  # also where only the source of the distribution is there
    backends.register(backend)


def _ours(variant: str | None, case: Case, inputs: Inputs) -> Call:
    """Inputs lie in memory that both APIs see, as a program that uses Vulkan would put them."""
    from attn_flash import flash_attn_func

    if variant:
        _require(variant, _problem(case))
    if inputs.q.is_cuda:
        _compile_all()
    q, k, v = (_shared(tensor).requires_grad_(wants_grad(case)) for tensor in inputs[:3])

    def forward() -> torch.Tensor:
        out: torch.Tensor = flash_attn_func(
            q, k, v, causal=case["causal"], window_size=case["window"], backend="vulkan"
        )
        return out

    return Call(
        forward,
        (q, k, v),
        _shared(inputs.dout),
        context=functools.partial(_fixed, variant) if variant else contextlib.nullcontext,
        clocks=_clocks(variant, case) if variant and q.is_cuda else {},
    )


class _Timestamps:
    """Times a pass over tensors of its own by the timestamps of the Vulkan device."""

    def __init__(self, problem: Problem, record: Callable[..., Any]) -> None:
        self._problem, self._record = problem, record

    def samples(self, _: Callable[[], object], count: int) -> list[float]:
        """Return the milliseconds of `count` passes."""
        seconds: list[float] = []
        while len(seconds) < count:
            seconds += self._timer.seconds(self._record, min(count - len(seconds), _IN_A_ROW))
        return [second * 1e3 for second in seconds]

    @functools.cached_property
    def _timer(self) -> selftest.Timer:
        timer = selftest.Timer(open_context(), self._problem).__enter__()
        weakref.finalize(self, timer.__exit__)
        return timer


def _clocks(variant: str, case: Case) -> dict[str, _Timestamps]:
    records = {"forward": launch.record_forward, "backward": launch.record_backward}
    return {
        pass_: _Timestamps(_problem(case), functools.partial(record, variant=variant))
        for pass_, record in records.items()
    }


def _problem(case: Case) -> Problem:
    return Problem(
        str(case.dtype).removeprefix("torch."),
        *(case[size] for size in ("B", "M", "N", "H", "H_KV", "D", "D")),
        window=flash.window(case),
        is_aligned=True,
    )


def _require(variant: str, problem: Problem) -> None:
    if variant not in variants.available(_device(), problem.dtype):
        raise UnsupportedProblemError(f"the device has no variant {variant} for {problem.dtype}")
    if not variants.fits_forward(variant, problem):
        raise UnsupportedProblemError(f"{variant} has no shader for heads that share rows")


@functools.cache
def _compile_all() -> None:
    """Compile what the cases of a GPU need, on all cores: one by one they would take minutes."""
    plans = {
        (plan.shader, plan.constants)
        for case in problems.load("attn-vulkan", "gpu")
        for variant in variants.available(_device(), _problem(case).dtype)
        for plan in _plans(variant, case)
    }
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda plan: open_context().pipelines.get(*plan), plans))


def _plans(variant: str, case: Case) -> Iterator[variants.Plan]:
    problem = _problem(case)
    if variants.fits_forward(variant, problem):
        yield variants.forward(_device(), variant, problem, 1.0)
    if "backward" in case.passes and variants.fits_backward(variant, problem):
        yield from variants.backward(_device(), variant, problem)


@contextlib.contextmanager
def _fixed(variant: str) -> Iterator[None]:
    """Run one variant, whatever the package would choose."""
    before = os.environ.get(variants.VARIABLE)
    os.environ[variants.VARIABLE] = variant
    try:
        yield
    finally:
        if before is None:
            del os.environ[variants.VARIABLE]
        else:
            os.environ[variants.VARIABLE] = before


def _shared(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "cpu":
        return leaf(tensor, False)
    from attn_vulkan import cuda

    with torch.no_grad():
        return cuda.empty(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)


def _device() -> Device:
    return usable(choose_device())


def _aule(case: Case, inputs: Inputs) -> Call:
    """Its fast path: inputs lie where its kernels read them, and the output is downloaded."""
    from aule.vulkan import Aule  # type: ignore[import-not-found]

    if case.dtype != torch.float32 or case["D"] > _AULE_HEAD_DIM:
        raise UnsupportedProblemError("its kernels take float32 and head dimensions up to 64")
    if case["H"] != case["H_KV"] or tuple(case["window"]) != (-1, -1):
        raise UnsupportedProblemError("it is compared without shared heads and windows")
    engine = Aule()
    arrays = [x.transpose(1, 2).contiguous().cpu().numpy() for x in inputs[:3]]
    *tensors, out = (engine.tensor(x.shape) for x in (*arrays, arrays[0]))
    for tensor, array in zip(tensors, arrays, strict=True):
        tensor.upload(array)

    def forward() -> torch.Tensor:
        engine.attention_gpu(*tensors, out, causal=case["causal"])
        return torch.from_numpy(out.download()).to(inputs.q.device)

    return Call(forward, (), canonical=lambda tensor: tensor.transpose(1, 2))


SUBJECT = Subject(
    package="attn-vulkan",
    providers=(
        *(
            Provider(
                name,
                functools.partial(_ours, name),
                "ours",
                "attn_vulkan",
                devices=("cpu", "cuda"),
                passes=("forward",) if name == "matrix2" else TIMED,
                graph=False,
            )
            for name in variants.VARIANTS
        ),
        Provider("call", functools.partial(_ours, None), "ours", "attn_vulkan", graph=False),
        Provider("torch", functools.partial(flash._ours, "torch"), devices=("cpu",)),
        Provider("cudnn", functools.partial(flash._sdpa, "CUDNN_ATTENTION")),
        Provider("flash", functools.partial(flash._sdpa, "FLASH_ATTENTION")),
        Provider("efficient", functools.partial(flash._sdpa, "EFFICIENT_ATTENTION")),
        Provider(
            "aule",
            _aule,
            module="aule",
            distribution="aule-attention",
            devices=("cpu", "cuda"),
            passes=("forward",),
        ),
    ),
    make_inputs=flash.make_inputs,
    reference=flash.reference,
    flops=flash.flops,
    traffic=flash.traffic,
    x_axis="M",
)
