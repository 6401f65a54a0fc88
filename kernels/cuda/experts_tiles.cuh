// Products with experts on tensor cores, as those of linear_tiles.cuh: for inputs that are a multiple of
// 64, blocks of 64 and more, and pointers that are multiples of 16.
//
// The work is a list: for each tile of rows, its tiles of 128 outputs, and for each of these its segments
// of the inputs, at most 8. Its length depends on the routing, so each thread block finds its share of
// consecutive segments by itself. Each segment has a sum of its own, and these are added up in their
// order, by the block that has all of them or by the one that comes last of those that share a tile. So a
// result's bits do not depend on how the list is dealt out, on other rows, or on which tile a row is in.
#pragma once

#include "experts_fetch.cuh"
#include "linear_multiply.cuh"

#if ARCHITECTURE >= 800

static constexpr u32 MOST_SEGMENTS = 8;

template <class Float, u32 COLUMN_TILES, class Shape>
struct ExpertTiles {
    using Sums = float[1][COLUMN_TILES][4];
    // float4 of a segment that is left for others.
    static constexpr u32 PARTIAL = COLUMN_TILES * THREADS;

    static __device__ __forceinline__ void clear(Sums& sum) {
#pragma unroll
        for (u32 n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) sum[0][n][i] = 0.0f;
        }
    }

    static __device__ __forceinline__ void add(Sums& total, const Sums& sum) {
#pragma unroll
        for (u32 n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) total[0][n][i] = __fadd_rn(total[0][n][i], sum[0][n][i]);
        }
    }

    // Writes a tile's results.
    static __device__ void store(const Sums& sum, const Experts<Float>& product, const RowTile& rows, u32 result_tile) {
        const u32 lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, group = lane >> 2, quarter = lane & 3u;
        const float unscale = 1.0f / code_factor<Float>(product.weights.quant_type);
        const bool gated = product.gated();
        const u32 results = product.results();
        // Of rows 0 and 8 of a warp's tile: one result's two outputs, or two results.
        u32 result[2];
        float add[2];
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            result[half] = gated ? result_tile * (Shape::OUTPUTS / 2) + warp * 8 + group
                                 : result_tile * Shape::OUTPUTS + warp * 16 + group + half * 8;
            bool exists = result[half] < results;
            u32 weight_row = gated ? product.gate_row(result[half], half) : result[half];
            add[half] = exists ? product.bias_of(rows.expert, weight_row) : 0.0f;
        }
#pragma unroll
        for (u32 n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                const u32 column = n * 8 + quarter * 2 + i;
                if (column >= rows.count) continue;
                const u32 pair = product.pair(rows, column);
                float value[2];
#pragma unroll
                for (u32 half = 0; half < 2; half++) value[half] = __fmaf_rn(sum[0][n][half * 2 + i], unscale, add[half]);
                if (gated) value[0] = product.activated(value[0], value[1]);
                if (result[0] < results) product.write(pair, result[0], value[0]);
                if (!gated && result[1] < results) product.write(pair, result[1], value[1]);
            }
        }
    }

    // Leaves the sum of a segment for whoever comes last.
    static __device__ void leave(const Sums& sum, u32 rows, float4* partial) {
#pragma unroll
        for (u32 n = 0; n < COLUMN_TILES; n++) {
            const float(&s)[4] = sum[0][n];
            if (n * 8 + threadIdx.x % 4 * 2 < rows) partial[n * THREADS + threadIdx.x] = make_float4(s[0], s[1], s[2], s[3]);
        }
    }

    // Sums up the segments of a tile.
    static __device__ void collect(Sums& sum, u32 rows, u32 segments, const float4* partials) {
        clear(sum);
#pragma unroll
        for (u32 n = 0; n < COLUMN_TILES; n++) {
            if (n * 8 + threadIdx.x % 4 * 2 >= rows) continue;
            float4 part[MOST_SEGMENTS];
#pragma unroll
            for (u32 s = 0; s < MOST_SEGMENTS; s++) {
                if (s < segments) part[s] = load_from_l2(partials + s * PARTIAL + n * THREADS + threadIdx.x);
            }
#pragma unroll
            for (u32 s = 0; s < MOST_SEGMENTS; s++) {
                if (s >= segments) break;
                sum[0][n][0] = __fadd_rn(sum[0][n][0], part[s].x);
                sum[0][n][1] = __fadd_rn(sum[0][n][1], part[s].y);
                sum[0][n][2] = __fadd_rn(sum[0][n][2], part[s].z);
                sum[0][n][3] = __fadd_rn(sum[0][n][3], part[s].w);
            }
        }
    }
};

