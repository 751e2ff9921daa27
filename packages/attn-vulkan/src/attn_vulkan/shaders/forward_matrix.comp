// Attention, forward, on matrix units through VK_KHR_cooperative_matrix.
//
// Each subgroup owns MT x 16 rows of queries in registers, FlashAttention-2's division of labour.
// Keys and values go through shared memory; the next tile is fetched while this one is multiplied.
#version 460
#include "attention.glsl"
#include "matrix.glsl"

layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint WG = 128;
layout(constant_id = 1) const uint D = 64;       // head_dim and head_dim_v, padded to multiples of 16
layout(constant_id = 2) const uint DV = 64;
layout(constant_id = 3) const uint MT = 1;
layout(constant_id = 4) const uint BC = 64;
layout(constant_id = 5) const bool ALIGNED = false;
layout(constant_id = 6) const bool HAS_CAP = false;
layout(constant_id = 7) const bool HAS_BIAS = false;
layout(constant_id = 8) const bool HAS_SLOPES = false;
layout(constant_id = 9) const bool PAGED = false;
layout(constant_id = 10) const bool SPLIT = false;
layout(constant_id = 11) const uint PACK = 1;
layout(constant_id = 12) const bool SCALE_FIRST = false;  // where the scale is not positive

const uint BR = WG / 32 * MT * 16;
const bool PLAIN = !(HAS_CAP || HAS_BIAS || HAS_SLOPES || SCALE_FIRST);
const uint K_STRIDE = D / 8 + 1;
const uint V_STRIDE = DV / 8 + 1;
const uint K_SIZE = BC * K_STRIDE;
const uint Q_SIZE = BR * K_STRIDE;
const uint KV_SIZE = K_SIZE + BC * V_STRIDE;
const uint K_FETCH = (BC * (D / 8) + WG - 1) / WG;
const uint V_FETCH = (BC * (DV / 8) + WG - 1) / WG;

shared uvec4 s_kv[Q_SIZE > KV_SIZE ? Q_SIZE : KV_SIZE];

uint thread() {
    return gl_SubgroupID * gl_SubgroupSize + gl_SubgroupInvocationID;
}

void fetch_k(out uvec4 x[K_FETCH], Sequence s, uint head, uint j0) {
    [[unroll]] for (uint n = 0; n < K_FETCH; ++n) {
        uint e = thread() + n * WG, j = j0 + e / (D / 8);
        x[n] = uvec4(0);
        if (j < s.len_k && e < BC * (D / 8))
            x[n] = load8(key_address(p.k, s, head, j, PAGED), p.k.element, e % (D / 8) * 8, p.head_dim, ALIGNED);
    }
}

void fetch_v(out uvec4 x[V_FETCH], Sequence s, uint head, uint j0) {
    [[unroll]] for (uint n = 0; n < V_FETCH; ++n) {
        uint e = thread() + n * WG, j = j0 + e / (DV / 8);
        x[n] = uvec4(0);
        if (j < s.len_k && e < BC * (DV / 8))
            x[n] = load8(key_address(p.v, s, head, j, PAGED), p.v.element, e % (DV / 8) * 8, p.head_dim_v, ALIGNED);
    }
}

void store_k(uvec4 x[K_FETCH]) {
    [[unroll]] for (uint n = 0; n < K_FETCH; ++n) {
        uint e = thread() + n * WG;
        if (e < BC * (D / 8))
            s_kv[e / (D / 8) * K_STRIDE + e % (D / 8)] = x[n];
    }
}

void store_v(uvec4 x[V_FETCH]) {
    [[unroll]] for (uint n = 0; n < V_FETCH; ++n) {
        uint e = thread() + n * WG;
        if (e < BC * (DV / 8))
            s_kv[K_SIZE + e / (DV / 8) * V_STRIDE + e % (DV / 8)] = x[n];
    }
}

