"""Structures, constants and commands of Vulkan, under their own names.

Written by tools/generate_bindings.py from the registry of Vulkan 1.4.363; do not edit.
"""

# ruff: noqa: E501, I001
# fmt: off
from __future__ import annotations

import ctypes
from ctypes import c_char, c_char_p, c_float, c_int, c_int32, c_size_t, c_uint32, c_uint64, c_uint8, c_void_p
from typing import Any, ClassVar


class Tagged(ctypes.Structure):
    """A structure that starts with its own sType, which the constructor fills in."""

    STYPE: ClassVar[int]

    def __init__(self, **fields: Any) -> None:
        super().__init__(sType=self.STYPE, **fields)

VK_ACCESS_HOST_READ_BIT = 8192
VK_ACCESS_SHADER_READ_BIT = 32
VK_ACCESS_SHADER_WRITE_BIT = 64
VK_ACCESS_TRANSFER_READ_BIT = 2048
VK_ACCESS_TRANSFER_WRITE_BIT = 4096
VK_BUFFER_USAGE_SHADER_DEVICE_ADDRESS_BIT = 131072
VK_BUFFER_USAGE_STORAGE_BUFFER_BIT = 32
VK_BUFFER_USAGE_TRANSFER_DST_BIT = 2
VK_BUFFER_USAGE_TRANSFER_SRC_BIT = 1
VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT = 1
VK_COMMAND_POOL_CREATE_RESET_COMMAND_BUFFER_BIT = 2
VK_COMPONENT_TYPE_BFLOAT16_KHR = 1000141000
VK_COMPONENT_TYPE_FLOAT16_KHR = 0
VK_COMPONENT_TYPE_FLOAT32_KHR = 1
VK_ERROR_DEVICE_LOST = -4
VK_ERROR_EXTENSION_NOT_PRESENT = -7
VK_ERROR_FEATURE_NOT_PRESENT = -8
VK_ERROR_INCOMPATIBLE_DRIVER = -9
VK_ERROR_INITIALIZATION_FAILED = -3
VK_ERROR_INVALID_EXTERNAL_HANDLE = -1000072003
VK_ERROR_LAYER_NOT_PRESENT = -6
VK_ERROR_OUT_OF_DEVICE_MEMORY = -2
VK_ERROR_OUT_OF_HOST_MEMORY = -1
VK_ERROR_TOO_MANY_OBJECTS = -10
VK_EXTERNAL_MEMORY_HANDLE_TYPE_HOST_ALLOCATION_BIT_EXT = 128
VK_EXTERNAL_MEMORY_HANDLE_TYPE_OPAQUE_FD_BIT = 1
VK_EXTERNAL_SEMAPHORE_HANDLE_TYPE_OPAQUE_FD_BIT = 1
VK_INCOMPLETE = 5
VK_INSTANCE_CREATE_ENUMERATE_PORTABILITY_BIT_KHR = 1
VK_MEMORY_ALLOCATE_DEVICE_ADDRESS_BIT = 2
VK_MEMORY_HEAP_DEVICE_LOCAL_BIT = 1
VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT = 1
VK_MEMORY_PROPERTY_HOST_CACHED_BIT = 8
VK_MEMORY_PROPERTY_HOST_COHERENT_BIT = 4
VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT = 2
VK_PIPELINE_BIND_POINT_COMPUTE = 1
VK_PIPELINE_SHADER_STAGE_CREATE_REQUIRE_FULL_SUBGROUPS_BIT = 2
VK_PIPELINE_STAGE_ALL_COMMANDS_BIT = 65536
VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT = 2048
VK_PIPELINE_STAGE_HOST_BIT = 16384
VK_PIPELINE_STAGE_TRANSFER_BIT = 4096
VK_QUERY_RESULT_64_BIT = 1
VK_QUERY_RESULT_WAIT_BIT = 2
VK_QUERY_TYPE_TIMESTAMP = 2
VK_QUEUE_COMPUTE_BIT = 2
VK_SCOPE_SUBGROUP_KHR = 3
VK_SEMAPHORE_TYPE_TIMELINE = 1
VK_SHADER_STAGE_COMPUTE_BIT = 32
VK_SUBGROUP_FEATURE_SHUFFLE_BIT = 16


class VkApplicationInfo(Tagged):
    STYPE = 0
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("pApplicationName", c_char_p),
        ("applicationVersion", c_uint32),
        ("pEngineName", c_char_p),
        ("engineVersion", c_uint32),
        ("apiVersion", c_uint32),
    ]


class VkBufferCopy(ctypes.Structure):
    _fields_: ClassVar = [
        ("srcOffset", c_uint64),
        ("dstOffset", c_uint64),
        ("size", c_uint64),
    ]


class VkBufferCreateInfo(Tagged):
    STYPE = 12
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("flags", c_uint32),
        ("size", c_uint64),
        ("usage", c_uint32),
        ("sharingMode", c_int32),
        ("queueFamilyIndexCount", c_uint32),
        ("pQueueFamilyIndices", c_void_p),
    ]


