"""Which shader computes a problem on a device, and in which tiles."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from attn_vulkan.device import Device
from attn_vulkan.problem import Problem

_Value = TypeVar("_Value")

VARIABLE = "ATTN_VULKAN_VARIANT"
VARIANTS = ("matrix2", "matrix", "subgroup", "scalar")  # the fastest first, as measured on an H200
SHAPE = "16x16x16"

_FLOAT = 4
_HALF = 2
_SUBGROUP = 32
# More workgroups than this do not make a device busier; decoding splits its keys to get there.
_BUSY_WORKGROUPS = {"discrete": 1024, "integrated": 128, "virtual": 1024, "other": 128, "cpu": 8}
# Workgroups of a multiprocessor that registers allow where few rows are decoded, by their threads.
_BUSY_DECODERS = {64: 5, 128: 4}
_MIN_SPLIT_KEYS = 256
_MIN_SPLITS = 4  # fewer do not make up for their merging
_PACKED_ROWS = 64
_MAX_SPLITS = 1024  # as in combine.comp
_LEAST_WORKGROUP = 128  # what every device allows
_DIRECT_DIM = 32  # direct tiles serve multiples of it


class Tile(NamedTuple):
    """How a scalar or subgroup shader cuts a problem: see forward.comp.

    `threads` invocations own `rows` rows and walk over `columns` at a time; `column_threads` of
    them share a row. Up to a head dimension of `direct_dim` they read their rows through the cache
    and not from shared memory; a tile with one serves no others.
    """

    threads: int
    rows: int
    columns: int
    column_threads: int
    direct_dim: int = 0


class MatrixTile(NamedTuple):
    """How a matrix shader cuts one: `blocks` of 16 rows a subgroup, `columns` of the others.

    `is_shared` where all subgroups own the same rows, and each a share of the columns of V. For
    matrix2, `chunk` x 16 columns have scores at a time.
    """

    threads: int
    columns: int
    blocks: int = 1
    is_shared: bool = False
    chunk: int = 1

    @property
    def rows(self) -> int:
        """Rows of a workgroup."""
        subgroups = 1 if self.is_shared else self.threads // _SUBGROUP
        return subgroups * 16 * self.blocks


_RowTile = TypeVar("_RowTile", Tile, MatrixTile)

_FORWARD_TILES = (
    Tile(128, 64, 32, 8, direct_dim=64),
    Tile(256, 128, 32, 8, direct_dim=128),
    Tile(128, 64, 64, 8),
    Tile(128, 64, 32, 8),
    Tile(128, 64, 16, 4),
    Tile(64, 32, 32, 8),
    Tile(64, 16, 32, 8),
    Tile(64, 8, 32, 8),
    Tile(32, 8, 16, 4),
)
_BACKWARD_TILES = (
    Tile(128, 64, 32, 8, direct_dim=64),
    Tile(256, 64, 32, 8, direct_dim=128),
    Tile(128, 64, 16, 4),
    Tile(128, 32, 32, 8),
    Tile(64, 16, 32, 8),
    Tile(64, 8, 32, 8),
    Tile(32, 8, 16, 4),
    Tile(16, 8, 8, 2),
)
# By the largest padded head dimension they serve; the first that the rows fill is taken.
_MATRIX_TILES = {
    64: (MatrixTile(128, 64, 2), MatrixTile(128, 64)),
    128: (MatrixTile(256, 64), MatrixTile(128, 64), MatrixTile(64, 16)),
    256: (MatrixTile(128, 32),),
}
_MATRIX2_TILES = {
    64: (
        MatrixTile(256, 128, 2, chunk=2),
        MatrixTile(128, 64, 2, chunk=2),
        MatrixTile(128, 64, chunk=4),
    ),
    128: (MatrixTile(256, 64, 2), MatrixTile(128, 64, chunk=4), MatrixTile(64, 16)),
    256: (MatrixTile(128, 32, chunk=2),),
}
# Scales of which LOWEST times one is a number far below every score; others are multiplied first.
_SCALES = (1e-12, 1e6)
# For as many rows as one matrix has: little shared memory, so that many of them load at a time. The
# first whose subgroups have whole matrices of V is taken.
_DECODING_TILES = {
    64: (MatrixTile(64, 32, is_shared=True),),
    128: (MatrixTile(128, 16, is_shared=True), MatrixTile(64, 16, is_shared=True)),
    256: (MatrixTile(128, 16, is_shared=True),),
}
_BACKWARD_MATRIX_TILES = {
    64: (MatrixTile(256, 32), MatrixTile(128, 64)),
    128: (MatrixTile(128, 32), MatrixTile(256, 16)),
}


@dataclass(frozen=True)
class Plan:
    """A shader with its specialisation constants, and how it covers a problem.

    Attributes
    ----------
    shader : str
        Name of its SPIR-V.
    constants : tuple of int
        Specialisation constants 0, 1, 2...
    rows : int
        Rows that a workgroup owns.
    pack : int
        Query heads whose queries are rows of one workgroup.
    splits : int
        Parts of the keys that are attended to on their own and merged.
    """

    shader: str
    constants: tuple[int, ...]
    rows: int
    pack: int = 1
    splits: int = 1

    def groups(self, problem: Problem) -> tuple[int, int, int]:
        """Workgroups to dispatch."""
        tiles = -(-problem.len_q * self.pack // self.rows)
        return tiles * problem.heads // self.pack, 1, problem.batches * self.splits


def refusal(device: Device, dtype: str) -> str | None:
    """Say why `device` cannot compute in a dtype; None where it can."""
    features = device.features
    for name, words in (
        ("buffer_device_address", "pointers to buffers (bufferDeviceAddress)"),
        ("int64", "64-bit integers in shaders (shaderInt64)"),
        ("scalar_layout", "buffers without padding (scalarBlockLayout)"),
    ):
        if not getattr(features, name):
            return f"{device.name} lacks {words}"
    if dtype != "float32" and not features.storage16:
        return f"{device.name} lacks buffers of 16-bit numbers (storageBuffer16BitAccess)"
    return None


def available(device: Device, dtype: str) -> list[str]:
    """Variants that run on a device without quirks, the fastest first."""
    features = device.features
    has_matrices = f"{dtype} {SHAPE}" in device.matrix_shapes and device.subgroup_size == _SUBGROUP
    runs = {
        "matrix2": has_matrices and features.cooperative_matrix2,
        "matrix": has_matrices and features.cooperative_matrix,
        "subgroup": features.subgroup_shuffle
        and features.subgroup_size_control
        and device.subgroup_size >= 8,
        "scalar": True,
    }
    return [name for name in VARIANTS if runs[name]]


def choose(allowed: Sequence[str]) -> str:
    """Return the first of the `allowed` variants, or the one that ``ATTN_VULKAN_VARIANT`` names.

    Raises
    ------
    ValueError
        The variable names a variant that the device or the problem does not allow.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return allowed[0]
    if wanted not in allowed:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(allowed)}, got {wanted!r}")
    return wanted


