"""Argument checks. Each failure is one sentence: the argument, what is allowed, what it got."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attn_core import environment

if TYPE_CHECKING:
    import torch

_LARGEST = sys.float_info.max


def require_tensor(name: str, value: object) -> None:
    """Check that `value` is a tensor with strides."""
    import torch  # numbers are also checked where there is no torch

    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise ValueError(f"{name} must be a strided tensor, got layout {value.layout}")
    if value.is_nested:
        raise ValueError(f"{name} must be a strided tensor, got a nested one")


def require_rank(name: str, tensor: torch.Tensor, symbols: str) -> None:
    """Check the number of dimensions; `symbols` names them, as in ``"(B, N, H, D)"``."""
    require_tensor(name, tensor)
    rank = symbols.replace(",)", ")").count(",") + 1
    if tensor.dim() != rank:
        raise ValueError(
            f"{name} must have {rank} dimensions {symbols}, got shape {tuple(tensor.shape)}"
        )


def require_shape(
    name: str, tensor: torch.Tensor, symbols: str, expected: Sequence[int | torch.SymInt]
) -> None:
    """Check the whole shape; `symbols` names the dimensions of `expected`."""
    require_tensor(name, tensor)
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"{name} must have shape {symbols} = {tuple(expected)}, got {tuple(tensor.shape)}"
        )


def require_dtype(name: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Check the dtype against those allowed."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(
            f"{name} must have dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}"
        )


def require_like(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Check that `tensor` has the dtype and device of `other`."""
    require_tensor(name, tensor)
    if tensor.dtype != other.dtype:
        raise ValueError(
            f"{name} must have the dtype of {other_name}, {other.dtype}, got {tensor.dtype}"
        )
    require_device(name, tensor, other_name, other)


def require_device(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Check that `tensor` is on the device of `other`."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}"
        )


def require_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Check that `value` is a multiple of `divisor`, which must be positive."""
    if divisor <= 0 or value % divisor != 0:
        raise ValueError(
            f"{name} must be a multiple of {divisor_name}, got {name} = {value} and "
            f"{divisor_name} = {divisor}"
        )


def require_range(name: str, value: int, low: int, high: int) -> None:
    """Check ``low <= value <= high``."""
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")


def may_read_values(tensor: torch.Tensor) -> bool:
    """Whether values beside `tensor` may be checked: there are some, and reading them is quick.

    Reading a GPU's memory waits for it, so it is done only where the user asks.
    """
    import torch

    if torch.compiler.is_compiling() or tensor.device.type == "meta":
        return False
    if tensor.device.type != "cpu" and not environment.checks_values():
        return False
    from torch._subclasses.fake_tensor import is_fake  # here: calls on a GPU go without

    return not is_fake(tensor)


def require_writable(name: str, tensor: torch.Tensor) -> None:
    """Check that a tensor that is written to holds each element once, and as it is."""
    import torch

    sizes, strides = tensor.shape, tensor.stride()
    if any(stride == 0 and size > 1 for size, stride in zip(sizes, strides, strict=True)):
        raise ValueError(f"{name} must not be broadcast, it is written to, got strides {strides}")
    # No operator writes to a tensor that is negated by a mark. A compiler cannot ask for the mark.
    if not torch.compiler.is_compiling() and tensor.is_neg():
        raise ValueError(f"{name} must not be the negative of other memory, it is written to")


def require_positive(name: str, value: object) -> None:
    """Check that `value` is an integer above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def is_finite(value: Any) -> bool:
    """Whether `value` is a real number, of Python or numpy, that a float can hold."""
    if isinstance(value, (int, float)):
        return -_LARGEST <= value <= _LARGEST  # False for NaN
    if hasattr(value, "__len__"):  # strings, arrays, and tensors, which would have to be read
        return False
    try:
        number = float(value)
        return bool(-_LARGEST <= number <= _LARGEST and number == value)
    except (TypeError, ValueError, OverflowError):
        return False


def flag(name: str, value: Any) -> bool:
    """Return a switch as a bool: True, False, or a number that equals one of them."""
    if value is True or value is False:
        return value
    if not is_finite(value) or value not in (0, 1):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)
