"""The meaning of the operators, in plain PyTorch.

EvoAttention reads values only. For token t, counted from 1, with S_t(x) = sum_{s <= t} x_s:

    context_t = S_t(v)                                mean_t = context_t / t
    stat_t    = S_t(sigmoid(W_g mean + b_g) v)
    denom_t   = |stat_t| + |W_l v_t + b_l| + 1e-8
    gate_t    = silu((W_q v_t + b_q) / denom_t) v_t
    out_t     = LayerNorm(sigmoid(W_f gate_t + b_f) context_t alive_t),    alive_t = any(v_t != 0)

Without `causal`, S and t are those of the last token for all tokens. The operator is that of
evo-attn (version 0.2.0, https://github.com/ZhenyaSSSS/evo-attn).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from attn_evo.weights import EvoWeights

EPSILON = 1e-8
NORM_EPSILON = 1e-5


def attention(
    v: torch.Tensor,
    weights: EvoWeights,
    causal: bool,
    mask: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
    length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """EvoAttention of v (B, H, L, D): out like v, and the sums (2, B, H, D) up to its last token.

    `mask` (B, L) keeps tokens; `sums` and `length` () are those of the tokens before v.
    """
    if mask is not None:
        v = v.masked_fill(~mask[:, None, :, None], 0)
    batch, heads, tokens, dim = v.shape
    sums = v.new_zeros(2, batch, heads, dim) if sums is None else sums
    if tokens == 0:
        return v.clone(), sums.clone()
    before_context, before_stat = sums[:, :, :, None]

    context = before_context + _sum(v, causal)
    mean = (context / token_count(v, causal, length)).to(v.dtype)
    stat_gate = torch.sigmoid(F.linear(mean, weights.w_g, weights.b_g))
    stat = before_stat + _sum(stat_gate * v, causal)

    local = F.linear(v, weights.w_l, weights.b_l)
    denominator = stat.abs() + local.abs() + EPSILON
    gate = F.silu(F.linear(v, weights.w_q, weights.b_q) / denominator) * v
    final_gate = torch.sigmoid(F.linear(gate, weights.w_f, weights.b_f))
    alive = (v != 0).any(dim=-1, keepdim=True)
    out = F.layer_norm(
        final_gate * context * alive,
        (dim,),
        weights.norm_weight,
        weights.norm_bias,
        NORM_EPSILON,
    )
    return out, torch.stack((context[:, :, -1], stat[:, :, -1]))


def prefix_sum(x: torch.Tensor, dim: int, exclusive: bool, reverse: bool) -> torch.Tensor:
    """Sum of the elements up to each one along `dim`; `exclusive` leaves the element itself out."""
    if reverse:
        return prefix_sum(x.flip(dim), dim, exclusive, reverse=False).flip(dim)
    out = x.cumsum(dim)
    return out - x if exclusive else out


def token_count(v: torch.Tensor, causal: bool, length: torch.Tensor | None) -> torch.Tensor:
    """Tokens seen by each token of v (B, H, L, D), (L, 1), or by all of them, (1, 1).

    In float32 at least: bfloat16 has no 257.
    """
    tokens = v.shape[2]
    count = torch.arange(1 if causal else tokens, tokens + 1, device=v.device)
    if length is not None:
        count = count + length
    return count.to(torch.promote_types(v.dtype, torch.float32))[:, None]


def _sum(x: torch.Tensor, causal: bool) -> torch.Tensor:
    return x.cumsum(dim=2) if causal else x.sum(dim=2, keepdim=True)
