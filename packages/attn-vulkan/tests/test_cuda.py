"""CUDA tensors on the same GPU through Vulkan: shared memory, shared semaphores, streams."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from attn_core.testing import random_tensor
from attn_vulkan import _backend, _torch

pytestmark = pytest.mark.gpu
PLAIN = {
    **dict.fromkeys(("alibi_slopes", "attn_bias", "key_mask", "sinks", "block_table")),
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "seqused_k")),
}


class Options:
    """What attn-flash passes beside q, k and v."""

    def __init__(self, **values):
        vars(self).update(PLAIN, window=(-1, -1), softcap=0.0, scale=0.125, **values)

    def lengths(self, q, k):
        return q.shape[1], k.shape[1]


@pytest.fixture
def cuda(device):
    if device.type != "cuda":
        pytest.skip("needs --device=cuda")
    reason = _backend._device_refusal(device)
    if reason is not None:
        pytest.skip(reason)
    return device


def inputs(device, length=256, dtype=torch.float16):
    shape = (2, length, 4, 64)
    return [random_tensor(shape, seed=f"{n}", dtype=dtype, device=device) for n in "qkv"]


def expected(q, k, v):
    swapped = [x.double().transpose(1, 2) for x in (q, k, v)]
    return torch.nn.functional.scaled_dot_product_attention(*swapped).transpose(1, 2)


def test_tensors_of_torch_are_copied(cuda):
    q, k, v = inputs(cuda)
    out, lse = _torch.flash_attention(q, k, v, Options())
    torch.testing.assert_close(out.double(), expected(q, k, v), atol=2e-3, rtol=0)
    assert lse.isfinite().all()


def test_shared_tensors_are_used_in_place(cuda, monkeypatch):
    from attn_vulkan import cuda as bridge

    shared = [bridge.empty(x.shape, x.dtype, cuda).copy_(x) for x in inputs(cuda)]
    copied = []
    real = bridge.CudaPlacement._copy

    def spy(placement, target, source, size):
        copied.append(source)
        real(placement, target, source, size)

    monkeypatch.setattr(bridge.CudaPlacement, "_copy", spy)
    out, _ = _torch.flash_attention(*shared, Options())
    assert not {x.data_ptr() for x in shared} & set(copied)
    torch.testing.assert_close(out.double(), expected(*shared), atol=2e-3, rtol=0)


def test_the_order_of_the_stream_is_kept(cuda):
    q, k, v = inputs(cuda, 1024)
    for step in range(20):
        q = q * 0 + step / 20
        out, _ = _torch.flash_attention(q, k, v, Options())
        v = out + 0
    reference = inputs(cuda, 1024)[2]
    for step in range(20):
        reference = expected(q * 0 + step / 20, k, reference).half()
    torch.testing.assert_close(v, reference, atol=5e-3, rtol=0)


def test_streams_beside_one_another(cuda):
    q, k, v = inputs(cuda, 512)
    want = _torch.flash_attention(q, k, v, Options())[0].clone()
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    found = []
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(_torch.flash_attention(q, k, v, Options())[0])
    torch.cuda.synchronize()
    assert all(torch.equal(out, want) for out in found)


def test_gradients(cuda):
    q, k, v = inputs(cuda)
    out, lse = _torch.flash_attention(q, k, v, Options())
    dout = random_tensor(out.shape, seed="dout", dtype=out.dtype, device=cuda)
    grads = _torch.flash_attention_backward(dout, None, q, k, v, out, lse, False, Options())
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    for grad, want in zip(
        grads, torch.autograd.grad(expected(*wide), wide, dout.double()), strict=False
    ):
        torch.testing.assert_close(grad.double(), want, atol=5e-3, rtol=0)


def test_threads_without_a_context(cuda):
    """A thread's first call may be one to Vulkan: its CUDA context is then not current yet."""
    q, k, v = inputs(cuda)
    want = _torch.flash_attention(q, k, v, Options())[0]
    with ThreadPoolExecutor(1) as pool:
        out = pool.submit(_torch.flash_attention, q, k, v, Options()).result()[0]
    assert torch.equal(out, want)
