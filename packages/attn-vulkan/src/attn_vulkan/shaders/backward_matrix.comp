// Gradients of attention on matrix units through VK_KHR_cooperative_matrix, without atomics.
//
// The formulas are those of backward.comp. Each subgroup owns 16 rows: compiled with DQ queries, with
// Q and dO in registers and keys and values passing through shared memory; without, keys, with K and V
// in registers and the queries of every head that shares them passing through.
#version 460
#include "attention.glsl"
#include "matrix.glsl"

layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint WG = 128;
layout(constant_id = 1) const uint D = 64;       // the larger head dimension, padded to a multiple of 16
layout(constant_id = 2) const uint BC = 32;
layout(constant_id = 3) const bool ALIGNED = false;
layout(constant_id = 4) const bool HAS_CAP = false;
layout(constant_id = 5) const bool HAS_BIAS = false;
layout(constant_id = 6) const bool HAS_SLOPES = false;
const bool PAGED = false;

const bool PLAIN = !(HAS_CAP || HAS_BIAS || HAS_SLOPES);
const uint BR = WG / 32 * 16;
const uint STRIDE = D / 8 + 1;
const uint TILE = BC * STRIDE;
const uint FETCH = (BC * (D / 8) + WG - 1) / WG;
const uint ROWS_SIZE = BR * STRIDE;

shared uvec4 s_tiles[2 * TILE > ROWS_SIZE ? 2 * TILE : ROWS_SIZE];
#ifndef DQ
shared vec2 s_statistics[BC];  // lse and delta of each query
#endif

#include "gradient.glsl"

// lse and delta of query i, or of the last one.
vec2 statistics(Sequence s, uint head, uint i) {
    i = min(i, s.len_q - 1);
    return vec2(read_float(statistic_address(p.lse, s, head, i)), read_float(statistic_address(p.delta, s, head, i)));
}

