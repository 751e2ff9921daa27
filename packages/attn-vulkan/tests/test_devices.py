from __future__ import annotations

import threading
import time

import pytest

from attn_vulkan import Features, LoaderNotFound, VulkanError, devices

FEATURES_16BIT_STORAGE = 1000083000
FEATURES_FLOAT16 = 1000082000
FEATURES_BUFFER_ADDRESS = 1000257000
FEATURES_1_2 = 51
SCALAR_LAYOUT = (0,) * 31 + (1,)
FEATURES_BFLOAT16 = 1000141000
FEATURES_MATRIX = 1000506000
FEATURES_MATRIX2 = 1000593000
PROPERTIES_SM_NV = 1000154001
PROPERTIES_CORE_AMD = 1000185000
ERROR_INCOMPATIBLE_DRIVER = -9
EXTENSIONS = ("VK_KHR_shader_bfloat16", "VK_KHR_cooperative_matrix", "VK_NV_cooperative_matrix2")
FEATURE_NAMES = (
    "float16",
    "bfloat16",
    "cooperative_matrix",
    "cooperative_matrix2",
    "buffer_device_address",
    "scalar_layout",
)
EVERY_FEATURE = {
    FEATURES_16BIT_STORAGE: (1, 1, 0, 0),
    FEATURES_FLOAT16: (1, 0),
    FEATURES_BUFFER_ADDRESS: (1, 0, 0),
    FEATURES_1_2: SCALAR_LAYOUT,
    FEATURES_BFLOAT16: (1, 0, 0),
    FEATURES_MATRIX: (1, 0),
    FEATURES_MATRIX2: (0, 0, 1, 1, 1, 0, 0),
}


def test_facts_of_a_device(use_loader, fake_device):
    use_loader(fake_device("Fake GPU"))
    (device,) = devices()
    assert device.index == 0
    assert device.name == "Fake GPU"
    assert device.type == "discrete"
    assert device.api_version == "1.3.230"
    assert device.driver == "fakevk 1.2.3"
    assert device.subgroup_size == 32
    assert device.memory == 8 << 30
    assert device.features == Features()


@pytest.mark.parametrize(
    "number,name",
    [(0, "other"), (1, "integrated"), (2, "discrete"), (3, "virtual"), (4, "cpu"), (99, "other")],
)
def test_device_types(use_loader, fake_device, number, name):
    use_loader(fake_device(type=number))
    assert devices()[0].type == name


def test_order_and_index_are_the_loaders(use_loader, fake_device):
    use_loader(fake_device("b"), fake_device("a"), fake_device("c"))
    assert [(device.index, device.name) for device in devices()] == [(0, "b"), (1, "a"), (2, "c")]


def test_every_feature(use_loader, fake_device):
    use_loader(fake_device(extensions=EXTENSIONS, features=EVERY_FEATURE))
    features = devices()[0].features
    assert all(getattr(features, name) for name in FEATURE_NAMES)


@pytest.mark.parametrize(
    "stype,flags,feature",
    [
        (FEATURES_FLOAT16, (0, 1), "float16"),
        (FEATURES_BUFFER_ADDRESS, (0, 1, 1), "buffer_device_address"),
        (FEATURES_1_2, (1,) * 31 + (0, 1), "scalar_layout"),
        (FEATURES_BFLOAT16, (0, 1, 1), "bfloat16"),
        (FEATURES_MATRIX, (0, 1), "cooperative_matrix"),
        (FEATURES_MATRIX2, (1, 1, 0, 1, 1, 1, 1), "cooperative_matrix2"),
        (FEATURES_MATRIX2, (1, 1, 1, 0, 1, 1, 1), "cooperative_matrix2"),
        (FEATURES_MATRIX2, (1, 1, 1, 1, 0, 1, 1), "cooperative_matrix2"),
    ],
)
def test_a_feature_needs_its_own_flag(use_loader, fake_device, stype, flags, feature):
    use_loader(fake_device(extensions=EXTENSIONS, features={**EVERY_FEATURE, stype: flags}))
    features = devices()[0].features
    assert [name for name in FEATURE_NAMES if not getattr(features, name)] == [feature]


def test_half_precision_needs_its_storage_too(use_loader, fake_device):
    use_loader(fake_device(features={**EVERY_FEATURE, FEATURES_16BIT_STORAGE: (0, 1, 1, 1)}))
    features = devices()[0].features
    assert not features.float16
    assert not features.storage16


def test_shapes_of_matrices(use_loader, fake_device):
    use_loader(fake_device(extensions=EXTENSIONS, features=EVERY_FEATURE))
    assert devices()[0].matrix_shapes == ("float16 16x16x16",)


