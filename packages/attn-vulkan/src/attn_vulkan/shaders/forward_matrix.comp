// Attention, forward, on matrix units through VK_KHR_cooperative_matrix.
//
// Each subgroup owns BLOCKS x 16 rows of queries in registers, FlashAttention-2's division of labour.
// Keys and values go through shared memory; the next tile is fetched while this one is multiplied.
// Every matrix read from there serves all blocks, where registers hold more than one. TOGETHER, where
// rows are few, all subgroups own the same rows, and each its share of the columns of V.
#version 460
#include "attention.glsl"
#include "matrix.glsl"

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
layout(constant_id = 9) const bool SPLIT = false;
layout(constant_id = 10) const uint PACK = 1;
layout(constant_id = 11) const bool SCALE_FIRST = false;  // not with exponents: see variants._SCALES
layout(constant_id = 12) const uint BLOCKS = 1;
layout(constant_id = 13) const bool TOGETHER = false;

const uint MY_ROWS = BLOCKS * 16;
const uint BR = TOGETHER ? MY_ROWS : WG / 32 * MY_ROWS;
const uint KD = D / 16, NC = BC / 16;  // matrices of a row of Q and of scores
const uint VD = DV / 16 / (TOGETHER ? WG / 32 : 1);  // and of a subgroup's columns of V
const bool PLAIN = !(HAS_CAP || HAS_BIAS || HAS_SLOPES || SCALE_FIRST);
const uint K_STRIDE = D / 8 + 1;
const uint V_STRIDE = DV / 8 + 1;
const uint K_SIZE = BC * K_STRIDE;
const uint Q_SIZE = BR * K_STRIDE;
const uint KV_SIZE = K_SIZE + BC * V_STRIDE;
const uint K_FETCH = (BC * (D / 8) + WG - 1) / WG;
const uint V_FETCH = (BC * (DV / 8) + WG - 1) / WG;

// Split keys are read once, from memory: a tile is fetched as soon as the one before it has left the
// registers. Else those registers are worth more than the time.
const bool EARLY = SPLIT;

shared uvec4 s_tiles[Q_SIZE > KV_SIZE ? Q_SIZE : KV_SIZE];  // Q at first, then K and V

#define FETCH_K(start) FETCH_KEYS(k_next, D, k_row, k_rows, k_lane, k_step, start, key_address(p.k, s, head_kv, row, PAGED))
#define FETCH_V(start) FETCH_KEYS(v_next, DV, v_row, v_rows, v_lane, v_step, start, key_address(p.v, s, head_kv, row, PAGED))

