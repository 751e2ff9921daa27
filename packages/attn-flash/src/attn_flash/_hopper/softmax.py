"""Device functions on the rows of a warpgroup's tile that both forward kernels share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ROWS = gl.constexpr(64)  # queries of one warpgroup
_LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def thread_sums(p):
    """Sum of each thread's columns, [ROWS, 8]: threads add theirs up once a tile."""
    return gl.sum(gl.reshape(p, [p.shape[0], p.shape[1] // 8, 8]), axis=1)


@gluon.jit
def store_lse(lse_ptr, m_i, l_i, row, M, scale_log2):
    """Write lse of those of ROWS queries from `row` that are among the M of a head.

    A kernel may store tiles at two places. Left to itself the compiler fuses the multiplication and
    the addition at one of them only, and which bits a tile gets is then up to the order of tiles.
    """
    offs_m = row + gl.arange(0, ROWS, layout=m_i.type.layout)
    lse_log2 = gl.fma(m_i, scale_log2, gl.log2(l_i))
    gl.store(
        lse_ptr + offs_m,
        gl.where(l_i > 0.0, lse_log2 * _LN_2, float("-inf")),
        mask=(offs_m >= 0) & (offs_m < M),
    )
