"""Backend "triton" through the public functions on a GPU, against the reference in float64.

A kernel is compiled for every new combination of sizes and flags, which takes a second or two;
cases share them where they can.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import pytest
import torch

from attn_core.testing import assert_within_budget, poison_new_allocations, random_tensor
from attn_paged import append_to_cache, ops, paged_attention, reference
from attn_paged.options import AppendOptions, AttentionOptions, Rotary

pytestmark = pytest.mark.gpu

BACKEND = "triton"
BFLOAT, FLOAT = torch.bfloat16, torch.float32
# In float32 both errors are a few roundings, added up in another order: the largest is luck.
FACTORS = {torch.float16: 2.0, BFLOAT: 2.0, FLOAT: 4.0}
STALE = -12345


class Sizes(NamedTuple):
    """Keys and queries of each sequence; no lens_q means one query each, without cu_seqlens_q."""

    lens_k: tuple[int, ...]
    lens_q: tuple[int, ...] = ()
    H: int = 16
    H_KV: int = 2
    D: int = 128
    D_v: int = 128
    block_size: int = 16

    def __str__(self):
        lens_q, lens_k = ("x".join(map(str, lens)) for lens in (self.lens_q, self.lens_k))
        heads = f"h{self.H}-kv{self.H_KV}-d{self.D}-dv{self.D_v}"
        return f"m{lens_q or 'decode'}-n{lens_k}-{heads}-block{self.block_size}"


DECODE = Sizes((0, 1, 15, 16, 17, 63, 64, 65, 1000, 5000))
MIXED = Sizes((700, 0, 5, 1333, 12, 300), (1, 0, 5, 200, 20, 300))
BOTH = pytest.mark.parametrize("sizes", [DECODE, MIXED], ids=["decode", "mixed"])


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def make(sizes, device, dtype=BFLOAT, *, layout="nhd", width=0, std=1.0):
    """Arguments of paged_attention; slots without a key hold NaN, unused entries -12345."""
    counts = [-(-n // sizes.block_size) for n in sizes.lens_k]
    num_blocks = sum(counts) + 1
    tables = torch.full((len(counts), max(*counts, width)), STALE, dtype=torch.int32)
    ids = iter(torch.randperm(num_blocks).tolist())
    is_used = torch.zeros(num_blocks, sizes.block_size, dtype=torch.bool)
    for row, n in enumerate(sizes.lens_k):
        for i in range(counts[row]):
            block = tables[row, i] = next(ids)
            is_used[block, : n - i * sizes.block_size] = True

    def normal(name, *shape):
        return random_tensor(shape, seed=f"{sizes}-{name}", dtype=dtype, device=device, scale=std)

    slots = (num_blocks, sizes.block_size, sizes.H_KV)
    k_cache, v_cache = normal("k", *slots, sizes.D), normal("v", *slots, sizes.D_v)
    for cache in (k_cache, v_cache):
        cache[~is_used.to(device)] = torch.nan
    if layout == "packed":
        k_cache, v_cache = torch.cat([k_cache, v_cache], -1).split((sizes.D, sizes.D_v), -1)
    elif layout == "hnd":
        k_cache, v_cache = (
            x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k_cache, v_cache)
        )
    tokens = sum(sizes.lens_q) if sizes.lens_q else len(sizes.lens_k)
    bounds = int32([*accumulate(sizes.lens_q, initial=0)], device) if sizes.lens_q else None
    return {
        "q": normal("q", tokens, sizes.H, sizes.D),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_tables": tables.to(device),
        "context_lens": int32(sizes.lens_k, device),
        "cu_seqlens_q": bounds,
    }


def attend(inputs, **options):
    with poison_new_allocations():
        return paged_attention(**inputs, **options, return_lse=True, backend=BACKEND)


def plain(inputs, dtype, *, causal=True, window_size=(-1, 0), softmax_scale=None, **options):
    """What the reference gives in `dtype`; quantised numbers stay what they are."""
    names = ("q", "k_cache", "v_cache", "block_tables", "context_lens")
    extras = {name: x for name, x in inputs.items() if name not in names}
    floats = (torch.float16, BFLOAT, FLOAT)
    tensors = [x.to(dtype) if x.dtype in floats else x for x in (inputs[n] for n in names)]
    for name in ("alibi_slopes", "sinks"):
        if name in extras:
            extras[name] = extras[name].to(dtype)
    for name in ("batch_invariant", "shared_prefix"):
        options.pop(name, None)
    if isinstance(causal, torch.Tensor):
        extras["is_causal"] = causal
    right = 0 if causal is True else window_size[1]
    return reference.attention(
        *tensors,
        AttentionOptions(
            scale=softmax_scale or inputs["q"].shape[2] ** -0.5,
            window=(window_size[0], right),
            **extras,
            **options,
        ),
    )


def check(inputs, **options):
    out, lse = attend(inputs, **options)
    dtype = inputs["q"].dtype
    assert (out.dtype, lse.dtype) == (dtype, FLOAT)
    same_dtype, exact = (plain(inputs, x, **options) for x in (dtype, torch.float64))
    assert_within_budget(out, same_dtype[0], exact[0], name="out", factor=FACTORS[dtype])
    lse_same_dtype = same_dtype[1].to(FLOAT)
    assert_within_budget(lse, lse_same_dtype, exact[1], name="lse", factor=FACTORS[dtype])
    return out, lse


def same_bits(actual, expected):
    return all(map(torch.equal, actual, expected))


# --- shapes ---------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    "block_size, layout", [(16, "nhd"), (64, "hnd"), (7, "packed"), (1, "nhd")]
)
def test_blocks_and_layouts(block_size, layout, sizes, device):
    check(make(sizes._replace(block_size=block_size), device, layout=layout))


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes((5000,)),
        Sizes((1000,) * 40),
        Sizes((300, 900), (300, 1)),
        Sizes((2000, 4096), (2000, 600)),
        Sizes((70, 3), H=3, H_KV=1, D=80, D_v=96),
        Sizes((70, 3), (4, 3), H=40, H_KV=1, D=64, D_v=64),
        Sizes((700, 3), H=16, H_KV=1, D=576, D_v=512),
        Sizes((700, 3), H=128, H_KV=1, D=576, D_v=512),
        Sizes((200, 30), (100, 30), D=256, D_v=256),
        Sizes((200, 30), (100, 1), H=8, D=512, D_v=512),
        Sizes((200, 30, 1000), H=8, D=512, D_v=512),
        Sizes((200, 30, 1000), H=4, H_KV=4, D=192),
        Sizes((1328, 18, 463), (1, 5, 129), H=5, H_KV=1, D=96, D_v=96, block_size=32),
        Sizes((523, 37, 2011), (1, 1, 1), H=8, D=256, D_v=256, block_size=32),
    ],
    ids=str,
)
def test_sizes(sizes, device):
    check(make(sizes, device))


@pytest.mark.parametrize("heads", [16, 128])
@BOTH
def test_values_in_keys(sizes, heads, device):
    inputs = make(sizes._replace(H=heads, H_KV=1, D=576, D_v=512), device)
    check({**inputs, "v_cache": inputs["k_cache"][..., :512]})


@pytest.mark.parametrize("dtype", [torch.float16, FLOAT], ids=str)
@BOTH
def test_dtypes(sizes, dtype, device):
    check(make(sizes, device, dtype))


# --- features -------------------------------------------------------------------------------------


@BOTH
def test_everything(sizes, device):
    inputs = make(sizes, device)
    inputs["alibi_slopes"] = torch.rand(sizes.H, device=device)
    inputs["sinks"] = torch.randn(sizes.H, device=device)
    check(inputs, softcap=20.0, window_size=(300, 0))


@BOTH
@pytest.mark.parametrize("window", [(100, 0), (100, 30), (-1, -1)], ids=str)
def test_windows(window, sizes, device):
    check(make(sizes, device), window_size=window, causal=window[1] == 0)


def test_large_scores(device):
    check(make(DECODE, device, std=10.0))


# --- lengths that live on the device --------------------------------------------------------------


@pytest.fixture
def no_waiting():
    """Waiting for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@BOTH
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_nothing_waits_for_the_gpu(sizes, device, request):
    inputs = make(sizes, device)
    paged_attention(**inputs, backend=BACKEND)
    request.getfixturevalue("no_waiting")
    paged_attention(**inputs, backend=BACKEND)


