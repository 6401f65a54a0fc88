// What the kernels between a decoder's products share: eight elements at a time, and sums over a block.
#pragma once

#include "linear_common.cuh"

// What a kernel found wrong with what lies on the device: bits of the error word. `kernels/src/decoder.rs`
// has them too.
static constexpr u32 BAD_ID = 1u, BAD_POSITION = 2u;

// Told by one thread at a time; whoever reads the word does so after the kernel.
static __device__ void tell(u32* error, u32 bit) { atomicOr(error, bit); }

// Of the workspace at its beginning: counters that are zero between launches, as products have them.
static constexpr u32 DECODER_COUNTER_BYTES = 16384;

// Elements that are loaded and stored together.
static constexpr u32 EIGHT = 8;

template <class Bits>
struct Eight;
template <>
struct Eight<u16> {
    uint4 words;
    __device__ u32 operator[](u32 i) const {
        u32 word = i / 2 == 0 ? words.x : i / 2 == 1 ? words.y : i / 2 == 2 ? words.z : words.w;
        return word >> (i % 2 * 16) & 0xffffu;
    }
};
template <>
struct Eight<u32> {
    uint4 low, high;
    __device__ u32 operator[](u32 i) const {
        uint4 words = i < 4 ? low : high;
        return i % 4 == 0 ? words.x : i % 4 == 1 ? words.y : i % 4 == 2 ? words.z : words.w;
    }
};

static __device__ __forceinline__ Eight<u16> load_eight(const u16* from) {
    return {*reinterpret_cast<const uint4*>(from)};
}
static __device__ __forceinline__ Eight<u32> load_eight(const u32* from) {
    const uint4* words = reinterpret_cast<const uint4*>(from);
    return {words[0], words[1]};
}

template <class Float>
static __device__ __forceinline__ void store_eight(u16* to, const float (&values)[EIGHT]) {
    u32 words[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        words[i] = Float::template encode<true>(values[2 * i]) | Float::template encode<true>(values[2 * i + 1]) << 16;
    }
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}
template <class Float>
static __device__ __forceinline__ void store_eight(u32* to, const float (&values)[EIGHT]) {
    u32 words[EIGHT];
#pragma unroll
    for (u32 i = 0; i < EIGHT; i++) words[i] = Float::template encode<true>(values[i]);
    uint4* at = reinterpret_cast<uint4*>(to);
    at[0] = make_uint4(words[0], words[1], words[2], words[3]);
    at[1] = make_uint4(words[4], words[5], words[6], words[7]);
}

// Whether a place can be read and written eight elements at a time. Null can.
static __device__ __forceinline__ bool is_aligned(const void* place) { return reinterpret_cast<u64>(place) % 16 == 0; }

static __device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(ALL_LANES, value, mask);
    return value;
}

// NaN does not count.
static __device__ __forceinline__ float most_of_warp(float value) {
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, mask));
    return value;
}

// For every thread of the block.
static __device__ float sum_of_block(float value) {
    __shared__ float of_warps[WARPS];
    value = sum_of_warp(value);
    if (threadIdx.x % LANES == 0) of_warps[threadIdx.x / LANES] = value;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < WARPS; i++) sum += of_warps[i];
    return sum;
}

// Larger for what comes earlier: the larger value first, of equal ones the one with the smaller index, NaN
// last. 0 is behind everything.
static __device__ __forceinline__ u64 rank_of(float value, u32 index) {
    u32 bits = u32(__float_as_int(value));
    if (bits == 0x80000000u) bits = 0;
    u32 order = bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
    if ((bits & 0x7fffffffu) > u32(INFINITY_BITS)) order = 0;
    return u64(order) << 32 | u32(~index);
}
static __device__ __forceinline__ u32 index_of(u64 rank) { return ~u32(rank); }

static __device__ __forceinline__ u64 most_of_warp(u64 rank) {
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) {
        u64 other = __shfl_xor_sync(ALL_LANES, rank, mask);
        rank = other > rank ? other : rank;
    }
    return rank;
}
