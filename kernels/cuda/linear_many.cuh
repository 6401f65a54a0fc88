// y = x * transpose(W) + bias and dx = dy * W for many rows, on tensor cores of compute capability 9.0.
// Weights become the elements that dequantizing would give, code times scale rounded once, on their way from
// shared memory to registers, where they are the left operand; 256 rows of x are the columns of the right
// one. Below, x is dy where W is not transposed. What is summed over (inputs, or outputs for dx) is the
// depth; the other side of W is the left side.
//
// The work is a list of tiles of 128 of the left side and 256 rows, each in as many parts of its depth as
// the launch says. Two thread blocks are a cluster: their tiles are neighbours of the same rows, and each
// brings half of x for both. One warp brings x, in steps of a depth of 64, one codes and two scales, in
// groups of four steps; two warpgroups have 64 of the left side each, and one decodes while the other one
// multiplies. Whoever comes last of the parts of a tile sums them up, in their order.
#pragma once

#include "linear_bulk.cuh"
#include "linear_common.cuh"
#include "linear_warpgroup.cuh"

#if ARCHITECTURE >= 900

// How many threads arrive as one at barriers of codes and scales: a warp, whose first lane arrives behind
// __syncwarp, which orders the others' writes and reads before. compute-sanitizer's racecheck does not follow
// that order: it reports all writes of scales but the arriving lane's own, and reads of the last step of a
// group. For it, with -DRACECHECK, each thread arrives for itself, which takes longer.
#ifdef RACECHECK
#define THREADS_AT_ONCE 1
#else
#define THREADS_AT_ONCE LANES
#endif

struct Many {
    static constexpr u32 LEFT = 128, DEPTH = 64, STEPS = 4, CLUSTER = 2;
    // Two warpgroups multiply; registers are dealt out by warpgroup, so that a third one brings.
    static constexpr u32 MULTIPLIERS = 256, BLOCK = MULTIPLIERS + 128, SCALERS = 2 * LANES;
    // The ring of groups of codes and scales.
    static constexpr u32 GROUPS = 3, CODE_BYTES = LEFT * DEPTH * STEPS / 2, SCALES = LEFT * STEPS;
    static constexpr u32 GROUP_BYTES = CODE_BYTES + SCALES * 4;
    // Where things are in shared memory: the ring of x, of 128 KiB, is the first of them.
    static constexpr u32 X_RING = 128 << 10, TABLE = X_RING + GROUPS * GROUP_BYTES;
    static constexpr u32 MAP = TABLE + 256 * LANES * 4, BARRIERS = MAP + 1024;
};

// What depends on the rows of a tile.
template <u32 OF_COLUMNS>
struct ManyShape {
    static constexpr u32 COLUMNS = OF_COLUMNS, X_BYTES = COLUMNS * 128, STAGES = Many::X_RING / X_BYTES;
    // Sums of a thread: of 8 columns 4.
    static constexpr u32 SUMS = COLUMNS / 2;
};

// Both codes of a byte as binary16, the first one low: exact to 12 bits, which is enough to be rounded
// with their scale to 11.
static __device__ u32 exact_pair(u32 byte, u32 quant_type) {
    float value[2];
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        u32 code = half == 0 ? byte >> 4 : byte & 15u;
        value[half] = 0.0f;
#pragma unroll
        for (u32 i = 0; i < 16; i++) {
            if (code == i) {
                value[half] = __int_as_float(int(quant_type == 0 ? code_value_bits(0, i) : code_value_bits(1, i)));
            }
        }
    }
    return round_pair<F16>(value[0], value[1]);
}

// Which tiles and groups a thread block has.
struct ManyWork {
    u32 rows, outputs, inputs, parts;
    // Pairs of tiles that have one part, and what they and the parts of the others are together.
    u32 left, steps, column_tiles, whole, units;

