// Merge attention over parts of the keys, each with its largest score m_s and its sum l_s of weights:
// out = sum_s exp(m_s - m) out_s / sum_s exp(m_s - m) l_s. One workgroup a row.
#version 460
#include "attention.glsl"

layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint WG = 64;

const uint MAX_SPLITS = 1024;  // as in attn_vulkan.variants
const uint TOGETHER = 16;      // parts read at a time

shared vec2 s_sums[MAX_SPLITS];

// Column d of parts `first` and on.
#define FETCH(part, first, d) \
    [[unroll]] for (uint n = 0; n < TOGETHER; ++n) \
        part[n] = (first) + n < splits && d < dim ? read_float(parts + (((first) + n) * rows * dim + d) * 4) : 0.0;

void main() {
    uint t = gl_LocalInvocationIndex, i = gl_WorkGroupID.x, head = gl_WorkGroupID.y;
    Sequence s = sequence(gl_WorkGroupID.z);
    if (i >= s.len_q)
        return;
    uint splits = p.splits, dim = p.head_dim_v;
    uint64_t rows = uint64_t(p.batches) * p.heads * p.len_q;
    uint64_t sums = p.part_sums + part_row(s, 0, head, i) * 8;
    uint64_t parts = p.part_out + part_row(s, 0, head, i) * dim * 4;
    for (uint split = t; split < splits; split += WG)
        s_sums[split] = Floats(sums + split * rows * 8).value;
    float part[TOGETHER];
    FETCH(part, 0, t)  // on their way together with the sums
    barrier();

    float sink = float_or(p.sinks, head, LOWEST), top = sink, total = 0.0;
    for (uint split = 0; split < splits; ++split)
        top = max(top, s_sums[split].x);
    for (uint split = 0; split < splits; ++split)
        total += s_sums[split].y * exp2((s_sums[split].x - top) * LOG2_E);
    total += sink > LOWEST ? exp2((sink - top) * LOG2_E) : 0.0;
    if (t == 0)
        write_float(statistic_address(p.lse, s, head, i), total > 0.0 ? log_sum(top, total) : MINUS_INFINITY);

    float norm = total > 0.0 ? 1.0 / total : 0.0;
    uint64_t out_row = query_address(p.out_, s, head, i);
    for (uint d = t; d < dim; d += WG) {
        float x = 0.0;
        for (uint first = 0; first < splits; first += TOGETHER) {
            if (first > 0 || d > t)
                FETCH(part, first, d)
            [[unroll]] for (uint n = 0; n < TOGETHER; ++n)
                if (first + n < splits)
                    x += exp2((s_sums[first + n].x - top) * LOG2_E) * part[n];
        }
        write_element(out_row + d * p.out_.element * T_BYTES, x * norm);
    }
}
