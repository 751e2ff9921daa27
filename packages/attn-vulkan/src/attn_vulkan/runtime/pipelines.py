"""Compiled shaders: made on first use, kept for the process, and on disk for the next one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
import threading
from collections.abc import Sequence
from ctypes import c_size_t, c_uint32, c_uint64
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from attn_core import environment
from attn_vulkan._vk import registry as vk
from attn_vulkan._vk.errors import VulkanError

if TYPE_CHECKING:
    from attn_vulkan.runtime.context import Context

SPIRV = Path(__file__).parents[1] / "shaders" / "spirv"
_PUSH_BYTES = 8


@dataclass(frozen=True)
class Pipeline:
    """A VkPipeline and its layout."""

    handle: int
    layout: int


class Pipelines:
    """Makes pipelines and keeps them; safe under threads and concurrent processes."""

    def __init__(self, context: Context, properties: vk.VkPhysicalDeviceProperties) -> None:
        self._functions = context.functions
        self._device = context.handle
        self._fixes_subgroups = context.device.features.subgroup_size_control
        self._subgroup_size = context.device.subgroup_size
        self._made: dict[tuple[str, tuple[int, ...]], Pipeline] = {}
        self._locks: dict[tuple[str, tuple[int, ...]], threading.Lock] = {}
        self._layout = self._create_layout()
        identity = f"{bytes(properties.pipelineCacheUUID).hex()}-{properties.driverVersion:08x}"
        name = f"vulkan-{context.device.uuid or 'device'}-{identity}.bin"
        self._file = environment.cache_dir() / name
        try:
            self._cache = self._create_cache()
        except BaseException:
            self._functions.vkDestroyPipelineLayout(self._device, self._layout, None)
            raise

    def get(self, shader: str, constants: Sequence[int]) -> Pipeline:
        """Return `shader` with its specialisation constants 0, 1, 2... set to `constants`.

        Constant 0 is the size of a workgroup wherever there are constants.
        """
        key = shader, tuple(constants)
        if key in self._made:
            return self._made[key]
        # Threads compile side by side, each shader once.
        with self._locks.setdefault(key, threading.Lock()):
            if key not in self._made:
                self._made[key] = Pipeline(self._create(*key), self._layout)
                self._save()
            return self._made[key]

    def destroy(self) -> None:
        """Destroy all pipelines."""
        for pipeline in self._made.values():
            self._functions.vkDestroyPipeline(self._device, pipeline.handle, None)
        self._made.clear()
        self._functions.vkDestroyPipelineCache(self._device, self._cache, None)
        self._functions.vkDestroyPipelineLayout(self._device, self._layout, None)

    def _create(self, shader: str, constants: tuple[int, ...]) -> int:
        code = (SPIRV / f"{shader}.spv").read_bytes()
        values = (c_uint32 * len(constants))(*constants)
        entries = (vk.VkSpecializationMapEntry * len(constants))(
            *[vk.VkSpecializationMapEntry(n, 4 * n, 4) for n in range(len(constants))]
        )
        specialization = vk.VkSpecializationInfo(
            mapEntryCount=len(constants),
            pMapEntries=ctypes.addressof(entries),
            dataSize=ctypes.sizeof(values),
            pData=ctypes.addressof(values),
        )
        size = vk.VkPipelineShaderStageRequiredSubgroupSizeCreateInfo(
            requiredSubgroupSize=self._subgroup_size
        )
        module = self._create_module(code)
        try:
            stage = vk.VkPipelineShaderStageCreateInfo(
                stage=vk.VK_SHADER_STAGE_COMPUTE_BIT,
                module=module,
                pName=b"main",
                pSpecializationInfo=ctypes.addressof(specialization),
            )
            if self._fixes_subgroups and values and values[0] % self._subgroup_size == 0:
                stage.pNext = ctypes.addressof(size)
                stage.flags = vk.VK_PIPELINE_SHADER_STAGE_CREATE_REQUIRE_FULL_SUBGROUPS_BIT
            info = vk.VkComputePipelineCreateInfo(stage=stage, layout=self._layout)
            pipeline = c_uint64()
            self._functions.vkCreateComputePipelines(
                self._device,
                self._cache,
                1,
                ctypes.addressof(info),
                None,
                ctypes.addressof(pipeline),
            )
        finally:
            self._functions.vkDestroyShaderModule(self._device, module, None)
        return pipeline.value

    def _create_module(self, code: bytes) -> int:
        text = ctypes.create_string_buffer(code, len(code))
        info = vk.VkShaderModuleCreateInfo(codeSize=len(code), pCode=ctypes.addressof(text))
        module = c_uint64()
        self._functions.vkCreateShaderModule(
            self._device, ctypes.addressof(info), None, ctypes.addressof(module)
        )
        return module.value

    def _create_layout(self) -> int:
        push = vk.VkPushConstantRange(
            stageFlags=vk.VK_SHADER_STAGE_COMPUTE_BIT, offset=0, size=_PUSH_BYTES
        )
        info = vk.VkPipelineLayoutCreateInfo(
            pushConstantRangeCount=1, pPushConstantRanges=ctypes.addressof(push)
        )
        layout = c_uint64()
        self._functions.vkCreatePipelineLayout(
            self._device, ctypes.addressof(info), None, ctypes.addressof(layout)
        )
        return layout.value

    def _create_cache(self) -> int:
        stored = b""
        with contextlib.suppress(OSError):
            stored = self._file.read_bytes()
        text = ctypes.create_string_buffer(stored, len(stored))
        info = vk.VkPipelineCacheCreateInfo(
            initialDataSize=len(stored), pInitialData=ctypes.addressof(text) if stored else None
        )
        cache = c_uint64()
        self._functions.vkCreatePipelineCache(
            self._device, ctypes.addressof(info), None, ctypes.addressof(cache)
        )
        return cache.value

    def _save(self) -> None:
        """Write the cache beside its file and move it there, which no reader sees half done."""
        size = c_size_t()
        get = self._functions.vkGetPipelineCacheData
        with contextlib.suppress(OSError, VulkanError):  # the cache saves time, nothing else
            get(self._device, self._cache, ctypes.addressof(size), None)
            text = ctypes.create_string_buffer(size.value)
            get(self._device, self._cache, ctypes.addressof(size), ctypes.addressof(text))
            self._file.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self._file.parent)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(text.raw[: size.value])
                Path(temporary).replace(self._file)
            except OSError:
                Path(temporary).unlink()
                raise