def capture(compute):
    """A graph of a computation, and the outputs that its replays write."""
    compute()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = compute()
    return graph, outputs


def check_outputs(outputs, inputs):
    same_dtype, exact = (plain(inputs, dtype) for dtype in (BFLOAT, torch.float64))
    assert_within_budget(outputs[0], same_dtype[0], exact[0], name="out")
    assert_within_budget(outputs[1], same_dtype[1].to(FLOAT), exact[1], name="lse", factor=4.0)


def full_cache(sizes, device):
    """The arguments of `make`, and every table entry leads to some block."""
    inputs = make(sizes, device)
    tables = inputs["block_tables"]
    for name in ("k_cache", "v_cache"):
        inputs[name].nan_to_num_(0.5)
    inputs["block_tables"] = torch.randint_like(tables, len(inputs["k_cache"]))
    return inputs


def test_graph_of_decoding_follows_lengths_and_tables(device):
    inputs = full_cache(Sizes((900, 1, 300, 64)), device)
    tables = inputs["block_tables"]
    graph, outputs = capture(lambda: paged_attention(**inputs, return_lse=True, backend=BACKEND))
    for lens_k in ((900, 1, 300, 64), (3, 500, 0, 901), (912, 911, 912, 897), (0, 0, 0, 0)):
        inputs["context_lens"].copy_(int32(lens_k, device))
        tables.copy_(torch.randint_like(tables, len(inputs["k_cache"])))
        graph.replay()
        check_outputs(outputs, inputs)