class VkBufferDeviceAddressInfo(Tagged):
    STYPE = 1000244001
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("buffer", c_uint64),
    ]


class VkCommandBufferAllocateInfo(Tagged):
    STYPE = 40
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("commandPool", c_uint64),
        ("level", c_int32),
        ("commandBufferCount", c_uint32),
    ]


class VkCommandBufferBeginInfo(Tagged):
    STYPE = 42
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("flags", c_uint32),
        ("pInheritanceInfo", c_void_p),
    ]


class VkCommandPoolCreateInfo(Tagged):
    STYPE = 39
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("flags", c_uint32),
        ("queueFamilyIndex", c_uint32),
    ]


class VkPipelineShaderStageCreateInfo(Tagged):
    STYPE = 18
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("flags", c_uint32),
        ("stage", c_uint32),
        ("module", c_uint64),
        ("pName", c_char_p),
        ("pSpecializationInfo", c_void_p),
    ]


class VkComputePipelineCreateInfo(Tagged):
    STYPE = 29
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("flags", c_uint32),
        ("stage", VkPipelineShaderStageCreateInfo),
        ("layout", c_uint64),
        ("basePipelineHandle", c_uint64),
        ("basePipelineIndex", c_int32),
    ]


class VkCooperativeMatrixPropertiesKHR(Tagged):
    STYPE = 1000506001
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("MSize", c_uint32),
        ("NSize", c_uint32),
        ("KSize", c_uint32),
        ("AType", c_int32),
        ("BType", c_int32),
        ("CType", c_int32),
        ("ResultType", c_int32),
        ("saturatingAccumulation", c_uint32),
        ("scope", c_int32),
    ]


class VkDeviceCreateInfo(Tagged):
    STYPE = 3
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("flags", c_uint32),
        ("queueCreateInfoCount", c_uint32),
        ("pQueueCreateInfos", c_void_p),
        ("enabledLayerCount", c_uint32),
        ("ppEnabledLayerNames", c_void_p),
        ("enabledExtensionCount", c_uint32),
        ("ppEnabledExtensionNames", c_void_p),
        ("pEnabledFeatures", c_void_p),
    ]


class VkDeviceQueueCreateInfo(Tagged):
    STYPE = 2
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("flags", c_uint32),
        ("queueFamilyIndex", c_uint32),
        ("queueCount", c_uint32),
        ("pQueuePriorities", c_void_p),
    ]


class VkExportSemaphoreCreateInfo(Tagged):
    STYPE = 1000077000
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("handleTypes", c_uint32),
    ]


class VkExtensionProperties(ctypes.Structure):
    _fields_: ClassVar = [
        ("extensionName", c_char * 256),
        ("specVersion", c_uint32),
    ]


class VkExternalMemoryBufferCreateInfo(Tagged):
    STYPE = 1000072000
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("handleTypes", c_uint32),
    ]


class VkImportMemoryFdInfoKHR(Tagged):
    STYPE = 1000074000
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("handleType", c_uint32),
        ("fd", c_int),
    ]


class VkImportMemoryHostPointerInfoEXT(Tagged):
    STYPE = 1000178000
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("handleType", c_uint32),
        ("pHostPointer", c_void_p),
    ]


class VkInstanceCreateInfo(Tagged):
    STYPE = 1
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("flags", c_uint32),
        ("pApplicationInfo", c_void_p),
        ("enabledLayerCount", c_uint32),
        ("ppEnabledLayerNames", c_void_p),
        ("enabledExtensionCount", c_uint32),
        ("ppEnabledExtensionNames", c_void_p),
    ]


class VkMemoryAllocateFlagsInfo(Tagged):
    STYPE = 1000060000
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("flags", c_uint32),
        ("deviceMask", c_uint32),
    ]


class VkMemoryAllocateInfo(Tagged):
    STYPE = 5
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("allocationSize", c_uint64),
        ("memoryTypeIndex", c_uint32),
    ]


class VkMemoryBarrier(Tagged):
    STYPE = 46
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("srcAccessMask", c_uint32),
        ("dstAccessMask", c_uint32),
    ]


class VkMemoryHostPointerPropertiesEXT(Tagged):
    STYPE = 1000178001
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("memoryTypeBits", c_uint32),
    ]


class VkMemoryRequirements(ctypes.Structure):
    _fields_: ClassVar = [
        ("size", c_uint64),
        ("alignment", c_uint64),
        ("memoryTypeBits", c_uint32),
    ]


class VkPhysicalDevice16BitStorageFeatures(Tagged):
    STYPE = 1000083000
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("storageBuffer16BitAccess", c_uint32),
        ("uniformAndStorageBuffer16BitAccess", c_uint32),
        ("storagePushConstant16", c_uint32),
        ("storageInputOutput16", c_uint32),
    ]


