// What every attention shader shares: the problem, its tensors and the meaning of a score.

#extension GL_EXT_buffer_reference : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_control_flow_attributes : require
#extension GL_EXT_shader_16bit_storage : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require

// A tensor of (batch, row, head, element); strides count elements.
struct View {
    uint64_t address;
    int64_t batch;
    int64_t row;
    int64_t head;
    int64_t element;
};

// The order and types are those of `attn_vulkan.launch.Parameters`.
layout(buffer_reference, scalar, buffer_reference_align = 8) readonly buffer Parameters {
    View q;
    View k;
    View v;
    View out_;
    View dout;
    View dq;
    View dk;
    View dv;
    View bias;     // (batch, query, head, key)
    View lse;      // (batch, query, head), float32
    View delta;    // (batch, query, head), float32
    View slopes;   // (batch, -, head), float32
    uint64_t sinks;        // (head), float32; 0 for none
    uint64_t cu_q;         // (batch + 1), int32; 0 where sequences are not packed
    uint64_t cu_k;
    uint64_t lens_k;       // (batch), int32; 0 where cu_k or len_k says it
    uint64_t blocks;       // (batch, max_blocks), int32: the block table of a paged cache
    int64_t blocks_stride;
    uint64_t part_out;     // (split, batch, head, query, head_dim_v), float32
    uint64_t part_sums;    // (split, batch, head, query, 2), float32: the largest score, and the sum
    uint batches;
    uint heads;
    uint group;            // query heads of one key head
    uint len_q;
    uint len_k;
    uint head_dim;
    uint head_dim_v;
    uint block_size;
    uint splits;
    int left;              // the window; as large as need be where a side is open
    int right;
    float scale;           // of q k: to base 2, or to units of the cap
    float cap;             // softcap log2(e)
    float softmax_scale;
};
layout(push_constant, scalar) uniform Push { Parameters p; };

layout(buffer_reference, scalar, buffer_reference_align = 4) buffer Float { float value; };
layout(buffer_reference, scalar, buffer_reference_align = 8) buffer Floats { vec2 value; };
layout(buffer_reference, scalar, buffer_reference_align = 4) readonly buffer Int { int value; };

const float LOG2_E = 1.4426950408889634;
const float LOG2_E_LOW = 1.9259629911e-8;  // what float32 cuts off LOG2_E
const float LN_2 = 0.6931471805599453;
const float LN_2_HIGH = 0.693359375;  // 9 bits, and the rest of LN_2
const float LN_2_LOW = -2.1219444e-4;
// Below every score. A finite number: not every driver computes with infinities.
const float LOWEST = -1.0e30;
const float MINUS_INFINITY = uintBitsToFloat(0xff800000u);

#if DTYPE == 32
#define T_BYTES 4
layout(buffer_reference, scalar, buffer_reference_align = 4) buffer Element { float value; };
layout(buffer_reference, scalar, buffer_reference_align = 16) buffer Element4 { vec4 value; };
float read_element(uint64_t address) { return Element(address).value; }
void write_element(uint64_t address, float x) { Element(address).value = x; }
vec4 widen4(vec4 x) { return x; }
vec4 narrow4(vec4 x) { return x; }
#else
#define T_BYTES 2
layout(buffer_reference, scalar, buffer_reference_align = 2) buffer Element { uint16_t value; };
layout(buffer_reference, scalar, buffer_reference_align = 8) buffer Element4 { uvec2 value; };
#if DTYPE == 16
float widen(uint x) { return unpackHalf2x16(x).x; }
uint narrow2(vec2 x) { return packHalf2x16(x); }
vec4 widen4(uvec2 x) { return vec4(unpackHalf2x16(x.x), unpackHalf2x16(x.y)); }
#else
float widen(uint x) { return uintBitsToFloat(x << 16); }
// Round to the nearest, ties to even; attention has no NaN to keep.
uint narrow2(vec2 x) {
    uvec2 bits = floatBitsToUint(x);
    bits += 0x7fffu + (bits >> 16 & 1u);
    return bits.x >> 16 | (bits.y & 0xffff0000u);
}
vec4 widen4(uvec2 x) {
    return uintBitsToFloat(uvec4(x.x << 16, x.x & 0xffff0000u, x.y << 16, x.y & 0xffff0000u));
}
#endif
float read_element(uint64_t address) { return widen(uint(Element(address).value)); }
void write_element(uint64_t address, float x) {
    Element(address).value = uint16_t(narrow2(vec2(x, 0.0)));
}
uvec2 narrow4(vec4 x) { return uvec2(narrow2(x.xy), narrow2(x.zw)); }
#endif

