"""Tile sizes: rows shipped with a package, and rows measured on the user's own device.

A package ships a `Table` for each kernel and asks `pick` at every launch. Rows measured by `tune`
go to the user's disk and win over the shipped ones. A call measures nothing unless ``ATTN_TUNE``
says so (see `attn_core.environment`).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from attn_core import environment, replay
from attn_core.device import DeviceInfo, device_info, triton_version

Key = tuple[int | str, ...]
_FAMILIES = {"cuda": "sm", "hip": "gfx"}


class TileConfig(NamedTuple):
    """How one kernel is tiled and launched.

    Attributes
    ----------
    block_m, block_n : int
        Rows (queries) and columns (keys) of one tile.
    num_warps, num_stages : int
        Warps of one program and stages of its software pipeline.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2


Measure = Callable[[TileConfig], float]


@dataclass(frozen=True, eq=False)
class Table:
    """What a package knows about the best tiles of one kernel.

    Attributes
    ----------
    name : str
        Unique among the family, such as ``"attn_flash.forward"``.
    rows : mapping
        ``(scope, *key)`` to the config that won there. The scope is an architecture (``"sm_90"``,
        ``"gfx942"``), a family (``"sm"``, ``"gfx"``) or ``"*"``. The key is the kernel's own: a few
        numbers and words that change which config is best, such as ``(head_dim, causal)``.
    default : TileConfig
        Runs every problem on every device, for want of a row.
    candidates : sequence of TileConfig
        What `tune` measures.
    sources : sequence of str
        Names of the modules that hold the kernel. Rows measured before these changed are ignored.
    """

    name: str
    rows: Mapping[tuple[int | str, ...], TileConfig]
    default: TileConfig
    candidates: Sequence[TileConfig] = ()
    sources: Sequence[str] = ()


_picked: dict[tuple[Table, torch.device, Key], TileConfig] = {}


def pick(
    table: Table,
    device: torch.device,
    key: Key,
    measure: Measure | None = None,
    mode: str | None = None,
) -> TileConfig:
    """Choose the tiles of one launch; after the first call with a problem this is one dict lookup.

    Parameters
    ----------
    table : Table
        The kernel's table.
    device : torch.device
        Where the tensors are.
    key : tuple of int or str
        The problem, as the rows of the table spell it.
    measure : callable, optional
        Runs the kernel with a config and returns milliseconds. Used only where ``ATTN_TUNE`` asks
        for tuning.
    mode : str, optional
        One of `attn_core.environment.TUNE_MODES`, in place of what ``ATTN_TUNE`` says.

    Returns
    -------
    TileConfig
        The first there is of: the row measured on this device, the shipped row of its
        architecture, of its family, of ``"*"``, the default.

    Raises
    ------
    ValueError
        ``ATTN_TUNE`` has an unknown value.

    Examples
    --------
    >>> import torch
    >>> from attn_core.tuning import Table, TileConfig, pick
    >>> table = Table("docs.example", {("*", 64): TileConfig(128, 64)}, TileConfig(64, 64))
    >>> pick(table, torch.device("cpu"), (64,))
    TileConfig(block_m=128, block_n=64, num_warps=4, num_stages=2)
    """
    config = _picked.get((table, device, key))
    return _choose(table, device, key, measure, mode) if config is None else config


def tune(
    table: Table,
    device: torch.device,
    key: Key,
    measure: Measure,
    candidates: Sequence[TileConfig] | None = None,
) -> TileConfig:
    """Measure the candidates and remember the fastest, in this process and on disk.

    Parameters
    ----------
    table, device, key
        As in `pick`.
    measure : callable
        Runs the kernel with a config and returns milliseconds. A config for which it raises, or
        returns no finite number, is out of the race.
    candidates : sequence of TileConfig, default ``table.candidates``
        What to measure.

    Returns
    -------
    TileConfig
        The fastest; the earlier one of a tie.

    Raises
    ------
    ValueError
        There are no candidates.
    RuntimeError
        No candidate runs.

    Examples
    --------
    >>> import os, tempfile, torch
    >>> from attn_core.tuning import Table, TileConfig, tune
    >>> os.environ["ATTN_CACHE_DIR"] = tempfile.mkdtemp()
    >>> small, large = TileConfig(16, 16), TileConfig(128, 64)
    >>> table = Table("docs.example", {}, small, candidates=(small, large))
    >>> tune(table, torch.device("cpu"), (64,), measure=lambda config: 100 / config.block_m)
    TileConfig(block_m=128, block_n=64, num_warps=4, num_stages=2)
    """
    candidates = table.candidates if candidates is None else candidates
    if not candidates:
        raise ValueError(f"candidates must not be empty: table {table.name!r} has none of its own")
    times = [_milliseconds(measure, config) for config in candidates]
    fastest = min(times)
    if math.isinf(fastest):
        raise RuntimeError(f"none of {len(times)} candidates of {table.name!r} runs {key}")
    config = candidates[times.index(fastest)]
    _store(table, device_info(device), key, config)
    _picked[table, device, key] = config
    replay.forget()
    return config


