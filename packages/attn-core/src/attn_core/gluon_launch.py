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

from attn_core import recording
from attn_core.driver_call import NOBODY, DriverCall, direct_call

_MAX_REMEMBERED = 4096
_PADDING = 0  # what is past the end of a tensor arrives as zeros
_WARPS = 4  # of the first computing warpgroup, the only one that a launch names
# Numbers of element types that differ between Triton's compiler and the driver.
_DRIVER_TYPES = {8: 10, 9: 8, 10: 9}
_descriptor_of = methodcaller("describe")
_GAP = object()


class _Compiled(NamedTuple):
    """A compiled kernel, what starts it, and how it wants its tensors encoded."""

    kernel: Any
    call: DriverCall
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
    num_warps : int
        Those that start; a kernel may add others.
    """

    def __init__(self, kernel: Any, num_warps: int = _WARPS) -> None:
        self._kernel = kernel
        self._num_warps = num_warps
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
        tape = recording.current()
        key = (device.index, *[x.dtype for x in tensors], *constants.values())
        compiled = self._compiled.get(key)
        if compiled is None:
            if tape is not None:
                tape.refuse()
            self._launch(key, num_programs, args, constants, maxnreg)
            return
        parts = [*self._parts(args, compiled), *constants.values()]
        start = _Start(compiled, num_programs, device.index, parts)
        start([x.data_ptr() for x in tensors])
        if tape is not None:
            tape.launched(tensors, start)

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
            num_warps=self._num_warps,
            maxnreg=maxnreg,
        )
        call = direct_call(kernel)
        if call is None:
            return
        if len(self._compiled) == _MAX_REMEMBERED:
            self._compiled.clear()
        self._compiled[key] = _Compiled(kernel, call, kernel.metadata.tensordesc_meta)

    def _parts(self, args: Sequence[Any], compiled: _Compiled) -> list[Any]:
        """Return the arguments with an encoder in place of tiles, and `_GAP` of other tensors."""
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


class _Start:
    """A launch of a compiled kernel, complete but for addresses."""

    def __init__(
        self, compiled: _Compiled, num_programs: int, device: int, parts: Sequence[Any]
    ) -> None:
        self._compiled = compiled
        self._num_programs = num_programs
        self._device = device
        self._args: list[Any] = []
        self._tensors: list[tuple[int, _Encoder | None]] = []  # the place of each
        for part in parts:
            if part is _GAP:
                self._tensors.append((len(self._args), None))
                self._args.append(None)
            elif type(part) is _Encoder:
                self._tensors.append((len(self._args), part))
                self._args += [None, *part.sizes]
            else:
                self._args.append(part)

    def __call__(self, pointers: Sequence[int]) -> None:
        """Start it with the addresses of its tensors; their device is the current one."""
        args = self._args.copy()
        for (place, encoder), pointer in zip(self._tensors, pointers, strict=True):
            args[place] = pointer if encoder is None else encoder(pointer)
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        watchers: Any = NOBODY
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        if enter.calls:  # of a profiler, which wants to know the kernel
            grid = (self._num_programs, 1, 1)
            watchers = (self._compiled.kernel.launch_metadata(grid, stream), enter, leave)
        self._compiled.call(self._num_programs, stream, args, watchers)


class _Encoder:
    """Encodes tensors of one shape for the copy engine, each address once.

    Attributes
    ----------
    sizes : list of int
        Shape and strides, which follow the tensor map among the arguments of the driver.
    """

    def __init__(self, descriptor: Any, encoding: Mapping[str, Any]) -> None:
        self._shape, self._strides = list(descriptor.shape), list(descriptor.strides)
        self.sizes = [*self._shape, *self._strides]
        self._encoding = encoding
        self._maps: dict[int, Any] = {}

    def __call__(self, pointer: int) -> Any:
        """Return the tensor map of an address."""
        known = self._maps.get(pointer)
        return self._encode(pointer) if known is None else known

    def _encode(self, pointer: int) -> Any:
        encoding = self._encoding
        tensor_map = _encode_function()(
            pointer,
            encoding["swizzle"],
            encoding["elem_size"],
            _DRIVER_TYPES.get(encoding["elem_type"], encoding["elem_type"]),
            encoding["block_size"],
            self._shape,
            self._strides,
            _PADDING,
        )
        if len(self._maps) >= _MAX_REMEMBERED:
            self._maps.clear()
        self._maps[pointer] = tensor_map
        return tensor_map


def _encode_function() -> Any:
    """Return the driver's function in C that makes a tensor map."""
    utils = driver.active.utils
    if hasattr(utils, "fill_tma_descriptor_tiled"):
        return utils.fill_tma_descriptor_tiled
    return utils.fill_tma_descriptor  # its name in Triton 3.6
