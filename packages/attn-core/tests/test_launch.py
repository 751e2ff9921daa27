"""The launcher, with kernels that only write down how they were started."""

import functools
from types import SimpleNamespace

import pytest
import torch

from attn_core import driver_call, launch
from attn_core.device import GLUON_VERSIONS
from attn_core.launch import Launcher
from attn_core.tuning import TileConfig

CONFIG = TileConfig(64, 32, 4, 2)
STREAM = 23
CONSTEXPRS = {"BLOCK_M": 64, "HAS_LEFT": False, "PRECISION": "ieee"}


class Compiled:
    """A compiled kernel, which knows its grid and its arguments and nothing else."""

    function = 17
    packed_metadata = (4, 1, 0)

    def __init__(self, scratch=0):
        self.starts = []
        self.run = CudaLauncher(self.starts, scratch)

    def __getitem__(self, grid):
        return lambda *args: self.starts.append((grid, "watched", args))


class CudaLauncher:
    """Triton's: it allocates scratch memory and calls a function in C."""

    profile_scratch_size = 0
    launch_cooperative_grid = False
    launch_pdl = True
    arg_annotations = "annotations"
    kernel_signature = b"signature"

    def __init__(self, starts, scratch):
        self.starts = starts
        self.global_scratch_size = scratch
        c_function = self.start if driver_call.triton_version() == (3, 6) else self.start_typed
        self.launch = functools.partial(c_function)

    def __call__(self, x, y, z, stream, function, metadata, *args):
        assert self.global_scratch_size > 0
        self.note(x, y, z, stream, function, metadata, *args)

    def start(self, x, y, z, stream, function, cooperative, pdl, scratch, profile, *args):
        """The function of Triton 3.6."""
        assert self.global_scratch_size == 0
        assert (cooperative, pdl, scratch, profile) == (False, True, None, None)
        self.note(x, y, z, stream, function, *args)

    def start_typed(self, x, y, z, stream, function, cooperative, pdl, *rest):
        """The function of later versions."""
        *metadata, scratch, profile, annotations, signature, args = rest
        assert (annotations, signature) == (self.arg_annotations, self.kernel_signature)
        self.start(x, y, z, stream, function, cooperative, pdl, scratch, profile, *metadata, *args)

    def note(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        assert (stream, function) == (STREAM, Compiled.function)
        assert metadata == Compiled.packed_metadata
        assert launch_metadata is enter is leave is None
        self.starts.append(((x, y, z), args))


class Kernel:
    """A kernel that is compiled anew at every launch that goes through it."""

    def __init__(self, scratch=0):
        self.scratch = scratch
        self.launches = []
        self.compiled = []

    def __getitem__(self, grid):
        def start(*args, **options):
            self.launches.append((grid, args, options))
            self.compiled.append(Compiled(self.scratch))
            return self.compiled[-1]

        return start


class Interpreted(Kernel):
    def __getitem__(self, grid):
        start = super().__getitem__(grid)

        def interpret(*args, **options):
            start(*args, **options)

        return interpret


@pytest.fixture(autouse=True)
def hooks(monkeypatch):
    """Those of Triton 3.6, on a machine without it and without a stream."""
    hooks = SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=[]))
    monkeypatch.setattr(driver_call, "triton_version", lambda: (3, 6))
    monkeypatch.setattr(launch, "_hooks", lambda: hooks)
    monkeypatch.setattr(launch, "_stream", lambda device: STREAM)
    return hooks


@pytest.fixture
def kernel():
    return Kernel()


def start(launcher, *args, num_programs=8, strides=((4, 1),), constexprs=CONSTEXPRS, config=CONFIG):
    launcher(num_programs, strides, args, constexprs, config)


def aligned(dtype=torch.float32):
    return torch.zeros(64, dtype=dtype)


def unaligned():
    return torch.zeros(65)[1:]


def test_first_start_goes_through_the_kernel(kernel):
    x = aligned()
    start(Launcher(kernel), x, 4, 0.5)
    assert kernel.launches == [((8,), (x, 4, 0.5), {**CONSTEXPRS, "num_warps": 4, "num_stages": 2})]
    assert kernel.compiled[0].starts == []


def test_each_dtype_of_any_tensor_has_its_own_kernel(kernel):
    launcher = Launcher(kernel)
    first = aligned()
    for dtype in (torch.float16, torch.bfloat16, torch.float16):
        start(launcher, first, aligned(dtype), 4)
    assert len(kernel.launches) == 2
    assert [len(compiled.starts) for compiled in kernel.compiled] == [1, 0]


@pytest.mark.parametrize("version", GLUON_VERSIONS)
def test_later_starts_go_to_the_compiled_kernel(kernel, monkeypatch, version):
    monkeypatch.setattr(driver_call, "triton_version", lambda: version)
    launcher = Launcher(kernel)
    start(launcher, aligned(), 4, 0.5)
    x = aligned()
    start(launcher, x, 9, 0.25, num_programs=3)
    start(launcher, x, 10, 0.125, num_programs=2)
    assert len(kernel.launches) == 1
    assert kernel.compiled[0].starts == [
        ((3, 1, 1), (x.data_ptr(), 9, 0.25, 64, False, "ieee")),
        ((2, 1, 1), (x.data_ptr(), 10, 0.125, 64, False, "ieee")),
    ]


