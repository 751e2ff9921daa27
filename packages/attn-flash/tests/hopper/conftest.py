"""Gluon is experimental: kernels are tested on the versions of Triton that the backend takes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from attn_core.device import GLUON_VERSIONS, triton_version
from attn_core.testing.hopper import emulation

# In the order in which they import one another.
MODULES = (
    "primitives", "softmax", "problem", "descriptors", "schedules",
    "forward_tiles", "forward_producer", "forward_consumer", "forward", "forward_short",
    "backward_sums", "backward_tiles", "backward_consumer", "backward_loader", "backward_adder",
    "backward", "backward_short", "backward_wide", "attention",
)  # fmt: skip
LAUNCHERS = {
    "forward": ("_launch",),
    "forward_short": ("_launch",),
    "backward": ("_launch",),
    "backward_short": ("_launch",),
    "backward_wide": ("_launch_dk_dv", "_launch_dq"),
}
SMS = 2


@pytest.fixture(autouse=True)
def runs_here(request):
    is_known = triton_version() in GLUON_VERSIONS
    if request.node.get_closest_marker("compile") and not is_known:
        pytest.skip("the backend refuses this version of Triton, see test_support.py")
    if request.node.get_closest_marker("gpu"):
        device = request.getfixturevalue("device")
        is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
        if not is_known or not is_hopper:
            pytest.skip("the kernels are for Hopper GPUs and the versions of Triton they know")


@pytest.fixture
def hopper(monkeypatch):
    """The modules of the backend on an emulated GPU of `SMS` multiprocessors."""
    with emulation(*(f"attn_flash._hopper.{name}" for name in MODULES)) as modules:
        hopper = SimpleNamespace(**dict(zip(MODULES, modules, strict=True)))
        hopper.counter = torch.zeros(1, dtype=torch.int32)
        monkeypatch.setattr(hopper.problem, "num_sms", lambda device: SMS)
        monkeypatch.setattr(hopper.problem, "tile_counter", lambda device: hopper.counter)
        for name, launchers in LAUNCHERS.items():
            module = getattr(hopper, name)
            for launcher in launchers:
                start = starter(getattr(module, launcher)._kernel)
                monkeypatch.setattr(module, launcher, start)
        yield hopper


def starter(kernel):
    """What does without the driver what a `GluonLauncher` does."""

    def start(num_programs, args, constants, maxnreg):
        kernel[num_programs,](*args, **constants, maxnreg=maxnreg)

    return start


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("attn_core.testing.hopper._threads.PATIENCE", 0.5)


@pytest.fixture
def late(monkeypatch):
    """Copies that land, and threads that fall behind, later than other tests have time for."""
    monkeypatch.setattr("attn_core.testing.hopper._threads.LATENESS", 0.02)
