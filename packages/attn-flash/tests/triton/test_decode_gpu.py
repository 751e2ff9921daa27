"""flash_attn_with_kvcache and rotary embedding by backend "triton" on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch

from attn_core.testing import assert_within_budget, poison_new_allocations
from attn_flash import flash_attn_with_kvcache, kvcache_ops, rotary_ops
from attn_flash.kvcache_conformance import (
    KVCACHE_CASES,
    ROTARY_CASES,
    KVCacheCase,
    RotaryCase,
    _with_own_caches,
)
from attn_flash.layers.rotary import apply_rotary_emb, apply_rotary_emb_qkv_

pytestmark = pytest.mark.gpu

BACKEND = "triton"
BFLOAT, FLOAT = torch.bfloat16, torch.float32
# In float32 both errors are a few roundings, added up in another order: the largest is luck.
FACTORS = {torch.float16: 2.0, BFLOAT: 2.0, FLOAT: 4.0}
LONG = KVCacheCase((3000, 1, 4095), H=16, D=128, D_v=128, capacity=4096, causal=True)
CASES = [
    *KVCACHE_CASES,
    LONG,
    LONG._replace(new=1, rotary=128, page=256, batch_idx=True),
    LONG._replace(M=4, new=4, lens=(3000, 1, 4000), leftpad=True, window=(700, 0)),
    LONG._replace(M=64, H=8, D=64, D_v=64, alibi=True, softcap=15.0),
    LONG._replace(M=300, H=8, page=16, lens=(3000, 301, 4095)),
    LONG._replace(M=100, H=8, D=256, D_v=256, lens=(3000, 5, 400)),
    LONG._replace(H=64, H_KV=1, D=59, D_v=59, splits=7),
]


def check(case, dtype, device):
    inputs = case.inputs(dtype, device)
    wide = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    with poison_new_allocations():
        actual = case.call(BACKEND, **inputs)
    same_dtype, exact = case.reference(**inputs), case.reference(**wide)
    if isinstance(actual, torch.Tensor):
        actual, same_dtype, exact = (actual,), (same_dtype,), (exact,)
    for index, (value, *expected) in enumerate(zip(actual, same_dtype, exact, strict=True)):
        expected[0] = expected[0].to(value.dtype)
        factor = 4.0 if value.dtype == FLOAT else FACTORS[dtype]
        assert_within_budget(value, *expected, name=f"output {index}", factor=factor)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kvcache(case, device):
    check(case, BFLOAT, device)


@pytest.mark.parametrize("dtype", [torch.float16, FLOAT], ids=str)
@pytest.mark.parametrize("case", [*CASES[1:4], LONG], ids=str)
def test_kvcache_dtypes(case, dtype, device):
    check(case, dtype, device)


@pytest.mark.parametrize("dtype", [BFLOAT, FLOAT], ids=str)
@pytest.mark.parametrize(
    "case",
    [*ROTARY_CASES, RotaryCase(3, 700, 8, 128, 128), RotaryCase(2, 300, 8, 96, 64, True)],
    ids=str,
)
def test_rotary(case, dtype, device):
    check(case, dtype, device)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_of_rotary_turns_back(interleaved, inplace, device):
    x = torch.randn(2, 217, 4, 128, device=device, requires_grad=True)
    angles = torch.randn(230, 32, device=device)
    offsets = torch.tensor([3, 11], device=device)
    tables = (angles.cos(), angles.sin(), interleaved)
    grads = []
    for backend, changes_x in ((BACKEND, inplace), ("torch", False)):
        leaf = x.detach().clone().requires_grad_()
        out = apply_rotary_emb(leaf, *tables, changes_x, offsets, backend=backend)
        grads.append(torch.autograd.grad(out, leaf, torch.cos(x.detach()))[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("is_contiguous", [True, False])
def test_packed_rotary_rotates_queries_and_keys(is_contiguous, device):
    qkv = torch.randn(2, 50, 3, 4, 64, device=device, dtype=BFLOAT)
    if not is_contiguous:
        qkv = qkv.transpose(2, 3).contiguous().transpose(2, 3)
    angles = torch.randn(50, 32, device=device)
    cos, sin = angles.cos(), angles.sin()
    expected = qkv.clone()
    for part in (0, 1):
        expected[:, :, part] = apply_rotary_emb(qkv[:, :, part], cos, sin, backend="torch")
    result = apply_rotary_emb_qkv_(qkv, cos, sin, backend=BACKEND)
    assert result is qkv
    torch.testing.assert_close(qkv, expected)


# --- lengths that live on the device --------------------------------------------------------------

STEP = KVCacheCase(
    (900, 1, 300), M=2, new=2, H=16, D=128, D_v=128, capacity=1024, rotary=64, causal=True
)
STEPS = pytest.mark.parametrize("case", [STEP, STEP._replace(page=16, leftpad=True)], ids=str)


def runner(case, inputs):
    """A function that runs the step on the same tensors every time."""
    return lambda: flash_attn_with_kvcache(**inputs, **case.options(), backend=BACKEND)


@pytest.fixture
def no_waiting():
    """Waiting for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@STEPS
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_nothing_waits_for_the_gpu(case, device, request):
    step = runner(case, case.inputs(BFLOAT, device))
    step()
    request.getfixturevalue("no_waiting")
    step()