class VkPhysicalDeviceBufferDeviceAddressFeatures(Tagged):
    STYPE = 1000257000
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("bufferDeviceAddress", c_uint32),
        ("bufferDeviceAddressCaptureReplay", c_uint32),
        ("bufferDeviceAddressMultiDevice", c_uint32),
    ]


class VkPhysicalDeviceCooperativeMatrix2FeaturesNV(Tagged):
    STYPE = 1000593000
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("cooperativeMatrixWorkgroupScope", c_uint32),
        ("cooperativeMatrixFlexibleDimensions", c_uint32),
        ("cooperativeMatrixReductions", c_uint32),
        ("cooperativeMatrixConversions", c_uint32),
        ("cooperativeMatrixPerElementOperations", c_uint32),
        ("cooperativeMatrixTensorAddressing", c_uint32),
        ("cooperativeMatrixBlockLoads", c_uint32),
    ]


class VkPhysicalDeviceCooperativeMatrixFeaturesKHR(Tagged):
    STYPE = 1000506000
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("cooperativeMatrix", c_uint32),
        ("cooperativeMatrixRobustBufferAccess", c_uint32),
    ]


class VkConformanceVersion(ctypes.Structure):
    _fields_: ClassVar = [
        ("major", c_uint8),
        ("minor", c_uint8),
        ("subminor", c_uint8),
        ("patch", c_uint8),
    ]


class VkPhysicalDeviceDriverProperties(Tagged):
    STYPE = 1000196000
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("driverID", c_int32),
        ("driverName", c_char * 256),
        ("driverInfo", c_char * 256),
        ("conformanceVersion", VkConformanceVersion),
    ]


class VkPhysicalDeviceExternalMemoryHostPropertiesEXT(Tagged):
    STYPE = 1000178002
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("minImportedHostPointerAlignment", c_uint64),
    ]


class VkPhysicalDeviceFeatures(ctypes.Structure):
    _fields_: ClassVar = [
        ("robustBufferAccess", c_uint32),
        ("fullDrawIndexUint32", c_uint32),
        ("imageCubeArray", c_uint32),
        ("independentBlend", c_uint32),
        ("geometryShader", c_uint32),
        ("tessellationShader", c_uint32),
        ("sampleRateShading", c_uint32),
        ("dualSrcBlend", c_uint32),
        ("logicOp", c_uint32),
        ("multiDrawIndirect", c_uint32),
        ("drawIndirectFirstInstance", c_uint32),
        ("depthClamp", c_uint32),
        ("depthBiasClamp", c_uint32),
        ("fillModeNonSolid", c_uint32),
        ("depthBounds", c_uint32),
        ("wideLines", c_uint32),
        ("largePoints", c_uint32),
        ("alphaToOne", c_uint32),
        ("multiViewport", c_uint32),
        ("samplerAnisotropy", c_uint32),
        ("textureCompressionETC2", c_uint32),
        ("textureCompressionASTC_LDR", c_uint32),
        ("textureCompressionBC", c_uint32),
        ("occlusionQueryPrecise", c_uint32),
        ("pipelineStatisticsQuery", c_uint32),
        ("vertexPipelineStoresAndAtomics", c_uint32),
        ("fragmentStoresAndAtomics", c_uint32),
        ("shaderTessellationAndGeometryPointSize", c_uint32),
        ("shaderImageGatherExtended", c_uint32),
        ("shaderStorageImageExtendedFormats", c_uint32),
        ("shaderStorageImageMultisample", c_uint32),
        ("shaderStorageImageReadWithoutFormat", c_uint32),
        ("shaderStorageImageWriteWithoutFormat", c_uint32),
        ("shaderUniformBufferArrayDynamicIndexing", c_uint32),
        ("shaderSampledImageArrayDynamicIndexing", c_uint32),
        ("shaderStorageBufferArrayDynamicIndexing", c_uint32),
        ("shaderStorageImageArrayDynamicIndexing", c_uint32),
        ("shaderClipDistance", c_uint32),
        ("shaderCullDistance", c_uint32),
        ("shaderFloat64", c_uint32),
        ("shaderInt64", c_uint32),
        ("shaderInt16", c_uint32),
        ("shaderResourceResidency", c_uint32),
        ("shaderResourceMinLod", c_uint32),
        ("sparseBinding", c_uint32),
        ("sparseResidencyBuffer", c_uint32),
        ("sparseResidencyImage2D", c_uint32),
        ("sparseResidencyImage3D", c_uint32),
        ("sparseResidency2Samples", c_uint32),
        ("sparseResidency4Samples", c_uint32),
        ("sparseResidency8Samples", c_uint32),
        ("sparseResidency16Samples", c_uint32),
        ("sparseResidencyAliased", c_uint32),
        ("variableMultisampleRate", c_uint32),
        ("inheritedQueries", c_uint32),
    ]


