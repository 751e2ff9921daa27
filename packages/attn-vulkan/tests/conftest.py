"""A Vulkan loader made of Python callbacks.

The probe calls it through the same C pointers as a real one. Answers are written at the byte
offsets of the specification, so a wrong structure in the package shows as a wrong answer.
"""

# ruff: noqa: ARG002  (the fake functions have the arguments of the real ones)
from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator
from ctypes import c_int32, c_uint32, c_void_p
from dataclasses import dataclass, field
from typing import Any

import pytest

from attn_core import BackendUnavailableError, backends
from attn_core.testing.plugin import register_device
from attn_vulkan import _backend, device
from attn_vulkan._vk import instance, loader

VERSION_1_3_230 = 1 << 22 | 3 << 12 | 230

PROPERTIES_SUBGROUP = 1000094000
PROPERTIES_DRIVER = 1000196000


@dataclass
class FakeDevice:
    """One device; `features` and `properties` map a structure's sType to its words in order."""

    name: str = "Fake GPU"
    type: int = 2
    version: int = VERSION_1_3_230
    heaps: tuple[tuple[int, int], ...] = ((16 << 30, 0), (8 << 30, 1))
    extensions: tuple[str, ...] = ()
    features: dict[int, tuple[int, ...]] = field(default_factory=dict)
    properties: dict[int, tuple[int, ...]] = field(default_factory=dict)


class FakeLoader:
    """Stands for the opened library; counts what is created and destroyed."""

    def __init__(
        self, *devices: FakeDevice, version: int = VERSION_1_3_230, create: int = 0
    ) -> None:
        self.devices = devices
        self.version = version
        self.create_result = create
        self.instance_extensions: tuple[str, ...] = ()
        self.enumerate_result = 0
        self.missing: set[str] = set()
        self.created = 0
        self.destroyed = 0
        self.instance_flags = 0
        self._callbacks = {
            name: ctypes.CFUNCTYPE(returns, *[c_void_p] * arguments)(function)
            for name, (returns, arguments, function) in self._functions().items()
        }

        def get_instance_proc_addr(instance: c_void_p | None, name: bytes) -> int | None:
            if name.decode() in self.missing or (instance is None) != (name in _GLOBAL):
                return None
            return ctypes.cast(self._callbacks[name.decode()], c_void_p).value

        self.vkGetInstanceProcAddr = get_instance_proc_addr

    def _functions(self) -> dict[str, tuple[Any, int, Callable[..., Any]]]:
        return {
            "vkEnumerateInstanceVersion": (c_int32, 1, self._instance_version),
            "vkEnumerateInstanceExtensionProperties": (c_int32, 3, self._instance_extensions),
            "vkCreateInstance": (c_int32, 3, self._create),
            "vkDestroyInstance": (None, 2, self._destroy),
            "vkEnumeratePhysicalDevices": (c_int32, 3, self._enumerate),
            "vkEnumerateDeviceExtensionProperties": (c_int32, 4, self._device_extensions),
            "vkGetPhysicalDeviceProperties": (None, 2, self._properties),
            "vkGetPhysicalDeviceProperties2": (None, 2, self._properties2),
            "vkGetPhysicalDeviceFeatures2": (None, 2, self._features2),
            "vkGetPhysicalDeviceMemoryProperties": (None, 2, self._memory),
            "vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR": (c_int32, 3, self._matrices),
        }

    def _instance_version(self, answer: int) -> int:
        c_uint32.from_address(answer).value = self.version
        return 0

    def _instance_extensions(self, layer: int | None, count: int, items: int | None) -> int:
        return _write_extensions(self.instance_extensions, count, items)

    def _create(self, info: int, allocator: int | None, handle: int) -> int:
        if self.create_result:
            return self.create_result
        self.created += 1
        self.instance_flags = c_uint32.from_address(info + 16).value
        c_void_p.from_address(handle).value = 0x1234
        return 0

    def _destroy(self, instance: int, allocator: int | None) -> None:
        assert instance == 0x1234
        self.destroyed += 1

    def _enumerate(self, instance: int, count: int, items: int | None) -> int:
        if self.enumerate_result:
            return self.enumerate_result
        return _write_list(
            count, items, 8, [struct.pack("<Q", i + 1) for i in range(len(self.devices))]
        )

    def _device_extensions(
        self, device: int, layer: int | None, count: int, items: int | None
    ) -> int:
        return _write_extensions(self.devices[device - 1].extensions, count, items)

    def _properties(self, device: int, answer: int) -> None:
        fake = self.devices[device - 1]
        packed = struct.pack("<5I256s", fake.version, 7, 0, 0, fake.type, fake.name.encode())
        ctypes.memmove(answer, packed.ljust(824, b"\0"), 824)

    def _properties2(self, device: int, head: int) -> None:
        answers = {
            PROPERTIES_SUBGROUP: struct.pack("<4I", 32, 0, 0, 0),
            PROPERTIES_DRIVER: struct.pack("<I256s256s4x", 0, b"fakevk", b"1.2.3"),
        }
        for stype, words in self.devices[device - 1].properties.items():
            answers[stype] = struct.pack(f"<{len(words)}I", *words)
        stype, answer = _following(head)
        packed = answers.get(stype, b"")
        ctypes.memmove(answer + 16, packed, len(packed))

    def _features2(self, device: int, head: int) -> None:
        stype, answer = _following(head)
        if answer is None:
            return
        flags = self.devices[device - 1].features.get(stype, ())
        ctypes.memmove(answer + 16, struct.pack(f"<{len(flags)}I", *flags), 4 * len(flags))

    def _matrices(self, device: int, count: int, items: int | None) -> int:
        shape = struct.pack("<IxxxxQ3I4iIi4x", 0, 0, 16, 16, 16, 0, 0, 1, 1, 0, 3)
        return _write_list(count, items, len(shape), [shape])

    def _memory(self, device: int, answer: int) -> None:
        heaps = self.devices[device - 1].heaps
        c_uint32.from_address(answer + 260).value = len(heaps)
        for i, (size, flags) in enumerate(heaps):
            ctypes.memmove(answer + 264 + 16 * i, struct.pack("<QI4x", size, flags), 16)


