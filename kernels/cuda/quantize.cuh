// Quantizing to NF4.
//
// A thread holds 4 vectors of 8 elements, a warp 1024 consecutive elements (vector `u` of lane `l`
// begins at element 256 u + 8 l), and a thread block 8192, so that blocks of all sizes lie within
// one thread block. The kernel is bound by memory on large GPUs only if it spends few instructions
// on an element, so codes are looked up, not compared (see `steps`).
#pragma once

#include "common.cuh"
#include "tables.cuh"

static constexpr int VECTOR = 8;
static constexpr int VECTORS = 4;
static constexpr int QUANTIZE_WARP = VECTOR * VECTORS * LANES;
static constexpr int QUANTIZE_TILE = QUANTIZE_WARP * WARPS;

// Bits of the absmax of blocks that take the fast path: 2^-98 to 2^126. In between
// - the reciprocal, and 2^28 times the reciprocal, are normal numbers;
// - a subnormal element is under 2^-28 of the absmax and has code 7, flushed or not.
// All zeros, infinities and NaN are outside of it.
static constexpr int PLAIN_MIN = 0x0e800000;
static constexpr int PLAIN_MAX = 0x7e800000;

// Codes of fixed-point numbers.
//
// Thresholds are at least 2^-5 in magnitude, where a float is a multiple of 2^-28. So a product
// `v`, rounded down to such a multiple, is above a threshold exactly if `v` is, and what rounding
// changes is below 2^-5 and has code 7. An interval of 2^-4 holds at most one threshold; with
// `i = v * 2^28` its number is `i >> 24`, and the code `(i + entry) >> 24`: the entry replaces the
// number of the interval by the code at its beginning, and carries over from the threshold on.
// Entries are stored times 16, so that `16 i + entry`, modulo 2^32, has the code in its upper bits.
static constexpr int FIXED_BITS = 28;
static constexpr int INTERVAL_BITS = 24;
// `v` is from -1 to 1: a magnitude times its rounded reciprocal is not rounded above 1.
static constexpr int FIRST_INTERVAL = -(1 << (FIXED_BITS - INTERVAL_BITS));
static constexpr int INTERVALS = 1 - 2 * FIRST_INTERVAL;

struct Steps {
    u32 entry[INTERVALS];
};

static __device__ constexpr int fixed_threshold(int index) {
    u32 bits = nf4_threshold_bits(index);
    int significand = int((bits & 0x7fffffu) | 0x800000u);
    int exponent = int(bits >> 23 & 0xffu) - 127 - 23;
    int fixed = significand << (exponent + FIXED_BITS);
    return bits >> 31 != 0 ? -fixed : fixed;
}

static __device__ constexpr Steps make_steps() {
    Steps steps = {};
    constexpr int WIDTH = 1 << INTERVAL_BITS;
    for (int k = 0; k < INTERVALS; k++) {
        int begin = (FIRST_INTERVAL + k) * WIDTH;
        int code = 0;
        while (code < 15 && fixed_threshold(code) < begin) code++;
        int entry = code * WIDTH - begin;
        if (code < 15 && fixed_threshold(code) < begin + WIDTH - 1) {
            entry += begin + WIDTH - (fixed_threshold(code) + 1);
        }
        steps.entry[k] = u32(entry) * 16;
    }
    return steps;
}

__device__ constexpr Steps STEPS = make_steps();

// Eight consecutive elements, as they lie in memory; those behind the end are zeros.
template <class Float>
struct Vector {
    static constexpr int BYTES = sizeof(typename Float::Bits);
    static constexpr int WORDS = VECTOR * BYTES / 4;
    u32 word[WORDS];

    static __device__ Vector load(const typename Float::Bits* source) {
        Vector vector;
        const uint4* from = reinterpret_cast<const uint4*>(source);
#pragma unroll
        for (int i = 0; i < WORDS / 4; i++) {
            uint4 four = from[i];
            vector.word[4 * i] = four.x;
            vector.word[4 * i + 1] = four.y;
            vector.word[4 * i + 2] = four.z;
            vector.word[4 * i + 3] = four.w;
        }
        return vector;
    }

    // At most `left` of them, at any address.
    static __device__ __noinline__ Vector load_elements(const typename Float::Bits* source, int left) {
        Vector vector;
#pragma unroll
        for (int i = 0; i < WORDS; i++) vector.word[i] = 0;
#pragma unroll
        for (int k = 0; k < VECTOR; k++) {
            if (k < left) vector.word[k * BYTES / 4] |= u32(source[k]) << k * BYTES % 4 * 8;
        }
        return vector;
    }

    __device__ float value(int k) const {
        u32 bits = word[k * BYTES / 4];
        return Float::decode(BYTES == 4 ? bits : bits >> k * BYTES % 4 * 8 & 0xffffu);
    }

