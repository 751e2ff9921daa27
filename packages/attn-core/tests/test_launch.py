"""Launcher: what it remembers of a kernel, with a kernel that only takes notes."""

import pytest
import torch

from attn_core import launch
from attn_core.launch import Launcher
from attn_core.tuning import TileConfig

CONFIG = TileConfig(64, 32, num_warps=8, num_stages=3)


class Kernel:
    """Stands in for triton.JITFunction and for what it compiles to."""

    def __init__(self):
        self.compiled, self.restarted = [], []

    def __getitem__(self, grid):
        return lambda *args, **options: self._compile(grid, args, options)

    def _compile(self, grid, args, options):
        self.compiled.append((grid, args, options))
        return Compiled(self.restarted)


class Compiled:
    def __init__(self, restarted):
        self._restarted = restarted

    def __getitem__(self, grid):
        return lambda *args: self._restarted.append((grid, args))


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    """Pretend to have a Triton whose kernels can be started again."""
    monkeypatch.setattr(launch, "triton_version", lambda: (3, 6))


@pytest.fixture
def kernel():
    return Kernel()


def start(launcher, *, num_programs=5, x=None, length=7, strides=(1,), block=64, config=CONFIG):
    x = torch.zeros(8) if x is None else x
    launcher(num_programs, strides, (x, length), {"BLOCK": block, "IS_CAUSAL": True}, config)
    return x


def test_first_call_compiles_with_the_config(kernel):
    x = start(Launcher(kernel))
    options = {"BLOCK": 64, "IS_CAUSAL": True, "num_warps": 8, "num_stages": 3}
    assert kernel.compiled == [((5,), (x, 7), options)]


def test_second_call_starts_what_the_first_compiled(kernel):
    launcher = Launcher(kernel)
    start(launcher)
    x = start(launcher, num_programs=9, length=11)
    assert len(kernel.compiled) == 1
    assert kernel.restarted == [((9, 1, 1), (x, 11, 64, True))]


@pytest.mark.parametrize(
    "change",
    [
        {"strides": (2,)},
        {"block": 32},
        {"config": CONFIG._replace(num_warps=4)},
        {"x": torch.zeros(8, dtype=torch.float16)},
        {"x": torch.zeros(8, device="meta")},
    ],
    ids=["strides", "constexpr", "config", "dtype", "device"],
)
def test_other_problems_are_compiled_for_themselves(kernel, change):
    launcher = Launcher(kernel)
    start(launcher)
    start(launcher, **change)
    assert len(kernel.compiled) == 2
    assert kernel.restarted == []


def test_misaligned_tensors_go_through_triton(kernel):
    launcher = Launcher(kernel)
    misaligned = torch.zeros(9)[1:]
    for x in (misaligned, None, misaligned):
        start(launcher, x=x)
    assert len(kernel.compiled) == 3
    start(launcher)
    assert len(kernel.restarted) == 1


def test_other_versions_of_triton_bind_every_launch(kernel, monkeypatch):
    monkeypatch.setattr(launch, "triton_version", lambda: (3, 9))
    launcher = Launcher(kernel)
    start(launcher)
    start(launcher)
    assert len(kernel.compiled) == 2


def test_memory_is_bounded(kernel, monkeypatch):
    monkeypatch.setattr(launch, "_MAX_REMEMBERED", 2)
    launcher = Launcher(kernel)
    for stride in range(5):
        start(launcher, strides=(stride,))
        assert len(launcher._compiled) <= 2
