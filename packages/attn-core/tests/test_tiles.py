"""The device functions, each in a small kernel under Triton's interpreter."""

import functools
import math

import pytest
import torch

from attn_core import dropout
from attn_core.merge import merge_attention_states
from attn_core.testing import random_tensor

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
tiles = pytest.importorskip("attn_core.tiles")

from attn_core.tiles.dropout import draw_words, keep_tile  # noqa: E402
from attn_core.tiles.masks import is_visible, key_blocks, query_blocks  # noqa: E402
from attn_core.tiles.merge import take_in_parts  # noqa: E402
from attn_core.tiles.offsets import (  # noqa: E402
    head_offsets,
    load_head,
    load_tile,
    store_head,
    tile_offsets,
)
from attn_core.tiles.softmax import (  # noqa: E402
    LOG2_E,
    finish_softmax,
    online_softmax,
    online_softmax_masked,
)
from attn_core.tiles.swizzle import tile_of_head  # noqa: E402

pytestmark = pytest.mark.interpret


@triton.jit
def merge_kernel(
    parts, parts_lse, out, lse, M: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, M)
    columns = tl.arange(0, D)
    m_i = tl.full([M], -float("inf"), tl.float32)
    l_i = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    for start in range(0, S, BLOCK_S):
        places = (start + tl.arange(0, BLOCK_S))[None, :] * M + rows[:, None]
        tile = tl.load(parts + places[:, :, None] * D + columns[None, None, :])
        m_i, l_i, acc = take_in_parts(m_i, l_i, acc, tl.load(parts_lse + places) * LOG2_E, tile)
    merged, merged_lse = finish_softmax(m_i, l_i, acc)
    tl.store(out + rows[:, None] * D + columns[None, :], merged)
    tl.store(lse + rows, merged_lse)


@pytest.mark.parametrize("block_s", [1, 2, 4])
def test_parts_merge_as_whole_tensors_do(block_s):
    parts = random_tensor((4, 16, 8), seed="parts")
    parts_lse = random_tensor((4, 16), seed="lse", scale=20.0)
    parts_lse[:, 1] = parts_lse[0, 2] = parts_lse[3, 3] = -math.inf
    out, lse = torch.empty(16, 8), torch.empty(16)
    stale = parts.masked_fill(parts_lse[..., None] == -math.inf, math.nan)
    merge_kernel[(1,)](stale, parts_lse, out, lse, M=16, S=4, D=8, BLOCK_S=block_s)
    states = zip(parts[:, None, :, None], parts_lse[:, None, None], strict=True)
    expected, expected_lse = functools.reduce(lambda a, b: merge_attention_states(*a, *b), states)
    torch.testing.assert_close(out, expected[0, :, 0])
    torch.testing.assert_close(lse, expected_lse[0, 0])
    assert out[1].eq(0).all()
    assert lse[1] == -math.inf


@triton.jit
def keep_kernel(
    out, seed, offset, threshold, H, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2) // H
    h = tl.program_id(2) % H
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    start_n = tl.program_id(1) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    words = draw_words(seed, offset, b, h, offs_m, start_n, BLOCK_M, BLOCK_N)
    keep = keep_tile(words, threshold, BLOCK_M, BLOCK_N, TRANSPOSED)
    if TRANSPOSED:
        keep = tl.trans(keep)
    cells = (tl.program_id(2) * M + offs_m[:, None]) * N + offs_n[None, :]
    tl.store(out + cells, keep, mask=(offs_m[:, None] < M) & (offs_n[None, :] < N))


@pytest.mark.parametrize("block_m, block_n", [(32, 16), (16, 32), (16, 64)])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("seed", [0, -3, 2**31, 2**62 + 5])
def test_keep_tile_has_the_bits_of_its_torch_twin(block_m, block_n, seed, transposed):
    B, H, M, N = 2, 3, 19, 37
    out = torch.empty(B, H, M, N, dtype=torch.int8)
    grid = (triton.cdiv(M, block_m), triton.cdiv(N, block_n), B * H)
    limit = dropout.threshold(0.3)
    keep_kernel[grid](out, seed, 11, limit, H, M, N, block_m, block_n, transposed)
    assert torch.equal(out.bool(), dropout.keep_mask((B, H, M, N), 0.3, seed, 11))