// One sequence of the batch: its lengths and where its rows start.
struct Sequence {
    uint batch;
    uint len_q;
    uint len_k;
    uint row_q;
    uint row_k;
};

int read_int(uint64_t address, uint index) {
    return Int(address + uint64_t(index) * 4).value;
}

// Where to read an array that may be absent. A compiler may read ahead of the condition that it is
// there, as Mesa 26 does, and on a CPU address 0 is a fault.
uint64_t readable(uint64_t array, uint index) {
    return array != 0 ? array + uint64_t(index) * 4 : uint64_t(p);
}

uint int_or(uint64_t array, uint index, uint otherwise) {
    uint value = Int(readable(array, index)).value;
    return array != 0 ? value : otherwise;
}

float float_or(uint64_t array, uint index, float otherwise) {
    float value = Float(readable(array, index)).value;
    return array != 0 ? value : otherwise;
}

Sequence sequence(uint batch) {
    Sequence s = Sequence(batch, 0, 0, int_or(p.cu_q, batch, 0), int_or(p.cu_k, batch, 0));
    s.len_q = int_or(p.cu_q, batch + 1, p.len_q) - s.row_q;
    s.len_k = int_or(p.lens_k, batch, int_or(p.cu_k, batch + 1, p.len_k) - s.row_k);
    return s;
}

uint64_t row_address(View t, Sequence s, uint head, uint row) {
    int64_t element = t.batch * s.batch + t.row * row + t.head * head;
    return t.address + element * T_BYTES;
}

uint64_t query_address(View t, Sequence s, uint head, uint i) {
    return row_address(t, s, head, s.row_q + i);
}

uint64_t key_address(View t, Sequence s, uint head, uint j, bool paged) {
    if (!paged)
        return row_address(t, s, head, s.row_k + j);
    uint64_t table = p.blocks + p.blocks_stride * s.batch * 4;
    int64_t block = read_int(table, j / p.block_size);
    int64_t element = t.batch * block + t.row * (j % p.block_size) + t.head * head;
    return t.address + element * T_BYTES;
}

// Rows of one head, for loops: what an address takes is read once, where p would be read each time.
struct Rows {
    uint64_t first;
    int64_t step;  // bytes
    int64_t element;
    uint size;
    uint count;
};

Rows rows_of(View t, uint64_t first, uint size, uint count) {
    return Rows(first, t.row * T_BYTES, t.element, size, count);
}

uint64_t row_at(Rows rows, uint row) {
    return rows.first + rows.step * int64_t(row);
}

uint64_t statistic_address(View t, Sequence s, uint head, uint i) {
    return t.address + (t.batch * s.batch + t.row * (s.row_q + i) + t.head * head) * 4;
}

float read_float(uint64_t address) {
    return Float(address).value;
}

void write_float(uint64_t address, float value) {
    Float(address).value = value;
}

void write_floats(uint64_t address, vec2 values) {
    Floats(address).value = values;
}

// Row of a query among the partial results of split keys.
uint64_t part_row(Sequence s, uint split, uint head, uint i) {
    return ((uint64_t(split) * p.batches + s.batch) * p.heads + head) * p.len_q + i;
}

// Elements d to d + 3 of a row, 0 past its end.
vec4 load4(uint64_t row, int64_t stride, uint d, uint size, bool aligned) {
    if (aligned)
        return d < size ? widen4(Element4(row + d * T_BYTES).value) : vec4(0.0);
    vec4 x = vec4(0.0);
    [[unroll]] for (uint i = 0; i < 4; ++i)
        if (d + i < size)
            x[i] = read_element(row + (d + i) * stride * T_BYTES);
    return x;
}

void store4(uint64_t row, int64_t stride, uint d, uint size, bool aligned, vec4 x) {
    if (aligned) {
        if (d < size)
            Element4(row + d * T_BYTES).value = narrow4(x);
        return;
    }
    [[unroll]] for (uint i = 0; i < 4; ++i)
        if (d + i < size)
            write_element(row + (d + i) * stride * T_BYTES, x[i]);
}

