"""The Triton kernels compiled ahead of time, with the tiles each architecture is shipped with."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from attn_core import tuning
from attn_core.device import DeviceInfo
from attn_core.testing.compilation import TARGETS, compile_ahead

pytest.importorskip("triton")

from attn_paged._triton import append, attention, configs, merge

pytestmark = pytest.mark.compile

BFLOAT, FLOAT = torch.bfloat16, torch.float32
POINTERS = {
    BFLOAT: "*bf16",
    torch.float16: "*fp16",
    FLOAT: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
# Bytes that kernels of sm_90 may spill, by width of the head; those of others are not looked at.
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

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"m{self.tokens}-h{self.heads}-kv{self.heads_kv}-d{self.D}-dv{self.D_v}"
        words = [f"{sizes}-block{self.block_size}-{dtype}"]
        return "-".join([*words, "all"] if self.has_all else words)


LATENT = Case(D=576, D_v=512, heads=128, heads_kv=1)
PORTABLE = [
    Case(),
    Case(tokens=300),
    Case(dtype=FLOAT),
    Case(D=256, D_v=256, tokens=300),
    LATENT._replace(heads=16),
]
HOPPER = [
    Case(block_size=64),
    Case(block_size=7),
    Case(has_all=True),
    Case(tokens=300, has_all=True),
    Case(D=64, D_v=64, tokens=300),
    Case(D=80, D_v=80),
    LATENT,
]
CASES = {target: [*PORTABLE, *(HOPPER if target == "sm_90" else ())] for target in TARGETS}


class Recorder:
    """A kernel that writes down how it is launched."""

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, num_warps, num_stages, **constexprs):
        self.args, self.constexprs = args, constexprs
        self.options = {"num_warps": num_warps, "num_stages": num_stages}


@pytest.fixture
def use_target(monkeypatch, tmp_path):
    """A function that makes every device look like one of a target's architecture."""
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("ATTN_TUNE", raising=False)

    def use(target):
        kind = "hip" if target.startswith("gfx") else "cuda"
        info = DeviceInfo(kind, target, target, num_sms=132)
        monkeypatch.setattr(tuning, "device_info", lambda device: info)
        monkeypatch.setattr(configs, "device_info", lambda device: info)
        tuning.forget()

    yield use
    tuning.forget()


def empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def record(launcher, monkeypatch):
    """The kernel of a launcher, and what stands in for it."""
    kernel, recorder = launcher._kernel, Recorder()
    monkeypatch.setattr(launcher, "_kernel", recorder)
    return kernel, recorder


def attend(case):
    tokens = 4 * case.tokens
    slots = (9, case.block_size, case.heads_kv)
    int32 = torch.int32
    extras = (None, None)
    if case.has_all:
        extras = (empty(case.heads, dtype=FLOAT), empty(case.heads, dtype=FLOAT))
    attention.attention(
        empty(tokens, case.heads, case.D, dtype=case.dtype),
        empty(*slots, case.D, dtype=case.dtype),
        empty(*slots, case.D_v, dtype=case.dtype),
        empty(4, 1000, dtype=int32),
        empty(4, dtype=int32),
        empty(5, dtype=int32) if case.tokens > 1 else None,
        *extras,
        0.1,
        (999, 0) if case.has_all else (-1, 0),
        30.0 if case.has_all else 0.0,
    )


def compile_recorded(kernel, launch, target):
    """Compile a launch for what Triton would compile it for."""
    signature, constants = {}, dict(launch.constexprs)
    for parameter, value in zip(kernel.params, launch.args, strict=False):
        if value is None:
            constants[parameter.name] = None
        else:
            signature[parameter.name] = type_of(value, hinted=not parameter.do_not_specialize)
    return compile_ahead(kernel, signature, constants, target, **launch.options)