class VkPhysicalDeviceFeatures2(Tagged):
    STYPE = 1000059000
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("features", VkPhysicalDeviceFeatures),
    ]


class VkPhysicalDeviceIDProperties(Tagged):
    STYPE = 1000071004
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("deviceUUID", c_uint8 * 16),
        ("driverUUID", c_uint8 * 16),
        ("deviceLUID", c_uint8 * 8),
        ("deviceNodeMask", c_uint32),
        ("deviceLUIDValid", c_uint32),
    ]


class VkMemoryType(ctypes.Structure):
    _fields_: ClassVar = [
        ("propertyFlags", c_uint32),
        ("heapIndex", c_uint32),
    ]


class VkMemoryHeap(ctypes.Structure):
    _fields_: ClassVar = [
        ("size", c_uint64),
        ("flags", c_uint32),
    ]


class VkPhysicalDeviceMemoryProperties(ctypes.Structure):
    _fields_: ClassVar = [
        ("memoryTypeCount", c_uint32),
        ("memoryTypes", VkMemoryType * 32),
        ("memoryHeapCount", c_uint32),
        ("memoryHeaps", VkMemoryHeap * 16),
    ]


class VkPhysicalDeviceLimits(ctypes.Structure):
    _fields_: ClassVar = [
        ("maxImageDimension1D", c_uint32),
        ("maxImageDimension2D", c_uint32),
        ("maxImageDimension3D", c_uint32),
        ("maxImageDimensionCube", c_uint32),
        ("maxImageArrayLayers", c_uint32),
        ("maxTexelBufferElements", c_uint32),
        ("maxUniformBufferRange", c_uint32),
        ("maxStorageBufferRange", c_uint32),
        ("maxPushConstantsSize", c_uint32),
        ("maxMemoryAllocationCount", c_uint32),
        ("maxSamplerAllocationCount", c_uint32),
        ("bufferImageGranularity", c_uint64),
        ("sparseAddressSpaceSize", c_uint64),
        ("maxBoundDescriptorSets", c_uint32),
        ("maxPerStageDescriptorSamplers", c_uint32),
        ("maxPerStageDescriptorUniformBuffers", c_uint32),
        ("maxPerStageDescriptorStorageBuffers", c_uint32),
        ("maxPerStageDescriptorSampledImages", c_uint32),
        ("maxPerStageDescriptorStorageImages", c_uint32),
        ("maxPerStageDescriptorInputAttachments", c_uint32),
        ("maxPerStageResources", c_uint32),
        ("maxDescriptorSetSamplers", c_uint32),
        ("maxDescriptorSetUniformBuffers", c_uint32),
        ("maxDescriptorSetUniformBuffersDynamic", c_uint32),
        ("maxDescriptorSetStorageBuffers", c_uint32),
        ("maxDescriptorSetStorageBuffersDynamic", c_uint32),
        ("maxDescriptorSetSampledImages", c_uint32),
        ("maxDescriptorSetStorageImages", c_uint32),
        ("maxDescriptorSetInputAttachments", c_uint32),
        ("maxVertexInputAttributes", c_uint32),
        ("maxVertexInputBindings", c_uint32),
        ("maxVertexInputAttributeOffset", c_uint32),
        ("maxVertexInputBindingStride", c_uint32),
        ("maxVertexOutputComponents", c_uint32),
        ("maxTessellationGenerationLevel", c_uint32),
        ("maxTessellationPatchSize", c_uint32),
        ("maxTessellationControlPerVertexInputComponents", c_uint32),
        ("maxTessellationControlPerVertexOutputComponents", c_uint32),
        ("maxTessellationControlPerPatchOutputComponents", c_uint32),
        ("maxTessellationControlTotalOutputComponents", c_uint32),
        ("maxTessellationEvaluationInputComponents", c_uint32),
        ("maxTessellationEvaluationOutputComponents", c_uint32),
        ("maxGeometryShaderInvocations", c_uint32),
        ("maxGeometryInputComponents", c_uint32),
        ("maxGeometryOutputComponents", c_uint32),
        ("maxGeometryOutputVertices", c_uint32),
        ("maxGeometryTotalOutputComponents", c_uint32),
        ("maxFragmentInputComponents", c_uint32),
        ("maxFragmentOutputAttachments", c_uint32),
        ("maxFragmentDualSrcAttachments", c_uint32),
        ("maxFragmentCombinedOutputResources", c_uint32),
        ("maxComputeSharedMemorySize", c_uint32),
        ("maxComputeWorkGroupCount", c_uint32 * 3),
        ("maxComputeWorkGroupInvocations", c_uint32),
        ("maxComputeWorkGroupSize", c_uint32 * 3),
        ("subPixelPrecisionBits", c_uint32),
        ("subTexelPrecisionBits", c_uint32),
        ("mipmapPrecisionBits", c_uint32),
        ("maxDrawIndexedIndexValue", c_uint32),
        ("maxDrawIndirectCount", c_uint32),
        ("maxSamplerLodBias", c_float),
        ("maxSamplerAnisotropy", c_float),
        ("maxViewports", c_uint32),
        ("maxViewportDimensions", c_uint32 * 2),
        ("viewportBoundsRange", c_float * 2),
        ("viewportSubPixelBits", c_uint32),
        ("minMemoryMapAlignment", c_size_t),
        ("minTexelBufferOffsetAlignment", c_uint64),
        ("minUniformBufferOffsetAlignment", c_uint64),
        ("minStorageBufferOffsetAlignment", c_uint64),
        ("minTexelOffset", c_int32),
        ("maxTexelOffset", c_uint32),
        ("minTexelGatherOffset", c_int32),
        ("maxTexelGatherOffset", c_uint32),
        ("minInterpolationOffset", c_float),
        ("maxInterpolationOffset", c_float),
        ("subPixelInterpolationOffsetBits", c_uint32),
        ("maxFramebufferWidth", c_uint32),
        ("maxFramebufferHeight", c_uint32),
        ("maxFramebufferLayers", c_uint32),
        ("framebufferColorSampleCounts", c_uint32),
        ("framebufferDepthSampleCounts", c_uint32),
        ("framebufferStencilSampleCounts", c_uint32),
        ("framebufferNoAttachmentsSampleCounts", c_uint32),
        ("maxColorAttachments", c_uint32),
        ("sampledImageColorSampleCounts", c_uint32),
        ("sampledImageIntegerSampleCounts", c_uint32),
        ("sampledImageDepthSampleCounts", c_uint32),
        ("sampledImageStencilSampleCounts", c_uint32),
        ("storageImageSampleCounts", c_uint32),
        ("maxSampleMaskWords", c_uint32),
        ("timestampComputeAndGraphics", c_uint32),
        ("timestampPeriod", c_float),
        ("maxClipDistances", c_uint32),
        ("maxCullDistances", c_uint32),
        ("maxCombinedClipAndCullDistances", c_uint32),
        ("discreteQueuePriorities", c_uint32),
        ("pointSizeRange", c_float * 2),
        ("lineWidthRange", c_float * 2),
        ("pointSizeGranularity", c_float),
        ("lineWidthGranularity", c_float),
        ("strictLines", c_uint32),
        ("standardSampleLocations", c_uint32),
        ("optimalBufferCopyOffsetAlignment", c_uint64),
        ("optimalBufferCopyRowPitchAlignment", c_uint64),
        ("nonCoherentAtomSize", c_uint64),
    ]


