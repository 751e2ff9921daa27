"""Start Triton kernels at little cost on the host.

Binding the arguments of a launch, as Triton does every time, takes longer than a small kernel
runs. A `Launcher` remembers the compiled kernel of each problem and starts it directly.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

from attn_core import recording
from attn_core.driver_call import DriverCall, call_through_triton, direct_call, is_known
from attn_core.tuning import TileConfig

_MAX_REMEMBERED = 4096
_POINTER_ALIGNMENT = 16  # bytes: Triton compiles another kernel for less
_NUMBERS = frozenset({int, float, bool, type(None)})


class Launcher:
    """Starts one kernel.

    Parameters
    ----------
    kernel : triton.JITFunction
        Its parameters are the run-time arguments, then the constexprs.
    check : callable, optional
        Called with the strides of a problem that comes for the first time; raises where the kernel
        cannot address it.
    **options
        Options of the compiler beyond num_warps and num_stages, such as ``maxnreg``.
    """

    def __init__(
        self, kernel: Any, check: Callable[[Any], None] | None = None, **options: Any
    ) -> None:
        self._kernel = kernel
        self._check = check
        self._options = options
        self._compiled: dict[Hashable, tuple[Any, DriverCall]] = {}

    def __call__(
        self,
        num_programs: int,
        strides: Hashable,
        args: Sequence[Any],
        constexprs: Mapping[str, Any],
        config: TileConfig,
    ) -> None:
        """Run `num_programs` programs.

        Parameters
        ----------
        num_programs : int
            Size of the one-dimensional grid.
        strides : hashable
            Every argument whose value Triton compiles for: all integers among `args` but those
            that the kernel names in do_not_specialize.
        args : sequence
            Run-time arguments in the order of the kernel: tensors, the first one always, numbers
            and None.
        constexprs : mapping
            Constants in the order of the kernel.
        config : TileConfig
            Gives num_warps and num_stages; its blocks are among `constexprs`.
        """
        device = args[0].device
        constants = tuple(constexprs.values())
        places = [place for place, arg in enumerate(args) if type(arg) not in _NUMBERS]
        tensors = [args[place] for place in places]
        pointers = [tensor.data_ptr() for tensor in tensors]
        dtypes = tuple([tensor.dtype for tensor in tensors])
        key = (device, dtypes, strides, constants, config)
        # Triton compiles another kernel for addresses that are less aligned.
        are_aligned = not any(pointer % _POINTER_ALIGNMENT for pointer in pointers)
        compiled = self._compiled.get(key) if are_aligned else None
        tape = recording.current()
        with _on_device(device):
            if compiled is not None:
                start = _Start(*compiled, num_programs, device, [*args, *constants], places)
                start(pointers)
                if tape is not None:
                    tape.launched(tensors, start)
                return
            if tape is not None:  # what Triton launches leaves no start
                tape.refuse()
            if self._check is not None:
                self._check(strides)
            kernel = self._kernel[(num_programs,)](
                *args,
                **constexprs,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                **self._options,
            )
        if are_aligned and kernel is not None and is_known():
            if len(self._compiled) == _MAX_REMEMBERED:
                self._compiled.clear()
            self._compiled[key] = (kernel, direct_call(kernel) or call_through_triton(kernel))


class _Start:
    """A launch of a compiled kernel, complete but for addresses."""

    def __init__(
        self,
        kernel: Any,
        call: DriverCall,
        num_programs: int,
        device: torch.device,
        args: list[Any],
        places: Sequence[int],
    ) -> None:
        for place in places:
            args[place] = None  # a launch that is remembered keeps no memory
        self._kernel = kernel
        self._call = call
        self._num_programs = num_programs
        self._device = device
        self._args = args
        self._places = places

    def __call__(self, pointers: Sequence[int]) -> None:
        """Start it with the addresses of its tensors; their device is the current one."""
        args = self._args.copy()
        for place, pointer in zip(self._places, pointers, strict=True):
            args[place] = pointer
        if _hooks().launch_enter_hook.calls:  # of a profiler, which wants to know the kernel
            self._kernel[self._num_programs, 1, 1](*args)
            return
        self._call(self._num_programs, _stream(self._device), args)


@functools.cache
def _hooks() -> Any:
    from triton import knobs

    return knobs.runtime


def _stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index)


def _on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `device` current: Triton launches on the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
