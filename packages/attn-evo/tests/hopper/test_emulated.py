"""The Hopper kernels on a CPU: Gluon's on the emulator, the others in Triton's interpreter.

The emulator delays whatever the hardware may delay, so that a missing wait shows as a wrong number
and a missing arrival as an error.
"""

from __future__ import annotations

import pkgutil
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from attn_core.device import GLUON_VERSIONS, DeviceInfo, triton_version
from attn_core.launch import Launcher
from attn_core.testing import assert_within_budget, poison_new_allocations, random_tensor
from attn_core.testing.hopper import emulation, round_to
from attn_evo import EvoWeights, reference

pytest.importorskip("triton")

from triton.language import constexpr

from attn_core.gluon_launch import GluonLauncher
from attn_evo import _hopper
from attn_evo._hopper import support
from attn_evo._triton import backward, forward, prefix_sum, problem

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        triton_version() not in GLUON_VERSIONS,
        reason="the backend refuses this version of Triton",
    ),
]

BFLOAT, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
MODULES = [
    module.name
    for module in pkgutil.walk_packages(_hopper.__path__, f"{_hopper.__name__}.")
    if not module.ispkg and module.name != support.__name__
]
PORTABLE = {"IS_NVIDIA": False, "PRECISION": "ieee", "STARTS_NEXT": False}
SMS = 2


@pytest.fixture
def hopper(monkeypatch):
    """Both passes on an emulated GPU of `SMS` multiprocessors."""
    info = DeviceInfo("cuda", "emulated", "sm_90", SMS)
    for module in (problem, support):
        monkeypatch.setattr(module, "device_info", lambda device: info)
    monkeypatch.setattr(Launcher, "__call__", start)
    monkeypatch.setattr(GluonLauncher, "__call__", start_with_copies)
    monkeypatch.setattr("attn_core.testing.hopper._threads.LATENESS", 5e-4)
    with emulation(*MODULES) as modules:
        names = [name.removeprefix(f"{_hopper.__name__}.") for name in MODULES]
        hopper = SimpleNamespace(**dict(zip(names, modules, strict=True)))
        stand_ins = make_stand_ins(hopper.tiles.gl)
        for module in modules:
            for name, value in vars(module).items():
                if name in stand_ins:
                    setattr(module, name, stand_ins[name])
                elif isinstance(value, constexpr):
                    setattr(module, name, value.value)
        yield hopper


def start(launcher, num_programs, strides, args, constexprs, config):
    """What does without the driver what a `Launcher` does."""
    kernel = launcher._kernel
    if not hasattr(kernel, "run"):
        kernel[(num_programs,)](*args, num_warps=config.num_warps, **constexprs)
        return
    # Triton's interpreter computes wrongly in bfloat16, and knows no instructions of a GPU.
    wide = {id(x): in_float32(x) for x in args if torch.is_tensor(x) and x.dtype == BFLOAT}
    portable = {name: PORTABLE.get(name, value) for name, value in constexprs.items()}
    kernel[(num_programs,)](*(wide.get(id(x), x) for x in args), **portable)
    for x in args:
        if id(x) in wide and all(x.stride()):  # what is broadcast is only read
            x.copy_(wide[id(x)])


def start_with_copies(launcher, num_programs, args, constants, maxnreg):
    """What does without the driver what a `GluonLauncher` does."""
    launcher._kernel[(num_programs,)](*args, num_warps=launcher._num_warps, **constants)


def in_float32(x):
    """A copy with the strides of x."""
    numbers = x.untyped_storage().nbytes() // x.element_size()
    memory = x.as_strided((numbers,), (1,), 0).float()
    return memory.as_strided(x.size(), x.stride(), x.storage_offset())


