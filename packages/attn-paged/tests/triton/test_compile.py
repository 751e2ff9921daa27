"""The Triton kernels compiled ahead of time, with the tiles each architecture is shipped with."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from attn_core import tuning
from attn_core.device import DeviceInfo
from attn_core.launch import Launcher
from attn_core.testing.compilation import TARGETS, LaunchRecorder
from attn_core.tuning import TileConfig

pytest.importorskip("triton")

from attn_paged._triton import append, attention, cascade, configs, halves, merge, problem, worklist
from attn_paged.options import AppendOptions, AttentionOptions, Rotary

pytestmark = pytest.mark.compile

BFLOAT, FLOAT = torch.bfloat16, torch.float32
# Bytes that kernels of sm_90 may spill, by width of the head; those of others are not looked at.
SPILLS_WITH_ALL = 768  # of every feature at once, on the largest tiles
MAX_SPILLS = {256: 64, 512: 256, 1024: 256}


class Case(NamedTuple):
    """`tokens` is how many queries each of four sequences has."""

    D: int = 128
    D_v: int = 128
    heads: int = 64
    heads_kv: int = 8
    tokens: int = 1
    block_size: int = 16
    dtype: torch.dtype = BFLOAT
    has_all: bool = False
    cache_dtype: torch.dtype | None = None
    max_blocks: int = 1000
    values_in_keys: bool = False

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"m{self.tokens}-h{self.heads}-kv{self.heads_kv}-d{self.D}-dv{self.D_v}"
        words = [f"{sizes}-block{self.block_size}-{dtype}"]
        words += [str(self.cache_dtype).removeprefix("torch.")] if self.cache_dtype else []
        words += [f"blocks{self.max_blocks}"] if self.max_blocks != 1000 else []
        words += ["in-keys"] if self.values_in_keys else []
        return "-".join([*words, "all"] if self.has_all else words)


LATENT = Case(D=576, D_v=512, heads=128, heads_kv=1)
PORTABLE = [
    Case(),
    Case(tokens=300),
    Case(dtype=FLOAT),
    Case(D=256, D_v=256, tokens=300),
    LATENT._replace(heads=16),
    Case(cache_dtype=torch.int8),
]
HOPPER = [
    Case(block_size=64),
    Case(block_size=7),
    Case(has_all=True),
    Case(tokens=300, has_all=True),
    Case(D=64, D_v=64, tokens=300),
    Case(D=80, D_v=80),
    Case(cache_dtype=torch.float8_e4m3fn),
    Case(cache_dtype=torch.float8_e4m3fn, D_v=63),
    Case(cache_dtype=torch.float8_e4m3fn, tokens=300),
    Case(cache_dtype=torch.int8, tokens=300),
    Case(max_blocks=64),
    Case(max_blocks=64, heads_kv=32),
    LATENT,
    LATENT._replace(values_in_keys=True),
    LATENT._replace(values_in_keys=True, heads=16),
]
CASES = {target: [*PORTABLE, *(HOPPER if target == "sm_90" else ())] for target in TARGETS}


@pytest.fixture
def use_target(monkeypatch, tmp_path):
    """A function that makes every device look like one of a target's architecture."""
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("ATTN_TUNE", raising=False)

    def use(target):
        kind = "hip" if target.startswith("gfx") else "cuda"
        info = DeviceInfo(kind, target, target, num_sms=132)
        for module in (tuning, configs, attention, problem, cascade.support):
            monkeypatch.setattr(module, "device_info", lambda device: info)
        tuning.forget()

    yield use
    tuning.forget()


@pytest.fixture
def recorded(monkeypatch):
    """What writes down the last launch of each kernel of the package, by name."""
    recorders = {}
    for module in (append, attention, cascade, halves, merge, worklist):
        for launcher in list(vars(module).values()):
            if isinstance(launcher, Launcher):
                kernel = launcher._kernel
                recorder = recorders.setdefault(kernel.__name__, LaunchRecorder(kernel))
                monkeypatch.setattr(launcher, "_kernel", recorder)
    return recorders


def empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def attend(case):
    tokens = 4 * case.tokens
    slots = (9, case.block_size, case.heads_kv)
    int32 = torch.int32
    cache_dtype = case.cache_dtype or case.dtype
    scale = empty(*slots, dtype=FLOAT) if case.cache_dtype else None
    options = AttentionOptions(
        scale=0.1,
        cu_seqlens_q=empty(5, dtype=int32) if case.tokens > 1 else None,
        k_scale=scale,
        v_scale=scale,
    )
    if case.has_all:
        options = options._replace(
            window=(999, 0),
            softcap=30.0,
            alibi_slopes=empty(case.heads, dtype=FLOAT),
            sinks=empty(case.heads, dtype=FLOAT),
            is_causal=empty(4, dtype=torch.bool),
            tree_mask=empty(tokens, 99, dtype=torch.bool),
        )
    k_cache = empty(*slots, case.D, dtype=cache_dtype)
    v_cache = empty(*slots, case.D_v, dtype=cache_dtype)
    attention.attention(
        empty(tokens, case.heads, case.D, dtype=case.dtype),
        k_cache,
        k_cache[..., : case.D_v] if case.values_in_keys else v_cache,
        empty(4, case.max_blocks, dtype=int32),
        empty(4, dtype=int32),
        options,
    )


RUNS = [
    pytest.param(target, case, id=f"{target}-{case}")
    for target in TARGETS
    for case in CASES[target]
]


@pytest.mark.parametrize("target, case", RUNS)
def test_attention_compiles_and_fits(target, case, use_target, recorded):
    use_target(target)
    recorder = recorded["_paged_attention_kernel"]
    attend(case)
    compiled = recorder.compile(target)
    assert compiled.fits, f"{compiled.shared} bytes of shared memory"
    if target == "sm_90" and case.dtype != FLOAT:
        width = configs.padded_head_dim(max(case.D, case.D_v))
        allowed = SPILLS_WITH_ALL if case.has_all else MAX_SPILLS.get(width, 0)
        assert compiled.spills <= allowed


@pytest.mark.parametrize("heads", [8, 16, 24, 32, 40, 64, 128])
def test_three_programs_of_shared_work_fit_a_processor(heads, use_target, recorded):
    """Programs of 128 threads: 64K registers and 227 KB of shared memory."""
    use_target("sm_90")
    recorder = recorded["_paged_attention_kernel"]
    attend(Case(heads=heads, max_blocks=9999))
    compiled = recorder.compile("sm_90")
    assert recorder.options["num_warps"] == 4
    assert 3 * 128 * compiled.registers <= 1 << 16
    assert 3 * (compiled.shared + 1024) <= 227 << 10


@pytest.mark.parametrize(
    "case, stages",
    [
        (Case(max_blocks=9999), 3),
        (Case(max_blocks=9999, block_size=64), 3),
        (Case(max_blocks=64), 4),
        (Case(tokens=1, max_blocks=64, block_size=64), 4),
    ],
    ids=str,
)
def test_decoding_keeps_tiles_in_flight(case, stages, use_target, recorded):
    """Of n stages n - 1 hold tiles: one is computed with, K and V of n - 2 are on their way."""
    use_target("sm_90")
    recorder = recorded["_paged_attention_kernel"]
    attend(case)
    compiled = recorder.compile("sm_90")
    assert recorder.constexprs["IS_SHARED"] == (case.max_blocks == 9999)
    assert f"{{num = {2 * (stages - 2)} : i32}}" in compiled.asm["ttgir"]


@pytest.mark.parametrize("D_v, is_transposed", [(128, True), (63, False)])
@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_pairs_of_values_are_transposed_by_hardware(
    cache_dtype, D_v, is_transposed, use_target, recorded, monkeypatch
):
    """Values that do not lie in pairs are gathered byte by byte."""
    use_target("sm_90")
    monkeypatch.setattr(configs, "pick", lambda *args: TileConfig(16, 64, 4, 3))
    recorder = recorded["_paged_attention_kernel"]
    attend(Case(cache_dtype=cache_dtype, D_v=D_v))
    compiled = recorder.compile("sm_90")
    assert ("trans.shared.b16" in compiled.asm["ptx"]) == is_transposed


@pytest.mark.parametrize("case", [Case(max_blocks=9999), Case(max_blocks=64)], ids=str)
@pytest.mark.parametrize("D_v", [80, 512])
@pytest.mark.parametrize("target", TARGETS)
def test_merge_compiles_without_spills(target, D_v, case, use_target, recorded):
    use_target(target)
    recorder = recorded["_merge_parts_kernel"]
    attend(case._replace(D_v=D_v))
    assert recorder.compile(target).spills == 0


