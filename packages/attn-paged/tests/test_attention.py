"""paged_attention against the formula over dense keys in float64."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch

from attn_core.testing import assert_within_budget, embedded, random_tensor, seed_from
from attn_paged import (
    UnsupportedProblemError,
    _torch,
    append_to_cache,
    flash_attention_paged,
    paged_attention,
)
from attn_paged.options import AttentionOptions
from attn_paged.reference import attention, dense_attention

STALE = (-12345, 2**30)
RAGGED = (0, 1, 7, 30, 64)


@dataclass(frozen=True)
class Case:
    """One problem: `lens_q` is None for one query a sequence, without cu_seqlens_q."""

    lens_k: tuple[int, ...] = RAGGED
    lens_q: tuple[int, ...] | None = None
    heads: int = 4
    heads_kv: int = 2
    head_dim: int = 16
    head_dim_v: int = 16
    block_size: int = 7
    layout: str = "nhd"
    dtype: torch.dtype = torch.float32
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: str = ""
    has_sinks: bool = False
    std: float = 1.0

    def __str__(self) -> str:
        lens_q = "decode" if self.lens_q is None else "x".join(map(str, self.lens_q))
        flags = [
            *(["full"] if not self.causal else []),
            *([f"w{self.window[0]}_{self.window[1]}"] if self.window != (-1, -1) else []),
            *([f"cap{self.softcap:g}"] if self.softcap else []),
            *([f"alibi_{self.alibi}"] if self.alibi else []),
            *(["sinks"] if self.has_sinks else []),
            *([f"std{self.std:g}"] if self.std != 1.0 else []),
        ]
        return "-".join(
            [
                f"m{lens_q}-n{'x'.join(map(str, self.lens_k))}-h{self.heads}-{self.heads_kv}",
                f"d{self.head_dim}-{self.head_dim_v}-block{self.block_size}-{self.layout}",
                str(self.dtype).removeprefix("torch."),
                *flags,
            ]
        )

    @property
    def bounds(self) -> list[int]:
        return list(accumulate(self.lens_q or [1] * len(self.lens_k), initial=0))

    def random(self, name, shape, device, dtype=None):
        return random_tensor(
            shape, seed=f"{self}-{name}", dtype=dtype or self.dtype, device=device, scale=self.std
        )


@dataclass
class Inputs:
    """A problem twice: as arguments of paged_attention, and as dense keys of each sequence."""

    args: list[torch.Tensor]
    options: dict
    k: list[torch.Tensor]
    v: list[torch.Tensor]


def make_inputs(case, device="cpu"):
    k = [
        case.random(f"k{b}", (n, case.heads_kv, case.head_dim), device)
        for b, n in enumerate(case.lens_k)
    ]
    v = [
        case.random(f"v{b}", (n, case.heads_kv, case.head_dim_v), device)
        for b, n in enumerate(case.lens_k)
    ]
    k_cache, v_cache, block_tables = make_cache(case, k, v, device)
    q = case.random("q", (case.bounds[-1], case.heads, case.head_dim), device)
    slopes_shape = {"h": (case.heads,), "bh": (len(case.lens_k), case.heads)}
    options = {
        "cu_seqlens_q": int32(case.bounds, device) if case.lens_q is not None else None,
        "causal": case.causal,
        "window_size": case.window,
        "softcap": case.softcap,
        "alibi_slopes": case.random("alibi", slopes_shape[case.alibi], device, torch.float32).abs()
        if case.alibi
        else None,
        "sinks": case.random("sinks", (case.heads,), device) if case.has_sinks else None,
    }
    args = [embedded(q), k_cache, v_cache, block_tables, int32(case.lens_k, device)]
    return Inputs(args, options, k, v)


def make_cache(case, k, v, device):
    """Caches that hold NaN wherever no key is, and tables whose unused entries lead nowhere."""
    size = case.block_size
    counts = [-(-n // size) for n in case.lens_k]
    num_blocks = sum(counts) + 3
    k_cache, v_cache = empty_caches(case, num_blocks, device)
    generator = torch.Generator().manual_seed(seed_from(f"{case}-blocks"))
    order = iter(torch.randperm(num_blocks, generator=generator).tolist())
    block_tables = int32(STALE).repeat(len(counts), max(counts) // 2 + 1)
    for b, count in enumerate(counts):
        for i in range(count):
            block = block_tables[b, i] = next(order)
            span = slice(i * size, (i + 1) * size)
            k_cache[block, : len(k[b][span])] = k[b][span]
            v_cache[block, : len(v[b][span])] = v[b][span]
    return k_cache, v_cache, embedded(block_tables.to(device))


def empty_caches(case, num_blocks, device):
    heads, size, d, d_v = case.heads_kv, case.block_size, case.head_dim, case.head_dim_v

    def nan(*shape):
        return torch.full(shape, torch.nan, dtype=case.dtype, device=device)

    if case.layout == "hnd":
        caches = (nan(num_blocks, heads, size, dim) for dim in (d, d_v))
        return [cache.transpose(1, 2) for cache in caches]
    if case.layout == "packed":
        return nan(num_blocks, size, heads, d + d_v).split((d, d_v), dim=-1)
    if case.layout == "paired":
        return nan(num_blocks, 2, size, heads, d).unbind(1)
    return [nan(num_blocks, size, heads, dim) for dim in (d, d_v)]


def int32(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def dense(case, inputs, dtype):
    """The formula over each sequence's own keys, in `dtype`."""
    window = (case.window[0], 0 if case.causal else case.window[1])
    slopes, sinks = inputs.options["alibi_slopes"], inputs.options["sinks"]
    results = []
    for b, (k, v) in enumerate(zip(inputs.k, inputs.v, strict=True)):
        q = inputs.args[0][case.bounds[b] : case.bounds[b + 1]]
        own_slopes = slopes[b] if case.alibi == "bh" else slopes
        results.append(
            dense_attention(
                *(x.to(dtype) for x in (q, k, v)),
                own_slopes,
                sinks,
                case.head_dim**-0.5,
                window,
                case.softcap,
            )
        )
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs), torch.cat(lses, dim=1)


