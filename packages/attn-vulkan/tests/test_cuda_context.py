"""The CUDA context of a thread, with a driver that only keeps book."""

import pytest

from attn_vulkan import cuda_driver

PRIMARY = 0xC0FFEE


class Driver:
    """What libcuda does about contexts."""

    def __init__(self, current):
        self.current = current
        self.retained = []

    def cuCtxGetCurrent(self, context):  # noqa: N802
        context._obj.value = self.current
        return 0

    def cuDeviceGet(self, device, index):  # noqa: N802
        device._obj.value = index.value
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):  # noqa: N802
        self.retained.append(device.value)
        context._obj.value = PRIMARY
        return 0

    def cuCtxSetCurrent(self, context):  # noqa: N802
        self.current = context.value
        return 0


@pytest.fixture
def use_driver(monkeypatch):
    cuda_driver._primary_context.cache_clear()

    def use(current):
        driver = Driver(current)
        monkeypatch.setattr(cuda_driver, "_library", lambda: driver)
        return driver

    yield use
    cuda_driver._primary_context.cache_clear()


def test_a_thread_without_a_context_gets_that_of_its_device(use_driver):
    driver = use_driver(None)
    cuda_driver.require_context(1)
    assert driver.current == PRIMARY
    driver.current = None
    cuda_driver.require_context(1)
    assert (driver.current, driver.retained) == (PRIMARY, [1])


def test_the_context_of_a_thread_stays(use_driver):
    driver = use_driver(7)
    cuda_driver.require_context(0)
    assert (driver.current, driver.retained) == (7, [])
