// How shares of products with experts come into shared memory: as in linear_fetch.cuh, but a tile has the
// rows of W that an expert and the form say, and the rows of x that have been routed to it.
#pragma once

#include "experts_common.cuh"
#include "linear_fetch.cuh"

#if ARCHITECTURE >= 800

// Where a share is: a tile of rows, one of results, and a unit of these.
struct Place {
    u32 row_tile, result_tile, unit;
};

// Goes through the units of a share.
template <class Float, class Shape>
struct Walk {
    const Experts<Float>& product;
    u32 row_tiles, result_tiles, units;
    Place place;
    RowTile rows;

    __device__ void start(u32 unit) {
        u32 tile = unit / units;
        place = {tile / result_tiles, tile % result_tiles, unit - tile * units};
        rows = product.row_tile(place.row_tile);
    }

    // Says whether another tile begins.
    __device__ __forceinline__ bool next() {
        if (++place.unit < units) return false;
        place.unit = 0;
        if (++place.result_tile == result_tiles) {
            place.result_tile = 0;
            // Behind the last tile there is nothing to be read.
            if (++place.row_tile < row_tiles) rows = product.row_tile(place.row_tile);
        }
        return true;
    }
};

// Copies weights into the stages, unit after unit.
template <class Float, class Shape>
struct WeightFetch {
    static constexpr u32 ROWS_AT_ONCE = THREADS / Shape::CODE_PIECES, ROWS = Shape::OUTPUTS / ROWS_AT_ONCE;

    Walk<Float, Shape> walk;
    // As in copy_slab.
    bool vectors;
    const u8* codes;
    u32 row_begins[ROWS];
    // The slab that is to be copied next.
    u32 slab;

    // The row of an expert's weights that is row `row` of a tile. Where pairs of them make a result, a
    // lane has both: rows 0 to 7 of each 16 are the gates.
    static __device__ u32 weight_row(const Experts<Float>& product, u32 tile, u32 row) {
        if (!product.gated()) return min(tile * Shape::OUTPUTS + row, product.outputs - 1);
        u32 result = tile * (Shape::OUTPUTS / 2) + row / 16 * 8 + row % 8;
        return product.gate_row(min(result, product.outputs / 2 - 1), row / 8 % 2);
    }

    __device__ void start_tile() {
        const Experts<Float>& product = walk.product;
        const u32 first_row = threadIdx.x / Shape::CODE_PIECES;
        codes = product.weights.codes + u64(walk.rows.expert) * product.outputs * (product.inputs / 2) +
                threadIdx.x % Shape::CODE_PIECES * 16;
#pragma unroll
        for (u32 i = 0; i < ROWS; i++) {
            row_begins[i] = weight_row(product, walk.place.result_tile, i * ROWS_AT_ONCE + first_row) * (product.inputs / 2);
            KEEP(row_begins[i]);
        }
    }

    __device__ void start(u32 unit) {
        walk.start(unit);
        start_tile();
        codes += walk.place.unit * Shape::CODE_ROW;
        slab = 0;
    }

    __device__ __forceinline__ void next() {
        codes += Shape::CODE_ROW;
        if (walk.next()) start_tile();
    }

    __device__ __forceinline__ void copy_codes(u8* to) const {
        const u32 piece = threadIdx.x % Shape::CODE_PIECES, first_row = threadIdx.x / Shape::CODE_PIECES;
        if (walk.place.unit * (Shape::CODE_ROW * 2) + piece * 32 < walk.product.inputs) {
            // Lanes of neighbouring rows must not ask the same banks.
            u32 place = Shape::CODE_PIECES == 8 ? piece ^ (first_row & 3u) << 1 : piece ^ (first_row & 2u);
            u8* at = to + first_row * Shape::CODE_ROW + place * 16;
#pragma unroll
            for (u32 i = 0; i < ROWS; i++) copy_async_16(at + i * ROWS_AT_ONCE * Shape::CODE_ROW, codes + row_begins[i]);
        }
    }

    // Copies the slab that the unit begins, or that the first unit is in.
    template <u32 STAGES>
    __device__ __forceinline__ void copy_scales(u8* slabs, bool first) {
        if (!first && walk.place.unit % Shape::SLAB_UNITS != 0) return;
        const Experts<Float>& product = walk.product;
        u8* to = slabs + slab * Shape::SLAB_BYTES;
        slab = slab + 1 == STAGES ? 0 : slab + 1;
        const u32 expert = walk.rows.expert, tile = walk.place.result_tile;
        const u64 first_row = u64(expert) * product.outputs;
        copy_slab<Shape>(product.weights, product.inputs, walk.place.unit / Shape::SLAB_UNITS * Shape::SLAB_GRANULES,
                         vectors, to, [&](u32 row) { return first_row + weight_row(product, tile, row); },
                         [&](u32 row) { return product.nested_of(expert, weight_row(product, tile, row)).absmax; },
                         [&](u32 row, u64 block) {
                             if (!product.apart()) return product.weights.scale(block);
                             Nested nested = product.nested_of(expert, weight_row(product, tile, row));
                             return product.weights.scale(block, nested.absmax, nested.mean);
                         });
    }
};

// Copies rows of x into the stages, unit after unit.
template <class Float, class Shape>
struct RowFetch {
    static constexpr u32 ROWS_AT_ONCE = THREADS / Shape::X_PIECES;
    static constexpr u32 ROWS = (Shape::COLUMNS + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;

    Walk<Float, Shape> walk;
    u32 row_tile, rows_of_x[ROWS];

    __device__ void start_tile() {
        row_tile = walk.place.row_tile;
        if (row_tile >= walk.row_tiles) return;
#pragma unroll
        for (u32 i = 0; i < ROWS; i++) {
            u32 row = threadIdx.x / Shape::X_PIECES + i * ROWS_AT_ONCE;
            if (row < walk.rows.count) rows_of_x[i] = walk.product.row_of_x(walk.product.pair(walk.rows, row));
        }
    }

    __device__ __forceinline__ void next() {
        if (walk.next() && walk.place.row_tile != row_tile) start_tile();
    }

    __device__ __forceinline__ void copy(u8* to) const {
        const u32 piece = threadIdx.x % Shape::X_PIECES, first_row = threadIdx.x / Shape::X_PIECES;
        const u32 inputs = walk.product.inputs, input = walk.place.unit * (Shape::CODE_ROW * 2) + piece * 8;
        if (input >= inputs) return;
        to += Shape::CODE_BYTES;
#pragma unroll
        for (u32 i = 0; i < ROWS; i++) {
            u32 row = first_row + i * ROWS_AT_ONCE;
            // What is not there is not written: its column is not used.
            if (row < walk.rows.count) {
                copy_async_16(to + row * Shape::X_ROW + (piece ^ (row & 1u)) * 16,
                              walk.product.x + u64(rows_of_x[i]) * inputs + input);
            }
        }
    }
};

#endif
