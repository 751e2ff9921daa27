"""Run Gluon kernels for Hopper on a CPU, so that errors of their protocol show without a GPU.

The source of the kernels runs as it is, on stand-ins for Gluon that compute with NumPy. Programs
start in a random order, some at once; each partition of a program is a thread that now and then
falls behind. Barriers count arrivals, bytes and phases as the hardware does. Whatever the hardware
may delay is delayed: copies land late in memory that holds NaN until then, products read their
operands and stores leave shared memory only when somebody waits for them, and what leaves it is in
global memory only when somebody waits for that. A missing wait gives wrong numbers; a missing
arrival, or a missing fence between threads and the units that copy and multiply, a `ProtocolError`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
import random
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

_PATIENCE = 20.0  # seconds a thread waits before it is stuck
_LATENESS = 0.001  # seconds, at most, of a copy or of a thread
_AT_ONCE = 3  # programs
_WARP = 32
_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class ProtocolError(AssertionError):
    """A thread waited in vain, or arrived where nobody expected it."""


class _Program:
    """What the partitions of one program share."""

    def __init__(self, number: int, count: int) -> None:
        self.number = number
        self.count = count
        self.named: dict[int, list[int]] = {}  # threads at a named barrier, how often it opened
        self.unfenced: list[tuple[str, Any]] = []  # memory, and the partition that wrote it


class _Partition(threading.local):
    """What the threads of one partition know."""

    name = "the copy engine"
    program: _Program
    threads: int
    products: list[Callable[[], None]]
    reads: list[Callable[[], Callable[[], None]]]  # of stores, each of which returns its write
    writes: list[Callable[[], None]]

    def enter(self, program: _Program, name: str, warps: int) -> None:
        self.program, self.name, self.threads = program, name, warps * _WARP
        self.products, self.reads, self.writes = [], [], []


_here = _Partition()
_changed = threading.Condition()
_late_writes: list[Callable[[], None]] = []  # that only the end of the launch waits for
_failed = threading.Event()  # a thread of this launch has raised: nobody needs to go on


class _Abandoned(BaseException):
    """Another thread has failed."""


def _dawdle() -> None:
    """Let other threads go ahead, now and then."""
    if _failed.is_set():
        raise _Abandoned
    if random.random() < 0.05:
        time.sleep(random.random() * _LATENESS)


def _wait(condition: Callable[[], bool], what: str) -> None:
    _dawdle()
    with _changed:
        if not _changed.wait_for(lambda: condition() or _failed.is_set(), _PATIENCE):
            raise ProtocolError(f"{_here.name} waits in vain for {what}")
    _dawdle()


def _array(value: Any) -> Any:
    return value.array if isinstance(value, (_Tensor, _Memory)) else value


def round_to(array: Any, dtype: str) -> Any:
    """Round float32 to bfloat16 or float16, kept in float32."""
    array = np.ascontiguousarray(array, np.float32)
    if dtype == "fp16":
        return array.astype(np.float16).astype(np.float32)
    if dtype != "bf16":
        return array
    bits = array.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isfinite(array), rounded, array)


class _Tensor:
    """A tensor in registers."""

    def __init__(self, array: Any, dtype: str = "fp32") -> None:
        self.array = np.asarray(array)
        self.dtype = dtype
        self.type = types.SimpleNamespace(layout=None)

    @property
    def shape(self) -> list[int]:
        return list(self.array.shape)

    def to(self, dtype: str) -> _Tensor:
        return _Tensor(round_to(self.array, dtype), dtype)

    def __neg__(self) -> _Tensor:
        return _Tensor(-self.array)


def _binary(function: Callable[[Any, Any], Any], swap: bool = False) -> Any:
    def compute(self: _Tensor, other: Any) -> _Tensor:
        a, b = _array(self), _array(other)
        with np.errstate(divide="ignore", invalid="ignore"):
            result = np.asarray(function(b, a) if swap else function(a, b))
        return _Tensor(result.astype(np.float32) if result.dtype == np.float64 else result)

    return compute


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "rshift", "lshift"):
    _function = getattr(operator, _name if hasattr(operator, _name) else f"{_name}_")
    setattr(_Tensor, f"__{_name}__", _binary(_function))
    setattr(_Tensor, f"__r{_name}__", _binary(_function, swap=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(_Tensor, f"__{_name}__", _binary(getattr(operator, _name)))


class _Memory:
    """A piece of shared memory."""

    def __init__(self, array: Any, dtype: str) -> None:
        self.array = array
        self.dtype = dtype

    @property
    def shape(self) -> list[int]:
        return list(self.array.shape)

    def index(self, i: Any) -> _Memory:
        return _Memory(self.array[int(_array(i))], self.dtype)

    def slice(self, start: int, length: int) -> _Memory:
        return _Memory(self.array[start : start + length], self.dtype)

    def permute(self, order: Sequence[int]) -> _Memory:
        return _Memory(self.array.transpose(order), self.dtype)

    def _reinterpret(self, dtype: str, shape: Sequence[int], _layout: Any) -> _Memory:
        if len(shape) == 3 and self.array.ndim == 2 and shape[2] < self.array.shape[1]:
            panels, rows, width = shape  # a swizzled tile as panels of 64 columns
            array = self.array.reshape(rows, panels, width).transpose(1, 0, 2)
        else:
            array = self.array.reshape(shape)
        if not np.shares_memory(array, self.array):
            raise ProtocolError("a tile that is not contiguous was reinterpreted")
        return _Memory(array, dtype)

    def store(self, value: _Tensor) -> None:
        if self.array.shape != value.array.shape:
            raise ProtocolError(f"stored {value.array.shape} into {self.array.shape}")
        self.array[...] = value.array
        with _changed:
            _here.program.unfenced.append((_here.name, self.array))

    def load(self, _layout: Any) -> _Tensor:
        return _Tensor(self.array.copy(), self.dtype)


def _fence() -> None:
    """Let the units that copy and multiply see what this partition wrote."""
    program = _here.program
    with _changed:
        program.unfenced = [entry for entry in program.unfenced if entry[0] != _here.name]


def _require_fenced(memory: Any) -> None:
    with _changed:
        for name, array in _here.program.unfenced:
            if isinstance(memory, _Memory) and np.may_share_memory(array, memory.array):
                raise ProtocolError(f"{_here.name} hands over what {name} wrote without a fence")


class _Barrier:
    """An mbarrier: it opens when all have arrived and all bytes have landed."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def advance(self, arrivals: int, landed: int) -> None:
        with _changed:
            if arrivals > self.pending:
                raise ProtocolError(f"{_here.name} arrives at a barrier that is complete")
            self.pending -= arrivals
            self.bytes -= landed
            if self.pending == 0 and self.bytes == 0:
                self.phase ^= 1
                self.pending = self.count
                _changed.notify_all()


