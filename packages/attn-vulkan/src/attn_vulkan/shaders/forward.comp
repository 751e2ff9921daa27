// Attention, forward, in float32 arithmetic on any device.
//
// A workgroup owns BR rows of queries and walks over blocks of BC keys, FlashAttention-2's loop. The
// next tile of keys or values is fetched while this one is multiplied.
// Invocations form RG x CG: each computes TR x TC scores, and TR rows x DT columns of the output.
// Row r of a workgroup is query r / PACK of head r % PACK: with PACK > 1 the query heads that share
// a key head share its loads.
#version 460
#include "attention.glsl"
#ifdef SUBGROUP
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_shuffle : require
#endif

layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint WG = 128;
layout(constant_id = 1) const uint D = 64;       // head_dim, padded to a multiple of 4
layout(constant_id = 2) const uint DV = 64;      // head_dim_v, padded to a multiple of 4 CG
layout(constant_id = 3) const uint BR = 64;
layout(constant_id = 4) const uint BC = 32;
layout(constant_id = 5) const uint CG = 8;
layout(constant_id = 6) const bool ALIGNED = false;
layout(constant_id = 7) const bool HAS_CAP = false;
layout(constant_id = 8) const bool HAS_BIAS = false;
layout(constant_id = 9) const bool HAS_SLOPES = false;
layout(constant_id = 10) const bool PAGED = false;
layout(constant_id = 11) const bool SPLIT = false;
layout(constant_id = 12) const uint PACK = 1;
layout(constant_id = 13) const bool DIRECT = false;  // where rows are D dense elements

const uint DT = DV / (4 * CG);
const uint Q_STRIDE = D / 4 + 1;
const uint V_STRIDE = DV / 4 + 1;
const uint KV_SIZE = BC * (Q_STRIDE > V_STRIDE ? Q_STRIDE : V_STRIDE);

shared vec4 s_q[DIRECT ? 1 : BR * Q_STRIDE];
shared vec4 s_tile[KV_SIZE];
#ifndef SUBGROUP
shared float s_rows[BR * CG];
#endif

#include "tiles.glsl"

#define K_ADDRESS (PAGED ? key_address(p.k, s, head_kv, row, true) : row_at(k_rows, row))
#define Q_VECTOR(r, d) KEPT(r, d, s_q, Q_STRIDE, q_at)
#define V_ADDRESS (PAGED ? key_address(p.v, s, head_kv, row, true) : row_at(v_rows, row))

// Each row's maximum over its CG invocations.
void reduce_max(inout float x[TR], uint rg, uint cg) {
#ifdef SUBGROUP
    [[unroll]] for (uint r = 0; r < TR; ++r)
        [[unroll]] for (uint k = 1; k < CG; k *= 2)
            x[r] = max(x[r], subgroupShuffleXor(x[r], k));
#else
    barrier();
    [[unroll]] for (uint r = 0; r < TR; ++r)
        s_rows[(rg + r * RG) * CG + cg] = x[r];
    barrier();
    [[unroll]] for (uint r = 0; r < TR; ++r)
        for (uint k = 0; k < CG; ++k)
            x[r] = max(x[r], s_rows[(rg + r * RG) * CG + k]);
#endif
}

void reduce_sum(inout float x[TR], uint rg, uint cg) {
#ifdef SUBGROUP
    [[unroll]] for (uint r = 0; r < TR; ++r)
        [[unroll]] for (uint k = 1; k < CG; k *= 2)
            x[r] += subgroupShuffleXor(x[r], k);
#else
    barrier();
    [[unroll]] for (uint r = 0; r < TR; ++r)
        s_rows[(rg + r * RG) * CG + cg] = x[r];
    barrier();
    [[unroll]] for (uint r = 0; r < TR; ++r) {
        x[r] = 0.0;
        for (uint k = 0; k < CG; ++k)
            x[r] += s_rows[(rg + r * RG) * CG + k];
    }
#endif
}

