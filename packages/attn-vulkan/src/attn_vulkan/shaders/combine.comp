// Merge attention over parts of the keys, each with its largest score m_s and its sum l_s of weights:
// out = sum_s exp(m_s - m) out_s / sum_s exp(m_s - m) l_s. One workgroup a row.
#version 460
#include "attention.glsl"

layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint WG = 64;

void main() {
    uint i = gl_WorkGroupID.x, head = gl_WorkGroupID.y;
    Sequence s = sequence(gl_WorkGroupID.z);
    if (i >= s.len_q)
        return;
    uint64_t row = part_row(s, 0, head, i);
    uint64_t rows = uint64_t(p.batches) * p.heads * p.len_q;
    float sink = float_or(p.sinks, head, LOWEST);
    float top = sink;
    for (uint split = 0; split < p.splits; ++split)
        top = max(top, Floats(p.part_sums + (split * rows + row) * 8).value.x);
    float total = sink > LOWEST ? exp2((sink - top) * LOG2_E) : 0.0;
    for (uint split = 0; split < p.splits; ++split) {
        vec2 sums = Floats(p.part_sums + (split * rows + row) * 8).value;
        total += sums.y * exp2((sums.x - top) * LOG2_E);
    }
    float norm = total > 0.0 ? 1.0 / total : 0.0;
    if (gl_LocalInvocationIndex == 0)
        write_float(statistic_address(p.lse, s, head, i), total > 0.0 ? log_sum(top, total) : MINUS_INFINITY);
    uint64_t out_row = query_address(p.out_, s, head, i);
    for (uint d = gl_LocalInvocationIndex; d < p.head_dim_v; d += WG) {
        float x = 0.0;
        for (uint split = 0; split < p.splits; ++split) {
            float weight = exp2((Floats(p.part_sums + (split * rows + row) * 8).value.x - top) * LOG2_E);
            x += weight * read_float(p.part_out + ((split * rows + row) * p.head_dim_v + d) * 4);
        }
        write_element(out_row + d * p.out_.element * T_BYTES, x * norm);
    }
}
