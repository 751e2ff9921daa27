// Attention, forward, on matrix units through VK_KHR_cooperative_matrix.
//
// Each subgroup owns 16 rows of queries in registers, FlashAttention-2's division of labour.
// Keys and values go through shared memory; the next tile is fetched while this one is multiplied.
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
layout(constant_id = 11) const bool SCALE_FIRST = false;  // where the scale is not positive

const uint BR = WG / 32 * 16;
const bool PLAIN = !(HAS_CAP || HAS_BIAS || HAS_SLOPES || SCALE_FIRST);
const uint K_STRIDE = D / 8 + 1;
const uint V_STRIDE = DV / 8 + 1;
const uint K_SIZE = BC * K_STRIDE;
const uint Q_SIZE = BR * K_STRIDE;
const uint KV_SIZE = K_SIZE + BC * V_STRIDE;
const uint K_FETCH = (BC * (D / 8) + WG - 1) / WG;
const uint V_FETCH = (BC * (DV / 8) + WG - 1) / WG;

shared uvec4 s_tiles[Q_SIZE > KV_SIZE ? Q_SIZE : KV_SIZE];  // Q at first, then K and V

void main() {
    uint split = gl_WorkGroupID.z / p.batches;
    Sequence s = sequence(gl_WorkGroupID.z % p.batches);
    uint rows = s.len_q * PACK;
    uint row0 = (gl_NumWorkGroups.x - 1 - gl_WorkGroupID.x) * BR;  // the longest causal rows first
    if (row0 >= rows)
        return;
    uint head0 = gl_WorkGroupID.y * PACK;
    uint head_kv = head0 / p.group;
    uint my_row0 = row0 + gl_SubgroupID * 16;
    bool busy = my_row0 < rows;

    MATRIX_A q[D / 16];
    LOAD_ROWS(q, BR, D, query_address(p.q, s, head0 + (row0 + row) % PACK, (row0 + row) / PACK), p.q, p.head_dim, row0 + row < rows)

    ACCUMULATOR acc[DV / 16];
    float m[ROW_HALVES], l[ROW_HALVES], slope[ROW_HALVES];
    [[unroll]] for (uint d = 0; d < DV / 16; ++d)
        acc[d] = ACCUMULATOR(0.0);
    [[unroll]] for (uint h = 0; h < ROW_HALVES; ++h) {
        m[h] = LOWEST;
        l[h] = 0.0;
        slope[h] = slope_of(s, head0 + (my_row0 + lane_row(h * 4)) % PACK, HAS_SLOPES);
    }
    float to_base_2 = PLAIN ? p.scale : 1.0;

    uint i_first = row0 / PACK, i_last = min((row0 + BR - 1) / PACK, s.len_q - 1);
    uint my_first = my_row0 / PACK, my_last = (my_row0 + 15) / PACK;
    uvec2 keys = visible_keys(s, i_first, i_last);
    if (SPLIT) {
        uint chunk = (s.len_k + p.splits * BC - 1) / (p.splits * BC) * BC;
        keys = uvec2(max(keys.x, split * chunk), min(keys.y, (split + 1) * chunk));
    }
    uint j_first = keys.x / BC * BC;
    uvec4 k_next[K_FETCH], v_next[V_FETCH];
    FETCH_TILE(k_next, BC, D, key_address(p.k, s, head_kv, j_first + row, PAGED), p.k, p.head_dim, j_first + row < s.len_k)
    STORE_TILE(k_next, BC, D, 0)
    barrier();
    for (uint j0 = j_first; j0 < keys.y; j0 += BC) {
        FETCH_TILE(v_next, BC, DV, key_address(p.v, s, head_kv, j0 + row, PAGED), p.v, p.head_dim_v, j0 + row < s.len_k)
        ACCUMULATOR scores[BC / 16];
        if (busy)
            [[unroll]] for (uint c = 0; c < BC / 16; ++c)
                MULTIPLY(scores[c], q, D, 0, c)
        STORE_TILE(v_next, BC, DV, K_SIZE)
        barrier();
        uint j1 = j0 + BC;
        FETCH_TILE(k_next, BC, D, key_address(p.k, s, head_kv, j1 + row, PAGED), p.k, p.head_dim, j1 + row < s.len_k)
        if (busy) {
            bool masked = !all_visible(s, my_first, my_last, j0, j0 + BC - 1);
            if (!PLAIN || masked) {
                [[unroll]] for (uint c = 0; c < BC / 16; ++c)
                    [[unroll]] for (uint e = 0; e < LENGTH; ++e) {
                        uint row = my_row0 + lane_row(e), i = row / PACK;
                        uint j = j0 + c * 16 + lane_column(e);
                        float x = scores[c][e];
                        if (!PLAIN)
                            x *= p.scale;
                        if (HAS_CAP)
                            x = p.cap * capped(x);
                        if (HAS_BIAS || HAS_SLOPES)
                            x += added(s, head0 + row % PACK, i, j, slope[e / 4], HAS_SLOPES, HAS_BIAS) * LOG2_E;
                        scores[c][e] = is_visible(s, i, j) ? x : LOWEST;
                    }
            }
            float factor[ROW_HALVES], shift[ROW_HALVES];
            [[unroll]] for (uint h = 0; h < ROW_HALVES; ++h) {
                float top = m[h];
                [[unroll]] for (uint c = 0; c < BC / 16; ++c)
                    [[unroll]] for (uint e = 0; e < 4; ++e)
                        top = max(top, scores[c][h * 4 + e]);
                top = row_max(top);
                factor[h] = exp2((m[h] - top) * to_base_2);
                shift[h] = top > LOWEST ? top * to_base_2 : 0.0;
                m[h] = top;
                l[h] *= factor[h];
            }
            [[unroll]] for (uint c = 0; c < BC / 16; ++c)
                [[unroll]] for (uint e = 0; e < LENGTH; ++e) {
                    scores[c][e] = exp2(fma(scores[c][e], to_base_2, -shift[e / 4]));
                    l[e / 4] += scores[c][e];
                }
            [[unroll]] for (uint d = 0; d < DV / 16; ++d)
                [[unroll]] for (uint e = 0; e < LENGTH; ++e)
                    acc[d][e] *= factor[e / 4];
            [[unroll]] for (uint c = 0; c < BC / 16; ++c)
                ACCUMULATE(acc, scores[c], DV, K_SIZE, c)
        }
        STORE_TILE(k_next, BC, D, 0)
        barrier();
    }

    float norm[ROW_HALVES];
    [[unroll]] for (uint h = 0; h < ROW_HALVES; ++h) {
        uint row = my_row0 + lane_row(h * 4), i = row / PACK, head = head0 + row % PACK;
        float sum = row_sum(l[h]), top = m[h] > LOWEST ? m[h] * to_base_2 : LOWEST, keep = 1.0;
        if (!SPLIT && p.sinks != 0 && row < rows) {
            float sink = float_or(p.sinks, head, LOWEST) * LOG2_E;
            float above = max(top, sink);
            keep = exp2(top - above);
            sum = sum * keep + exp2(sink - above);
            top = above;
        }
        norm[h] = sum > 0.0 ? keep / sum : 0.0;
        uint64_t lse = SPLIT ? p.part_lse + part_row(s, split, head, i) * 4 : statistic_address(p.lse, s, head, i);
        if (row < rows && gl_SubgroupInvocationID % 4 == 0)
            write_float(lse, sum > 0.0 ? top * LN_2 + log(sum) : MINUS_INFINITY);
    }
    // Indices that unrolling makes constant, or the accumulators would live in memory.
    [[unroll]] for (uint d = 0; d < DV / 16; ++d)
        [[unroll]] for (uint e = 0; e < LENGTH; e += 2) {
            uint row = my_row0 + lane_row(e), i = row / PACK, head = head0 + row % PACK;
            uint column = d * 16 + lane_column(e);
            vec2 x = vec2(acc[d][e], acc[d][e + 1]) * norm[e / 4];
            if (row < rows && SPLIT)
                write_part(s, split, head, i, column, x);
            else if (row < rows)
                store2(query_address(p.out_, s, head, i), p.out_.element, column, p.head_dim_v, ALIGNED, x.x, x.y);
        }
}
