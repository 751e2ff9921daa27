// Whether matrices are laid out as matrix.glsl says. Each invocation writes 1 for yes, 0 for no.
#version 460
#include "attention.glsl"
#include "matrix.glsl"

layout(local_size_x = 32) in;

shared HALF s_halves[256];
shared float s_floats[256];

void main() {
    uint lane = gl_SubgroupInvocationID;
    for (uint x = lane; x < 256; x += 32) {
        s_halves[x] = HALF(float(x));
        s_floats[x] = float(x);
    }
    barrier();
    MATRIX_A a;
    ACCUMULATOR c;
    coopMatLoad(a, s_halves, 0, 16, gl_CooperativeMatrixLayoutRowMajor);
    coopMatLoad(c, s_floats, 0, 16, gl_CooperativeMatrixLayoutRowMajor);
    bool known = a.length() == LENGTH && c.length() == LENGTH && gl_SubgroupSize == 32;
    if (known)
        for (uint e = 0; e < LENGTH; ++e) {
            float expected = float(lane_row(e) * 16 + lane_column(e));
            known = known && float(a[e]) == expected && c[e] == expected;
        }
    write_float(p.part_sums + lane * 4, known ? 1.0 : 0.0);
}
