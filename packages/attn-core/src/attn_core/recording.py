"""What a call does, written down so that it can be done again.

A `Recording` notes what memory is allocated, what is copied and what is launched on which
addresses. A `Replay` does just that, for the tensors of another call.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from attn_core.eager import Observer

Start = Callable[[list[int]], None]
_Make = Callable[[], torch.Tensor]
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
# Bytes that a call has freed on the way: a replay holds all memory to its end.
_MAX_FREED = 2**27
_OWN_REFERENCES = 4  # to a tensor that a recording alone still knows: those of its own that count
_thread = threading.local()


def current() -> Recording | None:
    """Return the recording that is under way in this thread."""
    return getattr(_thread, "recording", None)


def each_time(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return ``make()``, which a replay calls too: it follows from more than the call.

    Parameters
    ----------
    make : callable
        Returns memory that kernels work in, such as random numbers or that of the current stream.

    Returns
    -------
    Tensor
        What `make` returns.
    """
    tape = None if torch.compiler.is_compiling() else current()
    return make() if tape is None else tape.each_time(make)


class Recording(Observer):
    """Writes down what happens within a ``with`` block to `tensors`, the arguments of a call.

    Memory is known by its number: first the arguments, then what is made on the way.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._num_arguments = len(tensors)
        self._tensors = list(tensors)  # then those that are made on the way, and how
        self._makers: list[_Make] = []
        self._is_watching = True
        self._steps: list[_Launch | _Copy] = []
        self._written: set[int] = set()
        self._operator: tuple[Callable[..., Any], Sequence[Any], Any] | None = None
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
            self._made(result, _allocation(result))
        elif func in _ZEROS:
            self._made(result, _allocation(result, 0))
        elif func in _FULL:
            self._made(result, _allocation(result, args[_FULL[func]]))
        elif func is _aten.copy_.default:
            self._copied(*args[:2])
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
        self._made(tensor, make)
        return tensor

    def launched(self, tensors: Sequence[torch.Tensor], start: Start) -> None:
        """Note a launch: ``start`` repeats it, given the addresses of `tensors`."""
        if not self._is_repeatable:
            return
        places = [place for place in map(self._place, tensors) if place is not None]
        self._steps.append(_Launch(start, places))
        self._written.update(place.number for place in places)

    def differentiated(self, rule: Callable[..., Any], args: Sequence[Any], results: Any) -> None:
        """Note that `results` come of an operator of `args` that autograd differentiates by rule.

        ``rule(compute, *args)`` is what `attn_core.library.Operator` calls.
        """
        if self._operator is not None:
            self.refuse()
        self._operator = rule, args, results

    def refuse(self) -> None:
        """Note something that cannot be repeated."""
        self._is_repeatable = False
        del self._tensors[self._num_arguments :]

    def replay(self, results: Any) -> Replay | DifferentiableReplay | None:
        """Return what repeats the call that gave `results`, or None."""
        if self._operator is None:
            return self._plain_replay(results)
        rule, args, made = self._operator
        forward = self._plain_replay(made)
        numbers = {
            place: self._argument(arg)
            for place, arg in enumerate(args)
            if isinstance(arg, torch.Tensor)
        }
        outputs = [self._output(result, _unpacked(made)) for result in _unpacked(results)]
        if forward is None or None in (*numbers.values(), *outputs):
            return None
        others = [None if isinstance(arg, torch.Tensor) else arg for arg in args]
        return DifferentiableReplay(forward, rule, others, numbers, outputs, _packer(results))

    def _argument(self, tensor: torch.Tensor) -> int | None:
        """Find an operator's argument among those of the call and what was made, in no graph."""
        number = _number(tensor, self._tensors)
        is_made = number is not None and number >= self._num_arguments
        return None if is_made and tensor.requires_grad else number

    def _output(self, result: Any, made: Sequence[torch.Tensor]) -> int | None:
        """Find a result among those of the operator or, after them, an empty one that was made."""
        for number, other in enumerate((*made, *self._tensors[self._num_arguments :])):
            if other is result and (number < len(made) or other.numel() == 0):
                return number
        return None

    def _plain_replay(self, results: Any) -> Replay | None:
        if not self._is_repeatable:
            return None
        wanted = _unpacked(results)
        outputs = [view for view in map(self._view, wanted) if view is not None]
        if not self._is_repeatable or not self._steps or len(outputs) < len(wanted):
            return None
        changes_arguments = any(number < self._num_arguments for number in self._written)
        if not wanted and not changes_arguments:  # what the call is for went unseen
            return None
        if not all(map(self._is_new, wanted, outputs)):
            return None
        return Replay(self._makers, self._steps, outputs, _packer(results))

    def _copied(self, target: torch.Tensor, source: torch.Tensor) -> None:
        to, what = self._view(target), self._view(source)
        if to is None or what is None or not self._is_known(what):
            self.refuse()
            return
        self._steps.append(_Copy(to, what))
        self._written.add(to.number)

    def _made(self, tensor: torch.Tensor, make: _Make) -> None:
        if tensor.device != self._tensors[0].device or self._bytes_freed() > _MAX_FREED:
            self.refuse()
        if self._is_repeatable:
            self._tensors.append(tensor)
            self._makers.append(make)

    def _bytes_freed(self) -> int:
        """Bytes of the memory that is held by this recording alone."""
        made = self._tensors[self._num_arguments :]
        return sum(x.nbytes for x in made if sys.getrefcount(x) <= _OWN_REFERENCES)

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

    def _view(self, tensor: Any) -> _View | None:
        """Describe a tensor as a view of memory that is known."""
        place = self._place(tensor) if isinstance(tensor, torch.Tensor) else None
        if place is None:
            return None
        known = self._tensors[place.number]
        if tensor is known:
            return _View(place.number, None)
        if tensor.dtype != known.dtype:
            return None
        offset = place.offset // tensor.element_size()
        return _View(place.number, (tensor.shape, tensor.stride(), offset))

    def _is_known(self, view: _View) -> bool:
        """Whether memory is an argument's, or what has written it was seen."""
        return view.number < self._num_arguments or view.number in self._written

    def _is_new(self, tensor: torch.Tensor, view: _View) -> bool:
        """Whether memory was made on the way, and what has written it was seen."""
        is_written = view.number in self._written or tensor.numel() == 0
        return view.number >= self._num_arguments and is_written


