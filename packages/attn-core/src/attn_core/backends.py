"""Which backend runs a problem, and why each other one does not.

A backend implements some operators. Operators and backends know each other by name alone:
``"attn_flash::attention"`` is an operator, ``"triton"`` a backend. By convention the gradient of
an operator is the operator ``<name>_backward``.

Packages register their own backends when they are imported. Other distributions add theirs
through the entry-point group ``attn_core.backends``: each entry point names a function that takes
nothing and returns an iterable of `Backend`.

The environment variable ``ATTN_BACKEND`` takes the place of ``"auto"`` in every call (see
`attn_core.environment`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from attn_core import environment, replay
from attn_core.errors import BackendUnavailableError, UnsupportedProblemError

AUTO = "auto"
ENTRY_POINT_GROUP = "attn_core.backends"


class Problem(Hashable, Protocol):
    """What every operator's frozen Problem has, whatever else it holds."""

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""

    @property
    def needs_grad(self) -> bool:
        """Whether a backward pass will be asked for."""


@dataclass(frozen=True)
class Backend:
    """One way to compute some operators.

    Attributes
    ----------
    name : str
        What a caller writes in ``backend=``.
    ops : mapping of str to str
        Operator name to ``"module:function"``. The module is imported at the first call, so
        registering a backend imports no GPU library.
    priority : int
        Among backends that support a problem, ``"auto"`` takes the highest.
    supports : callable
        ``supports(op, problem)`` returns None where the backend computes this problem, else one
        sentence that says why not.
    """

    name: str
    ops: Mapping[str, str]
    priority: int
    supports: Callable[[str, Any], str | None]


@dataclass(frozen=True)
class Verdict:
    """What one backend says to one problem: `reason` is None where it can run it."""

    backend: str
    reason: str | None
    chosen: bool


_backends: dict[tuple[str, str], Backend] = {}
_examples: dict[str, Callable[[torch.device], Problem]] = {}
_plugins_loaded = False
_plugins_lock = threading.Lock()
_thread = threading.local()


def register(backend: Backend) -> None:
    """Make a backend known for each of its operators; the last one of a name wins.

    Parameters
    ----------
    backend : Backend
        What `explain` and `resolve` consider from now on.
    """
    for op in backend.ops:
        _backends[op, backend.name] = backend
    _resolve.cache_clear()
    implementation.cache_clear()
    replay.forget()


def register_example(op: str, example: Callable[[torch.device], Problem]) -> None:
    """Name a typical problem of `op`, for ``python -m attn_core`` to explain."""
    _examples[op] = example


def operators() -> dict[str, Callable[[torch.device], Problem]]:
    """Operators of the imported packages, each with the maker of its typical problem."""
    return dict(_examples)


def registered() -> dict[str, list[str]]:
    """Every known backend by name, with the operators it implements."""
    _load_plugins()
    ops: dict[str, list[str]] = {}
    for op, name in list(_backends):
        ops.setdefault(name, []).append(op)
    return ops


def available(op: str) -> list[str]:
    """Name the backends that implement an operator, whatever problem they can run.

    Parameters
    ----------
    op : str
        Operator name, such as ``"attn_flash::attention"``.

    Returns
    -------
    list of str
        The preferred backend first; empty where the operator is unknown.
    """
    return [backend.name for backend in _candidates(op)]