    template <bool TRANSPOSED, u32 COLUMNS>
    static __device__ __forceinline__ ManyWork of(u32 rows, u32 outputs, u32 inputs, u32 parts) {
        ManyWork work = {rows, outputs, inputs, parts};
        work.left = TRANSPOSED ? inputs : outputs;
        work.steps = ((TRANSPOSED ? outputs : inputs) + Many::DEPTH - 1) / Many::DEPTH;
        work.column_tiles = (rows + COLUMNS - 1) / COLUMNS;
        const u32 of_cluster = Many::LEFT * Many::CLUSTER, clusters = gridDim.x / Many::CLUSTER;
        const u32 pairs = (work.left + of_cluster - 1) / of_cluster * work.column_tiles;
        work.whole = parts == 1 ? pairs : pairs / clusters * clusters;
        work.units = work.whole + (pairs - work.whole) * parts;
        return work;
    }
};

struct ManyUnit {
    // Of the thread block's tile: its number among those in parts, and where it begins; its groups.
    u32 tile, part, parts, left, column, begin, end;

    // `columns`: of a tile. Thread blocks that run at a time share a part of the left side, and all of them x.
    __device__ __forceinline__ ManyUnit(const ManyWork& work, u32 columns, u32 unit, u32 rank) {
        const u32 groups = (work.steps + Many::STEPS - 1) / Many::STEPS;
        const bool whole = unit < work.whole;
        parts = whole ? 1 : work.parts;
        const u32 behind = whole ? 0 : (unit - work.whole) / parts, pair = whole ? unit : work.whole + behind;
        part = whole ? 0 : unit - work.whole - behind * parts;
        tile = behind * Many::CLUSTER + rank;
        left = (pair / work.column_tiles * Many::CLUSTER + rank) * Many::LEFT;
        column = pair % work.column_tiles * columns;
        begin = u32(u64(part) * groups / parts);
        end = u32(u64(part + 1) * groups / parts);
    }
};

// A place in a ring.
template <u32 COUNT>
struct ManyPlace {
    u32 slot = 0, phase = 0;

    __device__ __forceinline__ void advance() {
        slot++;
        if (slot == COUNT) {
            slot = 0;
            phase ^= 1u;
        }
    }
};

// The barriers of both rings.
template <u32 STAGES>
struct ManyBarriers {
    u64 x_full[STAGES], x_empty[STAGES];
    u64 weights_full[Many::GROUPS], weights_empty[Many::GROUPS];
    u32 is_last;

    __device__ __forceinline__ void init() {
        const u32 warps = Many::MULTIPLIERS / LANES;
        for (u32 i = 0; i < STAGES; i++) {
            init_barrier(x_full + i, 1);
            // Of both thread blocks.
            init_barrier(x_empty + i, warps * Many::CLUSTER);
        }
        for (u32 i = 0; i < Many::GROUPS; i++) {
            init_barrier(weights_full + i, 1 + Many::SCALERS / THREADS_AT_ONCE);
            init_barrier(weights_empty + i, Many::MULTIPLIERS / THREADS_AT_ONCE);
        }
        show_barriers();
    }
};

// Brings this thread block's part of x for all of the cluster: for one thread.
template <class Shape>
static __device__ __forceinline__ void many_bring_x(const TensorMap& map_of_x, const ManyWork& work, u8* ring,
                                                    ManyBarriers<Shape::STAGES>& barriers, u32 rank) {
    prepare_map(map_of_x);
    const u32 first = rank * (Shape::COLUMNS / Many::CLUSTER);
    ManyPlace<Shape::STAGES> place;
    for (u32 index = blockIdx.x / Many::CLUSTER; index < work.units; index += gridDim.x / Many::CLUSTER) {
        const ManyUnit unit(work, Shape::COLUMNS, index, rank);
        const u32 end = min(unit.end * Many::STEPS, work.steps);
        for (u32 step = unit.begin * Many::STEPS; step < end; step++) {
            u64* full = barriers.x_full + place.slot;
            wait_for_phase(barriers.x_empty + place.slot, place.phase ^ 1u);
            arrive_and_expect(full, Shape::X_BYTES);
            copy_tile_to((1u << Many::CLUSTER) - 1, ring + place.slot * Shape::X_BYTES + first * 128, map_of_x,
                         step * Many::DEPTH, unit.column + first, full);
            place.advance();
        }
    }
}

