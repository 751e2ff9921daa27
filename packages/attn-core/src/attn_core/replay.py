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
_EMPTY = frozenset(
    {
        _aten.empty.memory_format,
        _aten.empty_strided.default,
        _aten.empty_like.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    }
)
_ZEROS = frozenset({_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default})
_FULL = {_aten.full.default: 1, _aten.full_like.default: 1, _aten.new_full.default: 2}  # the value
_MAX_REMEMBERED = 4096
_SEEN, _REFUSED = "seen once", "cannot be repeated"
_memories: list[dict[Hashable, Any]] = []
_thread = threading.local()


def repeatable(function: _Function) -> _Function:
    """Let a public function repeat plain eager calls that need no gradient.

    Parameters
    ----------
    function : callable
        Takes a tensor first. Its result follows from the signature of the call, the values of its
        tensors on the GPU, and the environment variables ``ATTN_BACKEND`` and
        ``ATTN_CHECK_VALUES``.

    Returns
    -------
    callable
        The same function. Operators repeat what is differentiated by themselves.
    """
    replayed = Replayed(function, _environment)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        if not is_plain_eager(values) or needs_grad(values):
            return function(*args, **kwargs)
        return replayed(*args, **kwargs)

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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the function."""
        values = (*args, *kwargs.values())
        is_here = bool(values) and _launches_here(values[0]) and recording() is None
        call = signature(values) if is_here else None
        if call is None:
            return self._function(*args, **kwargs)
        key = (call.key, *kwargs, self._context and self._context())
        known = self._known.get(key)
        if isinstance(known, _Replay):
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


class Recording(Observer):
    """Writes down what happens to `tensors`, the arguments of a call, within a ``with`` block."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._num_arguments = len(tensors)
        self._tensors = list(tensors)  # then those that are made on the way, and how
        self._makers: list[Callable[[torch.Tensor], torch.Tensor]] = []
        self._is_watching = True
        self._starts: list[tuple[Start, list[_Place]]] = []
        self._launched_on: set[int] = set()
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
        if not self._is_watching or func.is_view:
            return result
        if func in _EMPTY:
            self._made(result, _Memory.of(result).allocate)
        elif func in _ZEROS:
            self._made(result, _Memory.of(result, 0).allocate)
        elif func in _FULL:
            self._made(result, _Memory.of(result, args[_FULL[func]]).allocate)
        else:
            self.refuse()
        return result

    def each_time(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Call `make`, as a replay will, whatever it does."""
        self._is_watching = False
        try:
            tensor = make()
        finally:
            self._is_watching = True
        self._made(tensor, lambda _: make())
        return tensor

    def launched(self, tensors: Sequence[torch.Tensor], start: Start) -> None:
        """Note a launch: ``start`` repeats it, given the addresses of `tensors`."""
        places = [self._place(tensor) for tensor in tensors]
        self._starts.append((start, [place for place in places if place is not None]))
        self._launched_on.update(place.number for place in places if place is not None)

    def refuse(self) -> None:
        """Note something that cannot be repeated."""
        self._is_repeatable = False

    def replay(self, results: Any) -> _Replay | None:
        """Return what repeats the call that gave `results`, or None."""
        is_single = isinstance(results, torch.Tensor)
        wanted = (results,) if is_single else results or ()
        outputs = [output for output in map(self._output, wanted) if output is not None]
        if not self._is_repeatable or not self._starts or len(outputs) < len(wanted):
            return None
        pack = _only if is_single else tuple if outputs else _nothing
        return _Replay(self._makers, self._starts, outputs, pack)

    def _made(self, tensor: torch.Tensor, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if tensor.device != self._tensors[0].device:
            self.refuse()
        self._tensors.append(tensor)
        self._makers.append(make)

    def _place(self, tensor: torch.Tensor) -> _Place | None:
        """Find the memory of a tensor: it, or the only address it can be a view of."""
        for number, known in enumerate(self._tensors):
            if known is tensor:
                return _Place(number, 0)
        storage = tensor.untyped_storage().data_ptr()
        numbers = {
            known.data_ptr(): number
            for number, known in enumerate(self._tensors)
            if known.untyped_storage().data_ptr() == storage
        }
        if len(numbers) != 1 or tensor.numel() == 0:
            self.refuse()
            return None
        [(pointer, number)] = numbers.items()
        return _Place(number, tensor.data_ptr() - pointer)

    def _output(self, tensor: Any) -> _Output | None:
        place = self._place(tensor) if isinstance(tensor, torch.Tensor) else None
        if place is None or place.number < self._num_arguments:
            return None
        if tensor.numel() > 0 and place.number not in self._launched_on:
            return None  # something that was not seen has written it
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
    """What is allocated, and the value it is filled with."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    is_contiguous: bool
    value: float | None

    @classmethod
    def of(cls, x: torch.Tensor, value: float | None = None) -> _Memory:
        return cls(x.shape, x.stride(), x.dtype, x.is_contiguous(), value)

    def allocate(self, like: torch.Tensor) -> torch.Tensor:
        if self.is_contiguous:
            tensor = like.new_empty(self.shape, dtype=self.dtype)
        else:
            tensor = like.new_empty_strided(self.shape, self.stride, dtype=self.dtype)
        return tensor if self.value is None else tensor.fill_(self.value)


class _Output(NamedTuple):
    """A result: an allocated tensor by its number, or a view of it (shape, stride, offset)."""

    number: int
    view: tuple[Any, ...] | None


class _Replay(NamedTuple):
    """A call that can be repeated."""

    makers: list[Callable[[torch.Tensor], torch.Tensor]]
    starts: list[tuple[Start, list[_Place]]]
    outputs: list[_Output]
    pack: Callable[[list[torch.Tensor]], Any]

    def run(self, tensors: list[torch.Tensor], pointers: list[int]) -> Any:
        """Repeat it on other tensors, to which it adds those that it makes."""
        first = tensors[0]
        for make in self.makers:
            tensor = make(first)
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


def each_time(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return ``make()``, which a replay calls too: it follows from more than the call.

    Parameters
    ----------
    make : callable
        Returns memory that kernels work in, such as that of the current stream.

    Returns
    -------
    Tensor
        What `make` returns.
    """
    tape = recording()
    return make() if tape is None else tape.each_time(make)


def recording() -> Recording | None:
    """Return the recording that is under way in this thread."""
    return getattr(_thread, "recording", None)


def _environment() -> Hashable:
    return environment.backend(), environment.checks_values()


def _launches_here(tensor: Any) -> bool:
    """Whether a tensor is on the current GPU, where kernels of a replay would start."""
    is_on_gpu = isinstance(tensor, torch.Tensor) and tensor.is_cuda
    return is_on_gpu and tensor.get_device() == torch._C._cuda_getDevice()


def _only(results: list[torch.Tensor]) -> torch.Tensor:
    return results[0]


def _nothing(results: list[torch.Tensor]) -> None:
    return None
