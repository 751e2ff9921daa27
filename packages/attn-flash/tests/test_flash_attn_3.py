"""FlashAttention-3's arguments: the results are those of FlashAttention-2's functions."""

from __future__ import annotations

import inspect

import pytest
import torch

import attn_flash
from attn_flash import UnsupportedProblemError, compat, flash_attn_3

ARGUMENTS = {
    "flash_attn_func": """
        q k v softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk
        softcap num_splits pack_gqa deterministic sm_margin return_attn_probs
    """,
    "flash_attn_varlen_func": """
        q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q seqused_k softmax_scale
        causal qv q_descale k_descale v_descale window_size attention_chunk softcap num_splits
        pack_gqa deterministic sm_margin return_attn_probs
    """,
    "flash_attn_with_kvcache": """
        q k_cache v_cache k v qv rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad
        page_table cu_seqlens_q cu_seqlens_k_new max_seqlen_q rotary_seqlens q_descale k_descale
        v_descale softmax_scale causal window_size attention_chunk softcap rotary_interleaved
        scheduler_metadata num_splits pack_gqa sm_margin return_softmax_lse
    """,
}
BOUNDS = torch.tensor([0, 5, 12], dtype=torch.int32)


def inputs(*shape, heads_kv=2):
    kv = (*shape[:-2], heads_kv, shape[-1])
    return [torch.randn(size, requires_grad=True) for size in (shape, kv, kv)]


