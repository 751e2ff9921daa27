"""Backend "triton" through the public functions on a GPU, against the reference in float64.

A kernel is compiled for every new combination of dtype, tiles, sides of the window and tail, which
takes about a second; cases share them where they can.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attn_core.testing import assert_within_budget, embedded, poison_new_allocations, random_tensor
from attn_flash import (
    flash_attention,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    ops,
    reference,
    sdpa_triton_fa,
)
from attn_flash.options import Options

from ..cases import (
    CAUSAL,
    OPEN,
    Case,
    assert_nan_where_expected,
    random_like,
    show_window,
    with_nan,
)

pytestmark = pytest.mark.gpu

BACKEND = "triton"
NAMES = ("out", "lse", "dq", "dk", "dv")
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
# In float32 both errors are a few roundings, added up in another order: the largest is luck.
FACTORS = {HALF: 2.0, BFLOAT: 2.0, FLOAT: 4.0}
# Of the norm: the hardware cuts operands to 10 bits, 2**-10 each. Torch takes TF32 or not by the
# shape of a product, so it cannot set the budget.
TF32_ERROR = 4e-3


SMALL = Case(2, 4, 4, 65, 65, 64)


@pytest.fixture
def allow_tf32():
    """A function that lets torch's matrix products use TF32 or forbids it."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_tf32

    def allow(value):
        settings.allow_tf32 = value

    yield allow
    allow(before)


