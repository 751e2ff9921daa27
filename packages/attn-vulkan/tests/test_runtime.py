"""What the runtime promises: placement without copies, threads, errors, caches, nothing leaked."""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import itertools
import os
import threading
import types

import numpy as np
import pytest

import attn_vulkan
from attn_vulkan import placement
from attn_vulkan._vk.errors import (
    DeviceLostError,
    VulkanError,
    VulkanOutOfMemoryError,
    error_of,
)
from attn_vulkan._vk.functions import Functions
from attn_vulkan.runtime import context as context_module
from attn_vulkan.runtime.context import open_context

ERROR_OUT_OF_DEVICE_MEMORY = -2

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


@pytest.mark.parametrize("smallest_import", [0, 1 << 30], ids=["imported", "staged"])
def test_a_discrete_gpu_gives_the_same_gradients(problem, monkeypatch, smallest_import):
    out, lse = attn_vulkan.attention(*problem, return_lse=True)
    dout = np.ones_like(out)
    expected = attn_vulkan.attention_backward(dout, *problem, out, lse)
    monkeypatch.setattr(placement, "_SHARED_MEMORY", ())
    monkeypatch.setattr(placement, "IMPORT_FROM_BYTES", smallest_import)
    open_context().memory.trim()  # results of earlier calls are no help
    grads = attn_vulkan.attention_backward(dout, *problem, out, lse)
    for grad, want in zip(grads, expected, strict=True):
        np.testing.assert_array_equal(grad, want)


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


CREATED = {
    "vkCreateInstance": "vkDestroyInstance",
    "vkCreateDevice": "vkDestroyDevice",
    "vkCreateSemaphore": "vkDestroySemaphore",
    "vkCreatePipelineLayout": "vkDestroyPipelineLayout",
    "vkCreatePipelineCache": "vkDestroyPipelineCache",
    "vkCreateShaderModule": "vkDestroyShaderModule",
    "vkCreateComputePipelines": "vkDestroyPipeline",
    "vkCreateCommandPool": "vkDestroyCommandPool",
    "vkCreateQueryPool": "vkDestroyQueryPool",
    "vkCreateBuffer": "vkDestroyBuffer",
    "vkAllocateMemory": "vkFreeMemory",
}


@pytest.fixture
def driver(monkeypatch):
    """A driver that counts what it makes, and fails where `failing` names a function."""
    real = Functions.__getattr__
    state = types.SimpleNamespace(alive=collections.Counter(), failing=None)
    made_by = {destroyer: creator for creator, destroyer in CREATED.items()}

    def find(functions, name):
        function = real(functions, name)

        def call(*arguments):
            if name == state.failing:
                raise error_of(name, ERROR_OUT_OF_DEVICE_MEMORY)
            if name in made_by and any(arguments[-2:-1]):  # to destroy nothing is allowed
                state.alive[made_by[name]] -= 1
            result = function(*arguments)
            state.alive[name] += name in CREATED
            return result

        setattr(functions, name, call)
        return call

    monkeypatch.setattr(Functions, "__getattr__", find)
    monkeypatch.setattr(context_module, "_contexts", {})
    return state


@pytest.mark.parametrize(
    "function", [*CREATED, "vkAllocateCommandBuffers", "vkBeginCommandBuffer", "vkQueueSubmit"]
)
def test_a_function_that_fails_leaves_nothing_behind(driver, problem, function):
    driver.failing = function
    with pytest.raises(VulkanOutOfMemoryError, match=f"{function} failed"):
        attn_vulkan.attention(*problem)
    driver.failing = None
    assert np.isfinite(attn_vulkan.attention(*problem)).all()
    context_module.close_all()
    assert not +driver.alive


def test_a_lost_device_is_opened_again(problem, monkeypatch):
    context = open_context()

    def fail(*_):
        raise error_of("vkGetSemaphoreCounterValue", -4)

    monkeypatch.setattr(context.functions, "vkGetSemaphoreCounterValue", fail)
    with pytest.raises(DeviceLostError, match="VK_ERROR_DEVICE_LOST"):
        attn_vulkan.attention(*problem)
    assert open_context() is not context
    assert np.isfinite(attn_vulkan.attention(*problem)).all()
    with (
        pytest.raises(DeviceLostError, match="was closed: call again to open it"),
        context.in_use(),
    ):
        pass


