"""What the runtime promises: placement without copies, threads, errors, caches, nothing leaked."""

from __future__ import annotations

import ctypes
import itertools
import threading

import numpy as np
import pytest

import attn_vulkan
from attn_vulkan import placement
from attn_vulkan._vk.errors import DeviceLostError, VulkanOutOfMemoryError, error_of
from attn_vulkan.runtime import context as context_module
from attn_vulkan.runtime.context import open_context

pytestmark = [pytest.mark.vulkan, pytest.mark.usefixtures("real_device")]


@pytest.fixture
def problem():
    random = np.random.default_rng(0)
    return [random.standard_normal((1, 40, 2, 32), np.float32) for _ in range(3)]


def test_one_context_for_a_device():
    assert open_context() is open_context()


def test_host_memory_is_imported_in_place(problem, monkeypatch):
    context = open_context()
    if not context.device.features.external_memory_host:
        pytest.skip("the device does not import host memory")
    monkeypatch.setattr(placement, "IMPORT_FROM_BYTES", 0)
    imported = []
    real = type(context.memory).import_host

    def spy(memory, pointer, size):
        imported.append((pointer, size))
        return real(memory, pointer, size)

    monkeypatch.setattr(type(context.memory), "import_host", spy)
    attn_vulkan.attention(*problem)
    for array in problem:
        start = array.ctypes.data
        assert any(p <= start and start + array.nbytes <= p + size for p, size in imported)
    ends = sorted((p, p + size) for p, size in imported)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))


def test_staging_gives_the_same_bits(problem, monkeypatch):
    expected = attn_vulkan.attention(*problem)
    monkeypatch.setattr(placement.Placement, "_is_imported", lambda *_: False)
    np.testing.assert_array_equal(attn_vulkan.attention(*problem), expected)


def test_a_discrete_gpu_gives_the_same_bits(problem, monkeypatch):
    expected = attn_vulkan.attention(*problem)
    monkeypatch.setattr(placement, "_SHARED_MEMORY", ())
    monkeypatch.setattr(placement, "IMPORT_FROM_BYTES", 0)
    np.testing.assert_array_equal(attn_vulkan.attention(*problem), expected)


def test_threads(problem):
    expected = attn_vulkan.attention(*problem)
    results = []

    def work():
        results.extend(attn_vulkan.attention(*problem) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    for result in results:
        np.testing.assert_array_equal(result, expected)


def test_calls_leave_no_buffers_behind(problem):
    context = open_context()
    attn_vulkan.attention(*problem)
    context.memory.trim()
    live = context.memory.live
    for _ in range(3):
        attn_vulkan.attention(*problem)
    context.memory.trim()
    assert context.memory.live == live


def test_an_error_while_recording_leaves_no_buffers_behind(problem, monkeypatch):
    context = open_context()
    context.memory.trim()
    live = context.memory.live

    def fail(*_):
        raise VulkanOutOfMemoryError("none left")

    monkeypatch.setattr(type(context.pipelines), "get", fail)
    with pytest.raises(VulkanOutOfMemoryError):
        attn_vulkan.attention(*problem)
    monkeypatch.undo()
    context.memory.trim()
    assert context.memory.live == live
    attn_vulkan.attention(*problem)


def test_out_of_memory_is_named(monkeypatch):
    memory = open_context().memory

    def fail(*_):
        raise error_of("vkAllocateMemory", -2)

    monkeypatch.setattr(type(memory), "_allocate", fail)
    with pytest.raises(VulkanOutOfMemoryError, match=r"no memory for \d+ bytes: vkAllocateMemory"):
        memory.allocate(123 << 20)


def test_a_lost_device_is_opened_again(problem, monkeypatch):
    context = open_context()

    def fail(*_):
        # A lost device works on nothing any more; this one must be done with the arrays too.
        context.functions.vkDeviceWaitIdle(context.handle)
        raise error_of("vkGetSemaphoreCounterValue", -4)

    monkeypatch.setattr(context.functions, "vkGetSemaphoreCounterValue", fail)
    try:
        with pytest.raises(DeviceLostError, match="VK_ERROR_DEVICE_LOST"):
            attn_vulkan.attention(*problem)
        assert open_context() is not context
        assert np.isfinite(attn_vulkan.attention(*problem)).all()
    finally:
        monkeypatch.undo()


def test_pipelines_are_kept_on_disk(problem, monkeypatch, tmp_path):
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(context_module, "_contexts", {})
    context = open_context()
    attn_vulkan.attention(*problem)
    context.close()
    (file,) = tmp_path.iterdir()
    assert file.name.startswith(f"vulkan-{context.device.uuid}")
    assert file.stat().st_size >= 32  # a header, and what the driver cares to keep
    file.write_bytes(b"not a cache" * 10)
    context = open_context()
    assert np.isfinite(attn_vulkan.attention(*problem)).all()
    context.close()


def test_copies_and_timestamps():
    context = open_context()
    source, target = (context.memory.allocate(4096, "staging") for _ in range(2))
    ctypes.memset(source.pointer, 7, 4096)
    ctypes.memset(target.pointer, 0, 4096)
    with context.commands() as commands:
        commands.keep(source)
        commands.keep(target)
        commands.timestamp()
        commands.copy(source, 0, target, 16, 32)
        commands.timestamp()
    copied = ctypes.string_at(target.pointer, 64)
    assert copied == bytes(16) + b"\x07" * 32 + bytes(16)
    start, end = commands.seconds()
    assert 0 <= end - start < 10
