"""Which attention weights dropout keeps, the same bits on every device and for every tiling.

The weight of query i and key j, head h, batch element b stays where

    half  >=  floor(p 2**16),    half of word (j mod 32) div 8 of Philox4x32-7(key, counter),

    key = (seed mod 2**32, seed div 2**32),
    counter = (4 (j div 32) + (j mod 8) div 2, i, offset, 65536 b + h),

the low 16 bits of the word for even j, its high ones for odd j. Nothing else matters: neither tile
sizes nor the order of programs. A kernel draws the mask again in its backward pass.
`attn_core.tiles.dropout` computes it tile by tile. The eight weights of one call are those that one
thread holds of 32 columns of a product of matrices on NVIDIA GPUs (PTX ISA, "Matrix Fragments for
mma.m16n8k16"), so no random number travels between threads. Philox: Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011, who recommend 7 rounds at least. A finer threshold would cost
a kernel more than its matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_ROUNDS = 7
_MULTIPLIER_0, _MULTIPLIER_2 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
_MAX_HEADS = 65536


def threshold(p: float) -> int:
    """Return the integer that a 16-bit random number must reach for its weight to stay.

    Parameters
    ----------
    p : float
        Probability that a weight is dropped, ``0 <= p < 1``.

    Returns
    -------
    int
        In ``[0, 2**16)``.

    Raises
    ------
    ValueError
        `p` is not a probability below 1.

    Examples
    --------
    >>> from attn_core.dropout import threshold
    >>> threshold(0.5) == 2**15
    True
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p must be at least 0 and below 1, got {p}")
    return int(p * 2**16)


def keep_mask(
    shape: Sequence[int],
    p: float,
    seed: int | torch.Tensor,
    offset: int | torch.Tensor = 0,
    device: torch.device | str = "cpu",
    *,
    first_batch: int = 0,
    first_query: int = 0,
) -> torch.Tensor:
    """Compute the whole mask in plain torch.

    Parameters
    ----------
    shape : sequence of int
        (B, H, M, N): batch, heads, queries, keys. B and H at most 65536.
    p : float
        Probability that a weight is dropped, ``0 <= p < 1``.
    seed : int or Tensor, shape (), int64
        64 bits; a negative number counts as its two's complement.
    offset : int or Tensor, shape (), int64, default 0
        Which of the calls with this seed, modulo 2**32.
    device : torch.device or str, default "cpu"
        Where to compute it; that of `seed` and `offset` where they are tensors.
    first_batch, first_query : int, default 0
        Where the mask begins, if it is a part of a larger one.

    Returns
    -------
    Tensor, shape (B, H, M, N), bool
        True where the weight stays. Those that stay are to be scaled by ``1 / (1 - p)``.

    Raises
    ------
    ValueError
        `p` is not a probability below 1, or there are too many heads.

    Examples
    --------
    >>> from attn_core.dropout import keep_mask
    >>> keep_mask((1, 1, 2, 6), p=0.5, seed=0).long()
    tensor([[[[1, 0, 0, 1, 0, 0],
              [0, 1, 0, 1, 0, 1]]]])
    """
    limit = threshold(p)
    batch, heads, len_q, len_k = shape
    if batch > _MAX_HEADS or heads > _MAX_HEADS:
        raise ValueError(f"shape must have B and H of at most {_MAX_HEADS}, got {tuple(shape)}")
    b = torch.arange(first_batch, first_batch + batch, device=device)
    h = torch.arange(heads, device=device)
    i = torch.arange(first_query, first_query + len_q, device=device)
    num_blocks = (len_k + 31) // 32
    number = torch.arange(4 * num_blocks, device=device)
    head = (b[:, None] * _MAX_HEADS + h)[:, :, None, None]
    call = torch.zeros_like(head) + (offset & _WORD)
    words = torch.stack(_philox(seed, (number, i[:, None], call, head)), dim=-1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)  # [..., calls, words, 2]
    halves = halves.unflatten(-3, (num_blocks, 4)).transpose(-3, -2).flatten(-4)
    kept: torch.Tensor = halves[..., :len_k] >= limit
    return kept


def _philox(
    seed: int | torch.Tensor, counter: tuple[torch.Tensor, ...], rounds: int = _ROUNDS
) -> tuple[torch.Tensor, ...]:
    """Philox4x32 on 32-bit words in int64 tensors that broadcast."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    key_0, key_1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(rounds):
        high_0, low_0 = _multiply(c0, _MULTIPLIER_0)
        high_2, low_2 = _multiply(c2, _MULTIPLIER_2)
        c0, c1, c2, c3 = high_2 ^ c1 ^ key_0, low_2, high_0 ^ c3 ^ key_1, low_0
        key_0, key_1 = (key_0 + _WEYL_0) & _WORD, (key_1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3


def _multiply(word: torch.Tensor, constant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a 64-bit product, in halves that fit a signed integer."""
    upper, lower = word * (constant >> 16), word * (constant & 0xFFFF)
    high = (upper + (lower >> 16)) >> 16
    low = (((upper & 0xFFFF) << 16) + lower) & _WORD
    return high, low
