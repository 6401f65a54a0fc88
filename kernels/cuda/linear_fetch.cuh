// What thread blocks of linear_tiles.cuh have to do: their shares, and how these come into shared
// memory.
#pragma once

#include "linear_common.cuh"

#if ARCHITECTURE >= 800

// Inputs that one scale is applied to, and those that shares are counted in: the same for every
// kernel here, so that all of them make the same sums.
static constexpr u32 GRANULE = 64, SLICE = 256;

// `INPUTS`: of a unit. `COLUMN_TILES`: rows of x in tiles of 8. `OUTPUT_TILES`: outputs of a warp
// in tiles of 16. `BY_WARPGROUP`: whether warpgroups multiply, and not warps.
template <u32 INPUTS, u32 COLUMN_TILES, u32 OUTPUT_TILES, u32 STAGES, bool BY_WARPGROUP>
struct TileShape {
    static constexpr bool WARPGROUP = BY_WARPGROUP;
    static constexpr u32 GRANULES = INPUTS / GRANULE;
    static constexpr u32 COLUMNS = 8 * COLUMN_TILES;
    static constexpr u32 OUTPUTS = 16 * OUTPUT_TILES * WARPS;
    // Of a stage: codes, x.
    static constexpr u32 CODE_ROW = INPUTS / 2, X_ROW = INPUTS * 2;
    static constexpr u32 CODE_BYTES = OUTPUTS * CODE_ROW;
    static constexpr u32 X_BYTES = COLUMNS * X_ROW;
    static constexpr u32 STAGE_BYTES = CODE_BYTES + X_BYTES;
    // Scales come for 4 granules at a time, or for 8 where there is room, into as many slabs as stages.
    static constexpr u32 SLAB_GRANULES = COLUMN_TILES == 1 ? 8 : 4, SLAB_ROW = SLAB_GRANULES * 4, SLAB_UNITS = SLAB_GRANULES / GRANULES;
    static constexpr u32 SLAB_BYTES = OUTPUTS * SLAB_ROW;
    static constexpr u32 SHARED_BYTES = STAGES * (STAGE_BYTES + SLAB_BYTES);
    // Of 16 bytes.
    static constexpr u32 CODE_PIECES = CODE_ROW / 16, X_PIECES = X_ROW / 16;
};

// How the slices of all tiles are dealt out to shares: as evenly as can be, the first ones one more.
struct Shares {
    // Of a tile.
    u32 slices;
    u32 column_tiles, column_tile;
    // Slices of each share, and how many shares have one more.
    u32 least, longer;

    __device__ u32 begin(u32 share) const { return share * least + min(share, longer); }
    __device__ u32 of_slice(u32 slice) const {
        u32 of_longer = longer * (least + 1);
        return slice < of_longer ? slice / (least + 1) : longer + (slice - of_longer) / least;
    }
    // Each share has two places for sums: its first tile may be the end of one that is not its own
    // alone, and its last the begin of another.
    __device__ u64 place(u32 share, u32 tile) const {
        return (u64(share) * column_tiles + column_tile) * 2 + (tile == begin(share) / slices ? 0 : 1);
    }
};

// The workspace begins with counters, which are zero before and after each launch: one for each
// thread block, of which a tile that is summed up has that of its first share.
static constexpr u32 COUNTER_BYTES = 16384;

// Keeps the compiler from computing a value again wherever it is used.
#ifdef __CUDACC__
#define KEEP(VALUE) asm volatile("" : "+r"(VALUE))
#else
#define KEEP(VALUE)
#endif

// Copies the scales of a tile's outputs from granule `begin` on. `vectors`: each granule has a block of
// its own, and rows have a multiple of 4 of them; with double quantization they are 8 codes and a nested
// absmax for each 4 of them then, else 8 f32. `row_of`: the row of W that an output of the tile is. `nested_of`:
// where its nested scales are, by blocks of W. `scale_of`: the scale of one of its blocks.
template <class Shape, class RowOf, class NestedOf, class ScaleOf>
__device__ __forceinline__ void copy_slab(const Weights& weights, u32 inputs, u32 begin, bool vectors, u8* to,
                                          RowOf row_of, NestedOf nested_of, ScaleOf scale_of) {
    constexpr u32 PIECES = Shape::SLAB_ROW / 16;
    const u32 granules = inputs / GRANULE;
    if (vectors && weights.nested_absmax != nullptr) {
        if (threadIdx.x >= Shape::OUTPUTS) return;
        u64 block = row_of(threadIdx.x) * granules + begin;
        const u8* codes_of_absmax = static_cast<const u8*>(weights.scales) + block;
        u8* at = to + threadIdx.x * Shape::SLAB_ROW;
        const float* nested = nested_of(threadIdx.x);
        copy_async_4(at + 8, nested + (block >> 8));
        if (PIECES == 2 && granules % 8 == 0) {
            // Eight of a multiple of eight have one nested absmax.
            copy_async_8(at, codes_of_absmax);
        } else {
            copy_async_4(at, codes_of_absmax);
            if (PIECES == 2 && begin + 4 < granules) {
                copy_async_4(at + 4, codes_of_absmax + 4);
                copy_async_4(at + 12, nested + ((block + 4) >> 8));
            }
        }
        return;
    }
#pragma unroll
    for (u32 piece = threadIdx.x; piece < Shape::OUTPUTS * PIECES; piece += THREADS) {
        u32 row = piece / PIECES, granule = begin + piece % PIECES * 4;
        u64 output = row_of(row);
        u8* at = to + piece * 16;
        if (!vectors) {
#pragma unroll 1
            for (u32 i = 0; i < 4; i++) {
                u64 block = (output * inputs + (granule + i) * GRANULE) >> weights.block_bits;
                float* scale = reinterpret_cast<float*>(at) + i;
                if (granule + i >= granules) {
                    // Granules that are not there count nothing.
                    *scale = 0.0f;
                } else if (weights.nested_absmax == nullptr) {
                    copy_async_4(scale, static_cast<const float*>(weights.scales) + block);
                } else {
                    *scale = scale_of(row, block);
                }
            }
        } else {
            if (granule < granules) {
                copy_async_16(at, static_cast<const float*>(weights.scales) + output * granules + granule);
            }
        }
    }
}

