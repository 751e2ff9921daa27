"""The Triton kernels of attention in the interpreter, on tiles small enough for it."""

from __future__ import annotations

import dataclasses
from itertools import accumulate, pairwise
from typing import NamedTuple

import pytest
import torch

from attn_core import backends
from attn_core.device import DeviceInfo
from attn_core.testing import assert_within_budget, embedded, poison_new_allocations, random_tensor
from attn_core.testing.conformance import Suite
from attn_core.tuning import TileConfig
from attn_paged import reference
from attn_paged.conformance import CASES
from attn_paged.options import AttentionOptions

pytest.importorskip("triton")

import triton
import triton.language as tl

from attn_paged._triton import attention, cascade, configs, problem, queries, worklist

pytestmark = pytest.mark.interpret

FLOAT, HALF = torch.float32, torch.float16
# In float32 both errors are a few roundings, added up in another order: the largest is luck.
FACTORS = {FLOAT: 4.0, HALF: 2.0}
STALE = 2**30


def use(monkeypatch, *, tiles=(16, 16), splits=1, shares=0):
    """Fix what is otherwise chosen for the device: equal parts, or shares of the work."""

    def schedule(plan, *args):
        return plan._replace(num_splits=shares or splits, is_shared=shares > 0)

    monkeypatch.setattr(configs.Choice, "tiles", lambda *args: TileConfig(*tiles))
    monkeypatch.setattr(configs, "schedule", schedule)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    use(monkeypatch)


class TestConformance(Suite):
    cases = tuple(dataclasses.replace(case, dtypes=(HALF,)) for case in CASES)
    backends = ("triton",)
    # The other tests would run the same programs again.
    test_is_within_the_error_budget = None
    test_is_deterministic = None

    @pytest.fixture(autouse=True)
    def run_on_the_cpu(self, monkeypatch):
        use(monkeypatch, tiles=(64, 32))
        monkeypatch.setattr(backends, "resolve", lambda op, problem, requested: requested)


class Sizes(NamedTuple):
    """Keys and queries of each sequence; no lens_q means one query each, without cu_seqlens_q."""

    lens_k: tuple[int, ...] = (0, 1, 17, 50)
    lens_q: tuple[int, ...] = ()
    H: int = 4
    H_KV: int = 2
    D: int = 16
    D_v: int = 16
    block_size: int = 8

    def __str__(self):
        lens_q, lens_k = ("x".join(map(str, lens)) for lens in (self.lens_q, self.lens_k))
        heads = f"h{self.H}-kv{self.H_KV}-d{self.D}-dv{self.D_v}"
        return f"m{lens_q or 'decode'}-n{lens_k}-{heads}-block{self.block_size}"


DECODE = Sizes()
MIXED = Sizes((40, 0, 5, 33, 2, 6), (1, 0, 5, 9, 4, 1), H=2, H_KV=1)
BOTH = pytest.mark.parametrize("sizes", [DECODE, MIXED], ids=["decode", "mixed"])
SMALL = Sizes((40, 0, 33), (1, 0, 9), H=2, H_KV=1)
LAYOUTS = {"nhd": (0, 1, 2, 3), "hnd": (0, 2, 1, 3), "far": (3, 2, 1, 0)}


