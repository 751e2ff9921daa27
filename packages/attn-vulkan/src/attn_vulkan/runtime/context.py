"""A device opened for computing: one per device and process, shared by all threads."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ctypes import c_float, c_int, c_uint64, c_void_p

from attn_vulkan._vk import registry as vk
from attn_vulkan._vk.errors import DeviceLostError, VulkanError
from attn_vulkan._vk.functions import Functions
from attn_vulkan._vk.instance import Instance, create_instance
from attn_vulkan.device import NO_DEVICE, Device, devices
from attn_vulkan.parameters import Parameters
from attn_vulkan.quirks import usable
from attn_vulkan.runtime.commands import Commands, Submission
from attn_vulkan.runtime.creation import compute_family, create_device
from attn_vulkan.runtime.memory import Memory
from attn_vulkan.runtime.pipelines import Pipelines

DEVICE_VARIABLE = "ATTN_VULKAN_DEVICE"

_PREFERRED_TYPES = ("discrete", "integrated", "virtual", "other", "cpu")
_WAIT_NANOSECONDS = 2**63
# Polling a semaphore sees a short kernel end sooner than the driver's wait, which sleeps.
_POLLS = 200
_LANES = 32

_contexts: dict[int, Context] = {}
_open_lock = threading.Lock()


class Context:
    """An open device. `open_context` makes it; `close` destroys everything it made.

    Attributes
    ----------
    device : Device
        What it can do, less what the quirks table rules out.
    memory : Memory
        Allocates and imports buffers.
    pipelines : Pipelines
        Makes and keeps compiled shaders.
    is_closed : bool
        Nobody may start to use it.
    """

    def __init__(self, instance: Instance, device: Device) -> None:
        self.device = usable(device)
        self._instance = instance
        self._physical = instance.physical_devices()[device.index]
        properties = instance.properties(self._physical)
        self.timestamp_nanoseconds: float = properties.limits.timestampPeriod
        self.family = compute_family(instance, self._physical)
        self.host_alignment = self._host_alignment()
        self._lock = threading.Lock()  # of the queue and of what follows
        self._submitted = 0
        self._submission = Submission()
        self._idle: list[Commands] = []
        self._users = 0
        self.is_closed = False
        self.handle = create_device(instance, self._physical, self.device, self.family)
        self.functions = self._functions()
        with ExitStack() as undo:
            undo.callback(self.functions.vkDestroyDevice, self.handle, None)
            queue = c_void_p()
            self.functions.vkGetDeviceQueue(self.handle, self.family, 0, ctypes.addressof(queue))
            self._queue = queue.value
            self._semaphore = self.create_semaphore()
            undo.callback(self.functions.vkDestroySemaphore, self.handle, self._semaphore, None)
            self.memory = Memory(self, instance.memory_properties(self._physical))
            self.pipelines = Pipelines(self, properties)
            self._made = undo.pop_all()

    @contextmanager
    def commands(self) -> Iterator[Commands]:
        """Record commands; leaving the block submits them and waits for their end.

        Then what was handed to `Commands.then` is called, and what was handed to `Commands.keep`
        released. Errors as in `recording`.
        """
        with self.recording() as commands:
            yield commands
            self.run(commands)

    @contextmanager
    def recording(self) -> Iterator[Commands]:
        """Lend commands, for the caller to record and to submit.

        They are used again once they have ended. An error, of any kind, leaves the block when the
        device works on nothing any more: the caller may drop memory that it was given.
        """
        with self.in_use():
            commands = None
            try:
                commands = self._acquire()
                commands.begin()
                yield commands
            except BaseException as error:
                self._settle()
                if commands is not None:
                    commands.pending = 0
                if isinstance(error, DeviceLostError):
                    self.close()
                raise
            finally:
                if commands is not None:
                    self._recycle(commands)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the context from being destroyed for the length of a block."""
        with self._lock:
            if self.is_closed:
                raise DeviceLostError(f"{self.device.name} was closed: call again to open it")
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                is_last = self.is_closed and not self._users
            if is_last:
                self._destroy()

    def export_semaphore(self, semaphore: int) -> int:
        """POSIX file descriptor of a semaphore that was made to be exported."""
        info = vk.VkSemaphoreGetFdInfoKHR(
            semaphore=semaphore, handleType=vk.VK_EXTERNAL_SEMAPHORE_HANDLE_TYPE_OPAQUE_FD_BIT
        )
        descriptor = c_int(-1)
        self.functions.vkGetSemaphoreFdKHR(
            self.handle, ctypes.addressof(info), ctypes.addressof(descriptor)
        )
        return descriptor.value

    def trusts(self, variant: str, dtype: str) -> bool:
        """Whether what a variant assumes of the driver holds, as a shader has found out."""
        return not variant.startswith("matrix") or self._knows_layout(dtype)

    def submit(
        self,
        commands: Commands,
        wait: tuple[int, int] | None = None,
        signal: tuple[int, int] | None = None,
    ) -> None:
        """Submit what was recorded, and do not wait for it.

        `wait` and `signal` are (semaphore, value) pairs of timeline semaphores.
        """
        commands.end()
        with self._lock:
            self._submitted += 1  # also where submitting fails: no value is signalled twice
            commands.pending = self._submitted
            self._submit(commands, wait, signal)

    def run(self, commands: Commands) -> None:
        """Submit what was recorded, wait for its end and call what was handed to `then`."""
        self.submit(commands)
        if not any(self._reached() >= commands.pending for _ in range(_POLLS)):
            self._sleep_until(commands.pending)
        commands.pending = 0
        commands.finish()

    def create_semaphore(self, exported: bool = False) -> int:
        """Make a timeline semaphore that starts at 0, `exported` as a file descriptor."""
        kind = vk.VkSemaphoreTypeCreateInfo(semaphoreType=vk.VK_SEMAPHORE_TYPE_TIMELINE)
        export = vk.VkExportSemaphoreCreateInfo(
            pNext=ctypes.addressof(kind),
            handleTypes=vk.VK_EXTERNAL_SEMAPHORE_HANDLE_TYPE_OPAQUE_FD_BIT,
        )
        info = vk.VkSemaphoreCreateInfo(pNext=ctypes.addressof(export if exported else kind))
        semaphore = c_uint64()
        self.functions.vkCreateSemaphore(
            self.handle, ctypes.addressof(info), None, ctypes.addressof(semaphore)
        )
        return semaphore.value

    def close(self) -> None:
        """Let nobody use the context any more; it is destroyed when the last user leaves it."""
        for index, context in list(_contexts.items()):
            if context is self:
                del _contexts[index]
        with self._lock:
            is_last = not self.is_closed and not self._users
            self.is_closed = True
        if is_last:
            self._destroy()

    def _destroy(self) -> None:
        """Wait for the device and destroy everything."""
        self._settle()
        for commands in self._idle:
            commands.release()
            commands.destroy()
        self._idle.clear()
        self.pipelines.destroy()
        self.memory.trim()
        self._made.close()
        self._instance.destroy()

    @functools.cache  # noqa: B019  (a context lives as long as its process)
    def _knows_layout(self, dtype: str) -> bool:
        """Whether matrices are laid out as the matrix shaders take for granted."""
        answers = (c_float * _LANES)()
        size = ctypes.sizeof(answers)
        pipeline = self.pipelines.get(f"layout_{dtype}", ())
        with self.commands() as commands:
            found = commands.keep(self.memory.allocate(size, "staging"))
            ctypes.memset(found.pointer, 0, size)
            commands.dispatch(pipeline, bytes(Parameters(part_sums=found.address)), (1, 1, 1))
            commands.then(lambda: ctypes.memmove(answers, found.pointer, size))
        return all(answer == 1.0 for answer in answers)

    def _acquire(self) -> Commands:
        """Commands that are empty."""
        with self._lock:
            commands = self._finished()
        commands = commands or Commands(self)
        commands.pending = 0
        commands.release()
        return commands

    def _recycle(self, commands: Commands) -> None:
        if not commands.pending:
            commands.release()
        with self._lock:
            self._idle.append(commands)

    def _settle(self) -> None:
        """Wait until the device works on nothing; a lost one does not."""
        with self._lock, contextlib.suppress(VulkanError):
            self.functions.vkDeviceWaitIdle(self.handle)

    def _host_alignment(self) -> int:
        properties = vk.VkPhysicalDeviceExternalMemoryHostPropertiesEXT()
        if not self.device.features.external_memory_host:
            return 1
        self._instance.fill_properties(self._physical, properties)
        return int(properties.minImportedHostPointerAlignment)

    def _submit(
        self, commands: Commands, wait: tuple[int, int] | None, signal: tuple[int, int] | None
    ) -> None:
        own = self._semaphore, commands.pending
        info = self._submission.fill(commands.handle, wait, own, signal)
        self.functions.vkQueueSubmit(self._queue, 1, info, 0)

    def _finished(self) -> Commands | None:
        """Commands whose last use has ended, taken off the list."""
        for position, commands in enumerate(self._idle):
            if not commands.pending or self._reached() >= commands.pending:
                return self._idle.pop(position)
        return None

    def _reached(self) -> int:
        value = c_uint64()
        self.functions.vkGetSemaphoreCounterValue(
            self.handle, self._semaphore, ctypes.addressof(value)
        )
        return value.value

    def _sleep_until(self, value: int) -> None:
        semaphores, values = (c_uint64 * 1)(self._semaphore), (c_uint64 * 1)(value)
        info = vk.VkSemaphoreWaitInfo(
            semaphoreCount=1,
            pSemaphores=ctypes.addressof(semaphores),
            pValues=ctypes.addressof(values),
        )
        self.functions.vkWaitSemaphores(self.handle, ctypes.addressof(info), _WAIT_NANOSECONDS)

    def _functions(self) -> Functions:
        lookup = self._instance.functions.vkGetDeviceProcAddr

        def address_of(name: str) -> int | None:
            return lookup(self.handle, name.encode())  # type: ignore[no-any-return]

        return Functions(address_of)


