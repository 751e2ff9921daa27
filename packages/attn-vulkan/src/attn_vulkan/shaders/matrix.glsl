// Matrices of one subgroup, 16 x 16, in a layout that `layout.comp` has verified: an invocation
// holds rows `lane / 4` and `lane / 4 + 8`, and operand A is laid out as the accumulator is. So
// scores become weights in registers, and the invocations of a row are four neighbours.

#extension GL_KHR_memory_scope_semantics : require
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_shader_subgroup_shuffle : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#if DTYPE == 116
#extension GL_EXT_bfloat16 : require
#define HALF bfloat16_t
#else
#define HALF float16_t
#endif

#define MATRIX_A coopmat<HALF, gl_ScopeSubgroup, 16, 16, gl_MatrixUseA>
#define MATRIX_B coopmat<HALF, gl_ScopeSubgroup, 16, 16, gl_MatrixUseB>
#define ACCUMULATOR coopmat<float, gl_ScopeSubgroup, 16, 16, gl_MatrixUseAccumulator>

const uint LENGTH = 8;      // components of a matrix in one invocation
const uint ROW_HALVES = 2;  // rows of a matrix in one invocation

uint lane_row(uint i) {
    return gl_SubgroupInvocationID / 4 + 8 * (i / 4);
}

uint lane_column(uint i) {
    return gl_SubgroupInvocationID % 4 * 2 + i % 2 + 8 * (i / 2 % 2);
}

float row_max(float x) {
    x = max(x, subgroupShuffleXor(x, 1));
    return max(x, subgroupShuffleXor(x, 2));
}

float row_sum(float x) {
    x += subgroupShuffleXor(x, 1);
    return x + subgroupShuffleXor(x, 2);
}

layout(buffer_reference, scalar, buffer_reference_align = 16) readonly buffer Element8 { uvec4 value; };
layout(buffer_reference, scalar, buffer_reference_align = 4) writeonly buffer Pair { uint value; };

// Elements d to d + 7 of a row, 0 past its end.
uvec4 load8(uint64_t row, int64_t stride, uint d, uint size, bool aligned) {
    if (aligned)
        return d < size ? Element8(row + d * T_BYTES).value : uvec4(0);
    uvec4 x = uvec4(0);
    [[unroll]] for (uint i = 0; i < 8; ++i)
        if (d + i < size)
            x[i / 2] |= uint(Element(row + (d + i) * stride * T_BYTES).value) << (i % 2 * 16);
    return x;
}

uint pack2(float x, float y) {
#if DTYPE == 16
    return packHalf2x16(vec2(x, y));
#else
    return rounded(x) >> 16 | (rounded(y) & 0xffff0000u);
#endif
}

// Two neighbours of a row.
void store2(uint64_t row, int64_t stride, uint d, uint size, bool aligned, float x, float y) {
    if (aligned) {
        if (d < size)
            Pair(row + d * T_BYTES).value = pack2(x, y);
        return;
    }
    if (d < size)
        Element(row + d * stride * T_BYTES).value = narrow(x);
    if (d + 1 < size)
        Element(row + (d + 1) * stride * T_BYTES).value = narrow(y);
}
