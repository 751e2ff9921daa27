"""The parts of the demo, each for a second or two."""

import re

import pytest
import torch
from rich.console import Console

import demo
import figure
import others
import vit


@pytest.fixture(scope="module")
def run(data):
    training = vit.Training(data, vit.attend_flash, epochs=1)
    training.epoch()
    return training


def test_digits_are_split_without_loss(data):
    assert len(data.train_labels) + len(data.test_labels) == 1797
    assert data.test_labels.bincount().min() >= 40
    assert data.train_images.max() == 1


def test_training_is_the_same_with_sdpa(data, run):
    other = vit.Training(data, vit.attend_sdpa, epochs=1)
    other.epoch()
    assert run.losses == pytest.approx(other.losses, abs=1e-4)


def test_class_attention_is_that_of_a_softmax(data, run):
    images = data.test_images[:3]
    q, k, _ = run.model.last_qkv(images).unbind(2)
    scores = torch.einsum("bhd,bjhd->bhj", q[:, 0], k) / q.shape[-1] ** 0.5
    expected = scores.softmax(-1)[..., 1:].mean(1).view(3, vit.GRID, vit.GRID)
    torch.testing.assert_close(vit.class_attention(run.model, images), expected.detach())


def test_neighbours_in_crambin_are_a_peptide_bond_apart():
    distances = others.crambin_distances()
    assert distances.shape == (46, 46)
    steps = distances.diagonal(1)
    assert steps.min() > 3.7
    assert steps.max() < 3.9


def test_each_package_agrees_with_float64(data, run, monkeypatch):
    monkeypatch.setattr(others, "SECONDS_PER_TIMING", 1e-3)
    rows = others.rows(run.model, data)
    assert [row.package for row in rows] == [
        "attn-flash",
        "attn-paged",
        "attn-triangle",
        "attn-evo",
    ]
    assert all(row.error <= row.tolerance for row in rows)
    assert all(row.error > 0 for row in rows)  # float32 is not float64


def test_vulkan_names_devices_or_a_reason():
    assert re.match(r"attn-vulkan: \w+", others.vulkan())


def test_a_wrong_result_fails_the_demo(capsys):
    row = others.Row("attn-x", "nothing", "torch", "1", float("nan"), 1e-4, 1.0, 1.0)
    assert demo.verdict(Console(), 0.99, [row]) == 1
    assert "attn-x is off" in capsys.readouterr().out
    assert demo.verdict(Console(), 0.5, []) == 1
    assert "accuracy 50% is below 95%" in capsys.readouterr().out


def test_a_picture_is_written(data, run, tmp_path):
    path = tmp_path / "new" / "demo.png"
    figure.draw(path, data, run, run, "title")
    assert path.read_bytes().startswith(b"\x89PNG")