def ranked(device: Device, problem: Problem, names: Sequence[str]) -> list[str]:
    """Return variants in the order of their rates forward, where that depends on the problem."""
    order = list(names)
    if {"matrix", "matrix2"} <= set(order) and not _suits_matrix2(device, problem):
        order.remove("matrix2")
        order.insert(order.index("matrix") + 1, "matrix2")
    return order


def _suits_matrix2(device: Device, problem: Problem) -> bool:
    """Whether this is what `matrix2` was measured to be faster at: dense rows, keys not split."""
    is_plain = not (problem.softcap or problem.has_bias or problem.has_slopes or problem.block_size)
    return (
        is_plain
        and problem.is_aligned
        and _matrix_dims(problem) in {(64, 64), (128, 128)}
        and problem.len_q >= max(tile.rows for tile in _MATRIX2_TILES[128])
        and _forward_matrix(device, problem, 1.0).splits == 1
    )


def fits_forward(name: str, problem: Problem) -> bool:
    """Whether the forward shader of a variant computes this problem at all."""
    dims = problem.head_dim, problem.head_dim_v
    if name == "matrix2":
        return max(dims) <= max(_MATRIX2_TILES) and not _packs(problem)
    return name != "matrix" or max(dims) <= max(_MATRIX_TILES)


