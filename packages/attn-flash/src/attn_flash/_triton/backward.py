"""Backward pass in two kernels and without atomics, so that its bits never change.

With P = exp(S - lse), dP = dO V^T and delta = rowsum(dO * O) - dlse:

    dS = P * (dP - delta),   dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO.

The first kernel owns BLOCK_M queries, computes their delta and dQ; the second owns BLOCK_N keys,
reads delta and computes dK and dV. S and dP are computed twice: seven products for the five of a
single pass with atomics. Dao, "FlashAttention-2", 2023, algorithm 2.
"""

import torch
import triton
import triton.language as tl

from attn_core.launch import Launcher
from attn_core.tiles.masks import is_visible, key_blocks, query_blocks
from attn_core.tiles.offsets import load_tile, tile_offsets
from attn_core.tiles.softmax import LOG2_E
from attn_core.tiles.swizzle import tile_of_head
from attn_flash._triton import configs, problem
from attn_flash.options import Options


# fmt: off
@triton.jit
def _accumulate_dq(
    dq, q, do, lse_log2, delta, position,
    k_ptr, stride_kn, stride_kd,
    v_ptr, stride_vn, stride_vd,
    lo, hi, N, scale_log2, left, right,
    HEAD_DIM: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Add dS K over the key blocks in [lo, hi)."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    PAD_D: tl.constexpr = HEAD_DIM != BLOCK_D
    k_offs = tile_offsets(offs_n, stride_kn, offs_d, stride_kd)
    v_offs = tile_offsets(offs_n, stride_vn, offs_d, stride_vd)
    k_ptr += tl.cast(lo, tl.int64) * stride_kn
    v_ptr += tl.cast(lo, tl.int64) * stride_vn
    for start_n in range(lo, hi, BLOCK_N):
        mask_n = offs_n < N - start_n
        k = load_tile(k_ptr + k_offs, mask_n, mask_d, MASKED, PAD_D)  # [BLOCK_N, BLOCK_D]
        v = load_tile(v_ptr + v_offs, mask_n, mask_d, MASKED, PAD_D)  # [BLOCK_N, BLOCK_D]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        p = tl.math.exp2(scores * scale_log2 - lse_log2[:, None])
        if MASKED:
            visible = is_visible(
                position[:, None], start_n + offs_n[None, :], N, left, right, HAS_LEFT, HAS_RIGHT
            )
            p = tl.where(visible, p, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        k_ptr += BLOCK_N * stride_kn
        v_ptr += BLOCK_N * stride_vn
    return dq


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_dq_kernel(
    q_ptr, stride_qb, stride_qm, stride_qh, stride_qd,
    k_ptr, stride_kb, stride_kn, stride_kh, stride_kd,
    v_ptr, stride_vb, stride_vn, stride_vh, stride_vd,
    out_ptr, stride_ob, stride_om, stride_oh, stride_od,
    do_ptr, stride_dob, stride_dom, stride_doh, stride_dod,
    lse_ptr,  # [B, H, M], contiguous
    dlse_ptr,  # the same, with HAS_DLSE
    dq_ptr, stride_dqb, stride_dqm, stride_dqh, stride_dqd,
    rows_ptr,  # [B, H, M, 2], contiguous: lse in units of log2, and delta
    M, N, H, num_tiles, num_heads, heads_per_group,
    scale, scale_log2, left, right,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_DLSE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    pid_m, pid_bh = tile_of_head(
        tl.program_id(0), num_tiles, num_heads, heads_per_group, "growing" if HAS_RIGHT else "even"
    )
    b = (pid_bh // H).to(tl.int64)
    h = (pid_bh % H).to(tl.int64)
    h_kv = h // GROUP
    start_m = pid_m * BLOCK_M
    first_row = start_m.to(tl.int64)

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < M - start_m
    mask_d = offs_d < HEAD_DIM
    PAD_D: tl.constexpr = HEAD_DIM != BLOCK_D
    q_ptr += b * stride_qb + h * stride_qh + first_row * stride_qm
    q_ptrs = q_ptr + tile_offsets(offs_m, stride_qm, offs_d, stride_qd)
    q = load_tile(q_ptrs, mask_m, mask_d, True, PAD_D)  # [BLOCK_M, BLOCK_D]
    do_ptr += b * stride_dob + h * stride_doh + first_row * stride_dom
    do_ptrs = do_ptr + tile_offsets(offs_m, stride_dom, offs_d, stride_dod)
    do = load_tile(do_ptrs, mask_m, mask_d, True, PAD_D)  # [BLOCK_M, BLOCK_D]
    out_ptr += b * stride_ob + h * stride_oh + first_row * stride_om
    out_ptrs = out_ptr + tile_offsets(offs_m, stride_om, offs_d, stride_od)
    out = load_tile(out_ptrs, mask_m, mask_d, True, PAD_D)  # [BLOCK_M, BLOCK_D]

    row = pid_bh.to(tl.int64) * M + start_m + offs_m
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + row, mask=mask_m, other=0.0)
    lse_log2 = tl.load(lse_ptr + row, mask=mask_m, other=float("inf")) * LOG2_E
    # A row without keys has lse -inf; +inf makes its probabilities 0 instead of NaN.
    lse_log2 = tl.where(lse_log2 == -float("inf"), float("inf"), lse_log2)
    tl.store(rows_ptr + 2 * row, lse_log2, mask=mask_m)
    tl.store(rows_ptr + 2 * row + 1, delta, mask=mask_m)

    k_ptr += b * stride_kb + h_kv * stride_kh
    v_ptr += b * stride_vb + h_kv * stride_vh
    position = start_m + offs_m + (N - M)
    lo, full_lo, full_hi, hi = key_blocks(
        start_m, M, N, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_LEFT:
        dq = _accumulate_dq(
            dq, q, do, lse_log2, delta, position,
            k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd,
            lo, full_lo, N, scale_log2, left, right,
            HEAD_DIM, HAS_LEFT, HAS_RIGHT, True, PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    dq = _accumulate_dq(
        dq, q, do, lse_log2, delta, position,
        k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd,
        full_lo, full_hi, N, scale_log2, left, right,
        HEAD_DIM, HAS_LEFT, HAS_RIGHT, False, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq = _accumulate_dq(
        dq, q, do, lse_log2, delta, position,
        k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd,
        full_hi, hi, N, scale_log2, left, right,
        HEAD_DIM, HAS_LEFT, HAS_RIGHT, True, PRECISION, TAIL_N, BLOCK_D,
    )  # fmt: skip

    dq_ptr += b * stride_dqb + h * stride_dqh + first_row * stride_dqm
    dq_ptrs = dq_ptr + tile_offsets(offs_m, stride_dqm, offs_d, stride_dqd)
    mask = mask_m[:, None] & mask_d[None, :]
    tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask)


# fmt: off
@triton.jit
def _accumulate_dk_dv(
    dk, dv, k, v, offs_key,
    q_ptr, stride_qm, stride_qd,
    do_ptr, stride_dom, stride_dod,
    row_ptr,
    lo, full_lo, full_hi, hi, M, N, scale_log2, left, right,
    HEAD_DIM: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, IS_TAIL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Add dS^T Q and P^T dO over the query blocks in [lo, hi); tiles of scores are transposed.

    Blocks outside [full_lo, full_hi) look at the mask, in a branch.
    """
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    PAD_D: tl.constexpr = HEAD_DIM != BLOCK_D
    q_offs = tile_offsets(offs_m, stride_qm, offs_d, stride_qd)
    do_offs = tile_offsets(offs_m, stride_dom, offs_d, stride_dod)
    q_ptr += tl.cast(lo, tl.int64) * stride_qm
    do_ptr += tl.cast(lo, tl.int64) * stride_dom
    for start_m in range(lo, hi, BLOCK_M):
        mask_m = offs_m < M - start_m
        q = load_tile(q_ptr + q_offs, mask_m, mask_d, IS_TAIL, PAD_D)  # [BLOCK_M, BLOCK_D]
        do = load_tile(do_ptr + do_offs, mask_m, mask_d, IS_TAIL, PAD_D)  # [BLOCK_M, BLOCK_D]
        # Both in one load: two loads of BLOCK_M numbers would be made by every thread.
        row_ptrs = row_ptr + 2 * (start_m + offs_m)[:, None] + tl.arange(0, 2)[None, :]
        row = load_tile(row_ptrs, mask_m, mask_m, IS_TAIL, False)  # [BLOCK_M, 2]
        lse_log2, delta = tl.split(row)
        scores_t = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        dp_t = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        p_t = tl.math.exp2(scores_t * scale_log2 - lse_log2[None, :])
        position = start_m + offs_m + (N - M)
        if IS_TAIL:
            visible = is_visible(
                position[None, :], offs_key[:, None], N, left, right, HAS_LEFT, HAS_RIGHT
            )
            p_t = tl.where(visible & mask_m[None, :], p_t, 0.0)
        elif HAS_LEFT or HAS_RIGHT:  # noqa: SIM102 - the outer one at compile time
            if (start_m < full_lo) | (start_m >= full_hi):
                visible = is_visible(
                    position[None, :], offs_key[:, None], N, left, right, HAS_LEFT, HAS_RIGHT
                )
                p_t = tl.where(visible, p_t, 0.0)
        dv = tl.dot(p_t.to(do.dtype), do, dv, input_precision=PRECISION)
        ds_t = p_t * (dp_t - delta[None, :])
        dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=PRECISION)
        q_ptr += BLOCK_M * stride_qm
        do_ptr += BLOCK_M * stride_dom
    return dk, dv


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_dk_dv_kernel(
    q_ptr, stride_qb, stride_qm, stride_qh, stride_qd,
    k_ptr, stride_kb, stride_kn, stride_kh, stride_kd,
    v_ptr, stride_vb, stride_vn, stride_vh, stride_vd,
    do_ptr, stride_dob, stride_dom, stride_doh, stride_dod,
    rows_ptr,  # [B, H, M, 2], contiguous: lse in units of log2, and delta
    dk_ptr, stride_dkb, stride_dkn, stride_dkh, stride_dkd,
    dv_ptr, stride_dvb, stride_dvn, stride_dvh, stride_dvd,
    M, N, H_KV, num_tiles, num_heads, heads_per_group,
    scale, scale_log2, left, right,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    pid_n, pid_bh = tile_of_head(
        tl.program_id(0),
        num_tiles,
        num_heads,
        heads_per_group,
        "shrinking" if HAS_RIGHT else "even",
    )
    b = (pid_bh // H_KV).to(tl.int64)
    h_kv = (pid_bh % H_KV).to(tl.int64)
    start_n = pid_n * BLOCK_N
    first_key = start_n.to(tl.int64)

    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_n = offs_n < N - start_n
    mask_d = offs_d < HEAD_DIM
    PAD_D: tl.constexpr = HEAD_DIM != BLOCK_D
    k_ptr += b * stride_kb + h_kv * stride_kh + first_key * stride_kn
    k_ptrs = k_ptr + tile_offsets(offs_n, stride_kn, offs_d, stride_kd)
    k = load_tile(k_ptrs, mask_n, mask_d, True, PAD_D)  # [BLOCK_N, BLOCK_D]
    v_ptr += b * stride_vb + h_kv * stride_vh + first_key * stride_vn
    v_ptrs = v_ptr + tile_offsets(offs_n, stride_vn, offs_d, stride_vd)
    v = load_tile(v_ptrs, mask_n, mask_d, True, PAD_D)  # [BLOCK_N, BLOCK_D]

    lo, full_lo, full_hi, hi = query_blocks(
        start_n, M, N, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    whole_hi = tl.minimum(tl.cdiv(hi, BLOCK_M), M // BLOCK_M) * BLOCK_M
    tail = tl.maximum(lo, whole_hi)  # from here on a block has queries past the end
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # One loop for all but the tail and, with a window, a branch around the tail's: otherwise ptxas
    # cannot overlap the products of either loop (its remark C7515).
    for g in range(GROUP):
        h = h_kv * GROUP + g
        q_head = q_ptr + b * stride_qb + h * stride_qh
        do_head = do_ptr + b * stride_dob + h * stride_doh
        row_ptr = rows_ptr + 2 * (pid_bh.to(tl.int64) * GROUP + g) * M
        dk, dv = _accumulate_dk_dv(
            dk, dv, k, v, start_n + offs_n,
            q_head, stride_qm, stride_qd, do_head, stride_dom, stride_dod,
            row_ptr, lo, full_lo, full_hi, tail, M, N, scale_log2, left, right,
            HEAD_DIM, HAS_LEFT, HAS_RIGHT, False, PRECISION, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        if (tail < hi) | (not (HAS_LEFT or HAS_RIGHT)):
            dk, dv = _accumulate_dk_dv(
                dk, dv, k, v, start_n + offs_n,
                q_head, stride_qm, stride_qd, do_head, stride_dom, stride_dod,
                row_ptr, tail, full_lo, full_hi, hi, M, N, scale_log2, left, right,
                HEAD_DIM, HAS_LEFT, HAS_RIGHT, True, PRECISION, TAIL_M, BLOCK_D,
            )  # fmt: skip

    mask = mask_n[:, None] & mask_d[None, :]
    dk_ptr += b * stride_dkb + h_kv * stride_dkh + first_key * stride_dkn
    dk_ptrs = dk_ptr + tile_offsets(offs_n, stride_dkn, offs_d, stride_dkd)
    tl.store(dk_ptrs, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    dv_ptr += b * stride_dvb + h_kv * stride_dvh + first_key * stride_dvn
    dv_ptrs = dv_ptr + tile_offsets(offs_n, stride_dvn, offs_d, stride_dvd)
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=mask)


_launch_dq = Launcher(_attention_backward_dq_kernel, check=problem.require_narrow_tiles)
_launch_dk_dv = Launcher(_attention_backward_dk_dv_kernel, check=problem.require_narrow_tiles)


def attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    needs_dbias: bool,
    options: Options,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of q, k, v, attn_bias and sinks, given those of out (dout) and, maybe, lse (dlse)."""
    scale, window = options.scale, options.window
    B, M, H, _ = q.shape
    N = k.shape[1]
    if B * M * H * N == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape), None, None
    rows = q.new_empty((B, H, M, 2), dtype=torch.float32)
    dq = _dq(dout, dlse, q, k, v, out, lse, rows, scale, window)
    dk, dv = _dk_dv(dout, q, k, v, rows, scale, window)
    return dq, dk, dv, None, None


def _dq(dout, dlse, q, k, v, out, lse, rows, scale, window):
    """Compute dq, and fill `rows` (B, H, M, 2) for `_dk_dv`."""
    B, M, H, D = q.shape
    _, N, H_KV, _ = k.shape
    left, right = window
    dq = q.new_empty(q.shape)
    config = configs.tiles(configs.BACKWARD_DQ, q, k, window)
    num_tiles = problem.ceil_div(M, config.block_m)
    tensors = (q, k, v, out, dout, dq)
    strides = tuple(tensor.stride() for tensor in tensors)
    _launch_dq(
        num_tiles * B * H,
        strides=strides,
        args=(
            q, *strides[0],
            k, *strides[1],
            v, *strides[2],
            out, *strides[3],
            dout, *strides[4],
            lse,
            None if dlse is None else dlse.contiguous(),
            dq, *strides[5],
            rows,
            M, N, H, num_tiles, B * H, problem.heads_per_group(k),
            scale, scale * problem.LOG2_E, left, right,
        ),
        constexprs={
            "GROUP": H // H_KV, "HEAD_DIM": D, "HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0,
            "HAS_DLSE": dlse is not None, "PRECISION": problem.dot_precision(q),
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
            "TAIL_N": problem.tail_block(N, config.block_n, window),
            "BLOCK_D": problem.padded_head_dim(D),
        },
        config=config,
    )  # fmt: skip
    return dq


def _dk_dv(dout, q, k, v, rows, scale, window):
    """Compute dk and dv from the `rows` that `_dq` left."""
    B, M, H, D = q.shape
    _, N, H_KV, _ = k.shape
    left, right = window
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    config = configs.tiles(configs.BACKWARD_DK_DV, q, k, window)
    num_tiles = problem.ceil_div(N, config.block_n)
    tensors = (q, k, v, dout, dk, dv)
    strides = tuple(tensor.stride() for tensor in tensors)
    _launch_dk_dv(
        num_tiles * B * H_KV,
        strides=strides,
        args=(
            q, *strides[0],
            k, *strides[1],
            v, *strides[2],
            dout, *strides[3],
            rows,
            dk, *strides[4],
            dv, *strides[5],
            M, N, H_KV, num_tiles, B * H_KV, problem.heads_per_group(q),
            scale, scale * problem.LOG2_E, left, right,
        ),
        constexprs={
            "GROUP": H // H_KV, "HEAD_DIM": D, "HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0,
            "PRECISION": problem.dot_precision(q), "BLOCK_M": config.block_m,
            "TAIL_M": problem.tail_block(M, config.block_m, window),
            "BLOCK_N": config.block_n, "BLOCK_D": problem.padded_head_dim(D),
        },
        config=config,
    )  # fmt: skip
    return dk, dv