def runnable(op: str) -> list[str]:
    """Name the backends that run an operator's typical problem on this machine.

    Parameters
    ----------
    op : str
        Operator name.

    Returns
    -------
    list of str
        The preferred backend first; those of the GPU where there is one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    verdicts = explain(op, operators()[op](device))
    return [verdict.backend for verdict in verdicts if verdict.reason is None]


def explain(op: str, problem: Problem, requested: str = AUTO) -> list[Verdict]:
    """Say for every backend of `op` whether it can run `problem` and which one would.

    Parameters
    ----------
    op : str
        Operator name, such as ``"attn_flash::attention"``.
    problem : Problem
        The operator's frozen problem.
    requested : str, default "auto"
        What the call would pass as ``backend=``.

    Returns
    -------
    list of Verdict
        One for each backend, the preferred first; at most one is chosen.
    """
    try:
        chosen = resolve(op, problem, requested)
    except (UnsupportedProblemError, BackendUnavailableError):
        chosen = ""
    return [
        Verdict(backend.name, _refusal(backend, op, problem), backend.name == chosen)
        for backend in _candidates(op)
    ]


def resolve(op: str, problem: Problem, requested: str = AUTO) -> str:
    """Choose the backend that runs `problem`.

    Parameters
    ----------
    op : str
        Operator name.
    problem : Problem
        The operator's frozen problem.
    requested : str, default "auto"
        A backend's name, which is then used or refused but never replaced, or ``"auto"``.

    Returns
    -------
    str
        The backend's name.

    Raises
    ------
    ValueError
        `requested` is no string.
    BackendUnavailableError
        The named backend does not exist for this operator.
    UnsupportedProblemError
        The named backend, or every backend, refuses the problem; the message has each reason.
    """
    if not isinstance(requested, str):
        raise ValueError(f"backend must be the name of one, got {requested!r}")
    if requested == AUTO:
        requested = environment.backend()
    if torch.compiler.is_compiling():
        return requested  # sizes may be symbolic here; the operator resolves when it runs
    try:
        return _resolve(op, problem, requested)
    except TypeError:
        if _has_hash(problem):
            raise
        return requested  # sizes that a tracer leaves open have no hash


def require(op: str, problem: Problem, name: str) -> None:
    """Check that backend `name` runs `problem`, whose sizes may be symbolic.

    A graph that is traced resolves nothing; the fake of an operator calls this, so that a backend
    that was named and cannot run it is refused before the graph is.

    Parameters
    ----------
    op : str
        Operator name.
    problem : Problem
        The operator's problem.
    name : str
        A backend's name, or ``"auto"``, which leaves the choice to the operator when it runs.

    Raises
    ------
    BackendUnavailableError
        The backend does not exist for this operator.
    UnsupportedProblemError
        The backend refuses the problem.
    """
    if name == AUTO:
        return
    reason = _refusal(_named(op, name), op, problem)
    if reason is not None:
        raise _unsupported(op, name, [f"{name}: {reason}"])


@functools.lru_cache(maxsize=4096)
def _resolve(op: str, problem: Problem, requested: str) -> str:
    candidates = _candidates(op)
    if requested != AUTO:
        candidates = [backend for backend in candidates if backend.name == requested]
        if not candidates:
            origin = f" from {environment.BACKEND}" if requested == environment.backend() else ""
            raise BackendUnavailableError(
                f"backend must be one of {[AUTO, *available(op)]} for {op}, got {requested!r}"
                f"{origin}"
            )
    refusals = []
    for backend in candidates:
        reason = _refusal(backend, op, problem)
        if reason is None:
            return backend.name
        refusals.append(f"{backend.name}: {reason}")
    raise _unsupported(op, requested, refusals)


def _has_hash(problem: Problem) -> bool:
    try:
        hash(problem)
    except TypeError:
        return False
    return True


def _unsupported(op: str, requested: str, refusals: list[str]) -> UnsupportedProblemError:
    who = "no backend runs" if requested == AUTO else "the backend that was named does not run"
    return UnsupportedProblemError(f"{who} this {op} problem ({'; '.join(refusals)})")


@functools.lru_cache(maxsize=None)
def implementation(op: str, name: str) -> Callable[..., Any]:
    """The function by which backend `name` computes `op`, imported on first use."""
    module, function = _named(op, name).ops[op].split(":")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def _named(op: str, name: str) -> Backend:
    _load_plugins()
    backend = _backends.get((op, name))
    if backend is None:
        raise BackendUnavailableError(
            f"backend must be one of {available(op)} for {op}, got {name!r}"
        )
    return backend


def _candidates(op: str) -> list[Backend]:
    _load_plugins()
    found = [backend for (name, _), backend in list(_backends.items()) if name == op]
    return sorted(found, key=lambda backend: -backend.priority)


def _refusal(backend: Backend, op: str, problem: Problem) -> str | None:
    if problem.needs_grad and f"{op}_backward" not in backend.ops:
        return "it has no backward pass"
    return backend.supports(op, problem)


def _load_plugins() -> None:
    """Register what other distributions bring; threads that come meanwhile wait for all of it."""
    global _plugins_loaded
    if _plugins_loaded or getattr(_thread, "is_loading", False):  # a plug-in may ask, too
        return
    with _plugins_lock:
        if _plugins_loaded:
            return
        _thread.is_loading = True
        try:
            for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
                _load_plugin(entry_point)
        finally:
            _thread.is_loading = False
            _plugins_loaded = True


def _load_plugin(entry_point: importlib.metadata.EntryPoint) -> None:
    try:
        plugin: Iterable[Backend] = entry_point.load()()
        for backend in plugin:
            register(backend)
    except Exception as error:  # a broken plug-in must not take the others down
        warnings.warn(f"attention backend {entry_point.name!r} is broken: {error}", stacklevel=2)
