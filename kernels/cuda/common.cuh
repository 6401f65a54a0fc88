// What all kernels share: types, the three float formats, and the arithmetic of edge cases.
//
// Every result is defined by IEEE arithmetic, one rounding at a time, so that the bytes are those
// of the CPU kernels (`kernels/src`). The `_rn` functions are never fused, and nothing here may be
// compiled with fast math. The host is little-endian, as the files are.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// Of every kernel. Where one changes, `kernels/src/cuda.rs` has to change too.
static constexpr int THREADS = 256;
static constexpr int LANES = 32;
static constexpr int WARPS = THREADS / LANES;
static constexpr u32 ALL_LANES = 0xffffffffu;

static constexpr int INFINITY_BITS = 0x7f800000;
static constexpr int SMALLEST_NORMAL_BITS = 0x00800000;
static constexpr int LARGEST_FINITE_BITS = 0x7f7fffff;

#ifdef __CUDACC__
static __device__ float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

static __device__ u16 float_to_half(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

// Zero, with its sign, for a subnormal; anything else as it is. The meaning of the kernels is that
// of bitsandbytes', which are compiled to flush; here every flush is written out.
static __device__ float flush(float x) {
    int bits = __float_as_int(x);
    bool subnormal = (bits & 0x7fffffff) < SMALLEST_NORMAL_BITS;
    return subnormal ? __int_as_float(bits & int(0x80000000u)) : x;
}

// What decides the absmax of a block, as an integer: its magnitude; subnormals are zeros, and NaN
// counts less than zero, so that it is the largest only where there is nothing else. Absent
// elements of a partial block are zeros, which is why a partial block of NaN has absmax 0.0.
static __device__ int magnitude_key(float x) {
    int magnitude = __float_as_int(x) & 0x7fffffff;
    if (magnitude > INFINITY_BITS) return -1;
    return magnitude < SMALLEST_NORMAL_BITS ? 0 : magnitude;
}

// The absmax of a block whose largest key is given: -FLT_MAX where all elements are NaN.
static __device__ float absmax_of_key(int key) {
    return key < 0 ? -__int_as_float(LARGEST_FINITE_BITS) : __int_as_float(key);
}

// What elements are multiplied with. Of an absmax above 2^126 the reciprocal is subnormal: zero.
static __device__ float flushed_reciprocal(float absmax) {
    return flush(__frcp_rn(flush(absmax)));
}

// The float formats: `Bits` is how an element is stored. `decode` is exact; `encode` rounds once,
// to nearest even, and keeps subnormals. NaN stays NaN; where that takes work, `NAN_IS_EXTRA` is
// set, and callers who know that there is none say so.

struct F32 {
    using Bits = u32;
    static constexpr bool NAN_IS_EXTRA = false;
    static __device__ float decode(u32 bits) { return __int_as_float(int(bits)); }
    template <bool MAY_BE_NAN>
    static __device__ u32 encode(float value) {
        return u32(__float_as_int(value));
    }
    // The magnitude of an f32, given the bits of a magnitude of this format.
    static __device__ int magnitude_bits(int key) { return key; }
};

struct F16 {
    using Bits = u16;
    static constexpr bool NAN_IS_EXTRA = false;
    static __device__ float decode(u32 bits) { return half_to_float(u16(bits)); }
    template <bool MAY_BE_NAN>
    static __device__ u32 encode(float value) {
        return float_to_half(value);
    }
    static __device__ int magnitude_bits(int key) { return __float_as_int(half_to_float(u16(key))); }
};

struct Bf16 {
    using Bits = u16;
    static constexpr bool NAN_IS_EXTRA = true;
    static __device__ float decode(u32 bits) { return __int_as_float(int(bits << 16)); }
    template <bool MAY_BE_NAN>
    static __device__ u32 encode(float value) {
        u32 bits = u32(__float_as_int(value));
        if (MAY_BE_NAN && (bits & 0x7fffffffu) > u32(INFINITY_BITS)) return bits >> 16 | 0x0040u;
        // Half of the last kept bit, less one if that bit is even.
        return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    }
    static __device__ int magnitude_bits(int key) { return key << 16; }
};