template <class Float, u32 INPUTS, u32 COLUMN_TILES, u32 STAGES>
__device__ __forceinline__ void experts_tiles(const Experts<Float>& product, u8* workspace) {
    using Shape = TileShape<INPUTS, COLUMN_TILES, 1, STAGES, false>;
    using Tiles = ExpertTiles<Float, COLUMN_TILES, Shape>;
    using Sums = typename Tiles::Sums;
    __shared__ u32 table[256 * LANES];
    __shared__ float map[256];
    u8* ring = reinterpret_cast<u8*>(dynamic_shared);
    u8* slabs = ring + STAGES * Shape::STAGE_BYTES;
    const Weights& weights = product.weights;

    const u32 thread = threadIdx.x, lane = thread % LANES, warp = thread / LANES;
    const u32 group = lane >> 2, quarter = lane & 3u, inputs = product.inputs;
    {
        u32 pair = code_pair<Float>(thread, weights.quant_type);
        uint4* entries = reinterpret_cast<uint4*>(table + thread * LANES);
#pragma unroll
        for (u32 i = 0; i < LANES / 4; i++) entries[(i + lane) % (LANES / 4)] = make_uint4(pair, pair, pair, pair);
    }
    const bool nested = weights.nested_absmax != nullptr;
    // Of rows 0 and 8 of a lane.
    float offset[2] = {0.0f, 0.0f};
    if (nested) {
        map[thread] = weights.map[thread];
        offset[0] = offset[1] = *weights.offset;
    }
    const bool follows = (product.form & FORM_FOLLOWS) != 0;
    if (!follows) wait_for_earlier_grids();

    const u32 row_tiles = product.row_tiles();
    const u32 of_tile = product.gated() ? Shape::OUTPUTS / 2 : Shape::OUTPUTS;
    const u32 result_tiles = (product.results() + of_tile - 1) / of_tile, tiles = row_tiles * result_tiles;
    const u32 units = (inputs + INPUTS - 1) / INPUTS, slices = (inputs + SLICE - 1) / SLICE;
    const u32 of_segment = (slices + MOST_SEGMENTS - 1) / MOST_SEGMENTS;
    const u32 segments = (slices + of_segment - 1) / of_segment, segment_units = of_segment * (SLICE / INPUTS);
    const u32 least = tiles * segments / gridDim.x;
    const Shares shares = {segments, 1, 0, least, tiles * segments - least * gridDim.x};
    const u32 first_segment = shares.begin(blockIdx.x), end_segment = shares.begin(blockIdx.x + 1);
    auto unit_of = [&](u32 segment) {
        u32 tile = segment / segments;
        return tile * units + (segment - tile * segments) * segment_units;
    };
    const u32 begin = unit_of(first_segment), end = unit_of(end_segment);

    WeightFetch<Float, Shape> fetch = {
        {product, row_tiles, result_tiles, units, {}, {}}, weights.block_bits == 6 && inputs % 256 == 0, nullptr, {}, 0};
    if (begin < end) fetch.start(begin);
    Walk<Float, Shape> here = fetch.walk;
#pragma unroll 1
    for (u32 s = 0; s + 1 < STAGES; s++) {
        if (begin + s < end) {
            fetch.copy_codes(ring + s * Shape::STAGE_BYTES);
            fetch.template copy_scales<STAGES>(slabs, s == 0);
            fetch.next();
        }
    }
    RowFetch<Float, Shape> fetch_rows = {here, 0, {}};
    if (begin < end) fetch_rows.start_tile();
    // Only weights and the routing have been read so far.
    if (follows) wait_for_earlier_grids();
    // The kernel behind this one may read the routing now.
    launch_dependents();
    if (begin == end) return;
#pragma unroll
    for (u32 s = 0; s + 1 < STAGES; s++) {
        if (begin + s < end) {
            fetch_rows.copy(ring + s * Shape::STAGE_BYTES);
            fetch_rows.next();
        }
        end_copy_group();
    }

    u32* counters = reinterpret_cast<u32*>(workspace);
    float4* partials = reinterpret_cast<float4*>(workspace + COUNTER_BYTES);
    // Where the segments of a tile are left whose first share is this.
    auto segments_of = [&](u32 share) { return partials + u64(share) * segments * Tiles::PARTIAL; };
    u32 tile = begin / units, stage = 0, slab = 0;
    Sums sum, total;
    Tiles::clear(sum);
    Tiles::clear(total);
    const u32 first_row = warp * 16 + group, odd = group & 1u;
    u32 lane_entry = lane * 4;
    u32 code_place = first_row * Shape::CODE_ROW + (quarter & 1u) * 8 +
                     ((quarter >> 1) ^ (Shape::CODE_PIECES == 8 ? (group & 3u) << 1 : group & 2u)) * 16;
    u32 x_places[2] = {group * Shape::X_ROW + ((quarter * 2 ^ odd) << 4),
                       group * Shape::X_ROW + (((quarter * 2 + 1) ^ odd) << 4)};
    KEEP(lane_entry);
    KEEP(code_place);
    KEEP(x_places[0]);
    KEEP(x_places[1]);
    for (u32 unit = begin; unit < end; unit++) {
        if (product.apart() && (unit == begin || here.place.unit == 0)) {
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                u32 row = WeightFetch<Float, Shape>::weight_row(product, here.place.result_tile, first_row + half * 8);
                offset[half] = product.nested_of(here.rows.expert, row).mean;
            }
        }
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        if (unit + STAGES - 1 < end) {
            u8* to = ring + (stage == 0 ? STAGES - 1 : stage - 1) * Shape::STAGE_BYTES;
            fetch.copy_codes(to);
            fetch.template copy_scales<STAGES>(slabs, false);
            fetch_rows.copy(to);
            fetch.next();
            fetch_rows.next();
        }
        end_copy_group();

        const u8* codes = ring + stage * Shape::STAGE_BYTES;
        const u32 in_tile = here.place.unit;
        float scale[1][2][Shape::GRANULES];
        if (in_tile % Shape::SLAB_UNITS == 0 && unit != begin) slab = slab + 1 == STAGES ? 0 : slab + 1;
        read_scales<Shape>(scale, slabs + slab * Shape::SLAB_BYTES + first_row * Shape::SLAB_ROW,
                           in_tile % Shape::SLAB_UNITS * Shape::GRANULES, nested && fetch.vectors, inputs, map, offset);
        const u32 granules = min(Shape::GRANULES, (inputs - in_tile * INPUTS) / GRANULE);
        multiply_by_warps<Float, Shape, (COLUMN_TILES > 1)>(sum, scale, codes, codes + Shape::CODE_BYTES, table, granules,
                                                            here.rows.count, lane_entry, code_place, x_places);
        stage = stage + 1 == STAGES ? 0 : stage + 1;

        const bool ends_tile = in_tile + 1 == units;
        if (ends_tile || (in_tile + 1) % segment_units == 0) {
            if (tile * segments >= first_segment && (tile + 1) * segments <= end_segment) {
                Tiles::add(total, sum);
            } else {
                const u32 first = shares.of_slice(tile * segments);
                Tiles::leave(sum, here.rows.count, segments_of(first) + in_tile / segment_units * Tiles::PARTIAL);
            }
            Tiles::clear(sum);
        }
        if (ends_tile) {
            if (tile * segments >= first_segment) Tiles::store(total, product, here.rows, here.place.result_tile);
            Tiles::clear(total);
            tile++;
        }
        here.next();
    }
    wait_for_copies<0>();

    // The first and the last tile may belong to other shares, too. Of each, the last block to come
    // here makes the sum.
    const u32 shared_tiles[2] = {first_segment / segments, (end_segment - 1) / segments};
    u32 firsts[2], lasts[2];
    bool is_shared[2];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        firsts[i] = shares.of_slice(shared_tiles[i] * segments);
        lasts[i] = shares.of_slice((shared_tiles[i] + 1) * segments - 1);
        is_shared[i] = firsts[i] != lasts[i] && (i == 0 || shared_tiles[0] != shared_tiles[1]);
    }
    if (!is_shared[0] && !is_shared[1]) return;
    __syncthreads();
    // The table is not needed any more.
    u32* arrived = table;
    if (thread < 2 && is_shared[thread]) {
        u32 i = thread, others = i == 0 ? lasts[0] - firsts[0] : lasts[1] - firsts[1];
        u32* counter = counters + (i == 0 ? firsts[0] : firsts[1]);
        arrived[i] = count_arrival(counter) == others ? 1u : 0u;
        if (arrived[i] != 0) *counter = 0;
    }
    __syncthreads();
#pragma unroll 1
    for (u32 i = 0; i < 2; i++) {
        const bool mine = i == 0 ? is_shared[0] : is_shared[1];
        if (!mine || arrived[i] == 0) continue;
        const u32 shared = i == 0 ? shared_tiles[0] : shared_tiles[1], row_tile = shared / result_tiles;
        const RowTile rows = product.row_tile(row_tile);
        Tiles::collect(sum, rows.count, segments, segments_of(i == 0 ? firsts[0] : firsts[1]));
        Tiles::store(sum, product, rows, shared - row_tile * result_tiles);
    }
}

#endif
