"""The pytest plugin: ``pytest -p attn_core.testing.plugin``.

Options
    ``--device NAME``: run on this device, ``cpu`` by default. It is an error when it is absent.
    ``--allow-missing``: skip what needs the device instead.
Markers
    ``gpu`` runs only with a ``--device`` other than ``cpu``. ``interpret`` runs Triton kernels in
    its interpreter, only under ``TRITON_INTERPRET=1``. ``compile`` compiles kernels ahead of time,
    without a GPU.
Fixtures
    ``device``, the torch.device of ``--device``. Under pytest-xdist the workers share the GPUs out.
    ``use_target``, a function that makes every device look like a GPU that need not be there.

Random numbers are seeded before each test, from its name.
"""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from attn_core import tuning
from attn_core.device import DeviceInfo, device_info, list_devices
from attn_core.testing.inputs import seed_from

_MARKERS = (
    "gpu: needs a --device other than cpu",
    "interpret: runs Triton kernels in the interpreter, needs TRITON_INTERPRET=1",
    "compile: compiles Triton kernels ahead of time, needs no GPU",
)
# Triton's interpreter computes with numpy, which warns of what a GPU does silently. An invalid
# value (inf - inf) stays an error: kernels are written so that there is none.
_INTERPRETER_WARNINGS = (
    "ignore:Conversion of an array with ndim > 0:DeprecationWarning",
    "ignore:divide by zero encountered:RuntimeWarning",
    "ignore:overflow encountered:RuntimeWarning",
)
_extra_devices: dict[str, Callable[[], bool]] = {}


def register_device(name: str, is_present: Callable[[], bool]) -> None:
    """Let ``--device`` take a device that is none of torch's; its tensors live on the CPU.

    Parameters
    ----------
    name : str
        What follows ``--device``, such as ``"vulkan"``.
    is_present : callable
        Whether this machine has one. Call this from a conftest.py.
    """
    _extra_devices[name] = is_present


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("attn", "attention kernels")
    group.addoption(
        "--device",
        default="cpu",
        metavar="NAME",
        help="device to run on: cpu (default), cuda, hip, vulkan or another name torch knows",
    )
    group.addoption(
        "--allow-missing",
        action="store_true",
        help="skip tests of an absent --device instead of failing",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers and fix what Triton reads from the environment."""
    # The default changes in Triton 3.10, and with it the last bits of results.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)
    if _is_interpreting():
        for warning in _INTERPRETER_WARNINGS:
            config.addinivalue_line("filterwarnings", warning)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse a device that is not there."""
    if session.config.getoption("--allow-missing"):
        return
    name = session.config.getoption("--device")
    if find_device(name) is None:
        raise pytest.UsageError(
            f"--device {name} is not present here, only {', '.join(_present_devices())} "
            "(--allow-missing skips its tests)"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests this run cannot make, each with its reason."""
    for marker, reason in _reasons_to_skip(config).items():
        for item in items:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed every generator from the test's name, so that a test alone is the test in a suite."""
    seed = seed_from(item.nodeid.rpartition("/")[2])
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Device of ``--device``, made the current one if it is a GPU."""
    name = request.config.getoption("--device")
    found = find_device(name)
    if found is None:
        pytest.skip(f"no {name} device")
    if found.type == "cuda":
        torch.cuda.set_device(found)
    return found


@pytest.fixture
def use_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """A function that makes every device look like one of a target's architecture, untuned.

    `modules` are those that look at the device beside `attn_core.tuning`.
    """
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("ATTN_TUNE", raising=False)

    def use(target: str, *, modules: Iterable[ModuleType] = (), num_sms: int = 0) -> None:
        kind = "hip" if target.startswith("gfx") else "cuda"
        info = DeviceInfo(kind, target, target, num_sms)
        for module in (tuning, *modules):
            monkeypatch.setattr(module, "device_info", lambda device: info)
        tuning.forget()

    yield use
    tuning.forget()


def find_device(name: str) -> torch.device | None:
    """Return the torch.device that tests of ``--device name`` put tensors on, None if absent."""
    found = _present_devices().get(name, [])
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return found[worker % len(found)] if found else None


def _present_devices() -> dict[str, list[torch.device]]:
    present: dict[str, list[torch.device]] = {}
    for device in list_devices():
        present.setdefault(device_info(device).type, []).append(device)
    for name, is_present in _extra_devices.items():
        if is_present():
            present[name] = [torch.device("cpu")]
    return present


def _is_interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _reasons_to_skip(config: pytest.Config) -> dict[str, str]:
    name = config.getoption("--device")
    reasons = {}
    if name == "cpu":
        reasons["gpu"] = "needs --device cuda, hip or another GPU"
    elif find_device(name) is None:
        reasons["gpu"] = f"no {name} device"
    if not _is_interpreting():
        reasons["interpret"] = "needs TRITON_INTERPRET=1"
    else:
        reasons["compile"] = "cannot compile under TRITON_INTERPRET=1"
    if not _has_triton():
        reasons["interpret"] = reasons["compile"] = "triton is not installed"
    return reasons