    // Takes the first element out: all others move one place, and these bits become the last.
    __device__ float shift(u32 last) {
        float first = value(0);
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            u32 next = i + 1 < WORDS ? word[i + 1] : last;
            word[i] = BYTES == 4 ? next : word[i] >> 16 | next << 16;
        }
        return first;
    }

    // The largest magnitude as the format's own bits: infinities and NaN are the largest.
    __device__ int largest_magnitude() const {
        u32 largest = 0;
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            // Without the sign. Below the upper of two elements lies the lower one: it does not
            // decide which upper one is the largest.
            if (BYTES == 2) largest = max(largest, word[i] << 17);
            largest = max(largest, word[i] << 1);
        }
        return int(largest >> (BYTES == 4 ? 1 : 17));
    }
};

// Of the keys of a thread's vectors, the largest in the block of the vector that the thread owns:
// lane `l` owns vector `l % 4` of itself and its neighbors, the four lanes from `l / 4 * 4` on. The
// smallest block is the 32 elements that they have of a vector. All threads take part.
static __device__ int largest_of_owned_block(const int (&key)[VECTORS], u32 block_size, int* of_warps) {
    u32 lane = threadIdx.x % LANES;
    // Each lane hands over what its neighbor owns, first half of the vectors, then half of those.
    bool odd = lane & 1, upper = lane & 2;
    int pair = max(odd ? key[1] : key[0], __shfl_xor_sync(ALL_LANES, odd ? key[0] : key[1], 1));
    int next = max(odd ? key[3] : key[2], __shfl_xor_sync(ALL_LANES, odd ? key[2] : key[3], 1));
    int largest = max(upper ? next : pair, __shfl_xor_sync(ALL_LANES, upper ? pair : next, 2));
    // Then groups of four lanes, as many as share a block.
    u32 lanes = min(block_size / VECTOR, u32(LANES));
    for (u32 stride = 4; stride < lanes; stride *= 2) {
        largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, stride));
    }
    // Then vectors, two or all, and at last warps.
    if (block_size > VECTOR * LANES) largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
    if (block_size > 2 * VECTOR * LANES) largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
    if (block_size > QUANTIZE_WARP) {
        u32 warp = threadIdx.x / LANES;
        if (lane == 0) of_warps[warp] = largest;
        __syncthreads();
        u32 warps = block_size / QUANTIZE_WARP;
        for (u32 i = 0; i < warps; i++) largest = max(largest, of_warps[(warp & (0 - warps)) + i]);
    }
    return largest;
}

// What the owner of vector `u` knows about it.
static __device__ float from_owner(float value, int u) {
    return __shfl_sync(ALL_LANES, value, (threadIdx.x % LANES & ~3u) + u);
}

// The packed codes of a vector on the fast path, given the reciprocal of its absmax times 2^28: the
// power of two leaves the product the same but for itself.
template <class Float>
static __device__ u32 plain_codes(const Vector<Float>& vector, float scaled, const u32* entries) {
    u32 codes = 0;
#pragma unroll
    for (int k = 0; k < VECTOR; k++) {
        int fixed = __float2int_rd(__fmul_rn(vector.value(k), scaled));
        u32 code_above = u32(fixed) * 16 + entries[(fixed >> INTERVAL_BITS) - FIRST_INTERVAL];
        codes = __funnelshift_l(code_above, codes, 4);
    }
    // The first code is in the highest bits, and belongs into the high half of the lowest byte.
    return __byte_perm(codes, 0, 0x0123);
}

// The code by its definition. NaN is above no threshold: code 0.
static __device__ u32 code_of(float v) {
    u32 code = 0;
#pragma unroll
    for (int i = 0; i < 15; i++) code += v > __int_as_float(int(nf4_threshold_bits(i)));
    return code;
}

// The packed codes of a vector by their definition, for any absmax. Rarely needed, so it is small
// instead of fast: one copy.
template <class Float>
__device__ __noinline__ u32 any_codes(Vector<Float> vector, float absmax) {
    float reciprocal = flushed_reciprocal(absmax);
    u32 codes = 0;
    // An odd last byte has a spare half: the code of a zero in this block.
#pragma unroll 1
    for (int k = 0; k < VECTOR; k++) {
        codes |= code_of(__fmul_rn(flush(vector.shift(0)), reciprocal)) << ((k ^ 1) * 4);
    }
    return codes;
}

// The largest key of a vector; as small as the one before.
template <class Float>
__device__ __noinline__ int largest_key(Vector<Float> vector) {
    int key = -1;
#pragma unroll 1
    for (int k = 0; k < VECTOR; k++) key = max(key, magnitude_key(vector.shift(0)));
    return key;
}

// What a thread block does of `n` elements, and what its thread does of that.
struct Share {
    // The first element of the tile, and the tile's number of elements. From here on positions are
    // those within the tile.
    u64 tile;
    int elements;
    u32 lane;
    int first_of_warp;
    // The first element of the thread, and the elements from there on, of whatever thread.
    int first;
    int left;
    u32 block_size;
    u32 block_bits;
    // Where codes of the thread's first element go, and the scale of the tile's first block.
    u8* packed;
    float* absmax;
    u64* nonfinite_blocks;

