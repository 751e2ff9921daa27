"""Print the Vulkan devices of this machine, or why there are none.

With --self-test each device computes small problems that are compared with numpy, and with
--benchmark it is timed. The exit status is 0 where there is a device and every test passes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from attn_vulkan import selftest, variants
from attn_vulkan._vk.errors import VulkanError
from attn_vulkan.device import NO_DEVICE, Device, devices
from attn_vulkan.problem import ITEM_BYTES
from attn_vulkan.quirks import quirks_of, usable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m attn_vulkan``."""
    parser = argparse.ArgumentParser(prog="python -m attn_vulkan", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--self-test", action="store_true", help="compare results with numpy")
    parser.add_argument("--benchmark", action="store_true", help="time a few problems")
    options = parser.parse_args(arguments)
    found, reason = _probe()
    if options.json:
        listed = [_facts(device) for device in found]
        print(json.dumps({"devices": listed, "reason": reason}, indent=2))
    else:
        Console().print(_table(found) if found else f"Vulkan cannot be used: {reason}")
    failures = 0
    for device in found:
        if options.self_test:
            failures += _self_test(device)
        if options.benchmark:
            _benchmark(device)
    return 0 if found and not failures else 1


def _probe() -> tuple[list[Device], str | None]:
    try:
        found = devices()
    except VulkanError as error:
        return [], str(error)
    return found, None if found else NO_DEVICE


def _facts(device: Device) -> dict[str, object]:
    return {
        **dataclasses.asdict(device),
        "variants": _variants(device),
        "quirks": [quirk.reason for quirk in quirks_of(device)],
    }


def _variants(device: Device) -> dict[str, str]:
    """The variant of each dtype, or why there is none."""
    trusted = usable(device)
    return {
        dtype: variants.refusal(trusted, dtype) or variants.available(trusted, dtype)[0]
        for dtype in ITEM_BYTES
    }


def _table(found: list[Device]) -> Table:
    table = Table(
        "", "device and driver", "type", "Vulkan", "subgroup", "memory", "features", "variants"
    )
    for device in found:
        features = [
            name.replace("_", " ")
            for name, has in dataclasses.asdict(device.features).items()
            if has
        ]
        table.add_row(
            str(device.index),
            f"{device.name}\n{device.driver}",
            device.type,
            device.api_version,
            str(device.subgroup_size),
            f"{device.memory / 2**30:.1f} GiB",
            "\n".join(features),
            "\n".join(f"{dtype}: {name}" for dtype, name in _variants(device).items()),
        )
    return table


def _self_test(device: Device) -> int:
    failures = 0
    for outcome in selftest.check(device):
        print(f"{device.index}: {outcome}", flush=True)
        failures += not outcome.passed
    return failures


def _benchmark(device: Device) -> None:
    for line in selftest.benchmark(device):
        print(f"{device.index}: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
