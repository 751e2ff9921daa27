"""The Vulkan devices of this machine."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import TypeVar

from attn_vulkan._vk import structs as vk
from attn_vulkan._vk.instance import Instance, open_instance

NO_DEVICE = "no Vulkan device: no installed driver finds one"

_TYPES = {1: "integrated", 2: "discrete", 3: "virtual", 4: "cpu"}

_Answer = TypeVar("_Answer", bound=vk.Tagged)

_probe_lock = threading.Lock()


@dataclass(frozen=True)
class Features:
    """What a device can do beyond float32 arithmetic.

    Attributes
    ----------
    float16 : bool
        Half-precision arithmetic, and buffers of it.
    bfloat16 : bool
        The bfloat16 type in shaders, ``VK_KHR_shader_bfloat16``.
    cooperative_matrix : bool
        Matrix multiplication by a subgroup, ``VK_KHR_cooperative_matrix``.
    cooperative_matrix2 : bool
        Matrix multiplication by a workgroup that loads its tiles through tensor layouts, out of
        ``VK_NV_cooperative_matrix2``.
    buffer_device_address : bool
        Pointers to buffers in shaders.
    """

    float16: bool = False
    bfloat16: bool = False
    cooperative_matrix: bool = False
    cooperative_matrix2: bool = False
    buffer_device_address: bool = False


@dataclass(frozen=True)
class Device:
    """One device as its driver describes it.

    Attributes
    ----------
    index : int
        Position in the loader's list.
    name : str
        Marketing name.
    type : str
        ``"discrete"``, ``"integrated"``, ``"virtual"``, ``"cpu"`` or ``"other"``.
    api_version : str
        Newest version of Vulkan it implements, such as ``"1.3.230"``.
    driver : str
        Name and version of the driver.
    subgroup_size : int
        Invocations that run in lockstep; 0 where unknown.
    memory : int
        Bytes of its largest device-local heap.
    features : Features
        What it can do beyond float32 arithmetic.
    """

    index: int
    name: str
    type: str
    api_version: str
    driver: str
    subgroup_size: int
    memory: int
    features: Features


def devices() -> list[Device]:
    """List the Vulkan devices of this machine.

    Drivers are asked once per process; threads may call this at the same time. No Vulkan object
    stays alive.

    Returns
    -------
    list of Device
        In the loader's order; empty where no driver is installed.

    Raises
    ------
    LoaderNotFound
        There is no Vulkan loader on this machine.
    VulkanError
        The loader or a driver fails.

    Examples
    --------
    >>> import attn_vulkan
    >>> try:
    ...     names = [device.name for device in attn_vulkan.devices()]
    ... except attn_vulkan.LoaderNotFound:
    ...     names = []
    """
    with _probe_lock:
        return list(_probe())


@functools.cache
def _probe() -> tuple[Device, ...]:
    with open_instance() as instance:
        if instance is None:
            return ()
        handles = instance.physical_devices()
        return tuple(_describe(instance, handle, index) for index, handle in enumerate(handles))


def _describe(instance: Instance, handle: int, index: int) -> Device:
    properties = instance.properties(handle)
    version = properties.apiVersion
    return Device(
        index=index,
        name=properties.deviceName.decode(errors="replace"),
        type=_TYPES.get(properties.deviceType, "other"),
        api_version=_version_text(version),
        driver=_driver(instance, handle, properties),
        subgroup_size=_subgroup_size(instance, handle, version),
        memory=_memory(instance, handle),
        features=_features(instance, handle, version),
    )


def _version_text(version: int) -> str:
    return f"{version >> 22 & 0x7F}.{version >> 12 & 0x3FF}.{version & 0xFFF}"


def _driver(instance: Instance, handle: int, properties: vk.VkPhysicalDeviceProperties) -> str:
    if properties.apiVersion < vk.VK_API_VERSION_1_2:
        return f"version {properties.driverVersion}"
    driver = vk.VkPhysicalDeviceDriverProperties()
    instance.fill_properties(handle, driver)
    return f"{driver.driverName.decode()} {driver.driverInfo.decode()}".strip()


def _subgroup_size(instance: Instance, handle: int, version: int) -> int:
    if version < vk.VK_API_VERSION_1_1:
        return 0
    subgroup = vk.VkPhysicalDeviceSubgroupProperties()
    instance.fill_properties(handle, subgroup)
    return int(subgroup.subgroupSize)


def _memory(instance: Instance, handle: int) -> int:
    memory = instance.memory_properties(handle)
    heaps = memory.memoryHeaps[: memory.memoryHeapCount]
    local = [heap.size for heap in heaps if heap.flags & vk.VK_MEMORY_HEAP_DEVICE_LOCAL_BIT]
    return max(local, default=0)


def _features(instance: Instance, handle: int, version: int) -> Features:
    if version < vk.VK_API_VERSION_1_2:
        return Features()
    extensions = instance.extensions(handle)

    def ask(answer: _Answer, extension: str | None = None) -> _Answer:
        if extension is None or extension in extensions:
            instance.fill_features(handle, answer)
        return answer

    storage = ask(vk.VkPhysicalDevice16BitStorageFeatures())
    arithmetic = ask(vk.VkPhysicalDeviceShaderFloat16Int8Features())
    address = ask(vk.VkPhysicalDeviceBufferDeviceAddressFeatures())
    bfloat16 = ask(vk.VkPhysicalDeviceShaderBfloat16FeaturesKHR(), "VK_KHR_shader_bfloat16")
    matrix = ask(vk.VkPhysicalDeviceCooperativeMatrixFeaturesKHR(), "VK_KHR_cooperative_matrix")
    matrix2 = ask(vk.VkPhysicalDeviceCooperativeMatrix2FeaturesNV(), "VK_NV_cooperative_matrix2")
    return Features(
        float16=bool(arithmetic.shaderFloat16 and storage.storageBuffer16BitAccess),
        bfloat16=bool(bfloat16.shaderBFloat16Type),
        cooperative_matrix=bool(matrix.cooperativeMatrix),
        cooperative_matrix2=bool(
            matrix2.cooperativeMatrixWorkgroupScope and matrix2.cooperativeMatrixTensorAddressing
        ),
        buffer_device_address=bool(address.bufferDeviceAddress),
    )