def tensors(inputs):
    """The optional tensors among the options."""
    names = ("cu_seqlens_q", "alibi_slopes", "sinks")
    return {name: inputs.options[name] for name in names}


def check(case, device):
    inputs = make_inputs(case, device)
    out, lse = paged_attention(*inputs.args, **inputs.options, return_lse=True)
    assert out.dtype == case.dtype
    assert lse.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    same_dtype, reference = (dense(case, inputs, dtype) for dtype in (case.dtype, torch.float64))
    # In float32 both errors are a few roundings, added up in another order: the largest is luck.
    factor = 4.0 if case.dtype == torch.float32 else 2.0
    assert_within_budget(out, same_dtype[0], reference[0], name="out", factor=factor)
    assert_within_budget(lse, same_dtype[1].to(lse.dtype), reference[1], name="lse")


MIXED = {"lens_k": (64, 0, 5, 33, 12), "lens_q": (1, 0, 5, 20, 1)}
CASES = [
    *[Case(block_size=size, layout=x) for size in (1, 3, 7, 16) for x in ("nhd", "hnd", "packed")],
    *[Case(**MIXED, block_size=size, layout=x) for size in (1, 16) for x in ("hnd", "paired")],
    *[Case(heads=h, heads_kv=h_kv) for h, h_kv in ((1, 1), (3, 1), (6, 2), (8, 1), (16, 2))],
    *[Case(**MIXED, heads=h, heads_kv=h_kv) for h, h_kv in ((3, 3), (6, 2), (8, 1))],
    *[Case(head_dim=d, head_dim_v=d) for d in (1, 24, 80)],
    Case(lens_k=(0, 5, 40), head_dim=576, head_dim_v=512, heads=16, heads_kv=1, layout="packed"),
    Case(**MIXED, head_dim=24, head_dim_v=40),
    Case(lens_k=(129,), lens_q=(129,)),
    Case(lens_k=(130, 3), lens_q=(100, 2)),
    Case(lens_k=(5, 9), lens_q=(8, 0)),
    *[Case(**MIXED, causal=causal, window=w) for causal in (True, False) for w in ((3, 2), (0, 9))],
    Case(**MIXED, causal=False),
    Case(window=(4, -1)),
    *[
        Case(causal=False, window=(far, far), **x)
        for far in (2**31 - 1, 2**40)
        for x in ({}, MIXED)
    ],
    *[Case(softcap=2.0, std=10.0, **x) for x in ({}, MIXED)],
    *[Case(alibi=shape, **x) for shape in ("h", "bh") for x in ({}, MIXED)],
    *[Case(has_sinks=True, **x) for x in ({}, MIXED)],
    Case(**MIXED, softcap=3.0, alibi="bh", has_sinks=True, window=(9, 0), layout="hnd"),
    *[Case(dtype=d, **x) for d in (torch.float16, torch.bfloat16) for x in ({}, MIXED)],
    *[Case(dtype=torch.float64, has_sinks=True, **x) for x in ({}, MIXED)],
    Case(std=10.0, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_dense_attention(case):
    check(case, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_dense_attention_on_a_gpu(case, device):
    check(case, device)


@pytest.mark.parametrize("case", [Case(), Case(**MIXED)], ids=str)
def test_small_steps_agree_with_one(case, monkeypatch):
    inputs = make_inputs(case)
    expected = paged_attention(*inputs.args, **inputs.options)
    monkeypatch.setattr(_torch, "_CHUNK_BYTES", 1)
    torch.testing.assert_close(paged_attention(*inputs.args, **inputs.options), expected)


@pytest.mark.parametrize("case", [Case(has_sinks=True, alibi="bh"), Case(**MIXED)], ids=str)
def test_reference_reads_the_cache_as_the_dense_formula_reads_keys(case):
    inputs = make_inputs(case)
    doubles = [x.double() if x.is_floating_point() else x for x in inputs.args]
    actual = attention(*doubles, AttentionOptions(case.head_dim**-0.5, **tensors(inputs)))
    torch.testing.assert_close(actual, dense(case, inputs, torch.float64))


@pytest.mark.parametrize("has_sinks", [False, True], ids=["plain", "sinks"])
def test_empty_context_gives_zeros(has_sinks):
    case = Case(lens_k=(0, 0), lens_q=(2, 1), has_sinks=has_sinks)
    inputs = make_inputs(case)
    out, lse = paged_attention(*inputs.args, **inputs.options, return_lse=True)
    assert torch.equal(out, torch.zeros_like(out))
    expected = inputs.options["sinks"] if has_sinks else torch.full((4,), -torch.inf)
    assert torch.equal(lse, expected[:, None].expand(4, 3))


def test_queries_past_the_last_sequence_are_padding():
    case = Case(**MIXED, has_sinks=True)
    inputs = make_inputs(case)
    expected, expected_lse = paged_attention(*inputs.args, **inputs.options, return_lse=True)
    padded = torch.cat([inputs.args[0], torch.full((3, 4, 16), torch.nan)])
    out, lse = paged_attention(padded, *inputs.args[1:], **inputs.options, return_lse=True)
    torch.testing.assert_close(out[:-3], expected)
    torch.testing.assert_close(lse[:, :-3], expected_lse)
    assert torch.equal(out[-3:], torch.zeros(3, 4, 16))
    assert torch.equal(lse[:, -3:], torch.full((4, 3), -torch.inf))


@pytest.mark.parametrize("shape", ["no-sequences", "no-queries", "no-blocks"])
def test_nothing_to_do(shape):
    sequences, tokens, width = {
        "no-sequences": (0, 2, 3),
        "no-queries": (2, 0, 3),
        "no-blocks": (1, 1, 0),
    }[shape]
    q, cache = torch.randn(tokens, 4, 8), torch.randn(3, 2, 4, 8)
    tables = torch.zeros(sequences, width, dtype=torch.int32)
    bounds = torch.linspace(0, tokens if sequences else 0, sequences + 1).int()
    out, lse = paged_attention(
        q, cache, cache, tables, int32([0] * sequences), cu_seqlens_q=bounds, return_lse=True
    )
    assert torch.equal(out, torch.zeros(tokens, 4, 8))
    assert torch.equal(lse, torch.full((4, tokens), -torch.inf))


def test_blocks_that_left_the_window_are_not_read():
    case = Case(lens_k=(30, 17), block_size=4, window=(5, -1))
    inputs = make_inputs(case)
    expected = paged_attention(*inputs.args, **inputs.options)
    tables = inputs.args[3]
    for b, n in enumerate(case.lens_k):
        tables[b, : (n - 1 - 5) // 4] = STALE[b]
    assert torch.equal(paged_attention(*inputs.args, **inputs.options), expected)


def test_a_sequence_without_queries_is_not_read():
    case = Case(lens_k=(9, 20), lens_q=(4, 0))
    inputs = make_inputs(case)
    expected = paged_attention(*inputs.args, **inputs.options)
    inputs.args[3][1] = STALE[1]
    assert torch.equal(paged_attention(*inputs.args, **inputs.options), expected)


def test_a_sequence_alone_is_the_sequence_in_the_batch():
    case = Case(**MIXED)
    inputs = make_inputs(case)
    q, k_cache, v_cache, tables, lens = inputs.args
    together = paged_attention(*inputs.args, **inputs.options)
    for b in range(len(case.lens_k)):
        rows = slice(case.bounds[b], case.bounds[b + 1])
        alone = paged_attention(
            q[rows],
            k_cache,
            v_cache,
            tables[b : b + 1],
            lens[b : b + 1],
            cu_seqlens_q=int32([0, rows.stop - rows.start]),
        )
        torch.testing.assert_close(alone, together[rows])


def test_chunked_prefill_is_prefill():
    case = Case(lens_k=(50,), lens_q=(50,))
    inputs = make_inputs(case)
    q, *cache, lens = inputs.args
    whole = paged_attention(q, *cache, lens, **inputs.options)
    chunks = [
        paged_attention(q[start:stop], *cache, int32([stop]), cu_seqlens_q=int32([0, stop - start]))
        for start, stop in ((0, 1), (1, 20), (20, 50))
    ]
    torch.testing.assert_close(torch.cat(chunks), whole)


def test_scale_is_a_factor_of_the_scores():
    inputs = make_inputs(Case())
    q, *rest = inputs.args
    default = paged_attention(2.0 * q, *rest)
    torch.testing.assert_close(paged_attention(q, *rest, softmax_scale=2 * 16**-0.5), default)


@pytest.mark.parametrize("window", [-1, 1, 9])
def test_flash_attention_paged_decodes_heads_first(window):
    inputs = make_inputs(Case())
    q, *rest = inputs.args
    actual = flash_attention_paged(q.unsqueeze(2), *rest, window)
    left = window - 1 if window > 0 else -1
    expected = paged_attention(q, *rest, window_size=(left, 0))
    assert torch.equal(actual, expected.unsqueeze(2))


@pytest.mark.parametrize("case", [Case(), Case(**MIXED, window=(3, 0), alibi="h")], ids=str)
def test_nothing_is_read_back_from_a_device(case):
    inputs = make_inputs(case)
    # A meta tensor has no values, so asking for one raises.
    args = [x.to("meta") for x in inputs.args]
    options = {name: x if x is None else x.to("meta") for name, x in tensors(inputs).items()}
    out, lse = _torch.attention(*args, AttentionOptions(0.25, (3, 0), **options))
    assert (out.shape, lse.shape) == ((case.bounds[-1], 4, 16), (4, case.bounds[-1]))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_nothing_waits_for_the_gpu(device):
    inputs = make_inputs(Case(**MIXED), device)
    paged_attention(*inputs.args, **inputs.options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        paged_attention(*inputs.args, **inputs.options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def valid():
    inputs = make_inputs(Case())
    names = ("q", "k_cache", "v_cache", "block_tables", "context_lens")
    return dict(zip(names, inputs.args, strict=True))


BAD = {
    "q-rank": ({"q": torch.zeros(5, 4)}, r"q must have 3 dimensions \(T, H, D\), got shape"),
    "q-dtype": ({"q": torch.zeros(5, 4, 16).int()}, "q must have dtype float16, bfloat16, .*int32"),
    "q-rows": ({"q": torch.zeros(4, 4, 16)}, "one query for each row of block_tables .* 4 queries"),
    "q-dim": ({"q": torch.zeros(5, 4, 8)}, "same head dimension, got 8 and 16"),
    "heads": ({"q": torch.zeros(5, 3, 16)}, "number of heads of q must be a multiple .* = 3"),
    "cache-dtype": ({"q": torch.zeros(5, 4, 16).half()}, "k_cache must have the dtype of q"),
    "cache-shape": ({"v_cache": torch.zeros(1, 7, 2, 16)}, r"v_cache must have shape .* \(1, 7"),
    "table-dtype": (
        {"block_tables": torch.zeros(5, 3).long()},
        "block_tables must have dtype int32",
    ),
    "lens-shape": ({"context_lens": int32([1])}, r"context_lens must have shape \(B,\) = \(5,\)"),
    "bounds": ({"cu_seqlens_q": int32([0, 1])}, r"cu_seqlens_q must have shape \(B \+ 1,\) = \(6,"),
    "window": ({"window_size": (1,)}, "window_size must be two integers"),
    "softcap": ({"softcap": -1.0}, "softcap must be a finite number, 0 or more, got -1.0"),
    "scale": ({"softmax_scale": float("inf")}, "softmax_scale must be a finite number"),
    "alibi": ({"alibi_slopes": torch.zeros(3)}, r"alibi_slopes must have shape \(H,\) = \(4,\) or"),
    "causal": ({"causal": 2}, "causal must be True or False, got 2"),
    "causal-shape": (
        {"causal": torch.ones(4).bool()},
        r"causal must have shape \(B,\) = \(5,\), got \(4,\)",
    ),
    "tree-rows": (
        {"tree_mask": torch.ones(4, 2).bool()},
        r"tree_mask must have shape \(T, W\) = \(5, 2\), got \(4, 2\)",
    ),
    "tree-rank": (
        {"tree_mask": torch.ones(5, 1, 1).bool()},
        r"tree_mask must have shape \(T, W\) or one dimension, got \(5, 1, 1\)",
    ),
    "no-scale": (
        {name: torch.zeros(1, 7, 2, 16).char() for name in ("k_cache", "v_cache")},
        "k_scale must be given where the cache is torch.int8, got None",
    ),
    "needless-scale": ({"v_scale": torch.ones(())}, "v_scale must be None where the cache is"),
    "window-number": ({"window_size": 3}, "window_size must be two integers"),
    "softcap-text": ({"softcap": "x"}, "softcap must be a finite number, 0 or more, got 'x'"),
    "scale-text": ({"softmax_scale": "x"}, "softmax_scale must be a finite number or None"),
    "flag": ({"batch_invariant": "no"}, "batch_invariant must be True or False, got 'no'"),
    "sinks": ({"sinks": torch.zeros(3)}, r"sinks must have shape \(H,\) = \(4,\), got \(3,\)"),
}


# Of values: two sequences of 5 and 2 keys, in blocks of 4, with 3 queries and 1.
BAD_VALUES = {
    "too-long": (
        {"context_lens": int32([5, 9])},
        r"context_lens\[1\] must be between 0 and 8, got 9",
    ),
    "negative": ({"context_lens": int32([-1, 2])}, r"context_lens\[0\] must be between 0 and 8"),
    "block": (
        {"block_tables": int32([[1, 6], [2, -1]])},
        r"an entry of block_tables\[0\] must be between 0 and 5, got 6",
    ),
    "block-negative": (
        {"block_tables": int32([[1, 0], [-1, 0]])},
        r"an entry of block_tables\[1\] must be between 0 and 5, got -1",
    ),
    "start": ({"cu_seqlens_q": int32([1, 3, 4])}, "cu_seqlens_q must grow from 0 to at most the 4"),
    "order": ({"cu_seqlens_q": int32([0, 3, 2])}, "cu_seqlens_q must grow from 0 to at most the 4"),
    "end": ({"cu_seqlens_q": int32([0, 3, 5])}, "cu_seqlens_q must grow from 0 to at most the 4"),
    "tree": (
        {"tree_mask": torch.ones(9).bool()},
        r"tree_mask must have shape \(sum of M \* M,\) = \(10,\), got \(9,\)",
    ),
}


def two_sequences():
    cache = torch.zeros(6, 4, 2, 16)
    return {
        "q": torch.zeros(4, 4, 16),
        "k_cache": cache,
        "v_cache": cache,
        "block_tables": int32([[1, 0], [2, -1]]),
        "context_lens": int32([5, 2]),
        "cu_seqlens_q": int32([0, 3, 4]),
    }


@pytest.mark.parametrize("changes, message", BAD_VALUES.values(), ids=BAD_VALUES)
def test_bad_values_are_named_on_the_cpu(changes, message):
    paged_attention(**two_sequences())
    with pytest.raises(ValueError, match=message):
        paged_attention(**{**two_sequences(), **changes})


def test_entries_that_no_query_reads_may_hold_anything():
    arguments = {**two_sequences(), "cu_seqlens_q": int32([0, 1, 1])}
    arguments["block_tables"] = int32([[-7, 0], [2**31 - 1, -1]])
    out = paged_attention(**arguments, window_size=(0, 0))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize(
    "slots, positions, message",
    [
        ([24, 0], [0, 0], "an entry of slot_mapping must be between 0 and 23, got 24"),
        ([3, 3], [0, 0], r"slot_mapping must hold every slot once, got \[3, 3\]"),
        ([3, 4], [0, 5], "an entry of positions must be between 0 and 4, got 5"),
        ([3, 4], [-1, 0], "an entry of positions must be between 0 and 4, got -1"),
    ],
    ids=["slot", "twice", "position", "negative"],
)
def test_bad_slots_are_named_on_the_cpu(slots, positions, message):
    cache, rows, table = torch.zeros(6, 4, 2, 16), torch.zeros(2, 2, 16), torch.zeros(5, 4)
    with pytest.raises(ValueError, match=message):
        append_to_cache(
            *(rows, rows, cache, cache, torch.tensor(slots)),
            rotary_cos=table,
            rotary_sin=table,
            positions=torch.tensor(positions),
        )


def test_scales_that_are_written_must_not_be_broadcast():
    cache, rows = torch.zeros(6, 4, 2, 16).char(), torch.zeros(2, 2, 16)
    scale = torch.ones(1).expand(6, 4, 2)
    with pytest.raises(ValueError, match="k_scale must not be broadcast, it is written to"):
        append_to_cache(
            *(rows, rows, cache, cache.clone(), torch.tensor([3, 4])),
            k_scale=scale,
            v_scale=scale.clone(),
        )


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        paged_attention(**{**valid(), **changes})


UNSUPPORTED = {
    "gradient": (
        {"q": torch.zeros(5, 4, 16, requires_grad=True)},
        "q must not require a gradient, a paged cache has no backward pass",
    ),
    "shared-prefix": (
        {"shared_prefix": True, "window_size": (3, 0)},
        "shared_prefix and a window closed on the left do not go together",
    ),
}


@pytest.mark.parametrize("changes, message", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_features_are_refused(changes, message):
    with pytest.raises(UnsupportedProblemError, match=message):
        paged_attention(**{**valid(), **changes})


def test_inference_takes_tensors_that_could_have_gradients():
    arguments = valid()
    expected = paged_attention(**arguments)
    arguments["q"].requires_grad_()
    with torch.no_grad():
        assert torch.equal(paged_attention(**arguments), expected)


def test_flash_attention_paged_names_bad_arguments():
    _, *rest = valid().values()
    with pytest.raises(ValueError, match=r"q must have shape \(B, H, 1, D\), got \(5, 4, 2, 16\)"):
        flash_attention_paged(torch.zeros(5, 4, 2, 16), *rest)
    with pytest.raises(ValueError, match="window_size must be positive, or negative"):
        flash_attention_paged(torch.zeros(5, 4, 1, 16), *rest, window_size=0)
