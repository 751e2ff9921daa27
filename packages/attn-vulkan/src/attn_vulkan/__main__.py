"""Print the Vulkan devices of this machine, or why there are none.

With --self-test each device that can be used computes small problems that are compared with numpy,
and with --benchmark it is timed. The exit status is 0 where there is a device and nothing fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from attn_vulkan import selftest, variants
from attn_vulkan._vk.errors import VulkanError
from attn_vulkan.device import NO_DEVICE, Device, devices
from attn_vulkan.problem import ITEM_BYTES
from attn_vulkan.quirks import quirks_of, usable

_Line = tuple[str, bool]  # and whether it tells of a success
_Job = Callable[[Device], Iterator[_Line]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m attn_vulkan``."""
    parser = argparse.ArgumentParser(prog="python -m attn_vulkan", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--self-test", action="store_true", help="compare results with numpy")
    parser.add_argument("--benchmark", action="store_true", help="time a few problems")
    options = parser.parse_args(arguments)
    jobs = {"self_test": _self_test, "benchmark": _benchmark}
    found, reason = _probe()
    listed = [_facts(device) for device in found]
    if not options.json:
        Console().print(_table(found) if found else f"Vulkan cannot be used: {reason}")
    passes = bool(found)
    for device, facts in zip(found, listed, strict=True):
        for name in (name for name in jobs if getattr(options, name)):
            lines = facts[name] = []
            for line, passed in _tried(device, jobs[name]):
                lines.append(line)
                passes = passes and passed
                if not options.json:
                    print(f"{device.index}: {line}", flush=True)
    if options.json:
        print(json.dumps({"devices": listed, "reason": reason}, indent=2))
    return 0 if passes else 1


def _probe() -> tuple[list[Device], str | None]:
    try:
        found = devices()
    except VulkanError as error:
        return [], str(error)
    return found, None if found else NO_DEVICE


def _facts(device: Device) -> dict[str, Any]:
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


def _tried(device: Device, job: _Job) -> Iterator[_Line]:
    """The lines of a job, and why it ended before its time or did not begin."""
    reason = variants.refusal(usable(device), "float32")
    if reason is not None:
        yield f"cannot be used: {reason}", True
        return
    try:
        yield from job(device)
    except (VulkanError, ValueError) as error:  # the latter of a variable of the environment
        yield f"failed: {error}", False


def _self_test(device: Device) -> Iterator[_Line]:
    return ((str(outcome), outcome.passed) for outcome in selftest.check(device))


def _benchmark(device: Device) -> Iterator[_Line]:
    return ((line, True) for line in selftest.benchmark(device))


if __name__ == "__main__":
    sys.exit(main())
