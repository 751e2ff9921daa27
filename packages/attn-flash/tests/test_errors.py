"""What the public functions refuse, and in which words."""

from __future__ import annotations

import inspect
import itertools
import math
import re
from types import SimpleNamespace

import pytest
import torch

import attn_core.device
from attn_core import backends
from attn_core.device import DeviceInfo
from attn_flash import (
    BackendUnavailableError,
    FlashAttention,
    UnsupportedProblemError,
    _backends,
    checks,
    flash_attention,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    get_available_backends,
    ops,
    sdpa_triton_fa,
)
from attn_flash.options import Options

FLASH_ATTENTION_2_TAIL = [
    "dropout_p",
    "softmax_scale",
    "causal",
    "window_size",
    "softcap",
    "alibi_slopes",
    "deterministic",
    "return_attn_probs",
]
LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
FLOATS = "float16, bfloat16, float32, float64"


def tensors(**changes):
    """Arguments q, k, v that fit one another, but for `changes`."""
    fitting = {
        "q": torch.zeros(2, 3, 4, 8),
        "k": torch.zeros(2, 5, 2, 8),
        "v": torch.zeros(2, 5, 2, 8),
    }
    return fitting | changes


def packed_calls(**options):
    """Each function of FlashAttention-2's family, called with `options`."""
    return {
        "flash_attn_func": lambda: flash_attn_func(**tensors(), **options),
        "flash_attn_qkvpacked_func": lambda: flash_attn_qkvpacked_func(
            torch.zeros(2, 3, 3, 4, 8), **options
        ),
        "flash_attn_kvpacked_func": lambda: flash_attn_kvpacked_func(
            torch.zeros(2, 3, 4, 8), torch.zeros(2, 5, 2, 2, 8), **options
        ),
    }


def refuses(call, message, error=ValueError):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"q": [1.0]}, "q must be a tensor, got list"),
        ({"k": None}, "k must be a tensor, got NoneType"),
        ({"v": 1}, "v must be a tensor, got int"),
        (
            {"q": torch.zeros(3, 4, 8)},
            "q must have 4 dimensions (B, M, H, D), got shape (3, 4, 8)",
        ),
        (
            {"k": torch.zeros(5, 2, 8)},
            "k must have 4 dimensions (B, N, H_KV, D), got shape (5, 2, 8)",
        ),
        (
            {"q": torch.zeros(2, 3, 4, 8, dtype=torch.int32)},
            "q must have dtype float16, bfloat16, float32, float64, got int32",
        ),
        (
            {"k": torch.zeros(2, 5, 2, 8, dtype=torch.float16)},
            "k must have the dtype of q, torch.float32, got torch.float16",
        ),
        (
            {"v": torch.zeros(2, 5, 2, 8, dtype=torch.float64)},
            "v must have the dtype of q, torch.float32, got torch.float64",
        ),
        (
            {"k": torch.zeros(2, 5, 2, 8, device="meta")},
            "k must be on the device of q, cpu, got meta",
        ),
        (
            {"k": torch.zeros(1, 5, 2, 8)},
            "k must have shape (B, N, H_KV, D) = (2, 5, 2, 8), got (1, 5, 2, 8)",
        ),
        (
            {"k": torch.zeros(2, 5, 2, 16)},
            "k must have shape (B, N, H_KV, D) = (2, 5, 2, 8), got (2, 5, 2, 16)",
        ),
        (
            {"v": torch.zeros(2, 6, 2, 8)},
            "v must have shape (B, N, H_KV, D_v) = (2, 5, 2, 8), got (2, 6, 2, 8)",
        ),
        (
            {"v": torch.zeros(2, 5, 2, 257)},
            "the head dimension of v must be between 1 and 256, got 257",
        ),
        (
            {"k": torch.zeros(2, 5, 3, 8), "v": torch.zeros(2, 5, 3, 8)},
            (
                "the number of heads of q must be a multiple of that of k and v, "
                "got the number of heads of q = 4 and that of k and v = 3"
            ),
        ),
        (
            {
                "q": torch.zeros(1, 1, 1, 0),
                "k": torch.zeros(1, 1, 1, 0),
                "v": torch.zeros(1, 1, 1, 0),
            },
            "the head dimension of q must be between 1 and 256, got 0",
        ),
        (
            dict.fromkeys("qkv", torch.zeros(1, 1, 1, 257)),
            "the head dimension of q must be between 1 and 256, got 257",
        ),
    ],
)
def test_tensors(changes, message):
    refuses(lambda: flash_attn_func(**tensors(**changes)), message)