def test_graph_of_a_mixed_batch_follows_its_bounds(device):
    inputs = full_cache(MIXED, device)
    graph, outputs = capture(lambda: paged_attention(**inputs, return_lse=True, backend=BACKEND))
    for lens_q, lens_k in (
        (MIXED.lens_q, MIXED.lens_k),
        ((0, 500, 1, 0, 25, 0), (9, 1300, 1, 0, 400, 5)),
        ((526, 0, 0, 0, 0, 0), (526, 0, 0, 0, 0, 0)),
        ((0, 1, 2, 3, 4, 516), (0, 0, 700, 3, 4, 1000)),
    ):
        inputs["cu_seqlens_q"].copy_(int32([*accumulate(lens_q, initial=0)], device))
        inputs["context_lens"].copy_(int32(lens_k, device))
        graph.replay()
        check_outputs(outputs, inputs)


def test_graph_of_a_step_appends_and_attends(device):
    inputs = full_cache(Sizes((900, 1, 300, 64)), device)
    caches = inputs["k_cache"], inputs["v_cache"]
    rows = torch.randn(2, 4, 2, 128, dtype=BFLOAT, device=device)
    slots = torch.arange(4, device=device)

    def step():
        append_to_cache(*rows, *caches, slots, backend=BACKEND)
        return paged_attention(**inputs, return_lse=True, backend=BACKEND)

    graph, outputs = capture(step)
    for new_slots in ([5, 900, 33, 64], [-1, 0, -1, 77], [-1, -1, -1, -1]):
        rows.normal_()
        slots.copy_(torch.tensor(new_slots))
        expected = [cache.clone() for cache in caches]
        reference.append_to_cache(*rows, *expected, slots, AppendOptions())
        graph.replay()
        assert same_bits(caches, expected)
        check_outputs(outputs, inputs)


