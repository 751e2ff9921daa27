// Attention, forward, on matrix units through VK_NV_cooperative_matrix2.
//
// Each subgroup owns BLOCKS x 16 rows of queries. Scores are computed CHUNK matrices at a time, so that
// two blocks of rows fit the registers and each matrix read from shared memory serves both. The pivot
// of softmax stays until a score is SLACK above it, which is rare; only then outputs are rescaled.
// Scores become weights by the extension's conversion; which invocation holds which row is that of
// matrix.glsl.
#version 460
#include "attention.glsl"
#include "matrix.glsl"
#extension GL_KHR_shader_subgroup_vote : require
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
layout(constant_id = 9) const bool SCALE_FIRST = false;  // not with exponents: see variants._SCALES
layout(constant_id = 10) const uint BLOCKS = 1;
layout(constant_id = 11) const uint CHUNK = 1;   // matrices of scores at a time

const uint MY_ROWS = BLOCKS * 16;
const uint BR = WG / 32 * MY_ROWS;
const uint KD = D / 16, VD = DV / 16;  // matrices of a row of Q and of V
const uint PARTS = BC / 16 / CHUNK;
const bool PLAIN = !(HAS_CAP || HAS_BIAS || HAS_SLOPES || SCALE_FIRST);
const uint K_STRIDE = D / 8 + 1, V_STRIDE = DV / 8 + 1;
const uint K_SIZE = BC * K_STRIDE, KV_SIZE = K_SIZE + BC * V_STRIDE;
const uint Q_SIZE = WG / 32 * 16 * K_STRIDE;  // one block of each subgroup
const uint K_FETCH = (BC * (D / 8) + WG - 1) / WG;
const uint V_FETCH = (BC * (DV / 8) + WG - 1) / WG;
const float SLACK = 8.0;  // of exponents to base 2: weights stay below 256
const float HIDDEN = 2.0 * LOWEST;  // its weight is 0 before any pivot, too

shared uvec4 s_tiles[Q_SIZE > KV_SIZE ? Q_SIZE : KV_SIZE];  // Q at first, then K and V

#define FETCH_K(start) FETCH_KEYS(k_next, D, k_row, k_rows, k_lane, k_step, start, key_address(p.k, s, head_kv, row, PAGED))
#define FETCH_V(start) FETCH_KEYS(v_next, DV, v_row, v_rows, v_lane, v_step, start, key_address(p.v, s, head_kv, row, PAGED))

// A tile from registers to shared memory. Where an invocation keeps to one column of vectors, it is
// the first of its addresses and constants, which takes one register and not one for each vector.
#define STORE_KEYS(x, dim, lane_row, base) \
    if (WG % (dim / 8) == 0 && BC * (dim / 8) % WG == 0) { \
        uint first = (base) + lane_row * (dim / 8 + 1) + thread() % (dim / 8); \
        [[unroll]] for (uint n = 0; n < BC * (dim / 8) / WG; ++n) \
            s_tiles[first + n * (WG / (dim / 8) * (dim / 8 + 1))] = x[n]; \
    } else { \
        STORE_TILE(x, BC, dim, base) \
    }
#define STORE_K STORE_KEYS(k_next, D, k_row, 0)
#define STORE_V STORE_KEYS(v_next, DV, v_row, K_SIZE)

// scores = Q times CHUNK x 16 keys from the tile's matrix `first` on
#define SCORE(scores, first) \
    [[unroll]] for (uint c = 0; c < CHUNK; ++c) { \
        [[unroll]] for (uint b = 0; b < BLOCKS; ++b) \
            scores[b * CHUNK + c] = ACCUMULATOR(0.0); \
        [[unroll]] for (uint d = 0; d < KD; ++d) { \
            MATRIX_B k; \
            coopMatLoad(k, s_tiles, (first + c) * 16 * K_STRIDE + d * 2, K_STRIDE, gl_CooperativeMatrixLayoutColumnMajor); \
            [[unroll]] for (uint b = 0; b < BLOCKS; ++b) \
                scores[b * CHUNK + c] = coopMatMulAdd(q[b * KD + d], k, scores[b * CHUNK + c]); \
        } \
    }

