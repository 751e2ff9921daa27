"""A result on disk: one JSON file for each run, with where and on what it was measured."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.problems import Case
from benchmarks.providers.base import Provider, Subject

SCHEMA = 1
ROOT = Path(__file__).parent / "results"
OURS = ("attn-core", "attn-flash", "attn-paged", "attn-triangle", "attn-evo", "attn-vulkan")

OK = "ok"
MISSING = "missing"  # not installed, or not able to work here
UNSUPPORTED = "unsupported"  # says that it does not compute the case
FAILED = "failed"  # raised
WRONG = "wrong"  # gave another result than float64, and was not timed
NOT_REACHED = "not reached"  # the run ended before
STATUSES = (OK, MISSING, UNSUPPORTED, FAILED, WRONG, NOT_REACHED)


@dataclass
class Row:
    """One pass of one case by one provider.

    Times are medians in milliseconds. `ratio_to_best_peer` is the fastest peer's time over this
    one's: above 1 is faster than every peer. `timing` is "queued" where a call was launched before
    the device came to it, "eager" where the device may have waited for the host, "graph" where a
    CUDA graph was replayed, "timestamps" where a device told its own time. `error` is relative to
    float64. `peak_mib` is what a call allocates at most beyond its inputs. `floor_ms` is what the
    hardware would allow.
    """

    case: str
    pass_: str
    provider: str
    kind: str
    sizes: dict[str, Any]
    dtype: str
    series: str
    headline: bool
    source: str
    status: str = NOT_REACHED
    reason: str = ""
    ms: float | None = None
    spread: float | None = None
    samples: int = 0
    timing: str = "eager"
    tflop_s: float | None = None
    gb_s: float | None = None
    ratio_to_best_peer: float | None = None
    error: float | None = None
    peak_mib: float | None = None
    floor_ms: float | None = None

    @classmethod
    def of(cls, case: Case, pass_: str, provider: Provider) -> Row:
        """Return the row of a measurement that has not been made."""
        return cls(
            case.id,
            pass_,
            provider.name,
            provider.kind,
            dict(case.sizes),
            str(case.dtype).removeprefix("torch."),
            case.series,
            case.headline,
            case.source,
        )


@dataclass
class Result:
    """All rows of one run."""

    package: str
    x_axis: str  # the size that plots run over
    device: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    ceilings: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    commit: str = ""
    date: str = ""
    seconds: float = 0.0
    schema: int = SCHEMA


def new_result(subject: Subject, device: torch.device, settings: dict[str, Any]) -> Result:
    """Return a result without rows that says where and on what it is measured."""
    return Result(
        package=subject.package,
        x_axis=subject.x_axis,
        device=_describe(device),
        versions=_versions(device, subject.providers),
        settings=settings,
        commit=_commit(),
        date=time.strftime("%Y-%m-%d", time.gmtime()),
    )


def path_for(result: Result, root: Path = ROOT) -> Path:
    """Return a file of this device, package and day that does not exist yet."""
    folder = root / slug(result.device["name"])
    stem = f"{result.package}-{result.date}"
    names = (stem if n == 1 else f"{stem}-{n}" for n in range(1, 1000))
    return next(path for name in names if not (path := folder / f"{name}.json").exists())


def write(result: Result, path: Path) -> None:
    """Write a result, replacing an earlier state of it in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    text = json.dumps(dataclasses.asdict(result), indent=1)
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def read(path: Path) -> Result:
    """Read a result; ValueError if its schema is another one."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path} must have schema {SCHEMA}, got {data.get('schema')}")
    rows = [Row(**row) for row in data.pop("rows")]
    return Result(**data, rows=rows)


def summary(result: Result) -> str:
    """Return how many rows have which status, and which providers are not there at all."""
    counts = {status: [row for row in result.rows if row.status == status] for status in STATUSES}
    text = ", ".join(f"{len(rows)} {status}" for status, rows in counts.items() if rows)
    ran = {row.provider for row in result.rows if row.status != MISSING}
    absent = dict.fromkeys(row.provider for row in counts[MISSING] if row.provider not in ran)
    return f"{text} (missing: {', '.join(absent)})" if absent else text


def slug(name: str) -> str:
    """Return a name as a folder is called: ``"NVIDIA H200"`` gives ``"nvidia-h200"``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _describe(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"type": device.type, "name": device.type, "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": device.type,
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def _versions(device: torch.device, providers: Sequence[Provider]) -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    names = ("triton", *OURS, *sorted({p.distribution for p in providers if p.distribution}))
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        versions["cuda"] = torch.version.cuda or torch.version.hip or ""
        versions["cudnn"] = str(torch.backends.cudnn.version())
        query = ("--query-gpu=driver_version", "--format=csv,noheader")
        versions["driver"] = _first_line("nvidia-smi", *query)
    return versions


def _commit() -> str:
    return os.environ.get("ATTN_COMMIT") or _first_line("git", "rev-parse", "HEAD")


def _first_line(*command: str) -> str:
    """Return the first line a command prints, "" where it fails or does not exist."""
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True, cwd=ROOT.parent
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout.partition("\n")[0].strip()
