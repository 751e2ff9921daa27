"""Numbers of 8 bits on tensor cores: taken to 16 bits without their scales, which scores carry."""

import triton
import triton.language as tl

LEAST_EXPONENT = tl.constexpr(-100)  # of a value's scale: sums of 2**100 are still finite


def _int8_ptx(low: str, high: str) -> str:
    """Take four int8 of a register, by the selectors of prmt, to two registers of float16.

    1024 + n, with n from 0 to 255, has n for its last bits.
    """
    return f"""{{
        .reg .b32 bytes, low, high, bias;
        mov.b32 bias, 0x64806480;
        xor.b32 bytes, $2, 0x80808080;
        prmt.b32 low, bytes, 0x64646464, {low};
        prmt.b32 high, bytes, 0x64646464, {high};
        sub.rn.f16x2 $0, low, bias;
        sub.rn.f16x2 $1, high, bias;
    }}"""


_INT8 = tl.constexpr(_int8_ptx("0x4140", "0x4342"))
# Of two pairs in one register, the even numbers and the odd ones, each as two float16.
_INT8_PAIRS = tl.constexpr(_int8_ptx("0x4240", "0x4341"))
_FLOAT8_PAIRS = tl.constexpr("""{
    .reg .b32 even, odd;
    .reg .b16 evens, odds, none;
    prmt.b32 even, $2, 0, 0x4420;
    prmt.b32 odd, $2, 0, 0x4431;
    mov.b32 {evens, none}, even;
    mov.b32 {odds, none}, odd;
    cvt.rn.f16x2.e4m3x2 $0, evens;
    cvt.rn.f16x2.e4m3x2 $1, odds;
}""")


@triton.jit
def dequantised(x, dtype: tl.constexpr, HAS_PTX: tl.constexpr):
    """Quantised numbers without their scale, exact in `dtype`.

    float8 becomes float16 two at a time; so does int8 by PTX, and else by way of float32.
    """
    if x.dtype == dtype:
        return x
    if dtype == tl.float16:
        if x.dtype.is_fp8():
            return x.to(tl.float16)
        if HAS_PTX:
            return tl.inline_asm_elementwise(
                _INT8, "=r,=r,r", [x], tl.float16, is_pure=True, pack=4
            )
    return x.to(tl.float32).to(dtype)


@triton.jit
def dequantised_pairs(pairs, code: tl.constexpr, dtype: tl.constexpr, HAS_PTX: tl.constexpr):
    """Even and odd columns of a tile whose elements are two numbers of type `code`.

    Triton takes float8 apart byte by byte, for twice as many instructions.
    """
    if HAS_PTX and dtype == tl.float16:
        PTX: tl.constexpr = _FLOAT8_PAIRS if code.is_fp8() else _INT8_PAIRS
        return tl.inline_asm_elementwise(
            PTX, "=r,=r,r", [pairs], (tl.float16, tl.float16), is_pure=True, pack=2
        )
    even = pairs.to(tl.int8).to(code, bitcast=True)
    odd = (pairs >> 8).to(tl.int8).to(code, bitcast=True)
    return dequantised(even, dtype, HAS_PTX), dequantised(odd, dtype, HAS_PTX)


@triton.jit
def power_of_two(x):
    """Largest power of two up to each x > 0, and 1 for what float32 has no full precision for."""
    exponent = x.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.where(exponent == 0, 1.0, exponent.to(tl.float32, bitcast=True))


@triton.jit
def queries_in_float16(q, q_tail, TAIL_D: tl.constexpr):
    """Return two tiles of queries divided by powers of two, one for each row, and these."""
    peak = tl.max(tl.abs(q.to(tl.float32)), 1)
    if TAIL_D > 0:
        peak = tl.maximum(peak, tl.max(tl.abs(q_tail.to(tl.float32)), 1))
    scale = power_of_two(peak)
    q = (q.to(tl.float32) / scale[:, None]).to(tl.float16)
    q_tail = (q_tail.to(tl.float32) / scale[:, None]).to(tl.float16)
    return q, q_tail, scale


@triton.jit
def scaled_softmax(m_i, scores, scale_log2, v_scales, visible, MASKED: tl.constexpr):
    """Online softmax where p * v_scale is at most 2: float16 holds it whatever the scales.

    So m_i is the exponent of the largest of these products instead of the largest score. Return
    m_i, the factor for sums, and p.
    """
    scores = scores * scale_log2
    if MASKED:
        scores = tl.where(visible, scores, -float("inf"))
    exponents = (v_scales.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> 23
    sizes = tl.maximum(exponents - 127, LEAST_EXPONENT).to(tl.float32)
    m_new = tl.maximum(m_i, tl.max(scores + sizes[None, :], 1))
    pivot = tl.where(m_new == -float("inf"), 0.0, m_new) if MASKED else m_new
    p = tl.math.exp2(scores - pivot[:, None])
    alpha = tl.math.exp2(m_i - pivot)
    return m_new, alpha, p
