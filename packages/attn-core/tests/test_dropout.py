"""The dropout mask for whole tensors."""

import pytest
import torch

from attn_core.dropout import _philox, keep_mask, threshold


@pytest.mark.parametrize(
    "rounds, seed, counter, expected",
    [
        (7, 0, (0, 0, 0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (10, 0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (10, -1, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            10,
            0x299F31D0_A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros-7-rounds", "zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_its_authors(rounds, seed, counter, expected):
    words = _philox(seed, tuple(torch.tensor(word) for word in counter), rounds)
    assert tuple(word.item() for word in words) == expected


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_rate(p):
    kept = keep_mask((2, 3, 100, 101), p, seed=1).double()
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.mean().item() - (1 - p)) <= 4 * deviation


def test_weight_depends_on_its_own_indices_alone():
    whole = keep_mask((3, 4, 50, 70), 0.5, seed=7, offset=9)
    assert torch.equal(keep_mask((2, 3, 31, 43), 0.5, seed=7, offset=9), whole[:2, :3, :31, :43])


@pytest.mark.parametrize(
    "other", [{"seed": 8}, {"seed": 7 + 2**32}, {"offset": 1}], ids=["seed", "high seed", "offset"]
)
def test_other_calls_have_other_masks(other):
    call = {"seed": 7, "offset": 0}
    agreement = keep_mask((1, 2, 64, 64), 0.5, **call) == keep_mask(
        (1, 2, 64, 64), 0.5, **call | other
    )
    assert 0.45 < agreement.double().mean() < 0.55


def test_neighbours_are_independent():
    kept = keep_mask((2, 2, 128, 128), 0.5, seed=3).double() - 0.5
    for dim in range(4):
        correlation = 4 * (kept * kept.roll(1, dim)).mean()
        assert abs(correlation) < 0.03, f"dimension {dim}"


@pytest.mark.parametrize("shape", [(0, 1, 2, 3), (1, 1, 0, 5), (1, 1, 5, 0)])
def test_empty(shape):
    assert keep_mask(shape, 0.5, seed=0).shape == shape


def test_errors():
    with pytest.raises(ValueError, match="p must be at least 0 and below 1, got 1.0"):
        threshold(1.0)
    with pytest.raises(ValueError, match="p must be at least 0 and below 1, got -0.1"):
        keep_mask((1, 1, 1, 1), -0.1, seed=0)
    with pytest.raises(ValueError, match="shape must have B and H of at most 65536"):
        keep_mask((1, 65537, 1, 1), 0.1, seed=0)


@pytest.mark.gpu
def test_same_bits_as_on_the_cpu(device):
    call = {"p": 0.3, "seed": -5, "offset": 2**31 + 3}
    on_device = keep_mask((2, 3, 65, 131), **call, device=device)
    assert torch.equal(on_device.cpu(), keep_mask((2, 3, 65, 131), **call))