class _Barriers:
    """An array of mbarriers."""

    def __init__(self, count: int) -> None:
        self.all = [_Barrier() for _ in range(count)]

    def index(self, i: Any) -> _Barrier:
        return self.all[int(_array(i))]


def _one(barrier: _Barrier | _Barriers) -> _Barrier:
    return barrier.all[0] if isinstance(barrier, _Barriers) else barrier


class _Mbarrier:
    @staticmethod
    def MBarrierLayout() -> str:  # noqa: N802 - Gluon's name
        return "mbarrier"

    @staticmethod
    def init(barrier: Any, count: int) -> None:
        barrier = _one(barrier)
        barrier.count = barrier.pending = count

    @staticmethod
    def expect(barrier: Any, size: int, pred: Any = True) -> None:
        _dawdle()
        if _array(pred):
            _one(barrier).advance(1, -size)

    @staticmethod
    def arrive(barrier: Any, count: int = 1, pred: Any = True) -> None:
        _dawdle()
        if _array(pred):
            _one(barrier).advance(count, 0)

    @staticmethod
    def wait(barrier: Any, phase: Any, pred: Any = True) -> None:
        barrier = _one(barrier)
        if _array(pred):
            _wait(lambda: barrier.phase != int(_array(phase)), f"phase {phase} of an mbarrier")