def differentiate(compute, inputs, douts):
    """Outputs and gradients by name, given the gradient of out and, maybe, that of lse."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = compute(*inputs)
    douts = [dout.to(output.dtype) for dout, output in zip(douts, outputs, strict=False)]
    grads = torch.autograd.grad(outputs[: len(douts)], inputs, douts)
    return dict(zip(NAMES, (*outputs, *grads), strict=True))


def attend(inputs, douts, window=OPEN, scale=None):
    def compute(q, k, v):
        return flash_attn_func(
            q, k, v, 0.0, scale, False, window, return_attn_probs=True, backend=BACKEND
        )[:2]

    return differentiate(compute, inputs, douts)


def plain(inputs, douts, window=OPEN, scale=None):
    scale = inputs[0].shape[-1] ** -0.5 if scale is None else scale
    return differentiate(lambda q, k, v: reference.attention(q, k, v, scale, window), inputs, douts)


def cotangents(q, *, with_lse=False):
    """The gradient of out, and that of lse where asked for."""
    B, M, H, _ = q.shape
    dlse = random_tensor((B, H, M), seed="dlse", device=q.device)
    return [random_like(q, "dout"), *([dlse] if with_lse else [])]


def check_results(actual, inputs, douts, *problem):
    """Hold outputs and gradients to the error budget."""
    dtype = inputs[0].dtype
    same_dtype = plain(inputs, douts, *problem)
    exact = plain([x.double() for x in inputs], douts, *problem)
    for name, value in actual.items():
        assert value.dtype == (FLOAT if name == "lse" else dtype)
        assert_within_budget(value, same_dtype[name], exact[name], name=name, factor=FACTORS[dtype])


def check(inputs, window=OPEN, scale=None, *, douts=None):
    douts = cotangents(inputs[0]) if douts is None else douts
    actual = attend(inputs, douts, window, scale)
    check_results(actual, inputs, douts, window, scale)


def assert_same_bits(actual, expected):
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


# --- shapes -------------------------------------------------------------------------------------

VIT = [(197, 197), (257, 257), (577, 577)]
SQUARES = [(size, size) for size in (2, 63, 64, 127, 129, 1000, 1024, 1025)]
OBLONG = [(1, 127), (1, 1025), (63, 129), (149, 83), (1023, 7)]


@pytest.mark.parametrize("window", [OPEN, CAUSAL], ids=show_window)
@pytest.mark.parametrize(
    "lengths", [*VIT, *SQUARES, *OBLONG], ids=lambda lengths: "m{}-n{}".format(*lengths)
)
def test_lengths(lengths, window, device):
    check(Case(2, 3, 3, *lengths, 64).inputs(BFLOAT, device), window)


@pytest.mark.parametrize("window", [OPEN, CAUSAL], ids=show_window)
@pytest.mark.parametrize("D", [64, 128])
def test_long_sequences(D, window, device):
    check(Case(1, 2, 2, 4096, 4096, D).inputs(BFLOAT, device), window)


@pytest.mark.parametrize("lengths, window", [((1, 1), OPEN), ((70, 1), OPEN), ((70, 71), (0, 0))])
def test_one_key(lengths, window, device):
    # Its weight is 1, so dq and dk are 0 but for rounding, of which PyTorch may have none.
    inputs = Case(1, 2, 2, *lengths, 64).inputs(BFLOAT, device)
    douts = cotangents(inputs[0])
    exact = plain([x.double() for x in inputs], douts, window)
    for name, value in attend(inputs, douts, window).items():
        expected = exact[name].to(value.dtype)
        torch.testing.assert_close(value, expected, rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("D", [1, 16, 32, 59, 80, 96, 111, 160, 192, 256])
def test_head_dims(D, device):
    check(Case(1, 2, 2, 83, 99, D).inputs(BFLOAT, device), CAUSAL)


# --- dtypes, windows, heads -----------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(129, 129), (97, 200), (200, 97)], ids=str)
@pytest.mark.parametrize("window", [CAUSAL, (33, 18)], ids=show_window)
def test_float16(window, lengths, device):
    check(Case(2, 4, 2, *lengths, 64).inputs(HALF, device), window)


def test_float16_with_long_sequences(device):
    check(Case(1, 2, 1, 1500, 1300, 128).inputs(HALF, device), CAUSAL)


@pytest.mark.parametrize(
    "case, window",
    [
        (Case(2, 4, 2, 97, 130, 32), CAUSAL),
        (Case(1, 4, 2, 1100, 1200, 32), CAUSAL),
        (Case(1, 2, 2, 70, 70, 128), OPEN),
    ],
    ids=lambda value: show_window(value) if type(value) is tuple else str(value),
)
def test_float32(case, window, device, allow_tf32):
    allow_tf32(False)
    check(case.inputs(FLOAT, device), window)


@pytest.mark.parametrize("D", [64, 256])
def test_tf32(D, device, allow_tf32):
    inputs = Case(1, 2, 2, 70, 97, D).inputs(FLOAT, device)
    douts = cotangents(inputs[0])
    exact = plain([x.double() for x in inputs], douts, CAUSAL)
    allow_tf32(True)
    for name, value in attend(inputs, douts, CAUSAL).items():
        error = (value - exact[name]).norm() / exact[name].norm()
        assert error < TF32_ERROR, (name, error)


def test_tf32_is_used_only_where_torch_may(device, allow_tf32):
    inputs = Case(1, 2, 2, 70, 97, 64).inputs(FLOAT, device)
    results = {}
    for allowed in (False, True, False):
        allow_tf32(allowed)
        out = flash_attn_func(*inputs, causal=True, backend=BACKEND)
        assert torch.equal(results.setdefault(allowed, out), out)
    assert not torch.equal(results[False], results[True])


@pytest.mark.parametrize("lengths", [(190, 300), (300, 190), (1400, 1400)], ids=str)
@pytest.mark.parametrize("window", [(33, 18), (128, 0), (20, -1), (-1, 70)], ids=show_window)
def test_windows(window, lengths, device):
    check(Case(1, 2, 2, *lengths, 64).inputs(BFLOAT, device), window)


@pytest.mark.parametrize("heads", [(8, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("window", [OPEN, CAUSAL], ids=show_window)
def test_heads_that_share_keys(window, heads, device):
    check(Case(2, *heads, 128, 200, 64).inputs(BFLOAT, device), window)


@pytest.mark.parametrize("scale", [-0.2, 0.0, 1.0])
def test_softmax_scale(scale, device):
    check(SMALL.inputs(BFLOAT, device), CAUSAL, scale)


def test_large_scores(device):
    check(SMALL.inputs(BFLOAT, device, scale=10.0), CAUSAL)


def test_gradients_through_lse(device):
    inputs = SMALL.inputs(BFLOAT, device)
    check(inputs, CAUSAL, douts=cotangents(inputs[0], with_lse=True))


def test_queries_without_keys(device):
    inputs = Case(1, 2, 2, 150, 50, 64).inputs(BFLOAT, device)
    results = attend(inputs, cotangents(inputs[0], with_lse=True), CAUSAL)
    assert results["out"][:, :100].eq(0).all()
    assert results["lse"][..., :100].eq(-torch.inf).all()
    assert results["dq"][:, :100].eq(0).all()
    assert all(results[name].isfinite().all() for name in ("out", "dq", "dk", "dv"))


@pytest.mark.parametrize("window", [OPEN, CAUSAL], ids=show_window)
def test_nan_reaches_the_rows_that_see_it(window, device):
    q, k, v = SMALL.inputs(BFLOAT, device)
    q, k = with_nan(q, k)
    out, lse, _ = flash_attn_func(
        q, k, v, window_size=window, return_attn_probs=True, backend=BACKEND
    )
    expected = reference.attention(*(x.float() for x in (q, k, v)), q.shape[-1] ** -0.5, window)
    assert_nan_where_expected((out, lse), expected)


@pytest.mark.parametrize("sizes", [(0, 3, 5), (2, 0, 5), (2, 5, 0)], ids=str)
def test_empty(sizes, device):
    B, M, N = sizes
    inputs = Case(B, 2, 2, M, N, 64).inputs(BFLOAT, device)
    results = attend(inputs, cotangents(inputs[0]), CAUSAL)
    assert results.pop("lse").eq(-torch.inf).all()
    assert all(result.eq(0).all() for result in results.values())


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 2, 3, 1)], ids=str)
def test_any_strides_and_nothing_beside_the_tensors(order, device):
    inputs = [embedded(x, order=order) for x in SMALL.inputs(BFLOAT, device)]
    douts = [embedded(random_like(inputs[0], "dout"), order=order)]
    check(inputs, CAUSAL, douts=douts)


@pytest.mark.parametrize("window", [OPEN, CAUSAL, (33, 18)], ids=show_window)
def test_every_output_is_written(window, device):
    inputs = Case(1, 2, 2, 150, 97, 64).inputs(BFLOAT, device)
    douts = cotangents(inputs[0], with_lse=True)
    with poison_new_allocations():
        results = attend(inputs, douts, window)
    check_results(results, inputs, douts, window)


def test_heads_before_the_sequence(device):
    inputs = [x.transpose(1, 2).contiguous() for x in SMALL.inputs(BFLOAT, device)]
    expected = flash_attn_func(*(x.transpose(1, 2) for x in inputs), causal=True, backend=BACKEND)
    assert torch.equal(flash_attention(*inputs, backend=BACKEND).transpose(1, 2), expected)
    assert torch.equal(
        sdpa_triton_fa(*inputs, is_causal=True, backend=BACKEND).transpose(1, 2), expected
    )
    check([x.transpose(1, 2) for x in inputs], CAUSAL)


def test_packed(device):
    qkv = torch.stack(SMALL.inputs(BFLOAT, device), 2).requires_grad_()
    dout = random_like(qkv[:, :, 0], "dout")
    out = flash_attn_qkvpacked_func(qkv, causal=True, backend=BACKEND)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    results = attend([x.contiguous() for x in qkv.unbind(2)], [dout], CAUSAL)
    assert_same_bits(
        {"out": out, **dict(zip(("dq", "dk", "dv"), dqkv.unbind(2), strict=True))},
        {name: value for name, value in results.items() if name != "lse"},
    )


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_broadcast(dim, device):
    q, k, v = SMALL.inputs(BFLOAT, device)
    k, v = (x.narrow(dim, 0, 1).expand_as(x) for x in (k, v))
    check([q, k, v], CAUSAL, douts=[torch.ones_like(q[:1, :1]).expand_as(q)])


def test_alignment_of_pointers_may_change_between_calls(device):
    case = Case(1, 2, 2, 67, 71, 64)
    for seed, offset in enumerate([0, 1, 0, 3, 0]):
        inputs = [shifted(x, offset) for x in case.inputs(BFLOAT, device, seed=seed)]
        check(inputs, CAUSAL, douts=[shifted(x, offset) for x in cotangents(inputs[0])])


def shifted(x, offset):
    """A copy of x that starts at an element of its storage where nothing is aligned."""
    storage = x.new_full((x.numel() + 2 * offset,), torch.nan)
    return storage[offset : offset + x.numel()].view(x.shape).copy_(x)


@pytest.mark.parametrize("far", ["batch", "sequence", "heads"])
def test_strides_beyond_32_bits(far, device):
    far_apart = 2**31 + 64  # elements
    case, strides = {
        "batch": (Case(2, 2, 2, 70, 70, 64), (far_apart, 128, 64, 1)),
        "sequence": (Case(1, 1, 1, 270, 270, 64), (0, 2**23, 64, 1)),
        "heads": (Case(1, 2, 2, 70, 70, 64), (0, 64, far_apart, 1)),
    }[far]
    if torch.cuda.mem_get_info(device)[0] < 3 * 2 * far_apart:
        pytest.skip("needs 13 GB of device memory")
    storage = torch.full((far_apart + 2**27,), torch.nan, dtype=BFLOAT, device=device)
    near = case.inputs(BFLOAT, device)
    tensors = [*near, *cotangents(near[0])]
    *inputs, dout = (
        storage.as_strided(x.shape, strides, 2**15 * i).copy_(x) for i, x in enumerate(tensors)
    )
    assert max((x - 1) * s for x, s in zip(dout.shape, strides, strict=True)) > 2**31
    actual = attend(inputs, [dout], CAUSAL)
    check_results(actual, near, tensors[3:], CAUSAL)


# --- the same bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [OPEN, CAUSAL], ids=show_window)
def test_same_bits_every_time(window, device):
    inputs = Case(4, 8, 2, 300, 400, 64).inputs(BFLOAT, device)
    douts = cotangents(inputs[0])
    first = attend(inputs, douts, window)
    for _ in range(50):
        assert_same_bits(attend(inputs, douts, window), first)


def test_one_batch_element_alone(device):
    inputs = Case(3, 2, 2, 129, 129, 64).inputs(BFLOAT, device)
    douts = cotangents(inputs[0])
    together = attend(inputs, douts, CAUSAL)
    alone = attend([x[1:2] for x in inputs], [x[1:2] for x in douts], CAUSAL)
    assert_same_bits(alone, {name: value[1:2] for name, value in together.items()})


def test_causal_queries_do_not_depend_on_later_keys(device):
    q, k, v = SMALL.inputs(BFLOAT, device)
    expected = flash_attn_func(q, k, v, causal=True, backend=BACKEND)
    k[:, 21:], v[:, 21:] = 50 * k[:, 21:], -v[:, 21:]
    actual = flash_attn_func(q, k, v, causal=True, backend=BACKEND)
    assert torch.equal(actual[:, :21], expected[:, :21])


# --- torch around it ------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [OPEN, (33, 18)], ids=show_window)
def test_opcheck(window, device):
    problem = (*Options(scale=0.125, window_left=window[0], window_right=window[1]), BACKEND)
    inputs = [x.requires_grad_() for x in SMALL.inputs(BFLOAT, device)]
    torch.library.opcheck(torch.ops.attn_flash.attention.default, (*inputs, *problem))
    inputs = [x.detach() for x in inputs]
    outputs = ops.attention(*inputs, *problem)
    arguments = (*cotangents(inputs[0], with_lse=True), *inputs, *outputs, False, *problem)
    torch.library.opcheck(torch.ops.attn_flash.attention_backward.default, arguments)


@pytest.mark.filterwarnings("ignore")  # torch's own, of importing and running inductor
def test_compile_once_for_all_lengths(device):
    from torch._dynamo.testing import CompileCounterWithBackend

    def compute(q, k, v):
        out = flash_attn_func(q, k, v, causal=True, backend=BACKEND)
        return (out * 2,)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(compute, fullgraph=True, dynamic=True, backend=counter)
    counts = set()
    for lengths in ((65, 130), (97, 97), (130, 65), (1025, 1100)):
        inputs = Case(2, 4, 2, *lengths, 64).inputs(BFLOAT, device)
        douts = cotangents(inputs[0])
        actual = outputs_and_grads(compiled, inputs, douts)
        expected = outputs_and_grads(compute, inputs, douts)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        counts.add(counter.frame_count)
    assert len(counts) == 1


def outputs_and_grads(compute, inputs, douts):
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = compute(*inputs)
    return *outputs, *torch.autograd.grad(outputs, inputs, douts)


@pytest.mark.parametrize("with_grads", [False, True], ids=["forward", "backward"])
def test_cuda_graph(with_grads, device):
    def compute(*tensors):
        *inputs, dout = tensors
        if with_grads:
            return attend(inputs, [dout], CAUSAL)
        return {"out": flash_attn_func(*inputs, causal=True, backend=BACKEND)}

    def tensors(seed):
        inputs = SMALL.inputs(BFLOAT, device, seed=seed)
        return [*inputs, random_like(inputs[0], seed)]

    static = tensors("capture")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            compute(*static)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compute(*static)
    for seed in ("first", "second"):
        for tensor, changed in zip(static, tensors(seed), strict=True):
            tensor.copy_(changed)
        graph.replay()
        assert_same_bits(captured, compute(*tensors(seed)))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("window", [OPEN, CAUSAL], ids=show_window)
def test_host_does_not_wait(window, device):
    inputs = SMALL.inputs(BFLOAT, device)
    douts = cotangents(inputs[0], with_lse=True)
    expected = attend(inputs, douts, window)
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = attend(inputs, douts, window)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(actual, expected)


def test_stream_of_the_caller(device):
    inputs = SMALL.inputs(BFLOAT, device)
    douts = cotangents(inputs[0])
    expected = attend(inputs, douts, CAUSAL)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        later = [torch.full_like(x, torch.nan) for x in inputs]
        torch.cuda._sleep(10_000_000)  # clock cycles: any other stream would find the NaN
        for x, value in zip(later, inputs, strict=True):
            x.copy_(value)
        actual = attend(later, douts, CAUSAL)
    stream.synchronize()
    assert_same_bits(actual, expected)


def test_device_that_is_not_current(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    current = torch.cuda.current_device()
    other = torch.device("cuda", (current + 1) % torch.cuda.device_count())
    inputs = SMALL.inputs(BFLOAT, device)
    douts = cotangents(inputs[0])
    expected = attend(inputs, douts, CAUSAL)
    for _ in range(2):
        actual = attend([x.to(other) for x in inputs], [x.to(other) for x in douts], CAUSAL)
        assert actual["out"].device == other
        assert_same_bits({name: x.to(device) for name, x in actual.items()}, expected)
    assert torch.cuda.current_device() == current


# --- training -------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    def __init__(self, attention, width=64, heads=2):
        super().__init__()
        self.attention, self.heads = attention, heads
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(2))
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.proj = torch.nn.Linear(width, width)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(width, 2 * width), torch.nn.GELU(), torch.nn.Linear(2 * width, width)
        )

    def forward(self, x):
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, S, D]
        x = x + self.proj(self.attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


def losses_of_training(attention, device, steps=30):
    """Fit a tiny ViT to random labels of random images of 17 patches."""
    torch.manual_seed(0)
    images = random_tensor((64, 17, 48), seed="images", device=device)
    labels = torch.arange(64, device=device) % 10
    layers = [torch.nn.Linear(48, 64), Block(attention), Block(attention), torch.nn.Linear(64, 10)]
    model = torch.nn.Sequential(*layers).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        with torch.autocast(device.type, BFLOAT):
            logits = model(images).mean(1)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_vision_transformer_learns_as_with_sdpa(device):
    def ours(q, k, v):
        return sdpa_triton_fa(q, k, v, backend=BACKEND)

    losses = losses_of_training(ours, device)
    expected = losses_of_training(F.scaled_dot_product_attention, device)
    assert losses[-1] < losses[0] / 4
    torch.testing.assert_close(losses, expected, rtol=0.05, atol=0.02)
