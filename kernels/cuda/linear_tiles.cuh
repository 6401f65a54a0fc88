// y = x * transpose(W) + bias for few and some rows, on tensor cores: weights are the left operand,
// decoded on the way from shared memory to registers, and the rows of x the columns of the right
// one, so that 1 to 8 rows cost the same. For inputs that are a multiple of 64, blocks of 64 and
// more, and pointers that are multiples of 16.
//
// The work is a list: for each tile of 128 outputs, its slices of 256 inputs, of which the last may be
// shorter. Each thread block has one share of consecutive ones, and goes through it in units. Codes,
// scales and rows of x come into a ring of stages in shared memory. Codes are looked up byte by byte:
// a table, once for each lane so that no two lanes ask one bank, has the two elements of the byte,
// which are one register of the left operand. The order of inputs within 64 is chosen for that: lane
// t of four has the 16 inputs 16 t to 16 t + 15, of codes as of x.
//
// A tile that belongs to several shares is summed up by whichever of their blocks comes last, in the
// order of the shares. So the order of every sum is fixed by the lengths of W and the number of
// shares, and a row of y does not depend on how many rows there are, or on which.
#pragma once

#include "linear_common.cuh"
#include "linear_fetch.cuh"
#include "linear_multiply.cuh"
#include "linear_warpgroup.cuh"

#if ARCHITECTURE >= 800

template <class Float, u32 INPUTS, u32 COLUMN_TILES, u32 OUTPUT_TILES, u32 STAGES, bool BY_WARPGROUP>
struct Tiles {
    using Shape = TileShape<INPUTS, COLUMN_TILES, OUTPUT_TILES, STAGES, BY_WARPGROUP>;
    using Bits = typename Float::Bits;
    using Sums = float[OUTPUT_TILES][COLUMN_TILES][4];

    const Weights& weights;
    u32 columns, outputs, inputs;

    static __device__ void clear(Sums& sum) {
#pragma unroll
        for (u32 r = 0; r < OUTPUT_TILES; r++) {
#pragma unroll
            for (u32 n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) sum[r][n][i] = 0.0f;
            }
        }
    }

    // Writes a tile's results.
    __device__ void store(const Sums& sum, u32 tile, const Bits* bias, Bits* y) const {
        const u32 lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
        float unscale = 1.0f / code_factor<Float>(weights.quant_type);
#pragma unroll
        for (u32 r = 0; r < OUTPUT_TILES; r++) {
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                u32 output = tile * Shape::OUTPUTS + (warp * OUTPUT_TILES + r) * 16 + (lane >> 2) + half * 8;
                if (output >= outputs) continue;
                float add = bias == nullptr ? 0.0f : Float::decode(bias[output]);
#pragma unroll
                for (u32 n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
                    for (u32 i = 0; i < 2; i++) {
                        u32 column = n * 8 + (lane & 3u) * 2 + i;
                        if (column >= columns) continue;
                        float result = __fmaf_rn(sum[r][n][half * 2 + i], unscale, add);
                        y[u64(column) * outputs + output] = Bits(Float::template encode<true>(result));
                    }
                }
            }
        }
    }

    static constexpr u32 PARTIAL = OUTPUT_TILES * COLUMN_TILES * THREADS;

    // Leaves this share's part of a tile for whoever comes last.
    __device__ void leave(const Sums& sum, u32 tile, u32 share, const Shares& shares, float4* partials) const {
        const u32 first_column = threadIdx.x % 4 * 2;
        float4* mine = partials + shares.place(share, tile) * PARTIAL + threadIdx.x;
#pragma unroll
        for (u32 r = 0; r < OUTPUT_TILES; r++) {
#pragma unroll
            for (u32 n = 0; n < COLUMN_TILES; n++) {
                const float(&s)[4] = sum[r][n];
                if (n * 8 + first_column < columns) {
                    mine[(r * COLUMN_TILES + n) * THREADS] = make_float4(s[0], s[1], s[2], s[3]);
                }
            }
        }
    }

    // Sums up the parts of a tile.
    __device__ void collect(Sums& sum, u32 tile, u32 first, u32 last, const Shares& shares, const float4* partials) const {
        const u32 first_column = threadIdx.x % 4 * 2;
        clear(sum);
        constexpr u32 ALL = OUTPUT_TILES * COLUMN_TILES, AT_ONCE = ALL <= 2 ? 8 : 16 / ALL;
        for (u32 other = first; other <= last; other += AT_ONCE) {
            float4 part[AT_ONCE][OUTPUT_TILES * COLUMN_TILES];
#pragma unroll
            for (u32 o = 0; o < AT_ONCE; o++) {
                if (other + o > last) break;
                const float4* theirs = partials + shares.place(other + o, tile) * PARTIAL + threadIdx.x;
#pragma unroll
                for (u32 i = 0; i < OUTPUT_TILES * COLUMN_TILES; i++) {
                    if (i % COLUMN_TILES * 8 + first_column < columns) part[o][i] = load_from_l2(theirs + i * THREADS);
                }
            }
#pragma unroll
            for (u32 o = 0; o < AT_ONCE; o++) {
                if (other + o > last) break;
#pragma unroll
                for (u32 i = 0; i < OUTPUT_TILES * COLUMN_TILES; i++) {
                    if (i % COLUMN_TILES * 8 + first_column >= columns) continue;
                    float(&s)[4] = sum[i / COLUMN_TILES][i % COLUMN_TILES];
                    s[0] += part[o][i].x;
                    s[1] += part[o][i].y;
                    s[2] += part[o][i].z;
                    s[3] += part[o][i].w;
                }
            }
        }
    }
};

