"""Device functions on the rows of a warpgroup's tile that both forward kernels share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attn_core.tiles.hopper import exp2

ROWS = gl.constexpr(64)  # queries of one warpgroup
_LN_2 = gl.constexpr(0.6931471805599453)
_LOWEST = gl.constexpr(-3.4028234663852886e38)  # of float32


# Operands: pivots, whose place the new ones take; factors; and the largest scores. Each is the four
# numbers of a thread, two of a row and two of another.
_RAISE_PTX = gl.constexpr("""{
    .reg .pred raises;
    .reg .f32 m0, m1, limit0, limit1, other;
    max.f32 m0, $12, $13;
    max.f32 m1, $14, $15;
    add.f32 limit0, $0, 0f41000000;
    add.f32 limit1, $2, 0f41000000;
    mov.f32 $4, 0f3F800000;
    mov.f32 $5, 0f3F800000;
    mov.f32 $6, 0f3F800000;
    mov.f32 $7, 0f3F800000;
    setp.gt.f32 raises, m0, limit0;
    setp.gt.or.f32 raises, m1, limit1, raises;
    vote.sync.any.pred raises, raises, 0xffffffff;
    @!raises bra done;
    shfl.sync.bfly.b32 other, m0, 1, 0x1f, 0xffffffff;
    max.f32 m0, m0, other;
    shfl.sync.bfly.b32 other, m0, 2, 0x1f, 0xffffffff;
    max.f32 m0, m0, other;
    shfl.sync.bfly.b32 other, m1, 1, 0x1f, 0xffffffff;
    max.f32 m1, m1, other;
    shfl.sync.bfly.b32 other, m1, 2, 0x1f, 0xffffffff;
    max.f32 m1, m1, other;
    setp.gt.f32 raises, m0, limit0;
    sub.f32 other, $0, m0;
    ex2.approx.ftz.f32 other, other;
    @raises mov.f32 $4, other;
    @raises mov.f32 $5, other;
    @raises mov.f32 $0, m0;
    @raises mov.f32 $1, m0;
    setp.gt.f32 raises, m1, limit1;
    sub.f32 other, $2, m1;
    ex2.approx.ftz.f32 other, other;
    @raises mov.f32 $6, other;
    @raises mov.f32 $7, other;
    @raises mov.f32 $2, m1;
    @raises mov.f32 $3, m1;
    done:
}""")
_RAISE_OPERANDS = gl.constexpr("=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,0,1,2,3,f,f,f,f")


@gluon.jit
def fold(x):
    """Columns in groups of 8, of each of which a thread has two: it reduces over groups alone."""
    return gl.reshape(x, [x.shape[0], x.shape[1] // 8, 8])


@gluon.jit
def no_pivots(x):
    """What pivots of a folded tile's rows are before any score, [ROWS, 8]."""
    return gl.full([ROWS, 8], float("-inf"), gl.float32, gl.max(x, axis=1).type.layout)


@gluon.jit
def raise_pivots(pivot, top):
    """Raise pivots of rows that scores pass by more than 2**8.

    Return the pivots, and the factors of sums that used the old ones. All are [ROWS, 8]: a row has
    one pivot, but each of its four threads looks at the largest scores it knows. Only where one
    of a warp's threads finds a row to raise do they exchange their maxima.
    """
    return gl.inline_asm_elementwise(
        _RAISE_PTX, _RAISE_OPERANDS, [pivot, top],
        dtype=(gl.float32, gl.float32), is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit
def follow_scores(pivot, top):
    """Raise every pivot to the largest score of its row; arguments and results as above."""
    row = gl.max(gl.maximum(pivot, top), axis=1)
    raised = gl.maximum(pivot, gl.expand_dims(row, 1))
    return raised, exp2(pivot - gl.maximum(raised, _LOWEST))  # 0 where there was no score before


@gluon.constexpr_function
def _rescale_ptx(registers):
    """Multiply registers by factors unless those of the whole warp are 1.

    A thread has two rows: registers 0 and 1 are of one, 2 and 3 of the other, and so on.
    """
    first = 2 * registers  # operand, of the factors
    products = " ".join(f"mul.f32 ${i}, ${i}, ${first + i};" for i in range(registers))
    return f"""{{
        .reg .pred changed;
        setp.ne.f32 changed, ${first}, 0f3F800000;
        setp.ne.or.f32 changed, ${first + 2}, 0f3F800000, changed;
        vote.sync.any.pred changed, changed, 0xffffffff;
        @!changed bra done;
        {products}
        done:
    }}"""


@gluon.constexpr_function
def _rescale_operands(registers):
    """Results, what they are the products of in the same registers, and the factors."""
    in_place = [str(i) for i in range(registers)]
    return ",".join(["=f"] * registers + in_place + ["f"] * registers)


@gluon.jit
def rescale_rows(x, factor, SPARES: gl.constexpr):
    """Multiply rows by factors [ROWS, 8].

    With SPARES a warp whose factors are all 1 spares itself the work.
    """
    LAYOUT: gl.constexpr = x.type.layout
    REGISTERS: gl.constexpr = x.shape[0] * x.shape[1] // 128  # of each thread of a warpgroup
    folded = fold(x)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, folded.type.layout)
    factor = gl.expand_dims(gl.convert_layout(factor, ROW_LAYOUT, assert_trivial=True), 1)
    if SPARES:
        folded = gl.inline_asm_elementwise(
            _rescale_ptx(REGISTERS), _rescale_operands(REGISTERS), [folded, factor],
            dtype=gl.float32, is_pure=True, pack=REGISTERS,
        )  # fmt: skip
    else:
        folded = folded * factor
    return gl.convert_layout(gl.reshape(folded, x.shape), LAYOUT, assert_trivial=True)


@gluon.jit
def store_lse(lse_ptr, lse_log2, l_i, row, M):
    """Write lse of those of ROWS queries from `row` that are among the M of a head."""
    offs_m = row + gl.arange(0, ROWS, layout=l_i.type.layout)
    gl.store(
        lse_ptr + offs_m,
        gl.where(l_i == 0.0, float("-inf"), lse_log2 * _LN_2),
        mask=(offs_m >= 0) & (offs_m < M),
    )
