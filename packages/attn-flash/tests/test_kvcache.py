"""flash_attn_with_kvcache on the CPU: what it means, what it refuses, and torch around it."""

from __future__ import annotations

import inspect
import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_core.testing import assert_within_budget
from attn_flash import (
    UnsupportedProblemError,
    _kvcache_torch,
    _torch,
    flash_attn_func,
    flash_attn_with_kvcache,
    kvcache_ops,
)
from attn_flash.kvcache_conformance import KVCACHE_CASES, KVCacheCase
from attn_flash.layers.rotary import apply_rotary_emb

CPU = torch.device("cpu")


def check(case, dtype=torch.float32):
    inputs = case.inputs(dtype, CPU)
    wide = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    actual = case.call("auto", **inputs)
    results = zip(actual, case.reference(**inputs), case.reference(**wide), strict=True)
    for index, (value, same_dtype, exact) in enumerate(results):
        # Both errors are a few roundings, added up in another order: the largest is luck.
        assert_within_budget(value, same_dtype, exact, name=f"output {index}", factor=4.0)


@pytest.mark.parametrize("case", KVCACHE_CASES, ids=str)
def test_float32(case):
    check(case)


@pytest.mark.parametrize("case", KVCACHE_CASES, ids=str)
def test_as_on_devices_that_nothing_is_read_back_from(case, monkeypatch):
    monkeypatch.setattr(_kvcache_torch, "_attend_to_keys", _kvcache_torch._attend_to_room)
    check(case)


@pytest.mark.parametrize("pages", [False, True], ids=["dense", "pages"])
def test_a_step_takes_the_kernel_of_torch(pages, monkeypatch):
    def refuse(*_):
        raise AssertionError("the plain formula ran")

    monkeypatch.setattr(_torch, "_scores", refuse)
    check(KVCacheCase((30, 7), M=1, H=4, H_KV=2, causal=True, page=8 * pages, leftpad=True))


def test_the_arguments_are_those_of_flash_attn():
    names = list(inspect.signature(flash_attn_with_kvcache).parameters)
    assert names == [
        *("q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens"),
        *("cache_batch_idx", "cache_leftpad", "block_table", "softmax_scale", "causal"),
        *("window_size", "softcap", "rotary_interleaved", "alibi_slopes", "num_splits"),
        *("return_softmax_lse", "backend"),
    ]


def flash_attn_grid():
    """A sample of the combinations that flash-attn's own test of this function crosses."""
    choices = {
        "M": (1, 3, 64),
        "new": (0, 1, 3),
        "H_KV": (6, 3, 1),
        "causal": (False, True),
        "window": ((-1, -1), (10, 3)),
        "rotary": (0, 16, 32),
        "interleaved": (False, True),
        "page": (0, 16, 25),
        "batch_idx": (False, True),
        "leftpad": (False, True),
        "alibi": (False, True),
        "splits": (0, 1, 5),
        "D": (32, 59),
    }
    combinations = list(itertools.product(*choices.values()))
    for combination in random.Random(5).sample(combinations, 120):
        options = dict(zip(choices, combination, strict=True))
        options["rotary"] *= options["new"] > 0
        longest = 97 - options["M"] if options["rotary"] else 90
        lens = (longest, 20, 0) if options["new"] else (longest, 20, 1)
        yield KVCacheCase(lens, H=6, D_v=options["D"], capacity=100, **options)


@pytest.mark.parametrize("case", [*flash_attn_grid()], ids=str)
def test_combinations(case):
    check(case)


