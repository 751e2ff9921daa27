"""Padded batches to packed ones and back, with flash-attn's functions.

A packed batch holds the tokens of all sequences one after the other, (T, ...), without padding;
`flash_attn_varlen_func` attends to it. Everything here is differentiable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from attn_core.checks import (
    may_read_values,
    require_device,
    require_dtype,
    require_rank,
    require_shape,
    require_tensor,
)
from attn_flash.checks import length
from attn_flash.rotary_checks import require_values

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]

_LENGTHS = (torch.int32, torch.int64)


def unpad_input(
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    unused_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Drop the padding of a batch.

    Parameters
    ----------
    hidden_states : Tensor, shape (B, S, ...)
        A padded batch.
    attention_mask : Tensor, shape (B, S), bool or int
        True, or 1, where there is a token.
    unused_mask : Tensor, shape (B, S), bool or int, optional
        True, or 1, where memory is to be kept for a token that does not count yet.

    Returns
    -------
    unpadded : Tensor, shape (T, ...)
        The tokens of both masks.
    indices : Tensor, shape (T,), int64
        Where they come from in ``hidden_states.flatten(0, 1)``.
    cu_seqlens : Tensor, shape (B + 1,), int32
        Where each sequence begins, and T.
    max_seqlen : int
        Length of the longest sequence. Reading it waits for the device.
    seqused : Tensor, shape (B,), int32
        Number of tokens of each sequence that `attention_mask` has.

    Raises
    ------
    ValueError
        A mask does not fit; the message names it.

    Examples
    --------
    >>> import torch
    >>> from attn_flash.bert_padding import unpad_input
    >>> mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    >>> unpadded, indices, cu_seqlens, max_seqlen, seqused = unpad_input(torch.randn(2, 3, 8), mask)
    >>> unpadded.shape, indices.tolist(), cu_seqlens.tolist(), max_seqlen
    (torch.Size([3, 8]), [0, 1, 3], [0, 2, 3], 2)
    """
    _check_padded(hidden_states)
    _check_mask("attention_mask", attention_mask, hidden_states)
    kept = used = attention_mask.bool()
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, hidden_states)
        kept = used | unused_mask.bool()
    indices = kept.flatten().nonzero().flatten()
    seqused = used.sum(-1, dtype=torch.int32)
    seqlens = kept.sum(-1, dtype=torch.int32)
    unpadded = index_first_axis(hidden_states.flatten(0, 1), indices)
    return unpadded, indices, *_bounds(seqlens), seqused


