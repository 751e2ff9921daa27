"""Tiles of the kernels: the largest that stay in registers, and how a problem finds its row.

A row's key is (BLOCK_D, bytes of an element, "causal", "full" or "padded"): padded heads, whose
dimension is no power of two, take more registers. block_m is the tokens of a tile in all launches
of a pass, block_n those of the largest chunk; warps and stages are those of the pass's largest
kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from attn_core.device import triton_version
from attn_core.tiling import padded_head_dim
from attn_core.tuning import Table, TileConfig, pick, time_launch
from attn_evo import environment
from attn_evo._triton import problem
from attn_evo._triton.problem import SMALL_SHARED_MEMORY

Launch = Callable[[TileConfig], object]

# With Triton after 3.6 some kernels take more registers: other tiles keep them from spilling.
_IS_LATER = (triton_version() or (3, 6)) > (3, 6)


def _rows(
    block_d: int, size: int, whole: TileConfig, padded: TileConfig, scope: str = "*"
) -> dict[tuple[int | str, ...], TileConfig]:
    """Rows of all problems with heads of BLOCK_D and elements of `size` bytes."""
    shapes = {"causal": whole, "full": whole, "padded": padded}
    return {(scope, block_d, size, shape): config for shape, config in shapes.items()}


def _small(config: TileConfig) -> dict[tuple[int | str, ...], TileConfig]:
    """Rows of wide heads on GPUs with 99 KB of shared memory."""
    return {
        key: row
        for arch in SMALL_SHARED_MEMORY
        for key, row in _rows(128, 2, config, config, arch).items()
    }


def _if_later(
    rows: dict[tuple[int | str, ...], TileConfig],
) -> dict[tuple[int | str, ...], TileConfig]:
    return rows if _IS_LATER else {}


_CANDIDATES = [
    TileConfig(block_m, 2048, num_warps, num_stages)
    for block_m, num_warps in ((64, 4), (32, 4), (32, 8), (16, 4), (16, 8))
    for num_stages in (1, 2, 3)
]
FORWARD = Table(
    "attn_evo.forward",
    rows={
        **_rows(64, 2, TileConfig(64, 2048, 4, 2), TileConfig(16, 2048, 4, 2)),
        **_rows(64, 2, TileConfig(16, 2048, 4, 2), TileConfig(16, 2048, 4, 2), "sm_80"),
        **_if_later(_rows(64, 2, TileConfig(64, 2048, 4, 1), TileConfig(16, 2048, 4, 2), "sm_90")),
        **_rows(128, 2, TileConfig(32, 2048, 8, 2), TileConfig(32, 2048, 8, 2)),
        **_rows(128, 2, TileConfig(32, 2048, 8, 3), TileConfig(32, 2048, 8, 2), "sm_90"),
        **_rows(128, 2, TileConfig(16, 2048, 4, 1), TileConfig(16, 2048, 4, 1), "gfx"),
        **_small(TileConfig(16, 2048, 8, 1)),
        **_rows(16, 4, TileConfig(32, 2048, 4, 1), TileConfig(32, 2048, 4, 1)),
        **_rows(32, 4, TileConfig(32, 2048, 4, 1), TileConfig(32, 2048, 4, 1)),
        **_rows(64, 4, TileConfig(16, 2048, 4, 1), TileConfig(16, 2048, 8, 1)),
        **_rows(64, 4, TileConfig(16, 2048, 4, 1), TileConfig(16, 2048, 4, 1), "gfx"),
    },
    default=TileConfig(64, 2048, 4, 2),
    candidates=_CANDIDATES,
    sources=("attn_evo._triton.forward", "attn_evo._triton.tiles"),
)
BACKWARD_PASSES = (
    "ratio", "norm", "gate", "products", "stat", "total", "context", "weights",
)  # fmt: skip
BACKWARD = Table(
    "attn_evo.backward",
    rows={
        **_rows(16, 2, TileConfig(64, 2048, 4, 1), TileConfig(64, 2048, 4, 1), "gfx"),
        **_rows(32, 2, TileConfig(64, 2048, 4, 2), TileConfig(64, 2048, 4, 2)),
        **_rows(32, 2, TileConfig(64, 2048, 4, 1), TileConfig(64, 2048, 4, 1), "gfx"),
        **_rows(64, 2, TileConfig(64, 2048, 4, 3), TileConfig(32, 2048, 4, 3)),
        **_rows(64, 2, TileConfig(64, 2048, 4, 1), TileConfig(32, 2048, 4, 3), "sm_100"),
        **_rows(64, 2, TileConfig(64, 2048, 4, 1), TileConfig(32, 2048, 4, 1), "gfx"),
        **_rows(128, 2, TileConfig(32, 2048, 8, 1), TileConfig(32, 2048, 8, 2)),
        **_rows(128, 2, TileConfig(16, 2048, 4, 1), TileConfig(16, 2048, 4, 1), "gfx"),
        **_small(TileConfig(16, 2048, 8, 1)),
        **_rows(16, 4, TileConfig(16, 2048, 4, 1), TileConfig(16, 2048, 4, 1)),
        **_rows(32, 4, TileConfig(16, 2048, 4, 1), TileConfig(16, 2048, 4, 1)),
        **_rows(64, 4, TileConfig(16, 2048, 4, 2), TileConfig(16, 2048, 8, 2)),
        **_if_later(_rows(64, 4, TileConfig(16, 2048, 4, 2), TileConfig(16, 2048, 8, 3), "sm_90")),
        **_rows(64, 4, TileConfig(16, 2048, 4, 1), TileConfig(16, 2048, 4, 1), "gfx"),
    },
    default=TileConfig(64, 2048, 4, 3),
    candidates=_CANDIDATES,
    sources=(
        *(f"attn_evo._triton.backward_{name}" for name in BACKWARD_PASSES),
        "attn_evo._triton.tiles",
    ),
)
# Of the launches before those that Hopper has kernels of its own for.
HOPPER_FORWARD = {64: TileConfig(64, 1344, 4, 2), 128: TileConfig(64, 2752, 4, 2)}
HOPPER_FORWARD_FULL = TileConfig(64, 2048, 4, 2)
HOPPER_FORWARD_FLOAT32 = TileConfig(64, 2048, 4, 1)
# Of float32 values that are multiplied in parts.
FORWARD_IN_PARTS = TileConfig(32, 2048, 4, 1)
HOPPER_BACKWARD = {64: TileConfig(64, 2048, 4, 3), 128: TileConfig(64, 2048, 8, 3)}
HOPPER_BACKWARD_FLOAT32 = TileConfig(64, 2048, 4, 1)
# Of kernels whose block_m is not their pass's, or that have no tiles, only the rest counts.
SUMS = TileConfig(1, 1, 4, 1)
# Of launches of the backward pass whose tiles are smaller, whose pipeline is longer or at most so
# long, or that need more warps for wide heads in float32 than its own.
BACKWARD_GATE_BLOCK_M = 32
BACKWARD_STAGES = {"products": 3, "context": 3}
BACKWARD_MOST_STAGES = {"norm_full": 2}
# What single launches of either pass take otherwise on Hopper, where each was measured alone.
HOPPER: dict[tuple[str, int, int], dict[str, int]] = {
    ("gated", 128, 2): {"num_warps": 4, "num_stages": 3},
    ("ratio", 128, 2): {"num_stages": 3},
    ("gate", 128, 2): {"num_stages": 3},
    ("products", 128, 2): {"block_m": 32},
    ("final_query", 128, 2): {"block_m": 32, "num_stages": 3},
    ("stat", 128, 2): {"num_stages": 3},
    ("context", 64, 2): {"num_stages": 2},
    ("context", 128, 2): {"block_m": 64, "num_warps": 4, "num_stages": 3},
    ("products", 64, 4): {"block_m": 32, "num_stages": 2},
    ("context", 64, 4): {"block_m": 32, "num_stages": 2},
}
if _IS_LATER:
    HOPPER |= {
        ("norm", 64, 2): {"num_stages": 1},
        ("norm_full", 64, 2): {"num_stages": 1},
        ("ratio", 64, 4): {"num_stages": 1},
    }
PREFIX_SUM = TileConfig(32, 64, 4, 2)
PREFIX_SUM_COLUMNS = TileConfig(256, 64, 8 if _IS_LATER else 4, 1)
HOPPER_PREFIX_SUM_COLUMNS = TileConfig(512, 64, 4, 1)


def forward_tiles(
    v: torch.Tensor, causal: bool, hints: Sequence[int], launch: Launch
) -> TileConfig:
    """Choose the tiles of the forward pass; `hints` are (block_m, num_warps, num_stages), or none.

    A hint of 0 leaves the choice here. `launch` runs the pass, for a trial.
    """
    if multiplies_parts(v):
        config = FORWARD_IN_PARTS
    else:
        config = _pick(FORWARD, v, causal, None if hints else launch)
    if not hints:
        return config
    block_m, num_warps, num_stages = hints
    return TileConfig(
        block_m or config.block_m,
        config.block_n,
        num_warps or config.num_warps,
        num_stages or config.num_stages,
    )


def multiplies_parts(v: torch.Tensor) -> bool:
    """Whether the forward pass multiplies float32 values in three parts of bfloat16.

    Six products of bfloat16 take tensor cores as long as three of TF32, and their weights less
    shared memory: all four stay there.
    """
    return (
        v.dtype == torch.float32
        and v.shape[-1] == 64
        and problem.device_info(v.device).arch == "sm_90"
        and triton_version() >= (3, 6)
    )


def backward_tiles(v: torch.Tensor, causal: bool, launch: Launch) -> TileConfig:
    """Choose the tiles of the backward pass, which `launch` runs for a trial."""
    return _pick(BACKWARD, v, causal, launch)


def gated_kernel(v: torch.Tensor, config: TileConfig) -> TileConfig:
    """Tiles of the launch that gates v, which is small enough for a longer pipeline."""
    return _on_hopper("gated", v, config._replace(num_stages=config.num_stages + 1))


def backward_kernel(name: str, v: torch.Tensor, config: TileConfig) -> TileConfig:
    """Tiles of one launch of the backward pass, whose tiles are `config`."""
    most_stages = BACKWARD_MOST_STAGES.get(name, config.num_stages)
    config = config._replace(
        block_m=min(config.block_m, BACKWARD_GATE_BLOCK_M) if name == "gate" else config.block_m,
        num_stages=BACKWARD_STAGES.get(name, min(most_stages, config.num_stages)),
    )
    return _on_hopper(name, v, config)


def hopper_kernel(v: torch.Tensor, config: TileConfig) -> TileConfig:
    """Tiles of a kernel written for Hopper: a warpgroup for 64 columns."""
    return config._replace(num_warps=v.shape[-1] // 16, num_stages=1)


def _on_hopper(name: str, v: torch.Tensor, config: TileConfig) -> TileConfig:
    if problem.device_info(v.device).arch != "sm_90":
        return config
    return config._replace(**HOPPER.get((name, v.shape[-1], v.element_size()), {}))


def _pick(table: Table, v: torch.Tensor, causal: bool, launch: Launch | None) -> TileConfig:
    head_dim, block_d = v.shape[-1], padded_head_dim(v.shape[-1])
    shape = "causal" if causal else "full"
    key = (block_d, v.element_size(), shape if head_dim == block_d else "padded")
    measure = None if launch is None else functools.partial(time_launch, launch)
    return pick(table, v.device, key, measure, environment.tune_mode())
