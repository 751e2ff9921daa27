"""FlashAttention-3's arguments: the results are those of FlashAttention-2's functions."""

from __future__ import annotations

import copy
import inspect
import itertools

import pytest
import torch

import attn_flash
from attn_flash import UnsupportedProblemError, compat, flash_attn_3
from attn_flash.layers.rotary import apply_rotary_emb

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


def test_queries_that_are_not_used():
    q, k, v = inputs(12, 4, 16)
    used = torch.tensor([3, 6], dtype=torch.int32)
    is_used = torch.tensor([1, 1, 1, 0, 0] + [1] * 6 + [0]).bool()
    poisoned = torch.where(is_used[:, None, None], q, torch.nan)
    out, lse = flash_attn_3.flash_attn_varlen_func(
        *(poisoned, k, v, BOUNDS, BOUNDS, 7, 7, used), causal=True, return_attn_probs=True
    )
    starts = torch.tensor([0, 3, 9], dtype=torch.int32)
    expected, lse_expected, _ = attn_flash.flash_attn_varlen_func(
        *(q[is_used], k, v, starts, BOUNDS, 6, 7), causal=True, return_attn_probs=True
    )
    assert not out[~is_used].any()
    assert (lse[:, ~is_used] == -torch.inf).all()
    torch.testing.assert_close(lse[:, is_used], lse_expected)
    check(out[is_used], expected, (q, k, v))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("len_q, len_k", [(9, 9), (5, 12), (12, 5)])
def test_chunks(len_q, len_k, causal):
    q, _, _ = inputs(2, len_q, 4, 16)
    _, k, v = inputs(2, len_k, 4, 16)
    mask = torch.zeros(len_q, len_k, dtype=torch.bool)
    for i in range(len_q):
        for j in range(len_k):
            mask[i, j] = (i + len_k - len_q) // 4 == j // 4
    out = flash_attn_3.flash_attn_func(q, k, v, causal=causal, attention_chunk=4)
    check(out, attn_flash.flash_attn_func(q, k, v, causal=causal, attn_bias=mask), (q, k, v))


def test_chunks_of_ragged_sequences():
    q, k, v = inputs(12, 4, 16)
    starts = torch.tensor([0, 4, 12], dtype=torch.int32)
    used = torch.tensor([4, 6], dtype=torch.int32)
    options = {"causal": True, "attention_chunk": 3}
    out = flash_attn_3.flash_attn_varlen_func(
        *(q, k, v, BOUNDS, starts, 7, 8), seqused_k=used, **options
    )
    expected = [
        flash_attn_3.flash_attn_func(q[None, m], k[None, n], v[None, n], **options)[0]
        for m, n in ((slice(0, 5), slice(0, 4)), (slice(5, 12), slice(4, 10)))
    ]
    check(out, torch.cat(expected), (q, k, v))


CACHES = {
    "ragged": {"is_ragged": True},
    "ragged-pages": {"is_ragged": True, "page_size": 3},
    "ragged-rows": {"is_ragged": True, "has_rows": True, "has_leftpad": True},
    "ragged-rotary": {"is_ragged": True, "rotary": "own", "options": {"causal": True}},
    "ragged-rotary-full": {"is_ragged": True, "rotary": "cache"},
    "rotary": {"rotary": "own", "page_size": 4, "has_leftpad": True},
    "chunk": {"options": {"causal": True, "attention_chunk": 5}, "has_leftpad": True},
    "ragged-chunk": {"is_ragged": True, "options": {"attention_chunk": 4}, "page_size": 4},
    "queries-alone": {"is_ragged": True, "has_new": False, "options": {"window_size": (3, 1)}},
}


ROOM, ROWS, SEQLENS, OWN = 12, 5, [7, 0, 4], [1, 3, 2]
ANGLES = torch.rand(ROOM, 4, generator=torch.Generator().manual_seed(1))


