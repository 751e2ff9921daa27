"""A call that is repeated gives the bits of a call that runs in full."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from attn_core import replay
from attn_core.recording import Replay

_TIMES = 3  # one call to be noticed, one to be recorded, one to be repeated


def assert_repeats(
    function: Callable[..., Any],
    make: Callable[[int], Sequence[Any]],
    *,
    kinds: int = 1,
    passes: int = 1,
) -> None:
    """Check that repeated calls give the bits of full ones, and that there were repeated ones.

    Parameters
    ----------
    function : callable
        Takes what `make` returns. Returns tensors, one or a sequence of them.
    make : callable
        Returns the arguments of call i: the same values every time, in other memory. The calls i,
        ``i + kinds``, ``i + 2 * kinds`` ... are alike.
    kinds : int, default 1
        How many calls in a row are of different kinds.
    passes : int, default 1
        How many functions within `function` are repeated: forward and backward pass are 2.

    Raises
    ------
    AssertionError
        A result differs, or too few calls were repeated.
    """
    calls = range((_TIMES + 1) * kinds)
    expected = []
    for i in calls:
        replay.forget()
        expected.append(_tensors(function(*make(i))))
    replay.forget()
    with counted_replays() as replays:
        for i in calls:
            _assert_same_bits(_tensors(function(*make(i))), expected[i], f"call {i}")
    enough = passes * kinds * (len(calls) // kinds - _TIMES + 1)
    assert len(replays) >= enough, f"{len(replays)} calls were repeated, expected {enough}"


@contextlib.contextmanager
def counted_replays() -> Iterator[list[None]]:
    """Within it, every call that is repeated adds to the list."""
    replays: list[None] = []
    compute = Replay.compute

    def counted(*args: Any) -> Any:
        replays.append(None)
        return compute(*args)

    with mock.patch.object(Replay, "compute", counted):
        yield replays


def _tensors(results: Any) -> list[torch.Tensor]:
    return [results] if isinstance(results, torch.Tensor) else list(results)


def _assert_same_bits(
    actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], where: str
) -> None:
    assert len(actual) == len(expected), where
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        what = f"result {number} of {where}"
        assert (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride()), what
        assert torch.equal(_bits(a), _bits(e)), what


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)