// Brings codes: for one thread.
template <class Shape, bool TRANSPOSED>
static __device__ __forceinline__ void many_bring_codes(const TensorMap& map_of_codes, const ManyWork& work, u8* ring,
                                                        ManyBarriers<Shape::STAGES>& barriers, u32 rank) {
    prepare_map(map_of_codes);
    ManyPlace<Many::GROUPS> place;
    for (u32 index = blockIdx.x / Many::CLUSTER; index < work.units; index += gridDim.x / Many::CLUSTER) {
        const ManyUnit unit(work, Shape::COLUMNS, index, rank);
        for (u32 group = unit.begin; group < unit.end; group++) {
            u64* full = barriers.weights_full + place.slot;
            u8* to = ring + Many::X_RING + place.slot * Many::GROUP_BYTES;
            wait_for_phase(barriers.weights_empty + place.slot, place.phase ^ 1u);
            arrive_and_expect(full, Many::CODE_BYTES);
            const u32 depth = group * (Many::STEPS * Many::DEPTH);
            if (TRANSPOSED) {
                copy_tile(to, map_of_codes, unit.left / 2, depth, full);
            } else {
                copy_tile(to, map_of_codes, depth / 2, unit.left, full);
            }
            place.advance();
        }
    }
}

// Makes scales: for two warps.
template <class Shape, bool TRANSPOSED>
static __device__ __forceinline__ void many_bring_scales(const Weights& weights, const ManyWork& work, u8* ring,
                                                         ManyBarriers<Shape::STAGES>& barriers, const float* map, u32 rank) {
    constexpr u32 EACH = Many::SCALES / Many::SCALERS;
    const u32 thread = threadIdx.x % Many::SCALERS;
    const float offset = weights.nested_absmax == nullptr ? 0.0f : *weights.offset;
    ManyPlace<Many::GROUPS> place;
    for (u32 index = blockIdx.x / Many::CLUSTER; index < work.units; index += gridDim.x / Many::CLUSTER) {
        const ManyUnit unit(work, Shape::COLUMNS, index, rank);
        for (u32 group = unit.begin; group < unit.end; group++) {
            float scale[EACH];
#pragma unroll
            for (u32 i = 0; i < EACH; i++) {
                u64 element;
                bool is_there = true;
                if (TRANSPOSED) {
                    // Of each half of the left side one for each output. What is not there counts nothing.
                    const u32 place_of = thread + i * Many::SCALERS;
                    const u32 output = group * (Many::STEPS * Many::DEPTH) + place_of % (Many::STEPS * Many::DEPTH);
                    const u32 input = min(unit.left + place_of / (Many::STEPS * Many::DEPTH) * 64, work.inputs - 64);
                    is_there = output < work.outputs;
                    element = u64(min(output, work.outputs - 1)) * work.inputs + input;
                } else {
                    const u32 output = min(unit.left + thread + i / Many::STEPS * Many::SCALERS, work.outputs - 1);
                    const u32 step = min(group * Many::STEPS + i % Many::STEPS, work.steps - 1);
                    element = u64(output) * work.inputs + step * Many::DEPTH;
                }
                const u64 block = element >> weights.block_bits;
                if (weights.nested_absmax == nullptr) {
                    scale[i] = static_cast<const float*>(weights.scales)[block];
                } else {
                    const u32 code = static_cast<const u8*>(weights.scales)[block];
                    scale[i] = __fadd_rn(__fmul_rn(map[code], weights.nested_absmax[block >> 8]), offset);
                }
                if (TRANSPOSED && !is_there) scale[i] = 0.0f;
            }
            float* to = reinterpret_cast<float*>(ring + Many::X_RING + place.slot * Many::GROUP_BYTES + Many::CODE_BYTES);
            wait_for_phase(barriers.weights_empty + place.slot, place.phase ^ 1u);
            if (TRANSPOSED) {
#pragma unroll
                for (u32 i = 0; i < EACH; i++) to[thread + i * Many::SCALERS] = scale[i];
            } else {
#pragma unroll
                for (u32 i = 0; i < EACH / Many::STEPS; i++) {
                    reinterpret_cast<float4*>(to)[thread + i * Many::SCALERS] =
                        make_float4(scale[i * 4], scale[i * 4 + 1], scale[i * 4 + 2], scale[i * 4 + 3]);
                }
            }
            __syncwarp();
            if (thread % THREADS_AT_ONCE == 0) arrive(barriers.weights_full + place.slot);
            place.advance();
        }
    }
}

