"""A command buffer with the memory its parameters need; used again and again."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_uint32, c_uint64, c_void_p
from typing import TYPE_CHECKING

from attn_vulkan._vk import registry as vk

if TYPE_CHECKING:
    from attn_vulkan.runtime.context import Context
    from attn_vulkan.runtime.memory import Buffer
    from attn_vulkan.runtime.pipelines import Pipeline

_PARAMETER_BYTES = 1 << 16
_PARAMETER_ALIGNMENT = 256
_MAX_TIMESTAMPS = 256
_STAGES = vk.VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | vk.VK_PIPELINE_STAGE_TRANSFER_BIT
_WRITES = vk.VK_ACCESS_SHADER_WRITE_BIT | vk.VK_ACCESS_TRANSFER_WRITE_BIT
_READS = vk.VK_ACCESS_SHADER_READ_BIT | vk.VK_ACCESS_TRANSFER_READ_BIT


class Commands:
    """Records dispatches and copies; `Context.commands` hands it out, submits it and waits.

    Each command waits for those before it, unless it is told not to.

    Attributes
    ----------
    pending : int
        Value of the context's semaphore that ends them; 0 where they have ended.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._functions = context.functions
        self._device = context.handle
        self.pending = 0
        self._used = 0
        self._timestamps = 0
        self._kept: list[Buffer] = []
        self._callbacks: list[Callable[[], object]] = []
        self._parameters = context.memory.allocate(_PARAMETER_BYTES, "parameters")
        self._pool = self._queries = 0
        try:
            self._pool = self._create_pool()
            self.handle = self._create_buffer()
            self._queries = self._create_queries()
        except BaseException:
            self.destroy()
            raise
        self._for_device = vk.VkMemoryBarrier(srcAccessMask=_WRITES, dstAccessMask=_READS | _WRITES)
        self._for_host = vk.VkMemoryBarrier(
            srcAccessMask=_WRITES, dstAccessMask=vk.VK_ACCESS_HOST_READ_BIT
        )

    def begin(self) -> None:
        """Start anew; whatever was recorded before is forgotten."""
        self._used = self._timestamps = 0
        info = vk.VkCommandBufferBeginInfo(flags=vk.VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT)
        self._functions.vkBeginCommandBuffer(self.handle, ctypes.addressof(info))

    def dispatch(
        self,
        pipeline: Pipeline,
        parameters: bytes,
        groups: tuple[int, int, int],
        barrier: bool = True,
    ) -> None:
        """Run `pipeline` on groups of invocations; its push constant points at `parameters`."""
        if barrier:
            self.barrier()
        address = c_uint64(self._store(parameters))
        functions = self._functions
        functions.vkCmdBindPipeline(self.handle, vk.VK_PIPELINE_BIND_POINT_COMPUTE, pipeline.handle)
        functions.vkCmdPushConstants(
            self.handle,
            pipeline.layout,
            vk.VK_SHADER_STAGE_COMPUTE_BIT,
            0,
            8,
            ctypes.addressof(address),
        )
        functions.vkCmdDispatch(self.handle, *groups)

    def copy(
        self, source: Buffer, source_offset: int, target: Buffer, target_offset: int, size: int
    ) -> None:
        """Copy bytes between buffers, after all that was recorded before."""
        self.barrier()
        region = vk.VkBufferCopy(srcOffset=source_offset, dstOffset=target_offset, size=size)
        self._functions.vkCmdCopyBuffer(
            self.handle, source.handle, target.handle, 1, ctypes.addressof(region)
        )

    def barrier(self) -> None:
        """Let the commands that follow see what was written before."""
        self._wait(_STAGES, self._for_device)

    def timestamp(self) -> None:
        """Note the time at which everything recorded so far has ended."""
        if self._timestamps == _MAX_TIMESTAMPS:
            raise ValueError(f"commands hold {_MAX_TIMESTAMPS} timestamps at most")
        if self._timestamps == 0:
            self._functions.vkCmdResetQueryPool(self.handle, self._queries, 0, _MAX_TIMESTAMPS)
        self._functions.vkCmdWriteTimestamp(
            self.handle,
            vk.VK_PIPELINE_STAGE_ALL_COMMANDS_BIT,
            self._queries,
            self._timestamps,
        )
        self._timestamps += 1

    def seconds(self) -> list[float]:
        """Times of the timestamps, once the commands have ended: call it in `then`."""
        ticks = (c_uint64 * self._timestamps)()
        self._functions.vkGetQueryPoolResults(
            self._device,
            self._queries,
            0,
            self._timestamps,
            ctypes.sizeof(ticks),
            ctypes.addressof(ticks),
            8,
            vk.VK_QUERY_RESULT_64_BIT | vk.VK_QUERY_RESULT_WAIT_BIT,
        )
        return [tick * self._context.timestamp_nanoseconds * 1e-9 for tick in ticks]

    def keep(self, buffer: Buffer) -> Buffer:
        """Release `buffer` when the commands have ended."""
        self._kept.append(buffer)
        return buffer

    def then(self, callback: Callable[[], object]) -> None:
        """Call `callback` when the commands have ended, before the kept buffers are released."""
        self._callbacks.append(callback)

    def finish(self) -> None:
        """Call what was handed to `then`."""
        for callback in self._callbacks:
            callback()

    def end(self) -> None:
        """Stop recording; the host will see everything written."""
        self._wait(vk.VK_PIPELINE_STAGE_HOST_BIT, self._for_host)
        self._functions.vkEndCommandBuffer(self.handle)

    def release(self) -> None:
        """Release the buffers that were kept; the commands must have ended."""
        self._callbacks.clear()
        while self._kept:
            self._context.memory.release(self._kept.pop())

    def destroy(self) -> None:
        """Destroy the command buffer and what belongs to it."""
        self._context.memory.release(self._parameters)
        self._functions.vkDestroyQueryPool(self._device, self._queries, None)
        self._functions.vkDestroyCommandPool(self._device, self._pool, None)

    def _wait(self, stages: int, access: vk.VkMemoryBarrier) -> None:
        """Let `stages` of what follows wait for all before."""
        self._functions.vkCmdPipelineBarrier(
            self.handle, _STAGES, stages, 0, 1, ctypes.addressof(access), 0, None, 0, None
        )

    def _store(self, parameters: bytes) -> int:
        offset = self._used
        self._used += -(-len(parameters) // _PARAMETER_ALIGNMENT) * _PARAMETER_ALIGNMENT
        if self._used > _PARAMETER_BYTES:
            raise ValueError("too many dispatches in one batch: submit what was recorded so far")
        ctypes.memmove(self._parameters.pointer + offset, parameters, len(parameters))
        return self._parameters.address + offset

    def _create_pool(self) -> int:
        info = vk.VkCommandPoolCreateInfo(
            flags=vk.VK_COMMAND_POOL_CREATE_RESET_COMMAND_BUFFER_BIT,
            queueFamilyIndex=self._context.family,
        )
        pool = c_uint64()
        self._functions.vkCreateCommandPool(
            self._device, ctypes.addressof(info), None, ctypes.addressof(pool)
        )
        return pool.value

    def _create_buffer(self) -> int:
        info = vk.VkCommandBufferAllocateInfo(commandPool=self._pool, commandBufferCount=1)
        handle = c_void_p()
        self._functions.vkAllocateCommandBuffers(
            self._device, ctypes.addressof(info), ctypes.addressof(handle)
        )
        assert handle.value is not None
        return handle.value

    def _create_queries(self) -> int:
        info = vk.VkQueryPoolCreateInfo(
            queryType=vk.VK_QUERY_TYPE_TIMESTAMP, queryCount=_MAX_TIMESTAMPS
        )
        queries = c_uint64()
        self._functions.vkCreateQueryPool(
            self._device, ctypes.addressof(info), None, ctypes.addressof(queries)
        )
        return queries.value


class Submission:
    """A VkSubmitInfo of one command buffer, filled again for each: making one takes longer."""

    def __init__(self) -> None:
        self._buffer = (c_void_p * 1)()
        self._waits, self._wait_values = (c_uint64 * 1)(), (c_uint64 * 1)()
        self._signals, self._signal_values = (c_uint64 * 2)(), (c_uint64 * 2)()
        self._stages = (c_uint32 * 1)(vk.VK_PIPELINE_STAGE_ALL_COMMANDS_BIT)
        self._values = vk.VkTimelineSemaphoreSubmitInfo(
            pWaitSemaphoreValues=ctypes.addressof(self._wait_values),
            pSignalSemaphoreValues=ctypes.addressof(self._signal_values),
        )
        self._info = vk.VkSubmitInfo(
            pNext=ctypes.addressof(self._values),
            pWaitSemaphores=ctypes.addressof(self._waits),
            pWaitDstStageMask=ctypes.addressof(self._stages),
            commandBufferCount=1,
            pCommandBuffers=ctypes.addressof(self._buffer),
            pSignalSemaphores=ctypes.addressof(self._signals),
        )
        self._address = ctypes.addressof(self._info)

    def fill(
        self,
        commands: int,
        wait: tuple[int, int] | None,
        own: tuple[int, int],
        signal: tuple[int, int] | None,
    ) -> int:
        """Return the address of what submits `commands`; pairs are (timeline semaphore, value)."""
        self._buffer[0] = commands
        if wait:
            self._waits[0], self._wait_values[0] = wait
        self._signals[0], self._signal_values[0] = own
        if signal:
            self._signals[1], self._signal_values[1] = signal
        waits, signals = int(wait is not None), 1 + int(signal is not None)
        self._info.waitSemaphoreCount = self._values.waitSemaphoreValueCount = waits
        self._info.signalSemaphoreCount = self._values.signalSemaphoreValueCount = signals
        return self._address