def test_scratch_memory_is_left_to_triton():
    launcher = Launcher(kernel := Kernel(scratch=128))
    x = aligned()
    for _ in range(2):
        start(launcher, x)
    assert kernel.compiled[0].starts == [((8, 1, 1), (x.data_ptr(), *CONSTEXPRS.values()))]


@pytest.mark.parametrize("lacking", ["launch_pdl", "profile_scratch_size"])
def test_what_is_not_known_of_a_launcher_is_left_to_triton(monkeypatch, lacking):
    if lacking == "launch_pdl":  # as on AMD
        monkeypatch.delattr(CudaLauncher, lacking)
    else:
        monkeypatch.setattr(CudaLauncher, lacking, 64)
    launcher = Launcher(kernel := Kernel(scratch=128))
    for _ in range(2):
        start(launcher, aligned())
    [(grid, _)] = kernel.compiled[0].starts
    assert grid == (8, 1, 1)


def test_profilers_see_the_kernel(kernel, hooks):
    launcher = Launcher(kernel)
    x = aligned()
    start(launcher, x)
    hooks.launch_enter_hook.calls.append(print)
    start(launcher, x, num_programs=3)
    assert kernel.compiled[0].starts == [
        ((3, 1, 1), "watched", (x.data_ptr(), *CONSTEXPRS.values()))
    ]


def test_constants_follow_the_arguments_in_their_own_order(kernel):
    launcher = Launcher(kernel)
    constexprs = {"Z": 3, "A": 1, "M": 2}
    for _ in range(2):
        start(launcher, aligned(), None, constexprs=constexprs)
    [(_, args)] = kernel.compiled[0].starts
    assert args[1:] == (None, 3, 1, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"strides": ((8, 1),)},
        {"constexprs": {**CONSTEXPRS, "BLOCK_M": 128}},
        {"constexprs": {**CONSTEXPRS, "HAS_LEFT": True}},
        {"config": TileConfig(64, 32, 8, 2)},
        {"config": TileConfig(64, 32, 4, 3)},
    ],
    ids=str,
)
def test_another_problem_is_compiled_anew(kernel, change):
    launcher = Launcher(kernel)
    x = aligned()
    start(launcher, x)
    start(launcher, x, **change)
    assert len(kernel.launches) == 2
    start(launcher, x)
    start(launcher, x, **change)
    assert [len(compiled.starts) for compiled in kernel.compiled] == [1, 1]


def test_another_dtype_is_compiled_anew(kernel):
    launcher = Launcher(kernel)
    for dtype in (torch.float32, torch.float16, torch.float32):
        start(launcher, aligned(dtype))
    assert [len(compiled.starts) for compiled in kernel.compiled] == [1, 0]


def test_another_device_is_compiled_anew(kernel):
    launcher = Launcher(kernel)
    start(launcher, aligned())
    start(launcher, aligned().to("meta"))
    assert len(kernel.launches) == 2


def test_launchers_remember_apart(kernel):
    other = Kernel()
    for launcher in (Launcher(kernel), Launcher(other)):
        start(launcher, aligned())
    assert len(kernel.launches) == len(other.launches) == 1


def test_unaligned_pointer_uses_no_kernel_of_aligned_ones(kernel):
    launcher = Launcher(kernel)
    for x in (aligned(), unaligned(), aligned(), unaligned()):
        start(launcher, x)
    assert len(kernel.launches) == 3
    assert [len(compiled.starts) for compiled in kernel.compiled] == [1, 0, 0]


def test_kernel_of_unaligned_pointers_is_not_remembered(kernel):
    launcher = Launcher(kernel)
    for x in (unaligned(), aligned(), aligned()):
        start(launcher, x)
    assert len(kernel.launches) == 2
    assert [len(compiled.starts) for compiled in kernel.compiled] == [0, 1]


def test_every_tensor_has_to_be_aligned(kernel):
    launcher = Launcher(kernel)
    x = aligned()
    start(launcher, x, 4, x, None)
    start(launcher, x, 4, unaligned(), None)
    assert len(kernel.launches) == 2


def test_what_is_remembered_is_bounded(kernel, monkeypatch):
    monkeypatch.setattr(launch, "_MAX_REMEMBERED", 3)
    launcher = Launcher(kernel)
    for size in range(10):
        start(launcher, aligned(), strides=((size, 1),))
        assert len(launcher._compiled) <= 3
    start(launcher, aligned(), strides=((9, 1),))
    start(launcher, aligned(), strides=((0, 1),))
    assert len(kernel.launches) == 11


def test_interpreter_compiles_nothing_to_remember():
    kernel = Interpreted()
    launcher = Launcher(kernel)
    for _ in range(2):
        start(launcher, aligned())
    assert len(kernel.launches) == 2


@pytest.mark.parametrize("version", [None, (3, 5), (3, 10)])
def test_untried_versions_of_triton_bind_every_time(kernel, monkeypatch, version):
    monkeypatch.setattr(driver_call, "triton_version", lambda: version)
    launcher = Launcher(kernel)
    for _ in range(2):
        start(launcher, aligned())
    assert len(kernel.launches) == 2


def test_failed_compilation_leaves_nothing_behind():
    class Broken(Kernel):
        def __getitem__(self, grid):
            raise RuntimeError("no such kernel")

    launcher = Launcher(Broken())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such kernel"):
            start(launcher, aligned())