#if ARCHITECTURE >= 900
// A unit's products, of 64 outputs for each warpgroup. Here lane t of four has of each 8 inputs the
// two that are its own in the tensor cores' order: the byte t of every word.
template <class Float, class Shape>
__device__ __forceinline__ void multiply_by_warpgroup(float (&sum)[Shape::COLUMNS / 8][4],
                                                      const float (&scale)[2][Shape::GRANULES], const u8* codes,
                                                      const u8* columns_of_x, const u32* table, u32 granules) {
    static_assert(Shape::CODE_PIECES == 4, "as the codes of a row are arranged");
    const u32 lane = threadIdx.x % LANES;
    const u32 first_row = threadIdx.x / LANES * 16 + (lane >> 2), rotation = (39 - lane % 4 * 8) % 32;
    const u8* entries = reinterpret_cast<const u8*>(table) + lane * 4;
    u32 a[4][4];
    auto decode = [&](u32 granule) {
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            u32 row = first_row + half * 8;
#pragma unroll
            for (u32 piece = 0; piece < 2; piece++) {
                uint4 four = *reinterpret_cast<const uint4*>(codes + row * Shape::CODE_ROW + ((granule * 2 + piece) ^ (row & 2u)) * 16);
                const u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    u32 entry = __funnelshift_l(words[i], words[i], rotation) & 0x7f80u;
                    a[piece * 2 + i / 2][i % 2 * 2 + half] = *reinterpret_cast<const u32*>(entries + entry);
                }
            }
        }
    };
    float product[Shape::COLUMNS / 2];
#pragma unroll
    for (u32 i = 0; i < Shape::COLUMNS / 2; i++) product[i] = 0.0f;
#pragma unroll
    for (u32 granule = 0; granule < Shape::GRANULES; granule++) {
        if (granule >= granules) break;
        decode(granule);
        begin_products();
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            const u8* tile = columns_of_x + granule * Shape::COLUMNS * 128 + j * 32;
            multiply_async<Float>(product, a[j], describe_tile(tile), j > 0);
        }
        end_products();
        wait_for_products();
        keep_behind_wait(product);
#pragma unroll
        for (u32 n = 0; n < Shape::COLUMNS / 8; n++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) sum[n][i] = __fmaf_rn(scale[i / 2][granule], product[n * 4 + i], sum[n][i]);
        }
    }
}
#endif