def fits_backward(name: str, problem: Problem) -> bool:
    """Whether the backward shaders of a variant compute this problem at all."""
    if name == "matrix":
        return max(problem.head_dim, problem.head_dim_v) <= max(_BACKWARD_MATRIX_TILES)
    return name != "matrix2"


def forward(device: Device, variant: str, problem: Problem, scale: float) -> Plan:
    """Plan the forward pass."""
    if variant == "matrix":
        return _forward_matrix(device, problem, scale)
    if variant == "matrix2":
        return _forward_matrix2(problem, scale)
    return _forward_tiles(device, variant, problem)


def backward(device: Device, variant: str, problem: Problem) -> tuple[Plan, Plan]:
    """Plan the two shaders of the backward pass: dq, then dk and dv."""
    if variant == "matrix":
        return _backward_matrix(problem)
    length = max(problem.len_q, problem.len_k)
    tile = _first_fitting(_BACKWARD_TILES, device, length, problem, _backward_bytes)
    dim = padded(max(problem.head_dim, problem.head_dim_v), 4 * tile.column_threads)
    constants = _numbers(
        *(tile.threads, dim, tile.rows, tile.columns, tile.column_threads),
        *(*_flags(problem), tile.direct_dim > 0),
    )
    shader = _filled(variant, device, tile)
    dq, dkv = (
        Plan(f"backward_{name}_{shader}_{problem.dtype}", constants, tile.rows)
        for name in ("dq", "dkv")
    )
    return dq, dkv


