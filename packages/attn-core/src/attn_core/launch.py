"""Start Triton kernels at little cost on the host.

Binding the arguments of a launch, as Triton does every time, takes longer than a small kernel
runs. A `Launcher` remembers the compiled kernel of each problem and starts it directly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

from attn_core.device import triton_version
from attn_core.tuning import TileConfig

_MAX_REMEMBERED = 4096
_POINTER_ALIGNMENT = 16  # bytes: Triton compiles another kernel for less


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
        self._compiled: dict[Hashable, Any] = {}

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
            Run-time arguments in the order of the kernel; the first is a tensor or the descriptor
            of one.
        constexprs : mapping
            Constants in the order of the kernel.
        config : TileConfig
            Gives num_warps and num_stages; its blocks are among `constexprs`.
        """
        first: torch.Tensor = getattr(args[0], "base", args[0])
        dtypes = _dtypes_if_aligned(args)
        constants = tuple(constexprs.values())
        key = (first.device, first.dtype, dtypes, strides, constants, config)
        compiled = self._compiled.get(key)
        with _on_device(first.device):
            if compiled is not None:
                compiled[num_programs, 1, 1](*args, *constants)
                return
            if self._check is not None:
                self._check(strides)
            compiled = self._kernel[(num_programs,)](
                *args,
                **constexprs,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                **self._options,
            )
        if _can_restart(compiled) and dtypes is not None:
            if len(self._compiled) == _MAX_REMEMBERED:
                self._compiled.clear()
            self._compiled[key] = compiled


def _can_restart(compiled: Any) -> bool:
    """Whether a compiled kernel takes its constants in place, as tried with Triton 3.6."""
    return compiled is not None and triton_version() == (3, 6)


def _dtypes_if_aligned(args: Sequence[Any]) -> tuple[torch.dtype, ...] | None:
    """Dtypes of the tensors among `args`; None where Triton compiles for the address of one."""
    dtypes = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            if arg.data_ptr() % _POINTER_ALIGNMENT:
                return None
            dtypes.append(arg.dtype)
    return tuple(dtypes)


def _on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `device` current: Triton launches on the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