def open_context(index: int | None = None) -> Context:
    """Open a device, or return it where it is open already.

    Parameters
    ----------
    index : int, optional
        Position in `devices()`. By default what ``ATTN_VULKAN_DEVICE`` says, or else the first
        discrete GPU, integrated GPU, virtual GPU or CPU, in this order.

    Raises
    ------
    VulkanError
        There is no such device, or it cannot be opened.
    """
    with _open_lock:
        device = choose_device(index)
        if device.index not in _contexts:
            instance = create_instance()
            if instance is None:
                raise VulkanError(NO_DEVICE)
            try:
                _contexts[device.index] = Context(instance, device)
            except Exception:  # an interrupt may leave a device, and that needs its instance
                instance.destroy()
                raise
        return _contexts[device.index]


def choose_device(index: int | None = None) -> Device:
    """Return the device that `open_context` opens; errors as there."""
    found = devices()
    if not found:
        raise VulkanError(NO_DEVICE)
    if index is None and os.environ.get(DEVICE_VARIABLE):
        return _numbered(found, os.environ[DEVICE_VARIABLE], DEVICE_VARIABLE)
    if index is None:
        return min(found, key=lambda device: _PREFERRED_TYPES.index(device.type))
    return _numbered(found, str(index), "the device")


def _numbered(found: list[Device], position: str, name: str) -> Device:
    if not position.isdecimal() or int(position) >= len(found):
        raise VulkanError(f"{name} must be between 0 and {len(found) - 1}, got {position}")
    return found[int(position)]


@atexit.register
def close_all() -> None:
    """Close every context, as the interpreter does when it ends."""
    for context in list(_contexts.values()):
        context.close()


def _forget_all() -> None:
    """Open devices anew in a child process: those of its parent are none of its own."""
    global _open_lock
    _open_lock = threading.Lock()  # another thread of the parent may hold the old one
    _contexts.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