class _Place(NamedTuple):
    """An address: so many bytes after the first element of a tensor, by its number."""

    number: int
    offset: int


class _View(NamedTuple):
    """A tensor by its number, or a view of it: shape, strides, and the elements before it."""

    number: int
    layout: tuple[torch.Size, tuple[int, ...], int] | None

    def of(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        tensor = tensors[self.number]
        if self.layout is None:
            return tensor
        shape, stride, offset = self.layout
        return tensor.as_strided(shape, stride, tensor.storage_offset() + offset)


class _Launch(NamedTuple):
    """The launch of a kernel."""

    start: Start
    places: list[_Place]

    def run(self, _: Sequence[torch.Tensor], pointers: Sequence[int]) -> None:
        self.start([pointers[number] + offset for number, offset in self.places])


class _Copy(NamedTuple):
    """A copy from one tensor to another."""

    target: _View
    source: _View

    def run(self, tensors: Sequence[torch.Tensor], _: Sequence[int]) -> None:
        self.target.of(tensors).copy_(self.source.of(tensors))


class Replay(NamedTuple):
    """A call that can be repeated."""

    makers: list[_Make]
    steps: list[_Launch | _Copy]
    outputs: list[_View]
    pack: Callable[[list[torch.Tensor]], Any]

    def run(self, tensors: list[torch.Tensor], pointers: list[int]) -> Any:
        """Repeat it on other tensors, to which it adds those that it makes."""
        self.allocate(tensors, pointers)
        return self.compute(tensors, pointers)

    def allocate(self, tensors: list[torch.Tensor], pointers: list[int]) -> None:
        """Add the memory that is made on the way."""
        for make in self.makers:
            tensor = make()
            tensors.append(tensor)
            pointers.append(tensor.data_ptr())

    def compute(self, tensors: Sequence[torch.Tensor], pointers: Sequence[int]) -> Any:
        """Launch and copy what fills it, and return the results."""
        for step in self.steps:
            step.run(tensors, pointers)
        return self.pack([view.of(tensors) for view in self.outputs])


class DifferentiableReplay(NamedTuple):
    """A call of one operator that autograd differentiates."""

    forward: Replay
    rule: Callable[..., Any]
    others: list[Any]  # the operator's arguments, with gaps for tensors
    numbers: dict[int, Any]  # of the tensors that belong there
    outputs: list[Any]  # numbers of its results and, after them, of what was made
    pack: Callable[[list[torch.Tensor]], Any]

    def run(self, tensors: list[torch.Tensor], pointers: list[int]) -> Any:
        """Repeat it on other tensors, to which it adds those that it makes."""
        args, num_arguments = self.others.copy(), len(tensors)
        self.forward.allocate(tensors, pointers)
        for place, number in self.numbers.items():
            args[place] = tensors[number]
        results = self.rule(lambda *_: self.forward.compute(tensors, pointers), *args)
        found = [*_unpacked(results), *tensors[num_arguments:]]
        return self.pack([found[number] for number in self.outputs])


def _allocation(x: torch.Tensor, value: float | None = None) -> _Make:
    """Return what makes memory like that of x, filled with a value."""
    shape, stride, dtype, device = x.shape, x.stride(), x.dtype, x.device

    def allocate() -> torch.Tensor:  # in half the time that new_empty takes
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)

    return allocate if value is None else lambda: allocate().fill_(value)


def _number(tensor: torch.Tensor, tensors: Sequence[torch.Tensor]) -> int | None:
    """Find a tensor among others, as an object; None where autograd tells apart what is found."""
    numbers = [number for number, other in enumerate(tensors) if other is tensor]
    is_clear = len(numbers) == 1 or (numbers and not tensor.requires_grad)
    return numbers[0] if is_clear else None


def _unpacked(results: Any) -> Sequence[Any]:
    return (results,) if isinstance(results, torch.Tensor) else results or ()


def _packer(results: Any) -> Callable[[list[torch.Tensor]], Any]:
    """Return what gives tensors the form of `results`."""
    if isinstance(results, torch.Tensor):
        return itemgetter(0)
    return tuple if results else lambda _: None
