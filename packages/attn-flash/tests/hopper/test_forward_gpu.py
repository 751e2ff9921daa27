"""The forward kernels for sm_90a on a GPU, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from attn_core import backends
from attn_core.testing import embedded, poison_new_allocations, random_tensor
from attn_flash import flash_attn_func, flash_attn_varlen_func, reference

from .cases import CAUSAL, HALF, OPEN, REPEATS, Case, Ragged, assert_outputs

pytest.importorskip("triton.experimental.gluon")

pytestmark = pytest.mark.gpu


def attend(case, q, k, v, **options):
    out, lse, _ = flash_attn_func(
        q, k, v, window_size=case.window, return_attn_probs=True, backend="hopper", **options
    )
    return out, lse


def check(case, q, k, v, softmax_scale=None):
    scale = case.scale if softmax_scale is None else softmax_scale
    same = reference.attention(q, k, v, scale, case.window)
    exact = reference.attention(*(x.double() for x in (q, k, v)), scale, case.window)
    with poison_new_allocations():
        out, lse = attend(case, q, k, v, softmax_scale=softmax_scale)
    assert out.dtype == case.dtype
    assert lse.dtype == torch.float32
    assert_outputs((out, lse), same, exact)


LENGTHS = (1, 15, 16, 63, 64, 65, 127, 128, 129, 197, 257, 320, 321, 577, 1000)
MIXED = ((1, 127), (149, 83), (63, 700), (1023, 7), (640, 641))
WINDOWS = ((33, 18), (128, 0), (20, -1), (-1, 70))
CASES = [
    *(Case(2, 3, 3, S, S, 64) for S in LENGTHS),
    *(Case(2, 3, 3, S, S, 128, CAUSAL) for S in LENGTHS),
    *(Case(1, 2, 1, M, N, D, window)
      for M, N in MIXED for D in (64, 128) for window in (OPEN, CAUSAL)),
    *(Case(1, 2, 2, *lengths, D, window)
      for lengths in ((190, 300), (300, 190), (1400, 1400))
      for window in WINDOWS for D in (64, 128)),
    *(Case(2, 8, heads_kv, 300, 400, D, CAUSAL) for heads_kv in (1, 2) for D in (64, 128, 256)),
    *(Case(1, 2, 2, 300, 333, D, window)
      for D in (8, 40, 72, 80, 96, 120, 136, 192, 256) for window in (OPEN, CAUSAL)),
    *(Case(1, 4, 2, 200, 260, D, window, HALF)
      for D in (64, 128, 256) for window in (OPEN, CAUSAL, (30, 40))),
    *(Case(1, 2, 2, 4100, 4100, D, window) for D in (64, 128) for window in (OPEN, CAUSAL)),
    # The first tile of 192 queries begins with 128 that are not there.
    Case(1, 2, 2, 4096, 4096, 64, CAUSAL),
    # More tiles than multiprocessors, so that programs compute several.
    *(Case(3, 48, 16, 700, 700, D, window)
      for D in (64, 128, 256) for window in (OPEN, CAUSAL, (100, 0))),
    # Narrow windows, in which consumers leave out blocks that only the other one sees.
    *(Case(3, 48, 16, 700, M, 128, window)
      for M in (700, 1000) for window in ((255, 0), (60, 70), (127, 127), (0, 0), (400, 111))),
    # The kernel for short sequences: as many heads as multiprocessors, or more.
    *(Case(32, 12, heads_kv, M, N, 64)
      for heads_kv in (12, 3)
      for M, N in ((197, 197), (257, 257), (65, 320), (320, 1), (1, 130), (130, 208), (50, 60))),
    *(Case(20, 16, 16, S, S, D, OPEN, HALF) for S in (17, 196, 256) for D in (32, 64)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_out_and_lse(case, device):
    check(case, *case.tensors(device))


@pytest.mark.parametrize("scale", [-0.2, 0.0, 3.0], ids=lambda scale: f"scale{scale}")
@pytest.mark.parametrize(
    "case", [Case(1, 3, 3, 200, 300, 64, CAUSAL), Case(48, 4, 4, 197, 197, 64)], ids=str
)
def test_any_scale(case, scale, device):
    check(case, *case.tensors(device), softmax_scale=scale)


@pytest.mark.parametrize("D", [64, 128])
def test_large_scores(D, device):
    case = Case(2, 4, 4, 200, 200, D, CAUSAL)
    check(case, *case.tensors(device, scale=10.0))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (0, 2, 3, 1)], ids=str)
@pytest.mark.parametrize(
    "case", [Case(2, 4, 2, 200, 150, 64, CAUSAL), Case(48, 4, 4, 130, 140, 64)], ids=str
)
def test_any_strides_and_nothing_beside_the_tensors(case, order, device):
    check(case, *(embedded(x, order=order) for x in case.tensors(device)))


def test_expanded_keys(device):
    case = Case(3, 4, 4, 200, 300, 64)
    q, k, v = case.tensors(device)
    check(case, q, k[:1].expand_as(k), v[:, :, :1].expand_as(v))


def test_future_keys_are_not_read(device):
    case = Case(2, 4, 4, 300, 300, 128, CAUSAL)
    q, k, v = case.tensors(device)
    before, _ = attend(case, q, k, v)
    k[:, 256:], v[:, 256:] = 1e4, -1e4
    after, _ = attend(case, q, k, v)
    assert torch.equal(before[:, :256], after[:, :256])


def test_without_keys(device):
    case = Case(2, 4, 4, 30, 0, 64)
    out, lse = attend(case, *case.tensors(device))
    assert not out.any()
    assert torch.isneginf(lse).all()


@pytest.mark.parametrize(
    "case",
    [
        Case(4, 32, 8, 1100, 1300, 64, CAUSAL),
        Case(4, 32, 8, 1100, 1300, 128, CAUSAL),
        Case(4, 16, 8, 1100, 1300, 128),
        Case(2, 16, 8, 1100, 1300, 256, (300, 0)),
        Case(4, 32, 8, 1100, 1300, 128, (255, 0)),
        Case(64, 12, 12, 197, 197, 64),
        Case(64, 12, 12, 257, 257, 64),
    ],
    ids=str,
)
def test_same_bits_every_time(case, device):
    q, k, v = case.tensors(device)
    out, lse = attend(case, q, k, v)
    for _ in range(REPEATS):
        again, lse_again = attend(case, q, k, v)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)


def attend_ragged(case, q, k, v):
    options = case.options(q.device)
    out, lse, _ = flash_attn_varlen_func(
        q,
        k,
        v,
        options.cu_seqlens_q,
        options.cu_seqlens_k,
        options.max_seqlen_q,
        options.max_seqlen_k,
        window_size=case.window,
        return_attn_probs=True,
        seqused_k=options.seqused_k,
        backend="hopper",
    )
    return out, lse


FEW = ((300, 0, 1, 64, 577), (257, 64, 129, 0, 1000))
ALIKE = ((130, 700, 1000, 64), (130, 700, 1000, 64))
MANY = ((3, 70, 128, 1, 200) * 40, (30, 1, 129, 0, 64) * 40)
USED = ((100, 300, 20), (200, 300, 64), (130, 0, 64))
LONG_ONES = ((4500, 100, 129), (4500, 300, 60))
RAGGED = [
    *(Ragged(*FEW, D=D, window=window)
      for D in (40, 64, 96, 128, 256) for window in (OPEN, CAUSAL, (100, 30))),
    *(Ragged(*ALIKE, D=D, window=CAUSAL, dtype=HALF) for D in (64, 128)),
    *(Ragged(*MANY, H=6, H_KV=2, D=D, window=window)
      for D in (64, 128) for window in (OPEN, CAUSAL)),
    *(Ragged(*USED, D=D, window=window)
      for D in (64, 128, 256) for window in (OPEN, CAUSAL, (50, -1))),
    *(Ragged(*LONG_ONES, D=D, window=window) for D in (64, 128) for window in (OPEN, CAUSAL)),
]  # fmt: skip


@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_ragged_sequences(case, device):
    q, k, v = case.tensors(device)
    clean = [x.nan_to_num() for x in (q, k, v)]
    options = case.options(device)
    same = reference.attention_with(*clean, options)
    exact = reference.attention_with(*(x.double() for x in clean), options)
    with poison_new_allocations():
        actual = attend_ragged(case, q, k, v)
    assert_outputs(actual, same, exact)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)], ids=str)
def test_ragged_sequences_of_any_strides(order, device):
    case = Ragged(*ALIKE, window=CAUSAL)
    tensors = case.tensors(device)
    apart = [embedded(x, order=order) for x in tensors]
    assert torch.equal(attend_ragged(case, *apart)[0], attend_ragged(case, *tensors)[0])


def test_ragged_sequences_are_those_of_a_batch(device):
    case = Case(6, 4, 2, 300, 300, 128, CAUSAL)
    tensors = case.tensors(device)
    ragged = Ragged((300,) * 6, (300,) * 6, D=128, window=CAUSAL)
    out, lse = attend(case, *tensors)
    packed, packed_lse = attend_ragged(ragged, *(x.flatten(0, 1) for x in tensors))
    torch.testing.assert_close(packed, out.flatten(0, 1))
    torch.testing.assert_close(packed_lse, lse.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("case", [Ragged(*MANY, H=6, H_KV=2, D=128, window=CAUSAL)], ids=str)
def test_ragged_sequences_have_the_same_bits_every_time(case, device):
    tensors = case.tensors(device)
    out, lse = attend_ragged(case, *tensors)
    for _ in range(REPEATS):
        again, lse_again = attend_ragged(case, *tensors)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)


def test_gradients_of_ragged_sequences(device):
    case = Ragged(*FEW, window=CAUSAL)
    options = case.options(device)
    grads = {}
    for dtype in (case.dtype, torch.float64):
        q, k, v = (x.nan_to_num().to(dtype).requires_grad_() for x in case.tensors(device))
        if dtype == case.dtype:
            out, _ = attend_ragged(case, q, k, v)
        else:
            out, _ = reference.attention_with(q, k, v, options)
        weights = random_tensor(out.shape, seed="dout", dtype=torch.float64, device=device)
        grads[dtype] = torch.autograd.grad(out, (q, k, v), weights.to(dtype))
    for name, found, exact in zip("qkv", *grads.values(), strict=True):
        error = (found - exact).abs().max() / exact.abs().max()
        assert error < 0.02, name


@pytest.mark.parametrize("window", [OPEN, CAUSAL], ids=str)
def test_cuda_graph(window, device):
    case = Case(2, 40, 8, 600, 600, 128, window)
    q, k, v = case.tensors(device)
    expected, _ = attend(case, q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = attend(case, q, k, v)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)


def test_two_streams_at_once(device):
    case = Case(2, 40, 8, 600, 600, 128, CAUSAL)
    inputs = [case._replace(B=B).tensors(device) for B in (1, 2, 3)]
    expected = [attend(case, *x)[0] for x in inputs]
    streams = [torch.cuda.Stream(device) for _ in inputs]
    torch.cuda.synchronize(device)
    for _ in range(20):
        results = []
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                results.append(attend(case, *x)[0])
        torch.cuda.synchronize(device)
        assert all(map(torch.equal, results, expected))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own
def test_compiled(device):
    case = Case(2, 4, 4, 200, 200, 64, CAUSAL)
    tensors = case.tensors(device)
    compiled = torch.compile(
        lambda q, k, v: flash_attn_func(q, k, v, causal=True), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*tensors), attend(case, *tensors)[0])


def test_is_chosen_and_says_what_it_refuses(device):
    case = Case(1, 2, 2, 64, 64, 64)
    q, k, v = case.tensors(device)
    assert torch.equal(flash_attn_func(q, k, v), attend(case, q, k, v)[0])
    with pytest.raises(backends.UnsupportedProblemError, match="it computes in float16"):
        flash_attn_func(q.float(), k.float(), v.float(), backend="hopper")
    with pytest.raises(backends.UnsupportedProblemError, match="multiple of 8, got 63"):
        flash_attn_func(q[..., :63], k[..., :63], v[..., :63], backend="hopper")