// What of the tile's left side the first of a thread's two rows of the left operand is, and the second one:
// neighbours, so that the results of both are written together. Which is the first differs between lanes
// where a warp reads codes from different banks by that. If W is not transposed, two warps have every other
// byte of 16.
template <bool TRANSPOSED>
static __device__ __forceinline__ u32 many_row(u32 thread, u32 half) {
    const u32 warp = thread / LANES, group = thread % LANES / 4;
    if (TRANSPOSED) return warp / 2 * 32 + group * 4 + warp % 2 * 2 + half;
    return warp * 16 + group * 2 + (half ^ group >> 2);
}

// The left operand of a step's four products: lane t of four has of each 8 of the depth the two that are
// its own in the tensor cores' order.
template <class Float, bool TRANSPOSED>
static __device__ __forceinline__ void many_decode(u32 (&a)[4][4], const u8* codes, u32 step, const u32* table) {
    const u32 lane = threadIdx.x % LANES, quarter = lane % 4;
    const u8* entries = reinterpret_cast<const u8*>(table) + lane * 4;
    const float* scales = reinterpret_cast<const float*>(codes + Many::CODE_BYTES);
    if (TRANSPOSED) {
        // A byte has both rows of an output. 16 bytes of an output are at the place that is theirs exclusive-or
        // half of the output, modulo 4.
        const u32 warp = threadIdx.x / LANES;
        const u8* from = codes + step * (Many::DEPTH * 64) + lane * 64 + ((warp / 2 ^ lane / 2 % 4) << 4);
        const float* scale = scales + warp / 4 * (Many::STEPS * Many::DEPTH) + step * Many::DEPTH + quarter * 2;
        const u32 rotation = (39 - warp % 2 * 8) % 32;
#pragma unroll
        for (u32 m = 0; m < 2; m++) {
            // Two bytes of each of two outputs.
            u32 four[4];
            load_transposed(four, from + m * 32 * 64);
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const float2 two = *reinterpret_cast<const float2*>(scale + m * 32 + i * 8);
                const u32 entries_of[2] = {__funnelshift_l(four[i], four[i], rotation) & 0x7f80u,
                                           __funnelshift_l(four[i], four[i], rotation + 16) & 0x7f80u};
                const float2 first = halves_to_floats(*reinterpret_cast<const u32*>(entries + entries_of[0]));
                const float2 second = halves_to_floats(*reinterpret_cast<const u32*>(entries + entries_of[1]));
                a[m * 2 + i / 2][i % 2 * 2] = round_pair<Float>(__fmul_rn(first.x, two.x), __fmul_rn(second.x, two.y));
                a[m * 2 + i / 2][i % 2 * 2 + 1] = round_pair<Float>(__fmul_rn(first.y, two.x), __fmul_rn(second.y, two.y));
            }
        }
        return;
    }
    const u32 rotation = (39 - quarter * 8) % 32;
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 row = many_row<false>(threadIdx.x, half);
        const float scale = scales[row * Many::STEPS + step];
#pragma unroll
        for (u32 piece = 0; piece < 2; piece++) {
            // 16 bytes are at the place that is theirs exclusive-or the row, modulo 8.
            const u32 at = ((step * 2 + piece) ^ (row & 7u)) << 4;
            const uint4 four = *reinterpret_cast<const uint4*>(codes + row * 128 + at);
            const u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                u32 entry = __funnelshift_l(words[i], words[i], rotation) & 0x7f80u;
                float2 pair = halves_to_floats(*reinterpret_cast<const u32*>(entries + entry));
                a[piece * 2 + i / 2][i % 2 * 2 + half] =
                    round_pair<Float>(__fmul_rn(pair.x, scale), __fmul_rn(pair.y, scale));
            }
        }
    }
}