def test_nothing_compiles_anew_as_sequences_grow(device):
    from attn_paged._triton import attention, merge, worklist

    def compiled():
        kernels = (
            attention._paged_attention_kernel,
            merge._merge_parts_kernel,
            worklist._count_work_kernel,
        )
        return [len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values()]

    for lens_k in ((4000,) * 5, (4096,) * 32):  # equal parts, and shares of the work
        attend(make(Sizes(lens_k), device))
    before = compiled()
    for lens_k in ((4001,) * 5, (100,) * 5, (5000,) * 7, (5001,) * 40, (9000,)):
        attend(make(Sizes(lens_k), device))
    assert compiled() == before


# --- the same bits --------------------------------------------------------------------------------


@BOTH
def test_same_bits_every_time(sizes, device):
    inputs = make(sizes, device)
    first = attend(inputs)
    for _ in range(50):
        assert same_bits(attend(inputs), first)


@BOTH
def test_a_sequence_alone_is_the_sequence_in_the_batch(sizes, device):
    inputs = make(sizes, device)
    out, lse = check(inputs, batch_invariant=True)
    bounds = [*accumulate(sizes.lens_q or (1,) * len(sizes.lens_k), initial=0)]
    for b in (0, 3, 5):
        rows, row = slice(bounds[b], bounds[b + 1]), slice(b, b + 1)
        alone = {name: inputs[name][row] for name in ("block_tables", "context_lens")}
        alone["q"] = inputs["q"][rows]
        if sizes.lens_q:
            alone["cu_seqlens_q"] = int32([0, sizes.lens_q[b]], device)
        assert same_bits(attend(inputs | alone, batch_invariant=True), (out[rows], lse[:, rows]))


# --- trees, quantised caches, shared prefixes -----------------------------------------------------


def tree_of(count, device):
    """Each token follows an earlier one, and sees itself and its ancestors."""
    mask = torch.eye(count, dtype=torch.bool, device=device)
    for i in range(1, count):
        mask[i] |= mask[int(torch.randint(i, ()))]
    return mask


SPECULATIVE = Sizes((700, 64, 8, 3333, 65), (8, 8, 8, 1, 7))


@pytest.mark.parametrize("sizes", [SPECULATIVE, MIXED], ids=["speculative", "mixed"])
@pytest.mark.parametrize("batch_invariant", [False, True], ids=["", "invariant"])
def test_flat_trees(batch_invariant, sizes, device):
    trees = torch.cat([tree_of(count, device).flatten() for count in sizes.lens_q])
    check(make(sizes, device), tree_mask=trees, batch_invariant=batch_invariant)


@BOTH
def test_trees_with_rows(sizes, device):
    tokens = sum(sizes.lens_q) if sizes.lens_q else len(sizes.lens_k)
    mask = torch.rand(tokens, 1400, device=device) < 0.5
    check(make(sizes, device), tree_mask=mask, causal=False, window_size=(-1, -1))


def test_causal_by_sequence(device):
    is_causal = torch.tensor([True, False, True, False, False, True], device=device)
    check(make(MIXED, device), causal=is_causal, window_size=(-1, -1))
    check(make(MIXED, device), causal=is_causal, window_size=(100, 7))


def quantise(inputs, dtype):
    """Caches of `dtype` with the scales of the reference; unused slots hold the worst there is."""
    limit = torch.finfo(dtype).max if dtype.is_floating_point else 127
    scales = {}
    for name in ("k", "v"):
        cache = inputs[f"{name}_cache"].float()
        peak = cache.abs().amax(-1)
        scales[f"{name}_scale"] = peak / limit
        numbers = (cache / (peak / limit)[..., None]).clamp(-limit, limit)
        numbers = numbers if dtype.is_floating_point else numbers.round().nan_to_num(127)
        inputs[f"{name}_cache"] = numbers.to(dtype)
    return inputs | scales


@BOTH
@pytest.mark.parametrize("block_size", [16, 64, 5])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_quantised_caches(dtype, block_size, sizes, device):
    check(quantise(make(sizes._replace(block_size=block_size), device), dtype))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_quantised_caches_of_half(dtype, sizes, device):
    check(quantise(make(sizes, device, torch.float16), dtype))