class VkPhysicalDeviceSparseProperties(ctypes.Structure):
    _fields_: ClassVar = [
        ("residencyStandard2DBlockShape", c_uint32),
        ("residencyStandard2DMultisampleBlockShape", c_uint32),
        ("residencyStandard3DBlockShape", c_uint32),
        ("residencyAlignedMipSize", c_uint32),
        ("residencyNonResidentStrict", c_uint32),
    ]


class VkPhysicalDeviceProperties(ctypes.Structure):
    _fields_: ClassVar = [
        ("apiVersion", c_uint32),
        ("driverVersion", c_uint32),
        ("vendorID", c_uint32),
        ("deviceID", c_uint32),
        ("deviceType", c_int32),
        ("deviceName", c_char * 256),
        ("pipelineCacheUUID", c_uint8 * 16),
        ("limits", VkPhysicalDeviceLimits),
        ("sparseProperties", VkPhysicalDeviceSparseProperties),
    ]


class VkPhysicalDeviceProperties2(Tagged):
    STYPE = 1000059001
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("properties", VkPhysicalDeviceProperties),
    ]


class VkPhysicalDeviceShaderBfloat16FeaturesKHR(Tagged):
    STYPE = 1000141000
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("shaderBFloat16Type", c_uint32),
        ("shaderBFloat16DotProduct", c_uint32),
        ("shaderBFloat16CooperativeMatrix", c_uint32),
    ]


class VkPhysicalDeviceShaderCorePropertiesAMD(Tagged):
    STYPE = 1000185000
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("shaderEngineCount", c_uint32),
        ("shaderArraysPerEngineCount", c_uint32),
        ("computeUnitsPerShaderArray", c_uint32),
        ("simdPerComputeUnit", c_uint32),
        ("wavefrontsPerSimd", c_uint32),
        ("wavefrontSize", c_uint32),
        ("sgprsPerSimd", c_uint32),
        ("minSgprAllocation", c_uint32),
        ("maxSgprAllocation", c_uint32),
        ("sgprAllocationGranularity", c_uint32),
        ("vgprsPerSimd", c_uint32),
        ("minVgprAllocation", c_uint32),
        ("maxVgprAllocation", c_uint32),
        ("vgprAllocationGranularity", c_uint32),
    ]