class Descriptor:
    """A tensor in global memory, as the copy engine sees it: tiles are clipped at its ends.

    Offsets have 64 bits, as addresses do, so strides may rely on what is lost in them.
    """

    def __init__(
        self,
        base: torch.Tensor,
        shape: Sequence[int],
        strides: Sequence[int],
        block_shape: Sequence[int],
        layout: Any = None,
    ) -> None:
        first = base.storage_offset()
        size = base.untyped_storage().nbytes() // base.element_size() - first
        self.flat = base.as_strided((size,), (1,), first)
        self.shape = list(shape)
        self.strides = list(strides)
        self.block_shape = list(block_shape)
        self.dtype = _DTYPES[base.dtype]
        self.layout = layout
        size = int(np.prod(block_shape)) * base.element_size()
        self.block_type = types.SimpleNamespace(nbytes=size)

    def pieces(self, coord: Sequence[Any]) -> tuple[Any, Any]:
        """Offsets of the tensor and slices of the tile that belong together."""
        start = [int(_array(x)) for x in coord]
        parts = [
            slice(max(0, -first), max(0, -first, min(block, length - first)))
            for first, block, length in zip(start, self.block_shape, self.shape, strict=True)
        ]
        sizes = [part.stop - part.start for part in parts]
        offsets = np.zeros(sizes, np.int64)
        for axis, (first, part, stride) in enumerate(zip(start, parts, self.strides, strict=True)):
            places = np.arange(part.start, part.stop) + first
            along = places * np.full(len(places), stride)
            offsets += along.reshape([-1 if axis == i else 1 for i in range(len(sizes))])
        if offsets.size and not 0 <= offsets.min() <= offsets.max() < len(self.flat):
            raise ProtocolError(f"a tile at {start} leaves the memory of its tensor")
        return torch.from_numpy(offsets), tuple(parts)


class _Tma:
    @staticmethod
    def async_copy_global_to_shared(
        desc: Descriptor, coord: Any, barrier: Any, tile: _Memory, pred: Any = True
    ) -> None:
        if not _array(pred):
            return
        source, target = desc.pieces(coord)
        barrier = _one(barrier)

        def land() -> None:
            tile.array[...] = 0.0
            tile.array[target] = desc.flat[source].float().numpy()
            barrier.advance(0, desc.block_type.nbytes)

        tile.array[...] = np.nan
        threading.Timer(random.random() * _LATENESS, land).start()

    @staticmethod
    def async_copy_shared_to_global(desc: Descriptor, coord: Any, tile: _Memory) -> None:
        _start_store(desc, coord, tile, torch.Tensor.__setitem__)

    @staticmethod
    def store_wait(pendings: int) -> None:
        while len(_here.reads) > pendings:
            _here.writes.append(_here.reads.pop(0)())


def reduce_add(desc: Descriptor, coord: Any, tile: _Memory) -> None:
    """Stand in for `primitives.reduce_add`."""
    _start_store(desc, coord, tile, _add)


def _add(flat: torch.Tensor, offsets: torch.Tensor, values: torch.Tensor) -> None:
    flat[offsets] += values


def _start_store(desc: Descriptor, coord: Any, tile: _Memory, put: Callable[..., Any]) -> None:
    _require_fenced(tile)
    if min(int(_array(x)) for x in coord) < 0:
        raise ProtocolError(f"a tile is written from {coord} on: only reads may start before 0")
    target, source = desc.pieces(coord)

    def read() -> Callable[[], None]:
        values = torch.from_numpy(tile.array[source].copy())
        return lambda: put(desc.flat, target, values.to(desc.flat.dtype))

    _here.reads.append(read)


def _finish_writes() -> None:
    """Let global memory have all that has left shared memory."""
    with _changed:
        for write in _here.writes:
            write()
        _here.writes.clear()


def _product(a: Any, b: Any, acc: Any, use_acc: Any = True, is_async: bool = False) -> _Tensor:
    _require_fenced(a)
    _require_fenced(b)
    result = _Tensor(np.full(acc.array.shape, np.nan, np.float32))

    def compute() -> None:
        product = (_array(a).astype(np.float32) @ _array(b).astype(np.float32)).astype(np.float32)
        result.array = product + acc.array if _array(use_acc) else product

    _here.products.append(compute)
    if not is_async:
        _await_products(0, (result,))
    return result


def _await_products(pendings: int, deps: tuple[Any, ...]) -> Any:
    _dawdle()
    while len(_here.products) > pendings:
        _here.products.pop(0)()
    return deps[0] if len(deps) == 1 else deps


class Pointer:
    """A pointer to numbers in global memory."""

    def __init__(self, flat: torch.Tensor, offset: Any = 0) -> None:
        self.flat = flat
        self.offset = offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.flat, self.offset + _array(offset))


