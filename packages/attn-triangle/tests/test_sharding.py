"""Rows spread over two processes give what one process gives."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp

from attn_triangle import shard_rows, triangle_attention, triangle_attention_sharded
from attn_triangle.utils import gen_tensors

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch has no distributed"
)
WORLD = 2
ROWS = 7  # the ranks get 4 and 3


def whole_inputs(device, dtype):
    torch.manual_seed(0)
    q, k, v, bias, mask = gen_tensors(ROWS, 8, 2, True, device, dtype)
    return q, k, v, bias, mask, torch.randn_like(q)


def attend_on_rank(rank, store, kind, backend, dtype, folder):
    torch.distributed.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=WORLD
    )
    try:
        if kind == "cuda":
            torch.cuda.set_device(rank)
        mesh = torch.distributed.init_device_mesh(kind, (WORLD,), mesh_dim_names=("rows",))
        q, k, v, bias, mask, dout = whole_inputs(kind, dtype)
        own = [shard_rows(x.detach(), mesh).requires_grad_() for x in (q, k, v)]
        out = triangle_attention_sharded(
            *own, bias, shard_rows(mask, mesh, dim=-2), mesh=mesh, mesh_dim="rows"
        )
        grads = torch.autograd.grad(out, [*own, bias], shard_rows(dout, mesh))
        torch.save([x.detach().cpu() for x in (out, *grads)], f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def check(kind, backend, dtype, folder):
    store = folder / "store"
    mp.spawn(attend_on_rank, (str(store), kind, backend, dtype, str(folder)), nprocs=WORLD)
    parts = [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]
    q, k, v, bias, mask, dout = whole_inputs(kind, dtype)
    out = triangle_attention(q, k, v, bias, mask)
    whole = [out, *torch.autograd.grad(out, [q, k, v, bias], dout)]
    *sharded, dbias = (x.detach().cpu() for x in whole)
    for index, expected in enumerate(sharded):
        actual = torch.cat([part[index] for part in parts], dim=-3)
        torch.testing.assert_close(actual, expected)
    for part in parts:
        assert part[-1].dtype == dtype
        torch.testing.assert_close(part[-1], dbias)


def test_two_cpu_processes(tmp_path):
    check("cpu", "gloo", torch.float32, tmp_path)


@pytest.mark.gpu
def test_two_gpus(tmp_path, device):
    if torch.cuda.device_count() < WORLD:
        pytest.skip("needs two GPUs")
    check("cuda", "nccl", torch.bfloat16, tmp_path)


def test_the_mesh_must_be_where_the_tensors_are():
    class Mesh:
        device_type = "cuda"

    q, k, v, bias, _ = gen_tensors(3, 4, 1, False, "cpu", torch.float32)
    with pytest.raises(ValueError, match="device type of q, cpu, got cuda"):
        triangle_attention_sharded(q, k, v, bias, mesh=Mesh())
    with pytest.raises(ValueError, match="q must be a tensor, got NoneType"):
        triangle_attention_sharded(None, k, v, bias, mesh=Mesh())


def test_a_dimension_that_the_mesh_lacks_is_named():
    class Mesh:
        device_type, mesh_dim_names = "cpu", ("rows",)

    q, k, v, bias, _ = gen_tensors(3, 4, 1, False, "cpu", torch.float32)
    message = r"mesh_dim must be a number or one of \('rows',\), got 'columns'"
    with pytest.raises(ValueError, match=message):
        triangle_attention_sharded(q, k, v, bias, mesh=Mesh(), mesh_dim="columns")
