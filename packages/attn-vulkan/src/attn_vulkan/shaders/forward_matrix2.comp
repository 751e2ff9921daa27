// Attention, forward, on matrix units through VK_NV_cooperative_matrix2.
//
// The loop of forward_matrix.comp. Softmax is the driver's, though: it reduces rows, hands elements to
// functions and turns scores into an operand, so that nothing is assumed of where elements are.
// Matrices are a subgroup's, and tiles pass through shared memory by hand: of matrices of a workgroup
// and loads through tensor layouts NVIDIA's driver makes a barrier each, and less than half the rate.
#version 460
#include "attention.glsl"
#include "matrix.glsl"
#extension GL_NV_cooperative_matrix2 : require

layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint WG = 128;
layout(constant_id = 1) const uint D = 64;       // head_dim and head_dim_v, padded to multiples of 16
layout(constant_id = 2) const uint DV = 64;
layout(constant_id = 3) const uint BC = 64;
layout(constant_id = 4) const bool ALIGNED = false;
layout(constant_id = 5) const bool HAS_CAP = false;
layout(constant_id = 6) const bool HAS_BIAS = false;
layout(constant_id = 7) const bool HAS_SLOPES = false;
layout(constant_id = 8) const bool PAGED = false;
layout(constant_id = 9) const bool SCALE_FIRST = false;  // where the scale is not positive
layout(constant_id = 10) const uint BLOCKS = 1;

const uint MY_ROWS = BLOCKS * 16;
const uint BR = WG / 32 * MY_ROWS;
const uint KD = D / 16, VD = DV / 16, NC = BC / 16;  // matrices of a row of Q, of V and of scores
const bool PLAIN = !(HAS_CAP || HAS_BIAS || HAS_SLOPES || SCALE_FIRST);
const uint K_STRIDE = D / 8 + 1;
const uint V_STRIDE = DV / 8 + 1;
const uint K_SIZE = BC * K_STRIDE;
const uint Q_SIZE = BR * K_STRIDE;
const uint KV_SIZE = K_SIZE + BC * V_STRIDE;
const uint K_FETCH = (BC * (D / 8) + WG - 1) / WG;
const uint V_FETCH = (BC * (DV / 8) + WG - 1) / WG;

shared uvec4 s_tiles[Q_SIZE > KV_SIZE ? Q_SIZE : KV_SIZE];  // Q at first, then K and V

#define FETCH_K(start) FETCH_KEYS(k_next, D, k_row, k_rows, k_lane, k_step, start, key_address(p.k, s, head_kv, row, PAGED))
#define FETCH_V(start) FETCH_KEYS(v_next, DV, v_row, v_rows, v_lane, v_step, start, key_address(p.v, s, head_kv, row, PAGED))

// Functions of the elements of matrices: r and c are the row and the column of one.
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

float put(const in uint r, const in uint c, const in float x, const in float norm, const in Sequence s, const in uint head, const in uint row0, const in uint d) {
    if (row0 + r < s.len_q && d + c < p.head_dim_v)
        write_element(query_address(p.out_, s, head, row0 + r) + (d + c) * p.out_.element * T_BYTES, x * norm);
    return x;
}

