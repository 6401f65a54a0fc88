// Double quantization: the mean of absmax values, and absmax values to 8 bits and back.
#pragma once

#include "common.cuh"
#include "tables.cuh"

static constexpr int NESTED_BLOCK = 256;
static constexpr int PER_LANE = NESTED_BLOCK / LANES;

// The sum of a group of 256 values, `group[i]` for `i < n`, padded with +0.0: value `i` plus value
// `i + 128`, then the same with 64, 32, ... 1. Lane `l` holds the values `l + 32 k`. Lane 0 has the
// sum; all lanes take part.
template <class Number>
static __device__ double group_sum(const Number* group, u64 n) {
    double sum[PER_LANE];
    int lane = int(threadIdx.x) % LANES;
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
        int i = lane + LANES * k;
        sum[k] = u64(i) < n ? double(group[i]) : 0.0;
    }
#pragma unroll
    for (int stride = PER_LANE / 2; stride > 0; stride /= 2) {
#pragma unroll
        for (int k = 0; k < stride; k++) sum[k] = __dadd_rn(sum[k], sum[k + stride]);
    }
#pragma unroll
    for (int stride = LANES / 2; stride > 0; stride /= 2) {
        sum[0] = __dadd_rn(sum[0], __shfl_down_sync(ALL_LANES, sum[0], stride));
    }
    return sum[0];
}

// One sum for every 256 values, a warp for each.
template <class Number>
static __device__ void sum_groups(const Number* numbers, u64 n, double* sums) {
    u64 group = u64(blockIdx.x) * WARPS + threadIdx.x / LANES;
    u64 first = group * NESTED_BLOCK;
    if (first >= n) return;
    double sum = group_sum(numbers + first, n - first);
    if (threadIdx.x % LANES == 0) sums[group] = sum;
}

// The mean, given at most 256 sums: their sum over the number of values that they sum, rounded to
// f32. Of no values it is 0.0. One warp.
static __device__ void mean_of_sums(const double* sums, u32 n, u64 values, float* mean) {
    // A single sum is the last one already: adding zeros would lose the sign of a zero.
    double sum = n == 1 ? sums[0] : group_sum(sums, n);
    if (threadIdx.x == 0) *mean = values == 0 ? 0.0f : __double2float_rn(__ddiv_rn(sum, double(values)));
}

// The code of the nearest of the 256 values, by the f32 midpoint of neighbours; on a midpoint the
// value at which the search has ended, which is an even code. NaN has code 0.
static __device__ u32 nearest_code(float x, const float* map) {
    int lower = 0, pivot = 127, upper = 255;
#pragma unroll
    for (int stride = 64; stride > 0; stride /= 2) {
        if (x > map[pivot]) {
            lower = pivot;
            pivot += stride;
        } else {
            upper = pivot;
            pivot -= stride;
        }
    }
    float value = map[pivot];
    if (x > value) return u32(x > __fmul_rn(__fadd_rn(map[upper], value), 0.5f) ? upper : pivot);
    return u32(x < __fmul_rn(__fadd_rn(map[lower], value), 0.5f) ? lower : pivot);
}

// A warp for each block of 256 absmax values. Differences from the offset are quantized like
// weights: subnormals are zeros, NaN does not count, and absent values are zeros. Where all are
// zero, the reciprocal is infinite, the products are NaN, and the codes 0.
__device__ void quantize_absmax(
    const float* absmax, u64 n, const float* offset, u8* codes, float* nested_absmax) {
    __shared__ float map[256];
    u64 block = u64(blockIdx.x) * WARPS + threadIdx.x / LANES;
    u64 first = block * NESTED_BLOCK + threadIdx.x % LANES;
    // Everything is asked of memory before the first result is waited for.
    float mean = *offset;
    float difference[PER_LANE];
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) difference[k] = first + LANES * k < n ? absmax[first + LANES * k] : 0.0f;
    map[threadIdx.x] = dynamic_value(int(threadIdx.x));
    __syncthreads();
    if (block * NESTED_BLOCK >= n) return;

    int key = -1;
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
        difference[k] = first + LANES * k < n ? __fsub_rn(difference[k], mean) : 0.0f;
        key = max(key, magnitude_key(difference[k]));
    }
#pragma unroll
    for (int stride = LANES / 2; stride > 0; stride /= 2) key = max(key, __shfl_xor_sync(ALL_LANES, key, stride));
    float nested = absmax_of_key(key);
    float reciprocal = flushed_reciprocal(nested);
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
        u64 i = first + LANES * k;
        if (i < n) codes[i] = u8(nearest_code(__fmul_rn(flush(difference[k]), reciprocal), map));
    }
    if (threadIdx.x % LANES == 0) nested_absmax[block] = nested;
}

static constexpr int PER_THREAD = 8;

// The value of the code times the nested absmax, rounded, plus the offset, rounded again.
__device__ void dequantize_absmax(
    const u8* codes, u64 n, const float* nested_absmax, const float* offset, float* out) {
    __shared__ float map[256];
    u64 first = u64(blockIdx.x) * THREADS * PER_THREAD + threadIdx.x;
    float mean = *offset;
    u8 code[PER_THREAD];
    float nested[PER_THREAD];
#pragma unroll
    for (int k = 0; k < PER_THREAD; k++) {
        u64 i = first + THREADS * k;
        code[k] = i < n ? codes[i] : 0;
        nested[k] = i < n ? nested_absmax[i / NESTED_BLOCK] : 0.0f;
    }
    map[threadIdx.x] = dynamic_value(int(threadIdx.x));
    __syncthreads();
#pragma unroll
    for (int k = 0; k < PER_THREAD; k++) {
        u64 i = first + THREADS * k;
        if (i < n) out[i] = __fadd_rn(__fmul_rn(map[code[k]], nested[k]), mean);
    }
}