void main() {
    uint t = THREAD, rg = t / CG, cg = t % CG;
    uint split = gl_WorkGroupID.z / p.batches;
    Sequence s = sequence(gl_WorkGroupID.z % p.batches);
    uint rows = s.len_q * PACK;
    uvec2 at = head_and_reversed_tile(p.heads / PACK);
    uint head0 = at.x * PACK, row0 = at.y * BR;
    if (row0 >= rows)
        return;
    uint head_kv = head0 / p.group;

    Rows q_rows = rows_of(p.q, 0, p.head_dim, rows);
    uint64_t q_at[TR];
    if (DIRECT)
        [[unroll]] for (uint r = 0; r < TR; ++r) {
            uint row = min(row0 + rg + r * RG, rows - 1);
            q_at[r] = query_address(p.q, s, head0 + row % PACK, row / PACK);
        }
    else
        LOAD(s_q, BR, Q_STRIDE, D, q_rows, row0, query_address(p.q, s, head0 + row % PACK, row / PACK))

    float m[TR], l[TR], slope[TR];
    vec4 acc[TR][DT];
    [[unroll]] for (uint r = 0; r < TR; ++r) {
        m[r] = LOWEST;
        l[r] = 0.0;
        slope[r] = slope_of(s, head0 + (row0 + rg + r * RG) % PACK, HAS_SLOPES);
        [[unroll]] for (uint d = 0; d < DT; ++d)
            acc[r][d] = vec4(0.0);
    }

    uint i_first = row0 / PACK, i_last = min((row0 + BR - 1) / PACK, s.len_q - 1);
    uvec2 keys = visible_keys(s, i_first, i_last);
    if (SPLIT) {
        uint chunk = (s.len_k + p.splits * BC - 1) / (p.splits * BC) * BC;
        keys = uvec2(max(keys.x, split * chunk), min(keys.y, (split + 1) * chunk));
    }
    Rows k_rows = rows_of(p.k, key_address(p.k, s, head_kv, 0, false), p.head_dim, keys.y);
    Rows v_rows = rows_of(p.v, key_address(p.v, s, head_kv, 0, false), p.head_dim_v, keys.y);
    float softmax_scale = p.softmax_scale;
    uint j_first = keys.x / BC * BC;
    vec4 k_next[VECTORS(BC, D)], v_next[VECTORS(BC, DV)];
    FETCH_TILE(k_next, BC, D, k_rows, j_first, K_ADDRESS)
    for (uint j0 = j_first; j0 < keys.y; j0 += BC) {
        STORE_TILE(k_next, s_tile, BC, Q_STRIDE, D, k_rows, j0, K_ADDRESS)
        barrier();
        FETCH_TILE(v_next, BC, DV, v_rows, j0, V_ADDRESS)
        float scores[TR][TC];
        MULTIPLY(scores, Q_VECTOR, Q_STRIDE, D)

        bool masked = !all_visible(s, i_first, i_last, j0, j0 + BC - 1);
        float m_new[TR];
        [[unroll]] for (uint r = 0; r < TR; ++r) {
            uint row = row0 + rg + r * RG, i = row / PACK;
            m_new[r] = m[r];
            [[unroll]] for (uint c = 0; c < TC; ++c) {
                uint j = j0 + cg + c * CG;
                // To base e, with the factors of the backward pass: lse is then rounded once.
                scores[r][c] = HAS_CAP ? p.cap * LN_2 * capped(scores[r][c] * p.scale) : scores[r][c] * softmax_scale;
                if (HAS_BIAS || HAS_SLOPES)
                    scores[r][c] += added(s, head0 + row % PACK, i, j, slope[r], HAS_SLOPES, HAS_BIAS);
                if (masked && !is_visible(s, i, j))
                    scores[r][c] = LOWEST;
                m_new[r] = max(m_new[r], scores[r][c]);
            }
        }
        reduce_max(m_new, rg, cg);
        [[unroll]] for (uint r = 0; r < TR; ++r) {
            float factor = exp2((m[r] - m_new[r]) * LOG2_E);
            m[r] = m_new[r];
            l[r] *= factor;
            [[unroll]] for (uint d = 0; d < DT; ++d)
                acc[r][d] *= factor;
            [[unroll]] for (uint c = 0; c < TC; ++c) {
                scores[r][c] = scores[r][c] > LOWEST ? exp2((scores[r][c] - m[r]) * LOG2_E) : 0.0;
                l[r] += scores[r][c];
            }
        }
        SHARE(scores)
        barrier();
        STORE_TILE(v_next, s_tile, BC, V_STRIDE, DV, v_rows, j0, V_ADDRESS)
        barrier();
        FETCH_TILE(k_next, BC, D, k_rows, j0 + BC, K_ADDRESS)
        ACCUMULATE(acc, V_STRIDE)
        barrier();
    }

    reduce_sum(l, rg, cg);
    [[unroll]] for (uint r = 0; r < TR; ++r) {
        uint row = row0 + rg + r * RG, i = row / PACK, head = head0 + row % PACK;
        if (row >= rows)
            continue;
        float keep = 1.0;
        if (!SPLIT && p.sinks != 0) {
            float sink = float_or(p.sinks, head, LOWEST);
            float top = max(m[r], sink);
            keep = exp2((m[r] - top) * LOG2_E);
            l[r] = l[r] * keep + exp2((sink - top) * LOG2_E);
            m[r] = top;
        }
        if (SPLIT) {
            uint64_t part = part_row(s, split, head, i);
            if (cg == 0)
                write_floats(p.part_sums + part * 8, vec2(m[r], l[r]));
            [[unroll]] for (uint d = 0; d < DT; ++d)
                [[unroll]] for (uint e = 0; e < 4; ++e)
                    if ((d * CG + cg) * 4 + e < p.head_dim_v)
                        write_float(p.part_out + (part * p.head_dim_v + (d * CG + cg) * 4 + e) * 4, acc[r][d][e]);
            continue;
        }
        float norm = l[r] > 0.0 ? keep / l[r] : 0.0;
        if (cg == 0)
            write_float(statistic_address(p.lse, s, head, i), l[r] > 0.0 ? log_sum(m[r], l[r]) : MINUS_INFINITY);
        uint64_t out_row = query_address(p.out_, s, head, i);
        [[unroll]] for (uint d = 0; d < DT; ++d)
            store4(out_row, p.out_.element, (d * CG + cg) * 4, p.head_dim_v, ALIGNED, acc[r][d] * norm);
    }
}
