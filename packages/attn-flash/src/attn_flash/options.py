"""What an attention call takes beside q, k and v: one record for operators and backends alike."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Options(NamedTuple):
    """Validated arguments, in the order of the operators' schema.

    The score of query i and key j, both counted within their sequence of M and N tokens, is

        s = scale q_i k_j,  then  softcap tanh(s / softcap),
        then  + attn_bias - alibi_slopes |i + N - M - j| + key_mask,

    -inf where a boolean bias or mask is False or the key outside the window: i sees keys
    ``i + N - M - window_left`` to ``i + N - M + window_right``, -1 leaves a side open.

    Attributes
    ----------
    alibi_slopes : Tensor, shape (H,) or (B, H), float32, optional
        Slopes of the distance.
    attn_bias : Tensor, optional
        Four dimensions that broadcast to (B, H, M, N), the longest sequences for ragged ones.
    key_mask : Tensor, shape (B, N), optional
        Boolean, True where a key is seen, or added.
    sinks : Tensor, shape (H,), optional
        The score of one more key, whose value is 0.
    rng_state : Tensor, shape (2,), int64
        Seed and offset of dropout, wherever `dropout_p` is not 0; see `attn_core.dropout`.
    cu_seqlens_q, cu_seqlens_k : Tensor, shape (B + 1,), int32
        Where sequences begin in q (T_q, H, D), k and v (T_k, H_KV, D): given for ragged problems.
    seqused_k : Tensor, shape (B,), int32, optional
        How many keys of each ragged sequence count.
    block_table : Tensor, shape (B, max_pages), int32, optional
        Pages of k and v (num_pages, page_size, H_KV, D) that hold the keys of each sequence.
    max_seqlen_q, max_seqlen_k : int
        Length of the longest ragged sequence.
    deterministic : bool
        Whether gradients must have the same bits every time.
    """

    alibi_slopes: torch.Tensor | None = None
    attn_bias: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    rng_state: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    scale: float = 1.0
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0
    deterministic: bool = False

    @property
    def window(self) -> tuple[int, int]:
        """(left, right), -1 for an open side."""
        return self.window_left, self.window_right

    @property
    def is_varlen(self) -> bool:
        """Whether sequences lie one after the other, without a batch dimension."""
        return self.cu_seqlens_q is not None

    def features(self) -> frozenset[str]:
        """Names of what is asked for beside a scale and a window; empty for a plain problem."""
        if self._is_plain():
            return _PLAIN
        tensors = {
            "alibi_slopes": self.alibi_slopes,
            "attn_bias": self.attn_bias,
            "key_mask": self.key_mask,
            "sinks": self.sinks,
            "cu_seqlens_q": self.cu_seqlens_q,
            "seqused_k": self.seqused_k,
            "block_table": self.block_table,
        }
        names = [name for name, x in tensors.items() if x is not None]
        if self.softcap != 0.0:
            names.append("softcap")
        if self.dropout_p != 0.0:
            names.append("dropout_p")
        if self.attn_bias is not None and self.attn_bias.requires_grad and torch.is_grad_enabled():
            names.append("the gradient of attn_bias")
        return frozenset(names)

    def _is_plain(self) -> bool:
        return (
            self.alibi_slopes is None
            and self.attn_bias is None
            and self.key_mask is None
            and self.sinks is None
            and self.cu_seqlens_q is None
            and self.seqused_k is None
            and self.block_table is None
            and self.softcap == 0.0
            and self.dropout_p == 0.0
        )

    def lengths(self, q: torch.Tensor, k: torch.Tensor) -> tuple[int, int]:
        """M and N, those of the longest sequences where they differ."""
        if self.cu_seqlens_q is not None:
            return self.max_seqlen_q, self.max_seqlen_k
        return q.shape[1], k.shape[1]

    def bound(self, q: torch.Tensor, k: torch.Tensor) -> Options:
        """Leave open the sides of a window that hide nothing at these lengths."""
        left, right = self.window
        if left < 0 and right < 0:
            return self
        len_q, len_k = self.lengths(q, k)
        return self._replace(
            window_left=left if left < len_k - 1 else -1,
            window_right=right if right < len_q - 1 else -1,
        )


_PLAIN: frozenset[str] = frozenset()

SCHEMA = (
    "Tensor? alibi_slopes, Tensor? attn_bias, Tensor? key_mask, Tensor? sinks, Tensor? rng_state,"
    " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor? block_table,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, SymInt window_left,"
    " SymInt window_right, float softcap, float dropout_p, bool deterministic"
)
