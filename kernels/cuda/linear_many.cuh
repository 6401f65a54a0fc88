// y = x * transpose(W) + bias for many rows, on tensor cores of compute capability 9.0. Weights become
// the elements that dequantizing would give, code times scale rounded once, on their way from shared
// memory to registers, where they are the left operand; 256 rows of x are the columns of the right one.
// For inputs that are a multiple of 64, blocks of 64 and more, and pointers that are multiples of 16.
//
// The work is a list of tiles of 128 outputs and 256 rows, each in as many parts of its inputs as the
// launch says. A thread block takes every so-manieth of these. Two warpgroups have 64 outputs each.
// Copies of the next steps of 64 inputs are on their way meanwhile. The weights of a step have
// registers of their own, so that they may be decoded while the tensor cores multiply with those of the one
// before; the compiler that is pinned lets them wait (compile.py). Whoever comes last of the parts of a tile
// sums them up, in their order.
#pragma once

#include "linear_common.cuh"
#include "linear_fetch.cuh"
#include "linear_warpgroup.cuh"

#if ARCHITECTURE >= 900

struct Many {
    static constexpr u32 OUTPUTS = 128, COLUMNS = 256, STEP = 64, STAGES = 5, AHEAD = STAGES - 2;
    // Of a stage: x in rows of 128 bytes; codes of an output in 32; a scale, or the word that its code
    // is in, and the absmax of these.
    static constexpr u32 X_BYTES = COLUMNS * 128, CODE_BYTES = OUTPUTS * 32, SCALE_BYTES = OUTPUTS * 8;
    static constexpr u32 STAGE_BYTES = X_BYTES + CODE_BYTES + SCALE_BYTES;
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

// Brings the steps of a tile into shared memory.
struct ManyFetch {
    const Weights& weights;
    const u8* x;
    u32 rows, outputs, inputs;
    // Of the tile.
    u32 output, column;
    u64 blocks;

    // What this thread copies of one step.
    __device__ void copy(u8* stage, u32 step) const {
        const u32 thread = threadIdx.x;
        {
            // Eight threads have a row's 128 bytes, each 16 at the place that is theirs exclusive-or the row.
            const u32 piece = thread % 8, first = thread / 8;
            u8* to = stage + first * 128 + ((piece ^ (first & 7u)) << 4);
            const u8* from = x + u64(step) * (Many::STEP * 2) + piece * 16;
#pragma unroll
            for (u32 i = 0; i < Many::COLUMNS / 32; i++) {
                // Rows that are not there are others: nobody reads their results.
                u32 row = min(column + first + i * 32, rows - 1);
                copy_async_16(to + i * 32 * 128, from + u64(row) * inputs * 2);
            }
        }
        {
            const u32 row = thread / 2;
            const u64 first = u64(min(output + row, outputs - 1)) * inputs + step * Many::STEP;
            copy_async_16(stage + Many::X_BYTES + thread * 16, weights.codes + first / 2 + thread % 2 * 16);
        }
        if (thread < Many::OUTPUTS) {
            const u64 first = u64(min(output + thread, outputs - 1)) * inputs + step * Many::STEP;
            const u64 block = first >> weights.block_bits;
            u8* to = stage + Many::X_BYTES + Many::CODE_BYTES + thread * 8;
            if (weights.nested_absmax == nullptr) {
                copy_async_4(to, static_cast<const float*>(weights.scales) + block);
            } else {
                const u8* codes = static_cast<const u8*>(weights.scales);
                if ((block | 3) < blocks) {
                    copy_async_4(to, codes + (block & ~u64(3)));
                } else {
                    // The last word is not whole.
                    to[block & 3] = codes[block];
                }
                copy_async_4(to + 4, weights.nested_absmax + (block >> 8));
            }
        }
    }
};

// The scale of an output of the tile in a step.
static __device__ __forceinline__ float many_scale(const Weights& weights, const u8* stage, u32 row, u32 output,
                                                   u32 inputs, u32 step, const float* map, float offset) {
    const u8* at = stage + Many::X_BYTES + Many::CODE_BYTES + row * 8;
    if (weights.nested_absmax == nullptr) return *reinterpret_cast<const float*>(at);
    const u64 block = (u64(output) * inputs + step * Many::STEP) >> weights.block_bits;
    const u32 code = at[block & 3u];
    return __fadd_rn(__fmul_rn(map[code], *reinterpret_cast<const float*>(at + 4)), offset);
}

// The output of the tile that a thread's first row of the left operand is; its second one is the next,
// so that the results of both are written together.
static __device__ __forceinline__ u32 many_row(u32 thread) { return thread / LANES * 16 + thread % LANES / 4 * 2; }

// The left operand of a step's four products: lane t of four has of each 8 inputs the two that are its
// own in the tensor cores' order, the byte t of every word.
template <class Float>
static __device__ __forceinline__ void many_decode(u32 (&a)[4][4], const u8* codes, const float (&scale)[2],
                                                   const u32* table) {
    const u32 lane = threadIdx.x % LANES, row = many_row(threadIdx.x);
    const u32 rotation = (39 - lane % 4 * 8) % 32;
    const u8* entries = reinterpret_cast<const u8*>(table) + lane * 4;
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
#pragma unroll
        for (u32 piece = 0; piece < 2; piece++) {
            uint4 four = *reinterpret_cast<const uint4*>(codes + (row + half) * 32 + piece * 16);
            const u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                u32 entry = __funnelshift_l(words[i], words[i], rotation) & 0x7f80u;
                float2 pair = halves_to_floats(*reinterpret_cast<const u32*>(entries + entry));
                a[piece * 2 + i / 2][i % 2 * 2 + half] =
                    round_pair<Float>(__fmul_rn(pair.x, scale[half]), __fmul_rn(pair.y, scale[half]));
            }
        }
    }
}

