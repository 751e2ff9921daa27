from __future__ import annotations

import functools
import sys
import types
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from attn_core import UnsupportedProblemError
from attn_flash.reference import visible
from benchmarks import checking
from benchmarks.problems import Case, load
from benchmarks.providers import flash
from benchmarks.providers.base import PASSES, error_limit


def make_case(window=(-1, -1), causal=False, passes=PASSES, **sizes):
    sizes = {"B": 1, "H": 2, "H_KV": 2, "M": 8, "N": 8, "D": 4} | sizes
    sizes |= {"window": list(window), "causal": causal}
    return Case("case", "attn-flash", torch.float32, passes, "test", sizes)


@pytest.mark.parametrize(
    "sizes",
    [
        {"M": 7, "N": 11, "window": (2, 1)},
        {"M": 11, "N": 7, "causal": True},
        {"M": 9, "N": 9, "causal": True, "window": (3, 0)},
        {"M": 5, "N": 6},
        {"M": 6, "N": 5, "window": (-1, 2)},
    ],
    ids=str,
)
def test_pairs_are_those_the_operator_sees(sizes):
    case = make_case(**sizes)
    mask = visible(case["M"], case["N"], flash.window(case), torch.device("cpu"))
    expected = case["M"] * case["N"] if mask is None else int(mask.sum())
    assert flash.visible_pairs(case) == expected


def test_causal_self_attention_counts_half():
    full, causal = make_case(M=4096, N=4096), make_case(M=4096, N=4096, causal=True)
    assert flash.flops(full, "forward") == 4 * 2 * 4096 * 4096 * 4
    assert flash.flops(causal, "forward") == flash.flops(full, "forward") / 2
    assert flash.flops(full, "backward") == 2.5 * flash.flops(full, "forward")
    assert flash.flops(full, "host") is None


def test_traffic_counts_each_tensor_once():
    case = make_case(B=3, H=4, H_KV=2, M=5, N=7, D=8)
    queries, keys = 3 * 5 * 4 * 8, 3 * 7 * 2 * 8
    assert flash.traffic(case, "forward") == 4 * (2 * queries + 2 * keys)
    assert flash.traffic(case, "backward") == 4 * (4 * queries + 4 * keys)


@pytest.mark.parametrize("case", load("attn-flash", "test"), ids=lambda case: case.id)
def test_reference_agrees_with_autograd(case):
    inputs = flash.make_inputs(case, torch.device("cpu"))
    q, k, v, dout = (tensor.double() for tensor in inputs)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    group = case["H"] // case["H_KV"]
    heads = [q, *(tensor.repeat_interleave(group, 2) for tensor in (k, v))]
    mask = visible(case["M"], case["N"], flash.window(case), q.device)
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in heads), attn_mask=mask)
    out = out.transpose(1, 2)
    grads = torch.autograd.grad(out, leaves, dout)
    expected = flash.reference(case, inputs, gradients=True)
    assert [one.name for one in expected] == ["out", "dq", "dk", "dv"]
    for one, actual in zip(expected, (out, *grads), strict=True):
        torch.testing.assert_close(one.part(actual), one.value, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    "backend, sizes, reason",
    [
        ("EFFICIENT_ATTENTION", {"H": 4, "H_KV": 2}, "it has no shared key heads"),
        ("CUDNN_ATTENTION", {}, "it takes float16 and bfloat16 alone"),
        ("FLASH_ATTENTION", {}, "it takes float16 and bfloat16 alone"),
    ],
)
def test_kernels_that_torch_does_not_have_are_unsupported(backend, sizes, reason):
    with pytest.raises(UnsupportedProblemError, match=reason):
        flash._require_kernel(backend, make_case(**sizes), torch.device("cuda"))


def test_large_problems_are_checked_in_the_corners():
    part = flash.checked_part(make_case(B=4, H=32, H_KV=8, M=8192, N=8192))
    assert part.batches == [0, 3]
    assert part.heads_kv == [0, 7]
    tensor = torch.arange(32)[None, None, :, None].expand(4, 1, 32, 1)
    assert part.queries(tensor)[0, 0, :, 0].tolist() == [0, 1, 2, 3, 28, 29, 30, 31]


def fa4(q, k, v, causal, window_size):
    left, right = (-1 if side is None else side for side in window_size)
    mask = visible(q.shape[1], k.shape[1], (left, 0 if causal else right), q.device)
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True
    )
    return out.transpose(1, 2), None


