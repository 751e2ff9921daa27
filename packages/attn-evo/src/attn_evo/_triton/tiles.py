"""Device functions that the kernels of both passes share, some with those for Hopper.

Weights come packed, as the first launch of a pass lays them out: matrices [4, BLOCK_D, BLOCK_D] in
the dtype of v and vectors [6, BLOCK_D] in float32, padded with zeros. The biases come a second time
as 16 rows [4, 16, BLOCK_D] in the dtype of v, which add up to them: a product with ones brings a
bias into an accumulator and costs the other units nothing. W_q, W_g, W_f and their biases are
halved, which is exact: sigmoid(x) = tanh(x / 2) / 2 + 1 / 2 then needs no scaling.

Tables of sums are [4, B * H, rows, BLOCK_D] in float32, with a row for each tile or each chunk.
"""

import triton
import triton.language as tl

from attn_core.tiles.offsets import load_tile, tile_offsets

W_Q = tl.constexpr(0)
W_L = tl.constexpr(1)
W_F = tl.constexpr(2)
W_G = tl.constexpr(3)
NORM_WEIGHT = tl.constexpr(4)
NORM_BIAS = tl.constexpr(5)

CONTEXT = tl.constexpr(0)
STAT = tl.constexpr(1)
DSTAT = tl.constexpr(2)
DCONTEXT = tl.constexpr(3)

EPSILON = tl.constexpr(1e-8)
NORM_EPSILON = tl.constexpr(1e-5)
_MINUS_2_LOG2_E = tl.constexpr(-2.8853900817779268)
_LARGEST_HALF = tl.constexpr(65504.0)
SUM_COLUMNS = tl.constexpr(16)  # the fewest that tl.dot accepts
BIAS_ROWS = tl.constexpr(16)
# Of the column sums of a program: what it hands on to other programs of its head.
CHUNK = tl.constexpr(6)
MOST_STAYING_BIASES = tl.constexpr(64)  # BLOCK_D: three wider ones fill a tile's registers


