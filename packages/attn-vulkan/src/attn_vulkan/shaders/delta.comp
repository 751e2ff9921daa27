// delta_i = sum_d dout_id out_id - dlse_i, which every gradient of a score needs.
#version 460
#include "attention.glsl"

layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint WG = 64;
layout(constant_id = 1) const bool ALIGNED = false;
layout(constant_id = 2) const bool HAS_DLSE = false;

void main() {
    Sequence s = sequence(gl_WorkGroupID.z);
    uint i = gl_WorkGroupID.x * WG + gl_LocalInvocationIndex, head = gl_WorkGroupID.y;
    if (i >= s.len_q)
        return;
    uint64_t out_row = query_address(p.out_, s, head, i), dout_row = query_address(p.dout, s, head, i);
    vec4 sums = vec4(0.0);
    for (uint d = 0; d < p.head_dim_v; d += 4)
        sums += load4(out_row, p.out_.element, d, p.head_dim_v, ALIGNED)
            * load4(dout_row, p.dout.element, d, p.head_dim_v, ALIGNED);
    float total = (sums.x + sums.y) + (sums.z + sums.w);
    uint64_t address = statistic_address(p.delta, s, head, i);
    if (HAS_DLSE)  // delta holds dlse on entry
        total -= read_float(address);
    write_float(address, total);
}
