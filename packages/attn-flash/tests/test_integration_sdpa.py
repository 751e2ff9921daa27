"""torch's scaled_dot_product_attention with this package behind it."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from attn_flash import BackendUnavailableError, explain, install, sdpa_patched, uninstall
from attn_flash.integrations import sdpa

ORIGINAL = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def clean():
    yield
    uninstall()
    assert F.scaled_dot_product_attention is ORIGINAL


@pytest.fixture
def calls(monkeypatch):
    """Problems that reach this package, as the shapes of their queries."""
    seen = []
    attend = sdpa.attend

    def record(q, *args, **options):
        seen.append(tuple(q.shape))
        return attend(q, *args, **options)

    monkeypatch.setattr(sdpa, "attend", record)
    return seen


def inputs(*shape, len_k=None, heads_kv=None, dtype=torch.float32):
    *batch, heads, len_q, dim = shape
    kv = (*batch, heads_kv or heads, len_k or len_q, dim)
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in (shape, kv, kv)]


def check(q, k, v, **options):
    """The replacement's outputs and gradients are torch's."""
    tensors = [q, k, v]
    mask = options.get("attn_mask")
    if type(mask) is torch.Tensor and mask.requires_grad:
        tensors.append(mask)
    expected = ORIGINAL(q, k, v, **options)
    with sdpa_patched():
        actual = F.scaled_dot_product_attention(q, k, v, **options)
    tolerance = {"atol": 2e-5, "rtol": 2e-5}
    torch.testing.assert_close(actual, expected, **tolerance)
    dout = torch.randn_like(expected)
    grads = [torch.autograd.grad(out, tensors, dout) for out in (actual, expected)]
    torch.testing.assert_close(*grads, **tolerance)


@pytest.mark.parametrize(
    "shape", [(3, 9, 16), (2, 3, 9, 16), (2, 2, 3, 9, 16)], ids=["3d", "4d", "5d"]
)
@pytest.mark.parametrize("len_k", [5, 9, 14])
@pytest.mark.parametrize("is_causal", [False, True])
def test_ranks_lengths_and_causality(is_causal, len_k, shape, calls):
    check(*inputs(*shape, len_k=len_k), is_causal=is_causal, scale=0.3)
    assert len(calls) == 1


@pytest.mark.parametrize("shape", [(6, 9, 16), (2, 6, 9, 16), (2, 2, 6, 9, 16)], ids=len)
def test_grouped_heads(shape, calls):
    check(*inputs(*shape, heads_kv=2), enable_gqa=True)
    assert len(calls) == 1


MASKS = {
    "2d": lambda: torch.randn(9, 12),
    "keys": lambda: torch.randn(1, 12),
    "batch": lambda: torch.randn(2, 1, 1, 12),
    "heads": lambda: torch.randn(3, 9, 12),
    "full": lambda: torch.randn(2, 3, 9, 12, requires_grad=True),
    "broadcast-gradient": lambda: torch.randn(1, 3, 1, 12, requires_grad=True),
    "bool": lambda: torch.rand(2, 1, 9, 12) > 0.3,
    "padding": lambda: (torch.arange(12) < torch.tensor([4, 12])[:, None])[:, None, None],
}


@pytest.mark.parametrize("mask", [*MASKS.values()], ids=[*MASKS])
def test_masks(mask, calls):
    check(*inputs(2, 3, 9, 16, len_k=12), attn_mask=mask())
    assert len(calls) == 1


@pytest.mark.parametrize("shape", [(9, 12), (1, 2, 1, 9, 12), (2, 1, 3, 1, 12)], ids=str)
def test_masks_of_five_dimensions(shape, calls):
    check(*inputs(2, 2, 3, 9, 16, len_k=12), attn_mask=torch.randn(shape))
    assert len(calls) == 1


def test_a_row_without_keys_is_zero(calls):
    mask = torch.ones(9, 9, dtype=torch.bool)
    mask[4] = False
    q, k, v = inputs(2, 3, 9, 16)
    with sdpa_patched():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert out[:, :, 4].eq(0).all()
    assert len(calls) == 1


@pytest.mark.parametrize("bias", [causal_lower_right, causal_upper_left])
def test_causal_biases_of_torch(bias, calls):
    check(*inputs(2, 3, 6, 16, len_k=9), attn_mask=bias(6, 9))
    assert len(calls) == 1


def test_dropout_keeps_the_mean(calls):
    q, k, v = (x.detach() for x in inputs(2, 3, 64, 16))
    v = v.abs()
    expected = ORIGINAL(q, k, v)
    with sdpa_patched():
        torch.manual_seed(0)
        first = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)
        torch.manual_seed(0)
        second = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)
    assert torch.equal(first, second)
    assert (first - expected).abs().max() > 0.05
    assert abs(first.mean() / expected.mean() - 1) < 0.05
    assert len(calls) == 2


def test_autocast_casts_as_torch_does(calls):
    q, k, v = inputs(2, 3, 9, 16)
    with sdpa_patched(), torch.autocast("cpu", torch.bfloat16):
        out = F.scaled_dot_product_attention(q, k, v.bfloat16())
    assert out.dtype == torch.bfloat16
    assert len(calls) == 1


def test_an_attention_layer_runs_here(calls):
    layer = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 7, 32)
    expected = layer(x, x, x, need_weights=False)[0]
    with sdpa_patched():
        torch.testing.assert_close(layer(x, x, x, need_weights=False)[0], expected)
    assert len(calls) == 1


REFUSED = {
    "dims": (lambda: [torch.zeros(9, 16)] * 3, {}, "query has 2 dimensions, not 3 to 5"),
    "dtypes": (
        lambda: [torch.zeros(1, 2, 9, 16), *[torch.zeros(1, 2, 9, 16).double()] * 2],
        {},
        "different dtypes",
    ),
    "wide": (lambda: [torch.zeros(1, 2, 9, 300)] * 3, {}, "between 1 and 256, got 300"),
    "heads": (
        lambda: [torch.zeros(1, 4, 9, 16), *[torch.zeros(1, 2, 9, 16)] * 2],
        {},
        "different numbers of heads without enable_gqa",
    ),
    "both": (
        lambda: [torch.zeros(1, 2, 9, 16)] * 3,
        {"attn_mask": torch.zeros(9, 9), "is_causal": True},
        "attn_mask and is_causal are both given",
    ),
    "mask-shape": (
        lambda: [torch.zeros(1, 2, 9, 16)] * 3,
        {"attn_mask": torch.zeros(9, 8)},
        "does not broadcast",
    ),
    "mask-dtype": (
        lambda: [torch.zeros(1, 2, 9, 16)] * 3,
        {"attn_mask": torch.zeros(9, 9).int()},
        "attn_mask has dtype torch.int32",
    ),
    "batches": (
        lambda: [torch.zeros(1, 2, 9, 16), *[torch.zeros(3, 2, 9, 16)] * 2],
        {},
        "batch dimensions of query, key and value differ",
    ),
    "nested": (
        lambda: [torch.nested.nested_tensor([torch.zeros(2, 3, 8)], layout=torch.jagged)] * 3,
        {},
        "subclass of Tensor",
    ),
}


@pytest.mark.parametrize("make, options, reason", [*REFUSED.values()], ids=[*REFUSED])
def test_the_rest_goes_to_torch_and_explain_says_why(make, options, reason, monkeypatch):
    q, k, v = make()
    answer = explain(q, k, v, **options)
    assert answer.startswith("torch: ")
    assert reason in answer
    reached = []
    with sdpa_patched(), monkeypatch.context() as patch:
        patch.setattr(sdpa, "_original", lambda *args, **kwargs: reached.append(kwargs))
        F.scaled_dot_product_attention(q, k, v, **options)
    assert len(reached) == 1


def test_explain_computes_nothing(calls):
    q, k, v = inputs(2, 3, 9, 16)
    state = torch.get_rng_state()
    assert explain(q, k, v, torch.randn(9, 9)) == "attn_flash"
    torch.set_rng_state(state)
    assert explain(q, k, v, dropout_p=0.5) == "attn_flash"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_functorch_goes_to_torch():
    q, k, v = (torch.randn(3, 2, 2, 5, 16) for _ in range(3))
    expected = torch.vmap(ORIGINAL)(q, k, v)
    with sdpa_patched():
        actual = torch.vmap(F.scaled_dot_product_attention)(q, k, v)
    torch.testing.assert_close(actual, expected)


def test_install_and_uninstall(calls):
    q, k, v = inputs(2, 3, 9, 16)
    install()
    install("torch")
    F.scaled_dot_product_attention(q, k, v)
    assert (len(calls), sdpa.is_installed()) == (1, True)
    uninstall()
    uninstall()
    assert F.scaled_dot_product_attention is ORIGINAL
    assert not sdpa.is_installed()


def test_contexts_nest_and_installation_outlives_them(calls):
    q, k, v = inputs(2, 3, 9, 16)
    with sdpa_patched(), sdpa_patched("torch"):
        F.scaled_dot_product_attention(q, k, v)
        install()
    F.scaled_dot_product_attention(q, k, v)
    assert len(calls) == 2
    with sdpa_patched():
        uninstall()
        F.scaled_dot_product_attention(q, k, v)
    assert len(calls) == 3
    F.scaled_dot_product_attention(q, k, v)
    assert len(calls) == 3


def test_a_context_ends_with_its_error():
    with pytest.raises(KeyError), sdpa_patched():
        raise KeyError
    assert not sdpa.is_installed()


def test_a_context_is_its_thread_s_own(calls):
    q, k, v = inputs(2, 3, 9, 16)
    inside, done = threading.Barrier(2, timeout=30), threading.Barrier(2, timeout=30)

    def patched():
        with sdpa_patched():
            inside.wait()
            F.scaled_dot_product_attention(q, k, v)
            done.wait()

    thread = threading.Thread(target=patched)
    thread.start()
    inside.wait()
    F.scaled_dot_product_attention(q[:1], k[:1], v[:1])
    done.wait()
    thread.join()
    assert calls == [(2, 9, 3, 16)]


def test_many_threads_leave_nothing_behind():
    def work():
        for _ in range(200):
            with sdpa_patched():
                assert sdpa.is_installed()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert F.scaled_dot_product_attention is ORIGINAL


@pytest.mark.parametrize("use", [install, lambda name: sdpa_patched(name).__enter__()])
def test_unknown_backends_are_named(use):
    with pytest.raises(BackendUnavailableError, match="backend must be one of .*, got 'nothing'"):
        use("nothing")


def test_a_compiled_function_keeps_one_graph(calls):
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) * 2

    q, k, v = inputs(2, 3, 9, 16)
    torch._dynamo.reset()
    with sdpa_patched():
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        actual = compiled(q, k, v)
    torch.testing.assert_close(actual, ORIGINAL(q, k, v, is_causal=True) * 2)
