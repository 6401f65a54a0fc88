// Row by row: norms, gates, sums, rows of a table, products with matrices that are not quantized.
#pragma once

#include "decoder_common.cuh"
#include "experts_common.cuh"

// y = x / sqrt(mean(x^2) + eps) * (offset + weight); with `add`, x becomes x + add first. A thread block has
// a row.
template <class Float>
__device__ void decoder_norm(typename Float::Bits* x, const typename Float::Bits* add,
                             const typename Float::Bits* weight, typename Float::Bits* y, u32 n, float eps,
                             float offset) {
    using Bits = typename Float::Bits;
    launch_dependents();
    wait_for_earlier_grids();
    x += u64(blockIdx.x) * n;
    y += u64(blockIdx.x) * n;
    if (add != nullptr) add += u64(blockIdx.x) * n;
    bool vectors = n % EIGHT == 0 && is_aligned(x) && is_aligned(y) && is_aligned(weight) && is_aligned(add);
    float sum = 0.0f;
    // A thread reads in the second loop what it has written in the first one.
    if (vectors) {
        for (u32 i = threadIdx.x * EIGHT; i < n; i += THREADS * EIGHT) {
            Eight<Bits> bits = load_eight(x + i);
            float values[EIGHT];
#pragma unroll
            for (u32 e = 0; e < EIGHT; e++) values[e] = Float::decode(bits[e]);
            if (add != nullptr) {
                Eight<Bits> more = load_eight(add + i);
#pragma unroll
                for (u32 e = 0; e < EIGHT; e++) {
                    values[e] += Float::decode(more[e]);
                    values[e] = Float::decode(Float::template encode<true>(values[e]));
                }
                store_eight<Float>(x + i, values);
            }
#pragma unroll
            for (u32 e = 0; e < EIGHT; e++) sum += values[e] * values[e];
        }
    } else {
        for (u32 i = threadIdx.x; i < n; i += THREADS) {
            float value = Float::decode(x[i]);
            if (add != nullptr) {
                u32 bits = Float::template encode<true>(value + Float::decode(add[i]));
                x[i] = Bits(bits);
                value = Float::decode(bits);
            }
            sum += value * value;
        }
    }
    float factor = 1.0f / sqrtf(sum_of_block(sum) / float(n) + eps);
    if (vectors) {
        for (u32 i = threadIdx.x * EIGHT; i < n; i += THREADS * EIGHT) {
            Eight<Bits> bits = load_eight(x + i), weights = load_eight(weight + i);
            float values[EIGHT];
#pragma unroll
            for (u32 e = 0; e < EIGHT; e++) {
                values[e] = Float::decode(bits[e]) * factor * (offset + Float::decode(weights[e]));
            }
            store_eight<Float>(y + i, values);
        }
    } else {
        for (u32 i = threadIdx.x; i < n; i += THREADS) {
            float value = Float::decode(x[i]) * factor * (offset + Float::decode(weight[i]));
            y[i] = Bits(Float::template encode<true>(value));
        }
    }
}

// Each element of y made of one of a and one of b, which may lie where y does. A thread has eight.
template <class Float, class Make>
__device__ void decoder_each(const typename Float::Bits* a, const typename Float::Bits* b, typename Float::Bits* y,
                             u64 elements, Make make) {
    using Bits = typename Float::Bits;
    launch_dependents();
    wait_for_earlier_grids();
    u64 first = (u64(blockIdx.x) * THREADS + threadIdx.x) * EIGHT;
    if (first >= elements) return;
    if (first + EIGHT <= elements && is_aligned(a) && is_aligned(b) && is_aligned(y)) {
        Eight<Bits> left = load_eight(a + first), right = load_eight(b + first);
        float values[EIGHT];
#pragma unroll
        for (u32 e = 0; e < EIGHT; e++) values[e] = make(Float::decode(left[e]), Float::decode(right[e]));
        store_eight<Float>(y + first, values);
        return;
    }
    for (u64 i = first; i < elements && i < first + EIGHT; i++) {
        y[i] = Bits(Float::template encode<true>(make(Float::decode(a[i]), Float::decode(b[i]))));
    }
}

