"""The launcher, with kernels and a driver that only write down what they are given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")

from attn_core import driver_call, gluon_launch, replay
from attn_core.device import GLUON_VERSIONS
from attn_core.gluon_launch import GluonLauncher
from attn_flash._hopper.descriptors import Flat, Rows

STREAM = 23
CONSTANTS = {"BLOCK_M": 128, "NEGATE": False}


class Kernel:
    """A kernel of gluon.jit whose compiled form keeps its arguments in `starts`."""

    function = 17
    packed_metadata = (4, 1, 0)

    def __init__(self, arguments):
        self.bound = 0
        self.starts = []

        def launcher(*args):
            self.starts.append(args)

        def encode(*args):  # as Triton does, which keeps the driver's function in the closure
            launcher(*args)

        encoding = {"swizzle": 3, "elem_size": 2, "elem_type": 9, "block_size": [1, 1, 64, 64]}
        self.metadata = SimpleNamespace(tensordesc_meta=[encoding] * arguments)
        self.run = SimpleNamespace(
            launch=encode,
            global_scratch_size=0,
            profile_scratch_size=0,
            launch_cooperative_grid=False,
            launch_pdl=False,
            arg_annotations="annotations",
            kernel_signature=b"signature",
        )

    def __getitem__(self, grid):
        def bind(*args, **options):
            self.bound += 1
            return self

        return bind

    def launch_metadata(self, grid, stream):
        return grid, stream


@pytest.fixture(params=GLUON_VERSIONS, ids=str)
def version(request, monkeypatch):
    """Versions of Triton, at the first of which the driver's functions have other names."""
    monkeypatch.setattr(driver_call, "triton_version", lambda: request.param)
    return request.param


@pytest.fixture
def encoded(monkeypatch, version):
    """Addresses that the driver has encoded, one after another."""
    addresses = []

    def fill(pointer, swizzle, elem_size, elem_type, block_size, shape, strides, padding):
        addresses.append(pointer)
        return f"map of {pointer}"

    name = "fill_tma_descriptor" if version == (3, 6) else "fill_tma_descriptor_tiled"
    utils = SimpleNamespace(**{name: fill})
    monkeypatch.setattr(
        gluon_launch, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils))
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)
    return addresses


def tokens(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


def start(launcher, x, out, number=5, constants=CONSTANTS):
    launcher(3, (Rows(x, 64, 64), out, None, number), constants, maxnreg=168)


def expected(x, out, number=5, watchers=(None, None, None)):
    B, S, H, D = x.shape
    b, s, h, d = x.stride()
    head = (3, 1, 1, STREAM, Kernel.function, False, False)
    args = [f"map of {x.data_ptr()}", B, H, S, D, b, h, s, d, out.data_ptr(), None, number]
    args += CONSTANTS.values()
    if driver_call.triton_version() == (3, 6):
        return (*head, None, None, Kernel.packed_metadata, *watchers, *args)
    types = ("annotations", b"signature")
    return (*head, Kernel.packed_metadata, *watchers, None, None, *types, args)


def test_later_starts_go_to_the_driver(encoded):
    kernel = Kernel(1)
    launcher = GluonLauncher(kernel)
    out = tokens(1, 8, 2, 64)
    xs = [tokens(1, 8, 2, 64) for _ in range(3)]
    for x in (xs[0], *xs, *xs):
        start(launcher, x, out)
    assert kernel.bound == 1
    assert kernel.starts == [expected(x, out) for x in (*xs, *xs)]
    assert encoded == [x.data_ptr() for x in xs]


def test_each_shape_is_encoded_by_itself(encoded):
    launcher = GluonLauncher(kernel := Kernel(1))
    memory = tokens(1, 8, 4, 64)
    views = (memory, memory[:, :4], memory[:, :, :2], memory.view(1, 16, 2, 64))
    for x in (memory, *views):
        start(launcher, x, memory)
    assert kernel.starts == [expected(x, memory) for x in views]
    assert encoded == [memory.data_ptr()] * len(views)


def test_flat_arguments_are_encoded_too(encoded):
    launcher = GluonLauncher(kernel := Kernel(2))
    x, sums = tokens(1, 8, 2, 64), torch.zeros(64, 32)
    for _ in range(2):
        launcher(3, (Rows(x, 64, 64), Flat(sums, (64, 32)), 5), CONSTANTS, maxnreg=168)
    [start_args] = kernel.starts
    args = tuple(start_args[-1]) if type(start_args[-1]) is list else start_args
    assert args[-8:] == (f"map of {sums.data_ptr()}", 64, 32, 32, 1, 5, 128, False)


def test_other_constants_are_compiled_anew(encoded):
    launcher = GluonLauncher(kernel := Kernel(1))
    x = tokens(1, 8, 2, 64)
    for constants in (CONSTANTS, {**CONSTANTS, "NEGATE": True}):
        start(launcher, x, x, constants=constants)
    assert kernel.bound == 2


def test_other_dtypes_of_any_tensor_are_compiled_anew(encoded):
    launcher = GluonLauncher(kernel := Kernel(1))
    x = tokens(1, 8, 2, 64)
    for out in (x, x.float(), x):
        start(launcher, x, out)
    assert kernel.bound == 2


def test_profilers_see_the_launch(encoded, monkeypatch):
    launcher = GluonLauncher(kernel := Kernel(1))
    x = tokens(1, 8, 2, 64)
    hooks = SimpleNamespace(
        launch_enter_hook=SimpleNamespace(calls=[print]), launch_exit_hook="leave"
    )
    monkeypatch.setattr(gluon_launch, "knobs", SimpleNamespace(runtime=hooks))
    for _ in range(2):
        start(launcher, x, x)
    watchers = (((3, 1, 1), STREAM), hooks.launch_enter_hook, "leave")
    assert kernel.starts == [expected(x, x, watchers=watchers)]


def test_launch_is_repeated_on_other_tensors(encoded, monkeypatch):
    monkeypatch.setattr(replay, "_launches_here", lambda tensor: True)
    launcher = GluonLauncher(kernel := Kernel(1))

    def attend(x):
        out = x.new_empty(x.shape)
        start(launcher, x, out, number=len(computed))
        computed.append(x)
        return out

    computed = []
    attention = replay.Replayed(attend)
    calls = [(x, attention(x)) for x in (tokens(1, 8, 2, 64) for _ in range(4))]
    assert len(computed) == 2
    assert kernel.starts == [expected(x, out, number=1) for x, out in calls[1:]]