void main() {
    Sequence s = sequence(gl_WorkGroupID.z);
    uvec2 at = head_and_reversed_tile(p.heads);
    uint head = at.x, head_kv = head / p.group, row0 = at.y * BR;
    if (row0 >= s.len_q)
        return;
    uint first_row = gl_SubgroupID * MY_ROWS, my_row0 = row0 + first_row;

    uvec2 keys = visible_keys(s, row0, min(row0 + BR, s.len_q) - 1);
    if (keys.x >= keys.y)
        keys = uvec2(0);
    uint last_key = max(keys.y, 1) - 1, k_row = thread() / (D / 8), v_row = thread() / (DV / 8);
    uint my_last = min(my_row0 + MY_ROWS, s.len_q) - 1;
    Rows k_rows = rows_of(p.k, key_address(p.k, s, head_kv, 0, false), p.head_dim, keys.y);
    Rows v_rows = rows_of(p.v, key_address(p.v, s, head_kv, 0, false), p.head_dim_v, keys.y);
    uint64_t k_lane = key_lane_of(k_rows, D), v_lane = key_lane_of(v_rows, DV);
    uint k_step = uint(k_rows.step), v_step = uint(v_rows.step);  // of ALIGNED rows
    ivec2 seen = shared_keys(s, my_row0, my_last);
    uint j_first = keys.x / BC * BC;
    uvec4 k_next[K_FETCH], v_next[V_FETCH];
    FETCH_K(j_first)

    MATRIX_A q[BLOCKS * KD];
    for (uint e = thread(); e < BR * (D / 8); e += WG) {
        uint i = row0 + e / (D / 8);
        uvec4 x = uvec4(0);
        if (i < s.len_q)
            x = load8(query_address(p.q, s, head, i), p.q.element, e % (D / 8) * 8, p.head_dim, ALIGNED);
        s_tiles[e / (D / 8) * K_STRIDE + e % (D / 8)] = x;
    }
    barrier();
    [[unroll]] for (uint b = 0; b < BLOCKS; ++b)
        [[unroll]] for (uint d = 0; d < KD; ++d)
            coopMatLoad(q[b * KD + d], s_tiles, (first_row + b * 16) * K_STRIDE + d * 2, K_STRIDE, gl_CooperativeMatrixLayoutRowMajor);
    barrier();

    ACCUMULATOR acc[BLOCKS * VD], m[BLOCKS], l[BLOCKS];
    [[unroll]] for (uint d = 0; d < BLOCKS * VD; ++d)
        acc[d] = ACCUMULATOR(0.0);
    [[unroll]] for (uint b = 0; b < BLOCKS; ++b) {
        m[b] = ACCUMULATOR(LOWEST);
        l[b] = ACCUMULATOR(0.0);
    }
    float slope = slope_of(s, head, HAS_SLOPES), to_base_2 = PLAIN ? p.scale : 1.0;

    STORE_TILE(k_next, BC, D, 0)
    barrier();
    for (uint j0 = j_first; j0 < keys.y; j0 += BC) {
        FETCH_V(j0)
        ACCUMULATOR scores[BLOCKS * NC];
        [[unroll]] for (uint c = 0; c < NC; ++c) {
            [[unroll]] for (uint b = 0; b < BLOCKS; ++b)
                scores[b * NC + c] = ACCUMULATOR(0.0);
            [[unroll]] for (uint d = 0; d < KD; ++d) {
                MATRIX_B k;
                coopMatLoad(k, s_tiles, c * 16 * K_STRIDE + d * 2, K_STRIDE, gl_CooperativeMatrixLayoutColumnMajor);
                [[unroll]] for (uint b = 0; b < BLOCKS; ++b)
                    scores[b * NC + c] = coopMatMulAdd(q[b * KD + d], k, scores[b * NC + c]);
            }
        }
        STORE_TILE(v_next, BC, DV, K_SIZE)
        barrier();
        FETCH_K(j0 + BC)
        if (!PLAIN || int(j0) < seen.x || int(j0 + BC) > seen.y)
            [[unroll]] for (uint c = 0; c < BLOCKS * NC; ++c)
                coopMatPerElementNV(scores[c], scores[c], transform, s, head, my_row0 + c / NC * 16, j0 + c % NC * 16, slope);
        [[unroll]] for (uint b = 0; b < BLOCKS; ++b) {
            ACCUMULATOR top = m[b], factors;
            [[unroll]] for (uint c = 0; c < NC; ++c)
                coopMatPerElementNV(top, top, keep_larger, scores[b * NC + c]);
            coopMatReduceNV(top, top, gl_CooperativeMatrixReduceRowNV, larger);
            coopMatPerElementNV(factors, m[b], rescale, top, to_base_2);
            m[b] = top;
            l[b] *= factors;
            [[unroll]] for (uint c = 0; c < NC; ++c) {
                coopMatPerElementNV(scores[b * NC + c], scores[b * NC + c], weight, top, to_base_2);
                l[b] += scores[b * NC + c];
            }
            [[unroll]] for (uint d = 0; d < VD; ++d)
                acc[b * VD + d] *= factors;
        }
        [[unroll]] for (uint c = 0; c < NC; ++c) {
            MATRIX_A weights[BLOCKS];
            [[unroll]] for (uint b = 0; b < BLOCKS; ++b)
                weights[b] = MATRIX_A(scores[b * NC + c]);
            [[unroll]] for (uint d = 0; d < VD; ++d) {
                MATRIX_B v;
                coopMatLoad(v, s_tiles, K_SIZE + c * 16 * V_STRIDE + d * 2, V_STRIDE, gl_CooperativeMatrixLayoutRowMajor);
                [[unroll]] for (uint b = 0; b < BLOCKS; ++b)
                    acc[b * VD + d] = coopMatMulAdd(weights[b], v, acc[b * VD + d]);
            }
        }
        STORE_TILE(k_next, BC, D, 0)
        barrier();
    }

    [[unroll]] for (uint b = 0; b < BLOCKS; ++b) {
        ACCUMULATOR norm;
        coopMatReduceNV(norm, l[b], gl_CooperativeMatrixReduceRowNV, sum);
        coopMatPerElementNV(norm, norm, finish, m[b], s, head, my_row0 + b * 16, to_base_2);
        [[unroll]] for (uint d = 0; d < VD; ++d)
            coopMatPerElementNV(acc[b * VD + d], acc[b * VD + d], put, norm, s, head, my_row0 + b * 16, d * 16);
    }
}
