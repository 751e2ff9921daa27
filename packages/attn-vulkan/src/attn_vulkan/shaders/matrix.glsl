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

// Row of the half h of a matrix, or of several below one another.
uint half_row(uint h) {
    return gl_SubgroupInvocationID / 4 + 8 * h;
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

// Two neighbours of a row.
void store2(uint64_t row, int64_t stride, uint d, uint size, bool aligned, float x, float y) {
    if (aligned) {
        if (d < size)
            Pair(row + d * T_BYTES).value = narrow2(vec2(x, y));
        return;
    }
    if (d < size)
        write_element(row + d * stride * T_BYTES, x);
    if (d + 1 < size)
        write_element(row + (d + 1) * stride * T_BYTES, y);
}

void write_part(Sequence s, uint split, uint head, uint i, uint d, vec2 x) {
    uint64_t row = p.part_out + part_row(s, split, head, i) * p.head_dim_v * 4;
    if (d < p.head_dim_v)
        write_float(row + d * 4, x.x);
    if (d + 1 < p.head_dim_v)
        write_float(row + (d + 1) * 4, x.y);
}

uint thread() {
    return gl_SubgroupID * gl_SubgroupSize + gl_SubgroupInvocationID;
}

// Tiles of `count` rows of `dim` halves pass through s_tiles, a row every dim / 8 + 1 vectors, which
// keeps the rows of a matrix in different banks. Arguments named `address` and `in_range` use `row`.
// Shaders say whether rows are ALIGNED and PAGED.

// Where this invocation's vector of row 0 is, if every invocation keeps to one column of vectors.
uint64_t lane_of(Rows rows, uint dim) {
    return row_at(rows, thread() / (dim / 8)) + thread() % (dim / 8) * 16;
}

// x = this invocation's vectors of the tile of `tall` rows from row `start` on; `lane` is lane_of
// the rows, which makes an address a sum; `address` is that of `row` where it cannot be
#define FETCH_TILE(x, tall, dim, rows, lane, start, address) { \
    const uint rise = WG / (dim / 8); \
    const bool keeps_column = ALIGNED && !PAGED && WG % (dim / 8) == 0 && (tall) * (dim / 8) % WG == 0; \
    uint64_t from = lane + rows.step * int64_t(start); \
    if (keeps_column && rows.size == dim && (start) + (tall) <= rows.count) { \
        [[unroll]] for (uint n = 0; n < (tall) * (dim / 8) / WG; ++n) \
            x[n] = Element8(from + int64_t(n * rise) * rows.step).value; \
    } else if (keeps_column) { \
        [[unroll]] for (uint n = 0; n < (tall) * (dim / 8) / WG; ++n) { \
            x[n] = uvec4(0); \
            if ((start) + thread() / (dim / 8) + n * rise < rows.count && thread() % (dim / 8) * 8 < rows.size) \
                x[n] = Element8(from + int64_t(n * rise) * rows.step).value; \
        } \
    } else { \
        [[unroll]] for (uint n = 0; n < ((tall) * (dim / 8) + WG - 1) / WG; ++n) { \
            uint e = thread() + n * WG, row = (start) + e / (dim / 8); \
            x[n] = uvec4(0); \
            if (e < (tall) * (dim / 8) && row < rows.count) \
                x[n] = load8(address, rows.element, e % (dim / 8) * 8, rows.size, ALIGNED); \
        } \
    } }

// The same for keys `start` to `start` + BC - 1 out of `keys`, with few instructions and registers
// where rows are dense: those past the end repeat `last_key`, for their scores to be masked. No branch
// is around it: behind one NVIDIA's driver may order the loop worse, by 6 %. `lane_row` is the row of
// this invocation's first vector.
#define FETCH_KEYS(x, dim, lane_row, rows, lane, step, start, address) \
    if (ALIGNED && !PAGED && WG % (dim / 8) == 0 && BC * (dim / 8) % WG == 0) { \
        [[unroll]] for (uint n = 0; n < BC * (dim / 8) / WG; ++n) { \
            uint key = min((start) + lane_row + n * (WG / (dim / 8)), last_key); \
            x[n] = Element8(lane + uint64_t(key) * step).value; \
        } \
    } else { \
        FETCH_TILE(x, BC, dim, rows, lane, start, address) \
    }

