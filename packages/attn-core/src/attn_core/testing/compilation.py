"""Kernels compiled ahead of time, for GPUs that need not be there.

A type error, a layout Triton cannot lower, too much shared memory or a spilled accumulator show on
any machine that has Triton. For tests marked ``compile``.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""Architectures every kernel of the family compiles for."""

# Bytes one program may have: CUDA C++ Programming Guide, table "Technical Specifications per
# Compute Capability"; AMD Instinct MI300 ISA reference, "LDS".
_SHARED_MEMORY = {
    **dict.fromkeys(("sm_86", "sm_89", "sm_120"), 101376),
    "sm_80": 166912,
    "sm_90": 232448,
    "sm_100": 232448,
    **dict.fromkeys(("gfx90a", "gfx942", "gfx1100", "gfx1201"), 65536),
}

_POINTERS = {
    torch.bool: "*i1",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}


@dataclass(frozen=True)
class CompiledKernel:
    """What one compilation came to.

    Attributes
    ----------
    target : str
        Architecture, such as ``"sm_90"``.
    registers : int
        Vector registers of one thread.
    spills : int
        What did not fit into registers: bytes stored to local memory on NVIDIA, registers on AMD.
    shared : int
        Bytes of shared memory of one program.
    serializes : bool
        Whether ptxas made asynchronous products of warpgroups wait for one another (notes C7510 and
        following), for want of registers mostly. False on AMD.
    asm : mapping of str to str or bytes
        Every stage of the compilation: ``"ttgir"``, ``"llir"``, ``"ptx"`` or ``"amdgcn"``, ...
    """

    target: str
    registers: int
    spills: int
    shared: int
    serializes: bool
    asm: Mapping[str, Any]

    @property
    def fits(self) -> bool:
        """Whether one program has enough shared memory on the target."""
        return self.shared <= _SHARED_MEMORY.get(self.target, self.shared)


def compile_ahead(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    target: str,
    **options: Any,
) -> CompiledKernel:
    """Compile a kernel for a GPU without one.

    Parameters
    ----------
    kernel : triton.JITFunction
        Decorated with ``triton.jit`` or ``gluon.jit``.
    signature : mapping of str to str
        Type of each argument that is no constexpr, as Triton writes it: ``"*fp16"``, ``"i32"``,
        ``"fp32"``. A suffix says what Triton would find out at a launch: ``"*fp16:16"`` and
        ``"i32:16"`` are multiples of 16, ``"i32:1"`` is 1.
    constexprs : mapping of str to object
        Value of each constexpr argument.
    target : str
        ``"sm_90"``, ``"gfx942"``, ...
    **options
        ``num_warps``, ``num_stages``, ``maxnreg``, ...

    Returns
    -------
    CompiledKernel
        Registers, spills and shared memory.

    Raises
    ------
    ValueError
        The signature and the constexprs are not exactly the kernel's arguments.
    triton.CompilationError
        The kernel does not compile.
    """
    import triton

    source = _source(kernel, signature, constexprs)
    gpu = _gpu_target(target)
    with _fake_driver(gpu):
        compiled = triton.compile(source, target=gpu, options=options)
    usage = _amd_usage if gpu.backend == "hip" else _nvidia_usage
    registers, spills, serializes = usage(compiled, gpu)
    asm = dict(compiled.asm)
    return CompiledKernel(target, registers, spills, compiled.metadata.shared, serializes, asm)