void main() {
    uint split = gl_WorkGroupID.z / p.batches;
    Sequence s = sequence(gl_WorkGroupID.z % p.batches);
    uint rows = s.len_q * PACK;
    uint row0 = (gl_NumWorkGroups.x - 1 - gl_WorkGroupID.x) * BR;  // the longest causal rows first
    if (row0 >= rows)
        return;
    uint head0 = gl_WorkGroupID.y * PACK;
    uint head_kv = head0 / p.group;
    uint my_row0 = row0 + gl_SubgroupID * MT * 16;
    bool busy = my_row0 < rows;

    for (uint e = thread(); e < BR * (D / 8); e += WG) {
        uint r = row0 + e / (D / 8);
        uvec4 x = uvec4(0);
        if (r < rows)
            x = load8(query_address(p.q, s, head0 + r % PACK, r / PACK), p.q.element, e % (D / 8) * 8, p.head_dim, ALIGNED);
        s_kv[e / (D / 8) * K_STRIDE + e % (D / 8)] = x;
    }
    barrier();
    MATRIX_A q[MT][D / 16];
    [[unroll]] for (uint mt = 0; mt < MT; ++mt)
        [[unroll]] for (uint d = 0; d < D / 16; ++d)
            coopMatLoad(q[mt][d], s_kv, (gl_SubgroupID * MT + mt) * 16 * K_STRIDE + d * 2, K_STRIDE, gl_CooperativeMatrixLayoutRowMajor);
    barrier();

    ACCUMULATOR acc[MT][DV / 16];
    float m[MT][ROW_HALVES], l[MT][ROW_HALVES], slope[MT][ROW_HALVES];
    [[unroll]] for (uint mt = 0; mt < MT; ++mt) {
        [[unroll]] for (uint d = 0; d < DV / 16; ++d)
            acc[mt][d] = ACCUMULATOR(0.0);
        [[unroll]] for (uint h = 0; h < ROW_HALVES; ++h) {
            m[mt][h] = LOWEST;
            l[mt][h] = 0.0;
            slope[mt][h] = slope_of(s, head0 + (my_row0 + mt * 16 + lane_row(h * 4)) % PACK, HAS_SLOPES);
        }
    }
    float factor_of_scores = PLAIN ? p.scale : 1.0;

    uint i_first = row0 / PACK, i_last = min((row0 + BR - 1) / PACK, s.len_q - 1);
    uint my_first = my_row0 / PACK, my_last = (my_row0 + MT * 16 - 1) / PACK;
    uvec2 keys = visible_keys(s, i_first, i_last);
    if (SPLIT) {
        uint chunk = (s.len_k + p.splits * BC - 1) / (p.splits * BC) * BC;
        keys = uvec2(max(keys.x, split * chunk), min(keys.y, (split + 1) * chunk));
    }
    uint j_first = keys.x / BC * BC;
    uvec4 k_next[K_FETCH], v_next[V_FETCH];
    fetch_k(k_next, s, head_kv, j_first);
    store_k(k_next);
    barrier();
    for (uint j0 = j_first; j0 < keys.y; j0 += BC) {
        fetch_v(v_next, s, head_kv, j0);
        ACCUMULATOR scores[MT][BC / 16];
        if (busy) {
            [[unroll]] for (uint c = 0; c < BC / 16; ++c) {
                [[unroll]] for (uint mt = 0; mt < MT; ++mt)
                    scores[mt][c] = ACCUMULATOR(0.0);
                [[unroll]] for (uint d = 0; d < D / 16; ++d) {
                    MATRIX_B k;
                    coopMatLoad(k, s_kv, c * 16 * K_STRIDE + d * 2, K_STRIDE, gl_CooperativeMatrixLayoutColumnMajor);
                    [[unroll]] for (uint mt = 0; mt < MT; ++mt)
                        scores[mt][c] = coopMatMulAdd(q[mt][d], k, scores[mt][c]);
                }
            }
        }
        store_v(v_next);
        barrier();
        fetch_k(k_next, s, head_kv, j0 + BC);
        if (busy) {
            bool masked = !all_visible(s, my_first, my_last, j0, j0 + BC - 1);
            [[unroll]] for (uint mt = 0; mt < MT; ++mt) {
                if (!PLAIN || masked) {
                    [[unroll]] for (uint c = 0; c < BC / 16; ++c)
                        [[unroll]] for (uint e = 0; e < LENGTH; ++e) {
                            uint row = my_row0 + mt * 16 + lane_row(e), i = row / PACK;
                            uint j = j0 + c * 16 + lane_column(e);
                            float x = scores[mt][c][e];
                            if (!PLAIN)
                                x *= p.scale;
                            if (HAS_CAP)
                                x = p.cap * capped(x);
                            if (HAS_BIAS || HAS_SLOPES)
                                x += added(s, head0 + row % PACK, i, j, slope[mt][e / 4], HAS_SLOPES, HAS_BIAS) * LOG2_E;
                            if (masked && !is_visible(s, i, j))
                                x = LOWEST;
                            scores[mt][c][e] = x;
                        }
                }
                float factor[ROW_HALVES], shift[ROW_HALVES];
                [[unroll]] for (uint h = 0; h < ROW_HALVES; ++h) {
                    float top = m[mt][h];
                    [[unroll]] for (uint c = 0; c < BC / 16; ++c)
                        [[unroll]] for (uint e = 0; e < 4; ++e)
                            top = max(top, scores[mt][c][h * 4 + e]);
                    top = row_max(top);
                    factor[h] = exp2((m[mt][h] - top) * factor_of_scores);
                    shift[h] = top > LOWEST ? top * factor_of_scores : 0.0;
                    m[mt][h] = top;
                    l[mt][h] *= factor[h];
                }
                [[unroll]] for (uint c = 0; c < BC / 16; ++c)
                    [[unroll]] for (uint e = 0; e < LENGTH; ++e) {
                        float weight = exp2(fma(scores[mt][c][e], factor_of_scores, -shift[e / 4]));
                        scores[mt][c][e] = weight;
                        l[mt][e / 4] += weight;
                    }
                [[unroll]] for (uint d = 0; d < DV / 16; ++d)
                    [[unroll]] for (uint e = 0; e < LENGTH; ++e)
                        acc[mt][d][e] *= factor[e / 4];
            }
            [[unroll]] for (uint c = 0; c < BC / 16; ++c) {
                MATRIX_A weights[MT];
                [[unroll]] for (uint mt = 0; mt < MT; ++mt)
                    [[unroll]] for (uint e = 0; e < LENGTH; ++e)
                        weights[mt][e] = HALF(scores[mt][c][e]);
                [[unroll]] for (uint d = 0; d < DV / 16; ++d) {
                    MATRIX_B v;
                    coopMatLoad(v, s_kv, K_SIZE + c * 16 * V_STRIDE + d * 2, V_STRIDE, gl_CooperativeMatrixLayoutRowMajor);
                    [[unroll]] for (uint mt = 0; mt < MT; ++mt)
                        acc[mt][d] = coopMatMulAdd(weights[mt], v, acc[mt][d]);
                }
            }
        }
        store_k(k_next);
        barrier();
    }

    [[unroll]] for (uint mt = 0; mt < MT; ++mt)
        [[unroll]] for (uint h = 0; h < ROW_HALVES; ++h) {
            uint row = my_row0 + mt * 16 + lane_row(h * 4), i = row / PACK, head = head0 + row % PACK;
            float sum = row_sum(l[mt][h]), top = m[mt][h] * factor_of_scores;
            if (row >= rows)
                continue;
            float keep = 1.0;
            if (m[mt][h] <= LOWEST)
                top = LOWEST;
            if (!SPLIT && p.sinks != 0) {
                float sink = read_float(p.sinks + head * 4) * LOG2_E;
                float above = max(top, sink);
                keep = exp2(top - above);
                sum = sum * keep + exp2(sink - above);
                top = above;
            }
            float norm = sum > 0.0 ? keep / sum : 0.0;
            float lse = sum > 0.0 ? top * LN_2 + log(sum) : MINUS_INFINITY;
            bool writes_lse = gl_SubgroupInvocationID % 4 == 0;
            if (SPLIT) {
                uint64_t part = ((uint64_t(split) * p.batches + s.batch) * p.heads + head) * p.len_q + i;
                if (writes_lse)
                    write_float(p.part_lse + part * 4, lse);
                [[unroll]] for (uint d = 0; d < DV / 16; ++d)
                    [[unroll]] for (uint e = h * 4; e < h * 4 + 4; ++e)
                        if (d * 16 + lane_column(e) < p.head_dim_v)
                            write_float(p.part_out + (part * p.head_dim_v + d * 16 + lane_column(e)) * 4, acc[mt][d][e] * norm);
                continue;
            }
            if (writes_lse)
                write_float(statistic_address(p.lse, s, head, i), lse);
            uint64_t out_row = query_address(p.out_, s, head, i);
            [[unroll]] for (uint d = 0; d < DV / 16; ++d)
                [[unroll]] for (uint e = h * 4; e < h * 4 + 4; e += 2)
                    store2(out_row, p.out_.element, d * 16 + lane_column(e), p.head_dim_v, ALIGNED, acc[mt][d][e] * norm, acc[mt][d][e + 1] * norm);
        }
}
