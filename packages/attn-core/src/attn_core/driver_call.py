"""Calls of the function in C that starts Triton's compiled kernels.

Triton prepares every launch anew. Here that is done once a kernel, as each known version of Triton
wants it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from attn_core.device import GLUON_VERSIONS, triton_version

_KNOWN = GLUON_VERSIONS  # those that ran on a GPU, portable kernels too
NOBODY = (None, None, None)

DriverCall = Callable[..., None]
"""Takes the number of programs, the stream, a list of all arguments in the order of the kernel,
constants too, with addresses in place of tensors, and who watches: launch metadata and the hooks
before and after, or `NOBODY`."""


def is_known() -> bool:
    """Whether kernels can be started past Triton, with the version that is installed."""
    return triton_version() in _KNOWN


def direct_call(kernel: Any) -> DriverCall | None:
    """Return what calls the function in C, or None where Triton does more for a launch.

    Parameters
    ----------
    kernel : triton.compiler.CompiledKernel
        In place of a tensor descriptor the call takes the tensor map, the shape and the strides.
    """
    launcher = kernel.run
    launch = _c_function(launcher) if is_known() else None
    if launch is None:
        return None
    function, metadata = kernel.function, kernel.packed_metadata
    flags = (launcher.launch_cooperative_grid, launcher.launch_pdl)
    scratch = (None, None)
    if triton_version() == (3, 6):

        def call(num_programs: int, stream: int, args: list[Any], watchers: Any = NOBODY) -> None:
            head = (num_programs, 1, 1, stream, function, *flags, *scratch, metadata, *watchers)
            launch(*head, *args)

    else:
        types = (launcher.arg_annotations, launcher.kernel_signature)

        def call(num_programs: int, stream: int, args: list[Any], watchers: Any = NOBODY) -> None:
            head = (num_programs, 1, 1, stream, function, *flags, metadata, *watchers, *scratch)
            launch(*head, *types, args)

    return call


def call_through_triton(kernel: Any) -> DriverCall:
    """Return what calls a compiled kernel's launcher, which allocates scratch memory."""

    def call(num_programs: int, stream: int, args: list[Any], watchers: Any = NOBODY) -> None:
        head = (num_programs, 1, 1, stream, kernel.function, kernel.packed_metadata, *watchers)
        kernel.run(*head, *args)

    return call


def _c_function(launcher: Any) -> Any:
    """Return the function in C of NVIDIA's launchers where it needs nothing but arguments."""
    if (
        not hasattr(launcher, "launch_pdl")
        or launcher.global_scratch_size
        or launcher.profile_scratch_size
        or getattr(launcher, "gsan_enabled", False)
    ):
        return None
    launch = launcher.launch
    if not hasattr(launch, "__code__"):
        return launch
    # A kernel that takes tensor descriptors has a function in Python that encodes them every time.
    return inspect.getclosurevars(launch).nonlocals.get("launcher")