def padded(size: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-size // multiple) * multiple


def _forward_matrix(device: Device, problem: Problem, scale: float) -> Plan:
    pack = problem.group if _packs(problem) else 1
    tile = _matrix_tile(problem, problem.len_q * pack)
    busy = device.processors * _BUSY_DECODERS[tile.threads] if tile.is_shared else 0
    splits = _splits(problem, tile.rows, pack, busy or _BUSY_WORKGROUPS[device.type])
    constants = _numbers(
        *(tile.threads, *_matrix_dims(problem), tile.columns, *_flags(problem)),
        *(problem.block_size > 0, splits > 1, pack),
        *(_scales_first(scale), tile.blocks, tile.is_shared),
    )
    return Plan(f"forward_matrix_{problem.dtype}", constants, tile.rows, pack, splits)


def _forward_matrix2(problem: Problem, scale: float) -> Plan:
    dims = _matrix_dims(problem)
    tile = _filled_by(problem.len_q, _of_dim(_MATRIX2_TILES, max(dims)))
    constants = _numbers(
        *(tile.threads, *dims, tile.columns, *_flags(problem)),
        *(problem.block_size > 0, _scales_first(scale), tile.blocks, tile.chunk),
    )
    return Plan(f"forward_matrix2_{problem.dtype}", constants, tile.rows)


def _forward_tiles(device: Device, variant: str, problem: Problem) -> Plan:
    pack = problem.group if _packs(problem) else 1
    tile = _first_fitting(_FORWARD_TILES, device, problem.len_q * pack, problem, _forward_bytes)
    splits = _splits(problem, tile.rows, pack, _BUSY_WORKGROUPS[device.type])
    dims = padded(problem.head_dim, 4), padded(problem.head_dim_v, 4 * tile.column_threads)
    constants = _numbers(
        *(tile.threads, *dims, tile.rows, tile.columns, tile.column_threads, *_flags(problem)),
        *(problem.block_size > 0, splits > 1, pack, tile.direct_dim > 0),
    )
    shader = f"forward_{_filled(variant, device, tile)}_{problem.dtype}"
    return Plan(shader, constants, tile.rows, pack, splits)


def _backward_matrix(problem: Problem) -> tuple[Plan, Plan]:
    dim = max(_matrix_dims(problem))
    dq, dkv = (
        Plan(
            f"backward_{name}_matrix_{problem.dtype}",
            _numbers(tile.threads, dim, tile.columns, *_flags(problem)),
            tile.rows,
        )
        for name, tile in zip(("dq", "dkv"), _of_dim(_BACKWARD_MATRIX_TILES, dim), strict=True)
    )
    return dq, dkv


def _flags(problem: Problem) -> tuple[bool, ...]:
    """What every shader of attention is told of a problem, in this order."""
    return problem.is_aligned, problem.softcap > 0, problem.has_bias, problem.has_slopes


def _scales_first(scale: float) -> bool:
    """Whether scores are multiplied before softmax, and not with its exponents."""
    low, high = _SCALES
    return not low < scale < high


def _matrix_dims(problem: Problem) -> tuple[int, int]:
    """Head dimensions that whole matrices cover."""
    return padded(problem.head_dim, 16), padded(problem.head_dim_v, 16)


def _packs(problem: Problem) -> bool:
    """Whether the query heads of a key head are so few rows that they share a workgroup."""
    return problem.group > 1 and problem.len_q * problem.group <= _PACKED_ROWS


def _matrix_tile(problem: Problem, rows: int) -> MatrixTile:
    dims = _matrix_dims(problem)
    for tile in _of_dim(_DECODING_TILES, max(dims)):
        if rows <= tile.rows and dims[1] % (tile.threads // 2) == 0:
            return tile
    return _filled_by(rows, _of_dim(_MATRIX_TILES, max(dims)))


def _splits(problem: Problem, rows: int, pack: int, busy: int) -> int:
    """Parts of the keys that make `busy` workgroups."""
    groups = -(-problem.len_q * pack // rows) * (problem.heads // pack) * problem.batches
    wanted = busy // max(groups, 1)
    if wanted < _MIN_SPLITS:
        return 1
    return max(1, min(wanted, problem.len_k // _MIN_SPLIT_KEYS, _MAX_SPLITS))


def _of_dim(tiles: Mapping[int, _Value], dim: int) -> _Value:
    return next(tile for limit, tile in tiles.items() if dim <= limit)


def _first_fitting(
    tiles: Sequence[Tile],
    device: Device,
    rows: int,
    problem: Problem,
    size: Callable[[Tile, Problem], int],
) -> Tile:
    """The largest tile that shared memory holds and that `rows` rows fill."""
    direct_dim = problem.head_dim if _caches_rows(device, problem) else None
    fitting = [
        tile
        for tile in tiles
        if size(tile, problem) <= device.shared_memory
        and tile.column_threads <= max(device.subgroup_size, 4)
        and tile.threads <= max(device.workgroup_size, _LEAST_WORKGROUP)
        and (not tile.direct_dim or (direct_dim and direct_dim <= tile.direct_dim))
    ]
    return _filled_by(rows, fitting)


def _caches_rows(device: Device, problem: Problem) -> bool:
    """Whether rows are the dense vectors that direct tiles read, on a device that caches them."""
    dims = {problem.head_dim, problem.head_dim_v}
    return (
        device.type != "cpu"
        and problem.dtype == "float32"
        and problem.is_aligned
        and len(dims) == 1
        and problem.head_dim % _DIRECT_DIM == 0
    )


def _filled_by(rows: int, tiles: Sequence[_RowTile]) -> _RowTile:
    """The first tile that so many rows fill, or else the last."""
    return next((tile for tile in tiles if tile.rows <= rows), tiles[-1])


def _filled(variant: str, device: Device, tile: Tile) -> str:
    """The variant, but scalar where a workgroup is not made of full subgroups."""
    return variant if tile.threads % device.subgroup_size == 0 else "scalar"


def _forward_bytes(tile: Tile, problem: Problem) -> int:
    dim, dim_v = padded(problem.head_dim, 4), padded(problem.head_dim_v, 4 * tile.column_threads)
    floats = (
        (0 if tile.direct_dim else tile.rows) * (dim + 4)
        + tile.columns * (max(dim, dim_v) + 4)
        + tile.rows * (tile.columns + 4)
        + tile.rows * tile.column_threads
    )
    return floats * _FLOAT


def _backward_bytes(tile: Tile, problem: Problem) -> int:
    dim = padded(max(problem.head_dim, problem.head_dim_v), 4 * tile.column_threads)
    kept = 0 if tile.direct_dim else 2 * tile.rows
    floats = (kept + tile.columns) * (dim + 4) + tile.rows * (tile.columns + 4)
    return floats * _FLOAT


def _numbers(*constants: int | bool) -> tuple[int, ...]:
    return tuple(map(int, constants))