@STEPS
def test_graph_follows_lengths(case, device):
    inputs = case.inputs(BFLOAT, device)
    for name in ("k_cache", "v_cache"):
        inputs[name].nan_to_num_(0.5)
    if case.page:
        table = inputs["block_table"]
        table.copy_(torch.randperm(table.numel(), device=device).view_as(table))
    step = runner(case, inputs)
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step()
    for lens in ((900, 1, 300), (5, 1020, 0), (1022, 1022, 511)):
        inputs["cache_seqlens"].copy_(torch.tensor(lens))
        inputs["k"].normal_()
        before = _with_own_caches(inputs)
        graph.replay()
        expected = case.reference(**before)
        wide = {n: x.double() if x.is_floating_point() else x for n, x in before.items()}
        exact = case.reference(**wide)
        assert_within_budget(out, expected[0], exact[0], name="out")
        assert_within_budget(lse, expected[1].to(FLOAT), exact[1], name="lse", factor=4.0)
        assert_within_budget(inputs["k_cache"], expected[2], exact[2], name="k_cache")


def test_nothing_compiles_anew_as_sequences_grow(device):
    from attn_flash._triton import append, decode

    def compiled():
        kernels = (decode._kvcache_attention_kernel, append._append_to_kvcache_kernel)
        return [len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values()]

    case = STEP._replace(splits=3)
    case.call(BACKEND, **case.inputs(BFLOAT, device))
    before = compiled()
    for lens in ((901, 17, 16), (64,) * 7, (1000,), (0, 3)):
        changed = case._replace(lens=lens)
        changed.call(BACKEND, **changed.inputs(BFLOAT, device))
    assert compiled() == before


def test_a_kernel_for_one_sequence_serves_many(device):
    case = KVCacheCase((700,), H=16, D=128, D_v=128, capacity=1000, splits=3)
    for lens in ((700,), (700, 1000, 5), (3, 900)):
        check(case._replace(lens=lens), BFLOAT, device)


def test_same_bits_every_time(device):
    inputs = LONG.inputs(BFLOAT, device)
    first = LONG.call(BACKEND, **inputs)
    for _ in range(50):
        assert all(map(torch.equal, LONG.call(BACKEND, **inputs), first))


def test_caches_beyond_32_bits(device):
    case = KVCacheCase((40, 70, 3, 90, 5), H=2, H_KV=1, new=1, capacity=96)
    far_apart = 2**29 + 64  # elements from sequence to sequence: the last begins beyond 2**31
    if torch.cuda.mem_get_info(device)[0] < 4 * far_apart * len(case.lens) * 2:
        pytest.skip("needs 22 GB of device memory")
    inputs = case.inputs(BFLOAT, device)
    expected = case.call(BACKEND, **inputs)
    for name in ("k_cache", "v_cache"):
        cache = inputs[name]
        storage = torch.empty(far_apart * len(case.lens), dtype=BFLOAT, device=device)
        strides = (far_apart, *cache.stride()[1:])
        inputs[name] = storage.as_strided(cache.shape, strides).copy_(cache)
    actual = runner(case, inputs)()
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(inputs["v_cache"].nan_to_num(7.0), expected[3])


# --- torch around it ------------------------------------------------------------------------------


def test_opcheck(device):
    inputs = STEP.inputs(BFLOAT, device)
    rotary = (inputs["rotary_cos"], inputs["rotary_sin"], True)
    cache = (inputs["cache_seqlens"], 0, None, None, None)
    caches = (inputs["k_cache"].nan_to_num(), inputs["v_cache"].nan_to_num())
    check_faketensor = {"test_utils": ("test_schema", "test_faketensor")}
    args = (inputs["q"], *caches, *rotary, *cache, None, 2, 0.1, -1, 0, 0.0, 0, BACKEND)
    torch.library.opcheck(kvcache_ops.attention.overload, args, **check_faketensor)
    args = (inputs["k"], inputs["v"], *caches, *rotary, *cache, BACKEND)
    torch.library.opcheck(kvcache_ops.append.overload, args, **check_faketensor)
    x = torch.randn(2, 5, 3, 64, device=device)
    args = (x, *rotary[:2], None, 2, None, 5, True, False, BACKEND)
    args = (args[0], args[1].float(), args[2].float(), *args[3:])
    for operator in (rotary_ops.rotate, rotary_ops.rotate_):
        torch.library.opcheck(operator.overload, args, **check_faketensor)


@pytest.mark.filterwarnings("ignore")  # torch's own, of importing and running inductor
def test_compiled_step_is_the_eager_step(device):
    inputs = STEP.inputs(BFLOAT, device)

    def compute(q, k_cache, v_cache, k, v, cos, sin, lens):
        out = flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cos, sin, lens, causal=True, backend=BACKEND
        )
        return out * 1.0

    names = ("q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens")
    torch._dynamo.reset()
    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    first, second = _with_own_caches(inputs), _with_own_caches(inputs)
    actual = compiled(*(first[name] for name in names))
    assert torch.equal(actual, compute(*(second[name] for name in names)))
    for name in ("k_cache", "v_cache"):
        assert torch.equal(first[name].nan_to_num(7.0), second[name].nan_to_num(7.0))
