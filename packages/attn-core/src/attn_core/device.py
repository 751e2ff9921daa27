"""What is known about a device. The only file of the family that asks torch about hardware."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from dataclasses import dataclass

import torch

TRITON_MINIMUM = (3, 2)


@dataclass(frozen=True)
class DeviceInfo:
    """Facts about one device that decide which kernels run and how they are tiled.

    Attributes
    ----------
    type : str
        ``"cpu"``, ``"cuda"`` (NVIDIA), ``"hip"`` (AMD), or torch's own name of any other device.
    name : str
        Marketing name, as the driver gives it.
    arch : str
        ``"sm_90"`` for NVIDIA, ``"gfx942"`` for AMD, ``""`` where there is no such thing.
    num_sms : int
        Streaming multiprocessors or compute units; 0 where unknown.
    memory : int
        Total device memory in bytes; 0 where unknown.
    """

    type: str
    name: str
    arch: str = ""
    num_sms: int = 0
    memory: int = 0

    @property
    def capability(self) -> int:
        """The number behind ``sm_`` (90 for Hopper), 0 on anything but NVIDIA."""
        return int(self.arch[3:].rstrip("af")) if self.arch.startswith("sm_") else 0


def device_info(device: torch.device | str) -> DeviceInfo:
    """Describe a device; the driver is asked once per device and process.

    Parameters
    ----------
    device : torch.device or str
        CUDA without an index is the current device.

    Returns
    -------
    DeviceInfo
        What is known about it.

    Examples
    --------
    >>> from attn_core import device_info
    >>> device_info("cpu").type
    'cpu'
    """
    device = torch.device(device)
    if device == torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
    return _device_info(device)


@functools.lru_cache(maxsize=None)
def _device_info(device: torch.device) -> DeviceInfo:
    if device.type != "cuda":
        return DeviceInfo(device.type, device.type)
    properties = torch.cuda.get_device_properties(device)
    is_hip = torch.version.hip is not None
    arch = (
        properties.gcnArchName.split(":")[0]
        if is_hip
        else f"sm_{properties.major}{properties.minor}"
    )
    return DeviceInfo(
        "hip" if is_hip else "cuda",
        properties.name,
        arch,
        properties.multi_processor_count,
        properties.total_memory,
    )


def list_devices() -> list[torch.device]:
    """Every device torch can use on this machine, the CPU first."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if hasattr(torch, "xpu"):
        devices += [torch.device("xpu", i) for i in range(torch.xpu.device_count())]
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    return devices


GLUON_VERSIONS = ((3, 6), (3, 7), (3, 8), (3, 9))
"""Versions of Triton with which the kernels for Hopper ran on a GPU: Gluon is experimental."""


def gluon_refusal(version: tuple[int, int]) -> str | None:
    """Say why kernels for Hopper do not run with a version of Triton; None where they do."""
    if version in GLUON_VERSIONS:
        return None
    known = ", ".join(f"{major}.{minor}" for major, minor in GLUON_VERSIONS)
    return f"its kernels are written for Gluon of triton {known}, got {version[0]}.{version[1]}"


@functools.lru_cache(maxsize=None)
def triton_version() -> tuple[int, int] | None:
    """Major and minor version of the installed Triton, or None; does not import it."""
    if importlib.util.find_spec("triton") is None:
        return None
    for distribution in ("triton", "triton-windows", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        major, minor = version.split(".")[:2]
        return int(major), int(minor)
    return None


def triton_refusal(device: torch.device) -> str | None:
    """Say why the Triton kernels of this family cannot run on `device`; None where they can."""
    version = triton_version()
    if version is None:
        return "triton is not installed; the extra [triton] of the package brings it"
    if version < TRITON_MINIMUM:
        least, got = (".".join(map(str, numbers)) for numbers in (TRITON_MINIMUM, version))
        return f"triton must be at least {least}, got {got}"
    info = device_info(device)
    if info.type not in ("cuda", "hip"):
        return f"it runs on NVIDIA and AMD GPUs, the tensors are on {info.type}"
    if info.type == "cuda" and info.capability < 80:
        return f"it needs compute capability 8.0 or newer, {info.name} has {info.arch}"
    return None
