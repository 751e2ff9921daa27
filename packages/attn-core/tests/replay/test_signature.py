"""What tells one call from another."""

import pytest
import torch

from attn_core import eager


def unequal():
    """Calls of which no two may share what they have worked out."""
    base = torch.ones(128)
    square = base[:16].view(4, 4)
    yield "plain", (square, 2.0)
    yield "factor", (square, 3.0)
    yield "type of factor", (square, 2)
    yield "shape", (base[:8].view(2, 4), 2.0)
    yield "strides", (square.t(), 2.0)
    yield "more strides", (base[:32].view(4, 8)[:, :4], 2.0)
    yield "dtype", (square.double(), 2.0)
    yield "requires_grad", (square.clone().requires_grad_(), 2.0)
    yield "parameter", (torch.nn.Parameter(square.clone(), requires_grad=False), 2.0)
    yield "another tensor", (square, 2.0, base[16:32].view(4, 4))
    yield "the same tensor", (square, 2.0, square)
    yield "no tensor", (square, 2.0, None)
    yield "False", (square, 2.0, False)
    yield "zero", (square, 2.0, 0)
    yield "window", (square, 2.0, (1, -1))
    yield "window of floats", (square, 2.0, (1.0, -1))
    yield "window as list", (square, 2.0, [1, -1])
    yield "name", (square, 2.0, "triton")


def test_no_two_calls_share_a_key():
    keys = {name: eager.signature(args).key for name, args in unequal()}
    for allowed in (True, False):
        with torch.set_grad_enabled(allowed):
            keys[f"grad {allowed}"] = eager.signature((torch.ones(4, 4), 7.0)).key
    assert len(set(keys.values())) == len(keys)


@pytest.mark.parametrize(
    "switch",
    [
        lambda on: setattr(torch.backends.cuda.matmul, "allow_tf32", on),
        torch.use_deterministic_algorithms,
    ],
    ids=["tf32", "deterministic"],
)
def test_switches_of_torch_are_part_of_the_key(switch):
    args = (torch.ones(4), 2.0)
    before = eager.signature(args).key
    switch(True)
    try:
        assert eager.signature(args).key != before
    finally:
        switch(False)
    assert eager.signature(args).key == before
