"""The real loader with whatever device it finds; Mesa's lavapipe makes one of any CPU."""

from __future__ import annotations

import pytest

import attn_vulkan

pytestmark = pytest.mark.vulkan


@pytest.fixture
def found() -> list[attn_vulkan.Device]:
    try:
        devices = attn_vulkan.devices()
    except attn_vulkan.LoaderNotFound as error:
        pytest.skip(str(error))
    if not devices:
        pytest.skip("no Vulkan device: no installed driver finds one")
    return devices


def test_facts_make_sense(found):
    for index, device in enumerate(found):
        assert device.index == index
        assert device.name
        assert device.name.isprintable()
        assert device.driver.isprintable()
        assert int(device.api_version.split(".")[0]) == 1
        assert device.memory > 1 << 20
        assert device.subgroup_size in (0, 1, 2, 4, 8, 16, 32, 64, 128)


def test_lavapipe(found):
    lavapipe = [device for device in found if device.driver.startswith("llvmpipe")]
    if not lavapipe:
        pytest.skip("none of the devices is lavapipe")
    assert lavapipe[0].type == "cpu"
    assert lavapipe[0].subgroup_size in (4, 8, 16)
    assert lavapipe[0].features.float16
    assert lavapipe[0].features.buffer_device_address
    assert not lavapipe[0].features.bfloat16