@BOTH
@pytest.mark.parametrize("D", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_quantised_caches_of_narrow_heads(dtype, D, sizes, device):
    sizes = sizes._replace(D=D, D_v=D, block_size=64)
    check(quantise(make(sizes, device, torch.float16), dtype))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_quantised_values_that_do_not_lie_in_pairs(dtype, sizes, device):
    check(quantise(make(sizes._replace(D=80, D_v=63), device), dtype))


@BOTH
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_quantised_caches_with_sinks_and_values_of_any_size(size, sizes, device):
    inputs = make(sizes, device)
    inputs["v_cache"] *= size
    inputs["sinks"] = torch.randn(sizes.H, device=device) * 5
    check(quantise(inputs, torch.float8_e4m3fn))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [BFLOAT, torch.float8_e4m3fn, torch.int8], ids=str)
def test_append_turns_and_quantises(dtype, interleaved, device):
    rows = torch.randn(2, 50, 8, 128, dtype=BFLOAT, device=device)
    caches = torch.zeros(2, 9, 7, 8, 128, device=device).to(dtype)
    scales = [None, None] if dtype == BFLOAT else [*torch.zeros(2, 9, 7, 8, device=device)]
    slots = torch.randperm(63, device=device)[:50]
    slots[::7] = -1
    positions = torch.randint(1000, (50,), device=device)
    cos, sin = (torch.rand(1000, 32, device=device) for _ in range(2))
    rotary = Rotary(cos, sin, positions, interleaved)
    expected = [cache.clone() for cache in caches]
    wanted = [x if x is None else x.clone() for x in scales]
    reference.append_to_cache(*rows, *expected, slots, AppendOptions(*wanted, rotary))
    append_to_cache(
        *rows, *caches, slots, k_scale=scales[0], v_scale=scales[1], rotary_cos=cos,
        rotary_sin=sin, positions=positions, rotary_interleaved=interleaved, backend=BACKEND,
    )  # fmt: skip
    for actual, right in zip((*caches, *scales), (*expected, *wanted), strict=True):
        if actual is not None:
            step = {BFLOAT: 0.008, torch.int8: 1.01}.get(dtype, 0.13)
            torch.testing.assert_close(actual.float(), right.float(), atol=step, rtol=step)


def share_prefixes(inputs, groups):
    """Let the sequences of each group begin with the same blocks: (members, how many)."""
    tables = inputs["block_tables"]
    for members, count in groups:
        for b in members[1:]:
            tables[b, :count] = tables[members[0], :count]
    return inputs


@pytest.mark.parametrize("lens_q", [(), (1, 30, 5, 1, 2, 64, 1)], ids=["decode", "mixed"])
def test_shared_prefixes(lens_q, device):
    sizes = Sizes((1000, 700, 640, 1, 0, 900, 2000), lens_q)
    inputs = share_prefixes(make(sizes, device), [((0, 2, 6), 37), ((1, 5), 20)])
    check(inputs, shared_prefix=True, softcap=30.0)
    inputs["sinks"] = torch.randn(sizes.H, device=device)
    check(inputs, shared_prefix=True)


@pytest.mark.parametrize(
    "changes, dtype, options",
    [
        ({"D": 64, "D_v": 64, "block_size": 64, "H_KV": 16}, torch.float16, {}),
        ({"D": 80, "D_v": 128, "block_size": 8}, BFLOAT, {"layout": "hnd"}),
        ({"H": 40, "H_KV": 1, "block_size": 128}, BFLOAT, {"layout": "packed"}),
    ],
    ids=["d64-block64-groups-of-1", "d80-block8-hnd", "groups-of-40-block128-packed"],
)
def test_shared_prefixes_of_other_shapes(changes, dtype, options, device):
    sizes = Sizes((1500, 1400, 1380, 700, 1200, 1300, 1390))._replace(**changes)
    blocks = 1280 // sizes.block_size
    inputs = share_prefixes(make(sizes, device, dtype, **options), [((0, 1, 2, 5, 6), blocks)])
    check(inputs, shared_prefix=True)
    check(inputs, shared_prefix=True, softmax_scale=-0.1)