// Where this invocation's vector of key 0 is; columns past the end repeat the last vector. Without
// keys it is where something may be read.
uint64_t key_lane_of(Rows rows, uint dim) {
    uint64_t first = rows.count > 0 ? rows.first : uint64_t(p);
    return first + min(thread() % (dim / 8) * 8, max(rows.size, 8) - 8) * T_BYTES;
}

// Keys that queries i_first to i_last all see, as a half-open range.
ivec2 shared_keys(Sequence s, uint i_first, uint i_last) {
    int shift = int(s.len_k) - int(s.len_q);
    return ivec2(int(i_last) + shift - p.left, min(int(i_first) + shift + p.right + 1, int(s.len_k)));
}

#define STORE_TILE(x, count, dim, base) \
    [[unroll]] for (uint n = 0; n < ((count) * (dim / 8) + WG - 1) / WG; ++n) { \
        uint e = thread() + n * WG; \
        if (e < (count) * (dim / 8)) \
            s_tiles[base + e / (dim / 8) * (dim / 8 + 1) + e % (dim / 8)] = x[n]; \
    }

// The subgroup's 16 rows in registers, by way of shared memory.
#define LOAD_ROWS(rows, count, dim, address, view, size, in_range) \
    for (uint e = thread(); e < (count) * (dim / 8); e += WG) { \
        uint row = e / (dim / 8); \
        uvec4 x = uvec4(0); \
        if (in_range) \
            x = load8(address, view.element, e % (dim / 8) * 8, size, ALIGNED); \
        s_tiles[row * (dim / 8 + 1) + e % (dim / 8)] = x; \
    } \
    barrier(); \
    [[unroll]] for (uint d = 0; d < dim / 16; ++d) \
        coopMatLoad(rows[d], s_tiles, gl_SubgroupID * 16 * (dim / 8 + 1) + d * 2, dim / 8 + 1, gl_CooperativeMatrixLayoutRowMajor); \
    barrier();

// block = rows times the 16 rows of a tile from row 16 c on, transposed
#define MULTIPLY(block, rows, dim, base, c) { \
    block = ACCUMULATOR(0.0); \
    [[unroll]] for (uint d = 0; d < dim / 16; ++d) { \
        MATRIX_B x; \
        coopMatLoad(x, s_tiles, base + (c) * 16 * (dim / 8 + 1) + d * 2, dim / 8 + 1, gl_CooperativeMatrixLayoutColumnMajor); \
        block = coopMatMulAdd(rows[d], x, block); \
    } }

// acc += block times the 16 rows of a tile from row 16 c on
#define ACCUMULATE(acc, block, dim, base, c) { \
    MATRIX_A operand; \
    [[unroll]] for (uint e = 0; e < LENGTH; ++e) \
        operand[e] = HALF(block[e]); \
    [[unroll]] for (uint d = 0; d < dim / 16; ++d) { \
        MATRIX_B x; \
        coopMatLoad(x, s_tiles, base + (c) * 16 * (dim / 8 + 1) + d * 2, dim / 8 + 1, gl_CooperativeMatrixLayoutRowMajor); \
        acc[d] = coopMatMulAdd(operand, x, acc[d]); \
    } }

// Indices that unrolling makes constant, or the accumulators would live in memory.
#define STORE_ROWS(acc, dim, address, view, size, limit) \
    [[unroll]] for (uint d = 0; d < dim / 16; ++d) \
        [[unroll]] for (uint e = 0; e < LENGTH; e += 2) { \
            uint row = my_row0 + lane_row(e); \
            if (row < limit) \
                store2(address, view.element, d * 16 + lane_column(e), size, ALIGNED, acc[d][e], acc[d][e + 1]); \
        }