#define MASK(scores, start) \
    if (!PLAIN || int(start) < seen.x || int((start) + CHUNK * 16) > seen.y) \
        [[unroll]] for (uint n = 0; n < BLOCKS * CHUNK; ++n) \
            [[unroll]] for (uint e = 0; e < LENGTH; ++e) { \
                uint i = my_row0 + half_row(n / CHUNK * ROW_HALVES + e / 4); \
                uint j = (start) + n % CHUNK * 16 + lane_column(e); \
                float x = scores[n][e]; \
                if (!PLAIN) \
                    x *= p.scale; \
                if (HAS_CAP) \
                    x = p.cap * capped(x); \
                if (HAS_BIAS || HAS_SLOPES) \
                    x += added(s, head, i, j, slope, HAS_SLOPES, HAS_BIAS) * LOG2_E; \
                scores[n][e] = is_visible(s, i, j) ? x : HIDDEN; \
            }

// Raise pivots, where a score is too far above its own.
#define PIVOT(scores) { \
    float above = 0.0; \
    [[unroll]] for (uint h = 0; h < BLOCKS * ROW_HALVES; ++h) { \
        float top = scores[h / 2 * CHUNK][h % 2 * 4]; \
        [[unroll]] for (uint c = 0; c < CHUNK; ++c) \
            [[unroll]] for (uint e = 0; e < 4; ++e) \
                top = max(top, scores[h / 2 * CHUNK + c][h % 2 * 4 + e]); \
        above = max(above, top - m[h]); \
    } \
    if (subgroupAny(above * to_base_2 > SLACK)) \
        [[unroll]] for (uint h = 0; h < BLOCKS * ROW_HALVES; ++h) { \
            float top = m[h]; \
            [[unroll]] for (uint c = 0; c < CHUNK; ++c) \
                [[unroll]] for (uint e = 0; e < 4; ++e) \
                    top = max(top, scores[h / 2 * CHUNK + c][h % 2 * 4 + e]); \
            top = row_max(top); \
            float factor = exp2((m[h] - top) * to_base_2); \
            m[h] = top; \
            l[h] *= factor; \
            [[unroll]] for (uint d = 0; d < VD; ++d) \
                [[unroll]] for (uint e = 0; e < 4; ++e) \
                    acc[h / 2 * VD + d][h % 2 * 4 + e] *= factor; \
        } \
    }

// acc += weights times CHUNK x 16 values from the tile's matrix `first` on
#define WEIGH(scores, first) \
    [[unroll]] for (uint c = 0; c < CHUNK; ++c) { \
        MATRIX_A weights[BLOCKS]; \
        [[unroll]] for (uint b = 0; b < BLOCKS; ++b) { \
            [[unroll]] for (uint e = 0; e < LENGTH; ++e) { \
                uint h = b * ROW_HALVES + e / 4; \
                float x = exp2(fma(scores[b * CHUNK + c][e], to_base_2, -m[h] * to_base_2)); \
                scores[b * CHUNK + c][e] = x; \
                l[h] += x; \
            } \
            weights[b] = MATRIX_A(scores[b * CHUNK + c]); \
        } \
        [[unroll]] for (uint d = 0; d < VD; ++d) { \
            MATRIX_B v; \
            coopMatLoad(v, s_tiles, K_SIZE + (first + c) * 16 * V_STRIDE + d * 2, V_STRIDE, gl_CooperativeMatrixLayoutRowMajor); \
            [[unroll]] for (uint b = 0; b < BLOCKS; ++b) \
                acc[b * VD + d] = coopMatMulAdd(weights[b], v, acc[b * VD + d]); \
        } \
    }