void main() {
    uint split = gl_WorkGroupID.z / p.batches;
    Sequence s = sequence(gl_WorkGroupID.z % p.batches);
    uint rows = s.len_q * PACK;
    uvec2 at = head_and_reversed_tile(p.heads / PACK);
    uint head0 = at.x * PACK, row0 = at.y * BR;
    if (row0 >= rows)
        return;
    uint head_kv = head0 / p.group;
    uint first_row = TOGETHER ? 0 : gl_SubgroupID * MY_ROWS;
    uint first_column = TOGETHER ? gl_SubgroupID * VD : 0;
    uint my_row0 = row0 + first_row;
    bool busy = !(SPLIT || PACK > 1) || my_row0 < rows;  // where rows are few, subgroups only fetch

    uint i_first = row0 / PACK, i_last = min((row0 + BR - 1) / PACK, s.len_q - 1);
    uint my_first = my_row0 / PACK, my_last = min((my_row0 + MY_ROWS - 1) / PACK, s.len_q - 1);
    uvec2 keys = visible_keys(s, i_first, i_last);
    if (SPLIT) {
        uint chunk = (s.len_k + p.splits * BC - 1) / (p.splits * BC) * BC;
        keys = uvec2(max(keys.x, split * chunk), min(keys.y, (split + 1) * chunk));
    }
    if (keys.x >= keys.y)
        keys = uvec2(0);
    uint last_key = max(keys.y, 1) - 1, k_row = thread() / (D / 8), v_row = thread() / (DV / 8);
    Rows k_rows = rows_of(p.k, key_address(p.k, s, head_kv, 0, false), p.head_dim, keys.y);
    Rows v_rows = rows_of(p.v, key_address(p.v, s, head_kv, 0, false), p.head_dim_v, keys.y);
    uint64_t k_lane = key_lane_of(k_rows, D), v_lane = key_lane_of(v_rows, DV);
    uint k_step = uint(k_rows.step), v_step = uint(v_rows.step);  // of ALIGNED rows
    ivec2 seen = shared_keys(s, my_first, my_last);
    uint j_first = keys.x / BC * BC;
    uvec4 k_next[K_FETCH], v_next[V_FETCH];
    FETCH_K(j_first)
    if (EARLY)
        FETCH_V(j_first)

    MATRIX_A q[BLOCKS * KD];
    for (uint e = thread(); e < BR * (D / 8); e += WG) {
        uint row = row0 + e / (D / 8);
        uvec4 x = uvec4(0);
        if (row < rows)
            x = load8(query_address(p.q, s, head0 + row % PACK, row / PACK), p.q.element, e % (D / 8) * 8, p.head_dim, ALIGNED);
        s_tiles[e / (D / 8) * K_STRIDE + e % (D / 8)] = x;
    }
    barrier();
    [[unroll]] for (uint b = 0; b < BLOCKS; ++b)
        [[unroll]] for (uint d = 0; d < KD; ++d)
            coopMatLoad(q[b * KD + d], s_tiles, (first_row + b * 16) * K_STRIDE + d * 2, K_STRIDE, gl_CooperativeMatrixLayoutRowMajor);
    barrier();

    ACCUMULATOR acc[BLOCKS * VD];
    float m[BLOCKS * ROW_HALVES], l[BLOCKS * ROW_HALVES], slope[BLOCKS * ROW_HALVES];
    [[unroll]] for (uint d = 0; d < BLOCKS * VD; ++d)
        acc[d] = ACCUMULATOR(0.0);
    [[unroll]] for (uint h = 0; h < BLOCKS * ROW_HALVES; ++h) {
        m[h] = LOWEST;
        l[h] = 0.0;
        slope[h] = slope_of(s, head0 + (my_row0 + half_row(h)) % PACK, HAS_SLOPES);
    }
    float to_base_2 = PLAIN ? p.scale : 1.0;

    STORE_TILE(k_next, BC, D, 0)
    if (EARLY)
        FETCH_K(j_first + BC)
    barrier();
    for (uint j0 = j_first; j0 < keys.y; j0 += BC) {
        if (!EARLY)
            FETCH_V(j0)
        ACCUMULATOR scores[BLOCKS * NC];
        if (busy)
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
        if (EARLY)
            FETCH_V(j0 + BC)
        barrier();
        if (!EARLY)
            FETCH_K(j0 + BC)
        if (busy) {
            if (!PLAIN || int(j0) < seen.x || int(j0 + BC) > seen.y) {
                [[unroll]] for (uint c = 0; c < BLOCKS * NC; ++c)
                    [[unroll]] for (uint e = 0; e < LENGTH; ++e) {
                        uint h = c / NC * ROW_HALVES + e / 4;
                        uint row = my_row0 + half_row(h), i = row / PACK;
                        uint j = j0 + c % NC * 16 + lane_column(e);
                        float x = scores[c][e];
                        if (!PLAIN)
                            x *= p.scale;
                        if (HAS_CAP)
                            x = p.cap * capped(x);
                        if (HAS_BIAS || HAS_SLOPES)
                            x += added(s, head0 + row % PACK, i, j, slope[h], HAS_SLOPES, HAS_BIAS) * LOG2_E;
                        scores[c][e] = is_visible(s, i, j) ? x : LOWEST;
                    }
            }
            [[unroll]] for (uint b = 0; b < BLOCKS; ++b) {
                float factor[ROW_HALVES], shift[ROW_HALVES];
                [[unroll]] for (uint side = 0; side < ROW_HALVES; ++side) {
                    uint h = b * ROW_HALVES + side;
                    float top = m[h];
                    [[unroll]] for (uint c = 0; c < NC; ++c)
                        [[unroll]] for (uint e = 0; e < 4; ++e)
                            top = max(top, scores[b * NC + c][side * 4 + e]);
                    top = row_max(top);
                    factor[side] = exp2((m[h] - top) * to_base_2);
                    shift[side] = top > LOWEST ? top * to_base_2 : 0.0;
                    m[h] = top;
                    l[h] *= factor[side];
                }
                [[unroll]] for (uint c = 0; c < NC; ++c)
                    [[unroll]] for (uint e = 0; e < LENGTH; ++e) {
                        float x = exp2(fma(scores[b * NC + c][e], to_base_2, -shift[e / 4]));
                        scores[b * NC + c][e] = x;
                        l[b * ROW_HALVES + e / 4] += x;
                    }
                [[unroll]] for (uint d = 0; d < VD; ++d)
                    [[unroll]] for (uint e = 0; e < LENGTH; ++e)
                        acc[b * VD + d][e] *= factor[e / 4];
            }
            [[unroll]] for (uint c = 0; c < NC; ++c) {
                MATRIX_A weights[BLOCKS];
                [[unroll]] for (uint b = 0; b < BLOCKS; ++b)
                    [[unroll]] for (uint e = 0; e < LENGTH; ++e)
                        weights[b][e] = HALF(scores[b * NC + c][e]);
                [[unroll]] for (uint d = 0; d < VD; ++d) {
                    MATRIX_B v;
                    coopMatLoad(v, s_tiles, K_SIZE + c * 16 * V_STRIDE + (first_column + d) * 2, V_STRIDE, gl_CooperativeMatrixLayoutRowMajor);
                    [[unroll]] for (uint b = 0; b < BLOCKS; ++b)
                        acc[b * VD + d] = coopMatMulAdd(weights[b], v, acc[b * VD + d]);
                }
            }
        }
        STORE_TILE(k_next, BC, D, 0)
        if (EARLY)
            FETCH_K(j0 + 2 * BC)
        barrier();
    }

    float norm[BLOCKS * ROW_HALVES];
    [[unroll]] for (uint h = 0; h < BLOCKS * ROW_HALVES; ++h) {
        uint row = my_row0 + half_row(h), i = row / PACK, head = head0 + row % PACK;
        float sum = row_sum(l[h]), top = m[h] > LOWEST ? m[h] * to_base_2 : LOWEST, keep = 1.0;
        if (!SPLIT && p.sinks != 0 && row < rows) {
            float sink = float_or(p.sinks, head, LOWEST) * LOG2_E;
            float above = max(top, sink);
            keep = exp2(top - above);
            sum = sum * keep + exp2(sink - above);
            top = above;
        }
        norm[h] = SPLIT ? 1.0 : sum > 0.0 ? keep / sum : 0.0;
        if (row >= rows || gl_SubgroupInvocationID % 4 != 0 || first_column > 0)
            continue;
        if (SPLIT)
            write_floats(p.part_sums + part_row(s, split, head, i) * 8, vec2(top * LN_2, sum));
        else
            write_float(statistic_address(p.lse, s, head, i), sum > 0.0 ? log_sum(top * LN_2, sum) : MINUS_INFINITY);
    }
    // Indices that unrolling makes constant, or the accumulators would live in memory.
    [[unroll]] for (uint d = 0; d < BLOCKS * VD; ++d)
        [[unroll]] for (uint e = 0; e < LENGTH; e += 2) {
            uint h = d / VD * ROW_HALVES + e / 4;
            uint row = my_row0 + half_row(h), i = row / PACK, head = head0 + row % PACK;
            uint column = (first_column + d % VD) * 16 + lane_column(e);
            vec2 x = vec2(acc[d][e], acc[d][e + 1]) * norm[h];
            if (row < rows && SPLIT)
                write_part(s, split, head, i, column, x);
            else if (row < rows)
                store2(query_address(p.out_, s, head, i), p.out_.element, column, p.head_dim_v, ALIGNED, x.x, x.y);
        }
}
