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

from attn_core import replay
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
        self._encoders: dict[Hashable, _Encoder] = {}

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
        recording = replay.recording()
        key = (device.index, rows[0].tensor.dtype, *constants.values())
        compiled = self._compiled.get(key)
        if compiled is None:
            if recording is not None:
                recording.refuse()
            self._launch(key, num_programs, rows, args, constants, maxnreg)
            return
        encoders = [
            self._encoder(argument, encoding)
            for argument, encoding in zip(rows, compiled.encodings, strict=True)
        ]
        start = _Start(compiled, num_programs, device.index, encoders, [*args, *constants.values()])
        tensors = [argument.tensor for argument in rows] + start.take_tensors()
        start([tensor.data_ptr() for tensor in tensors])
        if recording is not None:
            recording.launched(tensors, start)

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

    def _encoder(self, argument: Rows | Flat, encoding: Mapping[str, Any]) -> _Encoder:
        tensor, *tile = argument
        key = (tensor.shape, tensor.stride(), tensor.dtype, *tile)
        known = self._encoders.get(key)
        if known is None:
            if len(self._encoders) == _MAX_REMEMBERED:
                self._encoders.clear()
            known = self._encoders[key] = _Encoder(argument.describe(), encoding)
        return known


class _Start:
    """A launch of a compiled kernel, complete but for addresses."""

    def __init__(
        self,
        compiled: _Compiled,
        num_programs: int,
        device: int,
        encoders: list[_Encoder],
        args: list[Any],
    ) -> None:
        self._compiled = compiled
        self._num_programs = num_programs
        self._device = device
        self._encoders = encoders
        self._args = args
        self._places = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)]

    def take_tensors(self) -> list[torch.Tensor]:
        """Return the tensors among the arguments: a launch that is remembered keeps none."""
        tensors = [self._args[place] for place in self._places]
        for place in self._places:
            self._args[place] = None
        return tensors

    def __call__(self, pointers: Sequence[int]) -> None:
        """Start it with the addresses of tensors to encode and of those among the arguments."""
        encoded, args = [], self._args.copy()
        addresses = iter(pointers)
        for encoder in self._encoders:
            encoded += encoder(next(addresses))
        for place, pointer in zip(self._places, addresses, strict=True):
            args[place] = pointer
        kernel = self._compiled.kernel
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        self._compiled.start(
            self._num_programs, 1, 1, stream, kernel.function, False, False, None, None,
            kernel.packed_metadata, *self._watchers(stream), *encoded, *args,
        )  # fmt: skip

    def _watchers(self, stream: int) -> tuple[Any, ...]:
        """What a profiler is told, and how before and after the launch."""
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        if not enter.calls:
            return None, None, None
        grid = self._num_programs, 1, 1
        return self._compiled.kernel.launch_metadata(grid, stream), enter, leave


class _Encoder:
    """Encodes tensors of one shape for the copy engine, each address once."""

    def __init__(self, descriptor: TensorDescriptor, encoding: Mapping[str, Any]) -> None:
        self._shape, self._strides = list(descriptor.shape), list(descriptor.strides)
        self._encoding = encoding
        self._known: dict[int, list[Any]] = {}

    def __call__(self, pointer: int) -> list[Any]:
        """Return the tensor as the driver takes it: a tensor map, sizes and strides."""
        known = self._known.get(pointer)
        return self._encode(pointer) if known is None else known

    def _encode(self, pointer: int) -> list[Any]:
        encoding = self._encoding
        tensor_map = driver.active.utils.fill_tma_descriptor(
            pointer,
            encoding["swizzle"],
            encoding["elem_size"],
            _HOST_TYPES.get(encoding["elem_type"], encoding["elem_type"]),
            encoding["block_size"],
            self._shape,
            self._strides,
            _PADDING,
        )
        if len(self._known) == _MAX_REMEMBERED:
            self._known.clear()
        self._known[pointer] = [tensor_map, *self._shape, *self._strides]
        return self._known[pointer]


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