def arguments(**changes):
    """A valid call with everything in it."""
    torch.manual_seed(0)
    full = {
        "q": torch.randn(2, 3, 4, 16),
        "k_cache": torch.randn(6, 8, 2, 16),
        "v_cache": torch.randn(6, 8, 2, 16),
        "k": torch.randn(2, 3, 2, 16),
        "v": torch.randn(2, 3, 2, 16),
        "rotary_cos": torch.randn(24, 4),
        "rotary_sin": torch.randn(24, 4),
        "cache_seqlens": torch.tensor([5, 20], dtype=torch.int32),
        "cache_batch_idx": torch.tensor([1, 0], dtype=torch.int32),
        "cache_leftpad": torch.tensor([0, 7], dtype=torch.int32),
        "block_table": torch.tensor([[3, 5, 1], [2, 0, 4]], dtype=torch.int32),
        "causal": True,
        "alibi_slopes": torch.rand(4),
    }
    return {**full, **changes}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD = {
    "q-rank": ({"q": torch.zeros(2, 4, 16)}, r"q must have 4 dimensions \(B, M, H, D\)"),
    "q-dtype": ({"q": torch.zeros(2, 3, 4, 16).int()}, "q must have dtype float16, bfloat16"),
    "cache-dtype": ({"k_cache": torch.zeros(6, 8, 2, 16).half()}, "k_cache must have the dtype"),
    "cache-dim": ({"k_cache": torch.zeros(6, 8, 2, 8)}, "k_cache must have shape .* 16"),
    "cache-type": ({"k_cache": None}, "k_cache must be a tensor, got NoneType"),
    "v-cache": ({"v_cache": torch.zeros(6, 7, 2, 16)}, "v_cache must have shape"),
    "heads": ({"q": torch.zeros(2, 3, 5, 16)}, "heads of q must be a multiple of that of k_cache"),
    "k-alone": ({"v": None}, "v must be given with k, got None"),
    "v-alone": ({"k": None}, "k must be given with v, got None"),
    "k-shape": ({"k": torch.zeros(2, 3, 2, 15)}, r"k must have shape \(B, S_new, H_KV, D\)"),
    "v-shape": ({"v": torch.zeros(2, 4, 2, 16)}, r"v must have shape \(B, S_new, H_KV, D_v\)"),
    "k-device": ({"k": torch.zeros(2, 3, 2, 16, device="meta")}, "k must be on the device of q"),
    "no-lens": ({"cache_seqlens": None}, "cache_seqlens must be given with k"),
    "lens-type": ({"cache_seqlens": 2.5}, "cache_seqlens must be an integer or an int32 tensor"),
    "lens-dtype": ({"cache_seqlens": torch.tensor([5, 20])}, "cache_seqlens must have dtype int32"),
    "lens-shape": ({"cache_seqlens": int32(5)}, r"cache_seqlens must have shape \(B,\) = \(2,\)"),
    "lens-high": ({"cache_seqlens": int32(5, 22)}, "cache_seqlens must hold values from 0 to 21"),
    "lens-low": ({"cache_seqlens": int32(-1, 2)}, "cache_seqlens must hold .* got -1"),
    "int-high": ({"cache_seqlens": 22}, "cache_seqlens must be between 0 and 21, got 22"),
    "idx-dtype": ({"cache_batch_idx": torch.zeros(2)}, "cache_batch_idx must have dtype int32"),
    "idx-high": ({"cache_batch_idx": int32(0, 2)}, "cache_batch_idx must hold values from 0 to 1"),
    "pad-shape": ({"cache_leftpad": int32(0)}, r"cache_leftpad must have shape \(B,\)"),
    "pad-low": ({"cache_leftpad": int32(0, -3)}, "cache_leftpad must hold values from 0 to 24"),
    "table-rank": ({"block_table": int32(0, 1)}, "block_table must have 2 dimensions"),
    "table-dtype": ({"block_table": torch.zeros(2, 3)}, "block_table must have dtype int32"),
    "table-high": (
        {"block_table": int32(*range(4, 10)).view(2, 3)},
        r"block_table\[1\] must hold values from 0 to 5, got 7",
    ),
    "table-rows": (
        {"block_table": int32(3, 5, 1).view(1, 3), "cache_batch_idx": None},
        "block_table must have a row for each of the 2 sequences of q, got 1",
    ),
    "cos-alone": ({"rotary_sin": None}, "rotary_sin must be given with rotary_cos"),
    "cos-without-k": ({"k": None, "v": None}, "k must be given with rotary_cos"),
    "cos-short": (
        {"rotary_cos": torch.zeros(23, 4), "rotary_sin": torch.zeros(23, 4)},
        "rotary_cos must have a row for each position that the cache has room for, 24, got 23",
    ),
    "cos-wide": (
        {"rotary_cos": torch.zeros(24, 9), "rotary_sin": torch.zeros(24, 9)},
        "rotary_cos must have at most half as many columns as q has",
    ),
    "sin-shape": ({"rotary_sin": torch.zeros(24, 3)}, "rotary_sin must have shape"),
    "slopes-shape": ({"alibi_slopes": torch.rand(3)}, r"alibi_slopes must have shape \(H,\)"),
    "slopes-dtype": ({"alibi_slopes": torch.rand(4).half()}, "alibi_slopes must have dtype"),
    "scale": ({"softmax_scale": float("nan")}, "softmax_scale must be a finite number"),
    "softcap": ({"softcap": -1.0}, "softcap must be a finite number, 0 or more"),
    "window": ({"window_size": (1, 2, 3)}, "window_size must be two integers"),
    "splits": ({"num_splits": 300}, "num_splits must be an integer from 0 to 256, got 300"),
    "splits-type": ({"num_splits": 1.5}, "num_splits must be an integer from 0 to 256"),
    "gradient": (
        {"q": torch.zeros(2, 3, 4, 16, requires_grad=True)},
        "q must not require a gradient",
    ),
}


