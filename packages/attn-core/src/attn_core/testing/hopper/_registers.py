"""Tensors in registers, and what is computed of them."""

from __future__ import annotations

import functools
import operator
import re
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class Dtype(str):
    """The name of a dtype, which kernels ask for its size."""

    __slots__ = ()

    @property
    def primitive_bitwidth(self) -> int:
        return int(re.sub(r"\D", "", self))


def array_of(value: Any) -> Any:
    """Return the numbers of a tensor in registers or shared memory; others as they are."""
    return getattr(value, "array", value)


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


class Tensor:
    """A tensor in registers."""

    def __init__(self, array: Any, dtype: str = "fp32") -> None:
        self.array = np.asarray(array)
        self.dtype = dtype
        self.type = types.SimpleNamespace(layout=None)

    @property
    def shape(self) -> list[int]:
        return list(self.array.shape)

    def to(self, dtype: str, bitcast: bool = False) -> Tensor:
        if bitcast:
            bits = np.float32 if dtype == "fp32" else np.int32
            array = self.array.astype(np.float32 if bits is np.int32 else np.int32)
            return Tensor(array.view(bits), dtype)
        if dtype.startswith("i"):
            return Tensor(self.array.astype(f"int{dtype[1:]}"), dtype)
        return Tensor(round_to(self.array, dtype), dtype)

    def broadcast_to(self, shape: Sequence[int]) -> Tensor:
        return Tensor(np.broadcast_to(self.array, shape), self.dtype)

    def __getitem__(self, places: Any) -> Tensor:
        return Tensor(self.array[places], self.dtype)

    def __neg__(self) -> Tensor:
        return Tensor(-self.array)

    def __invert__(self) -> Tensor:
        return Tensor(~self.array)


def _binary(function: Callable[[Any, Any], Any], swap: bool = False) -> Any:
    def compute(self: Tensor, other: Any) -> Tensor:
        a, b = array_of(self), array_of(other)
        with np.errstate(divide="ignore", invalid="ignore"):
            result = np.asarray(function(b, a) if swap else function(a, b))
        return Tensor(result.astype(np.float32) if result.dtype == np.float64 else result)

    return compute


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "rshift", "lshift"):
    _function = getattr(operator, _name if hasattr(operator, _name) else f"{_name}_")
    setattr(Tensor, f"__{_name}__", _binary(_function))
    setattr(Tensor, f"__r{_name}__", _binary(_function, swap=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Tensor, f"__{_name}__", _binary(getattr(operator, _name)))


def where(condition: Any, a: Any, b: Any) -> Any:
    if any(isinstance(x, Tensor) for x in (condition, a, b)):
        return Tensor(np.where(array_of(condition), array_of(a), array_of(b)))
    return a if condition else b


def extreme(function: Any) -> Any:
    def compute(a: Any, b: Any) -> Any:
        result = function(array_of(a), array_of(b))
        return Tensor(result) if isinstance(a, Tensor) or isinstance(b, Tensor) else int(result)

    return compute


def reduction(function: Any) -> Any:
    def compute(x: Tensor, axis: int) -> Any:
        result = function(x.array, axis)
        return Tensor(result) if result.ndim else result.item()

    return compute


def reduce(x: Any, axis: int, combine: Callable[..., Any]) -> Any:
    """Combine a tensor's rows, or those of a tuple of tensors at once."""
    xs = x if isinstance(x, tuple) else (x,)
    parts = ([Tensor(row, part.dtype) for row in np.moveaxis(part.array, axis, 0)] for part in xs)
    rows: Any = zip(*parts, strict=True)
    if isinstance(x, tuple):
        return functools.reduce(lambda a, b: combine(*a, *b), rows)
    return functools.reduce(lambda a, b: (combine(*a, *b),), rows)[0]


def total(array: Any, axis: int) -> Any:
    is_integer = np.issubdtype(array.dtype, np.integer)
    return array.sum(axis, dtype=None if is_integer else np.float32)


def rsqrt(x: Tensor) -> Tensor:
    return Tensor(1 / np.sqrt(x.array))


def log2(x: Tensor) -> Tensor:
    with np.errstate(divide="ignore"):
        return Tensor(np.log2(x.array))