def check(actual, expected, tensors):
    torch.testing.assert_close(actual, expected)
    dout = torch.randn_like(expected)
    grads = [torch.autograd.grad(out, tensors, dout) for out in (actual, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name, names", [*ARGUMENTS.items()], ids=[*ARGUMENTS])
def test_arguments_are_in_their_order(name, names):
    assert [*inspect.signature(getattr(flash_attn_3, name)).parameters] == names.split()


def test_dense():
    q, k, v = inputs(2, 9, 4, 16)
    out, lse = flash_attn_3.flash_attn_func(
        q, k, v, 0.3, True, None, None, None, None, (5, -1), 0, 2.0, 3, True, return_attn_probs=True
    )
    expected, lse_expected, _ = attn_flash.flash_attn_func(
        q, k, v, 0.0, 0.3, True, (5, -1), 2.0, return_attn_probs=True
    )
    torch.testing.assert_close(lse, lse_expected)
    check(out, expected, (q, k, v))
    assert torch.equal(flash_attn_3.flash_attn_func(q, k, v), attn_flash.flash_attn_func(q, k, v))


def test_packed():
    qkv = torch.randn(2, 9, 8, 16, requires_grad=True)
    q, k, v = qkv.split((4, 2, 2), 2)
    out = flash_attn_3.flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=4)
    check(out, attn_flash.flash_attn_func(q, k, v, causal=True), (qkv,))
    qkv = torch.randn(2, 9, 3, 4, 16, requires_grad=True)
    out = flash_attn_3.flash_attn_qkvpacked_func(qkv, 0.2, window_size=(3, 0))
    check(out, attn_flash.flash_attn_func(*qkv.unbind(2), 0.0, 0.2, window_size=(3, 0)), (qkv,))


def test_ragged():
    q, k, v = inputs(12, 4, 16)
    used = torch.tensor([3, 7], dtype=torch.int32)
    places = (BOUNDS, BOUNDS, 7, 7)
    out = flash_attn_3.flash_attn_varlen_func(q, k, v, *places, None, used, causal=True)
    expected = attn_flash.flash_attn_varlen_func(q, k, v, *places, causal=True, seqused_k=used)
    check(out, expected, (q, k, v))


def test_cache():
    q, k, v = (x.detach() for x in inputs(2, 1, 4, 16))
    pages = torch.tensor([[3, 5, 1], [2, 0, 4]], dtype=torch.int32)
    caches = torch.randn(2, 6, 8, 2, 16)
    seqlens = torch.tensor([5, 20], dtype=torch.int32)
    copies = caches.clone()
    out, lse, *parts = flash_attn_3.flash_attn_with_kvcache(
        q, *caches.unbind(0), k, v, cache_seqlens=seqlens, page_table=pages, return_softmax_lse=True
    )
    expected = attn_flash.flash_attn_with_kvcache(
        q, *copies, k, v, cache_seqlens=seqlens, block_table=pages, return_softmax_lse=True
    )
    torch.testing.assert_close((out, lse), expected)
    assert torch.equal(caches, copies)
    assert parts == [None, None]


def test_parts_are_merged():
    q, k, v = (x.detach().requires_grad_() for x in inputs(2, 9, 4, 16))
    splits = zip(k.split(3, 1), v.split(3, 1), strict=True)
    states = [attn_flash.flash_attn_func(q, *kv, return_attn_probs=True)[:2] for kv in splits]
    outs = torch.stack([out for out, _ in states])
    lses = torch.stack([lse.transpose(1, 2) for _, lse in states])
    expected, lse_expected, _ = attn_flash.flash_attn_func(q, k, v, return_attn_probs=True)
    out, lse = flash_attn_3.flash_attn_combine(outs, lses)
    torch.testing.assert_close(lse, lse_expected.transpose(1, 2))
    check(out, expected, (q, k, v))
    into = torch.empty_like(expected, dtype=torch.float16).detach()
    half, _ = flash_attn_3.flash_attn_combine(outs.detach(), lses.detach(), into, torch.float16)
    assert half is into
    assert torch.equal(into, out.half())


def test_parts_without_keys_count_nothing():
    out, lse = torch.randn(2, 3, 5, 4, 8), torch.randn(2, 3, 5, 4)
    out[1], lse[1] = 0.0, -torch.inf
    out[0, 0, 0], lse[0, 0, 0] = 0.0, -torch.inf
    merged, merged_lse = flash_attn_3.flash_attn_combine(out, lse)
    torch.testing.assert_close((merged, merged_lse), (out[0], lse[0]))


@pytest.mark.parametrize(
    "name, extra",
    [
        *(("flash_attn_func", name) for name in ("qv", "q_descale", "k_descale", "v_descale")),
        *(("flash_attn_varlen_func", name) for name in ("qv", "seqused_q", "v_descale")),
        ("flash_attn_with_kvcache", "cu_seqlens_q"),
        ("flash_attn_with_kvcache", "cu_seqlens_k_new"),
        ("flash_attn_with_kvcache", "rotary_seqlens"),
    ],
)
def test_what_is_missing_is_refused(name, extra):
    tensors = [x.detach() for x in inputs(12, 4, 16)]
    places = (BOUNDS, BOUNDS, 7, 7) if "varlen" in name else ()
    tensors = tensors if places else [x[None] for x in tensors]
    function = getattr(flash_attn_3, name)
    with pytest.raises(UnsupportedProblemError, match=f"{extra} must be None, got Tensor"):
        function(*tensors, *places, **{extra: torch.ones(2)})
    with pytest.raises(UnsupportedProblemError, match="attention_chunk must be 0, got 4"):
        function(*tensors, *places, attention_chunk=4)


def test_shapes_are_named():
    with pytest.raises(ValueError, match=r"lse_partial must have shape \(S, B, M, H\)"):
        flash_attn_3.flash_attn_combine(torch.ones(2, 1, 3, 4, 8), torch.ones(2, 1, 4, 3))
    with pytest.raises(ValueError, match="lse_partial must have dtype float16"):
        flash_attn_3.flash_attn_combine(torch.ones(2, 3, 4, 8), torch.ones(2, 3, 4).bool())
    with pytest.raises(ValueError, match="out_dtype must be a floating dtype or None, got 3"):
        flash_attn_3.flash_attn_combine(torch.ones(2, 3, 4, 8), torch.ones(2, 3, 4), out_dtype=3)
    with pytest.raises(ValueError, match="qkv must have num_heads_q"):
        flash_attn_3.flash_attn_qkvpacked_func(torch.ones(1, 3, 7, 8), num_heads_q=4)
    with pytest.raises(ValueError, match=r"qkv must have shape \(B, S, 3, H, D\)"):
        flash_attn_3.flash_attn_qkvpacked_func(torch.ones(1, 3, 2, 4, 8))


def test_it_is_where_flash_attn_has_it():
    compat.install_as_flash_attn()
    try:
        import flash_attn_interface

        for name in flash_attn_3.__all__:
            assert getattr(flash_attn_interface, name) is getattr(flash_attn_3, name)
    finally:
        compat.uninstall_as_flash_attn()