@triton.jit
def visible_kernel(out, M, N, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    i = tl.arange(0, 16)[:, None]
    j = tl.arange(0, 32)[None, :]
    visible = is_visible(i + N - M, j, N, left, right, HAS_LEFT, HAS_RIGHT)
    tl.store(out + i * 32 + j, visible)


def visible_reference(M, N, left, right):
    position, j = torch.arange(M)[:, None] + N - M, torch.arange(N)[None, :]
    return ((left < 0) | (j >= position - left)) & ((right < 0) | (j <= position + right))


WINDOWS = [(-1, -1), (-1, 0), (0, 0), (5, -1), (3, 2), (-1, 4), (40, 0)]


@pytest.mark.parametrize("left, right", WINDOWS)
@pytest.mark.parametrize("M, N", [(16, 32), (16, 9), (7, 30), (1, 1)])
def test_is_visible(M, N, left, right):
    out = torch.empty(16, 32, dtype=torch.int8)
    visible_kernel[(1,)](out, M, N, left, right, left >= 0, right >= 0)
    assert torch.equal(out[:M, :N].bool(), visible_reference(M, N, left, right))
    assert not out[:M, N:].any()


@triton.jit
def blocks_kernel(
    out, M, N, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if OF_KEYS:
        lo, full_lo, full_hi, hi = key_blocks(
            pid * BLOCK_M, M, N, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
        )
    else:
        lo, full_lo, full_hi, hi = query_blocks(
            pid * BLOCK_N, M, N, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
        )
    tl.store(out + pid * 4, lo)
    tl.store(out + pid * 4 + 1, full_lo)
    tl.store(out + pid * 4 + 2, full_hi)
    tl.store(out + pid * 4 + 3, hi)


@pytest.mark.parametrize("of_keys", [True, False], ids=["key_blocks", "query_blocks"])
@pytest.mark.parametrize("left, right", WINDOWS)
@pytest.mark.parametrize("M, N", [(33, 33), (16, 64), (50, 20), (1, 40), (40, 1)])
def test_blocks_cover_every_visible_pair_and_full_blocks_need_no_mask(M, N, left, right, of_keys):
    block_m, block_n = 16, 8
    visible = visible_reference(M, N, left, right)
    step, length, inner_step = (block_m, M, block_n) if of_keys else (block_n, N, block_m)
    if not of_keys:
        visible = visible.T
    out = torch.empty(triton.cdiv(length, step), 4, dtype=torch.int64)
    sides = (left >= 0, right >= 0)
    blocks_kernel[(len(out),)](out, M, N, left, right, *sides, block_m, block_n, of_keys)
    for index, (lo, full_lo, full_hi, hi) in enumerate(out.tolist()):
        rows = visible[index * step : (index + 1) * step]
        assert 0 <= lo <= full_lo <= full_hi
        assert all(bound % inner_step == 0 for bound in (lo, full_lo))
        assert not rows[:, :lo].any()
        assert not rows[:, max(hi, full_hi) :].any()
        assert rows[:, full_lo:full_hi].all()


@triton.jit
def transposing_kernel(
    x, out, rows, cols, stride_row, stride_col, BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    offs = tl.arange(0, BLOCK)
    ptrs = x + tile_offsets(offs, stride_row, offs, stride_col)
    tile = load_tile(ptrs, offs < rows, offs < cols, MASKED, MASKED)
    tl.store(out + tile_offsets(offs, 1, offs, BLOCK), tile)


@pytest.mark.parametrize("rows, cols", [(16, 16), (9, 13), (1, 0)])
def test_load_tile_reads_zero_outside(rows, cols):
    x = random_tensor((16, 16), seed="x")
    out = torch.empty(16, 16)
    transposing_kernel[(1,)](x, out, rows, cols, *x.stride(), 16, MASKED=(rows, cols) != (16, 16))
    expected = torch.zeros(16, 16)
    expected[:rows, :cols] = x[:rows, :cols]
    assert torch.equal(out.T, expected)


@triton.jit
def heads_kernel(x, out, rows, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tile = load_head(x + head_offsets(offs, HEAD_DIM, 1, BLOCK_D), offs < rows, True, HEAD_DIM)
    tl.static_assert(tile.shape[1] == BLOCK_D)
    store_head(out + head_offsets(offs, 1, BLOCK, BLOCK_D), 2 * tile, offs < rows, HEAD_DIM)


@pytest.mark.parametrize("head_dim", [16, 13, 1])
def test_heads_are_loaded_and_stored_without_padding(head_dim):
    rows = 9
    x = random_tensor((rows, head_dim), seed="x")
    out = torch.full((16, 16), torch.nan)
    heads_kernel[(1,)](x, out, rows, head_dim, BLOCK=16, BLOCK_D=16)
    assert torch.equal(out[:head_dim, :rows].T, 2 * x)
    assert out.isnan().sum() == out.numel() - x.numel()


@triton.jit
def softmax_kernel(
    scores, values, out, lse, N, scale_log2,
    M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, M)
    dims = tl.arange(0, D)
    m_i = tl.full((M,), -float("inf"), tl.float32)
    l_i = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, D), tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        s = tl.load(scores + rows[:, None] * N + cols[None, :], mask=cols[None, :] < N, other=0.0)
        v = tl.load(values + cols[:, None] * D + dims[None, :], mask=cols[:, None] < N, other=0.0)
        if MASKED:
            # Row i sees the keys from i on: the last rows see none.
            visible = (cols[None, :] >= 4 * rows[:, None]) & (cols[None, :] < N)
            m_i, l_i, alpha, p = online_softmax_masked(m_i, l_i, s, scale_log2, visible)
        else:
            m_i, l_i, alpha, p = online_softmax(m_i, l_i, s, scale_log2)
        acc = acc * alpha[:, None] + tl.dot(p, v)
    result, result_lse = finish_softmax(m_i, l_i, acc)
    tl.store(out + rows[:, None] * D + dims[None, :], result)
    tl.store(lse + rows, result_lse)


@pytest.mark.parametrize("masked, N", [(False, 64), (True, 64), (True, 37)])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_online_softmax(masked, N, scale):
    M, D = 32, 16
    scores, values = random_tensor((M, N), seed="scores"), random_tensor((N, D), seed="values")
    out, lse = torch.empty(M, D), torch.empty(M)
    softmax_kernel[(1,)](
        scores, values, out, lse, N, scale * math.log2(math.e), M=M, BLOCK_N=16, D=D, MASKED=masked
    )
    wide = scores.double() * scale
    if masked:
        wide[torch.arange(N) < 4 * torch.arange(M)[:, None]] = -math.inf
    expected_lse = torch.logsumexp(wide, -1)
    probs = (wide - expected_lse.masked_fill(expected_lse == -math.inf, 0.0)[:, None]).exp()
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, (probs @ values.double()).float(), rtol=1e-4, atol=1e-5)
    assert not masked or (out[-1].eq(0).all() and lse[-1] == -math.inf)


@triton.jit
def swizzle_kernel(tiles_out, heads_out, num_tiles, num_heads, group, WORK: tl.constexpr):
    pid = tl.program_id(0)
    tile, head = tile_of_head(pid, num_tiles, num_heads, group, WORK)
    tl.store(tiles_out + pid, tile)
    tl.store(heads_out + pid, head)


def programs(num_tiles, num_heads, group, work):
    """(tile, head) of each program in turn."""
    count = num_tiles * num_heads
    tile, head = torch.empty(2, count, dtype=torch.int64)
    swizzle_kernel[(count,)](tile, head, num_tiles, num_heads, group, work)
    return list(zip(tile.tolist(), head.tolist(), strict=True))


@pytest.mark.parametrize("work", ["even", "growing", "shrinking"])
@pytest.mark.parametrize(
    "num_tiles, num_heads, group", [(5, 7, 3), (1, 4, 8), (4, 8, 4), (3, 1, 1)]
)
def test_tile_of_head_is_a_permutation_in_groups(num_tiles, num_heads, group, work):
    pairs = programs(num_tiles, num_heads, group, work)
    assert sorted(pairs) == [(t, h) for t in range(num_tiles) for h in range(num_heads)]
    groups = [h // group for _, h in pairs]
    assert groups == sorted(groups)


@pytest.mark.parametrize(
    "work, tiles_in_turn", [("growing", [2, 2, 1, 1, 0, 0]), ("shrinking", [0, 0, 1, 1, 2, 2])]
)
def test_longest_tiles_of_a_group_come_first(work, tiles_in_turn):
    assert [tile for tile, _ in programs(3, 4, 2, work)] == 2 * tiles_in_turn
