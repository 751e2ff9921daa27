// Gradients of attention in float32 arithmetic, on any device and without atomics.
//
// With P = exp(S - lse) and dS = P (dO V^T - delta), where S are the scores:
//     dV = P^T dO,    dK = scale dS^T Q,    dQ = scale dS K    (Dao, FlashAttention-2, 2023)
// Compiled with DQ a workgroup owns BR queries and walks over keys; without, it owns BR keys and
// walks over the queries of every head that shares them. Both recompute the scores.
#version 460
#include "attention.glsl"
#ifdef SUBGROUP
#extension GL_KHR_shader_subgroup_basic : require
#endif

layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint WG = 128;
layout(constant_id = 1) const uint D = 64;       // head_dim, padded to a multiple of 4 CG
layout(constant_id = 2) const uint BR = 32;
layout(constant_id = 3) const uint BC = 32;
layout(constant_id = 4) const uint CG = 8;
layout(constant_id = 5) const bool ALIGNED = false;
layout(constant_id = 6) const bool HAS_CAP = false;
layout(constant_id = 7) const bool HAS_BIAS = false;
layout(constant_id = 8) const bool HAS_SLOPES = false;
layout(constant_id = 9) const bool DIRECT = false;  // where rows are D dense elements

const uint DT = D / (4 * CG);
const uint STRIDE = D / 4 + 1;

shared vec4 s_first[DIRECT ? 1 : BR * STRIDE];   // Q or K
shared vec4 s_second[DIRECT ? 1 : BR * STRIDE];  // dO or V
shared vec4 s_tile[BC * STRIDE];
#include "tiles.glsl"

#define FIRST(r, d) KEPT(r, d, s_first, STRIDE, first_at)
#define SECOND(r, d) KEPT(r, d, s_second, STRIDE, second_at)

// Rows row0 to row0 + BR - 1, for FIRST and SECOND.
#define KEEP(first, second) \
    uint64_t first_at[TR], second_at[TR]; \
    if (DIRECT) { \
        [[unroll]] for (uint r = 0; r < TR; ++r) { \
            uint row = min(row0 + rg + r * RG, first.count - 1); \
            first_at[r] = row_at(first, row); \
            second_at[r] = row_at(second, row); \
        } \
    } else { \
        LOAD(s_first, BR, STRIDE, D, first, row0, row_at(first, row)) \
        LOAD(s_second, BR, STRIDE, D, second, row0, row_at(second, row)) \
    }

#define STORE(acc, address, view, size, in_range) \
    [[unroll]] for (uint r = 0; r < TR; ++r) { \
        uint row = rg + r * RG; \
        if (in_range) \
            [[unroll]] for (uint d = 0; d < DT; ++d) \
                store4(address, view.element, (d * CG + cg) * 4, size, ALIGNED, acc[r][d]); \
    }

// acc += s_weights s_tile, summed apart first: a chain through all tiles would round too often.
#define ADD_PRODUCT(acc, stride) { \
    vec4 part[TR][DT]; \
    [[unroll]] for (uint r = 0; r < TR; ++r) \
        [[unroll]] for (uint d = 0; d < DT; ++d) \
            part[r][d] = vec4(0.0); \
    ACCUMULATE(part, stride) \
    [[unroll]] for (uint r = 0; r < TR; ++r) \
        [[unroll]] for (uint d = 0; d < DT; ++d) \
            acc[r][d] += part[r][d]; \
    }

#include "gradient.glsl"

