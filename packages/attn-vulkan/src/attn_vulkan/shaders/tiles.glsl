// Products of tiles in shared memory by a grid of RG x CG invocations: each has TR rows and TC columns
// of a block of scores, and TR rows and DT vectors of an accumulator. Column cg TC + c of s_weights
// holds column cg + c CG of a block, so that its writes are vectors.

#ifdef SUBGROUP
#define THREAD (gl_SubgroupID * gl_SubgroupSize + gl_SubgroupInvocationID)
#else
#define THREAD gl_LocalInvocationIndex
#endif

const uint RG = WG / CG;
const uint TR = BR / RG;
const uint TC = BC / CG;
const uint P_STRIDE = BC / 4 + 1;

shared vec4 s_weights[BR * P_STRIDE];

// Vectors of a tile that one invocation moves, and whether it has registers to hold them meanwhile.
#define VECTORS(tall, dim) (((tall) * (dim / 4) + WG - 1) / WG)
#define IS_AHEAD(tall, dim) (VECTORS(tall, dim) <= 8)

// x = this invocation's vectors of the tile of `tall` rows from row `start` on, 0 past the end;
// `address` is that of `row`. All are on their way before the first is waited for.
#define FETCH(x, tall, dim, rows, start, address) \
    if (ALIGNED && (tall) * (dim / 4) % WG == 0 && rows.size == dim && (start) + (tall) <= rows.count) { \
        [[unroll]] for (uint n = 0; n < VECTORS(tall, dim); ++n) { \
            uint e = t + n * WG, row = (start) + e / (dim / 4); \
            x[n] = widen4(Element4(address + e % (dim / 4) * 4 * T_BYTES).value); \
        } \
    } else { \
        [[unroll]] for (uint n = 0; n < VECTORS(tall, dim); ++n) { \
            uint e = t + n * WG, row = (start) + e / (dim / 4); \
            x[n] = vec4(0.0); \
            if (e < (tall) * (dim / 4) && row < rows.count) \
                x[n] = load4(address, rows.element, e % (dim / 4) * 4, rows.size, ALIGNED); \
        } \
    }

#define STORE_FETCHED(x, shared_tile, tall, stride, dim) \
    [[unroll]] for (uint n = 0; n < VECTORS(tall, dim); ++n) { \
        uint e = t + n * WG; \
        if (e < (tall) * (dim / 4)) \
            shared_tile[e / (dim / 4) * stride + e % (dim / 4)] = x[n]; \
    }

#define LOAD_ONE_BY_ONE(shared_tile, tall, stride, dim, rows, start, address) \
    for (uint e = t; e < (tall) * (dim / 4); e += WG) { \
        uint row = (start) + e / (dim / 4); \
        vec4 x = vec4(0.0); \
        if (row < rows.count) \
            x = load4(address, rows.element, e % (dim / 4) * 4, rows.size, ALIGNED); \
        shared_tile[e / (dim / 4) * stride + e % (dim / 4)] = x; \
    }

// Begin to load a tile, and have it in shared memory: all of it then, where registers do not hold it.
#define FETCH_TILE(x, tall, dim, rows, start, address) \
    if (IS_AHEAD(tall, dim)) \
        FETCH(x, tall, dim, rows, start, address)

#define STORE_TILE(x, shared_tile, tall, stride, dim, rows, start, address) \
    if (IS_AHEAD(tall, dim)) { \
        STORE_FETCHED(x, shared_tile, tall, stride, dim) \
    } else { \
        LOAD_ONE_BY_ONE(shared_tile, tall, stride, dim, rows, start, address) \
    }

// Unaligned rows are loaded one by one, which keeps that code small.
#define LOAD(shared_tile, tall, stride, dim, rows, start, address) \
    if (ALIGNED) { \
        vec4 x[VECTORS(tall, dim)]; \
        FETCH(x, tall, dim, rows, start, address) \
        STORE_FETCHED(x, shared_tile, tall, stride, dim) \
    } else { \
        LOAD_ONE_BY_ONE(shared_tile, tall, stride, dim, rows, start, address) \
    }

// Vectors of the rows that a workgroup keeps: in shared memory, or DIRECT, by way of the cache.
// NVIDIA's driver gives all workgroups of a multiprocessor 48 KiB of shared memory together.
#if DTYPE == 32
layout(buffer_reference, scalar, buffer_reference_align = 16) readonly buffer Cached4 { vec4 value; };
#else
layout(buffer_reference, scalar, buffer_reference_align = 8) readonly buffer Cached4 { uvec2 value; };
#endif
#define KEPT(r, d, shared_rows, stride, addresses) \
    (DIRECT ? widen4(Cached4(addresses[r] + (d) * 4 * T_BYTES).value) : shared_rows[(rg + r * RG) * stride + d])

// block[r][c] = row rg + r RG of `rows` times row cg + c CG of s_tile. Summed in two levels: one
// long chain of roundings would show in float32. The backward pass has to round as the forward pass
// did, or the weight of a large score is wrong by the difference.
#define MULTIPLY(block, rows, stride, dim) \
    [[unroll]] for (uint r = 0; r < TR; ++r) \
        [[unroll]] for (uint c = 0; c < TC; ++c) \
            block[r][c] = 0.0; \
    for (uint d0 = 0; d0 < dim / 4; d0 += 8) { \
        float part[TR][TC]; \
        [[unroll]] for (uint r = 0; r < TR; ++r) \
            [[unroll]] for (uint c = 0; c < TC; ++c) \
                part[r][c] = 0.0; \
        for (uint d = d0; d < min(d0 + 8, dim / 4); ++d) { \
            vec4 y[TC]; \
            [[unroll]] for (uint c = 0; c < TC; ++c) \
                y[c] = s_tile[(cg + c * CG) * stride + d]; \
            [[unroll]] for (uint r = 0; r < TR; ++r) { \
                vec4 x = rows(r, d); \
                [[unroll]] for (uint c = 0; c < TC; ++c) \
                    [[unroll]] for (uint e = 0; e < 4; ++e) \
                        part[r][c] = fma(x[e], y[c][e], part[r][c]); \
            } \
        } \
        [[unroll]] for (uint r = 0; r < TR; ++r) \
            [[unroll]] for (uint c = 0; c < TC; ++c) \
                block[r][c] += part[r][c]; \
    }

#define SHARE(block) \
    [[unroll]] for (uint r = 0; r < TR; ++r) \
        [[unroll]] for (uint c = 0; c < TC; c += 4) \
            s_weights[(rg + r * RG) * P_STRIDE + (cg * TC + c) / 4] = \
                vec4(block[r][c], block[r][c + 1], block[r][c + 2], block[r][c + 3]);

// acc += s_weights s_tile
#define ACCUMULATE(acc, stride) \
    for (uint g = 0; g < CG; ++g) \
        [[unroll]] for (uint c = 0; c < TC; c += 4) { \
            vec4 weights[TR]; \
            [[unroll]] for (uint r = 0; r < TR; ++r) \
                weights[r] = s_weights[(rg + r * RG) * P_STRIDE + (g * TC + c) / 4]; \
            [[unroll]] for (uint e = 0; e < 4; ++e) \
                [[unroll]] for (uint d = 0; d < DT; ++d) { \
                    vec4 y = s_tile[(g + (c + e) * CG) * stride + d * CG + cg]; \
                    [[unroll]] for (uint r = 0; r < TR; ++r) \
                        acc[r][d] = fma(vec4(weights[r][e]), y, acc[r][d]); \
                } \
        }