class Inputs(NamedTuple):
    """Arguments of the kernels, in the order of the operator."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    is_causal: torch.Tensor | None = None
    tree_mask: torch.Tensor | None = None

    def split(self, **options):
        """The tensors every call has, and the options."""
        return *self[:5], AttentionOptions(
            **dict(zip(self._fields[5:], self[5:], strict=True)), **options
        )


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def make(sizes, dtype=FLOAT, *, order=LAYOUTS["nhd"], std=1.0):
    """Caches that hold NaN wherever no key is, tables with stale entries, all of it in NaN."""
    counts = [-(-n // sizes.block_size) for n in sizes.lens_k]
    num_blocks = sum(counts) + 2
    tables = torch.full((len(counts), max(counts, default=0) + 1), STALE, dtype=torch.int32)
    ids = iter(torch.randperm(num_blocks).tolist())
    is_used = torch.zeros(num_blocks, sizes.block_size, dtype=torch.bool)
    for row, n in enumerate(sizes.lens_k):
        for i in range(counts[row]):
            block = tables[row, i] = next(ids)
            is_used[block, : n - i * sizes.block_size] = True

    def normal(name, *shape):
        return random_tensor(shape, seed=f"{sizes}-{name}", dtype=dtype, scale=std)

    caches = [
        normal(name, num_blocks, sizes.block_size, sizes.H_KV, dim)
        for name, dim in (("k", sizes.D), ("v", sizes.D_v))
    ]
    for cache in caches:
        cache[~is_used] = torch.nan
    bounds = embedded(int32([*accumulate(sizes.lens_q, initial=0)])) if sizes.lens_q else None
    tokens = sum(sizes.lens_q) if sizes.lens_q else len(sizes.lens_k)
    return Inputs(
        embedded(normal("q", tokens, sizes.H, sizes.D)),
        *(embedded(cache, order=order) for cache in caches),
        embedded(tables),
        embedded(int32(sizes.lens_k)),
        bounds,
    )


def attend(inputs, *, scale=0.3, **options):
    """Outputs of the kernels, which find nothing but NaN in fresh memory."""
    with poison_new_allocations():
        return attention.attention(*inputs.split(scale=scale, **options))


def plain(inputs, dtype, *, scale=0.3, **options):
    names = ("q", "k_cache", "v_cache", "alibi_slopes", "sinks")
    tensors = ((name, getattr(inputs, name)) for name in names)
    cast = {name: x if x is None else x.to(dtype) for name, x in tensors}
    return reference.attention(*inputs._replace(**cast).split(scale=scale, **options))


def check(inputs, **options):
    out, lse = attend(inputs, **options)
    dtype = inputs.q.dtype
    assert (out.dtype, lse.dtype) == (dtype, FLOAT)
    same_dtype, exact = (plain(inputs, x, **options) for x in (dtype, torch.float64))
    assert_within_budget(out, same_dtype[0], exact[0], name="out", factor=FACTORS[dtype])
    lse_same_dtype = same_dtype[1].to(FLOAT)
    assert_within_budget(lse, lse_same_dtype, exact[1], name="lse", factor=FACTORS[dtype])


# --- tiles and splits -----------------------------------------------------------------------------


SCHEDULES = [{"splits": 1}, {"splits": 3}, {"shares": 3}]


def name_of(schedule):
    [(word, count)] = schedule.items()
    return f"{count}-{word}"


WINDOWS = [(-1, 0), (6, 5), (-1, -1), (7, 0)]
# Merging three equal parts takes most programs.
CUTS = [(schedule, window) for schedule in SCHEDULES for window in WINDOWS]
CUTS = [cut for cut in CUTS if cut[0] != {"splits": 3} or cut[1] in WINDOWS[:2]]


@pytest.mark.parametrize(
    "schedule, window", CUTS, ids=lambda x: name_of(x) if isinstance(x, dict) else str(x)
)
@pytest.mark.parametrize(
    "sizes, tiles",
    [(DECODE, (16, 16)), (MIXED, (16, 16)), (SMALL, (64, 16))],
    ids=["decode", "mixed", "mixed-large-tiles"],
)
def test_tiles_and_schedules(sizes, tiles, schedule, window, monkeypatch):
    use(monkeypatch, tiles=tiles, **schedule)
    check(make(sizes), window=window)


@triton.jit
def tiles_kernel(units_ptr, ends_ptr, tiles_ptr, begins_ptr, num_tiles):
    place = tl.program_id(0)
    tile, begin = queries.tile_of_unit(tl.load(units_ptr + place), ends_ptr, num_tiles)
    tl.store(tiles_ptr + place, tile)
    tl.store(begins_ptr + place, begin)


@pytest.mark.parametrize("num_tiles", [1, 2, 31, 32, 33, 300, 1024, 1025, 1100])
def test_units_of_work_are_found(num_tiles):
    """Tiles without queries have no units."""
    ends = torch.randint(0, 4, (num_tiles,)).index_fill(0, torch.tensor([num_tiles // 2]), 2)
    ends = ends.cumsum(0).int()
    units = torch.randint(0, int(ends[-1]), (9,)).int().index_fill(0, torch.tensor([0]), 0)
    units[1] = ends[-1] - 1
    tiles, begins = torch.empty(2, 9, dtype=torch.int32).unbind(0)
    tiles_kernel[(9,)](units, ends, tiles, begins, num_tiles)
    expected = torch.searchsorted(ends, units, right=True)
    assert tiles.equal(expected.int())
    assert begins.equal(torch.cat([ends.new_zeros(1), ends])[expected])


@pytest.mark.parametrize("rest", [0, 900], ids=lambda keys: f"rest{keys}")
@pytest.mark.parametrize(
    "lens, members",
    [
        ((260, 0, 0, 50), (40, 0, 0, 3)),
        ((16, 99, 1, 64), (1, 1, 1, 1)),
        ((4, 4, 0, 0), (9, 1, 0, 0)),
    ],
    ids=str,
)
def test_work_is_left_to_a_launch_beside(lens, members, rest):
    """Its keys make shares larger; where tiles are few, no share has parts of two."""
    lens, num_shares, num_tiles, block_q, block_n = torch.tensor(lens).int(), 9, 12, 8, 16
    bounds = torch.tensor([0, *accumulate(members)]).int()
    flags = {"IS_RAGGED": True, "ONE_TILE_EACH": False, "HAS_LEFT": False, "HAS_RIGHT": False}
    *ends, share = worklist.count_work(
        lens,
        bounds,
        None,
        {**flags, "BLOCK_Q": block_q, "BLOCK_N": block_n},
        beside=torch.full((4,), rest).int(),
        num_shares=num_shares,
        T=int(bounds[-1]),
        B=4,
        num_tiles=num_tiles,
        least_m=0,
        most_m=2**30,
        steps=3,
        left=-1,
        right=-1,
    ).tolist()
    units = [0] * num_tiles
    for b, (begin, end) in enumerate(pairwise(bounds.tolist())):
        for tile in range(-(-(end - begin) // block_q)):
            units[begin // block_q + b + tile] = max(-(-int(lens[b]) // block_n), 1)
    assert share == -(-(sum(units) + 4 * -(-rest // block_n) // 3) // num_shares)
    if sum(-(-n // share) for n in units) <= num_shares:
        units = [-(-n // share) * share for n in units]
    assert ends == list(accumulate(units))


@pytest.mark.parametrize("block_size", [1, 3, 16, 20, 64])
@pytest.mark.parametrize("block_n", [16, 32])
def test_block_sizes(block_n, block_size, monkeypatch):
    use(monkeypatch, tiles=(16, block_n), shares=2)
    check(make(SMALL._replace(block_size=block_size)))


@pytest.mark.parametrize(
    "heads", [(1, 1), (3, 1), (12, 2), (16, 1), (17, 1), (40, 1), (5, 5)], ids=str
)
def test_heads_that_share_keys(heads):
    check(make(Sizes((20, 9), (), *heads)))
    check(make(Sizes((20, 9), (3, 4), *heads)))


@pytest.mark.parametrize("dims", [(1, 1), (7, 9), (24, 40), (80, 16), (33, 64), (144, 17)], ids=str)
def test_head_dims(dims):
    check(make(Sizes((20, 5), (3, 1), 2, 1, *dims)))


@pytest.mark.parametrize(
    "head_dim, widths",
    [(1, (16, 0)), (16, (16, 0)), (24, (32, 0)), (48, (32, 16)), (64, (64, 0)), (80, (64, 16)),
     (111, (128, 0)), (192, (128, 64)), (576, (512, 64))],
)  # fmt: skip
def test_queries_are_held_in_one_tile_or_two(head_dim, widths):
    assert problem.split_head_dim(head_dim) == widths


# --- features -------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("extra", ["alibi", "alibi-of-sequences", "sinks"])
def test_scores(extra, softcap, sizes, monkeypatch):
    use(monkeypatch, shares=3)
    inputs = make(sizes)
    if extra == "sinks":
        inputs = inputs._replace(sinks=torch.randn(2 * sizes.H)[::2])
    elif extra == "alibi":
        inputs = inputs._replace(alibi_slopes=torch.rand(2 * sizes.H)[::2])
    else:
        inputs = inputs._replace(alibi_slopes=torch.rand(sizes.H, len(sizes.lens_k)).t())
    check(inputs, softcap=softcap)


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
@pytest.mark.parametrize("std", [1.0, 10.0])
def test_dtypes_and_large_scores(std, dtype):
    inputs = make(MIXED, dtype, std=std)
    check(inputs._replace(sinks=torch.randn(2)))
    check(inputs._replace(sinks=torch.randn(2).to(dtype)), softcap=30.0)


@BOTH
@pytest.mark.parametrize("scale", [-0.4, 0.0, 2.0])
def test_softmax_scale(scale, sizes):
    check(make(sizes._replace(D=24)), scale=scale)


def test_sinks_of_minus_infinity_are_none():
    inputs = make(DECODE)
    expected = attend(inputs)
    actual = attend(inputs._replace(sinks=torch.full((4,), -torch.inf)))
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("window", [(2**40, 0), (-1, 2**40), (2**31 - 1, 2**31 - 1)], ids=str)
def test_windows_wider_than_any_context(window):
    open_window = (-1, 0 if window[1] == 0 else -1)
    inputs = make(MIXED)
    actual, expected = (attend(inputs, window=w) for w in (window, open_window))
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y)


# --- what is read and written ---------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, sizes):
    check(make(sizes, order=LAYOUTS[layout]))


def test_packed_keys_and_values():
    inputs = make(MIXED)
    packed = torch.cat([inputs.k_cache, inputs.v_cache], dim=-1)
    k_cache, v_cache = packed.split(16, dim=-1)
    check(inputs._replace(k_cache=k_cache, v_cache=v_cache))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("tiles", [(16, 16), (64, 16)], ids=str)
def test_blocks_that_left_the_window_are_not_read(tiles, splits, monkeypatch):
    use(monkeypatch, tiles=tiles, splits=splits)
    inputs = make(Sizes((61, 40), (), block_size=4))
    expected = attend(inputs, window=(9, 0))
    tables = inputs.block_tables.clone()
    tables[0, : (61 - 10) // 4] = STALE
    tables[1, : (40 - 10) // 4] = -STALE
    actual = attend(inputs._replace(block_tables=tables), window=(9, 0))
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
def test_rows_past_the_last_sequence_are_padding(schedule, monkeypatch):
    use(monkeypatch, **schedule)
    inputs = make(SMALL)._replace(sinks=torch.randn(2))
    expected = attend(inputs)
    padding = torch.full((7, 2, 16), torch.nan)
    out, lse = attend(inputs._replace(q=torch.cat([inputs.q, padding])))
    assert torch.equal(out[:-7], expected[0])
    assert torch.equal(lse[:, :-7], expected[1])
    assert out[-7:].eq(0).all()
    assert lse[:, -7:].eq(-torch.inf).all()


@pytest.mark.parametrize(
    "sizes", [Sizes(()), Sizes((5, 0), (0, 0)), Sizes((0, 0), (3, 1))], ids=str
)
def test_nothing_to_attend_to(sizes):
    out, lse = attend(make(sizes))
    assert (out.shape, lse.shape) == ((len(out), 4, 16), (4, len(out)))
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()


def test_padding_of_two_launches():
    """Rows past the last sequence may be as few as those of short runs."""
    inputs = make(Sizes((66, 60), (1, 44)))
    padded = inputs._replace(q=torch.cat([inputs.q, torch.full((5, 4, 16), torch.nan)]))
    out, lse = attend(padded)
    assert torch.equal(out[:-5], attend(inputs)[0])
    assert out[-5:].eq(0).all()
    assert lse[:, -5:].eq(-torch.inf).all()


def test_padding_alone():
    inputs = make(Sizes(()))
    out, lse = attend(inputs._replace(q=torch.randn(3, 4, 16), cu_seqlens_q=int32([0])))
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()


# --- the same bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [1, 3])
def test_a_sequence_alone_is_the_sequence_in_the_batch(splits, monkeypatch):
    use(monkeypatch, splits=splits)
    inputs = make(SMALL)
    out, lse = attend(inputs)
    start, end = inputs.cu_seqlens_q[2:4].tolist()
    alone = attend(
        inputs._replace(
            q=inputs.q[start:end],
            block_tables=inputs.block_tables[2:3],
            context_lens=inputs.context_lens[2:3],
            cu_seqlens_q=int32([0, end - start]),
        )
    )
    assert torch.equal(alone[0], out[start:end])
    assert torch.equal(alone[1], lse[:, start:end])


@pytest.mark.parametrize("sizes", [DECODE, MIXED], ids=["decode", "mixed"])
def test_batch_invariance(sizes, monkeypatch):
    monkeypatch.setattr(configs, "_INVARIANT_KEYS", 16)
    inputs = make(sizes, HALF)
    out, lse = attend(inputs, batch_invariant=True)
    bounds = [*accumulate(sizes.lens_q or (1,) * len(sizes.lens_k), initial=0)]
    for b in (2, 3):
        rows, row = slice(bounds[b], bounds[b + 1]), slice(b, b + 1)
        alone = inputs._replace(
            q=inputs.q[rows],
            block_tables=inputs.block_tables[row, : -(-sizes.lens_k[b] // sizes.block_size)],
            context_lens=inputs.context_lens[row],
            cu_seqlens_q=int32([0, rows.stop - rows.start]) if sizes.lens_q else None,
        )
        result = attend(alone, batch_invariant=True)
        assert torch.equal(result[0], out[rows])
        assert torch.equal(result[1], lse[:, rows])
    check(inputs, batch_invariant=True)


# --- trees, quantised caches, shared prefixes -----------------------------------------------------


TREES = [{"splits": 1}, {"shares": 2}]


@pytest.mark.parametrize("tiles", [(16, 16), (64, 16)], ids=str)
@pytest.mark.parametrize("schedule", TREES, ids=name_of)
def test_flat_trees(schedule, tiles, monkeypatch):
    use(monkeypatch, tiles=tiles, **schedule)
    flat = torch.rand(sum(m * m for m in MIXED.lens_q)) < 0.5
    check(make(MIXED)._replace(tree_mask=flat))


@BOTH
@pytest.mark.parametrize("tiles, width", [((16, 16), 1), ((16, 16), 64), ((64, 16), 20)], ids=str)
def test_trees_with_rows(tiles, width, sizes, monkeypatch):
    use(monkeypatch, tiles=tiles)
    inputs = make(sizes)
    mask = torch.rand(width, len(inputs.q)).t() < 0.5
    check(inputs._replace(tree_mask=mask), window=(-1, -1))


@pytest.mark.parametrize("window", [(-1, -1), (7, 3)], ids=str)
@pytest.mark.parametrize("schedule", TREES, ids=name_of)
def test_causal_by_sequence(schedule, window, monkeypatch):
    use(monkeypatch, **schedule)
    is_causal = torch.tensor([True, False, False, True, False, True])
    check(make(MIXED)._replace(is_causal=is_causal), window=window)


@BOTH
@pytest.mark.parametrize(
    "D, D_v, is_one_tile", [(40, 32, True), (24, 20, True), (24, 16, False)], ids=str
)
def test_values_in_keys(D, D_v, is_one_tile, sizes):
    inputs = make(sizes._replace(D=D, D_v=D_v))
    inputs = inputs._replace(v_cache=inputs.k_cache[..., :D_v])
    assert problem.are_values_in_keys(inputs.k_cache, inputs.v_cache) == is_one_tile
    assert not problem.are_values_in_keys(inputs.k_cache, inputs.k_cache[..., 1 : D_v + 1])
    check(inputs)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("shape", ["slots", "heads", "one"])
def test_quantised_caches(shape, dtype, sizes):
    inputs = make(sizes._replace(D=24, D_v=40))
    slots = inputs.k_cache.shape[:3]
    scales = [
        torch.rand({"slots": slots, "heads": slots[2:], "one": ()}[shape]) / 9 for _ in range(2)
    ]
    if shape == "slots":
        for scale in scales:
            scale[inputs.k_cache[..., 0].isnan()] = torch.nan
    caches = [(9 * x).nan_to_num(99).to(dtype) for x in (inputs.k_cache, inputs.v_cache)]
    changes = dict(
        zip(("k_cache", "v_cache", "k_scale", "v_scale"), (*caches, *scales), strict=True)
    )
    check_quantised(inputs._replace(**changes))


def check_quantised(inputs, tolerance=1e-4, size=1.0):
    """Compare with float64, where values are about `size`."""
    out, lse = attend(inputs)
    required, options = inputs.split(scale=0.3)[:5], inputs.split(scale=0.3)[5]
    exact = reference.attention(required[0].double(), *required[1:], options)
    atol = tolerance * size / 5
    torch.testing.assert_close(out.double(), exact[0], atol=atol, rtol=tolerance)
    torch.testing.assert_close(lse.double(), exact[1], atol=tolerance / 5, rtol=tolerance)


BFLOAT = torch.bfloat16  # only where Triton converts it before it computes


@pytest.mark.parametrize("sink", [None, 25.0])
@pytest.mark.parametrize(
    "code, dtype, size, D_v",
    [
        (torch.float8_e4m3fn, FLOAT, 1.0, 40),
        (torch.float8_e4m3fn, HALF, 1.0, 40),
        (torch.float8_e4m3fn, BFLOAT, 1e-9, 24),
        (torch.float8_e4m3fn, BFLOAT, 1e30, 7),
        (torch.int8, HALF, 1.0, 40),
    ],
    ids=str,
)
def test_quantised_caches_in_float16(code, dtype, size, D_v, sink, monkeypatch):
    """Whatever the sizes of queries, scales and sinks, and whether values lie in pairs."""
    use(monkeypatch, shares=2)
    inputs = make(SMALL._replace(D=24, D_v=D_v))
    slots = inputs.k_cache.shape[:3]
    k_cache, v_cache = (
        (9 * x.contiguous()).nan_to_num(99).to(code) for x in (inputs.k_cache, inputs.v_cache)
    )
    assert (attention._in_pairs(v_cache).dtype == torch.int16) == (D_v % 2 == 0)
    row_sizes = torch.logspace(-4 if dtype == HALF else -9, 0, len(inputs.q))
    inputs = inputs._replace(
        q=(inputs.q * row_sizes[:, None, None]).to(dtype),
        k_cache=k_cache,
        v_cache=v_cache,
        k_scale=torch.rand(slots) / 9 + 0.01,
        v_scale=size * 10 ** -torch.rand(slots),
        sinks=None if sink is None else torch.full((2,), sink),
    )
    check_quantised(inputs, {FLOAT: 1e-4, HALF: 5e-3, BFLOAT: 2e-2}[dtype], size)


RUNS = (1, 9, 5, 1, 2, 20, 1)


@pytest.mark.parametrize(
    "block_size, schedule, lens_q",
    [
        pytest.param(8, {"splits": 1}, RUNS, id="block8-mixed"),
        pytest.param(8, {"splits": 3}, (), id="block8-decode-3-splits"),
        pytest.param(5, {"shares": 3}, (), id="block5-decode-3-shares"),
        pytest.param(5, {"shares": 3}, RUNS, id="block5-mixed-3-shares"),
    ],
)
def test_shared_prefixes(block_size, schedule, lens_q, monkeypatch):
    use(monkeypatch, **schedule)
    sizes = Sizes((60, 33, 40, 1, 0, 50, 60), lens_q, block_size=block_size)
    inputs = make(sizes)
    for member, leader, count in ((2, 0, 4), (6, 0, 7), (5, 1, 2)):
        inputs.block_tables[member, :count] = inputs.block_tables[leader, :count]
    if block_size == 5:
        inputs = inputs._replace(sinks=torch.randn(4))
    check(inputs, shared_prefix=True, softcap=2.0)


def start_prefixes(q, k_cache, v_cache, tables, lens, bounds, rows, _rest_lens, scale, out, lse):
    options = AttentionOptions(scale, (-1, -1), cu_seqlens_q=bounds)
    return attention.start(q, k_cache, v_cache, tables, lens, options, out, lse, rows)


@pytest.mark.parametrize("num_sms", [1, 8], ids=lambda sms: f"sms{sms}")
@pytest.mark.parametrize(
    "lens_q, heads",
    [((), (4, 2)), ((), (20, 1)), ((1, 1, 9, 1, 30), (4, 2))],
    ids=["decode", "decode-group20", "mixed"],
)
def test_rest_beside_prefixes(lens_q, heads, num_sms, monkeypatch):
    """Whole sequences or parts of them, which are merged with those of prefixes at once."""
    use(monkeypatch, shares=3)
    monkeypatch.setattr(cascade.support, "takes", lambda *args: True)
    monkeypatch.setattr(cascade, "_start_on_hopper", start_prefixes)
    monkeypatch.setattr(tl.extra.cuda, "gdc_wait", lambda: None)
    info = DeviceInfo("cpu", "", num_sms=num_sms)
    monkeypatch.setattr(configs, "device_info", lambda device: info)
    monkeypatch.setattr(configs, "_LEAST_KEYS", 1)
    inputs = make(Sizes((90, 60, 76, 1, 68), lens_q, *heads))
    for member in (1, 2, 4):
        inputs.block_tables[member, :5] = inputs.block_tables[0, :5].clone()
    check(inputs, shared_prefix=True)


def test_shared_prefixes_of_two_launches_with_padding():
    """Short and long runs of queries are two launches; rows past both are nobody's."""
    inputs = make(Sizes((66, 60, 40, 50), (1, 44, 1, 9)))
    inputs.block_tables[1:, :2] = inputs.block_tables[0, :2].clone()
    check(inputs, shared_prefix=True)
    padded = inputs._replace(q=torch.cat([inputs.q, torch.full((5, 4, 16), torch.nan)]))
    out, lse = attend(padded, shared_prefix=True)
    assert torch.equal(out[:-5], attend(inputs, shared_prefix=True)[0])
    assert out[-5:].eq(0).all()
    assert lse[:, -5:].eq(-torch.inf).all()


def test_shared_prefixes_are_read_once(monkeypatch):
    """Only the leader's table leads to the prefix: entries of the others are compared, not used."""
    inputs = make(Sizes((60, 50, 41), ()))
    for member in (1, 2):
        inputs.block_tables[member, :5] = inputs.block_tables[0, :5]
    seen = []

    def start(*args):
        seen.append((args[3], args[4], args[5].cu_seqlens_q))

    monkeypatch.setattr(cascade, "merge_halves", lambda *args: None)
    cascade.attend_in_halves(
        start,
        *inputs.split(scale=0.3),
        *(torch.zeros(3, 4, 16), torch.zeros(4, 3)),
    )
    (_, prefix_lens, bounds), (rest_table, rest_lens, _) = seen
    assert prefix_lens.tolist() == [40, 0, 0]
    assert bounds.tolist() == [0, 3, 3, 3]
    assert rest_lens.tolist() == [20, 10, 1]
    assert torch.equal(rest_table[0, :3], inputs.block_tables[0, 5:8])
