// y = x * transpose(W) + bias for whatever there is: every length, alignment, block size and type.
// A warp has one output of up to 8 rows. Sums are f32, each lane's in the order of its elements,
// the lanes' as a tree: a row's bits do not depend on other rows.
#pragma once

#include "linear_common.cuh"

static constexpr int GENERAL_ROWS = 8;
// Elements that a lane takes at a time. A multiple of them begins a byte, and lies in one block.
static constexpr int GENERAL_CHUNK = 8;

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

    // Elements of the flattened tensor.
    u64 first = output * inputs, end = first + inputs;
    u64 elements = u64(outputs) * inputs;
    bool words = reinterpret_cast<u64>(weights.codes) % 4 == 0;
    float sum[GENERAL_ROWS] = {};
    for (u64 begin = first / GENERAL_CHUNK * GENERAL_CHUNK + lane * GENERAL_CHUNK; begin < end;
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
        float scale = weights.scale(begin >> weights.block_bits);
#pragma unroll
        for (int i = 0; i < GENERAL_CHUNK; i++) {
            u64 element = begin + i;
            if (element < first || element >= end) continue;
            float weight = __fmul_rn(values[bytes >> (i ^ 1) * 4 & 15u], scale);
            const typename Float::Bits* column = x + u64(row) * inputs + (element - first);
#pragma unroll
            for (int r = 0; r < GENERAL_ROWS; r++) {
                if (row + r < rows) sum[r] = __fmaf_rn(weight, Float::decode(column[u64(r) * inputs]), sum[r]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < GENERAL_ROWS; r++) {
#pragma unroll
        for (int stride = LANES / 2; stride > 0; stride /= 2) {
            sum[r] = __fadd_rn(sum[r], __shfl_xor_sync(ALL_LANES, sum[r], stride));
        }
        if (lane == 0 && row + r < rows) {
            float result = bias == nullptr ? sum[r] : __fadd_rn(sum[r], Float::decode(bias[output]));
            y[u64(row + r) * outputs + output] = typename Float::Bits(Float::template encode<true>(result));
        }
    }
}
