"""Attention to shared prefixes for sm_90a: emulated on a CPU, and compiled ahead of time."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import NamedTuple

import pytest
import torch

from attn_core.device import GLUON_VERSIONS, DeviceInfo, triton_version
from attn_core.testing.compilation import compile_ahead
from attn_core.testing.hopper import ProtocolError, emulation

gl = pytest.importorskip("triton.experimental.gluon.language")

pytestmark = pytest.mark.compile

BLOCK_M = 128
SPARE = 3  # blocks full of NaN that no prefix has
WORK_OF_THE_REST = (128 * 168, 72704 + 1024)  # registers and bytes, in test_compile.py
MAX_SPILLS = 192  # bytes, outside the loop over keys


class Case(NamedTuple):
    """`groups` are numbers of sequences and of the blocks that they share."""

    groups: tuple[tuple[int, int], ...]
    H: int = 8
    H_KV: int = 1
    D: int = 64
    D_v: int = 64
    block_size: int = 16
    programs: int = 2
    scale: float = 0.125

    def __str__(self):
        groups = "-".join(f"{members}x{blocks}" for members, blocks in self.groups)
        heads = f"h{self.H}-kv{self.H_KV}-d{self.D}-dv{self.D_v}-block{self.block_size}"
        return f"{heads}-{groups}-programs{self.programs}{'-negative' * (self.scale < 0)}"

    @property
    def tokens(self):
        return sum(members for members, _ in self.groups)


EMULATED = [
    Case(((4, 10),)),
    Case(((4, 10), (1, 0), (3, 17)), H_KV=2, D=128, D_v=128, programs=3),
    Case(((20, 5), (1, 0), (25, 3)), 12, 2, D=80, block_size=64, programs=5, scale=-0.1),
    Case(((2, 9), (3, 20)), 4, 4, D=128, block_size=8),
    Case(((30, 2), (1, 0)), D_v=128, block_size=128, programs=1, scale=1.0),
    Case(((1, 3), (2, 6)), H=160, programs=2),
]
COMPILED = [
    Case(((64, 512),), 64, 8, 128, 128),
    Case(((64, 512),), 64, 8, 128, 128, block_size=64, scale=-1.0),
    Case(((64, 512),), 32, 8),
]


class Inputs(NamedTuple):
    """What `prefix.start` takes before scale, out and lse."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    lens: torch.Tensor
    bounds: torch.Tensor
    rows: torch.Tensor
    rest_lens: torch.Tensor


def make(case):
    """Prefixes in blocks in random order; every first sequence of a group leads it."""
    counts = [blocks for _, blocks in case.groups]
    num_blocks, T = sum(counts) + SPARE, case.tokens
    k_cache, v_cache = (
        torch.randn(num_blocks, case.block_size, case.H_KV, D) for D in (case.D, case.D_v)
    )
    for cache in (k_cache, v_cache):
        cache[-SPARE:] = torch.nan
    order = torch.randperm(num_blocks - SPARE).int()
    tables = torch.full((T, max(counts) + 1), num_blocks - 1, dtype=torch.int32)
    lens, bounds = torch.zeros(T, dtype=torch.int32), torch.zeros(T + 1, dtype=torch.int32)
    leaders = accumulate((members for members, _ in case.groups), initial=0)
    starts = pairwise(accumulate(counts, initial=0))
    for leader, (members, blocks), (start, stop) in zip(leaders, case.groups, starts, strict=False):
        tables[leader, :blocks] = order[start:stop]
        lens[leader] = blocks * case.block_size
        bounds[leader + 1 :] += members
    q = torch.randn(T, case.H, case.D)
    return Inputs(q, k_cache, v_cache, tables, lens, bounds, torch.randperm(T).int(), lens)


