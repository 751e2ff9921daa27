from __future__ import annotations

import ctypes.util
import sys
from types import SimpleNamespace

import pytest

from attn_vulkan import LoaderNotFound, devices
from attn_vulkan._vk import loader


def open_only(monkeypatch, *there):
    tried = []

    def fake_open(name):
        tried.append(name)
        if name not in there:
            raise OSError(name)
        return SimpleNamespace(vkGetInstanceProcAddr=None)

    monkeypatch.setattr(loader, "_open", fake_open)
    return tried


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv(loader.LOADER_VARIABLE, raising=False)


@pytest.mark.parametrize(
    "platform,files",
    [
        ("linux", ["libvulkan.so.1", "libvulkan.so"]),
        ("win32", ["vulkan-1.dll"]),
        ("darwin", ["libvulkan.1.dylib", "/opt/homebrew/lib/libMoltenVK.dylib"]),
    ],
)
def test_candidates(monkeypatch, platform, files):
    monkeypatch.setattr(sys, "platform", platform)
    assert set(files) <= set(loader.candidates())


def test_macos_prefers_the_loader_to_moltenvk(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    tried = open_only(monkeypatch, "libvulkan.1.dylib", "libMoltenVK.dylib")
    loader.open_loader()
    assert tried == ["libvulkan.1.dylib"]


def test_the_next_candidate_is_tried(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    tried = open_only(monkeypatch, "libvulkan.so")
    loader.open_loader()
    assert tried == ["libvulkan.so.1", "libvulkan.so"]


def test_the_variable_takes_the_place_of_the_candidates(monkeypatch):
    monkeypatch.setenv(loader.LOADER_VARIABLE, "/opt/mine.so")
    tried = open_only(monkeypatch, "libvulkan.so.1")
    with pytest.raises(LoaderNotFound, match=r"no Vulkan loader found \(tried /opt/mine\.so\)"):
        loader.open_loader()
    assert tried == ["/opt/mine.so"]


def test_a_library_that_is_no_loader_is_passed_over(monkeypatch):
    monkeypatch.setenv(loader.LOADER_VARIABLE, ctypes.util.find_library("c") or "libc.so.6")
    with pytest.raises(LoaderNotFound):
        loader.open_loader()


def test_devices_without_a_loader(no_loader):
    with pytest.raises(LoaderNotFound, match="no Vulkan loader found"):
        devices()
