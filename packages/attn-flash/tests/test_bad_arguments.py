"""Every argument of the functions around attention, made wrong in every way: an error says so.

A call with one wrong argument runs, where the value happens to be allowed, or raises a ValueError
that names an argument; no other error comes out of it, and nothing is written before.
"""

from __future__ import annotations

import inspect

import pytest
import torch

from attn_flash import (
    dropout_mask,
    flash_attention,
    flash_attention_rope,
    flash_attn_func,
    flash_attn_with_kvcache,
    merge_attention_states,
    sdpa_triton_fa,
)
from attn_flash.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)
from attn_flash.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def tables(rows=9):
    return {"cos": torch.randn(rows, 4), "sin": torch.randn(rows, 4)}


def module(**arguments):
    return RotaryEmbedding(16)(**arguments)


CALLS = {
    "kvcache": (
        flash_attn_with_kvcache,
        lambda: {
            "q": torch.randn(2, 3, 4, 16),
            **{name: torch.randn(6, 8, 2, 16) for name in ("k_cache", "v_cache")},
            **{name: torch.randn(2, 3, 2, 16) for name in ("k", "v")},
            **{name: torch.randn(24, 4) for name in ("rotary_cos", "rotary_sin")},
            "cache_seqlens": int32(5, 20),
            "cache_batch_idx": int32(1, 0),
            "cache_leftpad": int32(0, 7),
            "block_table": int32(3, 5, 1, 2, 0, 4).view(2, 3),
            "softmax_scale": 0.3,
            "causal": True,
            "window_size": (3, 1),
            "softcap": 1.0,
            "rotary_interleaved": True,
            "alibi_slopes": torch.rand(4),
            "num_splits": 0,
            "return_softmax_lse": False,
        },
    ),
    "rotary": (
        apply_rotary_emb,
        lambda: {
            "x": torch.randn(2, 5, 3, 16),
            **tables(),
            "interleaved": False,
            "inplace": False,
            "seqlen_offsets": int32(1, 2),
            "cu_seqlens": None,
        },
    ),
    "rotary-ragged": (
        apply_rotary_emb,
        lambda: {
            "x": torch.randn(7, 3, 16),
            **tables(),
            "seqlen_offsets": 1,
            "cu_seqlens": int32(0, 3, 7),
            "max_seqlen": 4,
        },
    ),
    "rotary-qkv": (
        apply_rotary_emb_qkv_,
        lambda: {
            "qkv": torch.randn(2, 5, 3, 3, 16),
            **tables(),
            "cos_k": torch.randn(9, 4),
            "sin_k": torch.randn(9, 4),
            "interleaved": False,
            "seqlen_offsets": int32(1, 2),
        },
    ),
    "rotary-qkv-grouped": (
        apply_rotary_emb_qkv_,
        lambda: {"qkv": torch.randn(2, 5, 8, 16), **tables(), "num_heads_q": 4},
    ),
    "rotary-kv": (
        apply_rotary_emb_kv_,
        lambda: {"kv": torch.randn(2, 5, 2, 3, 16), **tables(), "seqlen_offsets": 1},
    ),
    "rotary-torch": (
        apply_rotary_emb_torch,
        lambda: {"x": torch.randn(2, 5, 3, 16), **tables(5), "interleaved": False},
    ),
    "rotary-module": (
        module,
        lambda: {"qkv": torch.randn(2, 5, 3, 3, 16), "seqlen_offset": 1, "max_seqlen": 6},
    ),
    "rotary-module-made": (
        RotaryEmbedding,
        lambda: {"dim": 16, "base": 100.0, "interleaved": False, "scale_base": 512.0},
    ),
    "attention-rope": (
        flash_attention_rope,
        lambda: {
            "q": torch.randn(2, 4, 5, 16),
            "k": torch.randn(2, 2, 5, 16),
            "v": torch.randn(2, 2, 5, 16),
            **tables(),
            "causal": True,
            "scale": 0.3,
            "window_size": 3,
            "interleaved": False,
        },
    ),
    "unpad": (
        unpad_input,
        lambda: {
            "hidden_states": torch.randn(2, 5, 3),
            "attention_mask": torch.ones(2, 5),
            "unused_mask": torch.zeros(2, 5),
        },
    ),
    "unpad-concatenated": (
        unpad_input_for_concatenated_sequences,
        lambda: {
            "hidden_states": torch.randn(2, 5, 3),
            "attention_mask_in_length": torch.tensor([[3, 2, 0, 0, 0], [1, 0, 0, 0, 0]]),
        },
    ),
    "pad": (
        pad_input,
        lambda: {
            "hidden_states": torch.randn(3, 4),
            "indices": torch.tensor([0, 1, 4]),
            "batch": 2,
            "seqlen": 3,
        },
    ),
    "gather": (
        index_first_axis,
        lambda: {"input": torch.randn(3, 4), "indices": torch.tensor([0, 2])},
    ),
    "gather-residual": (
        index_first_axis_residual,
        lambda: {"input": torch.randn(3, 4), "indices": torch.tensor([0, 2])},
    ),
    "scatter": (
        index_put_first_axis,
        lambda: {
            "values": torch.randn(2, 4),
            "indices": torch.tensor([0, 2]),
            "first_axis_dim": 3,
        },
    ),
    "merge": (
        merge_attention_states,
        lambda: {
            "out_a": torch.randn(2, 5, 3, 8),
            "lse_a": torch.randn(2, 3, 5),
            "out_b": torch.randn(2, 5, 3, 8),
            "lse_b": torch.randn(2, 3, 5),
        },
    ),
}
DTYPES = (
    *(torch.int8, torch.int32, torch.int64, torch.bool),
    *(torch.float16, torch.float64, torch.complex64),
)