@pytest.mark.parametrize("changes, message", [*BAD.values()], ids=[*BAD])
def test_bad_arguments_are_named(changes, message):
    inputs = arguments(**changes)
    cache = inputs["v_cache"].clone()
    with pytest.raises(ValueError, match=message):
        flash_attn_with_kvcache(**inputs)
    assert torch.equal(inputs["v_cache"], cache)  # nothing was written before the error


def test_too_many_new_tokens_are_refused():
    tokens = torch.zeros(2, 25, 2, 16)
    with pytest.raises(ValueError, match="k must have at most as many tokens as the cache has"):
        flash_attn_with_kvcache(**arguments(k=tokens, v=tokens))


def test_an_integer_length_is_that_length_everywhere():
    inputs = arguments(cache_seqlens=int32(9, 9))
    copies = {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    expected = flash_attn_with_kvcache(**inputs)
    actual = flash_attn_with_kvcache(**copies | {"cache_seqlens": 9})
    assert torch.equal(actual, expected)
    assert torch.equal(copies["k_cache"], inputs["k_cache"])


def test_without_lengths_every_slot_holds_a_key():
    q, cache = torch.randn(2, 1, 4, 16), torch.randn(2, 8, 2, 16)
    full = flash_attn_with_kvcache(q, cache, cache, cache_seqlens=8)
    assert torch.equal(flash_attn_with_kvcache(q, cache, cache), full)


def test_a_window_may_be_a_tensor():
    q, cache = torch.randn(2, 5, 4, 16), torch.randn(2, 8, 2, 16)
    expected = flash_attn_with_kvcache(q, cache, cache, window_size=(3, 1))
    window = torch.tensor([3, 1])
    assert torch.equal(flash_attn_with_kvcache(q, cache, cache, window_size=window), expected)


@pytest.mark.parametrize("shape", [(0, 3, 4, 16), (2, 0, 4, 16)], ids=str)
def test_no_queries(shape):
    cache = torch.randn(2, 8, 2, 16)
    seqlens = torch.zeros(shape[0], dtype=torch.int32)
    out, lse = flash_attn_with_kvcache(
        torch.zeros(shape), cache, cache, cache_seqlens=seqlens, return_softmax_lse=True
    )
    assert out.shape == shape
    assert lse.shape == (shape[0], 4, shape[1])


# --- torch around it ------------------------------------------------------------------------------


def operator_arguments():
    inputs = arguments()
    rotary = (inputs["rotary_cos"], inputs["rotary_sin"], True)
    cache = (inputs["cache_seqlens"], 0, *(inputs[n] for n in ("cache_batch_idx",)))
    cache = (*cache, inputs["cache_leftpad"], inputs["block_table"])
    caches = (inputs["k_cache"], inputs["v_cache"])
    return inputs, caches, rotary, cache


def test_attention_passes_opcheck():
    inputs, caches, rotary, cache = operator_arguments()
    tail = (inputs["alibi_slopes"], 3, 0.3, 5, 0, 2.0, 0, "auto")
    args = (inputs["q"], *caches, *rotary, *cache, *tail)
    torch.library.opcheck(kvcache_ops.attention.overload, args)


def test_append_passes_opcheck():
    inputs, caches, rotary, cache = operator_arguments()
    args = (inputs["k"], inputs["v"], *caches, *rotary, *cache, "auto")
    torch.library.opcheck(kvcache_ops.append.overload, args)


def test_append_declares_what_it_changes():
    schema = kvcache_ops.append.overload._schema.arguments
    written = [a.name for a in schema if a.alias_info is not None and a.alias_info.is_write]
    assert written == ["k_cache", "v_cache"]


def test_operators_refuse_gradients():
    inputs, caches, rotary, cache = operator_arguments()
    args = (*caches, *rotary, *cache, None, 3, 0.3, 5, 0, 2.0, 0, "auto")
    with pytest.raises(UnsupportedProblemError, match="no backward pass"):
        kvcache_ops.attention(inputs["q"].requires_grad_(), *args)


def test_a_step_compiles_as_one_graph_of_any_size():
    def step(q, k, v, k_cache, v_cache, seqlens):
        out, lse = flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=seqlens, causal=True, return_softmax_lse=True
        )
        return out * 2, lse

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for new, seqlens in ((2, int32(3, 0, 9)), (3, int32(7, 1, 2)), (3, 5), (3, 6)):
        q, (k, v) = torch.randn(3, new, 4, 16), torch.randn(2, 3, new, 2, 16).unbind(0)
        caches = [torch.randn(3, 20, 2, 16) for _ in range(2)]
        copies = [cache.clone() for cache in caches]
        actual = compiled(q, k, v, *caches, seqlens)
        torch.testing.assert_close(actual, step(q, k, v, *copies, seqlens))
        torch.testing.assert_close(caches, copies)


