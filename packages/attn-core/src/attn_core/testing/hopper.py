"""Run Gluon kernels for Hopper on a CPU, so that errors of their protocol show without a GPU.

The source of the kernels runs as it is, on stand-ins for Gluon that compute with NumPy. Each
partition of a program is a thread; barriers count arrivals, bytes and phases as the hardware does.
Whatever the hardware may delay is delayed: copies land late in memory that holds NaN until then,
products read their operands and stores leave shared memory only when somebody waits for them.
A missing wait gives wrong numbers, a missing arrival a `ProtocolError`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import operator
import random
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

_PATIENCE = 20.0  # seconds a thread waits before it is stuck
_LATENESS = 0.002  # seconds, at most, of a copy
_WARP = 32


class ProtocolError(AssertionError):
    """A thread waited in vain, or arrived where nobody expected it."""


class _Program(threading.local):
    """What the threads of one partition know."""

    name = "main"
    program_id = 0
    num_programs = 1
    threads = 4 * _WARP
    products: list[Callable[[], None]]
    stores: list[Callable[[], None]]


_here = _Program()
_changed = threading.Condition()
_named: dict[int, list[int]] = {}  # threads at a named barrier, and how often it has opened


def _wait(condition: Callable[[], bool], what: str) -> None:
    with _changed:
        if not _changed.wait_for(condition, _PATIENCE):
            raise ProtocolError(f"{_here.name} waits in vain for {what}")


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
        if len(shape) == 3 and self.array.ndim == 2:  # a swizzled tile as panels of 64 columns
            panels, rows, width = shape
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

    def load(self, _layout: Any) -> _Tensor:
        return _Tensor(self.array.copy(), self.dtype)


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
        if _array(pred):
            _one(barrier).advance(1, -size)

    @staticmethod
    def arrive(barrier: Any, count: int = 1, pred: Any = True) -> None:
        if _array(pred):
            _one(barrier).advance(count, 0)

    @staticmethod
    def wait(barrier: Any, phase: Any, pred: Any = True) -> None:
        barrier = _one(barrier)
        if _array(pred):
            _wait(lambda: barrier.phase != int(_array(phase)), f"phase {phase} of an mbarrier")


class Descriptor:
    """A tensor in global memory, as the copy engine sees it: tiles are clipped at its end."""

    def __init__(self, array: Any, block_shape: Sequence[int], dtype: str) -> None:
        size = int(np.prod(block_shape)) * (4 if dtype == "fp32" else 2)
        self.array = array
        self.block_shape = list(block_shape)
        self.dtype = dtype
        self.layout = None
        self.block_type = types.SimpleNamespace(nbytes=size)

    def pieces(self, coord: Sequence[Any]) -> tuple[Any, Any]:
        """Slices of the tensor and of the tile that belong together."""
        start = [int(_array(x)) for x in coord]
        if min(start) < 0:
            raise ProtocolError(f"a tile starts at {start}")
        sizes = [
            max(0, min(block, length - first))
            for first, block, length in zip(start, self.block_shape, self.array.shape, strict=True)
        ]
        tensor = tuple(slice(x, x + size) for x, size in zip(start, sizes, strict=True))
        return tensor, tuple(slice(0, size) for size in sizes)


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
            tile.array[target] = desc.array[source]
            barrier.advance(0, desc.block_type.nbytes)

        tile.array[...] = np.nan
        threading.Timer(random.random() * _LATENESS, land).start()

    @staticmethod
    def async_copy_shared_to_global(desc: Descriptor, coord: Any, tile: _Memory) -> None:
        target, source = desc.pieces(coord)

        def leave() -> None:
            desc.array[target] = tile.array[source]

        _here.stores.append(leave)

    @staticmethod
    def store_wait(pendings: int) -> None:
        while len(_here.stores) > pendings:
            _here.stores.pop(0)()


def reduce_add(desc: Descriptor, coord: Any, tile: _Memory) -> None:
    """Stand in for `primitives.reduce_add`."""
    target, source = desc.pieces(coord)

    def leave() -> None:
        with _changed:
            desc.array[target] += tile.array[source]

    _here.stores.append(leave)


def _product(a: Any, b: Any, acc: Any, use_acc: Any = True, is_async: bool = False) -> _Tensor:
    result = _Tensor(np.full(acc.array.shape, np.nan, np.float32))

    def compute() -> None:
        product = (_array(a).astype(np.float32) @ _array(b).astype(np.float32)).astype(np.float32)
        result.array = product + acc.array if _array(use_acc) else product

    _here.products.append(compute)
    if not is_async:
        _await_products(0, (result,))
    return result


def _await_products(pendings: int, deps: tuple[Any, ...]) -> Any:
    while len(_here.products) > pendings:
        _here.products.pop(0)()
    return deps[0] if len(deps) == 1 else deps


class Pointer:
    """A pointer to numbers in global memory."""

    def __init__(self, array: Any, offset: Any = 0) -> None:
        self.array = array.reshape(-1)
        self.offset = offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.array, self.offset + _array(offset))


def _load(pointer: Pointer, mask: Any = None, other: Any = 0, volatile: bool = False) -> Any:
    if np.ndim(pointer.offset) == 0:
        time.sleep(_LATENESS / 10)
        return int(pointer.array[int(pointer.offset)]) if mask is None or _array(mask) else other
    mask = np.ones(np.shape(pointer.offset), bool) if mask is None else _array(mask)
    return _Tensor(np.where(mask, pointer.array[np.where(mask, pointer.offset, 0)], other))


def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    if np.ndim(pointer.offset) == 0:
        pointer.array[int(pointer.offset)] = value
        return
    mask = np.ones(np.shape(pointer.offset), bool) if mask is None else _array(mask)
    pointer.array[pointer.offset[mask]] = _array(value)[mask]


def _atomic_add(pointer: Pointer, value: int, sem: str | None = None) -> int:
    with _changed:
        before = int(pointer.array[int(pointer.offset)])
        pointer.array[int(pointer.offset)] += value
        return before


def _inline_asm(code: str, _constraints: str, args: Sequence[Any], **_: Any) -> Any:
    instruction = code.partition(";")[0].split()
    if instruction[0].startswith("ex2."):
        with np.errstate(over="ignore"):
            return _Tensor(np.exp2(args[0].array.astype(np.float32)))
    if instruction[0] == "cp.async.bulk.wait_group":
        return _Tma.store_wait(int(instruction[1]))
    if instruction[0].startswith("bar."):
        barrier, threads = instruction[1].rstrip(","), instruction[2]
        number = _array(args[0]) if barrier == "$1" else barrier
        return _at_named_barrier(instruction[0] == "bar.sync", int(number), int(threads))
    if instruction[0] == "mov.u32":
        return None
    raise NotImplementedError(code)


def _at_named_barrier(stay: bool, barrier: int, threads: int) -> None:
    with _changed:
        state = _named.setdefault(barrier, [0, 0])
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
    errors: list[BaseException] = []
    program_id, num_programs = _here.program_id, _here.num_programs

    def run(function: Callable[..., None], args: tuple[Any, ...], count: int) -> None:
        _here.program_id, _here.num_programs = program_id, num_programs
        _here.threads = count * _WARP
        _here.name = function.__name__
        _here.products, _here.stores = [], []
        try:
            function(*args)
            _require_nothing_in_flight()
        except BaseException as error:  # raised again where the kernel was started
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(*partition, count), daemon=True)
        for partition, count in zip(partitions, (4, *warps), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    if any(state[0] for state in _named.values()):
        raise ProtocolError(f"named barriers are left half full: {_named}")


def _require_nothing_in_flight() -> None:
    if _here.products or _here.stores:
        raise ProtocolError(f"{_here.name} ends with work in flight")


def _allocate(dtype: str, shape: Sequence[int], layout: Any) -> _Memory | _Barriers:
    if layout == "mbarrier":
        return _Barriers(shape[0])
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


def _maximum(x: _Tensor, axis: int) -> Any:
    result = x.array.max(axis)
    return _Tensor(result) if result.ndim else int(result)


def _log2(x: _Tensor) -> _Tensor:
    with np.errstate(divide="ignore"):
        return _Tensor(np.log2(x.array))


def _language() -> types.ModuleType:
    gl = types.ModuleType("language")
    gl.__dict__.update(
        constexpr=type("constexpr", (), {"__new__": lambda cls, value: value}),
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
        sum=lambda x, axis: _Tensor(x.array.sum(axis, dtype=np.float32)),
        max=_maximum,
        log2=_log2,
        fma=lambda a, b, c: a * b + c,
        cast=lambda x, dtype: x,
        to_tensor=lambda x: x,
        program_id=lambda axis: _here.program_id,
        num_programs=lambda axis: _here.num_programs,
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


def _plain(function: Any = None, **_: Any) -> Any:
    return function if function is not None else (lambda f: f)


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
        gluon: module(gluon, jit=_plain, constexpr_function=_plain, language=gl),
        f"{gluon}.language": gl,
        f"{gluon}.language.nvidia.hopper": module(
            "hopper",
            tma=tma,
            mbarrier=_Mbarrier,
            fence_async_shared=lambda: None,
            warpgroup_mma=_product,
            warpgroup_mma_wait=_await_products,
        ),
        f"{gluon}.nvidia.hopper": module("host", TensorDescriptor=Descriptor),
    }


@contextlib.contextmanager
def emulation(*modules: str) -> Iterator[list[types.ModuleType]]:
    """Import modules of kernels anew, in this order, on the stand-ins.

    Within the context their functions are plain Python; `run` starts a kernel. A module that other
    ones import comes before them.
    """
    import triton.experimental.gluon.language.nvidia.hopper  # noqa: F401 - before it is hidden
    from triton.language import core

    replaced = _stand_ins()
    names = (*replaced, *modules)
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
    if hasattr(module, "reduce_add"):
        module.reduce_add = reduce_add  # type: ignore[attr-defined]
    return module


def run(kernel: Callable[..., None], programs: Sequence[int], *args: Any, **options: Any) -> None:
    """Run the programs of a kernel one after another, in the order given.

    Parameters
    ----------
    kernel : callable
        From a module imported by `emulation`.
    programs : sequence of int
        Program ids.
    *args, **options
        What the kernel takes; tensors as `Descriptor` or `Pointer`.

    Raises
    ------
    ProtocolError
        A thread waits in vain, arrives where a barrier is complete, or ends with work in flight.
    """
    for program in programs:
        _named.clear()
        _here.program_id, _here.num_programs = program, len(programs)
        _here.products, _here.stores = [], []
        kernel(*args, **options)
