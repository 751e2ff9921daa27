"""Print what is installed, and which backend would run what, and why."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from attn_core import backends, environment
from attn_core.device import device_info, list_devices, triton_version
from attn_core.family import MODULES


def report() -> dict[str, Any]:
    """Collect everything this prints, as JSON takes it."""
    packages = _packages()  # imports them, so their operators are known from here on
    return {
        "packages": packages,
        "versions": _versions(),
        "environment": {name: os.environ.get(name) for name in environment.VARIABLES},
        "tile_cache": str(environment.cache_dir()),
        "devices": [_device(device) for device in list_devices()],
        "backends": backends.registered(),
        "operators": [
            _choice(op, device) for op in sorted(backends.operators()) for device in list_devices()
        ],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report as tables, or as JSON."""
    parser = argparse.ArgumentParser(prog="python -m attn_core", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    options = parser.parse_args(arguments)
    if options.json:
        print(json.dumps(report(), indent=2))
    else:
        _print_tables(report())


def _packages() -> list[dict[str, str | None]]:
    packages = [_package(module) for module in MODULES if importlib.util.find_spec(module)]
    try:
        version = importlib.metadata.version("attn-all")
    except importlib.metadata.PackageNotFoundError:
        return packages
    return [*packages, {"name": "attn-all", "version": version, "error": None}]


def _package(module: str) -> dict[str, str | None]:
    name = module.replace("_", "-")
    try:
        version = importlib.import_module(module).__version__
    except Exception as error:  # what does not import is what this report is read for
        return {"name": name, "version": None, "error": f"{type(error).__name__}: {error}"}
    return {"name": name, "version": version, "error": None}


def _versions() -> dict[str, str | None]:
    triton = triton_version()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": triton and ".".join(map(str, triton)),
    }


def _device(device: torch.device) -> dict[str, Any]:
    info = device_info(device)
    return {
        "device": str(device),
        "type": info.type,
        "name": info.name,
        "arch": info.arch,
        "num_sms": info.num_sms,
        "memory": info.memory,
    }


def _choice(op: str, device: torch.device) -> dict[str, Any]:
    problem = backends.operators()[op](device)
    verdicts = backends.explain(op, problem)
    return {
        "operator": op,
        "device": str(device),
        "problem": str(problem),
        "backend": next((verdict.backend for verdict in verdicts if verdict.chosen), None),
        "verdicts": [
            {"backend": verdict.backend, "chosen": verdict.chosen, "reason": verdict.reason}
            for verdict in verdicts
        ],
    }


def _print_tables(found: dict[str, Any]) -> None:
    from rich.console import Console

    # Reasons hold brackets, as in attn-flash[triton], and operators colons: neither is markup.
    console = Console(markup=False, emoji=False, highlight=False)
    for table in _tables(found):
        console.print(table)


def _tables(found: dict[str, Any]) -> Iterable[Any]:
    yield _table(
        "Packages",
        ("package", "version"),
        [(row["name"], row["version"] or f"broken: {row['error']}") for row in found["packages"]]
        + [(name, version) for name, version in found["versions"].items() if version],
    )
    yield _table(
        "Environment",
        ("variable", "value"),
        [(name, value or "not set") for name, value in found["environment"].items()]
        + [("measured tiles", found["tile_cache"])],
    )
    yield _table(
        "Devices",
        ("device", "type", "name", "arch", "SMs", "memory"),
        [
            (
                row["device"],
                row["type"],
                row["name"],
                row["arch"],
                str(row["num_sms"] or ""),
                f"{row['memory'] / 2**30:.0f} GiB" if row["memory"] else "",
            )
            for row in found["devices"]
        ],
    )
    yield _table(
        "Backends",
        ("backend", "operators"),
        [(name, ", ".join(ops)) for name, ops in sorted(found["backends"].items())],
    )
    yield _table(
        "Which backend runs the typical problem of each operator",
        ("operator", "device", "backend", "why"),
        [
            (row["operator"], row["device"], verdict["backend"], _why(row, verdict))
            for row in found["operators"]
            for verdict in row["verdicts"]
        ],
    )


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Any:
    from rich.table import Column, Table

    table = Table(
        *(Column(name, overflow="fold") for name in columns), title=title, title_justify="left"
    )
    for row in rows:
        table.add_row(*row)
    return table


def _why(row: dict[str, Any], verdict: dict[str, Any]) -> str:
    if verdict["chosen"]:
        return "runs"
    if verdict["reason"] is not None:
        return f"cannot: {verdict['reason']}"
    return f"could, but {row['backend'] or environment.BACKEND} goes before it"


if __name__ == "__main__":
    main()
