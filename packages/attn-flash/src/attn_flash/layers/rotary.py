"""Rotary embedding with flash-attn's functions and arguments, as one fused kernel each."""

from __future__ import annotations

from collections.abc import Callable

import torch

from attn_core import backends
from attn_core.checks import flag, require_rank, require_tensor, require_writable
from attn_flash import rotary_checks, rotary_ops, rotary_reference
from attn_flash.checks import length

__all__ = [
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
]

_TABLE_NAMES = (("cos", "sin"), ("cos_k", "sin_k"))
_Compute = Callable[[torch.device], torch.Tensor]


def apply_rotary_emb(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    backend: str = backends.AUTO,
) -> torch.Tensor:
    """Rotate pairs of dimensions of each token by an angle that grows with its position.

    Parameters
    ----------
    x : Tensor, shape (B, S, H, D), or (T, H, D) with `cu_seqlens`
        Queries or keys, float16, bfloat16 or float32 (float64 on backend "torch"); any strides.
    cos, sin : Tensor, shape (S_rotary, D_rotary / 2)
        Row p rotates the token at position p; of x's dtype or float32, without gradient. Dimensions
        from D_rotary on stay as they are.
    interleaved : bool, default False
        Rotate dimensions 2 i and 2 i + 1 together, as GPT-J does; otherwise i and
        ``i + D_rotary / 2``, as GPT-NeoX does.
    inplace : bool, default False
        Write the result to x. Go on with the tensor that is returned: where x is a leaf or a view
        that needs a gradient, only that one has the rotation in its history.
    seqlen_offsets : int or Tensor, shape (B,), int32 or int64, default 0
        Position of the first token of each sequence.
    cu_seqlens : Tensor, shape (B + 1,), int32, optional
        Tokens ``cu_seqlens[b]`` to ``cu_seqlens[b + 1] - 1`` belong to sequence b.
    max_seqlen : int, optional
        Length of the longest sequence; needed with `cu_seqlens`.
    backend : str, default "auto"
        As in `flash_attn_func`.

    Returns
    -------
    Tensor, shape of x
        Of x's dtype; computed in float32.

    Raises
    ------
    ValueError
        A shape, dtype, device or number does not fit, or the tables are too short; the message
        names it. Values of tensors are checked on the CPU alone.

    References
    ----------
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.

    Examples
    --------
    >>> import torch
    >>> from attn_flash.layers.rotary import apply_rotary_emb
    >>> angles = torch.outer(torch.arange(100.0), 10000 ** (-torch.arange(32) / 32))
    >>> x = torch.randn(2, 100, 4, 64)
    >>> rotated = apply_rotary_emb(x, angles.cos(), angles.sin())
    >>> bool(torch.allclose(rotated.norm(dim=-1), x.norm(dim=-1), atol=1e-4))
    True
    """
    offsets, offset = rotary_checks.offsets(seqlen_offsets)
    problem = rotary_checks.rotary_problem(
        x, cos, sin, flag("interleaved", interleaved), offsets, offset, cu_seqlens, max_seqlen
    )
    name = backends.resolve(rotary_ops.ROTATE, problem, backend)
    longest = x.shape[1] if cu_seqlens is None or max_seqlen is None else max_seqlen
    static = (longest, problem.interleaved, False, name)
    if flag("inplace", inplace):
        require_writable("x", x)
        return rotary_ops.rotate_inplace(
            x, (None,), (offset, *static), offsets, cu_seqlens, cos, sin
        )
    return rotary_ops.rotate(  # type: ignore[no-any-return]
        x, cos, sin, offsets, offset, cu_seqlens, *static
    )


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_torch(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """Rotate in plain PyTorch: what `apply_rotary_emb` means.

    Parameters
    ----------
    x : Tensor, shape (B, S, H, D)
        Queries or keys.
    cos, sin : Tensor, shape (S, D_rotary / 2) or (B, S, D_rotary / 2)
        One row for each token.
    interleaved : bool, default False
        As in `apply_rotary_emb`.

    Returns
    -------
    Tensor, shape (B, S, H, D)
        The rotated tensor.

    Raises
    ------
    ValueError
        The tables do not fit x; the message names them.

    Examples
    --------
    >>> import torch
    >>> from attn_flash.layers.rotary import apply_rotary_emb_torch
    >>> apply_rotary_emb_torch(torch.ones(1, 1, 1, 2), torch.zeros(1, 1), torch.ones(1, 1))
    tensor([[[[-1.,  1.]]]])
    """
    rotary_checks.check_rows(x, cos, sin)
    interleaved = flag("interleaved", interleaved)
    return rotary_reference.rotate(x, cos.unsqueeze(-2), sin.unsqueeze(-2), interleaved)


def apply_rotary_emb_qkv_(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cos_k: torch.Tensor | None = None,
    sin_k: torch.Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
    num_heads_q: int | None = None,
    *,
    backend: str = backends.AUTO,
) -> torch.Tensor:
    """Rotate the queries and keys of a packed tensor in place.

    Parameters
    ----------
    qkv : Tensor, shape (B, S, 3, H, D), or (B, S, H + 2 H_KV, D) with `num_heads_q`
        Queries, keys and values; the values stay.
    cos, sin : Tensor, shape (S_rotary, D_rotary / 2)
        As in `apply_rotary_emb`.
    cos_k, sin_k : Tensor, shape (S_rotary, D_rotary / 2), optional
        Tables for the keys where they differ, as in XPos.
    interleaved, seqlen_offsets, backend
        As in `apply_rotary_emb`.
    num_heads_q : int, optional
        H, where qkv has four dimensions.

    Returns
    -------
    Tensor, shape of qkv
        qkv, rotated; go on with this one, as `apply_rotary_emb` says.

    Raises
    ------
    ValueError
        As in `apply_rotary_emb`.

    Examples
    --------
    >>> import torch
    >>> from attn_flash.layers.rotary import apply_rotary_emb_qkv_
    >>> qkv = torch.ones(1, 1, 3, 1, 2)
    >>> apply_rotary_emb_qkv_(qkv, torch.zeros(1, 1), torch.ones(1, 1)).flatten().tolist()
    [-1.0, 1.0, -1.0, 1.0, 1.0, 1.0]
    """
    if (cos_k is None) != (sin_k is None):
        raise ValueError("cos_k and sin_k must be given together or not at all, got one of them")
    query, key, both = _heads_of(qkv, num_heads_q)
    if cos_k is None or sin_k is None:
        tables = (cos, sin)
        parts = (both,) if _is_one_part(qkv) else (query, key)
        return _rotate_parts(
            qkv, "qkv", parts, tables * len(parts), interleaved, seqlen_offsets, backend
        )
    tables_k = (cos, sin, cos_k, sin_k)
    return _rotate_parts(qkv, "qkv", (query, key), tables_k, interleaved, seqlen_offsets, backend)


def apply_rotary_emb_kv_(
    kv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
    *,
    backend: str = backends.AUTO,
) -> torch.Tensor:
    """Rotate the keys of a packed tensor in place.

    Parameters
    ----------
    kv : Tensor, shape (B, S, 2, H_KV, D)
        Keys and values; the values stay.
    cos, sin, interleaved, seqlen_offsets, backend
        As in `apply_rotary_emb`.

    Returns
    -------
    Tensor, shape (B, S, 2, H_KV, D)
        kv, rotated; go on with this one, as `apply_rotary_emb` says.

    Raises
    ------
    ValueError
        As in `apply_rotary_emb`.

    Examples
    --------
    >>> import torch
    >>> from attn_flash.layers.rotary import apply_rotary_emb_kv_
    >>> kv = torch.ones(1, 1, 2, 1, 2)
    >>> apply_rotary_emb_kv_(kv, torch.zeros(1, 1), torch.ones(1, 1)).flatten().tolist()
    [-1.0, 1.0, 1.0, 1.0]
    """
    require_rank("kv", kv, "(B, S, 2, H_KV, D)")
    if kv.shape[2] != 2:
        raise ValueError(f"kv must have shape (B, S, 2, H_KV, D), got {tuple(kv.shape)}")
    return _rotate_parts(kv, "kv", ((0, 1),), (cos, sin), interleaved, seqlen_offsets, backend)


def rotate_heads_first(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    *,
    interleaved: bool,
    backend: str,
    tables: tuple[str, str] = ("cos", "sin"),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q (B, H, M, D) and k (B, H_KV, N, D), the last of both to the same position."""
    require_rank("q", q, "(B, H, M, D)")
    require_rank("k", k, "(B, H_KV, N, D)")
    cos, sin = _two_dimensional(tables[0], cos), _two_dimensional(tables[1], sin)
    offset = k.shape[2] - q.shape[2]
    if offset < 0:
        raise ValueError(
            f"q must have at most as many tokens as k where both are rotated, {k.shape[2]}, got "
            f"{q.shape[2]}"
        )
    interleaved = flag("interleaved", interleaved)
    rotated = []
    for name, x, start in (("q", q.transpose(1, 2), offset), ("k", k.transpose(1, 2), 0)):
        problem = rotary_checks.rotary_problem(
            x, cos, sin, interleaved, None, start, None, None, name, tables
        )
        chosen = backends.resolve(rotary_ops.ROTATE, problem, backend)
        out = rotary_ops.rotate(
            x, cos, sin, None, start, None, x.shape[1], interleaved, False, chosen
        )
        rotated.append(out.transpose(1, 2))
    return rotated[0], rotated[1]


def _two_dimensional(name: str, table: torch.Tensor | None) -> torch.Tensor:
    """Drop leading dimensions of length 1, as models carry them to broadcast against heads."""
    if table is None:
        raise ValueError(f"{name} must be given with its companion, got None")
    while isinstance(table, torch.Tensor) and table.dim() > 2 and table.shape[0] == 1:
        table = table[0]
    require_rank(name, table, "(S_rotary, D_rotary / 2)")
    return table


class RotaryEmbedding(torch.nn.Module):
    """Rotary embedding whose tables grow with the sequences it meets.

    Parameters
    ----------
    dim : int
        D_rotary, the number of dimensions to rotate; even.
    base : float, default 10000.0
        Pair i turns by ``base ** (-2 i / dim)`` a token.
    interleaved : bool, default False
        As in `apply_rotary_emb`.
    scale_base : float, optional
        Scale queries up and keys down with their position, by XPos: Sun et al., "A
        Length-Extrapolatable Transformer", 2022. They recommend 512.
    device : torch.device, optional
        Where the frequencies are put.

    Examples
    --------
    >>> import torch
    >>> from attn_flash.layers.rotary import RotaryEmbedding
    >>> RotaryEmbedding(32)(torch.randn(2, 100, 3, 4, 64)).shape
    torch.Size([2, 100, 3, 4, 64])
    """

    inv_freq: torch.Tensor
    scale: torch.Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(dim, bool) or not isinstance(dim, int) or dim <= 0 or dim % 2:
            raise ValueError(f"dim must be an even integer, 2 or more, got {dim!r}")
        self.dim = dim
        self.base = rotary_checks.positive("base", base)
        self.interleaved = flag("interleaved", interleaved)
        self.scale_base = (
            None if scale_base is None else rotary_checks.positive("scale_base", scale_base)
        )
        scale = None if scale_base is None else self._compute_scale(device)
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: torch.Tensor | None = None
        self._sin_cached: torch.Tensor | None = None
        self._cos_k_cached: torch.Tensor | None = None
        self._sin_k_cached: torch.Tensor | None = None

    def forward(
        self,
        qkv: torch.Tensor,
        kv: torch.Tensor | None = None,
        seqlen_offset: int | torch.Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Rotate packed qkv, or q (B, S, H, D) and packed kv, in place.

        Where `seqlen_offset` is a tensor, `max_seqlen` says how far its positions reach; without it
        the tables of an earlier call must reach there.
        """
        require_tensor("qkv", qkv)
        offsets, offset = rotary_checks.offsets(seqlen_offset)
        if max_seqlen is None and offsets is None and qkv.dim() > 1:
            max_seqlen = qkv.shape[1] + length("seqlen_offset", offset)
        if max_seqlen is not None:
            max_seqlen = max((length("max_seqlen", max_seqlen), *qkv.shape[1:2]))
            self._update_cos_sin_cache(max_seqlen, qkv.device, qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        if cos is None or sin is None:
            raise ValueError(
                "max_seqlen must be given where seqlen_offset is a tensor in the first call, got "
                "None"
            )
        cos_k, sin_k = self._cos_k_cached, self._sin_k_cached
        rotation = (self.interleaved, seqlen_offset)
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, *rotation, num_heads_q)
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        if cos_k is None or sin_k is None:
            return q, apply_rotary_emb_kv_(kv, cos, sin, *rotation)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, *rotation)

    # Subclasses written for flash-attn override the methods below, and read the tables they leave.

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> torch.Tensor:
        steps = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return 1.0 / self.base ** (steps / self.dim)

    def _compute_scale(self, device: torch.device | str | None = None) -> torch.Tensor:
        steps = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return (steps + 0.4 * self.dim) / (1.4 * self.dim)

    def _update_cos_sin_cache(
        self,
        seqlen: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the tables anew where they are too short, or of another device or dtype."""
        cos = self._cos_cached
        if (
            cos is not None
            and seqlen <= self._seq_len_cached
            and (cos.device, cos.dtype) == (device, dtype)
            and not (self.training and cos.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        frequencies = self._in_float32(self.inv_freq, self._compute_inv_freq)
        angles = torch.outer(positions, frequencies.to(positions.device))
        cos, sin = angles.cos(), angles.sin()
        if self.scale is not None and self.scale_base is not None:
            scale = self._in_float32(self.scale, self._compute_scale).to(positions.device)
            scale = scale ** ((positions - seqlen // 2) / self.scale_base)[:, None]
            self._cos_k_cached = (cos / scale).to(dtype)
            self._sin_k_cached = (sin / scale).to(dtype)
            cos, sin = cos * scale, sin * scale
        self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)

    def _in_float32(self, buffer: torch.Tensor, compute: _Compute) -> torch.Tensor:
        """Return a buffer, computed anew where a cast of the model has taken bits from it."""
        return buffer if buffer.dtype == torch.float32 else compute(buffer.device)

    def extra_repr(self) -> str:
        """Show the settings in the module's repr."""
        return f"dim={self.dim}, base={self.base}, interleaved={self.interleaved}"


def _heads_of(
    qkv: torch.Tensor, num_heads_q: int | None
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Ranges of dimension 2 that hold the queries, the keys, and both."""
    if isinstance(qkv, torch.Tensor) and qkv.dim() == 4:
        packed = qkv.shape[2]
        if num_heads_q is None:
            raise ValueError("num_heads_q must be given where qkv has four dimensions, got None")
        num_heads_q = length("num_heads_q", num_heads_q)
        keys, rest = divmod(packed - num_heads_q, 2)
        if keys < 0 or rest:
            raise ValueError(
                "qkv must have num_heads_q + 2 H_KV heads along dimension 2, got "
                f"{packed} heads and num_heads_q = {num_heads_q}"
            )
        return (0, num_heads_q), (num_heads_q, num_heads_q + keys), (0, num_heads_q + keys)
    require_rank("qkv", qkv, "(B, S, 3, H, D)")
    if qkv.shape[2] != 3:
        raise ValueError(f"qkv must have shape (B, S, 3, H, D), got {tuple(qkv.shape)}")
    return (0, 1), (1, 2), (0, 2)


def _is_one_part(qkv: torch.Tensor) -> bool:
    """Whether the heads of queries and keys are evenly spaced, so that one kernel rotates both."""
    return qkv.dim() == 4 or qkv.stride(2) == qkv.shape[3] * qkv.stride(3)


def _rotate_parts(
    packed: torch.Tensor,
    name: str,
    parts: tuple[tuple[int, int], ...],
    tables: tuple[torch.Tensor, ...],
    interleaved: bool,
    seqlen_offsets: int | torch.Tensor,
    backend: str,
) -> torch.Tensor:
    require_writable(name, packed)
    offsets, offset = rotary_checks.offsets(seqlen_offsets)
    seqlen = packed.shape[1]
    interleaved = flag("interleaved", interleaved)
    example = packed if packed.dim() == 4 else packed.select(2, 0)
    table_names = _TABLE_NAMES[: len(tables) // 2]
    for cos, sin, names in zip(tables[::2], tables[1::2], table_names, strict=True):
        problem = rotary_checks.rotary_problem(
            example, cos, sin, interleaved, offsets, offset, None, None, name, names
        )
    backend = backends.resolve(rotary_ops.ROTATE, problem, backend)
    static = (offset, seqlen, problem.interleaved, False, backend)
    return rotary_ops.rotate_inplace(packed, parts, static, offsets, None, *tables)
