// dx = dy * W: what training needs. dy is [rows, outputs] and dx [rows, inputs]. The order of each sum
// over the outputs is fixed by the lengths and the number of shares that the outputs are dealt out to.
#pragma once

#include "linear_common.cuh"
#include "linear_fetch.cuh"

static constexpr int TRANSPOSED_ROWS = 8;

// For whatever there is. A thread block has 32 inputs of up to 8 rows, each warp every eighth output.
template <class Float>
__device__ void linear_transposed_general(const Weights& weights, const typename Float::Bits* dy,
                                          typename Float::Bits* dx, u32 rows, u32 outputs, u32 inputs) {
    __shared__ float values[16];
    __shared__ float sums[WARPS][TRANSPOSED_ROWS][LANES];
    launch_dependents();
    if (threadIdx.x < 16) {
        values[threadIdx.x] = __int_as_float(int(CODE_VALUE_BITS[weights.quant_type][threadIdx.x]));
    }
    __syncthreads();
    wait_for_earlier_grids();

    const u32 row_tiles = (rows + TRANSPOSED_ROWS - 1) / TRANSPOSED_ROWS;
    if (row_tiles == 0) return;
    const u32 row = blockIdx.x % row_tiles * TRANSPOSED_ROWS, lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const u64 input = u64(blockIdx.x / row_tiles) * LANES + lane;
    float sum[TRANSPOSED_ROWS] = {};
    if (input < inputs) {
        for (u64 output = warp; output < outputs; output += WARPS) {
            u64 element = output * inputs + input;
            u32 byte = weights.codes[element / 2];
            u32 code = element % 2 == 0 ? byte >> 4 : byte & 15u;
            float weight = __fmul_rn(values[code], weights.scale(element >> weights.block_bits));
#pragma unroll
            for (int r = 0; r < TRANSPOSED_ROWS; r++) {
                if (row + r < rows) sum[r] = __fmaf_rn(weight, Float::decode(dy[u64(row + r) * outputs + output]), sum[r]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < TRANSPOSED_ROWS; r++) sums[warp][r][lane] = sum[r];
    __syncthreads();
    // Each warp sums up one row.
    if (input >= inputs || row + warp >= rows) return;
    float result = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) result = __fadd_rn(result, sums[w][warp][lane]);
    dx[u64(row + warp) * inputs + input] = typename Float::Bits(Float::template encode<true>(result));
}

#if ARCHITECTURE >= 800

// On tensor cores: for inputs that are a multiple of 32, outputs that are one of 8, and pointers that
// are multiples of 16. A thread block has 128 inputs of 64 or 128 rows, and takes 64 outputs at a time:
// their weights are decoded and rounded into shared memory, and are the left operand from there,
// transposed. While they are multiplied, what the next 64 need is on its way to registers.
template <u32 OF_ROWS>
struct TransposedShape {
    static constexpr u32 INPUTS = 128, ROWS = OF_ROWS, OUTPUTS = 64;
    // Bytes from one row to the next, so that eight rows lie in different banks.
    static constexpr u32 WEIGHT_ROW = INPUTS * 2 + 16, DY_ROW = OUTPUTS * 2 + 16;
    static constexpr u32 WEIGHT_BYTES = OUTPUTS * WEIGHT_ROW, DY_BYTES = ROWS * DY_ROW;
    static constexpr u32 STAGE_BYTES = WEIGHT_BYTES + DY_BYTES, SHARED_BYTES = 2 * STAGE_BYTES;
};

template <class Float, u32 ROWS>
__device__ __forceinline__ void linear_transposed(const Weights& weights, const typename Float::Bits* dy,
                                                  typename Float::Bits* dx, u8* workspace, u32 rows, u32 outputs,
                                                  u32 inputs, u32 shares) {
    using Shape = TransposedShape<ROWS>;
    __shared__ float2 table[256];
    u8* stages = reinterpret_cast<u8*>(dynamic_shared);
    const u32 thread = threadIdx.x, lane = thread % LANES, warp = thread / LANES;
    const u32 group = lane >> 2, quarter = lane & 3u;
    const u32 row_tiles = (rows + Shape::ROWS - 1) / Shape::ROWS;
    // Blocks of one tile are neighbours.
    const u32 share = blockIdx.x % shares, tile = blockIdx.x / shares;
    const u32 first_row = tile % row_tiles * Shape::ROWS, first_input = tile / row_tiles * Shape::INPUTS;
    const u32 steps = (outputs + Shape::OUTPUTS - 1) / Shape::OUTPUTS;
    const u32 begin = u32(u64(steps) * share / shares) * Shape::OUTPUTS;
    const u32 end = u32(u64(steps) * (share + 1) / shares) * Shape::OUTPUTS;

    launch_dependents();
    table[thread].x = __int_as_float(int(CODE_VALUE_BITS[weights.quant_type][thread >> 4]));
    table[thread].y = __int_as_float(int(CODE_VALUE_BITS[weights.quant_type][thread & 15u]));
    wait_for_earlier_grids();

    // A thread decodes 32 weights of one output, and copies 16 bytes of every 32nd row.
    const u32 of_output = thread / 4, of_input = first_input + thread % 4 * 32;
    const u32 of_row = thread / 8, of_piece = thread % 8 * 8;
    uint4 codes;
    float scale = 0.0f;
    uint4 of_dy[ROWS / 32];
    auto load = [&](u32 first_output) {
        u32 output = first_output + of_output;
        codes = make_uint4(0, 0, 0, 0);
        // What is not there counts nothing.
        scale = 0.0f;
        if (output < outputs && of_input < inputs) {
            u64 element = u64(output) * inputs + of_input;
            codes = *reinterpret_cast<const uint4*>(weights.codes + element / 2);
            scale = weights.scale(element >> weights.block_bits);
        }
#pragma unroll
        for (u32 i = 0; i < ROWS / 32; i++) {
            u32 row = first_row + of_row + i * 32;
            of_dy[i] = make_uint4(0, 0, 0, 0);
            if (row < rows && first_output + of_piece < outputs) {
                of_dy[i] = *reinterpret_cast<const uint4*>(dy + u64(row) * outputs + first_output + of_piece);
            }
        }
    };
    auto put = [&](u8* stage) {
        const u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
        u8* to = stage + of_output * Shape::WEIGHT_ROW + thread % 4 * 64;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 pairs[4];
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                float2 value = table[words[i] >> j * 8 & 255u];
                pairs[j] = round_pair<Float>(__fmul_rn(value.x, scale), __fmul_rn(value.y, scale));
            }
            *reinterpret_cast<uint4*>(to + i * 16) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
#pragma unroll
        for (u32 i = 0; i < ROWS / 32; i++) {
            u8* row = stage + Shape::WEIGHT_BYTES + (of_row + i * 32) * Shape::DY_ROW;
            *reinterpret_cast<uint4*>(row + of_piece * 2) = of_dy[i];
        }
    };

    float sum[Shape::ROWS / 8][4];
#pragma unroll
    for (u32 n = 0; n < Shape::ROWS / 8; n++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) sum[n][i] = 0.0f;
    }
    load(begin);
    __syncthreads();
    put(stages);
    __syncthreads();
    u32 stage = 0;
    for (u32 output = begin; output < end; output += Shape::OUTPUTS) {
        bool more = output + Shape::OUTPUTS < end;
        if (more) load(output + Shape::OUTPUTS);
        const u8* from = stages + stage * Shape::STAGE_BYTES;
#pragma unroll
        for (u32 j = 0; j < Shape::OUTPUTS / 16; j++) {
            u32 a[4];
            // Of the four matrices of 8 outputs and 8 inputs, lane l addresses row l % 8 of the l / 8th.
            load_transposed(a, from + (j * 16 + lane % 8 + lane / 16 * 8) * Shape::WEIGHT_ROW +
                                   (warp * 16 + lane / 8 % 2 * 8) * 2);
#pragma unroll
            for (u32 n = 0; n < Shape::ROWS / 8; n += 2) {
                u32 b[4];
                // Two tiles of columns, of each the 8 outputs before the 8 after them.
                load_straight(b, from + Shape::WEIGHT_BYTES + (n * 8 + lane % 8 + lane / 16 * 8) * Shape::DY_ROW +
                                     j * 32 + lane / 8 % 2 * 16);
                multiply_tile<Float>(sum[n], a, b[0], b[1]);
                multiply_tile<Float>(sum[n + 1], a, b[2], b[3]);
            }
        }
        stage ^= 1u;
        if (more) put(stages + stage * Shape::STAGE_BYTES);
        __syncthreads();
    }
    if (shares > 1) {
        // As in linear_tiles.cuh, whoever comes last makes the sum, in the order of the shares.
        constexpr u32 PARTIAL = Shape::ROWS / 8 * THREADS;
        float4* partials = reinterpret_cast<float4*>(workspace + COUNTER_BYTES) + u64(tile) * shares * PARTIAL + thread;
#pragma unroll
        for (u32 n = 0; n < Shape::ROWS / 8; n++) {
            const float(&s)[4] = sum[n];
            partials[share * PARTIAL + n * THREADS] = make_float4(s[0], s[1], s[2], s[3]);
        }
        __shared__ u32 last;
        __syncthreads();
        if (thread == 0) {
            u32* counter = reinterpret_cast<u32*>(workspace) + tile;
            last = count_arrival(counter) == shares - 1 ? 1u : 0u;
            if (last != 0) *counter = 0;
        }
        __syncthreads();
        if (last == 0) return;
#pragma unroll
        for (u32 n = 0; n < Shape::ROWS / 8; n++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) sum[n][i] = 0.0f;
        }
        for (u32 other = 0; other < shares; other++) {
#pragma unroll
            for (u32 n = 0; n < Shape::ROWS / 8; n++) {
                float4 part = load_from_l2(partials + other * PARTIAL + n * THREADS);
                sum[n][0] += part.x;
                sum[n][1] += part.y;
                sum[n][2] += part.z;
                sum[n][3] += part.w;
            }
        }
    }
#pragma unroll
    for (u32 n = 0; n < Shape::ROWS / 8; n++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 row = first_row + n * 8 + quarter * 2 + i % 2, input = first_input + warp * 16 + group + i / 2 * 8;
            if (row < rows && input < inputs) {
                dx[u64(row) * inputs + input] = typename Float::Bits(Float::template encode<true>(sum[n][i]));
            }
        }
    }
}

#endif
