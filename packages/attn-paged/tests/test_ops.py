"""The operators as torch sees them: opcheck, torch.compile, what they refuse."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attn_core import backends
from attn_paged import UnsupportedProblemError, _torch, append_to_cache, ops, paged_attention
from attn_paged.options import AppendOptions
from attn_paged.reference import append_to_cache as append_reference


def cache_of(num_blocks=6, block_size=4):
    k_cache, v_cache = torch.randn(2, num_blocks, block_size, 2, 8).unbind(0)
    return k_cache.clone(), v_cache.clone()


def attention_args(*, is_ragged):
    tables = torch.tensor([[4, 1], [0, 3]], dtype=torch.int32)
    lens = torch.tensor([6, 3], dtype=torch.int32)
    bounds = torch.tensor([0, 3, 4], dtype=torch.int32) if is_ragged else None
    q = torch.randn(4 if is_ragged else 2, 4, 8)
    extras = (None,) * 7
    if is_ragged:
        is_causal, tree = torch.tensor([True, False]), torch.ones(10, dtype=torch.bool)
        extras = (bounds, torch.rand(4), torch.randn(4), None, None, is_causal, tree)
    return (q, *cache_of(), tables, lens, *extras, 0.3, 5, 0, 2.0, False, False, "auto")


NO_OPTIONS = (None, None, None, None, None, False)


@pytest.mark.parametrize("is_ragged", [False, True], ids=["decode", "ragged"])
def test_attention_passes_opcheck(is_ragged):
    torch.library.opcheck(ops.attention.overload, attention_args(is_ragged=is_ragged))


def test_append_passes_opcheck():
    k, v = torch.randn(2, 3, 2, 8).unbind(0)
    args = (k.clone(), v.clone(), *cache_of(), torch.tensor([5, -1, 23]), *NO_OPTIONS, "auto")
    torch.library.opcheck(ops.append_to_cache.overload, args)


def test_quantising_append_passes_opcheck():
    k, v = torch.randn(2, 3, 2, 8).unbind(0)
    caches = [torch.zeros(6, 4, 2, 8, dtype=torch.int8) for _ in range(2)]
    scales = [torch.ones(6, 4, 2) for _ in range(2)]
    angles = [torch.rand(9, 4) for _ in range(2)]
    slots, positions = torch.tensor([5, -1, 23]), torch.tensor([3, 99, 8])
    args = (k.clone(), v.clone(), *caches, slots, *scales, *angles, positions, False, "auto")
    torch.library.opcheck(ops.append_to_cache.overload, args)


def test_append_declares_what_it_changes():
    arguments = ops.append_to_cache.overload._schema.arguments
    written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == ["k_cache", "v_cache", "k_scale", "v_scale"]


def separate(caches):
    return caches


def packed(caches):
    return torch.cat(caches, dim=-1).split(8, -1)


@pytest.mark.parametrize("views", [separate, packed])
def test_a_step_compiles_as_one_graph_of_any_size(views):
    def step(q, k, v, caches, slots, tables, lens, bounds):
        k_cache, v_cache = views(caches)
        append_to_cache(k, v, k_cache, v_cache, slots)
        out, lse = paged_attention(
            q, k_cache, v_cache, tables, lens, cu_seqlens_q=bounds, return_lse=True
        )
        return out, lse, k_cache.clone(), v_cache.clone()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 5):
        q, (k, v) = torch.randn(tokens, 4, 8), torch.randn(2, tokens, 2, 8).unbind(0)
        caches = cache_of()
        copies = tuple(cache.clone() for cache in caches)
        rest = (
            torch.arange(8, 8 + tokens),
            torch.tensor([[2, 3]], dtype=torch.int32),
            torch.tensor([tokens], dtype=torch.int32),
            torch.tensor([0, tokens], dtype=torch.int32),
        )
        actual = compiled(q, k, v, caches, *rest)
        torch.testing.assert_close(actual, step(q, k, v, copies, *rest))
        torch.testing.assert_close(caches, copies)


def test_operators_refuse_gradients():
    args = attention_args(is_ragged=False)
    with pytest.raises(UnsupportedProblemError, match="no backward pass"):
        torch.ops.attn_paged.attention(args[0].requires_grad_(), *args[1:])
    k, slots = torch.randn(1, 2, 8, requires_grad=True), torch.tensor([0])
    with pytest.raises(UnsupportedProblemError, match="no backward pass"):
        torch.ops.attn_paged.append_to_cache(k, k, *cache_of(), slots, *NO_OPTIONS, "auto")


def test_typical_problems_run_on_the_torch_backend():
    for op in (ops.ATTENTION, ops.APPEND):
        problem = backends.operators()[op](torch.device("cpu"))
        assert backends.resolve(op, problem) == "torch"


def slots_of(tokens, kept, num_slots=24):
    slots = torch.full((tokens,), -1)
    slots[:kept] = torch.randperm(num_slots)[:kept]
    return slots[torch.randperm(tokens)]


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("tokens, kept", [(0, 0), (1, 0), (4, 0), (5, 5), (9, 4), (24, 24)])
def test_append_writes_kept_tokens_and_nothing_else(tokens, kept, index_dtype):
    k, v = torch.randn(tokens, 2, 8), torch.randn(tokens, 2, 5)
    k_cache = torch.randn(6, 2, 4, 8).transpose(1, 2)
    v_cache = torch.full((6, 4, 2, 5), torch.nan)
    expected = [k_cache.clone(), v_cache.clone()]
    slots = slots_of(tokens, kept).to(index_dtype)
    append_reference(k, v, *expected, slots, AppendOptions())
    assert append_to_cache(k, v, k_cache, v_cache, slots) is None
    assert torch.equal(k_cache, expected[0])
    assert torch.equal(v_cache.nan_to_num(7.0), expected[1].nan_to_num(7.0))


def test_append_writes_through_packed_views():
    packed = torch.zeros(6, 4, 2, 16)
    k, v = torch.randn(2, 3, 2, 8).unbind(0)
    append_to_cache(k, v, *packed.split(8, -1), torch.tensor([7, -1, 0]))
    assert torch.equal(packed[1, 3], torch.cat([k[0], v[0]], dim=-1))
    assert torch.equal(packed[0, 0], torch.cat([k[2], v[2]], dim=-1))
    assert packed.count_nonzero() == 2 * 2 * 16


def test_append_reads_nothing_back_from_a_device():
    caches = (cache.to("meta") for cache in cache_of())
    k = torch.zeros(3, 2, 8, device="meta")
    slots = torch.zeros(3, dtype=torch.int64, device="meta")
    _torch.append_to_cache(k, k, *caches, slots, AppendOptions())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"k": torch.zeros(3, 2, 7)}, r"k must have shape \(T, H_KV, D\) = \(3, 2, 8\)"),
        ({"v": torch.zeros(2, 2, 8)}, r"v must have shape \(T, H_KV, D_v\) = \(3, 2, 8\)"),
        ({"v": torch.zeros(3, 2, 8).half()}, "v must have the dtype of k"),
        ({"slot_mapping": torch.zeros(2).long()}, r"slot_mapping must have shape \(T,\) = \(3,\)"),
        ({"slot_mapping": torch.zeros(3)}, "slot_mapping must have dtype int64, int32"),
        ({"k": torch.zeros(3, 2, 8, requires_grad=True)}, "k must not require a gradient"),
        (
            {"rotary_cos": torch.zeros(9, 4)},
            "given together, got None for rotary_sin and positions",
        ),
        (
            {"k_cache": torch.zeros(6, 4, 2, 8).char(), "v_cache": torch.zeros(6, 4, 2, 8).char()},
            "k_scale must be given where the cache is torch.int8",
        ),
    ],
    ids=["k", "v", "dtype", "slots", "slot-dtype", "gradient", "rotary", "scale"],
)
def test_append_names_bad_arguments(changes, message):
    k_cache, v_cache = cache_of()
    arguments = {
        "k": torch.zeros(3, 2, 8),
        "v": torch.zeros(3, 2, 8),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "slot_mapping": torch.zeros(3).long(),
    }
    with pytest.raises(ValueError, match=message):
        append_to_cache(**{**arguments, **changes})


def test_import_needs_no_gpu_library():
    code = "import sys, attn_paged; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_readme_runs(capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    for block in blocks:
        exec(block, {})
    [printed] = re.findall(r"```text\n(.*?)```", readme, re.DOTALL)
    assert capsys.readouterr().out == printed
