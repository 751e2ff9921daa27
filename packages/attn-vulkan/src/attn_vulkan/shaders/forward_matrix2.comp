// Attention, forward, with the matrices of a workgroup: VK_NV_cooperative_matrix2.
//
// The driver spreads a BR x BC block of scores over the workgroup, loads tiles through tensor
// layouts that fill what is out of bounds with 0, and reduces rows. The output is kept in blocks
// as wide as the scores, so that the row factors fit both without a conversion.
#version 460
#include "attention.glsl"
#extension GL_KHR_memory_scope_semantics : require
#extension GL_KHR_cooperative_matrix : require
#extension GL_NV_cooperative_matrix2 : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#if DTYPE == 116
#extension GL_EXT_bfloat16 : require
#define HALF bfloat16_t
#else
#define HALF float16_t
#endif

layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint WG = 128;
layout(constant_id = 1) const uint D = 64;       // head_dim, padded to a multiple of 16
layout(constant_id = 2) const uint DV = 64;      // head_dim_v, padded to a multiple of BC
layout(constant_id = 3) const uint BR = 64;
layout(constant_id = 4) const uint BC = 64;
layout(constant_id = 5) const bool HAS_CAP = false;
layout(constant_id = 6) const bool HAS_BIAS = false;
layout(constant_id = 7) const bool HAS_SLOPES = false;
layout(constant_id = 8) const bool SCALE_FIRST = false;

const bool PLAIN = !(HAS_CAP || HAS_BIAS || HAS_SLOPES || SCALE_FIRST);
const uint BLOCKS = DV / BC;

layout(buffer_reference, scalar, buffer_reference_align = 16) buffer Halves { HALF value[]; };

#define ACCUMULATOR coopmat<float, gl_ScopeWorkgroup, BR, BC, gl_MatrixUseAccumulator>
#define MATRIX_A(columns) coopmat<HALF, gl_ScopeWorkgroup, BR, columns, gl_MatrixUseA>
#define LAYOUT tensorLayoutNV<2, gl_CooperativeMatrixClampModeConstantNV>

// Rows are dense and aligned; the mask of the stride lets the compiler see it and load vectors.
LAYOUT tensor(uint rows, uint columns, int64_t row_stride) {
    LAYOUT t = createTensorLayoutNV(2, gl_CooperativeMatrixClampModeConstantNV);
    t = setTensorLayoutDimensionNV(t, rows, columns);
    return setTensorLayoutStrideNV(t, uint(row_stride) & ~7u, 1);
}

float larger(const in float a, const in float b) { return max(a, b); }
float sum(const in float a, const in float b) { return a + b; }

float keep_larger(const in uint r, const in uint c, const in float a, const in float b) {
    return max(a, b);
}

float weight(const in uint r, const in uint c, const in float score, const in float top, const in float factor) {
    float shift = top > LOWEST ? top * factor : 0.0;
    return exp2(fma(score, factor, -shift));
}

float rescale(const in uint r, const in uint c, const in float old, const in float top, const in float factor) {
    return exp2((old - top) * factor);
}

float transform(const in uint r, const in uint c, const in float score, const in Sequence s, const in uint head, const in uint row0, const in uint j0, const in float slope) {
    float x = PLAIN ? score : score * p.scale;
    if (HAS_CAP)
        x = p.cap * capped(x);
    if (HAS_BIAS || HAS_SLOPES)
        x += added(s, head, row0 + r, j0 + c, slope, HAS_SLOPES, HAS_BIAS) * LOG2_E;
    return is_visible(s, row0 + r, j0 + c) ? x : LOWEST;
}

// The row's sum becomes what its output is to be multiplied by; the first column writes lse.
float finish(const in uint r, const in uint c, const in float total, const in float top, const in Sequence s, const in uint head, const in uint row0, const in float factor) {
    float x = top > LOWEST ? top * factor : LOWEST, l = total, keep = 1.0;
    if (p.sinks != 0) {
        float sink = float_or(p.sinks, head, LOWEST) * LOG2_E;
        float above = max(x, sink);
        keep = exp2(x - above);
        l = l * keep + exp2(sink - above);
        x = above;
    } else if (x <= LOWEST) {
        l = 0.0;
    }
    if (c == 0 && row0 + r < s.len_q)
        write_float(statistic_address(p.lse, s, head, row0 + r), l > 0.0 ? log_sum(x * LN_2, l) : MINUS_INFINITY);
    return l > 0.0 ? keep / l : 0.0;
}

