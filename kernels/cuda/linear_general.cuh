// y = x * transpose(W) + bias for whatever there is: every length, alignment, block size and type.
// A warp has one output of up to 8 rows. Sums are f32, each lane's in the order of its elements,
// the lanes' as a tree: a row's bits do not depend on other rows.
#pragma once

#include "linear_common.cuh"

static constexpr int GENERAL_ROWS = 8;
// Elements that a lane takes at a time. A multiple of them begins a byte, and lies in one block.
static constexpr int GENERAL_CHUNK = 8;

// Adds a lane's products of an output's weights, which begin at element `first` of `elements`, and of
// up to 8 rows of x, which `row_of` gives; `scale_of` gives the scale of a block.
template <class Float, class RowOf, class ScaleOf>
__device__ __forceinline__ void add_products(float (&sum)[GENERAL_ROWS], const Weights& weights, const float* values,
                                             u64 elements, u64 first, u32 inputs, u32 rows, RowOf row_of,
                                             ScaleOf scale_of) {
    u64 end = first + inputs;
    bool words = reinterpret_cast<u64>(weights.codes) % 4 == 0;
    for (u64 begin = first / GENERAL_CHUNK * GENERAL_CHUNK + threadIdx.x % LANES * GENERAL_CHUNK; begin < end;
         begin += LANES * GENERAL_CHUNK) {
        u32 bytes = 0;
        if (words && begin + GENERAL_CHUNK <= elements) {
            bytes = *reinterpret_cast<const u32*>(weights.codes + begin / 2);
        } else {
#pragma unroll
            for (int i = 0; i < GENERAL_CHUNK / 2; i++) {
                if (begin + 2 * i < elements) bytes |= u32(weights.codes[begin / 2 + i]) << 8 * i;
            }
        }
        float scale = scale_of(begin >> weights.block_bits);
#pragma unroll
        for (int i = 0; i < GENERAL_CHUNK; i++) {
            u64 element = begin + i;
            if (element < first || element >= end) continue;
            float weight = __fmul_rn(values[bytes >> (i ^ 1) * 4 & 15u], scale);
#pragma unroll
            for (u32 r = 0; r < GENERAL_ROWS; r++) {
                if (r < rows) sum[r] = __fmaf_rn(weight, Float::decode(row_of(r)[element - first]), sum[r]);
            }
        }
    }
}

// The sums of all lanes, for each of them.
static __device__ __forceinline__ void add_lanes(float (&sum)[GENERAL_ROWS]) {
#pragma unroll
    for (int r = 0; r < GENERAL_ROWS; r++) {
#pragma unroll
        for (int stride = LANES / 2; stride > 0; stride /= 2) {
            sum[r] = __fadd_rn(sum[r], __shfl_xor_sync(ALL_LANES, sum[r], stride));
        }
    }
}

template <class Float>
__device__ void linear_general(const Weights& weights, const typename Float::Bits* x,
                               const typename Float::Bits* bias, typename Float::Bits* y, u32 rows, u32 outputs,
                               u32 inputs) {
    __shared__ float values[16];
    launch_dependents();
    if (threadIdx.x < 16) {
        values[threadIdx.x] = __int_as_float(int(CODE_VALUE_BITS[weights.quant_type][threadIdx.x]));
    }
    __syncthreads();
    wait_for_earlier_grids();

    u32 row_tiles = (rows + GENERAL_ROWS - 1) / GENERAL_ROWS;
    if (row_tiles == 0) return;
    u32 row = blockIdx.x % row_tiles * GENERAL_ROWS;
    u64 output = u64(blockIdx.x / row_tiles) * WARPS + threadIdx.x / LANES;
    u32 lane = threadIdx.x % LANES;
    if (output >= outputs) return;

    float sum[GENERAL_ROWS] = {};
    add_products<Float>(sum, weights, values, u64(outputs) * inputs, output * inputs, inputs, rows - row,
                        [&](u32 r) { return x + u64(row + r) * inputs; },
                        [&](u64 block) { return weights.scale(block); });
    add_lanes(sum);
#pragma unroll
    for (int r = 0; r < GENERAL_ROWS; r++) {
        if (lane == 0 && row + r < rows) {
            float result = bias == nullptr ? sum[r] : __fadd_rn(sum[r], Float::decode(bias[output]));
            y[u64(row + r) * outputs + output] = typename Float::Bits(Float::template encode<true>(result));
        }
    }
}
