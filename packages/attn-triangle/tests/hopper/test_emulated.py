"""The Hopper kernels on a CPU: Gluon's on the emulator, the others in Triton's interpreter.

The emulator delays whatever the hardware may delay, so that a missing wait shows as a wrong number
and a missing arrival as an error.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from attn_core.device import GLUON_VERSIONS, triton_version
from attn_core.testing import assert_within_budget, poison_new_allocations, random_tensor
from attn_core.testing.hopper import emulation
from attn_triangle import reference
from attn_triangle.layout import new_heads_last, scratch

pytest.importorskip("triton")

from attn_triangle._triton import short

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        triton_version() not in GLUON_VERSIONS,
        reason="the backend refuses this version of Triton",
    ),
    # Weights that float16 does not hold are what `redo` is for.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

# In the order in which they import one another.
MODULES = (
    "configs", "descriptors", "tiles", "problem", "redo", "rows", "mask",
    "forward", "dk_dv", "dq", "dq_dbias", "dbias", "backward",
)  # fmt: skip
GLUON = {
    "forward": "_attention_forward_kernel",
    "dk_dv": "_attention_backward_dk_dv_kernel",
    "dq": "_attention_backward_dq_kernel",
    "dq_dbias": "_attention_backward_dq_dbias_kernel",
    "dbias": "_attention_backward_dbias_kernel",
}
NAMES = ("out", "lse", "dq", "dk", "dv", "dbias")
SMS = 3


class Case(NamedTuple):
    """One problem; `mask` is none, random, rows (some masked as a whole), front or padded."""

    B: int = 1
    H: int = 1
    R: int = 3
    M: int = 130
    N: int = 150
    D: int = 16
    mask: str = "rows"
    masked_rows: str = "mean"
    deterministic: bool = True

    def __str__(self):
        words = [self.mask, self.masked_rows, "det" if self.deterministic else "atomics"]
        return "b{}-h{}-r{}-m{}-n{}-d{}-".format(*self[:6]) + "-".join(words)

    def draw(self, name, *shape, dtype=torch.float16):
        return random_tensor(shape, seed=f"{self}-{name}", dtype=dtype)

    def inputs(self):
        """q, k and v as a projection leaves them, heads before channels in memory."""
        B, H, R, M, N, D = self[:6]
        q, k, v = (
            self.draw(name, B, R, length, H, D).permute(0, 3, 1, 2, 4)
            for name, length in (("q", M), ("k", N), ("v", N))
        )
        return [q, k, v, self.draw("bias", B, H, M, N)]

    def make_mask(self):
        shape = (self.B, self.R, self.N)
        keys = torch.arange(self.N)
        if self.mask == "none":
            return None
        if self.mask == "padded":
            return (keys >= 100).expand(shape)
        mask = self.draw("mask", *shape) > 0
        if self.mask == "rows":
            mask[:, ::2] = True
        if self.mask == "front":  # the first tile of keys says nothing of the second
            mask[:, ::2] = keys < 130
        return mask


@pytest.fixture
def hopper(monkeypatch):
    """The backend's modules on an emulated GPU of `SMS` multiprocessors, for any problem."""
    monkeypatch.setattr(short, "LONGEST", 0)
    monkeypatch.setattr("attn_core.testing.hopper._threads.LATENESS", 5e-4)
    with emulation(*(f"attn_triangle._hopper.{name}" for name in MODULES)) as found:
        modules = dict(zip(MODULES, found, strict=True))
        monkeypatch.setattr(modules["configs"], "FEW_SCORES", 0)
        for name, kernel in GLUON.items():
            monkeypatch.setattr(modules[name], "_launch", starter(getattr(modules[name], kernel)))
            monkeypatch.setattr(
                modules[name], "device_info", lambda device: SimpleNamespace(num_sms=SMS)
            )
        yield SimpleNamespace(**modules)


def starter(kernel):
    """What does without the driver what a `GluonLauncher` does."""

    def start(num_programs, args, constants, maxnreg):
        kernel[(num_programs,)](*args, **constants)

    return start