    __device__ Share(u64 n, u32 block_size, u8* packed, float* absmax, u64* nonfinite_blocks)
        : block_size(block_size), nonfinite_blocks(nonfinite_blocks) {
        tile = u64(blockIdx.x) * QUANTIZE_TILE;
        u64 behind = n > tile ? n - tile : 0;
        elements = behind < QUANTIZE_TILE ? int(behind) : QUANTIZE_TILE;
        lane = threadIdx.x % LANES;
        first_of_warp = int(threadIdx.x / LANES) * QUANTIZE_WARP;
        first = first_of_warp + int(lane) * VECTOR;
        left = elements - first;
        block_bits = 31 - __clz(int(block_size));
        this->packed = packed + (tile + first) / 2;
        this->absmax = absmax + (tile >> block_bits);
    }

    // Whether all vectors are whole, and so are the words that their codes go to.
    __device__ bool is_whole() const {
        return left >= QUANTIZE_WARP - (LANES - 1) * VECTOR && reinterpret_cast<u64>(packed) % 4 == 0;
    }
};

// Quantizes the vectors of a thread.
template <class Float>
static __device__ void quantize_vectors(const Vector<Float> (&vector)[VECTORS], const Share& share, bool whole) {
    __shared__ u32 entries[INTERVALS];
    __shared__ int of_warps[2][WARPS];
    if (threadIdx.x < INTERVALS) entries[threadIdx.x] = STEPS.entry[threadIdx.x];
    __syncthreads();

    u32 block_size = share.block_size, lane = share.lane;
    int key[VECTORS];
#pragma unroll
    for (int u = 0; u < VECTORS; u++) key[u] = vector[u].largest_magnitude();
    int largest = Float::magnitude_bits(largest_of_owned_block(key, block_size, of_warps[0]));
    float scale = __int_as_float(largest);
    bool plain = largest >= PLAIN_MIN && largest <= PLAIN_MAX;
    // The first of the 32 elements that the thread owns.
    int owned = share.first_of_warp + int(lane % 4) * VECTOR * LANES + int(lane / 4) * 4 * VECTOR;
    bool first_of_block = (owned & (int(block_size) - 1)) == 0 && owned < share.elements;

    // Whoever shares a block must take the same way.
    bool some_not_plain = block_size > QUANTIZE_WARP ? __syncthreads_or(!plain) != 0
                                                     : __any_sync(ALL_LANES, !plain) != 0;
    if (some_not_plain) {
        u32 nonfinite = __popc(__ballot_sync(ALL_LANES, first_of_block && largest >= INFINITY_BITS));
        if (lane == 0 && nonfinite != 0) atomicAdd(share.nonfinite_blocks, u64(nonfinite));
#pragma unroll
        for (int u = 0; u < VECTORS; u++) key[u] = largest_key<Float>(vector[u]);
        scale = absmax_of_key(largest_of_owned_block(key, block_size, of_warps[1]));
    }
    if (first_of_block) share.absmax[owned >> share.block_bits] = scale;

    // Zero says that a block is not plain: a reciprocal never is.
    float scaled = plain ? __fmul_rn(__frcp_rn(scale), float(1 << FIXED_BITS)) : 0.0f;
#pragma unroll
    for (int u = 0; u < VECTORS; u++) {
        float scaled_here = from_owner(scaled, u);
        u32 codes = plain_codes(vector[u], scaled_here, entries);
        if (some_not_plain) {
            float scale_here = from_owner(scale, u);
            if (scaled_here == 0.0f) codes = any_codes<Float>(vector[u], scale_here);
        }
        u8* to = share.packed + u * VECTOR * LANES / 2;
        if (whole) {
            *reinterpret_cast<u32*>(to) = codes;
        } else {
#pragma unroll 1
            for (int i = 0; i < VECTOR / 2; i++) {
                if (u * VECTOR * LANES + 2 * i < share.left) to[i] = u8(codes >> 8 * i);
            }
        }
    }
}

template <class Float>
__device__ void quantize_nf4(
    const typename Float::Bits* source, u64 n, u32 block_size, u8* packed, float* absmax, u64* nonfinite_blocks) {
    Share share(n, block_size, packed, absmax, nonfinite_blocks);
    source += share.tile + share.first;
    bool whole = share.is_whole() && reinterpret_cast<u64>(source) % 16 == 0;

    Vector<Float> vector[VECTORS];
    if (whole) {
#pragma unroll
        for (int u = 0; u < VECTORS; u++) vector[u] = Vector<Float>::load(source + u * VECTOR * LANES);
    } else {
#pragma unroll
        for (int u = 0; u < VECTORS; u++) {
            vector[u] = Vector<Float>::load_elements(source + u * VECTOR * LANES, share.left - u * VECTOR * LANES);
        }
    }
    quantize_vectors(vector, share, whole);
}