def reference(case, inputs):
    q, k_cache, v_cache, tables, lens, bounds, rows, _rest_lens = inputs
    out = torch.zeros(case.tokens, case.H, case.D_v, dtype=torch.float64)
    lse = torch.full((case.H, case.tokens), -math.inf, dtype=torch.float64)
    for b in lens.nonzero().flatten().tolist():
        blocks = tables[b, : lens[b] // case.block_size].long()
        k, v = (cache[blocks].flatten(0, 1).double() for cache in (k_cache, v_cache))
        tokens = rows[bounds[b] : bounds[b + 1]].long()
        scores = torch.einsum("mhgd,nhd->mhgn", q[tokens].double().unflatten(1, (case.H_KV, -1)), k)
        scores *= case.scale
        out[tokens] = torch.einsum("mhgn,nhd->mhgd", scores.softmax(-1), v).flatten(1, 2)
        lse[:, tokens] = scores.logsumexp(-1).flatten(1).T
    return out, lse


def count_work(lens, bounds, _is_causal, constexprs, *, beside, num_tiles, num_shares, **sizes):
    """What `worklist.count_work` returns where what is beside has no work."""
    units = torch.zeros(num_tiles, dtype=torch.int32)
    for b, (begin, end) in enumerate(pairwise(bounds.tolist())):
        first = begin // constexprs["BLOCK_Q"] + b
        for tile in range(first, first + -(-(end - begin) // constexprs["BLOCK_Q"])):
            units[tile] = max(-(-int(lens[b]) // constexprs["BLOCK_N"]), 1)
    share = max(-(-int(units.sum()) // num_shares), 1)
    parts = -(-units // share)
    if parts.sum() <= num_shares:
        units = parts * share
    return torch.cat([units.cumsum(0), torch.tensor([share])]).int()


def merged(case, left):
    """Out and lse, with tiles in parts put together as `merge` does it."""
    out, lse = left.out.clone(), left.lse.clone()
    tile_group = left.constexprs["TILE_GROUP"]
    block_q, group = left.constexprs["BLOCK_Q"], case.H // case.H_KV
    *ends, share = [0, *left.ends.tolist()]
    bounds = left.cu_seqlens_q.tolist()
    parts = left.parts.unflatten(0, (-1, left.head_tiles))
    parts_lse = left.parts_lse.unflatten(0, (-1, left.head_tiles)) * math.log(2)
    for b, (begin, end) in enumerate(pairwise(bounds)):
        for place in range(begin, end):
            tile = begin // block_q + b + (place - begin) // block_q
            program, last = ends[tile] // share, (ends[tile + 1] - 1) // share
            slots = [
                2 * program + (ends[tile] % share > 0),
                *range(2 * program + 2, 2 * last + 2, 2),
            ]
            if program == last:
                continue
            for h in range(case.H):
                g = h % group
                head_tile = g // tile_group * case.H_KV + h // group
                row = (place - begin) % block_q * tile_group + g % tile_group
                weights = parts_lse[slots, head_tile, row]
                token = left.rows[place]
                lse[h, token] = weights.logsumexp(0)
                out[token, h] = weights.softmax(0) @ parts[slots, head_tile, row]
    return out, lse


@pytest.fixture
def prefix(monkeypatch):
    """The kernel's module on the emulated GPU."""
    with emulation("attn_paged._hopper.primitives", "attn_paged._hopper.prefix") as (_, module):
        kernel = module._launch._kernel

        def start(num_programs, args, constants, maxnreg):
            kernel[num_programs,](*args, **constants, maxnreg=maxnreg)

        monkeypatch.setattr(module, "_launch", start)
        monkeypatch.setattr(module.worklist, "count_work", count_work)
        yield module


def nans_like(*shape):
    return torch.full(shape, torch.nan)


def attend(case, inputs, prefix, monkeypatch):
    info = DeviceInfo("cuda", "sm_90", num_sms=case.programs * case.H_KV * -(-case.H // 128))
    monkeypatch.setattr(prefix, "device_info", lambda device: info)
    out, lse = nans_like(case.tokens, case.H, case.D_v), nans_like(case.H, case.tokens)
    return merged(case, prefix.start(*inputs, case.scale, out, lse))


@pytest.mark.parametrize("case", EMULATED, ids=str)
def test_prefixes_are_attended_to(case, prefix, monkeypatch):
    inputs = make(case)
    actual = attend(case, inputs, prefix, monkeypatch)
    for got, value in zip(actual, reference(case, inputs), strict=True):
        torch.testing.assert_close(got.double(), value, rtol=1e-4, atol=2e-5)


def test_nan_reaches_the_rows_that_see_it(prefix, monkeypatch):
    case = EMULATED[0]
    inputs = make(case)
    inputs.q[1, 3, 0] = torch.nan
    actual = attend(case, inputs, prefix, monkeypatch)
    for got, value in zip(actual, reference(case, inputs), strict=True):
        assert value.isnan().any()
        torch.testing.assert_close(got.double(), value, rtol=1e-4, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("name", ["fence_async_shared", "_release"])
def test_a_missing_signal_is_noticed(name, prefix, monkeypatch):
    """The emulation is worth its time: without what orders memory it fails."""
    monkeypatch.setattr("attn_core.testing.hopper._threads.PATIENCE", 0.5)
    monkeypatch.setattr(prefix, name, lambda *args: None)
    info = DeviceInfo("cuda", "sm_90", num_sms=1)
    monkeypatch.setattr(prefix, "device_info", lambda device: info)
    case = EMULATED[0]
    with pytest.raises(ProtocolError):
        prefix.start(*make(case), case.scale, nans_like(4, 8, 64), nans_like(8, 4))


def compile_launch(case, monkeypatch):
    """Compile what `start` launches on an H200."""
    from attn_paged._hopper import prefix

    types = {torch.float32: "*fp32:16", torch.int32: "*i32:16", torch.bfloat16: "*bf16:16"}
    layout = gl.NVMMASharedLayout(128, 16, rank=4)

    def type_of(value):
        if isinstance(value, torch.Tensor):
            return types[value.dtype]
        if isinstance(value, tuple):
            return f"tensordesc<bf16{[1, 1, value.rows, 64]},{layout!r}>"
        return "fp32" if isinstance(value, float) else "i32"

    compiled = []

    def launch(_num_programs, args, constants, maxnreg):
        kernel = prefix._prefix_attention_kernel
        signature = dict(zip(kernel.arg_names, map(type_of, args), strict=False))
        options = {"num_warps": 4, "maxnreg": maxnreg}
        compiled.append(compile_ahead(kernel, signature, constants, "sm_90", **options))

    info = DeviceInfo("cuda", "sm_90", "sm_90", num_sms=132)
    monkeypatch.setattr(prefix, "_launch", launch)
    monkeypatch.setattr(prefix, "device_info", lambda device: info)
    monkeypatch.setattr(prefix.worklist, "count_work", lambda *args, **sizes: args[0])
    inputs = make(case._replace(groups=((2, 1),)))
    T = case.tokens
    inputs = inputs._replace(
        q=torch.empty(T, case.H, case.D), lens=torch.empty(T, dtype=torch.int32)
    )
    inputs = [x.bfloat16() if x.is_floating_point() else x for x in inputs]
    prefix.start(*inputs, case.scale, nans_like(T, case.H, case.D_v), nans_like(case.H, T))
    return compiled[0]


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_kernel_leaves_room_for_the_rest_of_the_keys(case, monkeypatch):
    """Beside a program of it, one of the kernel for the rest has registers and memory."""
    if triton_version() not in GLUON_VERSIONS:
        pytest.skip("the kernel is not for this version of Triton")
    compiled = compile_launch(case, monkeypatch)
    registers, memory = WORK_OF_THE_REST
    assert 12 * 32 * compiled.registers + registers <= 1 << 16
    assert compiled.shared + 1024 + memory <= 228 << 10
    assert compiled.spills <= MAX_SPILLS
    assert not compiled.serializes
    assert "wgmma.mma_async" in compiled.asm["ptx"]