def attend(hopper, case, inputs, mask, dout, dlse, wanted="dq dk_dv dbias"):
    """Results and gradients of the kernels, which find nothing but NaN in fresh memory."""
    scale = case.D**-0.5
    with poison_new_allocations():
        out, lse = hopper.forward.attention(*inputs, mask, scale, case.masked_rows)
        grads = hopper.backward.attention_backward(
            dout, dlse, *inputs, mask, out, lse, scale, case.masked_rows, wanted,
            case.deterministic,
        )  # fmt: skip
    return dict(zip(NAMES, (out, lse, *grads), strict=False))


def plain(case, inputs, mask, dout, dlse):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = reference.attention(*leaves, mask, case.D**-0.5, case.masked_rows)
    grads = torch.autograd.grad([out, lse], leaves, [dout.to(out.dtype), dlse.to(lse.dtype)])
    return dict(zip(NAMES, (out, lse, *grads), strict=True))


def check(hopper, case, inputs=None):
    inputs = case.inputs() if inputs is None else inputs
    mask = case.make_mask()
    dout = case.draw("dout", *inputs[0].shape)
    dlse = case.draw("dlse", *inputs[0].shape[:-1], dtype=torch.float32)
    actual = attend(hopper, case, inputs, mask, dout, dlse)
    same_dtype = plain(case, inputs, mask, dout, dlse)
    exact = plain(case, [x.double() for x in inputs], mask, dout, dlse)
    for name in NAMES:
        assert_within_budget(actual[name], same_dtype[name], exact[name], name=name)


CASES = [
    Case(),
    Case(deterministic=False),
    Case(B=2, H=2, M=128, N=128, mask="none"),
    Case(masked_rows="zero", mask="front"),
    Case(H=2, R=5, N=300, mask="padded"),
    Case(R=1, M=70, N=40, D=64, mask="random", deterministic=False),
    Case(R=2, M=1, N=129, D=24, mask="none", deterministic=False),
    Case(R=25, N=70, mask="random"),  # parts of rows, the last of which is short
    Case(D=64, mask="random"),
    Case(N=160),  # a mask that is read four keys at a time
    Case(H=2, R=5, M=64, N=336, mask="front", masked_rows="zero"),
    Case(R=2, M=1, N=1100, mask="random"),  # more words of a mask than are looked at together
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients(case, hopper):
    check(hopper, case)


def test_bias_is_broadcast_and_its_gradient_reduced(hopper):
    for deterministic in (True, False):
        case = Case(B=2, H=2, M=64, N=70, deterministic=deterministic)
        q, k, v, _ = case.inputs()
        check(hopper, case, [q, k, v, case.draw("bias", 1, 2, 1, 70, dtype=torch.float32)])


def test_scores_of_which_the_first_tile_is_no_guide(hopper):
    case = Case(mask="none")
    q, k, v, bias = case.inputs()
    bias[..., 0, :] = -torch.inf
    bias[..., 1, :128] = -1e4
    bias[..., 2, :128] = -torch.inf
    bias[..., 3, 128:] = 300.0
    check(hopper, case, [q, k, v, bias])


def test_sums_use_the_memory_of_a_later_result():
    lent = new_heads_last(torch.empty(1, 2, 3, 8, 16, dtype=torch.float16))
    inside, beyond = (scratch((2, n, 32), lent) for n in (6, 7))
    assert inside.dtype == beyond.dtype == torch.float32
    assert inside.shape == (2, 6, 32)
    assert beyond.shape == (2, 7, 32)
    assert inside.nbytes == lent.nbytes
    assert inside.data_ptr() == lent.data_ptr()
    assert beyond.untyped_storage().data_ptr() != lent.untyped_storage().data_ptr()


def test_masks_are_read_four_keys_at_a_time_where_they_can_be(hopper):
    mask = torch.zeros(2, 3, 160, dtype=torch.bool)
    row = torch.zeros(161, dtype=torch.bool)
    for part, keys in (
        (mask, 4),
        (mask[:, :1], 4),
        (mask[..., :150], 1),
        (mask[:1].expand(2, -1, -1), 1),
        (mask[..., :1], 1),
        (row[None, None, :160], 1),
    ):
        N = max(150, part.shape[2])
        read = hopper.problem.mask_bytes(part, N, unread=mask)
        assert read.keys.itemsize * keys == read.words.itemsize
        assert read.keys.data_ptr() == read.words.data_ptr() == part.data_ptr()