void main() {
    Sequence s = sequence(gl_WorkGroupID.z);
    uvec2 at = head_and_reversed_tile(p.heads);
    uint head = at.x, head_kv = head / p.group, row0 = at.y * BR;
    if (row0 >= s.len_q)
        return;
    Halves q_data = Halves(query_address(p.q, s, head, 0));
    Halves k_data = Halves(key_address(p.k, s, head_kv, 0, false));
    Halves v_data = Halves(key_address(p.v, s, head_kv, 0, false));
    Halves out_data = Halves(query_address(p.out_, s, head, 0));
    LAYOUT q_layout = tensor(s.len_q, p.head_dim, p.q.row);
    LAYOUT k_layout = tensor(s.len_k, p.head_dim, p.k.row);
    LAYOUT v_layout = tensor(s.len_k, p.head_dim_v, p.v.row);
    LAYOUT out_layout = tensor(s.len_q, p.head_dim_v, p.out_.row);
    tensorViewNV<2, false, 1, 0> transposed = createTensorViewNV(2, false, 1, 0);
    float slope = slope_of(s, head, HAS_SLOPES);
    float factor = PLAIN ? p.scale : 1.0;

    MATRIX_A(D) q;
    coopMatLoadTensorNV(q, q_data.value, 0, sliceTensorLayoutNV(q_layout, row0, BR, 0, D));
    ACCUMULATOR acc[BLOCKS];
    [[unroll]] for (uint d = 0; d < BLOCKS; ++d)
        acc[d] = ACCUMULATOR(0.0);
    ACCUMULATOR m = ACCUMULATOR(LOWEST), l = ACCUMULATOR(0.0);

    uint i_last = min(row0 + BR, s.len_q) - 1;
    uvec2 keys = visible_keys(s, row0, i_last);
    for (uint j0 = keys.x / BC * BC; j0 < keys.y; j0 += BC) {
        coopmat<HALF, gl_ScopeWorkgroup, D, BC, gl_MatrixUseB> k;
        coopMatLoadTensorNV(k, k_data.value, 0, sliceTensorLayoutNV(k_layout, j0, BC, 0, D), transposed);
        ACCUMULATOR scores = coopMatMulAdd(q, k, ACCUMULATOR(0.0));
        if (!PLAIN || !all_visible(s, row0, row0 + BR - 1, j0, j0 + BC - 1))
            coopMatPerElementNV(scores, scores, transform, s, head, row0, j0, slope);
        ACCUMULATOR top, factors;
        coopMatReduceNV(top, scores, gl_CooperativeMatrixReduceRowNV, larger);
        coopMatPerElementNV(top, top, keep_larger, m);
        coopMatPerElementNV(factors, m, rescale, top, factor);
        coopMatPerElementNV(scores, scores, weight, top, factor);
        m = top;
        l = l * factors + scores;
        MATRIX_A(BC) weights = MATRIX_A(BC)(scores);
        [[unroll]] for (uint d = 0; d < BLOCKS; ++d) {
            coopmat<HALF, gl_ScopeWorkgroup, BC, BC, gl_MatrixUseB> v;
            coopMatLoadTensorNV(v, v_data.value, 0, sliceTensorLayoutNV(v_layout, j0, BC, d * BC, BC));
            acc[d] *= factors;
            acc[d] = coopMatMulAdd(weights, v, acc[d]);
        }
    }
    ACCUMULATOR total;
    coopMatReduceNV(total, l, gl_CooperativeMatrixReduceRowNV, sum);
    coopMatPerElementNV(total, total, finish, m, s, head, row0, factor);
    [[unroll]] for (uint d = 0; d < BLOCKS; ++d) {
        acc[d] *= total;
        coopmat<HALF, gl_ScopeWorkgroup, BR, BC, gl_MatrixUseAccumulator> narrowed =
            coopmat<HALF, gl_ScopeWorkgroup, BR, BC, gl_MatrixUseAccumulator>(acc[d]);
        coopMatStoreTensorNV(narrowed, out_data.value, 0, sliceTensorLayoutNV(out_layout, row0, BR, d * BC, BC));
    }
}
