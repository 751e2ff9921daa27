// Merge attention over parts of the keys, each with its largest score m_s and its sum l_s of weights:
// out = sum_s exp(m_s - m) out_s / sum_s exp(m_s - m) l_s. One workgroup a row.
#version 460
#include "attention.glsl"

layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint WG = 64;

const uint MAX_SPLITS = 1024;  // as in attn_vulkan.variants
const uint TOGETHER = 8;       // parts read at a time

shared float s_weights[MAX_SPLITS];
shared float s_found[WG];

float reduced(float x, bool is_sum) {
    uint t = gl_LocalInvocationIndex;
    s_found[t] = x;
    for (uint apart = WG / 2; apart > 0; apart /= 2) {
        barrier();
        if (t < apart)
            s_found[t] = is_sum ? s_found[t] + s_found[t + apart] : max(s_found[t], s_found[t + apart]);
    }
    barrier();
    float result = s_found[0];
    barrier();
    return result;
}

void main() {
    uint t = gl_LocalInvocationIndex, i = gl_WorkGroupID.x, head = gl_WorkGroupID.y;
    Sequence s = sequence(gl_WorkGroupID.z);
    if (i >= s.len_q)
        return;
    uint splits = p.splits, dim = p.head_dim_v;
    uint64_t rows = uint64_t(p.batches) * p.heads * p.len_q;
    uint64_t sums = p.part_sums + part_row(s, 0, head, i) * 8;
    uint64_t parts = p.part_out + part_row(s, 0, head, i) * dim * 4;
    float sink = float_or(p.sinks, head, LOWEST);

    float top = sink;
    for (uint split = t; split < splits; split += WG)
        top = max(top, Floats(sums + split * rows * 8).value.x);
    top = reduced(top, false);
    float total = 0.0;
    for (uint split = t; split < splits; split += WG) {
        vec2 part = Floats(sums + split * rows * 8).value;
        s_weights[split] = exp2((part.x - top) * LOG2_E);
        total += part.y * s_weights[split];
    }
    total = reduced(total, true) + (sink > LOWEST ? exp2((sink - top) * LOG2_E) : 0.0);
    if (t == 0)
        write_float(statistic_address(p.lse, s, head, i), total > 0.0 ? log_sum(top, total) : MINUS_INFINITY);

    float norm = total > 0.0 ? 1.0 / total : 0.0;
    uint64_t out_row = query_address(p.out_, s, head, i);
    for (uint d = t; d < dim; d += WG) {
        float x = 0.0;
        for (uint first = 0; first < splits; first += TOGETHER)
            [[unroll]] for (uint split = first; split < first + TOGETHER; ++split)
                if (split < splits)
                    x += s_weights[split] * read_float(parts + (split * rows * dim + d) * 4);
        write_element(out_row + d * p.out_.element * T_BYTES, x * norm);
    }
}