// The sums of all parts of a tile, for whoever comes last; others get false.
template <class Shape>
static __device__ __forceinline__ bool many_sum_parts(float (&sum)[Shape::SUMS], u8* workspace, u32* is_last, u32 tile,
                                                      u32 part, u32 parts) {
    const u32 thread = threadIdx.x;
    constexpr u32 PLACE = Shape::SUMS / 4 * Many::MULTIPLIERS;
    float4* places = reinterpret_cast<float4*>(workspace + COUNTER_BYTES) + u64(tile) * parts * PLACE + thread;
    float4* mine = places + u64(part) * PLACE;
#pragma unroll
    for (u32 i = 0; i < Shape::SUMS / 4; i++) {
        mine[i * Many::MULTIPLIERS] = make_float4(sum[i * 4], sum[i * 4 + 1], sum[i * 4 + 2], sum[i * 4 + 3]);
    }
    meet_threads<Many::MULTIPLIERS>();
    if (thread == 0) {
        u32* counter = reinterpret_cast<u32*>(workspace) + tile;
        *is_last = count_arrival(counter) == parts - 1 ? 1u : 0u;
        if (*is_last != 0) *counter = 0;
    }
    meet_threads<Many::MULTIPLIERS>();
    if (*is_last == 0) return false;
#pragma unroll
    for (u32 i = 0; i < Shape::SUMS; i++) sum[i] = 0.0f;
    for (u32 other = 0; other < parts; other++) {
        const float4* theirs = places + u64(other) * PLACE;
#pragma unroll
        for (u32 i = 0; i < Shape::SUMS / 4; i++) {
            float4 four = load_from_l2(theirs + i * Many::MULTIPLIERS);
            sum[i * 4] += four.x;
            sum[i * 4 + 1] += four.y;
            sum[i * 4 + 2] += four.z;
            sum[i * 4 + 3] += four.w;
        }
    }
    return true;
}

template <class Float, class Shape, bool TRANSPOSED>
static __device__ __forceinline__ void many_write(const float (&sum)[Shape::SUMS], const typename Float::Bits* bias,
                                                  typename Float::Bits* y, const ManyWork& work, const ManyUnit& unit) {
    using Bits = typename Float::Bits;
    const u32 lane = threadIdx.x % LANES, at = unit.left + (many_row<TRANSPOSED>(threadIdx.x, 0) & ~1u);
    if (at >= work.left) return;
    const bool swap = (many_row<TRANSPOSED>(threadIdx.x, 0) & 1u) != 0;
    const bool second = at + 1 < work.left, biased = !TRANSPOSED && bias != nullptr;
    const float adds[2] = {biased ? Float::decode(bias[at]) : 0.0f, biased && second ? Float::decode(bias[at + 1]) : 0.0f};
#pragma unroll
    for (u32 n = 0; n < Shape::COLUMNS / 8; n++) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const u32 row = unit.column + n * 8 + lane % 4 * 2 + i;
            if (row >= work.rows) continue;
            const float low = swap ? sum[n * 4 + 2 + i] : sum[n * 4 + i], high = swap ? sum[n * 4 + i] : sum[n * 4 + 2 + i];
            const u32 pair = round_pair<Float>(__fadd_rn(low, adds[0]), __fadd_rn(high, adds[1]));
            Bits* to = y + u64(row) * work.left + at;
            if (work.left % 2 == 0) {
                *reinterpret_cast<u32*>(to) = pair;
            } else {
                to[0] = Bits(pair & 0xffffu);
                if (second) to[1] = Bits(pair >> 16);
            }
        }
    }
}