_GLOBAL = {
    b"vkEnumerateInstanceVersion",
    b"vkEnumerateInstanceExtensionProperties",
    b"vkCreateInstance",
}


def _following(head: int) -> tuple[int, int | None]:
    following = c_void_p.from_address(head + 8).value
    return (c_uint32.from_address(following).value if following else 0), following


def _write_extensions(names: tuple[str, ...], count: int, items: int | None) -> int:
    packed = [struct.pack("<256sI", name.encode(), 1) for name in names]
    return _write_list(count, items, 260, packed)


def _write_list(count: int, items: int | None, size: int, packed: list[bytes]) -> int:
    room = c_uint32.from_address(count).value
    written = len(packed) if items is None else min(room, len(packed))
    c_uint32.from_address(count).value = written
    if items is not None:
        for i, item in enumerate(packed[:written]):
            ctypes.memmove(items + size * i, item, size)
    return 0 if written == len(packed) else 5


@pytest.fixture(autouse=True)
def cache_elsewhere(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))


def has_device() -> bool:
    try:
        return bool(device.devices())
    except BackendUnavailableError:
        return False


register_device("vulkan", has_device)
for backend in _backend.backends():  # also where only the source of the distribution is there
    backends.register(backend)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "vulkan: needs a Vulkan device; Mesa's lavapipe will do")


@pytest.fixture(autouse=True)
def forget_devices() -> Iterator[None]:
    device._probe.cache_clear()
    yield
    device._probe.cache_clear()


@pytest.fixture
def fake_device() -> type[FakeDevice]:
    return FakeDevice


@pytest.fixture
def use_loader(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeLoader]:
    def use(*devices: FakeDevice, **options: int) -> FakeLoader:
        fake = FakeLoader(*devices, **options)
        monkeypatch.setattr(instance, "open_loader", lambda: fake)
        return fake

    return use


@pytest.fixture
def no_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loader.LOADER_VARIABLE, "/nowhere/libvulkan.so.1")


@pytest.fixture
def real_device() -> None:
    """Skip where no driver finds a device, with the reason."""
    try:
        found = device.devices()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    if not found:
        pytest.skip(device.NO_DEVICE)
