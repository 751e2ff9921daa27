"""What is known about a device."""

from types import SimpleNamespace

import pytest
import torch

from attn_core import device as device_module
from attn_core.device import DeviceInfo, device_info, list_devices, triton_refusal, triton_version


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to have GPUs: give their properties, and the HIP version where it is AMD."""

    def pretend(hip=None, **properties):
        properties = {"multi_processor_count": 132, "total_memory": 2**37, **properties}
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties)
        )

    device_module._device_info.cache_clear()
    yield pretend
    device_module._device_info.cache_clear()


def test_nvidia(gpu):
    gpu(name="NVIDIA H200", major=9, minor=0)
    info = device_info("cuda:0")
    assert info == DeviceInfo("cuda", "NVIDIA H200", "sm_90", 132, 2**37)
    assert info.capability == 90


def test_amd(gpu):
    gpu(hip="6.4", name="AMD Instinct MI300X", gcnArchName="gfx942:sramecc+:xnack-")
    info = device_info("cuda:0")
    assert (info.type, info.arch, info.capability) == ("hip", "gfx942", 0)


@pytest.mark.parametrize(
    "arch, capability", [("sm_80", 80), ("sm_90a", 90), ("sm_100f", 100), ("gfx942", 0), ("", 0)]
)
def test_capability(arch, capability):
    assert DeviceInfo("cuda", "some GPU", arch).capability == capability


def test_cuda_without_an_index_is_the_current_device(gpu, monkeypatch):
    gpu(name="NVIDIA H200", major=9, minor=0)
    asked = []
    properties = torch.cuda.get_device_properties
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda d: asked.append(d) or properties(d)
    )
    device_info("cuda")
    device_info("cuda:1")
    assert asked == [torch.device("cuda", 1)], "asked once"


def test_cpu_and_other_devices():
    assert device_info("cpu") == DeviceInfo("cpu", "cpu")
    assert device_info(torch.device("meta")).type == "meta"


def test_every_device_is_listed(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    names = [str(device) for device in list_devices()]
    assert names == ["cpu", "cuda:0", "cuda:1", "xpu:0", "mps"]


@pytest.fixture
def distributions(monkeypatch):
    """Pretend that exactly these distributions are installed."""

    def pretend(importable, **versions):
        def version(name):
            if name not in versions:
                raise device_module.importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(device_module.importlib.util, "find_spec", lambda name: importable)
        monkeypatch.setattr(device_module.importlib.metadata, "version", version)

    triton_version.cache_clear()
    yield pretend
    triton_version.cache_clear()


@pytest.mark.parametrize(
    "name, version, expected",
    [
        ("triton", "3.6.0", (3, 6)),
        ("triton-windows", "3.2.0.post11", (3, 2)),
        ("pytorch-triton-rocm", "3.10.1+git0", (3, 10)),
    ],
)
def test_triton_version(distributions, name, version, expected):
    distributions(True, **{name: version})
    assert triton_version() == expected


def test_no_triton(distributions):
    distributions(None, triton="3.6.0")
    assert triton_version() is None


def test_triton_of_unknown_origin(distributions):
    distributions(True)
    assert triton_version() is None


def test_an_old_triton_is_refused(distributions):
    distributions(True, triton="3.1.0")
    assert triton_refusal(torch.device("cuda")) == "triton must be at least 3.2, got 3.1"