def _load(pointer: Pointer, mask: Any = None, other: Any = 0, volatile: bool = False) -> Any:
    _dawdle()
    if np.ndim(pointer.offset) == 0:
        if mask is not None and not _array(mask):
            return other
        return int(pointer.flat[int(pointer.offset)])
    is_read = np.broadcast_to(True if mask is None else _array(mask), pointer.offset.shape)
    found = pointer.flat[torch.from_numpy(pointer.offset[is_read])]
    found = found.float() if found.is_floating_point() else found
    values = np.full(pointer.offset.shape, other, found.numpy().dtype)
    values[is_read] = found.numpy()
    return _Tensor(values)


def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    if np.ndim(pointer.offset) == 0:
        pointer.flat[int(pointer.offset)] = value
        return
    mask = np.broadcast_to(True if mask is None else _array(mask), pointer.offset.shape)
    values = torch.from_numpy(np.ascontiguousarray(_array(value)[mask]))
    pointer.flat[torch.from_numpy(pointer.offset[mask])] = values.to(pointer.flat.dtype)


def _atomic_add(pointer: Pointer, value: int, sem: str | None = None) -> int:
    with _changed:
        before = int(pointer.flat[int(pointer.offset)])
        pointer.flat[int(pointer.offset)] += value
        return before