// Copies units into the stages, one after the other.
template <class Shape>
struct Fetch {
    static constexpr u32 ROWS_AT_ONCE = THREADS / Shape::CODE_PIECES, ROWS = Shape::OUTPUTS / ROWS_AT_ONCE;

    const Weights& weights;
    u32 outputs, inputs, columns;
    // As in copy_slab.
    bool vectors;
    u32 tile, slice, slices;
    const u8* codes;
    u32 row_begins[ROWS];
    // The slab that is to be copied next.
    u32 slab;

    __device__ void start_tile() {
        const u32 first_row = threadIdx.x / Shape::CODE_PIECES, last_row = outputs - 1 - tile * Shape::OUTPUTS;
        u64 first = u64(tile) * Shape::OUTPUTS * inputs;
        codes = weights.codes + (first >> 1) + threadIdx.x % Shape::CODE_PIECES * 16;
#pragma unroll
        for (u32 i = 0; i < ROWS; i++) {
            row_begins[i] = min(i * ROWS_AT_ONCE + first_row, last_row) * (inputs / 2);
            KEEP(row_begins[i]);
        }
    }

    __device__ void start(u32 unit) {
        tile = unit / slices;
        slice = unit - tile * slices;
        start_tile();
        codes += slice * Shape::CODE_ROW;
    }

    // Copies the slab that the unit begins, or that the first unit is in.
    template <u32 STAGES>
    __device__ __forceinline__ void copy_scales(u8* slabs, bool first) {
        if (!first && slice % Shape::SLAB_UNITS != 0) return;
        const u32 last_row = outputs - 1 - tile * Shape::OUTPUTS;
        u8* to = slabs + slab * Shape::SLAB_BYTES;
        slab = slab + 1 == STAGES ? 0 : slab + 1;
        copy_slab<Shape>(weights, inputs, slice / Shape::SLAB_UNITS * Shape::SLAB_GRANULES, vectors, to,
                         [&](u32 row) { return u64(tile) * Shape::OUTPUTS + min(row, last_row); },
                         [&](u32) { return weights.nested_absmax; },
                         [&](u32, u64 block) { return weights.scale(block); });
    }

    __device__ __forceinline__ void next() {
        slice++;
        codes += Shape::CODE_ROW;
        if (slice == slices) {
            slice = 0;
            tile++;
            start_tile();
        }
    }

    __device__ __forceinline__ void copy_weights(u8* to) const {
        const u32 piece = threadIdx.x % Shape::CODE_PIECES, first_row = threadIdx.x / Shape::CODE_PIECES;
        if (slice * (Shape::CODE_ROW * 2) + piece * 32 < inputs) {
            // Lanes of neighbouring rows must not ask the same banks.
            u32 place = Shape::CODE_PIECES == 8 ? piece ^ (first_row & 3u) << 1 : piece ^ (first_row & 2u);
            u8* at = to + first_row * Shape::CODE_ROW + place * 16;
#pragma unroll
            for (u32 i = 0; i < ROWS; i++) copy_async_16(at + i * ROWS_AT_ONCE * Shape::CODE_ROW, codes + row_begins[i]);
        }
    }

    template <class Bits>
    __device__ __forceinline__ void copy_x(u8* to, const Bits* x, u32 slice) const {
        constexpr u32 ROWS_AT_ONCE = THREADS / Shape::X_PIECES;
        const u32 piece = threadIdx.x % Shape::X_PIECES, first_row = threadIdx.x / Shape::X_PIECES;
        const u32 input = slice * (Shape::CODE_ROW * 2) + piece * 8;
        if (input >= inputs) return;
        to += Shape::CODE_BYTES;
        // Warpgroups take rows of one granule.
        constexpr u32 ROW = Shape::WARPGROUP ? 128 : Shape::X_ROW;
        if (Shape::WARPGROUP) to += piece / 8 * Shape::COLUMNS * 128;
#pragma unroll
        for (u32 row = first_row; row < Shape::COLUMNS; row += ROWS_AT_ONCE) {
            u32 place = Shape::WARPGROUP ? piece % 8 ^ (row & 7u) : piece ^ (row & 1u);
            // What is not there is not written: its column is not used.
            if (row < columns) copy_async_16(to + row * ROW + place * 16, x + u64(row) * inputs + input);
        }
    }
};

#endif
