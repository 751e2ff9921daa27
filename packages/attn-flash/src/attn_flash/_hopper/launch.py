"""Start Gluon kernels at little cost on the host.

Binding arguments and encoding four tensors for the copy engine takes Triton longer than a small
kernel runs. A `Launcher` remembers the compiled kernel of each set of constants and how each tensor
was encoded, and hands both to the driver directly.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from attn_flash._hopper.descriptors import flat_descriptor, rows_descriptor

_MAX_REMEMBERED = 4096
_PADDING = 0  # rows past the end arrive as zeros


class Rows(NamedTuple):
    """An argument: (B, S, H, D) in tiles of `rows` tokens of one head and `block_d` columns.

    `is_ragged` says that tiles end with sequences in it; see `descriptors.ragged_descriptor`.
    """

    tensor: torch.Tensor
    rows: int
    block_d: int
    is_ragged: bool = False

    def describe(self) -> TensorDescriptor:
        """Return what Triton launches with."""
        return rows_descriptor(*self)


class Flat(NamedTuple):
    """An argument: a contiguous matrix of float32 in tiles."""

    tensor: torch.Tensor
    tile: tuple[int, int]

    def describe(self) -> TensorDescriptor:
        """Return what Triton launches with."""
        return flat_descriptor(*self)


class _Compiled(NamedTuple):
    """A compiled kernel, its function in the driver, and how it wants its tensors encoded."""

    kernel: Any
    start: Any
    encodings: list[Any]


class Launcher:
    """Starts one kernel.

    Parameters
    ----------
    kernel : JITFunction of gluon.jit
        Its parameters are the run-time arguments, `Rows` and `Flat` first, then the constants. None
        of its integers is specialised.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Hashable, _Compiled] = {}
        self._encoded: dict[Hashable, list[Any]] = {}

    def __call__(
        self,
        num_programs: int,
        rows: Sequence[Rows | Flat],
        args: Sequence[Any],
        constants: Mapping[str, Any],
        maxnreg: int,
    ) -> None:
        """Run `num_programs` programs on `rows` and `args`."""
        device = rows[0].tensor.device
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(num_programs, rows, args, constants, maxnreg)
            return
        key = (device.index, rows[0].tensor.dtype, *constants.values())
        compiled = self._compiled.get(key)
        if compiled is None or knobs.runtime.launch_enter_hook.calls:
            self._launch(key, num_programs, rows, args, constants, maxnreg)
            return
        kernel = compiled.kernel
        encoded = []
        for argument, encoding in zip(rows, compiled.encodings, strict=True):
            tensor, *tile = argument
            tensor_key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, *tile)
            known = self._encoded.get(tensor_key)
            encoded += self._encode(tensor_key, argument, encoding) if known is None else known
        compiled.start(
            num_programs, 1, 1, torch._C._cuda_getCurrentRawStream(device.index), kernel.function,
            False, False, None, None, kernel.packed_metadata, None, None, None,
            *encoded, *args, *constants.values(),
        )  # fmt: skip

    def _launch(
        self,
        key: Hashable,
        num_programs: int,
        rows: Sequence[Rows | Flat],
        args: Sequence[Any],
        constants: Mapping[str, Any],
        maxnreg: int,
    ) -> None:
        """Let Triton launch, and remember what it compiled where that can be started again."""
        kernel = self._kernel[(num_programs,)](
            *(argument.describe() for argument in rows),
            *args,
            **constants,
            num_warps=4,
            maxnreg=maxnreg,
        )
        start = _start_function(kernel)
        if start is None:
            return
        if len(self._compiled) == _MAX_REMEMBERED:
            self._compiled.clear()
        self._compiled[key] = _Compiled(kernel, start, kernel.metadata.tensordesc_meta)

    def _encode(
        self, key: Hashable, argument: Rows | Flat, encoding: Mapping[str, Any]
    ) -> list[Any]:
        """Return the tensor as the driver takes it: a tensor map, sizes and strides."""
        descriptor = argument.describe()
        tensor_map = driver.active.utils.fill_tma_descriptor(
            argument.tensor.data_ptr(),
            encoding["swizzle"],
            encoding["elem_size"],
            _HOST_TYPES.get(encoding["elem_type"], encoding["elem_type"]),
            encoding["block_size"],
            descriptor.shape,
            descriptor.strides,
            _PADDING,
        )
        encoded = [tensor_map, *descriptor.shape, *descriptor.strides]
        if len(self._encoded) == _MAX_REMEMBERED:
            self._encoded.clear()
        self._encoded[key] = encoded
        return encoded


# Numbers of element types that differ between the compiler and the driver.
_HOST_TYPES = {8: 10, 9: 8, 10: 9}


def _start_function(kernel: Any) -> Any:
    """Return the C function that starts a compiled kernel with encoded tensors, or None.

    Triton 3.6 keeps it in the closure that encodes tensor descriptors at every launch.
    """
    launcher = kernel.run
    encode = launcher.launch
    names = getattr(getattr(encode, "__code__", None), "co_freevars", ())
    if launcher.global_scratch_size or launcher.profile_scratch_size or "launcher" not in names:
        return None
    return encode.__closure__[names.index("launcher")].cell_contents