void main() {
    Sequence s = sequence(gl_WorkGroupID.z);
    uvec2 at = head_and_reversed_tile(p.heads);
    uint head = at.x, head_kv = head / p.group, row0 = at.y * BR;
    if (row0 >= s.len_q)
        return;
    uint my_row0 = row0 + gl_SubgroupID * MY_ROWS;

    uint last_row = min(row0 + BR, s.len_q) - 1, my_last = min(my_row0 + MY_ROWS, s.len_q) - 1;
    uvec2 keys = visible_keys(s, row0, last_row);
    if (keys.x >= keys.y)
        keys = uvec2(0);
    uint last_key = max(keys.y, 1) - 1, k_row = thread() / (D / 8), v_row = thread() / (DV / 8);
    Rows k_rows = rows_of(p.k, key_address(p.k, s, head_kv, 0, false), p.head_dim, keys.y);
    Rows v_rows = rows_of(p.v, key_address(p.v, s, head_kv, 0, false), p.head_dim_v, keys.y);
    uint64_t k_lane = key_lane_of(k_rows, D), v_lane = key_lane_of(v_rows, DV);
    uint k_step = uint(k_rows.step), v_step = uint(v_rows.step);  // of ALIGNED rows
    ivec2 seen = shared_keys(s, my_row0, my_last);
    uint j0 = keys.x / BC * BC;
    uvec4 k_next[K_FETCH], v_next[V_FETCH];

    MATRIX_A q[BLOCKS * KD];
    [[unroll]] for (uint b = 0; b < BLOCKS; ++b) {
        for (uint e = thread(); e < WG / 32 * 16 * (D / 8); e += WG) {
            uint row = e / (D / 8), i = row0 + row / 16 * MY_ROWS + b * 16 + row % 16;
            uvec4 x = uvec4(0);
            if (i < s.len_q)
                x = load8(query_address(p.q, s, head, i), p.q.element, e % (D / 8) * 8, p.head_dim, ALIGNED);
            s_tiles[row * K_STRIDE + e % (D / 8)] = x;
        }
        barrier();
        [[unroll]] for (uint d = 0; d < KD; ++d)
            coopMatLoad(q[b * KD + d], s_tiles, gl_SubgroupID * 16 * K_STRIDE + d * 2, K_STRIDE, gl_CooperativeMatrixLayoutRowMajor);
        barrier();
    }

    ACCUMULATOR acc[BLOCKS * VD];
    float m[BLOCKS * ROW_HALVES], l[BLOCKS * ROW_HALVES];
    [[unroll]] for (uint d = 0; d < BLOCKS * VD; ++d)
        acc[d] = ACCUMULATOR(0.0);
    [[unroll]] for (uint h = 0; h < BLOCKS * ROW_HALVES; ++h) {
        m[h] = LOWEST;
        l[h] = 0.0;
    }
    float slope = slope_of(s, head, HAS_SLOPES), to_base_2 = PLAIN ? p.scale : 1.0;

    FETCH_K(j0)
    FETCH_V(j0)
    STORE_K
    STORE_V
    barrier();
    while (j0 < keys.y) {
        [[unroll]] for (uint part = 0; part < PARTS; ++part) {
            ACCUMULATOR scores[BLOCKS * CHUNK];
            SCORE(scores, part * CHUNK)
            MASK(scores, j0 + part * CHUNK * 16)
            PIVOT(scores)
            WEIGH(scores, part * CHUNK)
        }
        j0 += BC;
        FETCH_K(j0)
        FETCH_V(j0)
        barrier();
        STORE_K
        STORE_V
        barrier();
    }

    float norm[BLOCKS * ROW_HALVES];
    [[unroll]] for (uint h = 0; h < BLOCKS * ROW_HALVES; ++h) {
        uint i = my_row0 + half_row(h);
        float sum = row_sum(l[h]), top = m[h] > LOWEST ? m[h] * to_base_2 : LOWEST, keep = 1.0;
        if (p.sinks != 0) {
            float sink = float_or(p.sinks, head, LOWEST) * LOG2_E;
            float above = max(top, sink);
            keep = exp2(top - above);
            sum = sum * keep + exp2(sink - above);
            top = above;
        }
        norm[h] = sum > 0.0 ? keep / sum : 0.0;
        if (i < s.len_q && gl_SubgroupInvocationID % 4 == 0)
            write_float(statistic_address(p.lse, s, head, i), sum > 0.0 ? log_sum(top * LN_2, sum) : MINUS_INFINITY);
    }
    // Indices that unrolling makes constant, or the accumulators would live in memory.
    [[unroll]] for (uint d = 0; d < BLOCKS * VD; ++d)
        [[unroll]] for (uint e = 0; e < LENGTH; e += 2) {
            uint h = d / VD * ROW_HALVES + e / 4, i = my_row0 + half_row(h);
            vec2 x = vec2(acc[d][e], acc[d][e + 1]) * norm[h];
            if (i < s.len_q)
                store2(query_address(p.out_, s, head, i), p.out_.element, d % VD * 16 + lane_column(e), p.head_dim_v, ALIGNED, x.x, x.y);
        }
}