@pytest.mark.parametrize("page_size", [None, 4])
def test_unchecked_lengths_of_compiled_steps_are_cut(page_size):
    """Nobody reads values while a graph is traced: what is below 0 counts as 0."""

    def step(q, k_cache, v_cache, seqlens, leftpad, table):
        return flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=seqlens, cache_leftpad=leftpad, block_table=table
        )

    torch._dynamo.reset()
    shape = (2, 8, 2, 16) if page_size is None else (4, page_size, 2, 16)
    caches, table = torch.randn(2, *shape), None if page_size is None else int32(0, 1, 2, 3)
    table = None if table is None else table.view(2, 2)
    q = torch.randn(2, 1, 4, 16)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    actual = compiled(q, *caches, int32(-1, 11), int32(0, -3), table)
    expected = step(q, *caches, int32(0, 8), int32(0, 0), table)
    torch.testing.assert_close(actual, expected)


def test_a_step_exports():
    class Step(torch.nn.Module):
        def forward(self, q, k_cache, v_cache, seqlens):
            return flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=seqlens, causal=True)

    args = (torch.randn(2, 1, 4, 16), *torch.randn(2, 2, 9, 2, 16).unbind(0), int32(4, 9))
    program = torch.export.export(Step(), args)
    torch.testing.assert_close(program.module()(*args), Step()(*args))


def test_a_step_that_appends_exports():
    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("k_cache", "v_cache"):
                self.register_buffer(name, torch.zeros(2, 9, 2, 16))

        def forward(self, q, k, v, seqlens):
            return flash_attn_with_kvcache(
                q, self.k_cache, self.v_cache, k, v, cache_seqlens=seqlens, causal=True
            )

    args = (torch.randn(2, 1, 4, 16), *torch.randn(2, 2, 1, 2, 16).unbind(0), int32(4, 0))
    exported, step = torch.export.export(Step(), args).module(), Step()
    torch.testing.assert_close(exported(*args), step(*args))
    torch.testing.assert_close(dict(exported.named_buffers()), dict(step.named_buffers()))
    assert step.k_cache[0, 4].count_nonzero() > 0


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_reads_a_cache_and_refuses_to_write_one():
    q, cache = torch.randn(3, 2, 1, 4, 16), torch.randn(3, 2, 9, 2, 16)
    k = torch.randn(2, 1, 2, 16)

    def read(q, cache):
        return flash_attn_with_kvcache(q, cache, cache, cache_seqlens=5)

    expected = torch.stack([read(*parts) for parts in zip(q, cache, strict=True)])
    torch.testing.assert_close(torch.vmap(read)(q, cache), expected)
    with pytest.raises(RuntimeError, match="not implemented for attn_flash::append_to_kvcache"):
        torch.vmap(lambda q, c: flash_attn_with_kvcache(q, c, c, k, k, cache_seqlens=5))(q, cache)


