"""The sequence classifier, for a second or two."""

import pytest
import torch

import sequence
import vit


@pytest.fixture(scope="module")
def model(data):
    return sequence.train(data, epochs=3)


def test_three_epochs_already_teach_it_most_digits(model, data):
    assert vit.accuracy(model, data) > 0.6


def test_a_stream_of_tokens_gives_the_same_scores(model, data):
    images = data.test_images[:5]
    torch.testing.assert_close(model.stream(images), model(images).detach(), atol=1e-4, rtol=1e-4)


def test_the_verdict_is_an_exit_code(capsys):
    assert sequence.main(["--epochs", "1"]) == 1
    assert "required" in capsys.readouterr().out