_INSTRUCTIONS = {"ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal}


def claim(pointer: Pointer) -> int:
    """Stand in for `primitives.claim`."""
    place = int(pointer.offset)
    with _changed:
        state = int(pointer.flat[place])
        if state == 0:
            pointer.flat[place] = 1
    if state == 1:
        _wait(lambda: int(pointer.flat[place]) == 2, "what another program has claimed")
    return 0 if state == 0 else 2


def publish(pointer: Pointer) -> None:
    """Stand in for `primitives.publish`."""
    _Tma.store_wait(0)
    _finish_writes()
    with _changed:
        pointer.flat[int(pointer.offset)] = 2
        _changed.notify_all()


def wait_until_set(pointer: Pointer) -> None:
    """Stand in for `primitives.wait_until_set`."""
    while not int(pointer.flat[int(pointer.offset)]):
        _dawdle()


def _raise_pivots(pivot: _Tensor, top: _Tensor) -> tuple[_Tensor, _Tensor]:
    """Raise rows' pivots that a number passes by more than 8; return the factors, too."""
    old, highest = pivot.array, top.array.max(axis=1, keepdims=True)
    new = np.where(highest > old + 8, highest, old)
    with np.errstate(invalid="ignore"):
        return _Tensor(new), _Tensor(np.where(new == old, 1, np.exp2(old - new)))


def _inline_asm(code: str, _constraints: str, args: Sequence[Any], **_: Any) -> Any:
    instruction = code.partition(";")[0].split()
    compute = _INSTRUCTIONS.get(instruction[0].partition(".")[0])
    if compute is not None:
        with np.errstate(over="ignore", divide="ignore"):
            return _Tensor(compute(args[0].array.astype(np.float32)))
    if "vote.sync.any" in code:  # warps for which nothing changes skip it
        return _raise_pivots(*args) if "shfl.sync" in code else args[0] * args[1]
    if instruction[0] == "cp.async.bulk.wait_group":
        _Tma.store_wait(int(instruction[1]))
        return _finish_writes()
    if instruction[0].startswith("bar."):
        barrier, threads = instruction[1].rstrip(","), instruction[2]
        number = _array(args[0]) if barrier == "$1" else barrier
        return _at_named_barrier(instruction[0] == "bar.sync", int(number), int(threads))
    if instruction[0] == "mov.u32":
        return 0
    raise NotImplementedError(code)


def _at_named_barrier(stay: bool, barrier: int, threads: int) -> None:
    _dawdle()
    with _changed:
        state = _here.program.named.setdefault(barrier, [0, 0])
        opened = state[1]
        state[0] += _here.threads
        if state[0] > threads:
            raise ProtocolError(f"{_here.name} is too much for named barrier {barrier}")
        if state[0] == threads:
            state[0] = 0
            state[1] += 1
            _changed.notify_all()
    if stay:
        _wait(lambda: state[1] != opened, f"named barrier {barrier}")


def _warp_specialize(
    partitions: Sequence[tuple[Callable[..., None], tuple[Any, ...]]],
    warps: Sequence[int],
    registers: Sequence[int],
) -> None:
    program = _here.program

    def work(function: Any, args: tuple[Any, ...], count: int) -> None:
        _here.enter(program, function.__name__, count)
        function(*args)
        if _here.products or _here.reads:
            raise ProtocolError(f"{_here.name} ends with work in flight")
        _late_writes.extend(_here.writes)

    _run_at_once(
        [
            functools.partial(work, *partition, count)
            for partition, count in zip(partitions, (4, *warps), strict=True)
        ]
    )
    if any(state[0] for state in program.named.values()):
        raise ProtocolError(f"named barriers are left half full: {program.named}")


def _run_at_once(jobs: Sequence[Callable[[], None]]) -> None:
    """Run each job in a thread of its own; raise what one of them raised."""
    errors: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            with _changed:
                _failed.set()
                _changed.notify_all()
                errors.append(error)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((x for x in errors if not isinstance(x, _Abandoned)), errors[0])


def _allocate(dtype: str, shape: Sequence[int], layout: Any) -> _Memory | _Barriers:
    if layout == "mbarrier":
        return _Barriers(shape[0])
    if dtype.startswith("i"):
        return _Memory(np.full(shape, -(1 << 40)), dtype)
    return _Memory(np.full(shape, np.nan, np.float32), dtype)


def _where(condition: Any, a: Any, b: Any) -> Any:
    if any(isinstance(x, _Tensor) for x in (condition, a, b)):
        return _Tensor(np.where(_array(condition), _array(a), _array(b)))
    return a if condition else b


def _extreme(function: Any) -> Any:
    def compute(a: Any, b: Any) -> Any:
        result = function(_array(a), _array(b))
        return _Tensor(result) if isinstance(a, _Tensor) or isinstance(b, _Tensor) else int(result)

    return compute


def _reduction(function: Any) -> Any:
    def compute(x: _Tensor, axis: int) -> Any:
        result = function(x.array, axis)
        return _Tensor(result) if result.ndim else result.item()

    return compute


def _sum(array: Any, axis: int) -> Any:
    is_integer = np.issubdtype(array.dtype, np.integer)
    return array.sum(axis, dtype=None if is_integer else np.float32)


def _log2(x: _Tensor) -> _Tensor:
    with np.errstate(divide="ignore"):
        return _Tensor(np.log2(x.array))


class _Constant(int):
    """A number that the host asks for its value."""

    value = property(int)


def _constexpr(value: Any) -> Any:
    return _Constant(value) if type(value) is int else value


def _language() -> types.ModuleType:
    gl = types.ModuleType("language")
    gl.__dict__.update(
        constexpr=_constexpr,
        tensor=_Tensor,
        tuple=tuple,
        shared_memory_descriptor=_Memory,
        float32="fp32", float16="fp16", bfloat16="bf16", int32="i32", int64="i64",
        static_range=range,
        arange=lambda start, end, layout=None: _Tensor(np.arange(start, end)),
        zeros=lambda shape, dtype, layout=None: _Tensor(np.zeros(shape, np.float32)),
        full=lambda shape, value, dtype, layout=None: _Tensor(np.full(shape, value, np.float32)),
        where=_where,
        minimum=_extreme(np.minimum),
        maximum=_extreme(np.maximum),
        cdiv=lambda a, b: -(-a // b),
        expand_dims=lambda x, axis: _Tensor(np.expand_dims(x.array, axis)),
        convert_layout=lambda x, layout, assert_trivial=False: x,
        reshape=lambda x, shape: _Tensor(x.array.reshape(shape)),
        permute=lambda x, order: _Tensor(x.array.transpose(order)),
        sum=_reduction(_sum),
        max=_reduction(np.max),
        log2=_log2,
        fma=lambda a, b, c: a * b + c,
        cast=lambda x, dtype: x,
        to_tensor=lambda x: x,
        program_id=lambda axis: _here.program.number,
        num_programs=lambda axis: _here.program.count,
        load=_load, store=_store, atomic_add=_atomic_add,
        inline_asm_elementwise=_inline_asm,
        thread_barrier=lambda: None,
        allocate_shared_memory=_allocate,
        warp_specialize=_warp_specialize,
        **{name: lambda *args, **options: None for name in (
            "NVMMASharedLayout", "SwizzledSharedLayout", "NVMMADistributedLayout",
            "DotOperandLayout", "SliceLayout", "BlockedLayout",
        )},
    )  # fmt: skip
    return gl


def _plain(function: Any) -> Any:
    return function


class _Kernel:
    """A function of ``gluon.jit``: other ones call it, the host starts it on a grid."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._function(*args, **options)

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        return functools.partial(_launch, self._function, grid[0])


def _jit(function: Any = None, **_: Any) -> Any:
    return _Kernel if function is None else _Kernel(function)


def _launch(
    function: Callable[..., None],
    count: int,
    *args: Any,
    num_warps: int = 4,
    maxnreg: int | None = None,
    **constants: Any,
) -> None:
    """Run `count` programs in a random order, some at once."""
    values = [Pointer(x.view(-1)) if isinstance(x, torch.Tensor) else x for x in args]
    waiting = random.sample(range(count), count)

    def work() -> None:
        while waiting:
            with _changed:
                number = waiting.pop() if waiting else None
            if number is not None:
                _here.enter(_Program(number, count), "main", num_warps)
                function(*values, **constants)

    _failed.clear()
    _late_writes.clear()
    _run_at_once([work] * min(count, _AT_ONCE))
    random.shuffle(_late_writes)
    for write in _late_writes:
        write()


def _stand_ins() -> dict[str, types.ModuleType]:
    def module(name: str, **contents: Any) -> types.ModuleType:
        result = types.ModuleType(name)
        result.__dict__.update(contents)
        return result

    gl = _language()
    tma = types.SimpleNamespace(
        tensor_descriptor=Descriptor,
        async_copy_global_to_shared=_Tma.async_copy_global_to_shared,
        async_copy_shared_to_global=_Tma.async_copy_shared_to_global,
        store_wait=_Tma.store_wait,
    )
    gluon = "triton.experimental.gluon"
    return {
        gluon: module(gluon, jit=_jit, constexpr_function=_plain, language=gl),
        f"{gluon}.language": gl,
        f"{gluon}.language.nvidia.hopper": module(
            "hopper",
            tma=tma,
            mbarrier=_Mbarrier,
            fence_async_shared=_fence,
            warpgroup_mma=_product,
            warpgroup_mma_wait=_await_products,
        ),
        f"{gluon}.nvidia.hopper": module("host", TensorDescriptor=Descriptor),
    }


@contextlib.contextmanager
def emulation(*modules: str) -> Iterator[list[types.ModuleType]]:
    """Import modules of kernels anew, in this order, on the stand-ins.

    Within the context their kernels run on tensors on the CPU, started as on a GPU. A module that
    other ones import comes before them.

    Parameters
    ----------
    *modules : str
        Names to import.

    Yields
    ------
    list of module
        The modules.

    Raises
    ------
    ProtocolError
        When a kernel runs: a thread waits in vain, arrives where a barrier is complete, hands over
        memory without a fence, or ends with work in flight.
    """
    import triton.experimental.gluon.language.nvidia.hopper  # noqa: F401 - before it is hidden
    from triton.language import core

    replaced = _stand_ins()
    names = (*replaced, "attn_core.tiles.hopper", *modules)
    before = {name: sys.modules.get(name) for name in names}
    aggregate = core._aggregate
    try:
        core._aggregate = _plain
        for name in names:
            _put(name, replaced.get(name))
        yield [_import(name) for name in modules]
    finally:
        core._aggregate = aggregate
        for name, module in before.items():
            _put(name, module)


def _put(name: str, module: types.ModuleType | None) -> None:
    """Let imports of `name` find a module, or import it anew."""
    parent, _, child = name.rpartition(".")
    package = sys.modules.get(parent)
    if module is None:
        sys.modules.pop(name, None)
        if hasattr(package, child):
            delattr(package, child)
        return
    sys.modules[name] = module
    if package is not None:
        setattr(package, child, module)


def _import(name: str) -> types.ModuleType:
    module = importlib.import_module(name)
    for stand_in in (reduce_add, claim, publish, wait_until_set):
        if hasattr(module, stand_in.__name__):
            setattr(module, stand_in.__name__, stand_in)
    return module