@pytest.mark.parametrize("function", ["_reached", "_submit"], ids=["waiting", "submitting"])
def test_an_interrupted_call_ends_when_the_device_does(problem, monkeypatch, function):
    context = open_context()
    attn_vulkan.attention(*problem)
    events = []
    real_submit = context._submit
    real_release, real_idle = context.memory.release, context.functions.vkDeviceWaitIdle

    def interrupt(*arguments):
        if function == "_submit":
            real_submit(*arguments)
        raise KeyboardInterrupt

    def release(buffer):
        events.append("release")
        real_release(buffer)

    def wait_idle(*arguments):
        events.append("idle")
        return real_idle(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(context.memory, "release", release)
        patch.setattr(context.functions, "vkDeviceWaitIdle", wait_idle)
        patch.setattr(context, function, interrupt)
        with pytest.raises(KeyboardInterrupt):
            attn_vulkan.attention(*problem)
    assert events[0] == "idle"
    assert "release" in events
    assert open_context() is context
    assert np.isfinite(attn_vulkan.attention(*problem)).all()


def test_a_context_is_destroyed_by_its_last_user(monkeypatch):
    monkeypatch.setattr(context_module, "_contexts", {})
    context = open_context()
    destroyed = []
    real = context._destroy

    def destroy():
        destroyed.append(context)
        real()

    monkeypatch.setattr(context, "_destroy", destroy)
    with context.in_use():
        context.close()
        assert not destroyed
        context.close()
    assert destroyed == [context]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_child_process_opens_its_own_device():
    open_context()
    child = os.fork()
    if not child:
        os._exit(len(context_module._contexts))
    assert os.waitpid(child, 0)[1] == 0


def test_outputs_are_fetched_before_their_buffers_are_reused(problem, monkeypatch):
    context = open_context()
    expected = attn_vulkan.attention(*problem)
    monkeypatch.setattr(placement.Placement, "_is_imported", lambda *_: False)
    real = context.memory.release

    def overwritten_at_once(buffer):
        if buffer.pointer and buffer.kind == "staging":
            ctypes.memset(buffer.pointer, 255, buffer.size)
        real(buffer)

    monkeypatch.setattr(context.memory, "release", overwritten_at_once)
    np.testing.assert_array_equal(attn_vulkan.attention(*problem), expected)


@pytest.mark.parametrize("value", ["99", "-1", "first"])
def test_a_device_that_is_not_there(monkeypatch, value):
    monkeypatch.setenv("ATTN_VULKAN_DEVICE", value)
    message = rf"ATTN_VULKAN_DEVICE must be between 0 and \d+, got {value}"
    with pytest.raises(VulkanError, match=message):
        open_context()


def test_pipelines_are_kept_on_disk(problem, monkeypatch, tmp_path):
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(context_module, "_contexts", {})
    context = open_context()
    attn_vulkan.attention(*problem)
    context.close()
    (file,) = tmp_path.iterdir()  # and no temporary one
    assert file.name.startswith(f"vulkan-{context.device.uuid}")
    assert file.stat().st_size  # a header, and what the driver cares to keep
    file.write_bytes(b"not a cache" * 10)
    context = open_context()
    assert np.isfinite(attn_vulkan.attention(*problem)).all()
    context.close()


def test_copies_and_timestamps():
    context = open_context()
    source, target = (context.memory.allocate(4096, "staging") for _ in range(2))
    ctypes.memset(source.pointer, 7, 4096)
    ctypes.memset(target.pointer, 0, 4096)
    found = []
    with context.commands() as commands:
        commands.keep(source)
        commands.keep(target)
        commands.timestamp()
        commands.copy(source, 0, target, 16, 32)
        commands.timestamp()
        commands.then(lambda: found.append(ctypes.string_at(target.pointer, 64)))
        commands.then(lambda: found.extend(commands.seconds()))
    copied, start, end = found
    assert copied == bytes(16) + b"\x07" * 32 + bytes(16)
    assert 0 <= end - start < 10


@pytest.fixture
def small_dispatches(monkeypatch):
    """The device allows few workgroups in a dispatch: problems are computed in parts."""

    def allow(*workgroups):
        context = open_context()
        device = dataclasses.replace(context.device, workgroups=workgroups)
        monkeypatch.setattr(context, "device", device)

    return allow


@pytest.mark.parametrize("workgroups", [(99, 9, 1), (4, 9, 9), (4, 2, 1)], ids=str)
def test_more_workgroups_than_a_dispatch_has(small_dispatches, workgroups):
    random = np.random.default_rng(0)
    q, k, v, dout = (
        random.standard_normal((3, n, h, 24), np.float32)
        for n, h in ((55, 6), (60, 3), (60, 3), (55, 6))
    )
    options = {"causal": True, "bias": random.standard_normal((3, 6, 55, 60), np.float32)}
    options["alibi_slopes"] = random.random((3, 6), np.float32)
    sinks = random.standard_normal(6).astype(np.float32)

    def both_passes():
        out, lse = attn_vulkan.attention(q, k, v, sinks=sinks, return_lse=True, **options)
        return out, lse, *attn_vulkan.attention_backward(dout, q, k, v, out, lse, **options)

    expected = both_passes()
    small_dispatches(*workgroups)
    for result, want in zip(both_passes(), expected, strict=True):
        np.testing.assert_array_equal(result, want)


def test_more_parts_of_keys_than_a_dispatch_has(small_dispatches):
    random = np.random.default_rng(0)
    q, k = (random.standard_normal((2, n, 1, 16), np.float32) for n in (1, 2000))
    expected = attn_vulkan.attention(q, k, k)
    small_dispatches(9, 9, 7)  # those of one sequence
    np.testing.assert_allclose(attn_vulkan.attention(q, k, k), expected, atol=1e-6)


def test_one_head_of_more_workgroups_than_a_dispatch_has(small_dispatches):
    q = np.zeros((1, 300, 4, 16), np.float32)
    small_dispatches(2, 9, 9)
    with pytest.raises(
        VulkanError, match=r"starts \(2, 9, 9\) workgroups at most, got \(\d+, 1, 1\)"
    ):
        attn_vulkan.attention(q, q[:, :, :1], q[:, :, :1])


def test_too_many_timestamps():
    with open_context().recording() as commands:
        for _ in range(256):
            commands.timestamp()
        with pytest.raises(ValueError, match="256 timestamps at most"):
            commands.timestamp()
