// Quantizing weights that another method has stored, straight from their codes and scales: the bytes
// are those of decoding them to 16 bits first (`kernels/src/sources.rs`).
//
// Threads take elements as in `quantize.cuh`. Eight of them that lie in one row and one tile, and
// where a word may be read, are decoded together; others one by one, wherever rows and tiles end.
#pragma once

#include "common.cuh"
#include "quantize.cuh"

// What codes mean. `kernels/src/cuda/sources.rs` has the same numbers.
static constexpr u32 E4M3 = 0;
static constexpr u32 E5M2 = 1;
static constexpr u32 E2M1 = 2;

// The value of a code, exactly. Multiplying with powers of two sets exponents right, those of
// subnormals too.
static __device__ float value_of_code(u32 kind, u32 code) {
    switch (kind) {
        case E4M3: {
            if ((code & 0x7fu) == 0x7fu) return __int_as_float(0x7fc00000);
            return __fmul_rn(__int_as_float(int((code & 0x80u) << 24 | (code & 0x7fu) << 20)), 0x1p120f);
        }
        // A binary16 without its last eight bits.
        case E5M2: return half_to_float(u16(code << 8));
        case E2M1: return __fmul_rn(__int_as_float(int((code & 8u) << 28 | (code & 7u) << 22)), 0x1p126f);
        // Four bits that are the value plus 8.
        default: return float(int(code) - 8);
    }
}

// Codes in rows, and a scale for each tile, row-major.
struct Source {
    // Of the first element.
    const u8* codes;
    // From the row of tiles on that the first element is in.
    const float* scales;
    u32 kind;
    u64 row_bytes;
    u32 columns, scale_columns;
    u32 tile_rows, tile_columns;
    // Where the first element is: the row in its tile, and the column.
    u32 first_row, first_column;

    __device__ Source(
        const u8* codes, const float* scales, u32 kind, u64 row_bytes, u32 columns, u32 tile_rows, u32 tile_columns,
        u32 first_row, u32 first_column)
        : codes(codes), scales(scales), kind(kind), row_bytes(row_bytes), columns(columns),
          scale_columns((columns - 1) / tile_columns + 1), tile_rows(tile_rows), tile_columns(tile_columns),
          first_row(first_row), first_column(first_column) {}

    __device__ bool has_two_in_a_byte() const { return kind >= E2M1; }
};

// Where an element is. Rows, and rows of tiles, are counted from the first element's on.
struct Position {
    u64 row;
    u32 column;
    u64 tile_row;
    u32 row_in_tile;

    // Of the element `distance` behind the first one.
    static __device__ Position of(const Source& source, u64 distance) {
        u64 column = source.first_column + distance;
        u64 row = column / source.columns;
        u64 row_of_tiles = source.first_row + row;
        u64 tile_row = row_of_tiles / source.tile_rows;
        return {row, u32(column - row * source.columns), tile_row, u32(row_of_tiles - tile_row * source.tile_rows)};
    }

    // A few elements on. Lengths are below 2^31: nothing overflows.
    __device__ Position plus(const Source& source, u32 elements) const {
        u32 behind = column + elements;
        u32 rows = behind / source.columns;
        u32 rows_behind = row_in_tile + rows;
        u32 tiles = rows_behind / source.tile_rows;
        return {
            row + rows, behind - rows * source.columns, tile_row + tiles, rows_behind - tiles * source.tile_rows};
    }

    __device__ const u8* codes(const Source& source) const {
        u32 shift = source.has_two_in_a_byte();
        return source.codes + (row * source.row_bytes + (column >> shift) - (source.first_column >> shift));
    }
};

// At most `left` elements, one by one; those behind are zeros.
template <class Float>
__device__ __noinline__ Vector<Float> decode_elements(Source source, Position at, int left, const float* values) {
    Vector<Float> vector = {};
#pragma unroll 1
    for (int k = 0; k < VECTOR; k++) {
        u32 bits = 0;
        if (k < left) {
            u32 code = *at.codes(source);
            if (source.has_two_in_a_byte()) code = code >> at.column % 2 * 4 & 0xfu;
            float scale = source.scales[at.tile_row * source.scale_columns + at.column / source.tile_columns];
            bits = Float::template encode<true>(__fmul_rn(values[code], scale));
            at = at.plus(source, 1);
        }
        vector.shift(bits);
    }
    return vector;
}

// The same as fast as it goes, `distance` behind a position. One copy: the bus is slower than calls.
template <class Float>
__device__ __noinline__ Vector<Float> decode(
    Source source, Position begin, u32 distance, int left, const float* values) {
    Position at = begin.plus(source, distance);
    u32 tile = at.column / source.tile_columns;
    u32 in_tile = at.column - tile * source.tile_columns;
    const u8* from = at.codes(source);
    bool packed = source.has_two_in_a_byte();
    // A word begins with the first half of its first byte.
    bool aligned = reinterpret_cast<u64>(from) % (packed ? 4 : 8) == 0 && !(packed && at.column % 2 != 0);
    bool together = in_tile + VECTOR <= source.tile_columns && at.column + VECTOR <= source.columns;
    if (!aligned || !together || left < VECTOR) return decode_elements<Float>(source, at, left, values);

    uint2 codes;
    if (packed) {
        u32 word = *reinterpret_cast<const u32*>(from);
        u32 even = word & 0x0f0f0f0fu, odd = word >> 4 & 0x0f0f0f0fu;
        codes = make_uint2(__byte_perm(even, odd, 0x5140), __byte_perm(even, odd, 0x7362));
    } else {
        codes = *reinterpret_cast<const uint2*>(from);
    }
    float scale = source.scales[at.tile_row * source.scale_columns + tile];
    Vector<Float> vector;
#pragma unroll
    for (int i = 0; i < VECTOR / 2; i++) {
        u32 pair = (i < 2 ? codes.x : codes.y) >> i % 2 * 16;
        u32 first = Float::template encode<true>(__fmul_rn(values[pair & 0xffu], scale));
        u32 second = Float::template encode<true>(__fmul_rn(values[pair >> 8 & 0xffu], scale));
        vector.word[i] = first | second << 16;
    }
    return vector;
}

template <class Float>
static __device__ void quantize_source(
    const Source& source, u64 n, u32 block_size, u8* packed, float* absmax, u64* nonfinite_blocks) {
    static_assert(sizeof(typename Float::Bits) == 2, "sources are rounded to 16 bits");
    static_assert(THREADS == 256, "each makes one value");
    // Of every code: it is looked up, whatever it means.
    __shared__ float values[THREADS];
    values[threadIdx.x] = value_of_code(source.kind, threadIdx.x);
    __syncthreads();

    Share share(n, block_size, packed, absmax, nonfinite_blocks);
    Position begin = Position::of(source, share.tile);
    Vector<Float> vector[VECTORS];
#pragma unroll
    for (int u = 0; u < VECTORS; u++) {
        int behind = u * VECTOR * LANES;
        vector[u] = decode<Float>(source, begin, u32(share.first + behind), share.left - behind, values);
    }
    quantize_vectors(vector, share, share.is_whole());
}