class Cached:
    """A cache of three sequences, and what each of them gives on its own."""

    def __init__(self, case):
        self.case = case
        self.page_size = case.get("page_size", ROOM)
        self.rows = [4, 0, 2] if case.get("has_rows") else [0, 1, 2]
        self.leftpads = [2, 0, 1] if case.get("has_leftpad") else [0, 0, 0]
        pages = ROWS * ROOM // self.page_size
        order = torch.randperm(pages) if self.page_size < ROOM else torch.arange(pages)
        self.table = order.int().view(ROWS, -1)
        self.slots = torch.full((2, pages, self.page_size, 2, 16), torch.nan)
        for b, length in enumerate(SEQLENS):
            self.write(b, self.leftpads[b], torch.randn(2, length - self.leftpads[b], 2, 16))

    def places(self, b, start, stop):
        j = torch.arange(start, stop)
        return self.table[self.rows[b], j // self.page_size].long(), j % self.page_size

    def write(self, b, start, new):
        page, slot = self.places(b, start, start + new.shape[1])
        self.slots[:, page, slot] = new

    def read(self, b, stop):
        page, slot = self.places(b, self.leftpads[b], stop)
        return self.slots[:, page, slot]

    def turn(self, x, b, advances=True):
        """Rotate tokens (S, H, D) of sequence b."""
        if "rotary" not in self.case:
            return x
        first = OWN[b] if self.case["rotary"] == "own" else SEQLENS[b]
        folded = x[None] if advances else x.flatten(0, 1)[None, None]
        cos, sin = ANGLES.cos(), ANGLES.sin()
        return apply_rotary_emb(folded, cos, sin, True, seqlen_offsets=first).view(x.shape)

    def alone(self, b, q, k, v):
        """Append to sequence b and attend to it, on its own."""
        options = self.case.get("options", {})
        new = torch.stack([self.turn(k, b), v])
        self.write(b, SEQLENS[b], new)
        keys, values = self.read(b, SEQLENS[b] + len(k))
        out, lse = flash_attn_3.flash_attn_func(
            self.turn(q, b, advances=bool(options))[None],
            *(keys[None], values[None]),
            return_attn_probs=True,
            **options,
        )
        return out[0], lse[0]

    def arguments(self):
        has, rotary = self.case.get, "rotary" in self.case
        return {
            "k_cache": self.slots[0],
            "v_cache": self.slots[1],
            "cache_seqlens": torch.tensor(SEQLENS).int(),
            "cache_batch_idx": torch.tensor(self.rows).int() if has("has_rows") else None,
            "cache_leftpad": torch.tensor(self.leftpads).int() if has("has_leftpad") else None,
            "page_table": self.table if has("page_size") else None,
            "rotary_cos": ANGLES.cos() if rotary else None,
            "rotary_sin": ANGLES.sin() if rotary else None,
            "rotary_seqlens": torch.tensor(OWN).int() if has("rotary") == "own" else None,
            **has("options", {}),
        }


@pytest.mark.parametrize("case", [*CACHES.values()], ids=[*CACHES])
def test_cache_against_one_sequence_at_a_time(case):
    is_ragged = case.get("is_ragged", False)
    counts_q, counts = ([2, 5, 3], [3, 1, 2]) if is_ragged else ([2, 2, 2], [2, 2, 2])
    counts = counts if case.get("has_new", True) else [0, 0, 0]
    q, k, v = (torch.randn(sum(n), h, 16) for n, h in ((counts_q, 4), (counts, 2), (counts, 2)))
    together = Cached(case)
    apart = copy.deepcopy(together)
    parts = zip(q.split(counts_q), k.split(counts), v.split(counts), strict=True)
    outs, lses = zip(*(apart.alone(b, *part) for b, part in enumerate(parts)), strict=True)
    bounds = [torch.tensor([0, *itertools.accumulate(n)]).int() for n in (counts_q, counts)]
    ragged = {"cu_seqlens_q": bounds[0], "cu_seqlens_k_new": bounds[1], "max_seqlen_q": 5}
    if not is_ragged:
        ragged, (q, k, v) = {}, (x.unflatten(0, (3, 2)) for x in (q, k, v))
    if not any(counts):
        k = v = ragged["cu_seqlens_k_new"] = None
    out, lse, *_ = flash_attn_3.flash_attn_with_kvcache(
        q, k=k, v=v, return_softmax_lse=True, **together.arguments(), **ragged
    )
    if not is_ragged:
        out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    torch.testing.assert_close(out, torch.cat(outs))
    torch.testing.assert_close(lse, torch.cat(lses, 1))
    torch.testing.assert_close(together.slots, apart.slots, equal_nan=True)


@pytest.mark.parametrize("name", ["qv", "q_descale", "k_descale", "v_descale"])
@pytest.mark.parametrize("function", [*ARGUMENTS])
def test_what_is_missing_is_refused(function, name):
    tensors = [x.detach() for x in inputs(12, 4, 16)]
    places = (BOUNDS, BOUNDS, 7, 7) if "varlen" in function else ()
    tensors = tensors if places else [x[None] for x in tensors]
    with pytest.raises(UnsupportedProblemError, match=f"{name} must be None, got Tensor"):
        getattr(flash_attn_3, function)(*tensors, *places, **{name: torch.ones(2)})


@pytest.mark.parametrize("function", [*ARGUMENTS])
@pytest.mark.parametrize("chunk", [-1, 1.5, None])
def test_a_chunk_is_a_number_of_positions(function, chunk):
    tensors = [x.detach() for x in inputs(12, 4, 16)]
    places = (BOUNDS, BOUNDS, 7, 7) if "varlen" in function else ()
    tensors = tensors if places else [x[None] for x in tensors]
    with pytest.raises(ValueError, match="attention_chunk must (not be negative|be an integer)"):
        getattr(flash_attn_3, function)(*tensors, *places, attention_chunk=chunk)


def test_a_chunk_may_be_wider_than_any_sequence():
    q, k, v = (x.detach()[None] for x in inputs(12, 4, 16))
    out = flash_attn_3.flash_attn_func(q, k, v, causal=True, attention_chunk=2**70)
    torch.testing.assert_close(out, flash_attn_3.flash_attn_func(q, k, v, causal=True))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"max_seqlen_q": None}, "max_seqlen_q must be an integer, got None"),
        ({"cu_seqlens_q": BOUNDS[:, None]}, r"cu_seqlens_q must have 1 dimensions \(B \+ 1,\)"),
        (
            {"cu_seqlens_k_new": BOUNDS[:2]},
            r"cu_seqlens_k_new must have shape \(B \+ 1,\) = ",
        ),
        ({"k": None, "v": None}, "k and v must be given with cu_seqlens_k_new, got None"),
        ({"cu_seqlens_k_new": BOUNDS + 1}, "cu_seqlens_k_new must begin with 0, not decrease"),
        ({"cu_seqlens_q": BOUNDS.long()}, "cu_seqlens_q must have dtype int32, got int64"),
        ({"cu_seqlens_q": BOUNDS * 2}, r"within the 12 tokens of q, got \[0, 10, 24\]"),
        ({"rotary_seqlens": BOUNDS}, r"rotary_seqlens must have shape \(B,\) = \(2,\), got"),
        ({"v": 3}, "v must be a tensor, got int"),
        ({"v": torch.zeros(11, 2, 16)}, r"v must have shape \(T_new, H_KV, D_v\)"),
        ({"cache_seqlens": None}, "cache_seqlens must be given with k"),
        ({"rotary_cos": torch.zeros(20, 8)}, "rotary_sin must be given with rotary_cos"),
        ({"rotary_sin": torch.zeros(20, 8)}, "rotary_cos must be given with rotary_sin"),
        ({"q": torch.zeros(2, 6, 4, 16)}, r"q must have 3 dimensions \(T_q, H, D\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_of_a_ragged_cache_are_named(arguments, message):
    q, k, v = (x.detach() for x in inputs(12, 4, 16))
    caches = torch.zeros(2, 2, 20, 2, 16)
    fitting = {"q": q, "k": k, "v": v, "cu_seqlens_q": BOUNDS, "cu_seqlens_k_new": BOUNDS}
    fitting |= {"max_seqlen_q": 7, "cache_seqlens": torch.tensor([3, 0]).int()}
    with pytest.raises(ValueError, match=message):
        flash_attn_3.flash_attn_with_kvcache(
            k_cache=caches[0], v_cache=caches[1], **fitting | arguments
        )


def test_bounds_of_chunked_sequences_are_checked():
    q, k, v = inputs(12, 4, 16)
    places = [BOUNDS, BOUNDS, 7, 7]
    for i, name in enumerate(("cu_seqlens_q", "cu_seqlens_k")):
        wrong = [*places[:i], BOUNDS.flip(0), *places[i + 1 :]]
        with pytest.raises(ValueError, match=f"{name} must begin with 0, not decrease"):
            flash_attn_3.flash_attn_varlen_func(q, k, v, *wrong, attention_chunk=3)


def test_how_many_queries_are_used_is_checked():
    q, k, v = inputs(12, 4, 16)
    for used, message in (
        (torch.tensor([6, 0]).int(), r"seqused_q\[0\] must be between 0 and 5, got 6"),
        (torch.tensor([3]).int(), r"seqused_q must have shape \(B,\) = \(2,\), got \(1,\)"),
        (torch.tensor([3, 2]), "seqused_q must have dtype int32, got int64"),
    ):
        with pytest.raises(ValueError, match=message):
            flash_attn_3.flash_attn_varlen_func(q, k, v, BOUNDS, BOUNDS, 7, 7, used)


def test_shapes_are_named():
    with pytest.raises(ValueError, match=r"lse_partial must have shape \(S, B, M, H\)"):
        flash_attn_3.flash_attn_combine(torch.ones(2, 1, 3, 4, 8), torch.ones(2, 1, 4, 3))
    with pytest.raises(ValueError, match="lse_partial must have dtype float16"):
        flash_attn_3.flash_attn_combine(torch.ones(2, 3, 4, 8), torch.ones(2, 3, 4).bool())
    with pytest.raises(ValueError, match="lse_partial must be on the device of out_partial"):
        flash_attn_3.flash_attn_combine(torch.ones(2, 3, 4, 8), torch.ones(2, 3, 4, device="meta"))
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
