"""Tiles of the attention kernel, and how its work is cut into programs.

A row's key is (width, bytes of an element of the cache, word): the width is the larger of the
padded head dimensions, or LATENT. Words: a sequence has "few" rows up to 16 (queries times heads
that share a key head, so decoding), "some" up to 64, else "many". Where the work is not shared,
"few-whole" is for programs that have a sequence each, "few-parts" for those that have a part of
one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from attn_core import tiling
from attn_core.device import device_info
from attn_core.tiling import padded_head_dim
from attn_core.tuning import Table, TileConfig, pick
from attn_paged._triton import problem
from attn_paged.options import AttentionOptions

FEW, SOME = 16, 64  # rows
LATENT = 576  # width of keys of more than 512 entries that hold their values
_ANY = 2**30  # more queries than any sequence has
_MAX_SPLITS = 256
_SHORT_BYTES = 1 << 20  # of keys for one program; with fewer, counting the work costs too much
_ALONE_BYTES = 1 << 19  # of keys for a program that has a processor and a sequence to itself
_INVARIANT_KEYS = 1024  # of a part that is the same in every batch
_SHARED_BYTES = 208 << 10  # of a processor, for the tiles of its programs
_KEY_TILE_BYTES = 1 << 15  # of keys and values that one stage of the pipeline holds
_BESIDE_PROGRAMS = 8  # for each processor, at most
_LEAST_KEYS = 1024  # of a part for one of them
_WORDS = ("few", "few-whole", "few-parts", "some", "many")


def _portable(width: int, size: int, word: str) -> TileConfig:
    """Tiles that fit 64 KB of shared memory."""
    block_n = min(64, max(16, _KEY_TILE_BYTES // (2 * width * size)))
    largest = 64 if width * size <= 256 else 32
    block_m = {"some": 32, "many": largest}.get(word, FEW)
    return TileConfig(block_m, block_n, 4, 2 if width * size <= 512 else 1)


def _decoding(scope: str, width: int, size: int, *configs: TileConfig) -> dict[Any, TileConfig]:
    """Rows of the three words that begin with "few"."""
    return {
        (scope, width, size, word): config for word, config in zip(_WORDS, configs, strict=False)
    }


ATTENTION = Table(
    "attn_paged.attention",
    rows={
        **{
            ("*", width, size, word): _portable(width, size, word)
            for width in (16, 32, 64, 128, 256, 512, LATENT, 1024)
            for size in (1, 2, 4)
            for word in _WORDS
        },
        **_decoding("sm", 64, 2, *[TileConfig(16, 64, 4, 3)] * 3),
        **_decoding("sm", 128, 2, *[TileConfig(16, 64, 4, 3)] * 3),
        **_decoding("sm", 256, 2, *[TileConfig(16, 32, 4, 3)] * 3),
        **_decoding(
            *("sm_90", 64, 2),
            *(TileConfig(16, 64, 4, 4), TileConfig(16, 64, 4, 4), TileConfig(16, 64, 4, 4)),
        ),
        **_decoding(
            *("sm_90", 128, 2),
            *(TileConfig(16, 64, 4, 3), TileConfig(16, 32, 4, 4), TileConfig(16, 64, 4, 4)),
        ),
        **_decoding(
            *("sm_90", 128, 1),
            *(TileConfig(16, 64, 2, 3), TileConfig(16, 64, 2, 3), TileConfig(16, 64, 2, 3)),
        ),
        # With 64 rows, seen on an H200 with Triton 3.6, odd columns of pairs of values are wrong.
        **{("sm_90", width, 1, "many"): TileConfig(32, 64, 4, 2) for width in (32, 64)},
        **_decoding("sm_90", 256, 2, *[TileConfig(16, 32, 4, 4)] * 3),
        **_decoding("sm_90", 1024, 2, *[TileConfig(16, 32, 4, 3)] * 3),
        **_decoding("sm_90", LATENT, 2, *[TileConfig(16, 64, 4, 2)] * 3),
        ("sm_90", LATENT, 2, "some"): TileConfig(64, 64, 8, 2),
        ("sm_90", LATENT, 2, "many"): TileConfig(64, 64, 8, 2),
        ("sm_90", 64, 2, "some"): TileConfig(64, 64, 4, 3),
        ("sm_90", 64, 2, "many"): TileConfig(128, 64, 8, 3),
        ("sm_90", 128, 2, "some"): TileConfig(64, 64, 4, 3),
        ("sm_90", 128, 2, "many"): TileConfig(128, 64, 8, 3),
        ("sm_90", 256, 2, "some"): TileConfig(64, 32, 4, 2),
        ("sm_90", 256, 2, "many"): TileConfig(128, 64, 8, 2),
        ("sm_90", 1024, 2, "some"): TileConfig(64, 32, 8, 2),
        ("sm_90", 1024, 2, "many"): TileConfig(64, 32, 8, 2),
    },
    default=TileConfig(16, 16, 4, 1),
    candidates=[
        TileConfig(block_m, block_n, warps, stages)
        for block_m, warps in ((16, 4), (32, 4), (64, 4), (128, 8))
        for block_n in (16, 32, 64, 128)
        for stages in (1, 2, 3, 4)
    ],
    sources=tuple(f"attn_paged._triton.{name}" for name in ("attention", "keys", "quantised")),
)

# Tiles of a program that has a processor and a sequence to itself, where measured.
_ALONE = {("sm_90", 128, 2): TileConfig(16, 128, 8, 3)}


class Plan(NamedTuple):
    """How one launch cuts attention up, from static facts alone.

    Attributes
    ----------
    config : TileConfig
        Its tiles.
    block_q, tile_group : int
        Queries of a tile, and heads of a key head that a tile has.
    num_tiles, head_tiles : int
        Tiles of queries, at most, and for how many groups of heads each is taken up.
    num_splits : int
        Into how many parts the keys of a tile are cut; where the work is shared, among how many
        programs for each group of heads.
    is_shared : bool
        Whether programs share the work equally.
    chunk : int
        Tiles of keys of a part, 0 for equal parts.
    one_tile_each : bool
        Whether tile b is sequence b, and the last one what pads q.
    is_beside : bool
        Whether it takes what another launch leaves of the processors.
    least : int
        Tiles of keys of a part at least, so that short sequences have one part; 0 for any.
    least_m, most_m : int
        Sequences with fewer or more queries are another launch's.
    """

    config: TileConfig
    block_q: int
    tile_group: int
    num_tiles: int
    head_tiles: int
    num_splits: int = 1
    is_shared: bool = False
    chunk: int = 0
    one_tile_each: bool = False
    is_beside: bool = False
    least: int = 0
    least_m: int = 0
    most_m: int = _ANY

    @property
    def num_programs(self) -> int:
        """Programs of the launch."""
        tiles = 1 if self.is_shared else self.num_tiles
        return tiles * self.head_tiles * self.num_splits

    @property
    def slots(self) -> int:
        """Parts that are left to be merged: a sharing program may leave its first and its last."""
        if self.is_shared:
            return 2 * self.head_tiles * self.num_splits
        return self.num_programs if self.num_splits > 1 else 0


def plans(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    is_ragged: bool,
    are_long: bool,
    is_beside: bool,
    options: AttentionOptions,
) -> list[Plan]:
    """Cut a problem into launches: one, or one for short and one for long runs of queries.

    A batch with more queries than short runs can hold may still be mostly decoding, and tiles for
    long runs would waste most of their rows on that. What a launch does not take it passes over.
    `are_long` says that runs are, though their mean may not be, and `is_beside` that another launch
    takes most of each processor.
    """
    tokens, heads, _ = q.shape
    sequences, max_blocks = block_tables.shape
    _, block_size, heads_kv, _ = v_cache.shape
    keys = max_blocks * block_size
    group = heads // heads_kv
    short = max(1, FEW // group)
    if options.batch_invariant and is_ragged:
        runs = [(FEW, 0, short), (_ANY, short + 1, _ANY)]
    elif are_long:
        runs = [(_ANY, 0, _ANY)]
    elif is_ragged and sequences > 1 and tokens > sequences * short:
        runs = [(FEW, 0, short), (tokens * group // sequences, short + 1, _ANY)]
    else:
        runs = [(tiling.ceil_div(tokens, max(sequences, 1)) * group, 0, _ANY)]
    choice = Choice.of(q, k_cache, v_cache)
    key_bytes = k_cache.shape[3] * k_cache.element_size()
    if not problem.are_values_in_keys(k_cache, v_cache):
        key_bytes += v_cache.shape[3] * v_cache.element_size()
    result = []
    for rows, least_m, most_m in runs:
        config = choice.tiles("few" if rows <= FEW else "some" if rows <= SOME else "many")
        tile_group = min(group, config.block_m)
        block_q = config.block_m // tile_group if is_ragged else 1
        one_tile_each = is_ragged and most_m <= block_q
        num_tiles = tokens // block_q + sequences + 1 if is_ragged else tokens
        plan = Plan(
            config,
            block_q,
            tile_group,
            sequences + 1 if one_tile_each else num_tiles,
            heads_kv * tiling.ceil_div(group, tile_group),
            one_tile_each=one_tile_each,
            least_m=least_m,
            most_m=most_m,
        )
        if options.batch_invariant:
            plan = _invariant(plan, keys)
        elif is_beside and rows <= FEW:
            plan = _beside(plan, choice, is_ragged)
        else:
            plan = schedule(plan, _span(plan, keys, is_ragged, options), key_bytes, choice)
        result.append(plan)
    return [plan for plan in result if plan.num_tiles > 0]


class Choice(NamedTuple):
    """What the tiles of a problem depend on."""

    device: torch.device
    width: int
    size: int

    @staticmethod
    def of(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> Choice:
        """Describe a problem; a quantised cache is of size 1 unless q is float32."""
        size = q.element_size() if q.element_size() > 2 else k_cache.element_size()
        width = padded_head_dim(max(q.shape[2], v_cache.shape[3]))
        if width > LATENT and problem.are_values_in_keys(k_cache, v_cache):
            width = LATENT
        return Choice(q.device, width, size)

    def tiles(self, word: str) -> TileConfig:
        """Choose the tiles of a row's word."""
        return pick(ATTENTION, self.device, (self.width, self.size, word))

    def slots(self, config: TileConfig, key_bytes: int) -> int:
        """How many programs the device holds at once, going by shared memory and registers."""
        by_memory = _SHARED_BYTES // max(1, (config.num_stages - 1) * config.block_n * key_bytes)
        # Registers: tiles of many rows keep more of the output, dequantising takes as many.
        warps = 8 if config.block_m > 32 or self.size == 1 else 16
        per_sm = max(1, min(by_memory, warps // config.num_warps))
        return per_sm * max(1, device_info(self.device).num_sms)


def schedule(plan: Plan, span: int, key_bytes: int, choice: Choice) -> Plan:
    """Choose between equal parts of each tile and equal shares of all work.

    Equal parts start at once and suit a launch that is over soon. Shares keep every processor busy
    to the end whatever the lengths, for the price of counting the work first. `span` is how many
    keys a tile may see, `key_bytes` what one of them has in memory.
    """
    programs = max(1, plan.num_tiles * plan.head_tiles)
    parts = plan.config
    if plan.config.block_m <= FEW:
        alone = _ALONE.get((device_info(choice.device).arch, choice.width, choice.size))
        num_sms = device_info(choice.device).num_sms
        # Half of the processors read as fast as all of them, and there is nothing to merge.
        if (
            alone
            and 4 * num_sms <= 9 * programs <= 9 * num_sms
            and span * key_bytes <= _ALONE_BYTES
        ):
            return plan._replace(config=alone)
        whole = choice.tiles("few-whole")
        is_full = 4 * programs >= 3 * choice.slots(whole, key_bytes)
        if is_full and span * key_bytes <= _SHORT_BYTES:
            return plan._replace(config=whole)
        parts = choice.tiles("few-parts")
    slots = choice.slots(parts, key_bytes)
    key_tiles = max(1, tiling.ceil_div(span, parts.block_n))
    num_splits = max(1, min(slots // programs, key_tiles, _MAX_SPLITS))
    if span * key_bytes <= num_splits * _SHORT_BYTES:
        return plan._replace(config=parts, num_splits=num_splits)
    shares = choice.slots(plan.config, key_bytes) // plan.head_tiles
    return plan._replace(num_splits=max(1, shares), is_shared=True)


def _beside(plan: Plan, choice: Choice, is_ragged: bool) -> Plan:
    """Equal parts: their programs wait for room and take it wherever others end."""
    programs = max(1, plan.num_tiles * plan.head_tiles)
    wanted = _BESIDE_PROGRAMS * device_info(choice.device).num_sms
    least = 0 if is_ragged else max(1, _LEAST_KEYS // plan.config.block_n)
    return plan._replace(num_splits=max(1, wanted // programs), is_beside=True, least=least)


def _invariant(plan: Plan, keys: int) -> Plan:
    """Parts that depend on a sequence alone; long runs of queries have tiles enough without."""
    if plan.most_m == _ANY and plan.least_m > 0:
        return plan
    chunk = max(1, _INVARIANT_KEYS // plan.config.block_n)
    num_splits = tiling.ceil_div(max(keys, 1), chunk * plan.config.block_n)
    return plan._replace(chunk=chunk, num_splits=num_splits)


def _span(plan: Plan, keys: int, is_ragged: bool, options: AttentionOptions) -> int:
    """Keys that the queries of a tile may see, at most."""
    left, right = options.window
    if left < 0 or (right < 0 and is_ragged):
        return keys
    return min(keys, left + max(right, 0) + plan.block_q + plan.config.block_n)