template <class Float, u32 INPUTS, u32 COLUMN_TILES, u32 OUTPUT_TILES, u32 STAGES, bool BY_WARPGROUP>
__device__ __forceinline__ void linear_tiles(const Weights& weights, const typename Float::Bits* x,
                                             const typename Float::Bits* bias, typename Float::Bits* y, u8* workspace,
                                             u32 rows, u32 outputs, u32 inputs, u32 number_of_shares) {
    using Tile = Tiles<Float, INPUTS, COLUMN_TILES, OUTPUT_TILES, STAGES, BY_WARPGROUP>;
    using Shape = typename Tile::Shape;
    __shared__ u32 table[256 * LANES];
    __shared__ float map[256];
    u8* ring = reinterpret_cast<u8*>(dynamic_shared);

    const u32 thread = threadIdx.x, lane = thread % LANES, warp = thread / LANES;
    const u32 group = lane >> 2, quarter = lane & 3u;
    const u32 column_tiles = (rows + Shape::COLUMNS - 1) / Shape::COLUMNS;
    const u32 column_tile = blockIdx.x % column_tiles, share = blockIdx.x / column_tiles;
    const u32 column = column_tile * Shape::COLUMNS, columns = min(rows - column, Shape::COLUMNS);
    const u32 slices = (inputs + INPUTS - 1) / INPUTS, tiles = (outputs + Shape::OUTPUTS - 1) / Shape::OUTPUTS;
    // There are less than 2^32 slices.
    const u32 wide_slices = (inputs + SLICE - 1) / SLICE, least = tiles * wide_slices / number_of_shares;
    const Shares shares = {wide_slices, column_tiles, column_tile, least,
                           tiles * wide_slices - least * number_of_shares};
    auto unit_of_slice = [&](u32 wide) {
        u32 tile = wide / wide_slices;
        return tile * slices + (wide - tile * wide_slices) * (SLICE / INPUTS);
    };
    const u32 begin = unit_of_slice(shares.begin(share)), end = unit_of_slice(shares.begin(share + 1));
    x += u64(column) * inputs;
    y += u64(column) * outputs;
    const Tile product = {weights, columns, outputs, inputs};

    launch_dependents();
    const bool nested = weights.nested_absmax != nullptr;
    const bool vectors = weights.block_bits == 6 && inputs % 256 == 0;
    Fetch<Shape> fetch = {weights, outputs, inputs, columns, vectors, 0, 0, slices, nullptr, {}, 0};
    u8* slabs = ring + STAGES * Shape::STAGE_BYTES;
    fetch.start(begin);
    const u32 first_slice = fetch.slice;
#pragma unroll
    for (u32 s = 0; s + 1 < STAGES; s++) {
        if (begin + s < end) {
            fetch.copy_weights(ring + s * Shape::STAGE_BYTES);
            fetch.template copy_scales<STAGES>(slabs, s == 0);
            fetch.next();
        }
    }
    {
        u32 pair = code_pair<Float>(thread, weights.quant_type);
        uint4* entries = reinterpret_cast<uint4*>(table + thread * LANES);
#pragma unroll
        for (u32 i = 0; i < LANES / 4; i++) entries[(i + lane) % (LANES / 4)] = make_uint4(pair, pair, pair, pair);
    }
    float offset = 0.0f;
    if (nested) {
        map[thread] = weights.map[thread];
        offset = *weights.offset;
    }
    u32 tile = begin / slices, slice = begin - tile * slices, stage = 0;
    const u32 first_row = warp * OUTPUT_TILES * 16 + group;
    u32 slab = 0;
    // Only weights have been read so far.
    wait_for_earlier_grids();
    {
        u32 slice = first_slice;
#pragma unroll
        for (u32 s = 0; s + 1 < STAGES; s++) {
            if (begin + s < end) fetch.copy_x(ring + s * Shape::STAGE_BYTES, x, slice);
            if (++slice == slices) slice = 0;
            end_copy_group();
        }
    }

    u32* counters = reinterpret_cast<u32*>(workspace);
    float4* partials = reinterpret_cast<float4*>(workspace + COUNTER_BYTES);
    float sum[OUTPUT_TILES][COLUMN_TILES][4];
    Tile::clear(sum);
    // Of the tile's units, those of this share begin here.
    u32 tile_begin = slice;
    // What differs between lanes in where things are.
    const u32 odd = group & 1u;
    u32 lane_entry = lane * 4;
    u32 code_place = first_row * Shape::CODE_ROW + (quarter & 1u) * 8 +
                     ((quarter >> 1) ^ (Shape::CODE_PIECES == 8 ? (group & 3u) << 1 : group & 2u)) * 16;
    u32 x_places[2] = {group * Shape::X_ROW + ((quarter * 2 ^ odd) << 4), group * Shape::X_ROW + (((quarter * 2 + 1) ^ odd) << 4)};
    KEEP(lane_entry);
    KEEP(code_place);
    KEEP(x_places[0]);
    KEEP(x_places[1]);
    for (u32 unit = begin; unit < end; unit++) {
        wait_for_copies<STAGES - 2>();
#if ARCHITECTURE >= 900
        if constexpr (BY_WARPGROUP) show_to_tensor_cores();
#endif
        __syncthreads();
        if (unit + STAGES - 1 < end) {
            u8* to = ring + (stage == 0 ? STAGES - 1 : stage - 1) * Shape::STAGE_BYTES;
            fetch.copy_weights(to);
            fetch.template copy_scales<STAGES>(slabs, false);
            fetch.copy_x(to, x, fetch.slice);
            fetch.next();
        }
        end_copy_group();

        const u8* codes = ring + stage * Shape::STAGE_BYTES;
        const u8* columns_of_x = codes + Shape::CODE_BYTES;
        const u32 granules = min(Shape::GRANULES, (inputs - slice * INPUTS) / GRANULE);
        float scale[OUTPUT_TILES][2][Shape::GRANULES];
        if (slice % Shape::SLAB_UNITS == 0 && unit != begin) slab = slab + 1 == STAGES ? 0 : slab + 1;
        read_scales<Shape>(scale, slabs + slab * Shape::SLAB_BYTES + first_row * Shape::SLAB_ROW,
                           slice % Shape::SLAB_UNITS * Shape::GRANULES, nested && vectors, inputs, map, offset);
        if constexpr (BY_WARPGROUP) {
#if ARCHITECTURE >= 900
            multiply_by_warpgroup<Float, Shape>(sum[0], scale[0], codes, columns_of_x, table, granules);
#endif
        } else {
            multiply_by_warps<Float, Shape, false>(sum, scale, codes, columns_of_x, table, granules, columns,
                                                   lane_entry, code_place, x_places);
        }

        stage = stage + 1 == STAGES ? 0 : stage + 1;
        slice++;
        if (slice == slices || unit + 1 == end) {
            if (tile_begin == 0 && slice == slices) {
                product.store(sum, tile, bias, y);
            } else {
                product.leave(sum, tile, share, shares, partials);
            }
            tile++;
            slice = tile_begin = 0;
            Tile::clear(sum);
        }
    }
    wait_for_copies<0>();

    // The first and the last tile may belong to other shares, too. Of each, the last block to come
    // here makes the sum.
    const u32 shared_tiles[2] = {begin / slices, (end - 1) / slices};
    u32 firsts[2], lasts[2];
    bool is_shared[2];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        firsts[i] = shares.of_slice(shared_tiles[i] * wide_slices);
        lasts[i] = shares.of_slice((shared_tiles[i] + 1) * wide_slices - 1);
        is_shared[i] = firsts[i] != lasts[i] && (i == 0 || shared_tiles[0] != shared_tiles[1]);
    }
    if (!is_shared[0] && !is_shared[1]) return;
    __syncthreads();
    // The table is not needed any more.
    u32* arrived = table;
    if (thread < 2 && is_shared[thread]) {
        u32 i = thread, others = i == 0 ? lasts[0] - firsts[0] : lasts[1] - firsts[1];
        u32* counter = counters + (i == 0 ? firsts[0] : firsts[1]) * column_tiles + column_tile;
        arrived[i] = count_arrival(counter) == others ? 1u : 0u;
        if (arrived[i] != 0) *counter = 0;
    }
    __syncthreads();
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        if (is_shared[i] && arrived[i] != 0) {
            product.collect(sum, shared_tiles[i], firsts[i], lasts[i], shares, partials);
            product.store(sum, shared_tiles[i], bias, y);
        }
    }
}

#endif
