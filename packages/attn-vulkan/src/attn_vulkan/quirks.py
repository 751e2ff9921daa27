"""What drivers offer but should not be trusted with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from attn_vulkan.device import Device


@dataclass(frozen=True)
class Quirk:
    """Features not to use on the devices that `applies` to, and why."""

    applies: Callable[[Device], bool]
    without: tuple[str, ...]
    reason: str


_MATRIX = ("cooperative_matrix", "cooperative_matrix2")
QUIRKS = (
    Quirk(
        lambda device: device.type == "cpu",
        _MATRIX,
        "a CPU emulates cooperative matrices, and takes minutes to compile them",
    ),
    Quirk(
        lambda device: "AMD proprietary" in device.driver and "Radeon RX 6" in device.name,
        _MATRIX,
        "the driver lists matrices that RDNA 2 does not have (llama.cpp, pull request 10597)",
    ),
    Quirk(
        lambda device: device.features.cooperative_matrix and not device.features.memory_model,
        _MATRIX,
        "cooperative matrices need the Vulkan memory model",
    ),
    Quirk(
        lambda device: (
            device.features.cooperative_matrix and not device.features.subgroup_size_control
        ),
        _MATRIX,
        "a cooperative matrix needs subgroups of a known size",
    ),
)


def quirks_of(device: Device) -> list[Quirk]:
    """Quirks that apply to a device."""
    return [quirk for quirk in QUIRKS if quirk.applies(device)]


def usable(device: Device) -> Device:
    """Return the device without the features that its quirks rule out."""
    without = {name: False for quirk in quirks_of(device) for name in quirk.without}
    return dataclasses.replace(device, features=dataclasses.replace(device.features, **without))