class LaunchRecorder:
    """Takes the place of a ``triton.jit`` kernel and writes down its last launch.

    `args`, `constexprs` and `options` (num_warps, num_stages, ...) exist once there was one.
    Tensors on the meta device will do, so no memory and no GPU is needed to see what a launcher
    starts.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: Any) -> LaunchRecorder:
        return self

    def __call__(self, *args: Any, **keywords: Any) -> None:
        """Write down what is launched, in place of launching it."""
        self.args = args
        names = self.arg_names
        self.options = {name: value for name, value in keywords.items() if name not in names}
        self.constexprs = {name: value for name, value in keywords.items() if name in names}

    def compile(self, target: str) -> CompiledKernel:
        """Compile the kernel as Triton would for this launch; errors as in `compile_ahead`.

        Also a ValueError where Triton would compile for an integer that is no stride: a `Launcher`
        would start what came of it for other values.
        """
        signature, constants = {}, dict(self.constexprs)
        for parameter, value in zip(self.kernel.params, self.args, strict=False):
            name, is_hinted = parameter.name, not parameter.do_not_specialize
            if value is None:
                constants[name] = None
                continue
            if type(value) is int and is_hinted and not name.startswith("stride_"):
                raise ValueError(f"{self.kernel.__name__} must name {name} in do_not_specialize")
            signature[name] = _type_of(value, is_hinted)
        return compile_ahead(self.kernel, signature, constants, target, **self.options)


def record_launches(launcher: Any, monkeypatch: Any) -> LaunchRecorder:
    """Let a `Launcher` write down what it would start, for the time of a test.

    Parameters
    ----------
    launcher : attn_core.launch.Launcher
        Its kernel is replaced.
    monkeypatch : pytest.MonkeyPatch
        Puts the kernel back.

    Returns
    -------
    LaunchRecorder
        What stands in for the kernel.
    """
    recorder = LaunchRecorder(launcher._kernel)
    monkeypatch.setattr(launcher, "_kernel", recorder)
    return recorder


def _type_of(value: Any, is_hinted: bool) -> str:
    if isinstance(value, torch.Tensor):
        return f"{_POINTERS[value.dtype]}:16"
    if hasattr(value, "block_shape"):  # a tensor descriptor of Gluon's
        dtype = _POINTERS[value.base.dtype].removeprefix("*")
        return f"tensordesc<{dtype}{value.block_shape},{value.layout!r}>"
    if isinstance(value, float):
        return "fp32"
    hint = ":1" if value == 1 else ":16" if value % 16 == 0 else ""
    return f"i32{hint}" if is_hinted else "i32"


def _source(kernel: Any, signature: Mapping[str, str], constexprs: Mapping[str, Any]) -> Any:
    given, expected = {*signature, *constexprs}, set(kernel.arg_names)
    if given != expected:
        raise ValueError(
            f"signature and constexprs must name the arguments of {kernel.__name__}, got unknown "
            f"{sorted(given - expected)} and missing {sorted(expected - given)}"
        )
    types, constants, attributes = {}, dict(constexprs), {}
    for position, name in enumerate(kernel.arg_names):
        kind, _, hint = signature.get(name, "constexpr").partition(":")
        if hint == "1":
            kind, constants[name] = "constexpr", 1
        elif hint == "16":
            attributes[position,] = [["tt.divisibility", 16]]
        elif hint:
            raise ValueError(f"the type of {name} must end in :1, :16 or neither, got :{hint}")
        types[name] = kind
    return _source_type(kernel)(kernel, types, constants, attributes)


def _source_type(kernel: Any) -> Any:
    if hasattr(kernel, "is_gluon") and kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    from triton.compiler import ASTSource

    return ASTSource


def _gpu_target(name: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    raise ValueError(f"target must start with sm_ or gfx, got {name!r}")


class _FakeDriver:
    """As much of a driver as code asks for while it is compiled."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target


@contextlib.contextmanager
def _fake_driver(target: Any) -> Iterator[None]:
    from triton.runtime import driver

    previous = driver._active
    driver.set_active(_FakeDriver(target))
    try:
        yield
    finally:
        driver._active = previous


def _nvidia_usage(compiled: Any, target: Any) -> tuple[int, int, bool]:
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = compiled.asm["ptx"]
    arch = _search(r"\.target (\w+)", ptx)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        command = [get_ptxas(target.arch).path, "-v", f"-arch={arch}", file, "-o", f"{file}.cubin"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return (
        int(_search(r"Used (\d+) registers", log)),
        int(_search(r"(\d+) bytes spill stores", log)),
        re.search(r"\bC75\d\d\b", log) is not None,
    )


def _amd_usage(compiled: Any, target: Any) -> tuple[int, int, bool]:
    text = compiled.asm["amdgcn"]
    return (
        int(_search(r"\.vgpr_count:\s+(\d+)", text)),
        int(_search(r"\.vgpr_spill_count:\s+(\d+)", text)),
        False,
    )


def _search(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the compiler's report has no {pattern!r}:\n{text}")
    return match[1]