class VkPhysicalDeviceShaderFloat16Int8Features(Tagged):
    STYPE = 1000082000
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("shaderFloat16", c_uint32),
        ("shaderInt8", c_uint32),
    ]


class VkPhysicalDeviceShaderSMBuiltinsPropertiesNV(Tagged):
    STYPE = 1000154001
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("shaderSMCount", c_uint32),
        ("shaderWarpsPerSM", c_uint32),
    ]


class VkPhysicalDeviceSubgroupProperties(Tagged):
    STYPE = 1000094000
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("subgroupSize", c_uint32),
        ("supportedStages", c_uint32),
        ("supportedOperations", c_uint32),
        ("quadOperationsInAllStages", c_uint32),
    ]


class VkPhysicalDeviceSubgroupSizeControlFeatures(Tagged):
    STYPE = 1000225002
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("subgroupSizeControl", c_uint32),
        ("computeFullSubgroups", c_uint32),
    ]


class VkPhysicalDeviceVulkan12Features(Tagged):
    STYPE = 51
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("samplerMirrorClampToEdge", c_uint32),
        ("drawIndirectCount", c_uint32),
        ("storageBuffer8BitAccess", c_uint32),
        ("uniformAndStorageBuffer8BitAccess", c_uint32),
        ("storagePushConstant8", c_uint32),
        ("shaderBufferInt64Atomics", c_uint32),
        ("shaderSharedInt64Atomics", c_uint32),
        ("shaderFloat16", c_uint32),
        ("shaderInt8", c_uint32),
        ("descriptorIndexing", c_uint32),
        ("shaderInputAttachmentArrayDynamicIndexing", c_uint32),
        ("shaderUniformTexelBufferArrayDynamicIndexing", c_uint32),
        ("shaderStorageTexelBufferArrayDynamicIndexing", c_uint32),
        ("shaderUniformBufferArrayNonUniformIndexing", c_uint32),
        ("shaderSampledImageArrayNonUniformIndexing", c_uint32),
        ("shaderStorageBufferArrayNonUniformIndexing", c_uint32),
        ("shaderStorageImageArrayNonUniformIndexing", c_uint32),
        ("shaderInputAttachmentArrayNonUniformIndexing", c_uint32),
        ("shaderUniformTexelBufferArrayNonUniformIndexing", c_uint32),
        ("shaderStorageTexelBufferArrayNonUniformIndexing", c_uint32),
        ("descriptorBindingUniformBufferUpdateAfterBind", c_uint32),
        ("descriptorBindingSampledImageUpdateAfterBind", c_uint32),
        ("descriptorBindingStorageImageUpdateAfterBind", c_uint32),
        ("descriptorBindingStorageBufferUpdateAfterBind", c_uint32),
        ("descriptorBindingUniformTexelBufferUpdateAfterBind", c_uint32),
        ("descriptorBindingStorageTexelBufferUpdateAfterBind", c_uint32),
        ("descriptorBindingUpdateUnusedWhilePending", c_uint32),
        ("descriptorBindingPartiallyBound", c_uint32),
        ("descriptorBindingVariableDescriptorCount", c_uint32),
        ("runtimeDescriptorArray", c_uint32),
        ("samplerFilterMinmax", c_uint32),
        ("scalarBlockLayout", c_uint32),
        ("imagelessFramebuffer", c_uint32),
        ("uniformBufferStandardLayout", c_uint32),
        ("shaderSubgroupExtendedTypes", c_uint32),
        ("separateDepthStencilLayouts", c_uint32),
        ("hostQueryReset", c_uint32),
        ("timelineSemaphore", c_uint32),
        ("bufferDeviceAddress", c_uint32),
        ("bufferDeviceAddressCaptureReplay", c_uint32),
        ("bufferDeviceAddressMultiDevice", c_uint32),
        ("vulkanMemoryModel", c_uint32),
        ("vulkanMemoryModelDeviceScope", c_uint32),
        ("vulkanMemoryModelAvailabilityVisibilityChains", c_uint32),
        ("shaderOutputViewportIndex", c_uint32),
        ("shaderOutputLayer", c_uint32),
        ("subgroupBroadcastDynamicId", c_uint32),
    ]


class VkPhysicalDeviceVulkanMemoryModelFeatures(Tagged):
    STYPE = 1000211000
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("vulkanMemoryModel", c_uint32),
        ("vulkanMemoryModelDeviceScope", c_uint32),
        ("vulkanMemoryModelAvailabilityVisibilityChains", c_uint32),
    ]


class VkPipelineCacheCreateInfo(Tagged):
    STYPE = 17
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("flags", c_uint32),
        ("initialDataSize", c_size_t),
        ("pInitialData", c_void_p),
    ]


class VkPipelineLayoutCreateInfo(Tagged):
    STYPE = 30
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("flags", c_uint32),
        ("setLayoutCount", c_uint32),
        ("pSetLayouts", c_void_p),
        ("pushConstantRangeCount", c_uint32),
        ("pPushConstantRanges", c_void_p),
    ]