def unpad_input_for_concatenated_sequences(
    hidden_states: torch.Tensor, attention_mask_in_length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Drop the padding of a batch whose rows hold several sequences each.

    Parameters
    ----------
    hidden_states : Tensor, shape (B, S, ...)
        A padded batch; the sequences of a row follow one another from its beginning.
    attention_mask_in_length : Tensor, shape (B, S), int
        In each row the lengths of its sequences, then zeros: [3, 2, 0, 0, 0, 0] are two sequences
        and one token of padding.

    Returns
    -------
    unpadded : Tensor, shape (T, ...)
        The tokens.
    indices : Tensor, shape (T,), int64
        Where they come from in ``hidden_states.flatten(0, 1)``.
    cu_seqlens : Tensor, shape (number of sequences + 1,), int32
        Where each sequence begins, and T.
    max_seqlen : int
        Length of the longest sequence. Reading it waits for the device.

    Raises
    ------
    ValueError
        The mask does not fit; the message names it.

    Examples
    --------
    >>> import torch
    >>> from attn_flash.bert_padding import unpad_input_for_concatenated_sequences
    >>> lengths = torch.tensor([[3, 2, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0]])
    >>> _, _, cu_seqlens, _ = unpad_input_for_concatenated_sequences(torch.randn(2, 6, 8), lengths)
    >>> cu_seqlens.tolist()
    [0, 3, 5, 9]
    """
    _check_padded(hidden_states)
    _check_lengths(attention_mask_in_length, hidden_states)
    tokens = attention_mask_in_length.sum(-1)
    steps = torch.arange(hidden_states.shape[1], device=tokens.device)
    indices = (steps < tokens[:, None]).flatten().nonzero().flatten()
    lengths = attention_mask_in_length.flatten()
    seqlens = lengths[lengths.nonzero().flatten()].to(torch.int32)
    unpadded = index_first_axis(hidden_states.flatten(0, 1), indices)
    return unpadded, indices, *_bounds(seqlens)


def pad_input(
    hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int
) -> torch.Tensor:
    """Put the tokens of a packed batch back to their places.

    Parameters
    ----------
    hidden_states : Tensor, shape (T, ...)
        A packed batch.
    indices : Tensor, shape (T,), int64
        As `unpad_input` returns them.
    batch, seqlen : int
        B and S.

    Returns
    -------
    Tensor, shape (B, S, ...)
        A padded batch, 0 where there is no token.

    Raises
    ------
    ValueError
        A shape or number does not fit; the message names it.

    Examples
    --------
    >>> import torch
    >>> from attn_flash.bert_padding import pad_input
    >>> pad_input(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([0, 1, 3]), 2, 3).tolist()
    [[5.0, 6.0, 0.0], [7.0, 0.0, 0.0]]
    """
    require_tensor("hidden_states", hidden_states)
    batch, seqlen = length("batch", batch), length("seqlen", seqlen)
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.reshape(batch, seqlen, *padded.shape[1:])


def index_first_axis(input: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:  # noqa: A002
    """Gather rows.

    Parameters
    ----------
    input : Tensor, shape (R, ...)
        Rows.
    indices : Tensor, shape (T,), int64
        Which to gather; one that occurs twice gathers its gradient from both.

    Returns
    -------
    Tensor, shape (T, ...)
        Those rows.

    Raises
    ------
    ValueError
        A shape or dtype does not fit; the message names it.

    Examples
    --------
    >>> import torch
    >>> from attn_flash.bert_padding import index_first_axis
    >>> index_first_axis(torch.tensor([5, 6, 7]), torch.tensor([2, 0])).tolist()
    [7, 5]
    """
    require_tensor("input", input)
    if input.dim() == 0:
        raise ValueError("input must have a first dimension, got shape ()")
    _check_indices(indices, input, input.shape[0])
    return input.index_select(0, indices)


def index_first_axis_residual(
    input: torch.Tensor,  # noqa: A002
    indices: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather rows, and hand the input on for a residual connection.

    Parameters
    ----------
    input : Tensor, shape (R, ...)
        Rows.
    indices : Tensor, shape (T,), int64
        Which to gather.

    Returns
    -------
    rows : Tensor, shape (T, ...)
        Those rows.
    residual : Tensor, shape (R, ...)
        The input, in the same memory; its gradient is added to that of the rows.

    Raises
    ------
    ValueError
        As in `index_first_axis`.

    Examples
    --------
    >>> import torch
    >>> from attn_flash.bert_padding import index_first_axis_residual
    >>> rows, residual = index_first_axis_residual(torch.tensor([5, 6, 7]), torch.tensor([2]))
    >>> rows.tolist(), residual.tolist()
    ([7], [5, 6, 7])
    """
    return index_first_axis(input, indices), input.view_as(input)


def index_put_first_axis(
    values: torch.Tensor, indices: torch.Tensor, first_axis_dim: int
) -> torch.Tensor:
    """Scatter rows among zeros.

    Parameters
    ----------
    values : Tensor, shape (T, ...)
        Rows.
    indices : Tensor, shape (T,), int64
        Where each goes; all different.
    first_axis_dim : int
        R, the number of rows of the result.

    Returns
    -------
    Tensor, shape (R, ...)
        The rows, and 0 elsewhere.

    Raises
    ------
    ValueError
        A shape or dtype does not fit; the message names it.

    Examples
    --------
    >>> import torch
    >>> from attn_flash.bert_padding import index_put_first_axis
    >>> index_put_first_axis(torch.tensor([5, 6]), torch.tensor([2, 0]), 4).tolist()
    [6, 0, 5, 0]
    """
    require_tensor("values", values)
    first_axis_dim = length("first_axis_dim", first_axis_dim)
    _check_indices(indices, values, first_axis_dim)
    require_shape("indices", indices, "(T,)", values.shape[:1])
    rows = values.new_zeros((first_axis_dim, *values.shape[1:]))
    return rows.index_copy(0, indices.long(), values)


def _bounds(seqlens: torch.Tensor) -> tuple[torch.Tensor, int]:
    cu_seqlens = F.pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0))
    return cu_seqlens, int(seqlens.max()) if seqlens.numel() else 0


def _check_padded(hidden_states: torch.Tensor) -> None:
    require_tensor("hidden_states", hidden_states)
    if hidden_states.dim() < 2:
        raise ValueError(
            f"hidden_states must have shape (B, S, ...), got {tuple(hidden_states.shape)}"
        )


def _check_mask(name: str, mask: torch.Tensor, hidden_states: torch.Tensor) -> None:
    require_shape(name, mask, "(B, S)", hidden_states.shape[:2])
    require_device(name, mask, "hidden_states", hidden_states)
    if may_read_values(mask) and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"{name} must hold booleans, or 0 and 1, got other numbers")


def _check_lengths(lengths: torch.Tensor, hidden_states: torch.Tensor) -> None:
    name, shape = "attention_mask_in_length", hidden_states.shape[:2]
    require_shape(name, lengths, "(B, S)", shape)
    require_device(name, lengths, "hidden_states", hidden_states)
    require_dtype(name, lengths, _LENGTHS)
    if may_read_values(lengths):
        require_values(name, lengths, 0, shape[1])
        require_values(f"each row of {name}, added up,", lengths.sum(-1), 0, shape[1])


def _check_indices(indices: torch.Tensor, like: torch.Tensor, rows: int) -> None:
    require_rank("indices", indices, "(T,)")
    require_device("indices", indices, "the rows", like)
    require_dtype("indices", indices, (torch.int64, torch.int32))
    if may_read_values(indices):
        require_values("indices", indices, 0, rows - 1)
