"""The Vulkan devices of this machine."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import TypeVar

from attn_vulkan._vk import registry as vk
from attn_vulkan._vk.instance import (
    API_VERSION_1_1,
    API_VERSION_1_2,
    API_VERSION_1_3,
    Instance,
    open_instance,
)

NO_DEVICE = "no Vulkan device: no installed driver finds one"

_TYPES = {1: "integrated", 2: "discrete", 3: "virtual", 4: "cpu"}
_MATRIX_TYPES = {
    vk.VK_COMPONENT_TYPE_FLOAT16_KHR: "float16",
    vk.VK_COMPONENT_TYPE_BFLOAT16_KHR: "bfloat16",
}

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
        Reductions, conversions and functions of the elements of matrices, out of
        ``VK_NV_cooperative_matrix2``.
    buffer_device_address : bool
        Pointers to buffers in shaders.
    storage16 : bool
        Buffers of 16-bit numbers, which float16 and bfloat16 tensors are.
    int64 : bool
        64-bit integers in shaders, for offsets into large tensors.
    scalar_layout : bool
        Structures in buffers without padding.
    subgroup_shuffle : bool
        Invocations of a subgroup read one another's registers.
    subgroup_size_control : bool
        A pipeline may fix the size of its subgroups.
    memory_model : bool
        The Vulkan memory model, which cooperative matrices need.
    external_memory_host : bool
        Host memory that the device reads in place, ``VK_EXT_external_memory_host``.
    external_memory_fd : bool
        Memory of other APIs through POSIX file descriptors, ``VK_KHR_external_memory_fd``.
    external_semaphore_fd : bool
        Semaphores shared in the same way, ``VK_KHR_external_semaphore_fd``.
    """

    float16: bool = False
    bfloat16: bool = False
    cooperative_matrix: bool = False
    cooperative_matrix2: bool = False
    buffer_device_address: bool = False
    storage16: bool = False
    int64: bool = False
    scalar_layout: bool = False
    subgroup_shuffle: bool = False
    subgroup_size_control: bool = False
    memory_model: bool = False
    external_memory_host: bool = False
    external_memory_fd: bool = False
    external_semaphore_fd: bool = False


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
    shared_memory : int
        Bytes that one workgroup may share; 0 where unknown.
    workgroup_size : int
        Invocations that one workgroup may have; 0 where unknown.
    uuid : str
        What tells this device from others, as CUDA has it too; empty where unknown.
    matrix_shapes : tuple of str
        Cooperative matrices with float32 sums, such as ``"float16 16x16x16"``.
    processors : int
        Multiprocessors, or compute units; 0 where the driver does not say.
    workgroups : tuple of int
        Workgroups that one dispatch may have in each of its three dimensions.
    """

    index: int
    name: str
    type: str
    api_version: str
    driver: str
    subgroup_size: int
    memory: int
    features: Features
    shared_memory: int = 0
    workgroup_size: int = 0
    uuid: str = ""
    matrix_shapes: tuple[str, ...] = ()
    processors: int = 0
    workgroups: tuple[int, ...] = (65535, 65535, 65535)  # what every device allows


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
    features = _features(instance, handle, version)
    return Device(
        index=index,
        name=properties.deviceName.decode(errors="replace"),
        type=_TYPES.get(properties.deviceType, "other"),
        api_version=_version_text(version),
        driver=_driver(instance, handle, properties),
        subgroup_size=_subgroup(instance, handle, version).subgroupSize,
        memory=_memory(instance, handle),
        features=features,
        shared_memory=properties.limits.maxComputeSharedMemorySize,
        workgroup_size=properties.limits.maxComputeWorkGroupInvocations,
        uuid=_uuid(instance, handle, version),
        matrix_shapes=_matrix_shapes(instance, handle) if features.cooperative_matrix else (),
        processors=_processors(instance, handle, version),
        workgroups=tuple(properties.limits.maxComputeWorkGroupCount),
    )


def _version_text(version: int) -> str:
    return f"{version >> 22 & 0x7F}.{version >> 12 & 0x3FF}.{version & 0xFFF}"


def _driver(instance: Instance, handle: int, properties: vk.VkPhysicalDeviceProperties) -> str:
    if properties.apiVersion < API_VERSION_1_2:
        return f"version {properties.driverVersion}"
    driver = vk.VkPhysicalDeviceDriverProperties()
    instance.fill_properties(handle, driver)
    return f"{driver.driverName.decode()} {driver.driverInfo.decode()}".strip()


def _subgroup(
    instance: Instance, handle: int, version: int
) -> vk.VkPhysicalDeviceSubgroupProperties:
    subgroup = vk.VkPhysicalDeviceSubgroupProperties()
    if version >= API_VERSION_1_1:
        instance.fill_properties(handle, subgroup)
    return subgroup


def _uuid(instance: Instance, handle: int, version: int) -> str:
    identity = vk.VkPhysicalDeviceIDProperties()
    if version < API_VERSION_1_1:
        return ""
    instance.fill_properties(handle, identity)
    return bytes(identity.deviceUUID).hex()


def _memory(instance: Instance, handle: int) -> int:
    memory = instance.memory_properties(handle)
    heaps = memory.memoryHeaps[: memory.memoryHeapCount]
    local = [heap.size for heap in heaps if heap.flags & vk.VK_MEMORY_HEAP_DEVICE_LOCAL_BIT]
    return max(local, default=0)


def _processors(instance: Instance, handle: int, version: int) -> int:
    if version < API_VERSION_1_1:
        return 0
    extensions = instance.extensions(handle)
    if "VK_NV_shader_sm_builtins" in extensions:
        nvidia = vk.VkPhysicalDeviceShaderSMBuiltinsPropertiesNV()
        instance.fill_properties(handle, nvidia)
        return int(nvidia.shaderSMCount)
    if "VK_AMD_shader_core_properties" in extensions:
        amd = vk.VkPhysicalDeviceShaderCorePropertiesAMD()
        instance.fill_properties(handle, amd)
        arrays = amd.shaderEngineCount * amd.shaderArraysPerEngineCount
        return int(arrays * amd.computeUnitsPerShaderArray)
    return 0


def _matrix_shapes(instance: Instance, handle: int) -> tuple[str, ...]:
    shapes = {
        f"{_MATRIX_TYPES[found.AType]} {found.MSize}x{found.NSize}x{found.KSize}"
        for found in instance.cooperative_matrices(handle)
        if found.AType == found.BType
        and found.AType in _MATRIX_TYPES
        and found.CType == found.ResultType == vk.VK_COMPONENT_TYPE_FLOAT32_KHR
        and found.scope == vk.VK_SCOPE_SUBGROUP_KHR
    }
    return tuple(sorted(shapes))


def _features(instance: Instance, handle: int, version: int) -> Features:
    if version < API_VERSION_1_2:
        return Features()
    extensions = instance.extensions(handle)

    def ask(answer: _Answer, extension: str | None = None) -> _Answer:
        if extension is None or extension in extensions:
            instance.fill_features(handle, answer)
        return answer

    storage = ask(vk.VkPhysicalDevice16BitStorageFeatures())
    arithmetic = ask(vk.VkPhysicalDeviceShaderFloat16Int8Features())
    address = ask(vk.VkPhysicalDeviceBufferDeviceAddressFeatures())
    memory_model = ask(vk.VkPhysicalDeviceVulkanMemoryModelFeatures())
    version_1_2 = ask(vk.VkPhysicalDeviceVulkan12Features())
    bfloat16 = ask(vk.VkPhysicalDeviceShaderBfloat16FeaturesKHR(), "VK_KHR_shader_bfloat16")
    matrix = ask(vk.VkPhysicalDeviceCooperativeMatrixFeaturesKHR(), "VK_KHR_cooperative_matrix")
    matrix2 = ask(vk.VkPhysicalDeviceCooperativeMatrix2FeaturesNV(), "VK_NV_cooperative_matrix2")
    sizes = vk.VkPhysicalDeviceSubgroupSizeControlFeatures()
    if version >= API_VERSION_1_3:
        instance.fill_features(handle, sizes)
    operations = _subgroup(instance, handle, version).supportedOperations
    return Features(
        float16=bool(arithmetic.shaderFloat16 and storage.storageBuffer16BitAccess),
        bfloat16=bool(bfloat16.shaderBFloat16Type),
        cooperative_matrix=bool(matrix.cooperativeMatrix),
        cooperative_matrix2=all(
            (
                matrix2.cooperativeMatrixReductions,
                matrix2.cooperativeMatrixConversions,
                matrix2.cooperativeMatrixPerElementOperations,
            )
        ),
        buffer_device_address=bool(address.bufferDeviceAddress),
        storage16=bool(storage.storageBuffer16BitAccess),
        int64=bool(instance.fill_features(handle, None).shaderInt64),
        scalar_layout=bool(version_1_2.scalarBlockLayout),
        subgroup_shuffle=bool(operations & vk.VK_SUBGROUP_FEATURE_SHUFFLE_BIT),
        subgroup_size_control=bool(sizes.subgroupSizeControl and sizes.computeFullSubgroups),
        memory_model=bool(memory_model.vulkanMemoryModel),
        external_memory_host="VK_EXT_external_memory_host" in extensions,
        external_memory_fd="VK_KHR_external_memory_fd" in extensions,
        external_semaphore_fd="VK_KHR_external_semaphore_fd" in extensions,
    )