@pytest.mark.parametrize("target", TARGETS)
def test_counting_of_work_compiles(target, use_target, recorded):
    use_target(target)
    recorder = recorded["_count_work_kernel"]
    attend(Case(max_blocks=9999))
    assert recorder.compile(target).spills == 0


@pytest.mark.parametrize("name", ["_find_prefixes_kernel", "_divide_sequences_kernel"])
@pytest.mark.parametrize("target", TARGETS)
def test_finding_of_prefixes_compiles(target, name, use_target, recorded, monkeypatch):
    use_target(target)
    q, cache = empty(4, 64, 128, dtype=BFLOAT), empty(9, 16, 8, 128, dtype=BFLOAT)
    lens, tables = (empty(*s, dtype=torch.int32) for s in ((4,), (4, 99)))
    options = AttentionOptions(scale=0.1)
    out, lse = torch.empty_like(q), empty(64, 4, dtype=FLOAT)
    monkeypatch.setattr(cascade, "merge_halves", lambda *args: None)
    monkeypatch.setattr(cascade, "_start_on_hopper", lambda *args: None)
    arguments = (q, cache, cache, tables, lens, options, out, lse)
    cascade.attend_in_halves(lambda *args: None, *arguments)
    assert recorded[name].compile(target).spills == 0


def attend_to_prefixes():
    q, cache = empty(64, 64, 128, dtype=BFLOAT), empty(9, 16, 8, 128, dtype=BFLOAT)
    lens, tables = (empty(*s, dtype=torch.int32) for s in ((64,), (64, 544)))
    options = AttentionOptions(scale=0.1, shared_prefix=True)
    attention.attention(q, cache, torch.empty_like(cache), tables, lens, options)


def start_prefixes(q, k_cache, v_cache, tables, lens, bounds, rows, _rest_lens, scale, out, lse):
    options = AttentionOptions(scale, (-1, -1), cu_seqlens_q=bounds)
    return attention.start(q, k_cache, v_cache, tables, lens, options, out, lse, rows)


def test_attention_beside_a_prefix_fits_into_what_that_leaves(use_target, recorded, monkeypatch):
    """Where a program of the prefix runs there is room, as tests/hopper/test_prefix.py says."""
    use_target("sm_90")
    recorder = recorded["_paged_attention_kernel"]
    monkeypatch.setattr(cascade.support, "takes", lambda *args: True)
    monkeypatch.setattr(cascade, "_start_on_hopper", start_prefixes)
    attend_to_prefixes()
    compiled = recorder.compile("sm_90")
    assert recorder.constexprs["IS_BESIDE"]
    assert 32 * recorder.options["num_warps"] * compiled.registers <= 128 * 168
    assert compiled.shared <= 72704
    assert compiled.spills == 0


@pytest.mark.parametrize("target", TARGETS)
def test_merge_with_prefixes_compiles_without_spills(target, use_target, recorded, monkeypatch):
    use_target(target)
    monkeypatch.setattr(cascade.support, "takes", lambda *args: True)
    monkeypatch.setattr(cascade, "_start_on_hopper", start_prefixes)
    recorder = recorded["_merge_halves_kernel"]
    attend_to_prefixes()
    assert recorder.compile(target).spills == 0


