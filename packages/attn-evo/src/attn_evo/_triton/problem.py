"""What the launchers of this package derive from a problem before they start a kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from attn_core.device import device_info
from attn_core.tiling import ceil_div, padded_head_dim
from attn_core.tuning import TileConfig

# Integers that change from call to call: compiled for any value.
NOT_SPECIALIZED = [
    "L",
    "N",
    "C",
    "H",
    "size_1",
    "size_2",
    "num_columns",
    "num_heads",
    "num_tiles",
    "num_pieces",
    "num_chunks",
    "tiles_per_chunk",
    "num_programs",
    "num_gate_programs",
]
MOST_CHUNKS = 256  # of a sequence: every program adds up the sums of those before its own
SMALL_SHARED_MEMORY = ("sm_86", "sm_89", "sm_120", "sm_121")  # 99 KB a program, others 163 or more
_BIAS_ROWS = 16
_CHUNK_MULTIPLE = 64  # tokens: a tile of any launch ends where the chunk does


class Chunks(NamedTuple):
    """How a sequence is cut: tiles of some tokens, chunks of some tiles; a program owns a chunk."""

    num_tiles: int
    num_chunks: int
    tiles_per_chunk: int

    @property
    def per_sequence(self) -> tuple[int, int]:
        """Number of chunks and tiles of each, as the kernels take them."""
        return self.num_chunks, self.tiles_per_chunk


def chunks(
    device: torch.device,
    length: int,
    num_sequences: int,
    block: int,
    chunk: int,
    programs_per_sm: int = 2,
    multiple: int = 1,
) -> Chunks:
    """Cut sequences into tiles of `block` and chunks of `chunk`, shorter ones while SMs idle.

    Chunks hold a multiple of `multiple` tiles.
    """
    num_tiles = ceil_div(length, block)
    wanted = programs_per_sm * max(1, device_info(device).num_sms)
    tiles_per_chunk = max(
        min(ceil_div(num_tiles * num_sequences, wanted), chunk // block),
        ceil_div(num_tiles, MOST_CHUNKS),
    )
    tiles_per_chunk = ceil_div(tiles_per_chunk, multiple) * multiple
    return Chunks(num_tiles, ceil_div(num_tiles, tiles_per_chunk), tiles_per_chunk)


class Call(NamedTuple):
    """One call of attention, as all its kernels take it."""

    v: tuple[Any, ...]  # each of the three with its strides
    mask: tuple[Any, ...]
    sums: tuple[Any, ...]
    length: torch.Tensor
    sizes: tuple[int, ...]
    num_programs: int
    flags: dict[str, Any]
    numerics: dict[str, Any]
    blocks: dict[str, int]
    config: TileConfig

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What most kernels begin with."""
        return *self.v, *self.mask, *self.sums, self.length

    @property
    def strides(self) -> tuple[int, ...]:
        """All strides of the inputs."""
        return *self.v[1:], *self.mask[1:], *self.sums[1:]

    @property
    def numerics_of_one_weight(self) -> dict[str, Any]:
        """`numerics` of kernels with one weight, which stays in shared memory in float32 too."""
        stays = self.numerics["IS_NVIDIA"] and self.v[0].element_size() == 4
        return {**self.numerics, "WEIGHTS_STAY": stays or self.numerics["WEIGHTS_STAY"]}

    @property
    def num_heads(self) -> int:
        """Number of sequences: of all heads of the batch."""
        return self.sizes[2]

    @property
    def undivided(self) -> Call:
        """The same call, where one chunk is a whole sequence."""
        L, H, num_heads, num_tiles, *_ = self.sizes
        sizes = L, H, num_heads, num_tiles, 1, num_tiles
        return self._replace(sizes=sizes, num_programs=num_heads)

    @property
    def in_parts(self) -> Call:
        """The same call, where a float32 is multiplied as the sum of three bfloat16."""
        parts = {"PRECISION": "bf16x6", "WEIGHTS_STAY": True}
        return self._replace(numerics={**self.numerics, **parts})

    def sizes_in(self, block_m: int) -> tuple[int, ...]:
        """`sizes` with the same chunks cut into tiles of `block_m`, of which they are multiples."""
        *sizes, num_chunks, tiles_per_chunk = self.sizes
        L, H, num_heads, _ = sizes
        tiles_per_chunk = tiles_per_chunk * self.blocks["BLOCK_M"] // block_m
        return L, H, num_heads, ceil_div(L, block_m), num_chunks, tiles_per_chunk