#ifdef DQ
void main() {
    Sequence s = sequence(gl_WorkGroupID.z);
    uvec2 at = head_and_reversed_tile(p.heads);
    uint row0 = at.y * BR;
    if (row0 >= s.len_q)
        return;
    uint my_row0 = row0 + gl_SubgroupID * 16;
    uint head = at.x, head_kv = head / p.group;
    float slope = slope_of(s, head, HAS_SLOPES);
    MATRIX_A q[D / 16], dout[D / 16];
    LOAD_ROWS(q, BR, D, query_address(p.q, s, head, row0 + row), p.q, p.head_dim, row0 + row < s.len_q)
    LOAD_ROWS(dout, BR, D, query_address(p.dout, s, head, row0 + row), p.dout, p.head_dim_v, row0 + row < s.len_q)
    ACCUMULATOR dq[D / 16];
    [[unroll]] for (uint d = 0; d < D / 16; ++d)
        dq[d] = ACCUMULATOR(0.0);
    float lse[ROW_HALVES], delta[ROW_HALVES];
    [[unroll]] for (uint h = 0; h < ROW_HALVES; ++h) {
        vec2 known = statistics(s, head, my_row0 + half_row(h));
        lse[h] = known.x;
        delta[h] = known.y;
    }

    float scale = p.scale, softmax_scale = p.softmax_scale;
    uvec2 keys = visible_keys(s, row0, min(row0 + BR, s.len_q) - 1);
    uint j_first = keys.x / BC * BC;
    uvec4 k_next[FETCH], v_next[FETCH];
    Rows k_rows = rows_of(p.k, key_address(p.k, s, head_kv, 0, false), p.head_dim, s.len_k);
    Rows v_rows = rows_of(p.v, key_address(p.v, s, head_kv, 0, false), p.head_dim_v, s.len_k);
    uint64_t k_lane = lane_of(k_rows, D), v_lane = lane_of(v_rows, D);
    FETCH_TILE(k_next, BC, D, k_rows, k_lane, j_first, row_at(k_rows, row))
    FETCH_TILE(v_next, BC, D, v_rows, v_lane, j_first, row_at(v_rows, row))
    for (uint j0 = j_first; j0 < keys.y; j0 += BC) {
        barrier();
        STORE_TILE(k_next, BC, D, 0)
        STORE_TILE(v_next, BC, D, TILE)
        barrier();
        FETCH_TILE(k_next, BC, D, k_rows, k_lane, j0 + BC, row_at(k_rows, row))
        FETCH_TILE(v_next, BC, D, v_rows, v_lane, j0 + BC, row_at(v_rows, row))
        bool masked = !all_visible(s, my_row0, my_row0 + 15, j0, j0 + BC - 1);
        [[unroll]] for (uint c = 0; c < BC / 16; ++c) {
            ACCUMULATOR scores, grads;
            MULTIPLY(scores, q, D, 0, c)
            MULTIPLY(grads, dout, D, TILE, c)
            if (PLAIN && !masked) {
                [[unroll]] for (uint e = 0; e < LENGTH; ++e) {
                    float w = exp2(fma(scores[e], scale, -lse[e / 4] * LOG2_E));
                    grads[e] = w * (grads[e] - delta[e / 4]) * softmax_scale;
                }
            } else {
                [[unroll]] for (uint e = 0; e < LENGTH; ++e) {
                    vec2 w = weight(s, head, my_row0 + lane_row(e), j0 + c * 16 + lane_column(e), scores[e], lse[e / 4], slope);
                    grads[e] = w.x * (grads[e] - delta[e / 4]) * w.y;
                }
            }
            ACCUMULATE(dq, grads, D, 0, c)
        }
    }
    STORE_ROWS(dq, D, query_address(p.dq, s, head, row), p.dq, p.head_dim, s.len_q)
}
#else
void main() {
    Sequence s = sequence(gl_WorkGroupID.z);
    uvec2 at = head_and_tile(p.heads / p.group);  // causal: the first keys are seen by the most queries
    uint row0 = at.y * BR;
    if (row0 >= s.len_k)
        return;
    uint my_row0 = row0 + gl_SubgroupID * 16;
    uint head_kv = at.x;
    MATRIX_A k[D / 16], v[D / 16];
    LOAD_ROWS(k, BR, D, key_address(p.k, s, head_kv, row0 + row, false), p.k, p.head_dim, row0 + row < s.len_k)
    LOAD_ROWS(v, BR, D, key_address(p.v, s, head_kv, row0 + row, false), p.v, p.head_dim_v, row0 + row < s.len_k)
    ACCUMULATOR dk[D / 16], dv[D / 16];
    [[unroll]] for (uint d = 0; d < D / 16; ++d)
        dk[d] = dv[d] = ACCUMULATOR(0.0);

    float scale = p.scale, softmax_scale = p.softmax_scale;
    uvec2 queries = seeing_queries(s, row0, min(row0 + BR, s.len_k) - 1);
    uint i_first = queries.x / BC * BC;
    for (uint head = head_kv * p.group; head < (head_kv + 1) * p.group; ++head) {
        float slope = slope_of(s, head, HAS_SLOPES);
        uvec4 q_next[FETCH], dout_next[FETCH];
        Rows q_rows = rows_of(p.q, query_address(p.q, s, head, 0), p.head_dim, s.len_q);
        Rows dout_rows = rows_of(p.dout, query_address(p.dout, s, head, 0), p.head_dim_v, s.len_q);
        uint64_t q_lane = lane_of(q_rows, D), dout_lane = lane_of(dout_rows, D);
        FETCH_TILE(q_next, BC, D, q_rows, q_lane, i_first, row_at(q_rows, row))
        FETCH_TILE(dout_next, BC, D, dout_rows, dout_lane, i_first, row_at(dout_rows, row))
        vec2 statistics_next = statistics(s, head, i_first + thread());
        for (uint i0 = i_first; i0 < queries.y; i0 += BC) {
            barrier();
            STORE_TILE(q_next, BC, D, 0)
            STORE_TILE(dout_next, BC, D, TILE)
            if (thread() < BC)
                s_statistics[thread()] = statistics_next;
            barrier();
            statistics_next = statistics(s, head, i0 + BC + thread());
            FETCH_TILE(q_next, BC, D, q_rows, q_lane, i0 + BC, row_at(q_rows, row))
            FETCH_TILE(dout_next, BC, D, dout_rows, dout_lane, i0 + BC, row_at(dout_rows, row))
            bool masked = !all_visible(s, i0, i0 + BC - 1, my_row0, my_row0 + 15);
            [[unroll]] for (uint c = 0; c < BC / 16; ++c) {
                ACCUMULATOR weights, grads;
                MULTIPLY(weights, k, D, 0, c)
                MULTIPLY(grads, v, D, TILE, c)
                if (PLAIN && !masked) {
                    [[unroll]] for (uint e = 0; e < LENGTH; ++e) {
                        vec2 known = s_statistics[c * 16 + lane_column(e)];
                        weights[e] = exp2(fma(weights[e], scale, -known.x * LOG2_E));
                        grads[e] = weights[e] * (grads[e] - known.y) * softmax_scale;
                    }
                } else {
                    [[unroll]] for (uint e = 0; e < LENGTH; ++e) {
                        uint x = c * 16 + lane_column(e);
                        vec2 known = s_statistics[x];
                        vec2 w = weight(s, head, i0 + x, my_row0 + lane_row(e), weights[e], known.x, slope);
                        weights[e] = w.x;
                        grads[e] = w.x * (grads[e] - known.y) * w.y;
                    }
                }
                ACCUMULATE(dv, weights, D, TILE, c)
                ACCUMULATE(dk, grads, D, 0, c)
            }
        }
    }
    STORE_ROWS(dk, D, key_address(p.dk, s, head_kv, row, false), p.dk, p.head_dim, s.len_k)
    STORE_ROWS(dv, D, key_address(p.dv, s, head_kv, row, false), p.dv, p.head_dim_v, s.len_k)
}
#endif
