"""The words every operator's providers share."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from attn_core import BackendUnavailableError
from benchmarks.problems import Case

TIMED = ("forward", "backward")
GRAPH = "graph"  # both passes, replayed from one CUDA graph
HOST = ("host", "host_grad")
PASSES = (*TIMED, GRAPH, *HOST)
Tasks = Mapping[Hashable, Callable[[Any], object]]


@dataclass
class Call:
    """One case in the hands of one provider.

    Attributes
    ----------
    forward : callable
        Takes nothing, returns the output in the provider's own layout.
    inputs : tuple of Tensor
        Leaves whose gradients the backward pass is asked for, in the order of the reference's.
    grad_out : Tensor, optional
        Gradient of the output, in the provider's layout.
    canonical : callable
        A view of an output or gradient in the reference's layout.
    context : callable
        Makes the context manager under which `forward` and its backward pass run.
    clocks : mapping
        By pass, the clock of a device of its own; `timing.OtherClock`.
    """

    forward: Callable[[], torch.Tensor]
    inputs: tuple[torch.Tensor, ...] = ()
    grad_out: torch.Tensor | None = None
    canonical: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    clocks: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Provider:
    """One implementation.

    Attributes
    ----------
    name : str
        Column of the tables.
    prepare : callable
        ``prepare(case, inputs)`` returns a `Call`, or raises UnsupportedProblemError for a case it
        does not compute and BackendUnavailableError for what it needs and does not find.
    kind : {"peer", "ours", "bound"}
        A bound is shown but is no peer: it does less than the operator.
    module, distribution : str
        What has to be importable, and the name under which its version is found.
    devices, passes : tuple of str
        Where and for what it is measured.
    optional, headline_only : bool
        Measured only when asked for by name; or else only in headline cases.
    graph : bool
        Whether it can be captured in a CUDA graph.
    compiles : callable, optional
        ``compiles(case)`` returns what can be compiled ahead for a case, part by part: each is a
        function of the inputs, under a name that cases share where one compilation serves them.
        Without it, one run of the case compiles all there is.
    kind_of : callable
        ``kind_of(case)`` is the same for cases of which one run compiles the kernels of all.
    """

    name: str
    prepare: Callable[[Case, Any], Call]
    kind: str = "peer"
    module: str = ""
    distribution: str = ""
    devices: tuple[str, ...] = ("cuda",)
    passes: tuple[str, ...] = PASSES
    optional: bool = False
    headline_only: bool = False
    graph: bool = True
    compiles: Callable[[Case], Tasks] | None = None
    kind_of: Callable[[Case], Hashable] = lambda case: case.id

    def require(self) -> None:
        """Import what the provider needs; BackendUnavailableError if it is not installed."""
        if not self.module:
            return
        try:
            importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name is None or not self.module.startswith(error.name):
                raise
            raise BackendUnavailableError(f"{self.module} is not installed") from error

    def is_usual(self, case: Case) -> bool:
        """Whether a case is measured without asking for this provider."""
        return not self.optional and (case.headline or not self.headline_only)

    def tasks(self, case: Case) -> Tasks:
        """Return what compiles all kernels of a case."""
        if self.compiles is None:
            return {(self.name, self.kind_of(case)): functools.partial(self._run, case)}
        return self.compiles(case)

    def _run(self, case: Case, inputs: Any) -> None:
        call = self.prepare(case, inputs)
        with torch.set_grad_enabled(wants_grad(case)), call.context():
            out = call.forward()
        if "backward" in case.passes:
            torch.autograd.grad(out, call.inputs, call.grad_out)

    def version(self) -> str | None:
        """Return the installed version, None where there is none."""
        try:
            return importlib.metadata.version(self.distribution) if self.distribution else None
        except importlib.metadata.PackageNotFoundError:
            return None


@dataclass
class Expected:
    """What a provider has to give, on a part of the problem, in float64.

    `part` cuts that part out of a tensor in the canonical layout; `limit` is the largest relative
    error, None where the reference is too ill-conditioned to judge by.
    """

    name: str
    value: torch.Tensor
    part: Callable[[torch.Tensor], torch.Tensor]
    limit: float | None


class Reference(Protocol):
    """Computes what is expected: the output first, then, if asked for, the gradients."""

    def __call__(self, case: Case, inputs: Any, gradients: bool) -> list[Expected]:
        """Compute in float64."""
        ...


@dataclass(frozen=True)
class Subject:
    """All there is to know about one package to measure it."""

    package: str
    providers: Sequence[Provider]
    make_inputs: Callable[[Case, torch.device], Any]
    reference: Reference
    flops: Callable[[Case, str], float | None]
    traffic: Callable[[Case, str], float]
    x_axis: str
    graph: bool = False  # time the replay of a CUDA graph
    memory: bool = False  # measure what a call allocates, too
    floor: Callable[[Case, str], float | None] = lambda case, pass_: None  # ms, of the hardware
    warm: bool = False  # worth compiling ahead of the measurement
    warming_share: float = 0.35  # of the time budget

    def chosen(self, case: Case, device: torch.device, names: Sequence[str] = ()) -> list[Provider]:
        """Return the providers of one case: those named, else the usual ones."""
        return [
            provider
            for provider in self.providers
            if device.type in provider.devices
            and set(case.passes) & set(provider.passes)
            and (provider.name in names if names else provider.is_usual(case))
        ]


def nothing_compiled(case: Case) -> Tasks:
    """Return no task: for providers whose kernels come compiled, or that have none."""
    return {}


def error_limit(dtype: torch.dtype) -> float:
    """Relative error, in the Frobenius norm, that a right forward pass stays below."""
    limits = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-3}
    return limits[dtype]


def leaf(tensor: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    """Return a dense tensor of the same values that autograd sees as an input."""
    return tensor.detach().contiguous().requires_grad_(requires_grad)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile for one case.

    Past its recompile limit dynamo would run the function as it is; a fresh start keeps it from
    that, and fullgraph makes it raise. The backward pass is repeated on one graph, so it must not
    reuse the memory of what the forward pass saved.
    """
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, fullgraph=True, dynamic=False)


def wants_grad(case: Case) -> bool:
    """Whether the case is one of training."""
    return "backward" in case.passes or "host_grad" in case.passes