def ragged_fa4(q, k, v, causal, window_size, **bounds):
    starts = bounds["cu_seqlens_q"].tolist()
    assert bounds["cu_seqlens_k"].tolist() == starts
    lengths = [stop - start for start, stop in pairwise(starts)]
    assert bounds["max_seqlen_q"] == bounds["max_seqlen_k"] == max(lengths)
    parts = zip(*(x[None].split(lengths, 1) for x in (q, k, v)), strict=True)
    return torch.cat([fa4(*part, causal, window_size)[0] for part in parts], 1)[0], None


def aule(q, k, v, causal):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


@pytest.fixture
def peers(monkeypatch):
    cute = types.SimpleNamespace(flash_attn_func=fa4, flash_attn_varlen_func=ragged_fa4)
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    module = types.SimpleNamespace(flash_attention=aule, get_available_backends=lambda: ["triton"])
    monkeypatch.setitem(sys.modules, "aule", module)
    return module


PREPARE = {
    "fa4": flash._flash4,
    "aule": flash._aule,
    "sdpa": lambda case, inputs: flash._sdpa("", case, inputs),
    "pinned": lambda case, inputs: flash._sdpa("FLASH_ATTENTION", case, inputs),
}


@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize("name", PREPARE)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_each_peer_is_called_rightly(name, causal):
    case = make_case(B=2, H=4, H_KV=2, M=33, N=33, D=16, causal=causal)
    inputs = flash.make_inputs(case, torch.device("cpu"))
    expected = flash.reference(case, inputs, gradients=True)
    call = PREPARE[name](case, inputs)
    out, error = checking.check_forward(call, expected[0], grad=True)
    assert error < error_limit(torch.float32)
    assert checking.check_backward(call, out, expected[1:]) < error_limit(torch.float32)


RAGGED = {"B": 1, "H": 4, "H_KV": 2, "M": 33, "N": 33, "D": 16, "lengths": [17, 1, 15]}


@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize("prepare", [flash._flash4, functools.partial(flash._ours, "torch")])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_ragged_sequences(prepare, causal):
    case = make_case(causal=causal, **RAGGED)
    inputs = flash.make_inputs(case, torch.device("cpu"))
    expected = flash.reference(case, inputs, gradients=True)
    parts = zip(*(x.split(case["lengths"], 1) for x in inputs), strict=True)
    for part, out in zip(parts, expected[0].value.split(case["lengths"], 1), strict=True):
        own = make_case(causal=causal, **RAGGED | {"M": out.shape[1], "N": out.shape[1]})
        del own.sizes["lengths"]
        alone = flash.reference(own, flash.Inputs(*part), gradients=False)[0].value
        torch.testing.assert_close(out, alone)
    call = prepare(case, inputs)
    out, error = checking.check_forward(call, expected[0], grad=True)
    assert error < error_limit(torch.float32)
    assert checking.check_backward(call, out, expected[1:]) < error_limit(torch.float32)


def test_ragged_sequences_count_their_own_scores():
    assert flash.visible_pairs(make_case(**RAGGED)) == 17**2 + 1 + 15**2
    assert flash.visible_pairs(make_case(causal=True, **RAGGED)) == (17**2 + 1 + 15**2) / 2


def test_flex_sees_no_other_sequence():
    mask_mod = flash._mask_mod(make_case(**RAGGED), torch.device("cpu"))
    i = torch.arange(33)
    seen = mask_mod(0, 0, i[:, None], i)
    assert seen.equal(torch.block_diag(*(torch.ones(n, n) for n in RAGGED["lengths"])).bool())


@pytest.mark.usefixtures("peers")
def test_fa4_gets_open_sides_as_none():
    case = make_case(H=2, M=33, N=33, causal=True, window=(5, 0))
    inputs = flash.make_inputs(case, torch.device("cpu"))
    (expected,) = flash.reference(case, inputs, gradients=False)
    _, error = checking.check_forward(flash._flash4(case, inputs), expected, grad=True)
    assert error < error_limit(torch.float32)


def test_peers_refuse_what_they_would_compute_wrongly(peers):
    inputs = flash.make_inputs(make_case(), torch.device("cpu"))
    with pytest.raises(ValueError, match="no sliding window"):
        flash._aule(make_case(window=(2, 0)), inputs)
    for prepare in (flash._aule, functools.partial(flash._sdpa, "CUDNN_ATTENTION")):
        with pytest.raises(ValueError, match="no ragged sequences"):
            prepare(make_case(lengths=[3, 5]), inputs)
    with pytest.raises(ValueError, match="top left"):
        flash._sdpa("", make_case(causal=True, M=3), inputs)
    peers.get_available_backends = lambda: ["cpu"]
    with pytest.raises(RuntimeError, match="would compute on the CPU"):
        flash._aule(make_case(), inputs)