def test_graph_of_shared_prefixes_follows_tables(device):
    inputs = full_cache(Sizes((900, 700, 300, 640)), device)
    tables = inputs["block_tables"]
    graph, outputs = capture(
        lambda: paged_attention(**inputs, shared_prefix=True, return_lse=True, backend=BACKEND)
    )
    for members, count in (((0, 1), 40), ((1, 2, 3), 18), ((0,), 0), ((0, 1, 2, 3), 1)):
        tables.copy_(torch.randint_like(tables, len(inputs["k_cache"])))
        share_prefixes(inputs, [(members, count)])
        graph.replay()
        check_outputs(outputs, inputs)


# --- memory ---------------------------------------------------------------------------------------


def test_alignment_of_pointers_may_change_between_calls(device):
    inputs = make(DECODE, device)
    for offset in (0, 1, 0, 3):
        shifted = {}
        for name in ("q", "k_cache", "v_cache"):
            storage = inputs[name].new_full((inputs[name].numel() + 8,), torch.nan)
            flat = storage[offset : offset + inputs[name].numel()]
            shifted[name] = flat.view(inputs[name].shape).copy_(inputs[name])
        check(inputs | shifted)


def test_caches_beyond_32_bits(device):
    sizes = Sizes((40, 70), H=2, H_KV=1, D=64, D_v=64)
    far_apart = 2**29 + 64  # elements from block to block: the eighth begins beyond 2**32
    inputs = make(sizes, device)
    num_blocks = len(inputs["k_cache"])
    needed = 2 * 2 * far_apart * num_blocks
    if torch.cuda.mem_get_info(device)[0] < needed:
        pytest.skip(f"needs {needed >> 30} GB of device memory")
    far = {}
    for name in ("k_cache", "v_cache"):
        storage = torch.empty(far_apart * num_blocks, dtype=BFLOAT, device=device)
        strides = (far_apart, *inputs[name].stride()[1:])
        far[name] = storage.as_strided(inputs[name].shape, strides).copy_(inputs[name])
    assert same_bits(attend(inputs | far), attend(inputs))
    rows = torch.randn(2, 1, 1, 64, dtype=BFLOAT, device=device)
    slots = torch.tensor([16 * num_blocks - 1], device=device)
    append_to_cache(*rows, *far.values(), slots, backend=BACKEND)
    assert torch.equal(far["v_cache"][-1, -1], rows[1, 0])


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", [BFLOAT, FLOAT], ids=str)
@pytest.mark.parametrize("dims", [(128, 128), (576, 512), (24, 7)], ids=str)
def test_append(dims, dtype, index_dtype, device):
    rows = [torch.randn(50, 8, dim, dtype=dtype, device=device) for dim in dims]
    caches = [torch.full((9, 7, 8, dim), torch.nan, dtype=dtype, device=device) for dim in dims]
    slots = torch.randperm(63, device=device)[:50].to(index_dtype)
    slots[::3] = -1
    expected = [cache.clone() for cache in caches]
    reference.append_to_cache(*rows, *expected, slots, AppendOptions())
    append_to_cache(*rows, *caches, slots, backend=BACKEND)
    for actual, wanted in zip(caches, expected, strict=True):
        assert torch.equal(actual.nan_to_num(7.0), wanted.nan_to_num(7.0))


# --- torch around it ------------------------------------------------------------------------------


def test_opcheck(device):
    inputs = make(MIXED, device)
    problem = (*(None,) * 6, 0.1, -1, 0, 0.0, False, False, BACKEND)
    torch.library.opcheck(
        ops.attention.overload, (*inputs.values(), *problem), test_utils="test_faketensor"
    )


@pytest.mark.filterwarnings("ignore")  # torch's own, of importing and running inductor
def test_compiled_step_is_the_eager_step(device):
    inputs = make(DECODE, device)

    def compute():
        return paged_attention(**inputs, return_lse=True, backend=BACKEND)

    torch._dynamo.reset()
    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(), compute())
