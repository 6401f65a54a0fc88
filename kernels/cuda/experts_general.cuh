// Products with experts for whatever there is: every length, alignment, block size and type. A warp has
// one result of up to 8 rows. Each sum is made as in linear_general.cuh, whatever rows there are.
#pragma once

#include "experts_common.cuh"
#include "linear_general.cuh"

template <class Float>
__device__ void experts_general(const Experts<Float>& product) {
    __shared__ float values[16];
    const Weights& weights = product.weights;
    if (threadIdx.x < 16) {
        values[threadIdx.x] = __int_as_float(int(CODE_VALUE_BITS[weights.quant_type][threadIdx.x]));
    }
    __syncthreads();
    wait_for_earlier_grids();
    launch_dependents();

    const u32 lane = threadIdx.x % LANES, outputs = product.outputs, inputs = product.inputs;
    const u32 groups = (product.results() + WARPS - 1) / WARPS, row_tiles = product.row_tiles();
    const u64 elements = u64(product.experts) * outputs * inputs;
    for (u64 i = blockIdx.x; i < u64(row_tiles) * groups; i += gridDim.x) {
        const RowTile tile = product.row_tile(u32(i / groups));
        const u32 result = u32(i % groups) * WARPS + threadIdx.x / LANES;
        if (result >= product.results()) continue;
        for (u32 row = 0; row < tile.count; row += GENERAL_ROWS) {
            const u32 rows = min(tile.count - row, u32(GENERAL_ROWS));
            u32 pairs[GENERAL_ROWS];
            const typename Float::Bits* rows_of_x[GENERAL_ROWS];
#pragma unroll
            for (u32 r = 0; r < GENERAL_ROWS; r++) {
                pairs[r] = product.pair(tile, row + min(r, rows - 1));
                rows_of_x[r] = product.x + u64(product.row_of_x(pairs[r])) * inputs;
            }
            // Of a gate its own sums come first, and then the other ones'.
            const u32 last = product.gated() ? 1 : 0;
            float sum[GENERAL_ROWS] = {}, gates[GENERAL_ROWS] = {};
#pragma unroll 1
            for (u32 other = 0; other <= last; other++) {
                const u32 weight_row = product.gated() ? product.gate_row(result, other) : result;
                const float add = product.bias_of(tile.expert, weight_row);
#pragma unroll
                for (u32 r = 0; r < GENERAL_ROWS; r++) {
                    gates[r] = sum[r];
                    sum[r] = 0.0f;
                }
                Nested nested = {nullptr, 0.0f};
                if (weights.nested_absmax != nullptr) nested = product.nested_of(tile.expert, weight_row);
                add_products<Float>(
                    sum, weights, values, elements, (u64(tile.expert) * outputs + weight_row) * inputs, inputs, rows,
                    [&](u32 r) { return rows_of_x[r]; },
                    [&](u64 block) {
                        return nested.absmax == nullptr ? static_cast<const float*>(weights.scales)[block]
                                                        : weights.scale(block, nested.absmax, nested.mean);
                    });
                add_lanes(sum);
#pragma unroll
                for (u32 r = 0; r < GENERAL_ROWS; r++) sum[r] = __fadd_rn(sum[r], add);
            }
            if (product.gated()) {
#pragma unroll
                for (u32 r = 0; r < GENERAL_ROWS; r++) sum[r] = product.activated(gates[r], sum[r]);
            }
#pragma unroll
            for (u32 r = 0; r < GENERAL_ROWS; r++) {
                if (lane == 0 && r < rows) product.write(pairs[r], result, sum[r]);
            }
        }
    }
}