@pytest.mark.parametrize(
    "extension,stype,words,count",
    [
        ("VK_NV_shader_sm_builtins", PROPERTIES_SM_NV, (132, 64), 132),
        ("VK_AMD_shader_core_properties", PROPERTIES_CORE_AMD, (4, 2, 12, 2), 96),
        ("VK_KHR_maintenance1", PROPERTIES_SM_NV, (132, 64), 0),
    ],
)
def test_processors(use_loader, fake_device, extension, stype, words, count):
    use_loader(fake_device(extensions=(extension,), properties={stype: words}))
    assert devices()[0].processors == count


def test_a_flag_without_its_extension_is_not_asked_for(use_loader, fake_device):
    use_loader(fake_device(features=EVERY_FEATURE))
    assert devices()[0].features == Features(
        float16=True, buffer_device_address=True, storage16=True, scalar_layout=True
    )


def test_a_vulkan_1_0_device_is_listed_without_newer_facts(use_loader, fake_device):
    use_loader(fake_device(version=1 << 22, extensions=EXTENSIONS, features=EVERY_FEATURE))
    (device,) = devices()
    assert (device.api_version, device.driver) == ("1.0.0", "version 7")
    assert (device.subgroup_size, device.features) == (0, Features())


def test_memory_is_the_largest_local_heap(use_loader, fake_device):
    use_loader(fake_device(heaps=((1, 1), (3, 1), (9, 0), (2, 1))), fake_device(heaps=((9, 0),)))
    assert [device.memory for device in devices()] == [3, 0]


def test_no_device(use_loader):
    fake = use_loader()
    assert devices() == []
    assert fake.created == fake.destroyed == 1


def test_no_driver(use_loader):
    fake = use_loader(create=ERROR_INCOMPATIBLE_DRIVER)
    assert devices() == []
    assert fake.destroyed == 0


def test_an_instance_that_cannot_be_created(use_loader):
    use_loader(create=-3)
    with pytest.raises(
        VulkanError, match=r"vkCreateInstance failed: VK_ERROR_INITIALIZATION_FAILED \(-3\)"
    ):
        devices()


def test_a_failing_driver_leaves_no_instance(use_loader, fake_device):
    fake = use_loader(fake_device())
    fake.enumerate_result = -3
    with pytest.raises(
        VulkanError,
        match=r"vkEnumeratePhysicalDevices failed: VK_ERROR_INITIALIZATION_FAILED \(-3\)",
    ):
        devices()
    assert fake.created == fake.destroyed == 1


def test_a_loader_of_vulkan_1_0(use_loader, fake_device):
    fake = use_loader(fake_device())
    fake.missing.add("vkEnumerateInstanceVersion")
    with pytest.raises(VulkanError, match=r"must be of version 1\.1 or newer, got 1\.0"):
        devices()


def test_a_loader_that_lacks_a_function(use_loader, fake_device):
    fake = use_loader(fake_device())
    fake.missing.add("vkGetPhysicalDeviceProperties2")
    with pytest.raises(VulkanError, match="loader has no vkGetPhysicalDeviceProperties2"):
        devices()
    assert fake.created == fake.destroyed == 1


@pytest.mark.parametrize("offered,flags", [((), 0), (("VK_KHR_portability_enumeration",), 1)])
def test_portability_devices_are_asked_for(use_loader, fake_device, offered, flags):
    fake = use_loader(fake_device())
    fake.instance_extensions = offered
    devices()
    assert fake.instance_flags == flags


def test_a_list_that_grows_while_it_is_read(use_loader, fake_device):
    fake = use_loader(fake_device("a"))
    enumerate_once = fake._callbacks["vkEnumeratePhysicalDevices"]

    def plug_in_a_gpu(instance, count, items):
        if items is not None and len(fake.devices) == 1:
            fake.devices = (fake_device("a"), fake_device("b"))
        return enumerate_once(instance, count, items)

    fake._callbacks["vkEnumeratePhysicalDevices"] = type(enumerate_once)(plug_in_a_gpu)
    assert [device.name for device in devices()] == ["a", "b"]


def test_drivers_are_asked_once(use_loader, fake_device):
    fake = use_loader(fake_device())
    first = devices()
    first.clear()
    assert len(devices()) == 1
    assert fake.created == fake.destroyed == 1


def test_threads_ask_once(use_loader, fake_device):
    fake = use_loader(fake_device())
    create = fake._callbacks["vkCreateInstance"]

    def create_slowly(*arguments):
        time.sleep(0.05)
        return create(*arguments)

    fake._callbacks["vkCreateInstance"] = type(create)(create_slowly)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(devices())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4
    assert fake.created == fake.destroyed == 1


def test_a_missing_loader_is_not_remembered(use_loader, fake_device, monkeypatch):
    with monkeypatch.context() as context:
        context.setenv("ATTN_VULKAN_LOADER", "/nowhere/libvulkan.so.1")
        with pytest.raises(LoaderNotFound):
            devices()
    use_loader(fake_device())
    assert len(devices()) == 1
