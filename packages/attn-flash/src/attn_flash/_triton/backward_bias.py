"""The gradient of a bias, summed over the dimensions in which the bias broadcasts.

For biases whose gradient the kernel for dq has no memory to write down before it is summed.
A program owns one tile of the bias, walks all tiles of scores that it was added to, in order, and
adds up their dS. No atomics: the bits never change.
"""

import torch
import triton
import triton.language as tl

from attn_core import tiling
from attn_core.launch import Launcher
from attn_core.tiles.dropout import draw_words, drop, keep_tile
from attn_core.tiles.masks import is_visible, key_blocks
from attn_core.tiles.offsets import head_offsets, load_head
from attn_flash._triton import configs, problem
from attn_flash._triton.scores import (
    BOOLEAN,
    load_slope,
    load_state,
    load_term,
    modify_scores,
)
from attn_flash._triton.sequences import ragged_bounds
from attn_flash.options import Options

NOT_SPECIALIZED = [
    *problem.NOT_SPECIALIZED,
    "bias_m",
    "bias_n",
    "num_b",
    "num_h",
    "num_m",
    "num_n",
    "sum_b",
    "sum_h",
    "sum_m",
    "sum_n",
]


# fmt: off
@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _attention_backward_bias_kernel(
    q_ptr, stride_qb, stride_qm, stride_qh, stride_qd,
    k_ptr, stride_kb, stride_kn, stride_kh, stride_kd,
    v_ptr, stride_vb, stride_vn, stride_vh, stride_vd,
    do_ptr, stride_dob, stride_dom, stride_doh, stride_dod,
    rows_ptr,  # [B, H, M, 2] or [H, M, 2], contiguous: lse in units of log2, and delta
    starts_q_ptr, starts_k_ptr, used_ptr,  # [B + 1], [B + 1] and [B], with IS_VARLEN
    slopes_ptr, stride_sb, stride_sh,
    bias_ptr, stride_bb, stride_bh, stride_bm, stride_bn,
    key_mask_ptr, stride_mb, stride_mn,
    rng_ptr,  # [2]
    dbias_ptr, stride_dbb, stride_dbh, stride_dbm, stride_dbn,  # 0 along broadcast dimensions
    M, N, H, bias_m, bias_n,
    num_b, num_h, num_m, num_n,  # tiles of the bias along each dimension
    sum_b, sum_h, sum_m, sum_n,  # tiles of scores that a tile of the bias was added to
    scale_log2, softcap_log2, threshold, keep_scale, left, right,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    IS_VARLEN: tl.constexpr, HAS_USED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    SUM_M: tl.constexpr, SUM_N: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    # fmt: on
    pid = tl.program_id(0)
    tile_n = pid % num_n
    tile_m = pid // num_n % num_m
    tile_h = pid // num_n // num_m % num_h
    tile_b = pid // num_n // num_m // num_h
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    HAS_WINDOW: tl.constexpr = HAS_LEFT or HAS_RIGHT
    # Keys past the end need no mask where they gather nothing that is stored, queries never do:
    # their lse reads as +inf.
    MASKED: tl.constexpr = HAS_WINDOW or IS_VARLEN or SUM_N
    total = M
    len_q = M
    len_k = N
    first_q = tl.cast(0, tl.int64)
    first_k = tl.cast(0, tl.int64)
    seed, offset = load_state(rng_ptr, HAS_DROPOUT)
    # One tile for all steps: where the bias broadcasts, its stride is 0. What lies past the end
    # reads the last element, which is cheaper than a mask.
    own_m = tl.minimum(tile_m * BLOCK_M + offs_m, bias_m - 1).to(tl.int64)
    own_n = tl.minimum(tile_n * BLOCK_N + offs_n, bias_n - 1).to(tl.int64)
    bias_ptr += tile_b.to(tl.int64) * stride_bb + tile_h.to(tl.int64) * stride_bh
    bias_offs = own_m[:, None] * stride_bm + own_n[None, :] * stride_bn
    bias = load_term(bias_ptr + bias_offs, None, False)
    num_steps = sum_b * sum_h * sum_m * sum_n
    if HAS_WINDOW and not (IS_VARLEN or SUM_M or SUM_N):  # the tile may be out of the window
        lo, full_lo, full_hi, hi = key_blocks(
            tile_m * BLOCK_M, M, N, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
        )
        is_within = (tile_n * BLOCK_N >= lo) & (tile_n * BLOCK_N < hi)
        num_steps = tl.where(is_within, num_steps, 0)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(num_steps):
        start_n = (tile_n + step % sum_n) * BLOCK_N
        start_m = (tile_m + step // sum_n % sum_m) * BLOCK_M
        h = (tile_h + step // sum_n // sum_m % sum_h).to(tl.int64)
        b = (tile_b + step // sum_n // sum_m // sum_h).to(tl.int64)
        head_row = (b * H + h) * total
        if IS_VARLEN:
            first_q, first_k, len_q, len_k = ragged_bounds(
                b, starts_q_ptr, starts_k_ptr, used_ptr, HAS_USED
            )
            head_row = h * total + first_q
        rows = start_m + offs_m
        cols = start_n + offs_n
        mask_m = rows < len_q
        mask_n = cols < len_k
        q_head = q_ptr + b * stride_qb + h * stride_qh + (first_q + start_m) * stride_qm
        do_head = do_ptr + b * stride_dob + h * stride_doh + (first_q + start_m) * stride_dom
        h_kv = h // GROUP
        k_head = k_ptr + b * stride_kb + h_kv * stride_kh + (first_k + start_n) * stride_kn
        v_head = v_ptr + b * stride_vb + h_kv * stride_vh + (first_k + start_n) * stride_vn
        q_ptrs = q_head + head_offsets(offs_m, stride_qm, stride_qd, BLOCK_D)
        do_ptrs = do_head + head_offsets(offs_m, stride_dom, stride_dod, BLOCK_DV)
        k_ptrs = k_head + head_offsets(offs_n, stride_kn, stride_kd, BLOCK_D)
        v_ptrs = v_head + head_offsets(offs_n, stride_vn, stride_vd, BLOCK_DV)
        q = load_head(q_ptrs, mask_m, True, HEAD_DIM)  # [BLOCK_M, BLOCK_D]
        do = load_head(do_ptrs, mask_m, True, HEAD_DIM_V)  # [BLOCK_M, BLOCK_DV]
        k = load_head(k_ptrs, mask_n, True, HEAD_DIM)  # [BLOCK_N, BLOCK_D]
        v = load_head(v_ptrs, mask_n, True, HEAD_DIM_V)  # [BLOCK_N, BLOCK_DV]
        row_ptrs = rows_ptr + 2 * (head_row + rows)
        lse_log2 = tl.load(row_ptrs, mask=mask_m, other=float("inf"))
        delta = tl.load(row_ptrs + 1, mask=mask_m, other=0.0)
        slope_log2 = load_slope(slopes_ptr, stride_sb, stride_sh, b, h, HAS_ALIBI)
        key_mask = 0.0
        if HAS_KEY_MASK > 0:
            key_mask = load_term(key_mask_ptr + b * stride_mb + cols * stride_mn, mask_n, True)
            key_mask = key_mask[None, :]
        distance = (rows + (len_k - len_q)).to(tl.float32)[:, None] - cols.to(tl.float32)[None, :]
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores, factor, _ = modify_scores(
            products, distance, bias, key_mask, scale_log2, softcap_log2, slope_log2,
            SOFTCAP, HAS_ALIBI, HAS_BIAS, HAS_KEY_MASK,
        )  # fmt: skip
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if HAS_DROPOUT:
            words = draw_words(seed, offset, b, h, rows, start_n, BLOCK_M, BLOCK_N)
            dp = keep_scale * drop(dp, keep_tile(words, threshold, BLOCK_M, BLOCK_N), threshold)
        p = tl.math.exp2(scores * factor - lse_log2[:, None])
        if MASKED:
            position = rows[:, None] + (len_k - len_q)
            visible = is_visible(
                position, cols[None, :], len_k, left, right, HAS_LEFT, HAS_RIGHT
            )
            p = tl.where(visible, p, 0.0)
        if HAS_KEY_MASK == BOOLEAN:
            p = tl.where(key_mask, p, 0.0)
        dbias += p * (dp - delta[:, None])

    rows = tile_m * BLOCK_M + offs_m
    cols = tile_n * BLOCK_N + offs_n
    dbias_ptr += tile_b.to(tl.int64) * stride_dbb + tile_h.to(tl.int64) * stride_dbh
    if SUM_M:
        dbias = tl.sum(dbias, 0)[None, :]
        rows = tl.arange(0, 1)
    if SUM_N:
        dbias = tl.sum(dbias, 1)[:, None]
        cols = tl.arange(0, 1)
    offsets = rows[:, None].to(tl.int64) * stride_dbm + cols[None, :].to(tl.int64) * stride_dbn
    mask = (rows < bias_m)[:, None] & (cols < bias_n)[None, :]
    tl.store(dbias_ptr + offsets, dbias.to(dbias_ptr.dtype.element_ty), mask=mask)


_launch = Launcher(_attention_backward_bias_kernel, check=problem.require_narrow_tiles)


def bias_gradient(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    size: problem.Size,
    terms: problem.ScoreTerms,
    options: Options,
) -> torch.Tensor:
    """Gradient of options.attn_bias, from the `rows` that the kernel for dq left."""
    left, right = options.window
    bias = options.attn_bias
    dbias = bias.new_empty(bias.shape)
    config = configs.tiles(configs.BACKWARD_BIAS, q, size, options.window)
    spans = (
        size.B, size.H,
        tiling.ceil_div(size.M, config.block_m), tiling.ceil_div(size.N, config.block_n),
    )  # fmt: skip
    whole = (size.B, size.H, size.M, size.N)
    is_sum = [own == 1 and full != 1 for own, full in zip(bias.shape, whole, strict=True)]
    owned = [1 if summed else span for summed, span in zip(is_sum, spans, strict=True)]
    walked = [span if summed else 1 for summed, span in zip(is_sum, spans, strict=True)]
    strides = tuple(problem.four_strides(x, options) for x in (q, k, v, dout))
    _launch(
        owned[0] * owned[1] * owned[2] * owned[3],
        strides=(*strides, dbias.stride(), terms.key),
        args=(
            q, *strides[0],
            k, *strides[1],
            v, *strides[2],
            dout, *strides[3],
            rows,
            *problem.starts(options),
            *terms.args,
            dbias, *dbias.stride(),
            size.rows, size.N, size.H, bias.shape[2], bias.shape[3],
            *owned, *walked,
            problem.log2_scale(options), *terms.scalars, left, right,
        ),
        constexprs={
            "GROUP": size.H // size.H_KV, "HEAD_DIM": size.D, "HEAD_DIM_V": size.D_v,
            "IS_VARLEN": options.is_varlen, "HAS_USED": options.seqused_k is not None,
            "HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0, **terms.flags,
            "SUM_M": is_sum[2], "SUM_N": is_sum[3],
            "PRECISION": tiling.dot_precision(q),
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
            "BLOCK_D": tiling.padded_head_dim(size.D),
            "BLOCK_DV": tiling.padded_head_dim(size.D_v),
        },
        config=config,
    )  # fmt: skip
    return dbias
