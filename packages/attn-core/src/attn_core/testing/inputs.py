"""Tensors for tests: reproducible from a name, of any strides, surrounded by NaN."""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

_ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def seed_from(name: str) -> int:
    """Return the seed of a problem's name: the same on every machine and in every process.

    Examples
    --------
    >>> from attn_core.testing import seed_from
    >>> seed_from("b1-h4-m63-n129-d64-float16")
    1211667893
    """
    return zlib.crc32(name.encode())


def random_tensor(
    shape: Sequence[int],
    *,
    seed: int | str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    scale: float = 1.0,
) -> torch.Tensor:
    """Draw a normal tensor whose values depend on the seed alone, not on the device.

    Parameters
    ----------
    shape : sequence of int
        Its shape.
    seed : int or str
        A number, or a name for `seed_from`.
    dtype : torch.dtype, default float32
        Floating point.
    device : torch.device or str, default "cpu"
        Where the tensor is put; the values are drawn on the CPU.
    scale : float, default 1.0
        Standard deviation.

    Returns
    -------
    Tensor
        Contiguous.

    Examples
    --------
    >>> from attn_core.testing import random_tensor
    >>> random_tensor((2, 3), seed="b2-m3").shape
    torch.Size([2, 3])
    """
    generator = torch.Generator().manual_seed(seed_from(seed) if isinstance(seed, str) else seed)
    values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    return (values * scale).to(dtype).to(device)


def embedded(
    values: torch.Tensor, *, order: Sequence[int] | None = None, padding: int = 3
) -> torch.Tensor:
    """Copy `values` into the middle of larger, poisoned storage.

    Parameters
    ----------
    values : Tensor
        Any shape and dtype.
    order : sequence of int, optional
        The dimensions from the slowest in memory to the fastest; by default as they are.
    padding : int, default 3
        Poisoned elements before and after the tensor along each dimension.

    Returns
    -------
    Tensor
        Equal to `values`, with other strides. Whoever reads beside it reads NaN (the largest
        number of an integer dtype).

    Examples
    --------
    >>> import torch
    >>> from attn_core.testing import embedded
    >>> embedded(torch.ones(2, 4, 8), order=(1, 0, 2)).stride()
    (14, 112, 1)
    """
    order = range(values.dim()) if order is None else order
    sizes = [values.shape[dim] + 2 * padding for dim in order]
    storage = torch.full(sizes, _poison(values.dtype), dtype=values.dtype, device=values.device)
    for position, dim in enumerate(order):
        storage = storage.narrow(position, padding, values.shape[dim])
    inverse = sorted(range(values.dim()), key=lambda dim: order[dim])
    return storage.permute(inverse).copy_(values.detach())


def poisoned(
    shape: Sequence[int],
    *,
    seed: int | str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    scale: float = 1.0,
    order: Sequence[int] | None = None,
    padding: int = 3,
) -> torch.Tensor:
    """Draw a `random_tensor` that is `embedded` in NaN; arguments as there.

    Examples
    --------
    >>> from attn_core.testing import poisoned
    >>> poisoned((2, 5, 8), seed=0).is_contiguous()
    False
    """
    values = random_tensor(shape, seed=seed, dtype=dtype, device=device, scale=scale)
    return embedded(values, order=order, padding=padding)


@contextlib.contextmanager
def poison_new_allocations() -> Iterator[None]:
    """Within it, ``torch.empty`` and its kin return poisoned memory instead of luck.

    A kernel that leaves part of its output unwritten, or reads a buffer before it writes it, then
    gives NaN. Only allocations that Python code asks for are seen, in every thread.

    Examples
    --------
    >>> import torch
    >>> from attn_core.testing import poison_new_allocations
    >>> with poison_new_allocations():
    ...     torch.empty(2)
    tensor([nan, nan])
    """
    # Not a torch function mode: those do not reach into a backward pass.
    with contextlib.ExitStack() as patches:
        for owner, name in _ALLOCATORS:
            poisoning = _poisoning(getattr(owner, name))
            patches.enter_context(mock.patch.object(owner, name, poisoning))
        yield


def _poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def poisoned_allocation(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = allocate(*args, **kwargs)
        with torch.no_grad():
            return result.fill_(_poison(result.dtype))

    return poisoned_allocation


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max