def make_stand_ins(gl):
    """Device functions that are Triton's own, or one instruction of the GPU's."""

    def tensor(array):
        return gl.tensor(np.asarray(array, np.float32))

    def chunk_of_program(num_heads, num_tiles, num_chunks, tiles_per_chunk):
        sequence, chunk = gl.program_id(0) // num_chunks, gl.program_id(0) % num_chunks
        first = chunk * tiles_per_chunk
        last = min(first + tiles_per_chunk, num_tiles)
        return sequence, chunk, sequence // num_heads, sequence % num_heads, first, last

    def sigmoid_of_double(x, *_):
        with np.errstate(over="ignore"):
            return tensor(1 / (1 + np.exp(-2 * x.array)))

    def silu_times(half_x, v, _in_pairs):
        silu = (2.0 * half_x * sigmoid_of_double(half_x)).to(v.dtype)
        return (silu * v).to(v.dtype)

    def tile_of_program(columns, num_columns, num_tiles, reverse, block_n, block_c):
        column, place = gl.program_id(0) % num_columns, gl.program_id(0) // num_columns
        tile = num_tiles - 1 - place if reverse else place
        outer = column // (columns // block_c)
        return column, place, column % (columns // block_c), outer, tile * block_n

    def outer_offset(index, size_1, size_2, stride_0, stride_1, stride_2):
        i_0, i_1, i_2 = np.unravel_index(int(index), (index + 1, size_1, size_2))
        return int(i_0 * stride_0 + i_1 * stride_1 + i_2 * stride_2)

    def published(x):
        return gl.tensor(x.array.astype(np.float32).view(np.uint32) | np.int64(1 << 32))

    return {
        "tile_of_program": tile_of_program,
        "outer_offset": outer_offset,
        "published": published,
        "chunk_of_program": chunk_of_program,
        "sigmoid_of_double": sigmoid_of_double,
        "twice_gated": lambda y, x, *_: 2.0 * sigmoid_of_double(x) * y,
        "rounded": lambda x, dtype: tensor(round_to(x.array, dtype)).to(dtype),
        "settled": lambda x: x,
        "magnitude": lambda x: tensor(np.abs(x.array)),
        "add_magnitudes": lambda x, y: tensor(np.abs(x.array) + np.abs(y.array)),
        "with_sign": lambda x, y: tensor(np.where(np.signbit(y.array), -x.array, x.array)),
        "fast_tanh": lambda x: tensor(np.tanh(x.array)),
        "minus_sign": lambda x: tensor(-np.sign(x.array)),
        "magnitude_bits": lambda v: gl.tensor((v.array != 0).astype(np.int32)),
        "pair_product": lambda x, y: tensor(x.array * y.array).to(x.dtype),
        "against_sign": lambda x, y: tensor(np.where(np.signbit(y.array), x.array, -x.array)),
        "silu_times": silu_times,
        "gdc_wait": lambda: None,
    }


def attend(case, inputs):
    """Outputs and gradients of the kernels, which find nothing but NaN in fresh memory."""
    v, weights, *_, dout, _ = inputs
    call = (v, weights, None, None, None, case.causal, FLOAT, ())
    with poison_new_allocations():
        outputs = forward.attention(*call)
        dv, dsums, dweights = backward.attention_backward(dout, None, *call)
    names = ("out", "sums_after", "dv", "dsums", *(f"d{name}" for name in EvoWeights._fields))
    return dict(zip(names, (*outputs, dv, dsums, *dweights), strict=True))


def check(case, dtype, assert_results):
    inputs = case.inputs(dtype)
    assert_results(case, attend(case, inputs), inputs)


@pytest.mark.parametrize("length", [1, 33, 64, 65, 130])
def test_whole_sequences(length, hopper, make_case, assert_results):
    case = make_case(1, SMS, length, 128)
    assert hopper.forward.owns_sequences(case.inputs(BFLOAT)[0])
    check(case, BFLOAT, assert_results)


def test_whole_sequences_packed_with_others(hopper, make_case, packed, assert_results):
    case = make_case(2, SMS // 2, 97, 128)
    v, *rest, dout, dsums = inputs = case.inputs(BFLOAT)
    assert_results(case, attend(case, (packed(v), *rest, packed(dout), dsums)), inputs)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("length, dim", [(33, 64), (300, 64), (140, 128), (400, 128)])
def test_chunks(length, dim, causal, hopper, make_case, assert_results):
    case = make_case(1, 1, length, dim, causal)
    assert not hopper.forward.owns_sequences(case.inputs(BFLOAT)[0])
    check(case, BFLOAT, assert_results)


@pytest.mark.parametrize(
    "heads, dim, causal", [(1, 64, True), (1, 64, False), (1, 128, True), (SMS, 128, True)]
)
def test_outputs_in_float16(heads, dim, causal, hopper, make_case, assert_results):
    case = make_case(1, heads, 200, dim, causal)
    inputs = case.inputs(HALF)
    v, weights, *_ = inputs
    with poison_new_allocations():
        out, sums_after = forward.attention(v, weights, None, None, None, causal, FLOAT, ())
    assert_results(case, {"out": out, "sums_after": sums_after}, inputs)


@pytest.mark.parametrize("length", [1, 65, 300])
def test_float32(length, hopper, make_case, assert_results):
    check(make_case(1, 1, length, 64), FLOAT, assert_results)


@pytest.mark.parametrize("dtype", [BFLOAT, HALF], ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("exclusive", [False, True], ids=["inclusive", "exclusive"])
@pytest.mark.parametrize(
    "batch, heads, length", [(2, 3, 1), (2, 3, 700), (3, 3, 9000), (1, 1, 17_000)]
)
def test_prefix_sum(batch, heads, length, exclusive, reverse, dtype, hopper, monkeypatch):
    """Up to 18 and 34 tiles, more than a group; programs start in order, as they rely on it."""
    in_order = SimpleNamespace(sample=lambda x, _: [*x][::-1], shuffle=random.shuffle)
    monkeypatch.setattr("attn_core.testing.hopper._language.random", in_order)
    x = random_tensor((batch, length, heads, 64), seed="x", dtype=dtype).transpose(1, 2)
    with poison_new_allocations():
        out = prefix_sum.prefix_sum(x, 2, exclusive, reverse)
    plain, exact = (reference.prefix_sum(y, 2, exclusive, reverse) for y in (x, x.double()))
    assert_within_budget(out, plain, exact)