class VkPipelineShaderStageRequiredSubgroupSizeCreateInfo(Tagged):
    STYPE = 1000225001
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("requiredSubgroupSize", c_uint32),
    ]


class VkPushConstantRange(ctypes.Structure):
    _fields_: ClassVar = [
        ("stageFlags", c_uint32),
        ("offset", c_uint32),
        ("size", c_uint32),
    ]


class VkQueryPoolCreateInfo(Tagged):
    STYPE = 11
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("flags", c_uint32),
        ("queryType", c_int32),
        ("queryCount", c_uint32),
        ("pipelineStatistics", c_uint32),
    ]


class VkExtent3D(ctypes.Structure):
    _fields_: ClassVar = [
        ("width", c_uint32),
        ("height", c_uint32),
        ("depth", c_uint32),
    ]


class VkQueueFamilyProperties(ctypes.Structure):
    _fields_: ClassVar = [
        ("queueFlags", c_uint32),
        ("queueCount", c_uint32),
        ("timestampValidBits", c_uint32),
        ("minImageTransferGranularity", VkExtent3D),
    ]


class VkSemaphoreCreateInfo(Tagged):
    STYPE = 9
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("flags", c_uint32),
    ]


class VkSemaphoreGetFdInfoKHR(Tagged):
    STYPE = 1000079001
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("semaphore", c_uint64),
        ("handleType", c_uint32),
    ]


class VkSemaphoreTypeCreateInfo(Tagged):
    STYPE = 1000207002
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("semaphoreType", c_int32),
        ("initialValue", c_uint64),
    ]


class VkSemaphoreWaitInfo(Tagged):
    STYPE = 1000207004
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("flags", c_uint32),
        ("semaphoreCount", c_uint32),
        ("pSemaphores", c_void_p),
        ("pValues", c_void_p),
    ]


class VkShaderModuleCreateInfo(Tagged):
    STYPE = 16
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("flags", c_uint32),
        ("codeSize", c_size_t),
        ("pCode", c_void_p),
    ]


class VkSpecializationInfo(ctypes.Structure):
    _fields_: ClassVar = [
        ("mapEntryCount", c_uint32),
        ("pMapEntries", c_void_p),
        ("dataSize", c_size_t),
        ("pData", c_void_p),
    ]


class VkSpecializationMapEntry(ctypes.Structure):
    _fields_: ClassVar = [
        ("constantID", c_uint32),
        ("offset", c_uint32),
        ("size", c_size_t),
    ]


class VkSubmitInfo(Tagged):
    STYPE = 4
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("waitSemaphoreCount", c_uint32),
        ("pWaitSemaphores", c_void_p),
        ("pWaitDstStageMask", c_void_p),
        ("commandBufferCount", c_uint32),
        ("pCommandBuffers", c_void_p),
        ("signalSemaphoreCount", c_uint32),
        ("pSignalSemaphores", c_void_p),
    ]


class VkTimelineSemaphoreSubmitInfo(Tagged):
    STYPE = 1000207003
    _fields_: ClassVar = [
        ("sType", c_int32),
        ("pNext", c_void_p),
        ("waitSemaphoreValueCount", c_uint32),
        ("pWaitSemaphoreValues", c_void_p),
        ("signalSemaphoreValueCount", c_uint32),
        ("pSignalSemaphoreValues", c_void_p),
    ]


