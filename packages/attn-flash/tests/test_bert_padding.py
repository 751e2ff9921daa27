"""Padded batches to packed ones and back."""

from __future__ import annotations

import pytest
import torch

from attn_flash.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASK = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("rest", [(), (5,), (2, 3)], ids=str)
def test_there_and_back(rest, dtype):
    x = torch.randn(3, 4, *rest, requires_grad=True)
    unpadded, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, MASK.to(dtype))
    assert torch.equal(unpadded, x[MASK.bool()])
    assert cu_seqlens.dtype == seqused.dtype == torch.int32
    assert (cu_seqlens.tolist(), max_seqlen, seqused.tolist()) == ([0, 3, 3, 7], 4, [3, 0, 4])
    padded = pad_input(unpadded, indices, 3, 4)
    mask = MASK.reshape(3, 4, *[1] * len(rest))
    assert torch.equal(padded, x * mask)
    [dx] = torch.autograd.grad(padded, x, torch.ones_like(padded))
    assert torch.equal(dx, mask.expand_as(x).to(dx))


def test_unused_tokens_keep_their_memory():
    x = torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 0, 0], [1, 1, 0]])
    unused = torch.tensor([[0, 1, 0], [0, 0, 0]])
    unpadded, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask, unused)
    assert indices.tolist() == [0, 1, 3, 4]
    assert torch.equal(unpadded, x.flatten(0, 1)[indices])
    assert (cu_seqlens.tolist(), max_seqlen, seqused.tolist()) == ([0, 2, 4], 2, [1, 2])


def test_concatenated_sequences():
    lengths = torch.tensor([[2, 1, 0, 0], [4, 0, 0, 0], [0, 0, 0, 0]])
    x = torch.randn(3, 4, 5)
    unpadded, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(x, lengths)
    assert indices.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(unpadded, x.flatten(0, 1)[indices])
    assert (cu_seqlens.tolist(), max_seqlen, cu_seqlens.dtype) == ([0, 2, 3, 7], 4, torch.int32)


def test_an_empty_batch():
    x = torch.zeros(0, 4, 5)
    unpadded, indices, cu_seqlens, max_seqlen, _ = unpad_input(x, torch.zeros(0, 4))
    assert (unpadded.shape, cu_seqlens.tolist(), max_seqlen) == ((0, 5), [0], 0)
    assert pad_input(unpadded, indices, 0, 4).shape == (0, 4, 5)


def test_rows_gathered_twice_get_both_gradients():
    x = torch.randn(3, 2, requires_grad=True)
    rows = index_first_axis(x, torch.tensor([1, 1, 2]))
    [dx] = torch.autograd.grad(rows.sum(), x)
    assert dx[:, 0].tolist() == [0, 2, 1]


def test_residual_adds_its_gradient():
    x = torch.randn(3, 2, requires_grad=True)
    rows, residual = index_first_axis_residual(x, torch.tensor([1]))
    assert torch.equal(residual, x)
    assert residual.data_ptr() == x.data_ptr()
    [dx] = torch.autograd.grad(rows.sum() + 3 * residual.sum(), x)
    assert dx[:, 0].tolist() == [3, 4, 3]


def test_rows_go_among_zeros():
    values = torch.randn(2, 3, requires_grad=True)
    out = index_put_first_axis(values, torch.tensor([4, 1]), 5)
    assert torch.equal(out[[4, 1]], values)
    assert out[[0, 2, 3]].count_nonzero() == 0
    assert torch.autograd.grad(out.sum(), values)[0].eq(1).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: unpad_input(torch.zeros(3), MASK), "hidden_states must have shape"),
        (lambda: unpad_input(torch.zeros(3, 5, 2), MASK), r"attention_mask must have shape \(B, S"),
        (lambda: unpad_input(torch.zeros(3, 4), MASK, MASK[:2]), "unused_mask must have shape"),
        (
            lambda: unpad_input_for_concatenated_sequences(torch.zeros(3, 4), None),
            "attention_mask_in_length must be a tensor, got NoneType",
        ),
        (
            lambda: pad_input(torch.zeros(3, 2), torch.tensor([1.0]), 1, 3),
            "indices must have dtype",
        ),
        (lambda: pad_input(torch.zeros(3, 2), torch.tensor([1]), 1, 3), "indices must have shape"),
        (
            lambda: pad_input(torch.zeros(1, 2), torch.tensor([1]), -1, 3),
            "batch must not be negative",
        ),
        (lambda: index_first_axis(torch.tensor(1.0), torch.tensor([0])), "must have a first dim"),
        (lambda: index_first_axis([1], torch.tensor([0])), "input must be a tensor, got list"),
    ],
    ids=["rank", "mask", "unused", "lengths", "dtype", "count", "batch", "scalar", "list"],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