// Rows of a table; zeros for what is no row of it. A thread block has 2048 elements of a row.
static constexpr u32 GATHERED = THREADS * EIGHT;
template <class Bits>
__device__ void decoder_gather(const Bits* table, const u32* ids, Bits* y, u32* error, u32 rows, u32 table_rows,
                               u32 n) {
    launch_dependents();
    wait_for_earlier_grids();
    u32 blocks = (n + GATHERED - 1) / GATHERED;
    if (blocks == 0) return;
    u32 row = blockIdx.x / blocks, begin = blockIdx.x % blocks * GATHERED;
    if (row >= rows) return;
    u32 id = ids[row], end = min(begin + GATHERED, n);
    bool known = id < table_rows;
    if (!known && threadIdx.x == 0) tell(error, BAD_ID);
    const Bits* from = table + u64(known ? id : 0u) * n;
    Bits* to = y + u64(row) * n;
    for (u32 i = begin + threadIdx.x; i < end; i += THREADS) to[i] = known ? from[i] : Bits(0);
}

// y = x * transpose(W) + bias. A warp has one output of up to ROWS rows.
template <class Float, u32 ROWS>
__device__ void decoder_dense(const typename Float::Bits* weights, const typename Float::Bits* x,
                              const typename Float::Bits* bias, typename Float::Bits* y, u32 rows, u32 outputs,
                              u32 inputs) {
    using Bits = typename Float::Bits;
    constexpr u32 AT_ONCE = sizeof(Bits) == 2 ? 4 : 2;
    launch_dependents();
    u32 row_tiles = (rows + ROWS - 1) / ROWS;
    if (row_tiles == 0) return;
    u32 row = blockIdx.x % row_tiles * ROWS, lane = threadIdx.x % LANES;
    u64 output = u64(blockIdx.x / row_tiles) * WARPS + threadIdx.x / LANES;
    wait_for_earlier_grids();
    if (output >= outputs) return;
    const Bits* of_output = weights + output * inputs;
    x += u64(row) * inputs;
    u32 count = min(rows - row, ROWS);
    float sum[ROWS] = {};
    u32 done = 0;
    if (inputs % EIGHT == 0 && is_aligned(of_output) && is_aligned(x)) {
        for (u32 begin = lane * EIGHT; begin < inputs; begin += LANES * EIGHT * AT_ONCE) {
            Eight<Bits> loaded[AT_ONCE];
#pragma unroll
            for (u32 i = 0; i < AT_ONCE; i++) {
                u32 at = begin + i * LANES * EIGHT;
                if (at < inputs) loaded[i] = load_eight(of_output + at);
            }
#pragma unroll
            for (u32 i = 0; i < AT_ONCE; i++) {
                u32 at = begin + i * LANES * EIGHT;
                if (at >= inputs) continue;
#pragma unroll
                for (u32 r = 0; r < ROWS; r++) {
                    if (r >= count) continue;
                    Eight<Bits> values = load_eight(x + u64(r) * inputs + at);
#pragma unroll
                    for (u32 e = 0; e < EIGHT; e++) {
                        sum[r] = __fmaf_rn(Float::decode(loaded[i][e]), Float::decode(values[e]), sum[r]);
                    }
                }
            }
        }
        done = inputs;
    }
    for (u32 i = done + lane; i < inputs; i += LANES) {
        float weight = Float::decode(of_output[i]);
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            if (r < count) sum[r] = __fmaf_rn(weight, Float::decode(x[u64(r) * inputs + i]), sum[r]);
        }
    }
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        float result = sum_of_warp(sum[r]);
        if (lane != 0 || r >= count) continue;
        if (bias != nullptr) result += Float::decode(bias[output]);
        y[u64(row + r) * outputs + output] = Bits(Float::template encode<true>(result));
    }
}

// y[row] = the sum of weights[row, j] * x[row, j] over j. A thread block has 256 elements of a row.
template <class Float>
__device__ void decoder_combine(const typename Float::Bits* x, const float* weights, typename Float::Bits* y, u32 rows,
                                u32 k, u32 columns) {
    launch_dependents();
    wait_for_earlier_grids();
    u32 blocks = (columns + THREADS - 1) / THREADS;
    if (blocks == 0) return;
    u32 row = blockIdx.x / blocks, column = blockIdx.x % blocks * THREADS + threadIdx.x;
    if (row >= rows || column >= columns) return;
    float sum = 0.0f;
    for (u32 j = 0; j < k; j++) {
        u64 part = u64(row) * k + j;
        sum = __fmaf_rn(weights[part], Float::decode(x[part * columns + column]), sum);
    }
    y[u64(row) * columns + column] = typename Float::Bits(Float::template encode<true>(sum));
}