def wrong(value):
    """Other values for an argument: most are wrong, and none may do harm."""
    yield from ("x", [1, 2], 2.5, float("nan"), -7, object(), None, True, torch.randn(3))
    if not isinstance(value, torch.Tensor):
        return
    yield from (value[None], value[0], torch.tensor(1), value.to("meta"), value.to_sparse())
    yield from (value.to(dtype) for dtype in DTYPES if dtype != value.dtype)
    for dim in range(value.dim()):
        first = value.narrow(dim, 0, 1)
        yield from (value.narrow(dim, 1, value.shape[dim] - 1), value.narrow(dim, 0, 0))
        yield torch.cat((value, first), dim)
    if not value.is_floating_point():
        yield from (value - 5, value + 10**6)


@pytest.mark.parametrize("name", CALLS)
def test_the_call_is_right_as_it_stands(name):
    function, make = CALLS[name]
    function(**make())


@pytest.mark.filterwarnings("ignore:Sparse.*:UserWarning")
@pytest.mark.parametrize(
    "name, argument", [(name, argument) for name, (_, make) in CALLS.items() for argument in make()]
)
def test_a_wrong_argument_is_named(name, argument):
    function, make = CALLS[name]
    known = {*make(), *inspect.signature(function).parameters}
    for value in wrong(make().get(argument)):
        arguments = make() | {argument: value}
        before = {n: x.clone() for n, x in arguments.items() if isinstance(x, torch.Tensor)}
        message = refusal(function, arguments)
        if message is None:
            continue
        assert any(word in message for word in known)
        for n, x in before.items():
            if x.layout == torch.strided and x.device.type == "cpu":
                assert torch.equal(arguments[n].nan_to_num(), x.nan_to_num())


def refusal(function, arguments):
    """What a call says of its arguments, None if it runs; errors of another kind come out."""
    try:
        function(**arguments)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "name, argument",
    [
        ("kvcache", "causal"),
        ("kvcache", "return_softmax_lse"),
        ("rotary", "inplace"),
        ("func", "deterministic"),
        ("func", "return_attn_probs"),
        ("sdpa", "is_causal"),
        ("sdpa", "enable_gqa"),
        ("heads_first", "return_lse"),
    ],
)
@pytest.mark.parametrize("value", ["no", 2, [True], torch.ones(3)], ids=repr)
def test_a_switch_that_is_neither_on_nor_off(name, argument, value):
    q = torch.randn(1, 4, 4, 8)
    dense = {"q": q, "k": q, "v": q}
    calls = CALLS | {
        "func": (flash_attn_func, lambda: dense),
        "sdpa": (sdpa_triton_fa, lambda: dense),
        "heads_first": (flash_attention, lambda: dense),
    }
    function, make = calls[name]
    with pytest.raises(ValueError, match=f"{argument} must be True or False, got"):
        function(**make() | {argument: value})


def test_what_is_written_to_must_not_be_broadcast():
    function, make = CALLS["kvcache"]
    arguments = make()
    arguments["v_cache"] = arguments["v_cache"][:1].expand(6, -1, -1, -1)
    with pytest.raises(ValueError, match="v_cache must not be broadcast, it is written to"):
        function(**arguments)
    x = torch.randn(1, 5, 3, 16).expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match="x must not be broadcast, it is written to"):
        apply_rotary_emb(x, **tables(), inplace=True)
    qkv = torch.randn(2, 5, 1, 3, 16).expand(-1, -1, 3, -1, -1)
    with pytest.raises(ValueError, match="qkv must not be broadcast, it is written to"):
        apply_rotary_emb_qkv_(qkv, **tables())


@pytest.mark.parametrize(
    "shape, rng_state, message",
    [
        (None, torch.tensor([1, 2]), r"shape must be \(B, H, M, N\), got None"),
        ((1, 1, 2, 2), None, "rng_state must be a tensor, got NoneType"),
    ],
    ids=["shape", "state"],
)
def test_bad_arguments_of_dropout_mask(shape, rng_state, message):
    with pytest.raises(ValueError, match=message):
        dropout_mask(shape, 0.5, rng_state)
