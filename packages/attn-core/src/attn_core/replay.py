"""Repeat what a call did: the third call of a kind costs its allocations and its launches.

Between a call and its kernels lies Python that works out checks, strides, tiles and flags from the
signature of the call. It runs once under a `Recording`, which writes down what memory is allocated
and what is launched on which addresses; further calls do just that. A function that does anything
else, such as an operation of torch, runs in full every time.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from attn_core import environment
from attn_core.eager import Observer, is_plain_eager, needs_grad, signature

Start = Callable[[list[int]], None]
_Function = TypeVar("_Function", bound=Callable[..., Any])
_aten = torch.ops.aten
_ALLOCATIONS = frozenset(
    {
        _aten.empty.memory_format,
        _aten.empty_strided.default,
        _aten.empty_like.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    }
)
_MAX_REMEMBERED = 4096
_SEEN, _REFUSED = "seen once", "cannot be repeated"
_memories: list[dict[Hashable, Any]] = []
_thread = threading.local()


def repeatable(function: _Function) -> _Function:
    """Let a public function repeat plain eager calls that need no gradient.

    Parameters
    ----------
    function : callable
        Takes positional arguments, first a tensor. Its result follows from the signature of the
        call, the values of its tensors on the GPU, and the environment variables ``ATTN_BACKEND``
        and ``ATTN_CHECK_VALUES``.

    Returns
    -------
    callable
        The same function. Operators repeat what is differentiated by themselves.
    """
    replayed = Replayed(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if not is_plain_eager(args) or needs_grad(args):
            return function(*args)
        return replayed(args, environment.backend(), environment.checks_values())

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
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._known: dict[Hashable, Any] = {}
        _memories.append(self._known)

    def __call__(self, args: tuple[Any, ...], *context: Hashable) -> Any:
        """Compute the function, which depends on `context` too."""
        is_here = _launches_here(args[0]) and recording() is None
        call = signature(args) if is_here else None
        if call is None:
            return self._function(*args)
        key = (call.key, context)
        known = self._known.get(key)
        if isinstance(known, _Replay):
            return known.run(call.tensors, call.pointers)
        if known is _SEEN:
            return self._record(key, call.tensors, args)
        if known is None:  # most calls of a growing problem are the only ones of their kind
            self._remember(key, _SEEN)
        return self._function(*args)

    def _record(self, key: Hashable, tensors: list[torch.Tensor], args: tuple[Any, ...]) -> Any:
        with Recording(tensors) as recording:
            results = self._function(*args)
        self._remember(key, recording.replay(results) or _REFUSED)
        return results

    def _remember(self, key: Hashable, value: Any) -> None:
        if len(self._known) >= _MAX_REMEMBERED:
            self._known.clear()
        self._known[key] = value


class Recording(Observer):
    """Writes down what happens to `tensors`, the arguments of a call, within a ``with`` block."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._num_arguments = len(tensors)
        self._tensors = list(tensors)  # then those that are allocated
        self._starts: list[tuple[Start, list[_Place]]] = []
        self._is_repeatable = len({tensor.device for tensor in tensors}) == 1

    def __enter__(self) -> Recording:
        _thread.recording = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        _thread.recording = None
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS and result.device == self._tensors[0].device:
            self._tensors.append(result)
        elif not func.is_view:
            self._is_repeatable = False
        return result

    def launched(self, tensors: Sequence[torch.Tensor], start: Start) -> None:
        """Note a launch: ``start`` repeats it, given the addresses of `tensors`."""
        places = [self._place(tensor) for tensor in tensors]
        self._starts.append((start, [place for place in places if place is not None]))

    def refuse(self) -> None:
        """Note something that cannot be repeated."""
        self._is_repeatable = False

    def replay(self, results: Any) -> _Replay | None:
        """Return what repeats the call that gave `results`, or None."""
        is_single = isinstance(results, torch.Tensor)
        wanted = (results,) if is_single else results or ()
        outputs = [output for output in map(self._output, wanted) if output is not None]
        if not self._is_repeatable or len(outputs) < len(wanted):
            return None
        first = self._tensors[0]
        allocated = [_Memory.of(x) for x in self._tensors[self._num_arguments :]]
        pack = _only if is_single else tuple if outputs else _nothing
        return _Replay(first.get_device(), allocated, self._starts, outputs, pack)

    def _place(self, tensor: torch.Tensor) -> _Place | None:
        """Find the memory of a tensor: it, or the only tensor it can be a view of."""
        for number, known in enumerate(self._tensors):
            if known is tensor:
                return _Place(number, 0)
        storage = tensor.untyped_storage().data_ptr()
        numbers = [
            number
            for number, known in enumerate(self._tensors)
            if known.untyped_storage().data_ptr() == storage
        ]
        if len(numbers) != 1 or tensor.numel() == 0:
            self._is_repeatable = False
            return None
        [number] = numbers
        return _Place(number, tensor.data_ptr() - self._tensors[number].data_ptr())

    def _output(self, tensor: Any) -> _Output | None:
        place = self._place(tensor) if isinstance(tensor, torch.Tensor) else None
        if place is None or place.number < self._num_arguments:
            return None
        source = self._tensors[place.number]
        if place.offset == 0 and _Memory.of(source) == _Memory.of(tensor):
            return _Output(place.number, None)
        if tensor.dtype != source.dtype:
            return None
        return _Output(place.number, (tensor.shape, tensor.stride(), tensor.storage_offset()))


class _Place(NamedTuple):
    """An address: so many bytes after the first element of a tensor, by its number."""

    number: int
    offset: int


class _Memory(NamedTuple):
    """What is allocated."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    is_contiguous: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Memory:
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.is_contiguous())


class _Output(NamedTuple):
    """A result: an allocated tensor by its number, or a view of it (shape, stride, offset)."""

    number: int
    view: tuple[Any, ...] | None


class _Replay(NamedTuple):
    """A call that can be repeated."""

    device: int
    allocated: list[_Memory]
    starts: list[tuple[Start, list[_Place]]]
    outputs: list[_Output]
    pack: Callable[[list[torch.Tensor]], Any]

    def run(self, tensors: list[torch.Tensor], pointers: list[int]) -> Any:
        """Repeat it on other tensors, to which it adds those that it allocates."""
        first = tensors[0]
        for shape, stride, dtype, is_contiguous in self.allocated:
            if is_contiguous:
                tensor = first.new_empty(shape, dtype=dtype)
            else:
                tensor = first.new_empty_strided(shape, stride, dtype=dtype)
            tensors.append(tensor)
            pointers.append(tensor.data_ptr())
        for start, places in self.starts:
            start([pointers[number] + offset for number, offset in places])
        return self.pack(
            [
                tensors[number] if view is None else tensors[number].as_strided(*view)
                for number, view in self.outputs
            ]
        )


def recording() -> Recording | None:
    """Return the recording that is under way in this thread."""
    return getattr(_thread, "recording", None)


def _launches_here(tensor: Any) -> bool:
    """Whether a tensor is on the current GPU, where kernels of a replay would start."""
    is_on_gpu = isinstance(tensor, torch.Tensor) and tensor.is_cuda
    return is_on_gpu and tensor.get_device() == torch._C._cuda_getDevice()


def _only(results: list[torch.Tensor]) -> torch.Tensor:
    return results[0]


def _nothing(results: list[torch.Tensor]) -> None:
    return None
