"""Print the Vulkan devices of this machine, or why there are none.

The exit status is 0 with a device and 1 without.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from attn_vulkan._vk.errors import VulkanError
from attn_vulkan.device import NO_DEVICE, Device, devices


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m attn_vulkan``."""
    parser = argparse.ArgumentParser(prog="python -m attn_vulkan", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    options = parser.parse_args(arguments)
    found, reason = _probe()
    if options.json:
        listed = [dataclasses.asdict(device) for device in found]
        print(json.dumps({"devices": listed, "reason": reason}, indent=2))
    else:
        Console().print(_table(found) if found else f"Vulkan cannot be used: {reason}")
    return 0 if found else 1


def _probe() -> tuple[list[Device], str | None]:
    try:
        found = devices()
    except VulkanError as error:
        return [], str(error)
    return found, None if found else NO_DEVICE


def _table(found: list[Device]) -> Table:
    table = Table("", "device and driver", "type", "Vulkan", "subgroup", "memory", "features")
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
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