template <class Float, u32 COLUMNS, bool TRANSPOSED>
__device__ __forceinline__ void linear_many(const Weights& weights, const TensorMap& map_of_x,
                                            const TensorMap& map_of_codes, const typename Float::Bits* bias,
                                            typename Float::Bits* y, u8* workspace, u32 rows, u32 outputs, u32 inputs,
                                            u32 parts) {
    using Shape = ManyShape<COLUMNS>;
    u8* ring = reinterpret_cast<u8*>(dynamic_shared);
    u32* table = reinterpret_cast<u32*>(ring + Many::TABLE);
    float* map = reinterpret_cast<float*>(ring + Many::MAP);
    ManyBarriers<Shape::STAGES>& barriers = *reinterpret_cast<ManyBarriers<Shape::STAGES>*>(ring + Many::BARRIERS);
    const u32 thread = threadIdx.x, lane = thread % LANES, rank = rank_in_cluster();
    launch_dependents();
    if (thread < 256) {
        u32 pair = exact_pair(thread, weights.quant_type);
        uint4* entries = reinterpret_cast<uint4*>(table + thread * LANES);
#pragma unroll
        for (u32 i = 0; i < LANES / 4; i++) entries[(i + lane) % (LANES / 4)] = make_uint4(pair, pair, pair, pair);
        if (weights.nested_absmax != nullptr) map[thread] = weights.map[thread];
    }
    if (thread == 0) barriers.init();
    meet_cluster();
    wait_for_earlier_grids();

    const ManyWork work = ManyWork::of<TRANSPOSED, COLUMNS>(rows, outputs, inputs, parts);
    if (thread >= Many::MULTIPLIERS) {
        keep_registers<40>();
        const u32 warp = (thread - Many::MULTIPLIERS) / LANES;
        if (warp >= 2) {
            many_bring_scales<Shape, TRANSPOSED>(weights, work, ring, barriers, map, rank);
        } else if (warp == 1 && lane == 0) {
            many_bring_codes<Shape, TRANSPOSED>(map_of_codes, work, ring, barriers, rank);
        } else if (lane == 0) {
            many_bring_x<Shape>(map_of_x, work, ring, barriers, rank);
        }
        __syncwarp();
    } else {
        take_registers<232>();
        ManyPlace<Shape::STAGES> at_x;
        ManyPlace<Many::GROUPS> at_weights;
        for (u32 index = blockIdx.x / Many::CLUSTER; index < work.units; index += gridDim.x / Many::CLUSTER) {
            const ManyUnit unit(work, Shape::COLUMNS, index, rank);
            float sum[Shape::SUMS];
#pragma unroll
            for (u32 i = 0; i < Shape::SUMS; i++) sum[i] = 0.0f;
            const u32 end = min(unit.end * Many::STEPS, work.steps);
            u32 step = unit.begin * Many::STEPS, before = Shape::STAGES;
            // The weights of a step are decoded while the tensor cores multiply with those of the one before,
            // which has registers of its own.
            auto advance = [&](u32(&a)[4][4]) {
                const u32 of_group = step % Many::STEPS;
                if (of_group == 0) wait_for_phase(barriers.weights_full + at_weights.slot, at_weights.phase);
                const u8* codes = ring + Many::X_RING + at_weights.slot * Many::GROUP_BYTES;
                many_decode<Float, TRANSPOSED>(a, codes, of_group, table);
                step++;
                if (of_group == Many::STEPS - 1 || step == end) {
                    __syncwarp();
                    if (lane % THREADS_AT_ONCE == 0) arrive(barriers.weights_empty + at_weights.slot);
                    at_weights.advance();
                }
                const u8* stage = ring + at_x.slot * Shape::X_BYTES;
                wait_for_phase(barriers.x_full + at_x.slot, at_x.phase);
                begin_products();
#pragma unroll
                for (u32 j = 0; j < 4; j++) multiply_async<Float>(sum, a[j], describe_tile(stage + j * 32), true);
                end_products();
                wait_for_earlier_products();
                if (before < Shape::STAGES && lane < Many::CLUSTER) arrive_at(barriers.x_empty + before, lane);
                before = at_x.slot;
                at_x.advance();
            };
            u32 even[4][4], odd[4][4];
            while (step + 1 < end) {
                advance(even);
                advance(odd);
            }
            if (step < end) advance(even);
            wait_for_products();
            if (before < Shape::STAGES && lane < Many::CLUSTER) arrive_at(barriers.x_empty + before, lane);
            keep_behind_wait(sum);
            if (unit.parts > 1 && !many_sum_parts<Shape>(sum, workspace, &barriers.is_last, unit.tile, unit.part, unit.parts)) {
                continue;
            }
            many_write<Float, Shape, TRANSPOSED>(sum, bias, y, work, unit);
        }
    }
    // Nobody ends while another one may still arrive at its barriers.
    meet_cluster();
}

#endif