def type_of(value, *, hinted):
    if isinstance(value, torch.Tensor):
        return f"{POINTERS[value.dtype]}:16"
    if isinstance(value, float):
        return "fp32"
    hint = ":1" if value == 1 else ":16" if value % 16 == 0 else ""
    return f"i32{hint}" if hinted else "i32"


RUNS = [
    pytest.param(target, case, id=f"{target}-{case}")
    for target in TARGETS
    for case in CASES[target]
]


@pytest.mark.parametrize("target, case", RUNS)
def test_attention_compiles_and_fits(target, case, use_target, monkeypatch):
    use_target(target)
    kernel, recorder = record(attention._launch, monkeypatch)
    record(merge._launch, monkeypatch)
    attend(case)
    compiled = compile_recorded(kernel, recorder, target)
    assert compiled.fits, f"{compiled.shared} bytes of shared memory"
    if target == "sm_90" and case.dtype != FLOAT:
        width = configs.padded(max(case.D, case.D_v))
        assert compiled.spills <= MAX_SPILLS.get(width, 0)


@pytest.mark.parametrize("block_size", [16, 64])
def test_decoding_keeps_two_tiles_in_flight(block_size, use_target, monkeypatch):
    """Four stages hold three tiles: one is computed with, two are on their way, K and V of each."""
    use_target("sm_90")
    kernel, recorder = record(attention._launch, monkeypatch)
    record(merge._launch, monkeypatch)
    attend(Case(block_size=block_size))
    compiled = compile_recorded(kernel, recorder, "sm_90")
    assert "{num = 4 : i32}" in compiled.asm["ttgir"]


@pytest.mark.parametrize("D_v", [80, 128, 512])
@pytest.mark.parametrize("target", TARGETS)
def test_merge_compiles_without_spills(target, D_v, use_target, monkeypatch):
    use_target(target)
    kernel, recorder = record(merge._launch, monkeypatch)
    parts, parts_lse = empty(5, 4, 8, D_v, dtype=FLOAT), empty(5, 8, 4, dtype=FLOAT)
    merge.merge_splits(parts, parts_lse, empty(4, 8, D_v, dtype=BFLOAT), parts_lse[0])
    assert compile_recorded(kernel, recorder, target).spills == 0


@pytest.mark.parametrize("target", TARGETS)
def test_append_compiles_without_spills(target, use_target, monkeypatch):
    use_target(target)
    kernel, recorder = record(append._launch, monkeypatch)
    rows, cache = empty(4, 8, 128, dtype=BFLOAT), empty(9, 16, 8, 128, dtype=BFLOAT)
    append.append_to_cache(rows, rows, cache, cache, empty(4, dtype=torch.int64))
    assert compile_recorded(kernel, recorder, target).spills == 0


def launch_keys(sizes, monkeypatch):
    """What the launcher compiles for, over problems of (tokens, blocks of a table)."""
    keys = set()

    def note(num_programs, *, strides, args, constexprs, config):
        keys.add((strides, tuple(constexprs.values()), config))

    monkeypatch.setattr(attention, "_launch", note)
    record(merge._launch, monkeypatch)
    cache = empty(9, 16, 8, 128, dtype=BFLOAT)
    for tokens, blocks in sizes:
        q = empty(tokens, 64, 128, dtype=BFLOAT)
        lens, tables = (empty(*s, dtype=torch.int32) for s in ((tokens,), (tokens, blocks)))
        attention.attention(q, cache, cache, tables, lens, None, None, None, 0.1, (-1, 0), 0.0)
    return keys


def test_nothing_compiles_anew_as_sequences_grow(use_target, monkeypatch):
    use_target("sm_90")
    assert len(launch_keys([(4, 64), (8, 65), (5, 999)], monkeypatch)) == 1


def test_parts_and_results_are_written_by_two_kernels(use_target, monkeypatch):
    """Parts are float32, results are not, and the launcher cannot tell by the arguments."""
    use_target("sm_90")
    assert len(launch_keys([(4, 64), (4000, 64)], monkeypatch)) == 2