@pytest.mark.parametrize("quantised", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("target", TARGETS)
def test_append_compiles_without_spills(target, quantised, use_target, recorded):
    use_target(target)
    recorder = recorded["_append_to_cache_kernel"]
    dtype = torch.int8 if quantised else BFLOAT
    rows, cache = empty(4, 8, 128, dtype=BFLOAT), empty(9, 16, 8, 128, dtype=dtype)
    options = AppendOptions()
    if quantised:
        scale, angles = empty(9, 16, 8, dtype=FLOAT), empty(99, 64, dtype=FLOAT)
        rotary = Rotary(angles, angles, empty(4, dtype=torch.int64))
        options = AppendOptions(scale, scale, rotary)
    append.append_to_cache(rows, rows, cache, cache, empty(4, dtype=torch.int64), options)
    assert recorder.compile(target).spills == 0


def launch_keys(sizes, monkeypatch):
    """What the launchers compile for, over problems of (tokens, blocks of a table)."""
    keys = set()

    def note(num_programs, *, strides, args, constexprs, config):
        keys.add((strides, tuple(constexprs.values()), config))

    for name in ("_launch", "_launch_next"):
        monkeypatch.setattr(attention, name, note)
    cache = empty(9, 16, 8, 128, dtype=BFLOAT)
    for tokens, blocks in sizes:
        q = empty(tokens, 64, 128, dtype=BFLOAT)
        lens, tables = (empty(*s, dtype=torch.int32) for s in ((tokens,), (tokens, blocks)))
        attention.attention(q, cache, cache, tables, lens, AttentionOptions(scale=0.1))
    return keys


def test_numbers_are_compiled_for_any_value():
    """A launcher knows of strides what Triton compiles for, and of other numbers nothing."""
    kernels = {
        launcher._kernel
        for module in (append, attention, cascade, halves, merge, worklist)
        for launcher in vars(module).values()
        if isinstance(launcher, Launcher)
    }
    assert len(kernels) == 7
    numbers = [
        parameter
        for kernel in kernels
        for parameter in kernel.params
        if not parameter.is_constexpr and not parameter.name.endswith(("_ptr", "_log2"))
    ]
    for parameter in numbers:
        assert parameter.do_not_specialize or parameter.name.startswith("stride_"), parameter.name


def test_nothing_compiles_anew_as_sequences_grow(use_target, recorded, monkeypatch):
    use_target("sm_90")
    assert len(launch_keys([(4, 64), (8, 65), (5, 99)], monkeypatch)) == 1
    assert len(launch_keys([(40, 999), (200, 9999), (64, 1000)], monkeypatch)) == 1


@pytest.mark.parametrize(
    "sequences, blocks, schedule",
    [
        (1, 64, (16, False, 4)),
        (1, 512, (33, False, 4)),
        (4, 64, (8, False, 4)),
        (8, 64, (1, False, 3)),
        (16, 64, (1, False, 3)),
        (8, 128, (4, False, 4)),
        (64, 64, (1, False, 4)),
        (256, 64, (1, False, 4)),
        (8, 2048, (49, True, 3)),
        (64, 512, (49, True, 3)),
    ],
)
def test_short_launches_are_cut_and_long_ones_shared(sequences, blocks, schedule, use_target):
    use_target("sm_90")
    cache, tables = empty(9, 16, 8, 128, dtype=BFLOAT), empty(sequences, blocks, dtype=torch.int32)
    q = empty(sequences, 64, 128, dtype=BFLOAT)
    options = AttentionOptions(scale=0.1)
    [plan] = configs.plans(q, cache, cache, tables, False, False, False, options)
    assert (plan.num_splits, plan.is_shared, plan.config.num_stages) == schedule


@pytest.mark.parametrize(
    "case",
    [
        Case(max_blocks=9999),
        Case(max_blocks=64),
        Case(max_blocks=9999, cache_dtype=torch.float8_e4m3fn),
        Case(max_blocks=9999, cache_dtype=torch.int8),
        Case(tokens=300),
        Case(D=64, D_v=64, tokens=300),
        LATENT._replace(values_in_keys=True),
        LATENT._replace(values_in_keys=True, heads=16),
    ],
    ids=str,
)
def test_as_many_programs_fit_as_are_counted_on(case, use_target, recorded):
    """Where fewer did, shares of the work would be taken up one after the other."""
    use_target("sm_90")
    recorder = recorded["_paged_attention_kernel"]
    attend(case)
    compiled = recorder.compile("sm_90")
    size = (case.cache_dtype or case.dtype).itemsize
    constexprs, options = recorder.constexprs, recorder.options
    config = TileConfig(
        *(constexprs["BLOCK_M"], constexprs["BLOCK_N"]),
        *(options["num_warps"], options["num_stages"]),
    )
    choice = configs.Choice(torch.device("meta"), case.D, size)
    entries = case.D if case.values_in_keys else case.D + case.D_v
    per_sm = choice.slots(config, entries * size) // 132
    assert per_sm * 32 * config.num_warps * compiled.registers <= 1 << 16
    assert per_sm * (compiled.shared + 1024) <= 228 << 10


def test_a_mixed_batch_is_two_launches(use_target):
    use_target("sm_90")
    cache, tables = empty(9, 16, 8, 128, dtype=BFLOAT), empty(64, 128, dtype=torch.int32)
    q = empty(8252, 64, 128, dtype=BFLOAT)
    options = AttentionOptions(scale=0.1)
    short, long = configs.plans(q, cache, cache, tables, True, False, False, options)
    assert (short.config.block_m, short.most_m, short.one_tile_each) == (16, 2, True)
    assert (long.config.block_m, long.least_m, long.one_tile_each) == (128, 3, False)