@triton.jit
def chunk_of_program(H, num_tiles, num_chunks, tiles_per_chunk):
    """Which sequence (of all, batch and head) and chunk a program owns, and its tiles' range."""
    pid_bh = tl.program_id(0) // num_chunks
    pid_c = tl.program_id(0) % num_chunks
    b = (pid_bh // H).to(tl.int64)
    h = (pid_bh % H).to(tl.int64)
    first = pid_c * tiles_per_chunk
    last = tl.minimum(first + tiles_per_chunk, num_tiles)
    return pid_bh, pid_c, b, h, first, last


@triton.jit
def reciprocal(x, IS_NVIDIA: tl.constexpr = True):
    if IS_NVIDIA:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def sigmoid_of_double(x, IS_BFLOAT16: tl.constexpr, IS_NVIDIA: tl.constexpr = True):
    """sigmoid(2 x), in bfloat16 by `fast_tanh`."""
    if IS_NVIDIA and IS_BFLOAT16:
        return fast_tanh(x) * 0.5 + 0.5
    return reciprocal(1.0 + tl.exp2(x * _MINUS_2_LOG2_E), IS_NVIDIA)


@triton.jit
def twice_gated(y, x, IS_BFLOAT16: tl.constexpr, IS_NVIDIA: tl.constexpr = True):
    """2 sigmoid(2 x) y."""
    if IS_NVIDIA and IS_BFLOAT16:
        return fast_tanh(x) * y + y
    return 2.0 * reciprocal(1.0 + tl.exp2(x * _MINUS_2_LOG2_E), IS_NVIDIA) * y


@triton.jit
def fast_tanh(x):
    """tanh(x) to 2.5e-4, which is nothing next to bfloat16, by NVIDIA's instruction."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Round x to a dtype; near a pole float16 takes its largest number for infinity."""
    if dtype == tl.float16:
        x = tl.minimum(tl.maximum(x, -_LARGEST_HALF), _LARGEST_HALF)
    return x.to(dtype)


@triton.jit
def product(x, weight, PRECISION: tl.constexpr):
    return tl.dot(x, weight, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def matrix(matrices_ptr, WHICH: tl.constexpr, STAYS: tl.constexpr, BLOCK_D: tl.constexpr):
    """A weight [BLOCK_D, BLOCK_D]; where it cannot stay in shared memory, a pointer to it."""
    ptr = matrices_ptr + WHICH * BLOCK_D * BLOCK_D
    if STAYS:
        ptr = load_matrix(ptr, BLOCK_D)
    return ptr


@triton.jit
def bias_rows(biases_ptr, WHICH: tl.constexpr, STAYS: tl.constexpr, BLOCK_D: tl.constexpr):
    """A bias [16, BLOCK_D] as rows to add up; where they cannot stay, a pointer to them."""
    ptr = biases_ptr + WHICH * BIAS_ROWS * BLOCK_D
    if STAYS and biases_ptr.dtype.element_ty != tl.float32:
        ptr = _load_bias_rows(ptr, BLOCK_D)
    return ptr


@triton.jit
def _load_bias_rows(b, BLOCK_D: tl.constexpr):
    if b.dtype.is_ptr():
        b = tl.load(b + tile_offsets(tl.arange(0, BIAS_ROWS), BLOCK_D, tl.arange(0, BLOCK_D), 1))
    return b


@triton.jit
def load_matrix(w, BLOCK_D: tl.constexpr):
    """What `matrix` returned as a tile."""
    if w.dtype.is_ptr():
        offs_d = tl.arange(0, BLOCK_D)
        w = tl.load(w + tile_offsets(offs_d, BLOCK_D, offs_d, 1))
    return w


@triton.jit
def load_vector(vectors_ptr, WHICH: tl.constexpr, BLOCK_D: tl.constexpr):
    """[1, BLOCK_D], loaded where it is used: it would fill a quarter of the registers."""
    return tl.load(vectors_ptr + WHICH * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]


@triton.jit
def linear(x, weight, bias, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr):
    """Compute x W^T + b in float32, of what `matrix` and `bias_rows` returned."""
    weight = tl.trans(load_matrix(weight, BLOCK_D))
    if x.dtype == tl.float32:  # one row holds the bias, and products are dear
        y = product(x, weight, PRECISION) + tl.load(bias + tl.arange(0, BLOCK_D))[None, :]
    else:
        ones = tl.full([x.shape[0], BIAS_ROWS], 1.0, x.dtype)
        y = product(ones, _load_bias_rows(bias, BLOCK_D), PRECISION)
        y = tl.dot(x, weight, y, input_precision=PRECISION)
    return y


@triton.jit
def triangle(BLOCK_M: tl.constexpr, dtype: tl.constexpr, REVERSE: tl.constexpr):
    """The matrix [BLOCK_M, BLOCK_M] that sums up a tile's rows to each one, or from each one."""
    offs_m = tl.arange(0, BLOCK_M)
    if REVERSE:
        keep = offs_m[:, None] <= offs_m[None, :]
    else:
        keep = offs_m[:, None] >= offs_m[None, :]
    return tl.where(keep, 1.0, 0.0).to(dtype)


@triton.jit
def scan(ones, x, PRECISION: tl.constexpr):
    """Sums of the rows of x in float32 on tensor cores, where `ones` is a `triangle`.

    Of x in float32 two products, of the upper and the lower half of its bits, see them all; where
    products are those of bfloat16, three.
    """
    if x.dtype != tl.float32:
        sums = product(ones, x, PRECISION)
    elif ones.dtype != tl.float32:
        high = upper_half(x, ones.dtype)
        sums = product(ones, (x - high).to(ones.dtype), PRECISION)
        sums += product(ones, high.to(ones.dtype), PRECISION)
    elif PRECISION == "bf16x6":
        ones = ones.to(tl.bfloat16)
        high = upper_half(x, tl.bfloat16)
        middle = upper_half(x - high, tl.bfloat16)
        sums = product(ones, (x - high - middle).to(tl.bfloat16), PRECISION)
        sums = tl.dot(ones, middle.to(tl.bfloat16), sums, input_precision=PRECISION)
        sums = tl.dot(ones, high.to(tl.bfloat16), sums, input_precision=PRECISION)
    elif PRECISION == "tf32x3":
        high = _without_bits(x, -8192)
        sums = product(ones, x - high, "tf32") + product(ones, high, "tf32")
    else:
        sums = product(ones, x, PRECISION)
    return sums


@triton.jit
def upper_half(x, dtype: tl.constexpr):
    """The part of x that a narrower dtype holds, in float32."""
    if dtype == tl.bfloat16:  # cut off, which is cheaper than rounding
        return _without_bits(x, -65536)
    return rounded(x, dtype).to(tl.float32)


@triton.jit
def _without_bits(x, KEEP: tl.constexpr):
    return (x.to(tl.int32, bitcast=True) & KEEP).to(tl.float32, bitcast=True)


# fmt: off
@triton.jit
def load_tokens(
    ptr, stride_l, stride_d, mask_ptr, stride_ml, start, L,
    HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    AGAIN: tl.constexpr = False,
):
    # fmt: on
    """[BLOCK_M, BLOCK_D] from token `start` on; tokens past L or masked read as zero.

    AGAIN forbids the compiler to keep them from a load before.
    """
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    first = tl.cast(start, tl.int64)
    keep = offs_m < L - start
    if HAS_MASK:
        keep = keep & is_kept(mask_ptr, stride_ml, start, L, BLOCK_M)
    ptrs = ptr + first * stride_l + tile_offsets(offs_m, stride_l, offs_d, stride_d)
    if AGAIN:
        mask = keep[:, None] & (offs_d < HEAD_DIM)[None, :]
        return tl.load(ptrs, mask=mask, other=0.0, volatile=True)
    return load_tile(ptrs, keep, offs_d < HEAD_DIM, True, HEAD_DIM != BLOCK_D)


@triton.jit
def is_kept(mask_ptr, stride_ml, start, L, BLOCK_M: tl.constexpr):
    """[BLOCK_M]: what the mask says of the tokens from `start` on."""
    offs_m = tl.arange(0, BLOCK_M)
    ptrs = mask_ptr + tl.cast(start, tl.int64) * stride_ml + offs_m * stride_ml
    return tl.load(ptrs, mask=offs_m < L - start, other=0) != 0


# fmt: off
@triton.jit
def values_ptrs(
    ptr, pid_bh, start, L,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Pointers [BLOCK_M, BLOCK_D] into [B, H, L, D], contiguous, and which are inside."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    ptr += (pid_bh.to(tl.int64) * L + start) * HEAD_DIM
    mask = (offs_m < L - start)[:, None] & (offs_d < HEAD_DIM)[None, :]
    return ptr + tile_offsets(offs_m, HEAD_DIM, offs_d, 1), mask


@triton.jit
def scratch_ptrs(ptr, pid_bh, start, L, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers [BLOCK_M, BLOCK_D] into [B * H, L, BLOCK_D], contiguous."""
    first = pid_bh.to(tl.int64) * L + start
    offsets = tile_offsets(tl.arange(0, BLOCK_M), BLOCK_D, tl.arange(0, BLOCK_D), 1)
    return ptr + first * BLOCK_D + offsets


@triton.jit
def table_row(ptr, which, num_heads, pid_bh, num_rows, row, BLOCK_D: tl.constexpr):
    """Pointer to one row of a table of sums."""
    head = which * tl.cast(num_heads, tl.int64) + pid_bh
    return ptr + (head * num_rows + row) * BLOCK_D


@triton.jit
def sum_rows(ptr, lo, hi, stride, columns, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr = 32):
    """Sum of the rows lo <= row < hi of a table, always in the same order."""
    offs_row = tl.arange(0, BLOCK_ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], ptr.dtype.element_ty)
    for start in range(lo, hi, BLOCK_ROWS):
        mask = (start + offs_row < hi)[:, None] & (offs_d < columns)[None, :]
        ptrs = ptr + tl.cast(start, tl.int64) * stride
        ptrs += tile_offsets(offs_row, stride, offs_d, 1)
        acc += tl.sum(tl.load(ptrs, mask=mask, other=0.0), 0)
    return acc


# fmt: off
@triton.jit
def load_state(
    sums_ptr, stride_sk, stride_sb, stride_sh, stride_sd, b, h,
    WHICH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """[BLOCK_D]: context or stat of a head in sums [2, B, H, D]."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = sums_ptr + WHICH * stride_sk + b * stride_sb + h * stride_sh + offs_d * stride_sd
    return tl.load(ptrs, mask=offs_d < HEAD_DIM, other=0.0)


# fmt: off
@triton.jit
def store_state(
    sums_ptr, num_heads, pid_bh, sums,
    WHICH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Store context or stat of a head in sums [2, B, H, D], contiguous."""
    offs_d = tl.arange(0, BLOCK_D)
    row = WHICH * tl.cast(num_heads, tl.int64) + pid_bh
    tl.store(sums_ptr + row * HEAD_DIM + offs_d, sums, mask=offs_d < HEAD_DIM)


@triton.jit
def inverse_counts(length_ptr, start, HAS_STATE: tl.constexpr, BLOCK_M: tl.constexpr):
    """1 / t [BLOCK_M, 1] for the tokens t, counted from 1, from `start` on."""
    first = start + 1
    if HAS_STATE:
        first += tl.load(length_ptr)
    return 1.0 / (first + tl.arange(0, BLOCK_M)).to(tl.float32)[:, None]


# fmt: off
@triton.jit
def running_stat(
    v, ones, context, stat, inverse_count, w_g, b_g,
    PRECISION: tl.constexpr, IS_NVIDIA: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Context and stat [BLOCK_M, BLOCK_D] of a tile of tokens, from those [BLOCK_D] before it."""
    context = scan(ones, v, PRECISION) + context[None, :]
    mean = context * inverse_count
    gated = gated_values(v, mean, w_g, b_g, PRECISION, IS_NVIDIA, BLOCK_D)
    return context, scan(ones, gated, PRECISION) + stat[None, :]


# fmt: off
@triton.jit
def gated_values(
    v, mean, w_g, b_g,
    PRECISION: tl.constexpr, IS_NVIDIA: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """sigmoid(W_g mean + b_g) v, in float32."""
    logit = linear(mean.to(v.dtype), w_g, b_g, PRECISION, BLOCK_D)
    return sigmoid_of_double(logit, v.dtype == tl.bfloat16, IS_NVIDIA) * v.to(tl.float32)


# fmt: off
@triton.jit
def stat_before(
    chunk_sums_ptr, sums_ptr, stride_sk, stride_sb, stride_sh, stride_sd,
    b, h, pid_bh, pid_c, num_heads, num_chunks,
    HEAD_DIM: tl.constexpr, HAS_STATE: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Stat [BLOCK_D] before a chunk."""
    chunk_sums = table_row(chunk_sums_ptr, STAT, num_heads, pid_bh, num_chunks, 0, BLOCK_D)
    stat = sum_rows(chunk_sums, 0, pid_c, BLOCK_D, BLOCK_D, BLOCK_D)
    if HAS_STATE:
        stat += load_state(
            sums_ptr, stride_sk, stride_sb, stride_sh, stride_sd, b, h, STAT, HEAD_DIM, BLOCK_D
        )
    return stat


# fmt: off
@triton.jit
def total_context(
    chunk_sums_ptr, sums_ptr, stride_sk, stride_sb, stride_sh, stride_sd, length_ptr,
    b, h, pid_bh, L, num_heads, num_chunks,
    HEAD_DIM: tl.constexpr, HAS_STATE: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """The sum [BLOCK_D] of v, the context, which counts the tokens before v too, and 1 / tokens."""
    chunk_sums = table_row(chunk_sums_ptr, CONTEXT, num_heads, pid_bh, num_chunks, 0, BLOCK_D)
    own = sum_rows(chunk_sums, 0, num_chunks, BLOCK_D, BLOCK_D, BLOCK_D)
    context = own
    count = L.to(tl.float32)
    if HAS_STATE:
        context += load_state(
            sums_ptr, stride_sk, stride_sb, stride_sh, stride_sd, b, h, CONTEXT, HEAD_DIM, BLOCK_D
        )
        count = (L + tl.load(length_ptr)).to(tl.float32)
    return own, context, 1.0 / count


@triton.jit
def gate_of_mean(mean, w_g, vectors_ptr, IS_NVIDIA: tl.constexpr, BLOCK_D: tl.constexpr):
    """sigmoid(W_g mean + b_g) [BLOCK_D] of one mean, where w_g is a tile in float32."""
    bias = tl.load(vectors_ptr + W_G * BLOCK_D + tl.arange(0, BLOCK_D))
    return sigmoid_of_double(tl.sum(w_g * mean[None, :], 1) + bias, False, IS_NVIDIA)


# fmt: off
@triton.jit
def total_sums(
    chunk_sums_ptr, sums_ptr, stride_sk, stride_sb, stride_sh, stride_sd, length_ptr,
    matrices_ptr, vectors_ptr, b, h, pid_bh, L, num_heads, num_chunks,
    HEAD_DIM: tl.constexpr, HAS_STATE: tl.constexpr, IS_NVIDIA: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Context and stat [BLOCK_D] of all tokens, which share them without `causal`."""
    own, context, inverse_count = total_context(
        chunk_sums_ptr, sums_ptr, stride_sk, stride_sb, stride_sh, stride_sd, length_ptr,
        b, h, pid_bh, L, num_heads, num_chunks, HEAD_DIM, HAS_STATE, BLOCK_D,
    )  # fmt: skip
    w_g = matrix(matrices_ptr, W_G, True, BLOCK_D).to(tl.float32)
    stat = gate_of_mean(context * inverse_count, w_g, vectors_ptr, IS_NVIDIA, BLOCK_D) * own
    if HAS_STATE:
        stat += load_state(
            sums_ptr, stride_sk, stride_sb, stride_sh, stride_sd, b, h, STAT, HEAD_DIM, BLOCK_D
        )
    return context, stat


@triton.jit
def no_column_sums(BLOCK_D: tl.constexpr):
    """Sums of no rows, up to 16 different ones, as `add_column_sums` continues them."""
    return tl.zeros([BLOCK_D, SUM_COLUMNS], tl.float32)


@triton.jit
def add_column_sums(acc, x, which, PRECISION: tl.constexpr):
    """Add the sum of the rows of x [BLOCK_M, BLOCK_D] to one column of acc.

    On tensor cores, which are idle; in float32 they would have to work three times for it.
    """
    columns = tl.arange(0, SUM_COLUMNS)[None, :]
    if x.dtype == tl.float32:
        acc += tl.where(columns == which, tl.sum(x, 0)[:, None], 0.0)
    else:
        columns = columns + tl.zeros([x.shape[0], 1], tl.int32)
        ones = tl.where(columns == which, 1.0, 0.0).to(x.dtype)
        acc = tl.dot(tl.trans(x), ones, acc, input_precision=PRECISION)
    return acc


@triton.jit
def column_sums(acc, WHICH: tl.constexpr):
    """[BLOCK_D]: what `add_column_sums` has added up."""
    columns = tl.arange(0, SUM_COLUMNS)[None, :]
    return tl.sum(tl.where(columns == WHICH, acc, 0.0), 1)


@triton.jit
def store_partial(partial_matrices_ptr, dw, WHICH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store a program's share of a weight's gradient in [programs, 4, BLOCK_D, BLOCK_D]."""
    offs_d = tl.arange(0, BLOCK_D)
    row = tl.program_id(0).to(tl.int64) * 4 + WHICH
    ptrs = partial_matrices_ptr + row * BLOCK_D * BLOCK_D + tile_offsets(offs_d, BLOCK_D, offs_d, 1)
    tl.store(ptrs, dw)


@triton.jit
def inverse_denominator(stat, local, IS_NVIDIA: tl.constexpr):
    return reciprocal(tl.abs(stat) + tl.abs(local) + EPSILON, IS_NVIDIA)


@triton.jit
def norm_statistics(x, v, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mean of each row of x and 1 / its deviation [BLOCK_M, 1]; 0 where the row of v is 0."""
    mean = tl.sum(x, 1)[:, None] * (1.0 / HEAD_DIM)
    x -= mean
    if HEAD_DIM != BLOCK_D:
        x = tl.where((tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], x, 0.0)
    alive = tl.max(tl.abs(v.to(tl.float32)), 1) > 0
    scale = tl.rsqrt(tl.sum(x * x, 1) * (1.0 / HEAD_DIM) + NORM_EPSILON)
    return mean, tl.where(alive, scale, 0.0)[:, None]
