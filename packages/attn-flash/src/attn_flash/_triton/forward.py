"""Forward pass: one program attends with BLOCK_M queries of one head to all keys they see."""

import torch
import triton
import triton.language as tl

from attn_core.launch import Launcher
from attn_core.tiles.masks import is_visible, key_blocks
from attn_core.tiles.offsets import load_tile, tile_offsets
from attn_core.tiles.softmax import finish_softmax, online_softmax, online_softmax_masked
from attn_core.tiles.swizzle import tile_of_head
from attn_flash._triton import configs, problem
from attn_flash.options import Options


# fmt: off
@triton.jit
def _attend(
    acc, m_i, l_i, q, position,
    k_ptr, stride_kn, stride_kd,
    v_ptr, stride_vn, stride_vd,
    lo, hi, N, scale_log2, left, right,
    HEAD_DIM: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Attend to the key blocks in [lo, hi), with or without looking at the mask."""
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
        if MASKED:
            visible = is_visible(
                position[:, None], start_n + offs_n[None, :], N, left, right, HAS_LEFT, HAS_RIGHT
            )
            m_i, l_i, alpha, p = online_softmax_masked(m_i, l_i, scores, scale_log2, visible)
        else:
            m_i, l_i, alpha, p = online_softmax(m_i, l_i, scores, scale_log2)
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        k_ptr += BLOCK_N * stride_kn
        v_ptr += BLOCK_N * stride_vn
    return acc, m_i, l_i


# fmt: off
@triton.jit
def _attend_rows(
    q_ptr, stride_qm, stride_qd,
    k_ptr, stride_kn, stride_kd,
    v_ptr, stride_vn, stride_vd,
    out_ptr, stride_om, stride_od,
    lse_ptr,
    start_m, M, N, scale_log2, left, right,
    HEAD_DIM: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    NEGATE_Q: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Compute BLOCK_M rows of one head; the pointers are those of the head."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < M - start_m
    mask_d = offs_d < HEAD_DIM
    first_row = start_m.to(tl.int64)
    q_ptrs = q_ptr + first_row * stride_qm + tile_offsets(offs_m, stride_qm, offs_d, stride_qd)
    q = load_tile(q_ptrs, mask_m, mask_d, True, HEAD_DIM != BLOCK_D)  # [BLOCK_M, BLOCK_D]
    if NEGATE_Q:  # a running maximum needs a scale that is not negative
        q = -q

    position = start_m + offs_m + (N - M)
    lo, full_lo, full_hi, hi = key_blocks(
        start_m, M, N, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_LEFT:
        acc, m_i, l_i = _attend(
            acc, m_i, l_i, q, position, k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd,
            lo, full_lo, N, scale_log2, left, right,
            HEAD_DIM, HAS_LEFT, HAS_RIGHT, True, PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, m_i, l_i = _attend(
        acc, m_i, l_i, q, position, k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd,
        full_lo, full_hi, N, scale_log2, left, right,
        HEAD_DIM, HAS_LEFT, HAS_RIGHT, False, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, m_i, l_i = _attend(
        acc, m_i, l_i, q, position, k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd,
        full_hi, hi, N, scale_log2, left, right,
        HEAD_DIM, HAS_LEFT, HAS_RIGHT, True, PRECISION, TAIL_N, BLOCK_D,
    )  # fmt: skip

    out, lse = finish_softmax(m_i, l_i, acc)
    tl.store(lse_ptr + start_m + offs_m, lse, mask=mask_m)
    out_ptrs = out_ptr + first_row * stride_om + tile_offsets(offs_m, stride_om, offs_d, stride_od)
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_d[None, :])


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_forward_kernel(
    q_ptr, stride_qb, stride_qm, stride_qh, stride_qd,
    k_ptr, stride_kb, stride_kn, stride_kh, stride_kd,
    v_ptr, stride_vb, stride_vn, stride_vh, stride_vd,
    out_ptr, stride_ob, stride_om, stride_oh, stride_od,
    lse_ptr,  # [B, H, M], contiguous
    M, N, H, num_tiles, num_heads, heads_per_group,
    scale_log2, left, right,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    NEGATE_Q: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # fmt: on
    pid_m, pid_bh = tile_of_head(
        tl.program_id(0), num_tiles, num_heads, heads_per_group, "growing" if HAS_RIGHT else "even"
    )
    b = (pid_bh // H).to(tl.int64)
    h = (pid_bh % H).to(tl.int64)
    h_kv = h // GROUP
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h_kv * stride_kh
    v_ptr += b * stride_vb + h_kv * stride_vh
    out_ptr += b * stride_ob + h * stride_oh
    lse_ptr += pid_bh.to(tl.int64) * M
    if TAIL_M < BLOCK_M and pid_m == num_tiles - 1:
        _attend_rows(
            q_ptr, stride_qm, stride_qd, k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd,
            out_ptr, stride_om, stride_od, lse_ptr,
            pid_m * BLOCK_M, M, N, scale_log2, left, right,
            HEAD_DIM, HAS_LEFT, HAS_RIGHT, NEGATE_Q, PRECISION, TAIL_M, BLOCK_N, TAIL_N, BLOCK_D,
        )  # fmt: skip
    else:
        _attend_rows(
            q_ptr, stride_qm, stride_qd, k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd,
            out_ptr, stride_om, stride_od, lse_ptr,
            pid_m * BLOCK_M, M, N, scale_log2, left, right,
            HEAD_DIM, HAS_LEFT, HAS_RIGHT, NEGATE_Q, PRECISION, BLOCK_M, BLOCK_N, TAIL_N, BLOCK_D,
        )  # fmt: skip


_launch = Launcher(_attention_forward_kernel, check=problem.require_narrow_tiles)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q (B, M, H, D) over k, v (B, N, H_KV, D): out like q and lse (B, H, M)."""
    scale, window = options.scale, options.window
    B, M, H, D = q.shape
    _, N, H_KV, _ = k.shape
    out = q.new_empty((B, M, H, D))
    lse = q.new_empty((B, H, M), dtype=torch.float32)
    if B * M * H == 0:
        return out, lse
    left, right = window
    config = configs.tiles(configs.FORWARD, q, k, window)
    num_tiles = problem.ceil_div(M, config.block_m)
    q_strides, k_strides, v_strides, out_strides = q.stride(), k.stride(), v.stride(), out.stride()
    _launch(
        num_tiles * B * H,
        strides=(q_strides, k_strides, v_strides, out_strides),
        args=(
            q, *q_strides,
            k, *k_strides,
            v, *v_strides,
            out, *out_strides,
            lse,
            M, N, H, num_tiles, B * H, problem.heads_per_group(k),
            abs(scale) * problem.LOG2_E, left, right,
        ),
        constexprs={
            "GROUP": H // H_KV, "HEAD_DIM": D, "HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0,
            "NEGATE_Q": scale < 0, "PRECISION": problem.dot_precision(q),
            "BLOCK_M": config.block_m,
            "TAIL_M": problem.tail_block(M, config.block_m, window),
            "BLOCK_N": config.block_n,
            "TAIL_N": problem.tail_block(N, config.block_n, window),
            "BLOCK_D": problem.padded_head_dim(D),
        },
        config=config,
    )  # fmt: skip
    return out, lse
