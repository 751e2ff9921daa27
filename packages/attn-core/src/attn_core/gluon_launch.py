"""Start Gluon kernels at little cost on the host.

Binding arguments and encoding tensors for the copy engine takes Triton longer than a small kernel
runs. A `GluonLauncher` remembers the compiled kernel of each set of constants and how each tensor
was encoded, and hands both to the driver directly.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from operator import methodcaller
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.runtime import driver

from attn_core import replay

_MAX_REMEMBERED = 4096
_PADDING = 0  # what is past the end of a tensor arrives as zeros
_WARPS = 4  # of the first computing warpgroup, the only one that a launch names
# Numbers of element types that differ between Triton's compiler and the driver.
_DRIVER_TYPES = {8: 10, 9: 8, 10: 9}
_descriptor_of = methodcaller("describe")


class _Compiled(NamedTuple):
    """A compiled kernel, its function in the driver, and how it wants its tensors encoded."""

    kernel: Any
    start: Any
    encodings: Sequence[Mapping[str, Any]]


class GluonLauncher:
    """Starts one kernel.

    Parameters
    ----------
    kernel : JITFunction of gluon.jit
        Its parameters are the run-time arguments, then the constants. None of its integers is
        specialised. The only tuples among the arguments are tensors that the copy engine moves in
        tiles: first such a `tensor`, then what is hashable and says how, with a method `describe`
        that returns a TensorDescriptor.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Hashable, _Compiled] = {}
        self._encoders: dict[Hashable, _Encoder] = {}

    def __call__(
        self, num_programs: int, args: Sequence[Any], constants: Mapping[str, Any], maxnreg: int
    ) -> None:
        """Run `num_programs` programs on `args`, the first of which is a tensor in tiles."""
        device = args[0].tensor.device
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(num_programs, args, constants, maxnreg)
            return
        tensors = [
            arg[0] if isinstance(arg, tuple) else arg
            for arg in args
            if isinstance(arg, (tuple, torch.Tensor))
        ]
        recording = replay.recording()
        key = (device.index, *[x.dtype for x in tensors], *constants.values())
        compiled = self._compiled.get(key)
        if compiled is None:
            if recording is not None:
                recording.refuse()
            self._launch(key, num_programs, args, constants, maxnreg)
            return
        parts = [*self._parts(args, compiled), *constants.values()]
        start = _Start(compiled, num_programs, device.index, parts)
        start([x.data_ptr() for x in tensors])
        if recording is not None:
            recording.launched(tensors, start)

    def _launch(
        self,
        key: Hashable,
        num_programs: int,
        args: Sequence[Any],
        constants: Mapping[str, Any],
        maxnreg: int,
    ) -> None:
        """Let Triton launch, and remember what it compiled where that can be started again."""
        kernel = self._kernel[(num_programs,)](
            *(_descriptor_of(arg) if isinstance(arg, tuple) else arg for arg in args),
            **constants,
            num_warps=_WARPS,
            maxnreg=maxnreg,
        )
        start = _start_function(kernel)
        if start is None:
            return
        if len(self._compiled) == _MAX_REMEMBERED:
            self._compiled.clear()
        self._compiled[key] = _Compiled(kernel, start, kernel.metadata.tensordesc_meta)

    def _parts(self, args: Sequence[Any], compiled: _Compiled) -> list[Any]:
        """Return the arguments with encoders in place of tiles, and gaps in place of tensors."""
        encodings = iter(compiled.encodings)
        return [
            self._encoder(arg, next(encodings))
            if isinstance(arg, tuple)
            else _GAP
            if isinstance(arg, torch.Tensor)
            else arg
            for arg in args
        ]

    def _encoder(self, tiles: Any, encoding: Mapping[str, Any]) -> _Encoder:
        tensor, *tile = tiles
        key = (tensor.shape, tensor.stride(), tensor.dtype, *tile)
        known = self._encoders.get(key)
        if known is None:
            if len(self._encoders) == _MAX_REMEMBERED:
                self._encoders.clear()
            known = self._encoders[key] = _Encoder(tiles.describe(), encoding)
        return known


_GAP = object()


class _Start:
    """A launch of a compiled kernel, complete but for addresses."""

    def __init__(
        self, compiled: _Compiled, num_programs: int, device: int, parts: list[Any]
    ) -> None:
        self._compiled = compiled
        self._num_programs = num_programs
        self._device = device
        self._parts = parts

    def __call__(self, pointers: Sequence[int]) -> None:
        """Start it with the addresses of its tensors; their device is the current one."""
        addresses, args = iter(pointers), []
        for part in self._parts:
            if part is _GAP:
                args.append(next(addresses))
            elif type(part) is _Encoder:
                args += part(next(addresses))
            else:
                args.append(part)
        kernel = self._compiled.kernel
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        self._compiled.start(
            self._num_programs, 1, 1, stream, kernel.function, False, False, None, None,
            kernel.packed_metadata, *self._watchers(stream), *args,
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

    def __init__(self, descriptor: Any, encoding: Mapping[str, Any]) -> None:
        self._sizes = list(descriptor.shape), list(descriptor.strides)
        self._encoding = encoding
        self._known: dict[int, list[Any]] = {}

    def __call__(self, pointer: int) -> list[Any]:
        """Return the tensor as the driver takes it: a tensor map, sizes and strides."""
        known = self._known.get(pointer)
        return self._encode(pointer) if known is None else known

    def _encode(self, pointer: int) -> list[Any]:
        (shape, strides), encoding = self._sizes, self._encoding
        tensor_map = driver.active.utils.fill_tma_descriptor(
            pointer,
            encoding["swizzle"],
            encoding["elem_size"],
            _DRIVER_TYPES.get(encoding["elem_type"], encoding["elem_type"]),
            encoding["block_size"],
            shape,
            strides,
            _PADDING,
        )
        if len(self._known) == _MAX_REMEMBERED:
            self._known.clear()
        self._known[pointer] = [tensor_map, *shape, *strides]
        return self._known[pointer]


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
