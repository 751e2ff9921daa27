"""A sequence spread over two processes gives what one process gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp

from attn_core.testing import random_tensor
from attn_evo import EvoWeights, evo_attention, evo_attention_sharded

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch has no distributed"
)
WORLD = 2
CASES = {  # the first rank's tokens of 37, causal, masked
    "causal": (18, True, False),
    "causal-mask-uneven": (5, True, True),
    "causal-empty-rank": (37, True, False),
    "full": (18, False, False),
    "full-mask-uneven": (30, False, True),
}


def whole_inputs(kind, dtype, make_weights):
    v = random_tensor((2, 3, 37, 16), seed="v", dtype=dtype, device=kind)
    dout = random_tensor(v.shape, seed="dout", dtype=dtype, device=kind)
    mask = random_tensor((2, 37), seed="mask", device=kind) > -1
    return v, make_weights("w", 16, dtype, kind), mask, dout


def part(x, first, rank, dim):
    length = x.shape[dim]
    return x.split((first, length - first), dim)[rank].clone()


def attend_on_rank(rank, store, kind, comms, inputs, backend, folder):
    torch.distributed.init_process_group(
        comms, init_method=f"file://{store}", rank=rank, world_size=WORLD
    )
    try:
        if kind == "cuda":
            torch.cuda.set_device(rank)
        mesh = torch.distributed.init_device_mesh(kind, (WORLD,), mesh_dim_names=("tokens",))
        v, weights, mask, dout = (x.to(kind) if torch.is_tensor(x) else x for x in inputs)
        results = {}
        for name, (first, causal, has_mask) in CASES.items():
            own = part(v, first, rank, 2).requires_grad_()
            leaves = [w.detach().to(kind).requires_grad_() for w in weights]
            out = evo_attention_sharded(
                own,
                causal,
                part(mask, first, rank, 1) if has_mask else None,
                mesh=mesh,
                mesh_dim="tokens",
                weights=EvoWeights(*leaves),
                backend=backend,
            )
            grads = torch.autograd.grad(out, [own, *leaves], part(dout, first, rank, 2))
            results[name] = [x.detach().cpu() for x in (out, *grads)]
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def check(kind, comms, dtype, make_weights, folder, backend="auto", **tolerances):
    v, weights, mask, dout = inputs = whole_inputs("cpu", dtype, make_weights)
    arguments = (str(folder / "store"), kind, comms, inputs, backend, str(folder))
    mp.spawn(attend_on_rank, arguments, nprocs=WORLD)
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]
    leaves = [x.requires_grad_() for x in (v, *weights)]
    for name, (_, causal, has_mask) in CASES.items():
        out = evo_attention(v, causal, mask if has_mask else None, weights=weights)
        dv, *dweights = torch.autograd.grad(out, leaves, dout)
        parts = [results[name] for results in ranks]
        for index, expected in enumerate((out, dv)):
            actual = torch.cat([own[index] for own in parts], dim=2)
            torch.testing.assert_close(actual, expected, **tolerances)
        for own in parts:
            torch.testing.assert_close(own[2:], dweights, **tolerances)


def test_two_cpu_processes(make_weights, tmp_path):
    check("cpu", "gloo", torch.float64, make_weights, tmp_path)


@pytest.mark.gpu
def test_two_gpus(make_weights, tmp_path, device):
    if torch.cuda.device_count() < WORLD:
        pytest.skip("needs two GPUs")
    tolerances = {"rtol": 2e-3, "atol": 2e-3}
    check("cuda", "nccl", torch.float32, make_weights, tmp_path, "triton", **tolerances)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mesh": None}, "mesh must be a DeviceMesh, got NoneType"),
        ({"mesh": {"device_type": "cuda"}}, "device type of v, cpu, got cuda"),
        (
            {"mesh_dim": "heads"},
            "mesh_dim must be .* dimensions named .*, got 'heads'",
        ),
        ({"mesh_dim": 1}, "mesh_dim must be .*, got 1"),
        ({"causal": "no"}, "causal must be True or False, got 'no'"),
    ],
    ids=["no-mesh", "device", "name", "number", "causal"],
)
def test_a_mesh_that_does_not_fit(arguments, message):
    facts = {"device_type": "cpu", "ndim": 1, "mesh_dim_names": ("tokens",)}
    if arguments.get("mesh", facts):
        arguments = {**arguments, "mesh": SimpleNamespace(**facts | arguments.get("mesh", {}))}
    with pytest.raises(ValueError, match=message):
        evo_attention_sharded(torch.zeros(1, 1, 4, 8), **arguments)