template <class Float>
__device__ __forceinline__ void linear_many(const Weights& weights, const typename Float::Bits* x,
                                            const typename Float::Bits* bias, typename Float::Bits* y, u8* workspace,
                                            u32 rows, u32 outputs, u32 inputs, u32 parts, u32 grid) {
    using Bits = typename Float::Bits;
    __shared__ u32 table[256 * LANES];
    __shared__ float map[256];
    __shared__ u32 is_last;
    u8* ring = reinterpret_cast<u8*>(dynamic_shared);
    const u32 thread = threadIdx.x, lane = thread % LANES;
    const u32 first_row = many_row(thread);
    launch_dependents();
    {
        u32 pair = exact_pair(thread, weights.quant_type);
        uint4* entries = reinterpret_cast<uint4*>(table + thread * LANES);
#pragma unroll
        for (u32 i = 0; i < LANES / 4; i++) entries[(i + lane) % (LANES / 4)] = make_uint4(pair, pair, pair, pair);
    }
    float offset = 0.0f;
    if (weights.nested_absmax != nullptr) {
        map[thread] = weights.map[thread];
        offset = *weights.offset;
    }
    wait_for_earlier_grids();

    const u32 column_tiles = (rows + Many::COLUMNS - 1) / Many::COLUMNS;
    const u32 tiles = (outputs + Many::OUTPUTS - 1) / Many::OUTPUTS * column_tiles;
    const u32 steps = inputs / Many::STEP;
    const u64 blocks = (u64(outputs) * inputs + (u64(1) << weights.block_bits) - 1) >> weights.block_bits;
    for (u32 unit = blockIdx.x; unit < tiles * parts; unit += grid) {
        // Thread blocks that run at a time share outputs, and all of them x.
        const u32 tile = unit / parts, part = unit - tile * parts;
        const u32 output = tile / column_tiles * Many::OUTPUTS, column = tile % column_tiles * Many::COLUMNS;
        const u32 begin = u32(u64(part) * steps / parts), end = u32(u64(part + 1) * steps / parts);
        const ManyFetch fetch = {weights, reinterpret_cast<const u8*>(x), rows, outputs, inputs, output, column, blocks};
        float sum[Many::SUMS];
#pragma unroll
        for (u32 i = 0; i < Many::SUMS; i++) sum[i] = 0.0f;
        // Of the tile before, everything has been read, and the table is there.
        __syncthreads();
        u32 to = 0, from = 0;
#pragma unroll
        for (u32 s = 0; s < Many::AHEAD; s++) {
            if (begin + s < end) fetch.copy(ring + s * Many::STAGE_BYTES, begin + s);
            end_copy_group();
        }
        to = Many::AHEAD;
        auto advance = [&](u32 step, u32(&a)[4][4]) {
            wait_for_copies<Many::AHEAD - 1>();
            show_to_tensor_cores();
            __syncthreads();
            if (step + Many::AHEAD < end) fetch.copy(ring + to * Many::STAGE_BYTES, step + Many::AHEAD);
            end_copy_group();
            const u8* stage = ring + from * Many::STAGE_BYTES;
            float scale[2];
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                u32 row = first_row + half;
                scale[half] = many_scale(weights, stage, row, min(output + row, outputs - 1), inputs, step, map, offset);
            }
            many_decode<Float>(a, stage + Many::X_BYTES, scale, table);
            begin_products();
#pragma unroll
            for (u32 j = 0; j < 4; j++) multiply_async<Float>(sum, a[j], describe_tile(stage + j * 32), true);
            end_products();
            wait_for_earlier_products();
            to = to + 1 == Many::STAGES ? 0 : to + 1;
            from = from + 1 == Many::STAGES ? 0 : from + 1;
        };
        // Two sets of registers: the products of one step may still read theirs.
        u32 even[4][4], odd[4][4];
        u32 step = begin;
        for (; step + 1 < end; step += 2) {
            advance(step, even);
            advance(step + 1, odd);
        }
        if (step < end) advance(step, even);
        wait_for_products();
        keep_behind_wait(sum);
        wait_for_copies<0>();

        if (parts > 1) {
            float4* partials = reinterpret_cast<float4*>(workspace + COUNTER_BYTES);
            float4* mine = partials + u64(unit) * (Many::SUMS / 4 * THREADS) + thread;
#pragma unroll
            for (u32 i = 0; i < Many::SUMS / 4; i++) {
                mine[i * THREADS] = make_float4(sum[i * 4], sum[i * 4 + 1], sum[i * 4 + 2], sum[i * 4 + 3]);
            }
            __syncthreads();
            if (thread == 0) {
                u32* counter = reinterpret_cast<u32*>(workspace) + tile;
                is_last = count_arrival(counter) == parts - 1 ? 1u : 0u;
                if (is_last != 0) *counter = 0;
            }
            __syncthreads();
            if (is_last == 0) continue;
            const float4* first = partials + u64(tile) * parts * (Many::SUMS / 4 * THREADS) + thread;
#pragma unroll
            for (u32 i = 0; i < Many::SUMS; i++) sum[i] = 0.0f;
            for (u32 other = 0; other < parts; other++) {
                const float4* theirs = first + u64(other) * (Many::SUMS / 4 * THREADS);
#pragma unroll
                for (u32 i = 0; i < Many::SUMS / 4; i++) {
                    float4 four = load_from_l2(theirs + i * THREADS);
                    sum[i * 4] += four.x;
                    sum[i * 4 + 1] += four.y;
                    sum[i * 4 + 2] += four.z;
                    sum[i * 4 + 3] += four.w;
                }
            }
        }
        const u32 at = output + first_row;
        const bool second = at + 1 < outputs;
        if (at >= outputs) continue;
        const float adds[2] = {bias == nullptr ? 0.0f : Float::decode(bias[at]),
                               bias == nullptr || !second ? 0.0f : Float::decode(bias[at + 1])};
#pragma unroll
        for (u32 n = 0; n < Many::COLUMNS / 8; n++) {
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                const u32 row = column + n * 8 + lane % 4 * 2 + i;
                if (row >= rows) continue;
                const u32 pair = round_pair<Float>(__fadd_rn(sum[n * 4 + i], adds[0]), __fadd_rn(sum[n * 4 + 2 + i], adds[1]));
                Bits* to = y + u64(row) * outputs + at;
                if (outputs % 2 == 0) {
                    *reinterpret_cast<u32*>(to) = pair;
                } else {
                    to[0] = Bits(pair & 0xffffu);
                    if (second) to[1] = Bits(pair >> 16);
                }
            }
        }
    }
}

#endif