def test_tokens_one_after_another_are_all_at_once():
    """A loop that generates text: a prompt, then a token at a time, as a whole sequence at once."""
    B, S, H, H_KV, D, prompt = 2, 23, 6, 2, 32, 9
    q, k, v = (torch.randn(B, S, heads, D) for heads in (H, H_KV, H_KV))
    angles = torch.outer(torch.arange(64.0), 10000 ** (-torch.arange(16) / 16))
    rotary = (angles.cos(), angles.sin())
    options = {"causal": True, "window_size": (7, -1), "rotary_interleaved": False}
    pages = torch.randperm(16).view(2, 8).to(torch.int32)
    caches = torch.full((2, 16, 8, H_KV, D), torch.nan).unbind(0)
    outs = []
    seqlens = int32(0, 0)
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, S))]:
        q_new, k_new, v_new = (x[:, start:stop] for x in (q, k, v))
        outs.append(
            flash_attn_with_kvcache(
                q_new, *caches, k_new, v_new, *rotary, seqlens, block_table=pages, **options
            )
        )
        seqlens += stop - start
    q, k = (apply_rotary_emb(x, *rotary) for x in (q, k))
    expected = flash_attn_func(q, k, v, causal=True, window_size=(7, -1))
    torch.testing.assert_close(torch.cat(outs, 1), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "k", "v", "rotary_cos"])
def test_strides_do_not_matter(name):
    inputs = arguments()
    expected = flash_attn_with_kvcache(**arguments())
    inputs[name] = inputs[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    assert inputs[name].stride(-1) != 1
    torch.testing.assert_close(flash_attn_with_kvcache(**inputs), expected)


# --- fuzz -----------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    """Any sizes and options; lengths may be more than fits."""
    page = draw(st.sampled_from((0, 1, 3, 16)))
    new = draw(st.integers(0, 4))
    D = draw(st.integers(1, 24))
    heads_kv = draw(st.integers(1, 3))
    window = st.integers(-1, 40)
    return KVCacheCase(
        tuple(draw(st.lists(st.integers(0, 34), min_size=1, max_size=3))),
        M=draw(st.integers(1, 6)),
        new=new,
        H=heads_kv * draw(st.integers(1, 3)),
        H_KV=heads_kv,
        D=D,
        D_v=draw(st.integers(1, 24)),
        capacity=-(-32 // max(page, 1)) * max(page, 1),
        page=page,
        rotary=2 * draw(st.integers(0, D // 2)) if new else 0,
        interleaved=draw(st.booleans()),
        causal=draw(st.booleans()),
        window=(draw(window), draw(window)),
        softcap=draw(st.sampled_from((0.0, 2.0))),
        alibi=draw(st.booleans()),
        batch_idx=draw(st.booleans()),
        leftpad=draw(st.booleans()),
        splits=draw(st.integers(0, 5)),
        scale=draw(st.sampled_from((None, 0.7, -0.3, 0.0))),
    )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(problems())
def test_any_call_is_right_or_refused(case):
    too_long = max(case.lens) + case.new > case.capacity
    rotated_to = max(case.lens) + case.M if case.rotary else 0
    if too_long:
        case = case._replace(leftpad=False)
        inputs = case._replace(lens=(0,) * len(case.lens)).inputs(torch.float32, CPU)
        inputs["cache_seqlens"] = int32(*case.lens)
        with pytest.raises(ValueError, match="cache_seqlens must hold values from 0 to"):
            flash_attn_with_kvcache(**inputs, **case.options())
    elif rotated_to <= case.capacity:
        check(case)