class Scratch(NamedTuple):
    """What the launches of one pass hand on, in the order in which kernels take it.

    Rows of BLOCK_D numbers, of v's dtype in the first two and of float32 in the others.
    """

    matrices: torch.Tensor  # [4, BLOCK_D]
    biases: torch.Tensor  # [4, _BIAS_ROWS]
    vectors: torch.Tensor  # [6]
    tile_sums: torch.Tensor  # [4, B * H, tiles]
    chunk_sums: torch.Tensor  # [4, B * H, chunks]
    contexts: torch.Tensor  # [B * H, tiles]


def call(
    v: torch.Tensor,
    mask: torch.Tensor | None,
    sums: torch.Tensor | None,
    length: torch.Tensor | None,
    config: TileConfig,
    programs_per_sm: int = 2,
) -> Call:
    """Describe a call to the kernels; v stands in for tensors that are not there."""
    B, H, L, D = v.shape
    multiple = ceil_div(_CHUNK_MULTIPLE, config.block_m)
    cut = chunks(
        v.device, L, B * H, config.block_m, config.block_n, programs_per_sm, multiple=multiple
    )
    return Call(
        v=(v, *v.stride()),
        mask=(v, 0, 0) if mask is None else (mask.view(torch.uint8), *mask.stride()),
        sums=(v, 0, 0, 0, 0) if sums is None else (sums, *sums.stride()),
        length=v if length is None else length,
        sizes=(L, H, B * H, *cut),
        num_programs=B * H * cut.num_chunks,
        flags={"HEAD_DIM": D, "HAS_MASK": mask is not None, "HAS_STATE": sums is not None},
        numerics={
            "PRECISION": dot_precision(v),
            "IS_NVIDIA": is_nvidia(v),
            "WEIGHTS_STAY": weights_stay(v),
        },
        blocks={"BLOCK_M": config.block_m, "BLOCK_D": padded_head_dim(D)},
        config=config,
    )


def scratch(call: Call) -> Scratch:
    """Allocate the scratch memory of a pass: two pieces, for each takes the host its time."""
    v = call.v[0]
    _, _, num_heads, num_tiles, num_chunks, _ = call.sizes
    block_d = call.blocks["BLOCK_D"]
    num_weights = 4 * block_d, 4 * _BIAS_ROWS
    num_sums = 6, 4 * num_heads * num_tiles, 4 * num_heads * num_chunks, num_heads * num_tiles
    weights = v.new_empty((sum(num_weights), block_d))
    sums = v.new_empty((sum(num_sums), block_d), dtype=torch.float32)
    return Scratch(*weights.split(num_weights), *sums.split(num_sums))


def is_nvidia(tensor: torch.Tensor) -> bool:
    """Whether kernels may hold instructions of NVIDIA's."""
    return device_info(tensor.device).type == "cuda"


def dot_precision(tensor: torch.Tensor) -> str:
    """How float32 products are computed: to the last bits, on tensor cores where they can."""
    return "tf32x3" if is_nvidia(tensor) else "ieee"


def weights_stay(v: torch.Tensor) -> bool:
    """Whether all four weights fit into shared memory; else each tile loads them again."""
    if v.element_size() != 2 or not is_nvidia(v):
        return False
    return padded_head_dim(v.shape[-1]) < 128 or (
        device_info(v.device).arch not in SMALL_SHARED_MEMORY
    )
