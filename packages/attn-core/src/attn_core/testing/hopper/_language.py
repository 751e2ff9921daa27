"""The module that kernels know as `gl`, the decorator they are under, and their launch."""

from __future__ import annotations

import functools
import random
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from attn_core.testing.hopper._engines import (
    AsyncCopy,
    Descriptor,
    Tma,
    await_products,
    finish_writes,
    product,
)
from attn_core.testing.hopper._pointers import Pointer, atomic_add, load, store
from attn_core.testing.hopper._registers import (
    Dtype,
    Tensor,
    array_of,
    extreme,
    log2,
    reduce,
    reduction,
    rsqrt,
    total,
    where,
)
from attn_core.testing.hopper._shared import Mbarrier, Memory, allocate, fence
from attn_core.testing.hopper._threads import (
    Program,
    at_named_barrier,
    changed,
    end_of_work,
    failed,
    here,
    late_writes,
    run_at_once,
    warp_specialize,
)

_AT_ONCE = 3  # programs
_DTYPES = {
    "float32": "fp32", "float16": "fp16", "bfloat16": "bf16",
    "int8": "i8", "int32": "i32", "int64": "i64",
}  # fmt: skip
_INSTRUCTIONS = {"ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal}


def _raise_pivots(pivot: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Raise rows' pivots that a number passes by more than 8; return the factors, too."""
    old, highest = pivot.array, top.array.max(axis=1, keepdims=True)
    new = np.where(highest > old + 8, highest, old)
    with np.errstate(invalid="ignore"):
        return Tensor(new), Tensor(np.where(new == old, 1, np.exp2(old - new)))


def _inline_asm(code: str, _constraints: str, args: Sequence[Any], **_: Any) -> Any:
    instruction = code.partition(";")[0].split()
    compute = _INSTRUCTIONS.get(instruction[0].partition(".")[0])
    if compute is not None:
        with np.errstate(over="ignore", divide="ignore"):
            return Tensor(compute(args[0].array.astype(np.float32)))
    if "vote.sync.any" in code:  # warps for which nothing changes skip it
        return _raise_pivots(*args) if "shfl.sync" in code else args[0] * args[1]
    if instruction[0] == "cp.async.bulk.wait_group":
        Tma.store_wait(int(instruction[1]))
        return finish_writes()
    if instruction[0].startswith("bar."):
        barrier, threads = instruction[1].rstrip(","), instruction[2]
        number = array_of(args[0]) if barrier == "$1" else barrier
        return at_named_barrier(instruction[0] == "bar.sync", int(number), int(threads))
    if instruction[0] == "mov.u32":
        return 0
    if instruction[0] == "shl.b32":  # from bfloat16 to float32
        return Tensor(args[0].array)
    raise NotImplementedError(code)


class _Constant(int):
    """A number that the host asks for its value."""

    value = property(int)


class _Integer(int):
    """A number that kernels widen before they multiply it, or what they have made of it."""

    def to(self, _dtype: str) -> _Integer:
        return self


def _closed(name: str) -> Any:
    function = getattr(int, name)

    def compute(self: _Integer, *others: Any) -> Any:
        result = function(self, *others)
        return result if result is NotImplemented else _Integer(result)

    return compute


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(_Integer, f"__{_name}__", _closed(f"__{_name}__"))
    setattr(_Integer, f"__r{_name}__", _closed(f"__r{_name}__"))
_Integer.__neg__ = _closed("__neg__")  # type: ignore[method-assign]


class _Layout:
    """A layout, which says nothing here."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    @classmethod
    def get_default_for(cls, *_: Any) -> _Layout:
        return cls()


def _constexpr(value: Any) -> Any:
    return _Constant(value) if type(value) is int else value


def _language() -> types.ModuleType:
    gl = types.ModuleType("language")
    gl.__dict__.update(
        constexpr=_constexpr,
        tensor=Tensor,
        tuple=tuple,
        shared_memory_descriptor=Memory,
        **{name: Dtype(short) for name, short in _DTYPES.items()},
        static_range=range,
        arange=lambda start, end, layout=None: Tensor(np.arange(start, end)),
        zeros=lambda shape, dtype, layout=None: Tensor(np.zeros(shape, np.float32)),
        full=lambda shape, value, dtype, layout=None: Tensor(np.full(shape, value, np.float32)),
        where=where,
        minimum=extreme(np.minimum),
        maximum=extreme(np.maximum),
        cdiv=lambda a, b: -(-a // b),
        expand_dims=lambda x, axis: Tensor(np.expand_dims(x.array, axis)),
        convert_layout=lambda x, layout, assert_trivial=False: x,
        reshape=lambda x, shape: Tensor(x.array.reshape(shape)),
        permute=lambda x, order: Tensor(x.array.transpose(order)),
        sum=reduction(total),
        min=reduction(np.min),
        max=reduction(np.max),
        log2=log2,
        rsqrt=rsqrt,
        reduce=reduce,
        fma=lambda a, b, c: a * b + c,
        cast=lambda x, dtype: x,
        to_tensor=_Integer,
        program_id=lambda axis: _Integer(0 if axis else here.program.number),
        num_programs=lambda axis: here.program.count,
        load=load, store=store, atomic_add=atomic_add,
        inline_asm_elementwise=_inline_asm,
        barrier=lambda: None,
        allocate_shared_memory=allocate,
        warp_specialize=warp_specialize,
        **dict.fromkeys((
            "NVMMASharedLayout", "SwizzledSharedLayout", "NVMMADistributedLayout",
            "DotOperandLayout", "SliceLayout", "BlockedLayout",
        ), _Layout),
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
    values = [_argument(x) for x in args]
    waiting = random.sample(range(count), count)

    def work() -> None:
        while waiting:
            with changed:
                number = waiting.pop() if waiting else None
            if number is not None:
                here.enter(Program(number, count), "main", num_warps)
                function(*values, **constants)
                end_of_work()

    failed.clear()
    late_writes.clear()
    run_at_once([work] * min(count, _AT_ONCE))
    random.shuffle(late_writes)
    for write in late_writes:
        write()


def _argument(x: Any) -> Any:
    """Return an argument of the host as a kernel gets it."""
    if isinstance(x, torch.Tensor):
        return Pointer.to(x)
    if type(x) is int:
        return _Integer(x)
    return x.describe() if hasattr(x, "describe") else x


def stand_ins() -> dict[str, types.ModuleType]:
    def module(name: str, **contents: Any) -> types.ModuleType:
        result = types.ModuleType(name)
        result.__dict__.update(contents)
        return result

    gl = _language()
    tma = types.SimpleNamespace(
        tensor_descriptor=Descriptor,
        async_load=Tma.async_load,
        async_store=Tma.async_store,
        store_wait=Tma.store_wait,
    )
    gluon = "triton.experimental.gluon"
    return {
        gluon: module(gluon, jit=_jit, constexpr_function=_plain, language=gl),
        f"{gluon}.language": gl,
        f"{gluon}.language.nvidia.hopper": module(
            "hopper",
            tma=tma,
            async_copy=AsyncCopy,
            mbarrier=Mbarrier,
            fence_async_shared=fence,
            warpgroup_mma=product,
            warpgroup_mma_wait=await_products,
        ),
        f"{gluon}.nvidia.hopper": module(
            "host",
            TensorDescriptor=Descriptor,
            TensorDescriptorIm2Col=None,  # newer interpreters look it up
        ),
    }