#ifdef DQ
void main() {
    uint t = THREAD, rg = t / CG, cg = t % CG;
    Sequence s = sequence(gl_WorkGroupID.z);
    uvec2 at = head_and_reversed_tile(p.heads);
    uint row0 = at.y * BR;
    if (row0 >= s.len_q)
        return;
    uint head = at.x, head_kv = head / p.group;
    float slope = slope_of(s, head, HAS_SLOPES);
    Rows q_rows = rows_of(p.q, query_address(p.q, s, head, 0), p.head_dim, s.len_q);
    Rows dout_rows = rows_of(p.dout, query_address(p.dout, s, head, 0), p.head_dim_v, s.len_q);
    Rows k_rows = rows_of(p.k, key_address(p.k, s, head_kv, 0, false), p.head_dim, s.len_k);
    Rows v_rows = rows_of(p.v, key_address(p.v, s, head_kv, 0, false), p.head_dim_v, s.len_k);
    KEEP(q_rows, dout_rows)
    float lse[TR], delta[TR];
    vec4 dq[TR][DT];
    [[unroll]] for (uint r = 0; r < TR; ++r) {
        uint i = min(row0 + rg + r * RG, s.len_q - 1);
        lse[r] = read_float(statistic_address(p.lse, s, head, i));
        delta[r] = read_float(statistic_address(p.delta, s, head, i));
        [[unroll]] for (uint d = 0; d < DT; ++d)
            dq[r][d] = vec4(0.0);
    }
    uvec2 keys = visible_keys(s, row0, min(row0 + BR, s.len_q) - 1);
    uint j_first = keys.x / BC * BC;
    vec4 k_next[VECTORS(BC, D)], v_next[VECTORS(BC, D)];
    FETCH_TILE(v_next, BC, D, v_rows, j_first, row_at(v_rows, row))
    for (uint j0 = j_first; j0 < keys.y; j0 += BC) {
        float products[TR][TC], grads[TR][TC];
        STORE_TILE(v_next, s_tile, BC, STRIDE, D, v_rows, j0, row_at(v_rows, row))
        barrier();
        FETCH_TILE(k_next, BC, D, k_rows, j0, row_at(k_rows, row))
        MULTIPLY(grads, SECOND, STRIDE, D)
        barrier();
        STORE_TILE(k_next, s_tile, BC, STRIDE, D, k_rows, j0, row_at(k_rows, row))
        barrier();
        FETCH_TILE(v_next, BC, D, v_rows, j0 + BC, row_at(v_rows, row))
        MULTIPLY(products, FIRST, STRIDE, D)
        [[unroll]] for (uint r = 0; r < TR; ++r)
            [[unroll]] for (uint c = 0; c < TC; ++c) {
                vec2 w = weight(s, head, row0 + rg + r * RG, j0 + cg + c * CG, products[r][c], lse[r], slope);
                grads[r][c] = w.x * (grads[r][c] - delta[r]) * w.y;
            }
        SHARE(grads)
        barrier();
        ADD_PRODUCT(dq, STRIDE)
        barrier();
    }
    STORE(dq, query_address(p.dq, s, head, row0 + row), p.dq, p.head_dim, row0 + row < s.len_q)
}
#else
void main() {
    uint t = THREAD, rg = t / CG, cg = t % CG;
    Sequence s = sequence(gl_WorkGroupID.z);
    uvec2 at = head_and_tile(p.heads / p.group);  // causal: the first keys are seen by the most queries
    uint row0 = at.y * BR;
    if (row0 >= s.len_k)
        return;
    uint head_kv = at.x;
    Rows k_rows = rows_of(p.k, key_address(p.k, s, head_kv, 0, false), p.head_dim, s.len_k);
    Rows v_rows = rows_of(p.v, key_address(p.v, s, head_kv, 0, false), p.head_dim_v, s.len_k);
    KEEP(k_rows, v_rows)
    vec4 dk[TR][DT], dv[TR][DT];
    [[unroll]] for (uint r = 0; r < TR; ++r)
        [[unroll]] for (uint d = 0; d < DT; ++d)
            dk[r][d] = dv[r][d] = vec4(0.0);
    uvec2 queries = seeing_queries(s, row0, min(row0 + BR, s.len_k) - 1);
    for (uint head = head_kv * p.group; head < (head_kv + 1) * p.group; ++head) {
        float slope = slope_of(s, head, HAS_SLOPES);
        Rows q_rows = rows_of(p.q, query_address(p.q, s, head, 0), p.head_dim, s.len_q);
        Rows dout_rows = rows_of(p.dout, query_address(p.dout, s, head, 0), p.head_dim_v, s.len_q);
        uint i_first = queries.x / BC * BC;
        vec4 q_next[VECTORS(BC, D)], dout_next[VECTORS(BC, D)];
        FETCH_TILE(q_next, BC, D, q_rows, i_first, row_at(q_rows, row))
        for (uint i0 = i_first; i0 < queries.y; i0 += BC) {
            float weights[TR][TC], grads[TR][TC], derivatives[TR][TC], delta[TC];
            STORE_TILE(q_next, s_tile, BC, STRIDE, D, q_rows, i0, row_at(q_rows, row))
            barrier();
            FETCH_TILE(dout_next, BC, D, dout_rows, i0, row_at(dout_rows, row))
            MULTIPLY(weights, FIRST, STRIDE, D)
            [[unroll]] for (uint c = 0; c < TC; ++c) {
                uint i = i0 + cg + c * CG;
                float lse = LOWEST;
                delta[c] = 0.0;
                if (i < s.len_q) {
                    lse = read_float(statistic_address(p.lse, s, head, i));
                    delta[c] = read_float(statistic_address(p.delta, s, head, i));
                }
                [[unroll]] for (uint r = 0; r < TR; ++r) {
                    vec2 w = weight(s, head, i, row0 + rg + r * RG, weights[r][c], lse, slope);
                    weights[r][c] = w.x;
                    derivatives[r][c] = w.y;
                }
            }
            SHARE(weights)
            barrier();
            STORE_TILE(dout_next, s_tile, BC, STRIDE, D, dout_rows, i0, row_at(dout_rows, row))
            barrier();
            MULTIPLY(grads, SECOND, STRIDE, D)
            ADD_PRODUCT(dv, STRIDE)
            [[unroll]] for (uint r = 0; r < TR; ++r)
                [[unroll]] for (uint c = 0; c < TC; ++c)
                    grads[r][c] = weights[r][c] * (grads[r][c] - delta[c]) * derivatives[r][c];
            barrier();
            SHARE(grads)
            STORE_TILE(q_next, s_tile, BC, STRIDE, D, q_rows, i0, row_at(q_rows, row))
            barrier();
            FETCH_TILE(q_next, BC, D, q_rows, i0 + BC, row_at(q_rows, row))
            ADD_PRODUCT(dk, STRIDE)
            barrier();
        }
    }
    STORE(dk, key_address(p.dk, s, head_kv, row0 + row, false), p.dk, p.head_dim, row0 + row < s.len_k)
    STORE(dv, key_address(p.dv, s, head_kv, row0 + row, false), p.dv, p.head_dim_v, row0 + row < s.len_k)
}
#endif