def time_launch(launch: Callable[[TileConfig], object], config: TileConfig) -> float:
    """Return the milliseconds of one launch of a Triton kernel on its GPU.

    Parameters
    ----------
    launch : callable
        Starts the kernel with the tiles it is given. ``functools.partial(time_launch, launch)`` is
        what `pick` and `tune` measure with.
    config : TileConfig
        The tiles.

    Returns
    -------
    float
        The mean of about 20 ms of launches.
    """
    from triton.testing import do_bench

    return float(do_bench(lambda: launch(config), warmup=5, rep=20))


def measured(table: Table, device: torch.device) -> dict[Key, TileConfig]:
    """Return the rows that were measured on `device`, in this process or another one.

    Parameters
    ----------
    table : Table
        The kernel's table.
    device : torch.device
        Where they were measured.

    Returns
    -------
    dict
        Configs by key; empty where nothing was measured.
    """
    return _read(cache_file(table, device))


def forget() -> None:
    """Drop what this process has picked; rows on disk stay and are read again."""
    _picked.clear()
    replay.forget()


def cache_file(table: Table, device: torch.device) -> Path:
    """Return the file of the rows measured on `device`, which need not exist."""
    return _cache_file(table, device_info(device))


def _choose(
    table: Table, device: torch.device, key: Key, measure: Measure | None, mode: str | None
) -> TileConfig:
    mode = environment.tune_mode() if mode is None else mode
    info = device_info(device)
    row = _read(_cache_file(table, info)).get(key) or _shipped(table, info, key)
    wants_tuning = bool(table.candidates) and (mode == "force" or (mode == "on" and row is None))
    if wants_tuning and measure is not None:
        return tune(table, device, key, measure)
    config = row or table.default
    if not wants_tuning:  # else a later call may still bring the means to measure
        _picked[table, device, key] = config
    return config


def _shipped(table: Table, info: DeviceInfo, key: Key) -> TileConfig | None:
    for scope in (info.arch, _FAMILIES.get(info.type, ""), "*"):
        row = table.rows.get((scope, *key))
        if row is not None:
            return row
    return None


def _milliseconds(measure: Measure, config: TileConfig) -> float:
    try:
        time = measure(config)
    except Exception:  # too much shared memory, too few registers, a compiler that gives up
        return math.inf
    return time if math.isfinite(time) else math.inf


def _cache_file(table: Table, info: DeviceInfo) -> Path:
    version = ".".join(map(str, triton_version() or ("none",)))
    identity = hashlib.sha256(f"{table.name}\0{info.name}\0{version}".encode())
    for module in table.sources:
        identity.update(_source(module))
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", f"{table.name}-{info.name}-triton-{version}")
    return environment.cache_dir() / f"{readable}-{identity.hexdigest()[:16]}.json"


def _source(module: str) -> bytes:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"sources must name modules that have a file, got {module!r}")
    return Path(spec.origin).read_bytes()


def _read(path: Path) -> dict[Key, TileConfig]:
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"the tile cache {path} is ignored: {error}", stacklevel=2)
        return {}


def _parse(text: str) -> dict[Key, TileConfig]:
    rows = {}
    for key, row in json.loads(text).items():
        config = TileConfig(**row)
        if not all(type(value) is int and value > 0 for value in config):
            raise ValueError(f"row {key} must hold positive integers, got {row}")
        rows[tuple(json.loads(key))] = config
    return rows


def _store(table: Table, info: DeviceInfo, key: Key, config: TileConfig) -> None:
    path = _cache_file(table, info)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            _write(path, {**_read(path), key: config})
    except OSError as error:
        warnings.warn(f"the tiles measured for {table.name} are not kept: {error}", stacklevel=3)


def _write(path: Path, rows: Mapping[Key, TileConfig]) -> None:
    text = json.dumps({json.dumps(key): row._asdict() for key, row in rows.items()}, indent=1)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of one cache file against other processes; it ends with its holder."""
    with path.open("a+b") as file:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
