"""Repeat what a call did: the third call of a kind costs its allocations and its launches.

Between a call and its kernels lies Python that works out checks, strides, tiles and flags from the
signature of the call. It runs once under a `Recording`; further calls repeat what that has written
down. A function that does anything else, such as another operation of torch, runs in full every
time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch

from attn_core import environment, recording
from attn_core.eager import is_plain_eager, signature
from attn_core.recording import DifferentiableReplay, Recording, Replay

_Function = TypeVar("_Function", bound=Callable[..., Any])
_MAX_REMEMBERED = 4096
_SEEN, _REFUSED = "seen once", "cannot be repeated"
_memories: list[dict[Hashable, Any]] = []


def repeatable(function: _Function) -> _Function:
    """Let a public function repeat plain eager calls.

    Parameters
    ----------
    function : callable
        Takes a tensor first. Its result follows from the signature of the call, the values of its
        tensors on the GPU, and the environment variables ``ATTN_BACKEND`` and
        ``ATTN_CHECK_VALUES``.

    Returns
    -------
    callable
        The same function. Calls that autograd differentiates are repeated where it does so in one
        operator, whose tensors are those of the call.
    """
    replayed = Replayed(function, environment.of_a_call)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values()) if kwargs else args
        if not is_plain_eager(values):
            return function(*args, **kwargs)
        return replayed.compute(values, args, kwargs)

    return call  # type: ignore[return-value]


def forget() -> None:
    """Forget every call: backends or tiles have changed."""
    for memory in _memories:
        memory.clear()


class Replayed:
    """A function that launches kernels, repeated where a call is like two earlier ones.

    Parameters
    ----------
    function : callable
        Takes plain arguments, first a tensor. Returns new tensors, one or a tuple, or None.
    context : callable, optional
        Returns what the result follows from beside the arguments.
    """

    def __init__(
        self, function: Callable[..., Any], context: Callable[[], Hashable] | None = None
    ) -> None:
        self._function = function
        self._context = context
        self._known: dict[Hashable, Any] = {}
        _memories.append(self._known)

    def __call__(self, *args: Any) -> Any:
        """Compute the function."""
        return self.compute(args, args, {})

    def compute(
        self, values: tuple[Any, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Compute the function of args and kwargs, whose values are given one after another."""
        is_here = bool(values) and _launches_here(values[0]) and recording.current() is None
        call = signature(values) if is_here else None
        if call is None:
            return self._function(*args, **kwargs)
        key = (call.key, *kwargs, self._context and self._context())
        known = self._known.get(key)
        if isinstance(known, (Replay, DifferentiableReplay)):
            return known.run(call.tensors, call.pointers)
        if known is _SEEN:
            with Recording(call.tensors) as tape:
                results = self._function(*args, **kwargs)
            self._remember(key, tape.replay(results) or _REFUSED)
            return results
        if known is None:  # most calls of a growing problem are the only ones of their kind
            self._remember(key, _SEEN)
        return self._function(*args, **kwargs)

    def _remember(self, key: Hashable, value: Any) -> None:
        if len(self._known) >= _MAX_REMEMBERED:
            self._known.clear()
        self._known[key] = value


def _launches_here(tensor: Any) -> bool:
    """Whether a tensor is on the current GPU, where kernels of a replay would start."""
    is_on_gpu = isinstance(tensor, torch.Tensor) and tensor.is_cuda
    return is_on_gpu and tensor.get_device() == torch._C._cuda_getDevice()
