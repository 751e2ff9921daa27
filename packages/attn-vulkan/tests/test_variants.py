"""The plan of a problem, which needs no device."""

from __future__ import annotations

import dataclasses

import pytest

from attn_vulkan import variants
from attn_vulkan.device import Device, Features
from attn_vulkan.problem import Problem


def gpu(kind="discrete"):
    return Device(0, "GPU", kind, "1.3.0", "driver", 32, 1 << 34, Features(), 48 << 10, 1024)


def forward(variant, dtype, sizes, kind="discrete"):
    batches, len_q, len_k, heads, heads_kv, dim = sizes
    problem = Problem(dtype, batches, len_q, len_k, heads, heads_kv, dim, dim, is_aligned=True)
    return variants.forward(gpu(kind), variant, problem, 0.125)


@pytest.mark.parametrize("variant", ["matrix", "subgroup", "scalar"])
def test_keys_are_split_where_queries_are_few(variant):
    assert forward(variant, "float16", (8, 1, 8192, 64, 8, 128)).splits > 1
    assert forward(variant, "float16", (1, 4096, 4096, 16, 16, 128)).splits == 1
    assert forward(variant, "float16", (1, 1, 8, 1, 1, 64)).splits == 1


def test_parts_have_room_where_they_are_merged():
    """MAX_SPLITS of combine.comp."""
    assert forward("matrix", "float16", (1, 1, 1 << 20, 1, 1, 64)).splits == 1024


def test_two_parts_do_not_pay():
    assert forward("matrix", "float16", (1, 512, 1 << 14, 64, 64, 128)).splits == 4
    assert forward("matrix", "float16", (1, 1024, 1 << 14, 64, 64, 128)).splits == 1


@pytest.mark.parametrize("dim", [32, 64, 128, 256])
@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("is_aligned", [False, True])
def test_scalar_tiles_fit_the_shared_memory(is_aligned, part, dim):
    problem = Problem("float32", 1, 4096, 4096, 1, 1, dim, dim, is_aligned=is_aligned)
    tiles, size = {
        "forward": (variants._FORWARD_TILES, variants._forward_bytes),
        "backward": (variants._BACKWARD_TILES, variants._backward_bytes),
    }[part]
    tile = variants._first_fitting(tiles, gpu(), 4096, problem, size)
    assert size(tile, problem) <= gpu().shared_memory
    assert tile.columns // tile.column_threads % 4 == 0  # weights are shared in vectors
    assert tile.rows * tile.column_threads % tile.threads == 0


@pytest.mark.parametrize("dim,threads", [(64, 64), (96, 64), (128, 128), (256, 128)])
def test_decoding_keeps_every_processor_busy_once(dim, threads):
    device = dataclasses.replace(gpu(), processors=132)
    problem = Problem("float16", 8, 1, 8192, 64, 8, dim, dim, is_aligned=True)
    plan = variants.forward(device, "matrix", problem, 0.125)
    assert (plan.constants[0], plan.rows, plan.pack) == (threads, 16, 8)
    _, _, groups = plan.groups(problem)
    most = 132 * variants._BUSY_DECODERS[threads]
    assert 0.9 < plan.groups(problem)[0] * groups / most <= 1


@pytest.mark.parametrize("dim,tile", [(64, (128, 64)), (128, (256, 128)), (256, (128, 64))])
def test_rows_stay_in_memory_where_caches_hold_them(dim, tile):
    problem = Problem("float32", 1, 4096, 4096, 1, 1, dim, dim, is_aligned=True)
    plan = variants.forward(gpu(), "scalar", problem, 0.125)
    is_direct = bool(plan.constants[-1])
    assert is_direct == (dim <= 128)
    assert not is_direct or (plan.constants[0], plan.rows) == tile
    assert not variants.forward(gpu("cpu"), "scalar", problem, 0.125).constants[-1]
    unaligned = dataclasses.replace(problem, is_aligned=False)
    assert not variants.forward(gpu(), "scalar", unaligned, 0.125).constants[-1]


@pytest.mark.parametrize(
    "options,first",
    [
        ({}, "matrix2"),
        ({"window": (-1, 0)}, "matrix2"),
        ({"softcap": 2.0}, "matrix"),
        ({"is_aligned": False}, "matrix"),
        ({"len_q": 16}, "matrix"),  # keys are split
        ({"head_dim": 96, "head_dim_v": 96}, "matrix"),
    ],
)
def test_the_variant_that_was_measured_fastest_comes_first(options, first):
    sizes = {"len_q": 4096, "head_dim": 128, "head_dim_v": 128, "is_aligned": True, **options}
    problem = Problem("float16", 1, len_k=4096, heads=16, heads_kv=16, **sizes)
    names = ["matrix2", "matrix", "subgroup", "scalar"]
    assert variants.ranked(gpu(), problem, names)[0] == first
    assert variants.ranked(gpu(), problem, ["matrix2", "scalar"]) == ["matrix2", "scalar"]


@pytest.mark.parametrize("variant,position", [("matrix", 11), ("matrix2", 9)])
@pytest.mark.parametrize(
    "scale,is_first", [(0.125, 0), (1e-9, 0), (1e-29, 1), (0.0, 1), (-0.125, 1), (1e9, 1)]
)
def test_scales_that_would_not_hide_a_score_come_first(variant, position, scale, is_first):
    problem = Problem("float16", 1, 512, 512, 1, 1, 64, 64, is_aligned=True)
    plan = variants.forward(gpu(), variant, problem, scale)
    assert plan.constants[position] == is_first


@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("len_q", [1, 100, 200, 4096])
def test_matrix2_has_whole_chunks_in_shared_memory(dim, len_q):
    problem = Problem("float16", 1, len_q, 4096, 16, 16, dim, dim, is_aligned=True)
    plan = variants.forward(gpu(), "matrix2", problem, 0.125)
    threads, _, _, columns, *_, blocks, chunk = plan.constants
    assert columns % (16 * chunk) == 0
    assert plan.rows == threads // 2 * blocks
    rows = max(2 * columns, threads // 2)  # keys and values, or a block of each subgroup's queries
    assert rows * (dim // 8 + 1) * 16 <= gpu().shared_memory


@pytest.mark.parametrize(
    "missing,words",
    [
        ("buffer_device_address", "bufferDeviceAddress"),
        ("int64", "shaderInt64"),
        ("scalar_layout", "scalarBlockLayout"),
    ],
)
def test_a_device_that_lacks_what_every_shader_needs(missing, words):
    needs = {"buffer_device_address": True, "int64": True, "scalar_layout": True}
    device = dataclasses.replace(gpu(), features=Features(**needs))
    assert variants.refusal(device, "float32") is None
    device = dataclasses.replace(gpu(), features=Features(**{**needs, missing: False}))
    assert words in variants.refusal(device, "float32")