@pytest.mark.parametrize(
    "scale,shown",
    [
        (float("inf"), "inf"),
        (float("nan"), "nan"),
        ("0.5", "'0.5'"),
        (torch.tensor(0.5), "tensor(0.5000)"),
    ],
)
@pytest.mark.parametrize("name", packed_calls())
def test_softmax_scale(name, scale, shown):
    message = f"softmax_scale must be a finite number or None, got {shown}"
    refuses(packed_calls(softmax_scale=scale)[name], message)


@pytest.mark.parametrize("window", [(1,), (1, 2, 3), 5, None, (1.5, 2), (None, None), "ab"])
@pytest.mark.parametrize("name", packed_calls())
def test_window_size(name, window):
    message = f"window_size must be two integers (left, right), got {window!r}"
    refuses(packed_calls(window_size=window)[name], message)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"dropout_p": 1.0}, "dropout_p must be a number from 0 to below 1, got 1.0"),
        ({"dropout_p": -0.1}, "dropout_p must be a number from 0 to below 1, got -0.1"),
        ({"dropout_p": "0.1"}, "dropout_p must be a number from 0 to below 1, got '0.1'"),
        ({"softcap": -1.0}, "softcap must be a finite number, 0 or more, got -1.0"),
        ({"softcap": math.inf}, "softcap must be a finite number, 0 or more, got inf"),
        ({"softcap": None}, "softcap must be a finite number, 0 or more, got None"),
        ({"alibi_slopes": [1.0]}, "alibi_slopes must be a tensor, got list"),
        (
            {"alibi_slopes": torch.ones(3)},
            "alibi_slopes must have shape (H,) = (4,) or (B, H) = (2, 4), got (3,)",
        ),
        (
            {"alibi_slopes": torch.ones(4).half()},
            "alibi_slopes must have dtype float32, got float16",
        ),
        (
            {"alibi_slopes": torch.ones(4, device="meta")},
            "alibi_slopes must be on the device of q, cpu, got meta",
        ),
        ({"attn_bias": 1.0}, "attn_bias must be a tensor, got float"),
        (
            {"attn_bias": torch.ones(1, 1, 1, 1, 1)},
            "attn_bias must have at most 4 dimensions (B, H, M, N), got shape (1, 1, 1, 1, 1)",
        ),
        (
            {"attn_bias": torch.ones(1, dtype=torch.int64)},
            "attn_bias must have dtype bool, float16, bfloat16, float32, float64, got int64",
        ),
        (
            {"attn_bias": torch.ones(1, device="meta")},
            "attn_bias must be on the device of q, cpu, got meta",
        ),
        ({"key_mask": torch.ones(2)}, "key_mask must have shape (B, N) = {keys}, got (2,)"),
        ({"sinks": torch.ones(3)}, "sinks must have shape (H,) = (4,), got (3,)"),
        ({"sinks": torch.ones(4).int()}, f"sinks must have dtype {FLOATS}, got int32"),
        ({"rng_state": torch.ones(3)}, "rng_state must have shape (2,) = (2,), got (3,)"),
        ({"rng_state": torch.ones(2)}, "rng_state must have dtype int64, got float32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("name", packed_calls())
def test_features(name, options, message):
    keys = (2, 3) if "qkv" in name else (2, 5)
    refuses(packed_calls(**options)[name], message.replace("{keys}", str(keys)))


def test_a_bias_that_does_not_broadcast():
    refuses(
        lambda: flash_attn_func(**tensors(), attn_bias=torch.ones(2, 3)),
        "attn_bias must broadcast to (B, H, M, N) = (2, 4, 3, 5), got (1, 1, 2, 3)",
    )


@pytest.mark.parametrize("name,shape", [("alibi_slopes", (4,)), ("key_mask", (2, 5))])
def test_gradients_that_are_not_computed(name, shape):
    options = {name: torch.ones(shape, requires_grad=True)}
    message = f"^{name} must not require a gradient, none is computed.*; detach it$"
    with pytest.raises(UnsupportedProblemError, match=message):
        flash_attn_func(**tensors(), **options)
    with torch.no_grad():
        assert flash_attn_func(**tensors(), **options).shape == (2, 3, 4, 8)


def test_dropout_of_the_module():
    inputs = tensors(v=torch.ones(2, 5, 2, 8))
    module = FlashAttention(attention_dropout=0.5)
    assert not torch.allclose(module(**inputs), torch.ones(()))
    torch.testing.assert_close(module.eval()(**inputs), torch.ones(2, 3, 4, 8))


def ragged(**changes):
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    fitting = {
        "q": torch.zeros(5, 4, 8),
        "k": torch.zeros(5, 2, 8),
        "v": torch.zeros(5, 2, 8),
        "cu_seqlens_q": starts,
        "cu_seqlens_k": starts,
        "max_seqlen_q": 3,
        "max_seqlen_k": 3,
    }
    return fitting | changes


def pages(**changes):
    paged = {"k": torch.zeros(4, 2, 2, 8), "v": torch.zeros(4, 2, 2, 8)}
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    return ragged(**paged | {"block_table": table} | changes)


def integers(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (ragged(q=torch.zeros(1, 5, 4, 8)), "q must have 3 dimensions (T_q, H, D), got shape"),
        (ragged(k=torch.zeros(5, 2, 7)), "k must have shape (T_k, H_KV, D) = (5, 2, 8), got"),
        (ragged(v=torch.zeros(4, 2, 8)), "v must have shape (T_k, H_KV, D_v) = (5, 2, 8), got"),
        (ragged(cu_seqlens_q=None), "cu_seqlens_q must be a tensor, got NoneType"),
        (ragged(cu_seqlens_k=integers(0, 5)), "cu_seqlens_k must have shape (B + 1,) = (3,), got"),
        (ragged(cu_seqlens_q=integers()), "cu_seqlens_q must have B + 1 elements, at least 1, got"),
        (ragged(cu_seqlens_q=torch.tensor([0, 2, 5])), "cu_seqlens_q must have dtype int32, got"),
        (
            ragged(cu_seqlens_q=integers(0, 2, 5).to("meta")),
            "cu_seqlens_q must be on the device of q, cpu, got meta",
        ),
        (ragged(cu_seqlens_q=integers(1, 2, 5)), "cu_seqlens_q must begin with 0, got 1"),
        (ragged(cu_seqlens_k=integers(0, 3, 2)), "cu_seqlens_k must not decrease, got 2 after 3"),
        (ragged(cu_seqlens_q=integers(0, 3, 6)), "cu_seqlens_q must end within the 5 tokens of q,"),
        (ragged(max_seqlen_q=2), "max_seqlen_q must be at least the length of every sequence, 3"),
        (ragged(max_seqlen_k=-1), "max_seqlen_k must not be negative, got -1"),
        (ragged(max_seqlen_k=2.5), "max_seqlen_k must be an integer, got 2.5"),
        (ragged(seqused_k=integers(1)), "seqused_k must have shape (B,) = (2,), got (1,)"),
        (ragged(seqused_k=integers(1, 4)), "seqused_k[1] must be between 0 and 3, got 4"),
        (
            ragged(attn_bias=torch.ones(4, 5)),
            "attn_bias must broadcast to (B, H, M, N) = (2, 4, 3, 3), got (1, 1, 4, 5)",
        ),
        (pages(k=torch.zeros(8, 2, 8)), "k must have 4 dimensions (num_pages, page_size, H_KV, D)"),
        (pages(block_table=integers(0, 1)), "block_table must have 2 dimensions (B, max_pages)"),
        (
            pages(block_table=integers(0, 1)[None]),
            "block_table must have shape (B, max_pages) = (2, 2), got (1, 2)",
        ),
        (
            pages(block_table=torch.zeros(2, 2)),
            "block_table must have dtype int32, got float32",
        ),
        (
            pages(block_table=torch.tensor([[0, 1], [2, 4]], dtype=torch.int32)),
            "an entry of block_table[1] must be between 0 and 3, got 4",
        ),
        (
            pages(max_seqlen_k=5),
            "max_seqlen_k must be at most what a row of block_table has room for, 4, got 5",
        ),
        (
            pages(k=torch.zeros(4, 0, 2, 8), v=torch.zeros(4, 0, 2, 8)),
            "k must have pages of at least 1 slot, got shape (4, 0, 2, 8)",
        ),
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_ragged_sequences(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        flash_attn_varlen_func(**arguments)


def test_values_on_a_gpu_are_checked_on_demand(monkeypatch):
    """Any device but the CPU would do: to read a tensor on "meta" is an error."""
    arguments = ragged(cu_seqlens_q=integers(0, 3, 2))
    problem = [arguments.pop(name) for name in "qkv"]
    options = Options(**arguments)
    device = torch.device("cuda")
    q = SimpleNamespace(device=device, shape=problem[0].shape)
    monkeypatch.delenv("ATTN_CHECK_VALUES", raising=False)
    checks._check_values(q, problem[1], options)
    monkeypatch.setenv("ATTN_CHECK_VALUES", "1")
    with pytest.raises(ValueError, match="cu_seqlens_q must not decrease"):
        checks._check_values(q, problem[1], options)


def test_qkv():
    refuses(
        lambda: flash_attn_qkvpacked_func(torch.zeros(2, 3, 4, 8)),
        "qkv must have 5 dimensions (B, S, 3, H, D), got shape (2, 3, 4, 8)",
    )
    refuses(
        lambda: flash_attn_qkvpacked_func(torch.zeros(2, 3, 2, 4, 8)),
        "qkv must have shape (B, S, 3, H, D), got (2, 3, 2, 4, 8)",
    )


def test_kv():
    q = torch.zeros(2, 3, 4, 8)
    refuses(
        lambda: flash_attn_kvpacked_func(q, torch.zeros(2, 3, 4, 8)),
        "kv must have 5 dimensions (B, N, 2, H_KV, D), got shape (2, 3, 4, 8)",
    )
    refuses(
        lambda: flash_attn_kvpacked_func(q, torch.zeros(2, 3, 3, 4, 8)),
        "kv must have shape (B, N, 2, H_KV, D), got (2, 3, 3, 4, 8)",
    )


def test_a_packed_tensor_is_named_by_its_own_name():
    q, kv = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 2, 4, 8)
    starts = torch.tensor([0, 6], dtype=torch.int32)
    refuses(
        lambda: flash_attn_qkvpacked_func(torch.zeros(2, 3, 3, 4, 8).int()),
        f"qkv must have dtype {FLOATS}, got int32",
    )
    refuses(
        lambda: flash_attn_varlen_qkvpacked_func(torch.zeros(6, 3, 4, 257), starts, 6),
        "the head dimension of qkv must be between 1 and 256, got 257",
    )
    refuses(
        lambda: flash_attn_kvpacked_func(q, kv.half()),
        "kv must have the dtype of q, torch.float32, got torch.float16",
    )
    refuses(
        lambda: flash_attn_varlen_kvpacked_func(
            q.flatten(0, 1), kv.flatten(0, 1).to("meta"), starts, starts, 6, 6
        ),
        "kv must be on the device of q, cpu, got meta",
    )


@pytest.mark.parametrize("attend", [flash_attention, sdpa_triton_fa])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_rank_with_heads_first(attend, name):
    inputs = dict.fromkeys("qkv", torch.zeros(1, 2, 3, 8)) | {name: torch.zeros(3)}
    message = f"{name} must have 4 dimensions (B, H, S, D), got shape (3,)"
    refuses(lambda: attend(**inputs), message)


@pytest.mark.parametrize("attend", [flash_attention, sdpa_triton_fa])
def test_a_list_with_heads_first(attend):
    refuses(lambda: attend([1.0], [1.0], [1.0]), "q must be a tensor, got list")


def test_window_of_flash_attention():
    q = torch.zeros(1, 2, 3, 8)
    refuses(
        lambda: flash_attention(q, q, q, window_size=0),
        "window_size must be positive, or negative for no window, got 0",
    )


def test_sdpa_with_uneven_heads():
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    message = "q and k must have the same number of heads without enable_gqa, got 4 and 2"
    refuses(lambda: sdpa_triton_fa(q, k, k), message)
    assert sdpa_triton_fa(q, k, k, enable_gqa=True).shape == q.shape


def test_causal_sdpa_with_uneven_lengths():
    q, k = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 5, 8)
    refuses(
        lambda: sdpa_triton_fa(q, k, k, is_causal=True),
        "is_causal is aligned at the top left and needs as many queries as keys, got 3 and 5",
        UnsupportedProblemError,
    )


@pytest.mark.parametrize(
    "function,tensor_names",
    [
        (flash_attn_func, ["q", "k", "v"]),
        (flash_attn_qkvpacked_func, ["qkv"]),
        (flash_attn_kvpacked_func, ["q", "kv"]),
        (flash_attn_varlen_func, ["q", "k", "v", *LENGTHS]),
        (flash_attn_varlen_qkvpacked_func, ["qkv", "cu_seqlens", "max_seqlen"]),
        (flash_attn_varlen_kvpacked_func, ["q", "kv", *LENGTHS]),
    ],
)
def test_positional_order_is_that_of_flash_attention_2(function, tensor_names):
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    tail = ["block_table"] if function is flash_attn_varlen_func else []
    assert positional == tensor_names + FLASH_ATTENTION_2_TAIL + tail


@pytest.mark.parametrize("name", packed_calls())
def test_an_unknown_backend(name):
    message = f"backend must be one of {['auto', *backends.available(ops.ATTENTION)]} for "
    with pytest.raises(BackendUnavailableError, match=re.escape(message)):
        packed_calls(backend="cuda")[name]()


def test_the_environment_takes_the_place_of_auto(monkeypatch):
    monkeypatch.setenv("ATTN_BACKEND", "cuda")
    with pytest.raises(BackendUnavailableError, match="got 'cuda'"):
        flash_attn_func(**tensors())
    assert flash_attn_func(**tensors(), backend="torch").shape == (2, 3, 4, 8)


def test_the_environment_may_name_a_backend(monkeypatch):
    monkeypatch.setenv("ATTN_BACKEND", "torch")
    assert flash_attn_func(**tensors()).shape == (2, 3, 4, 8)


def test_a_named_backend_is_not_replaced():
    with pytest.raises(UnsupportedProblemError, match=r"named does not run this .* \(triton: "):
        flash_attn_func(**tensors(), backend="triton")


@pytest.mark.parametrize(
    "version,device,dtype,reason",
    [
        (
            None,
            "cpu",
            torch.float32,
            "triton is not installed; the extra [triton] of the package brings it",
        ),
        ((3, 1), "cpu", torch.float32, "triton must be at least 3.2, got 3.1"),
        (
            (3, 6),
            DeviceInfo("cpu", "cpu"),
            torch.float32,
            "it runs on NVIDIA and AMD GPUs, the tensors are on cpu",
        ),
        (
            (3, 6),
            DeviceInfo("cuda", "Tesla T4", "sm_75"),
            torch.float16,
            "it needs compute capability 8.0 or newer, Tesla T4 has sm_75",
        ),
        (
            (3, 6),
            DeviceInfo("cuda", "H200", "sm_90"),
            torch.float64,
            "it computes in float16, bfloat16 and float32, not float64",
        ),
        ((3, 6), DeviceInfo("cuda", "H200", "sm_90"), torch.float16, None),
        ((3, 2), DeviceInfo("hip", "MI300X", "gfx942"), torch.float32, None),
    ],
)
def test_what_triton_takes(monkeypatch, version, device, dtype, reason):
    monkeypatch.setattr(attn_core.device, "triton_version", lambda: version)
    monkeypatch.setattr(attn_core.device, "device_info", lambda _: device)
    problem = _backends._typical_problem(torch.device("cpu"))._replace(dtype=dtype)
    assert _backends._triton_supports(ops.ATTENTION, problem) == reason


def test_available_backends_run_the_typical_problem():
    names = get_available_backends()
    assert "torch" in names
    assert set(names) <= set(backends.available(ops.ATTENTION))