# What each command returns and takes.
COMMANDS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "vkAllocateCommandBuffers": (c_int32, (c_void_p, c_void_p, c_void_p)),
    "vkAllocateMemory": (c_int32, (c_void_p, c_void_p, c_void_p, c_void_p)),
    "vkBeginCommandBuffer": (c_int32, (c_void_p, c_void_p)),
    "vkBindBufferMemory": (c_int32, (c_void_p, c_uint64, c_uint64, c_uint64)),
    "vkCmdBindPipeline": (None, (c_void_p, c_int32, c_uint64)),
    "vkCmdCopyBuffer": (None, (c_void_p, c_uint64, c_uint64, c_uint32, c_void_p)),
    "vkCmdDispatch": (None, (c_void_p, c_uint32, c_uint32, c_uint32)),
    "vkCmdPipelineBarrier": (None, (c_void_p, c_uint32, c_uint32, c_uint32, c_uint32, c_void_p, c_uint32, c_void_p, c_uint32, c_void_p)),
    "vkCmdPushConstants": (None, (c_void_p, c_uint64, c_uint32, c_uint32, c_uint32, c_void_p)),
    "vkCmdResetQueryPool": (None, (c_void_p, c_uint64, c_uint32, c_uint32)),
    "vkCmdWriteTimestamp": (None, (c_void_p, c_uint32, c_uint64, c_uint32)),
    "vkCreateBuffer": (c_int32, (c_void_p, c_void_p, c_void_p, c_void_p)),
    "vkCreateCommandPool": (c_int32, (c_void_p, c_void_p, c_void_p, c_void_p)),
    "vkCreateComputePipelines": (c_int32, (c_void_p, c_uint64, c_uint32, c_void_p, c_void_p, c_void_p)),
    "vkCreateDevice": (c_int32, (c_void_p, c_void_p, c_void_p, c_void_p)),
    "vkCreateInstance": (c_int32, (c_void_p, c_void_p, c_void_p)),
    "vkCreatePipelineCache": (c_int32, (c_void_p, c_void_p, c_void_p, c_void_p)),
    "vkCreatePipelineLayout": (c_int32, (c_void_p, c_void_p, c_void_p, c_void_p)),
    "vkCreateQueryPool": (c_int32, (c_void_p, c_void_p, c_void_p, c_void_p)),
    "vkCreateSemaphore": (c_int32, (c_void_p, c_void_p, c_void_p, c_void_p)),
    "vkCreateShaderModule": (c_int32, (c_void_p, c_void_p, c_void_p, c_void_p)),
    "vkDestroyBuffer": (None, (c_void_p, c_uint64, c_void_p)),
    "vkDestroyCommandPool": (None, (c_void_p, c_uint64, c_void_p)),
    "vkDestroyDevice": (None, (c_void_p, c_void_p)),
    "vkDestroyInstance": (None, (c_void_p, c_void_p)),
    "vkDestroyPipeline": (None, (c_void_p, c_uint64, c_void_p)),
    "vkDestroyPipelineCache": (None, (c_void_p, c_uint64, c_void_p)),
    "vkDestroyPipelineLayout": (None, (c_void_p, c_uint64, c_void_p)),
    "vkDestroyQueryPool": (None, (c_void_p, c_uint64, c_void_p)),
    "vkDestroySemaphore": (None, (c_void_p, c_uint64, c_void_p)),
    "vkDestroyShaderModule": (None, (c_void_p, c_uint64, c_void_p)),
    "vkDeviceWaitIdle": (c_int32, (c_void_p,)),
    "vkEndCommandBuffer": (c_int32, (c_void_p,)),
    "vkEnumerateDeviceExtensionProperties": (c_int32, (c_void_p, c_char_p, c_void_p, c_void_p)),
    "vkEnumerateInstanceExtensionProperties": (c_int32, (c_char_p, c_void_p, c_void_p)),
    "vkEnumerateInstanceVersion": (c_int32, (c_void_p,)),
    "vkEnumeratePhysicalDevices": (c_int32, (c_void_p, c_void_p, c_void_p)),
    "vkFreeMemory": (None, (c_void_p, c_uint64, c_void_p)),
    "vkGetBufferDeviceAddress": (c_uint64, (c_void_p, c_void_p)),
    "vkGetBufferMemoryRequirements": (None, (c_void_p, c_uint64, c_void_p)),
    "vkGetDeviceProcAddr": (c_void_p, (c_void_p, c_char_p)),
    "vkGetDeviceQueue": (None, (c_void_p, c_uint32, c_uint32, c_void_p)),
    "vkGetInstanceProcAddr": (c_void_p, (c_void_p, c_char_p)),
    "vkGetMemoryHostPointerPropertiesEXT": (c_int32, (c_void_p, c_uint32, c_void_p, c_void_p)),
    "vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR": (c_int32, (c_void_p, c_void_p, c_void_p)),
    "vkGetPhysicalDeviceFeatures2": (None, (c_void_p, c_void_p)),
    "vkGetPhysicalDeviceMemoryProperties": (None, (c_void_p, c_void_p)),
    "vkGetPhysicalDeviceProperties": (None, (c_void_p, c_void_p)),
    "vkGetPhysicalDeviceProperties2": (None, (c_void_p, c_void_p)),
    "vkGetPhysicalDeviceQueueFamilyProperties": (None, (c_void_p, c_void_p, c_void_p)),
    "vkGetPipelineCacheData": (c_int32, (c_void_p, c_uint64, c_void_p, c_void_p)),
    "vkGetQueryPoolResults": (c_int32, (c_void_p, c_uint64, c_uint32, c_uint32, c_size_t, c_void_p, c_uint64, c_uint32)),
    "vkGetSemaphoreCounterValue": (c_int32, (c_void_p, c_uint64, c_void_p)),
    "vkGetSemaphoreFdKHR": (c_int32, (c_void_p, c_void_p, c_void_p)),
    "vkMapMemory": (c_int32, (c_void_p, c_uint64, c_uint64, c_uint64, c_uint32, c_void_p)),
    "vkQueueSubmit": (c_int32, (c_void_p, c_uint32, c_void_p, c_uint64)),
    "vkWaitSemaphores": (c_int32, (c_void_p, c_void_p, c_uint64)),
}