// Head and tile of rows of a workgroup. A few heads together go through their tiles, so that of
// causal problems the longest tiles start first, and the heads at work at a time fit a cache.
uvec2 head_and_tile(uint heads) {
    const uint together = 16;
    uint tiles = gl_NumWorkGroups.x / heads;
    uint first = gl_WorkGroupID.x / (tiles * together) * together;
    uint count = min(heads - first, together), rest = gl_WorkGroupID.x - first * tiles;
    return uvec2(first + rest % count, rest / count);
}

uvec2 head_and_reversed_tile(uint heads) {
    uvec2 at = head_and_tile(heads);
    return uvec2(at.x, gl_NumWorkGroups.x / heads - 1 - at.y);
}

// Keys that queries i_first to i_last see, as a half-open range.
uvec2 visible_keys(Sequence s, uint i_first, uint i_last) {
    int shift = int(s.len_k) - int(s.len_q);
    int first = max(int(i_first) + shift - p.left, 0);
    int end = min(int(i_last) + shift + p.right + 1, int(s.len_k));
    return uvec2(first, max(end, first));
}

// Queries that see one of keys j_first to j_last.
uvec2 seeing_queries(Sequence s, uint j_first, uint j_last) {
    int shift = int(s.len_k) - int(s.len_q);
    int first = max(int(j_first) - shift - p.right, 0);
    int end = min(int(j_last) - shift + p.left + 1, int(s.len_q));
    return uvec2(first, max(end, first));
}

bool is_visible(Sequence s, uint i, uint j) {
    int distance = int(j) - int(i) - (int(s.len_k) - int(s.len_q));
    return j < s.len_k && i < s.len_q && distance >= -p.left && distance <= p.right;
}

// Whether a block of scores needs no mask.
bool all_visible(Sequence s, uint i_first, uint i_last, uint j_first, uint j_last) {
    int shift = int(s.len_k) - int(s.len_q);
    return j_last < s.len_k && i_last < s.len_q
        && int(j_first) - int(i_last) - shift >= -p.left
        && int(j_last) - int(i_first) - shift <= p.right;
}

// tanh by its series near 0, where the quotient would cancel.
float capped(float x) {
    float y = x * x;
    if (y < 0.0625)
        return x * (1.0 - y * (1.0 / 3.0 - y * (2.0 / 15.0 - y * (17.0 / 315.0 - y * 62.0 / 2835.0))));
    return 1.0 - 2.0 / (exp2(min(x, 20.0) * (2.0 * LOG2_E)) + 1.0);
}

// top + log(sum) of a normal sum, rounded once: by the error of lse every weight of the backward pass
// is off. A driver's logarithm may err by three roundings.
float log_sum(float top, float sum) {
    int exponent;
    float m = frexp(sum, exponent);
    if (m < 0.70710678) {
        m *= 2.0;
        exponent -= 1;
    }
    float y = (m - 1.0) / (m + 1.0), z = y * y;
    float series = 2.0 * y * (1.0 + z * (1.0 / 3.0 + z * (1.0 / 5.0 + z * (1.0 / 7.0 + z / 9.0))));
    precise float powers = float(exponent) * LN_2_HIGH;  // exact
    precise float whole = top + powers;
    precise float taken = whole - top;
    precise float lost = (top - (whole - taken)) + (powers - taken);
    return whole + (lost + fma(float(exponent), LN_2_LOW, series));
}

// What is added to a score: ALiBi and the bias.
float added(Sequence s, uint head, uint i, uint j, float slope, bool has_slopes, bool has_bias) {
    float x = 0.0;
    if (has_slopes) {
        int distance = int(j) - int(i) - (int(s.len_k) - int(s.len_q));
        x -= slope * float(abs(distance));
    }
    if (has_bias && is_visible(s, i, j)) {
        int64_t element = p.bias.batch * s.batch + p.bias.row * i + p.bias.head * head + p.bias.element * j;
        x += read_element(p.bias.address + element * T_BYTES);
    }
    return x;
}

float slope_of(Sequence s, uint head, bool has_slopes) {
    if (!has_slopes)
        return 0.0;
    return read_float(p.slopes.address + (p.slopes.batch * s.batch + p.slopes.head * head) * 4);
}
