// Dequantizing NF4 and FP4: the value of the code times the absmax of the block, one f32
// multiplication, rounded once. Subnormals are kept.
//
// A thread writes 4 vectors of 16 bytes. Those of neighbouring threads are neighbours.
#pragma once

#include "common.cuh"
#include "tables.cuh"

static constexpr int OUT_VECTORS = 4;

// The elements of a vector: of 16 bytes of results.
template <class Float>
struct Codes {
    static constexpr int BYTES = sizeof(typename Float::Bits);
    static constexpr int ELEMENTS = 16 / BYTES;
    static constexpr int TILE = ELEMENTS * OUT_VECTORS * THREADS;

    // Bytes of packed codes, the first lowest.
    u32 bytes;
    float absmax;

    __device__ void load(const u8* packed, const float* scales, u64 first, u64 n, int block_bits, bool aligned) {
        bytes = 0;
        absmax = 0.0f;
        if (first < n) absmax = scales[first >> block_bits];
        if (aligned && first + ELEMENTS <= n) {
            if (ELEMENTS == 8) {
                bytes = *reinterpret_cast<const u32*>(packed + first / 2);
            } else {
                bytes = *reinterpret_cast<const u16*>(packed + first / 2);
            }
        } else {
#pragma unroll
            for (int i = 0; i < ELEMENTS / 2; i++) {
                if (first + 2 * i < n) bytes |= u32(packed[first / 2 + i]) << 8 * i;
            }
        }
    }

    template <bool MAY_BE_NAN>
    static __device__ u32 result(u32 bytes, float absmax, int k, const float* values) {
        u32 code = bytes >> (k ^ 1) * 4 & 15u;
        return Float::template encode<MAY_BE_NAN>(__fmul_rn(values[code], absmax));
    }

    // All of them. There must be no NaN among them.
    __device__ uint4 results(const float* values) const {
        u32 word[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            word[i] = BYTES == 4 ? result<false>(bytes, absmax, i, values)
                                 : __byte_perm(result<false>(bytes, absmax, 2 * i, values),
                                               result<false>(bytes, absmax, 2 * i + 1, values), 0x5410);
        }
        return make_uint4(word[0], word[1], word[2], word[3]);
    }

    // A product is NaN if the absmax is, or if it is infinite and the value is zero.
    __device__ bool may_be_nan() const {
        return Float::NAN_IS_EXTRA && (__float_as_int(absmax) & 0x7fffffff) >= INFINITY_BITS;
    }

    // Element by element, NaN or not; rarely needed.
    static __device__ __noinline__ void store_elements(
        u32 bytes, float absmax, const float* values, typename Float::Bits* out, u64 first, u64 n) {
#pragma unroll 1
        for (int k = 0; k < ELEMENTS; k++) {
            if (first + k < n) out[first + k] = typename Float::Bits(result<true>(bytes, absmax, k, values));
        }
    }
};

// `quant_type`: 0 for NF4, 1 for FP4.
template <class Float>
__device__ void dequantize(
    const u8* packed, const float* absmax, u64 n, u32 block_size, u32 quant_type, typename Float::Bits* out) {
    using Vector = Codes<Float>;
    __shared__ float values[16];

    bool packed_aligned = reinterpret_cast<u64>(packed) % 4 == 0;
    bool out_aligned = reinterpret_cast<u64>(out) % 16 == 0;
    int block_bits = 31 - __clz(int(block_size));
    u64 first = u64(blockIdx.x) * Vector::TILE + threadIdx.x * Vector::ELEMENTS;
    Vector vector[OUT_VECTORS];
#pragma unroll
    for (int u = 0; u < OUT_VECTORS; u++) {
        vector[u].load(packed, absmax, first + u * THREADS * Vector::ELEMENTS, n, block_bits, packed_aligned);
    }
    if (threadIdx.x < 16) values[threadIdx.x] = __int_as_float(int(CODE_VALUE_BITS[quant_type & 1u][threadIdx.x]));
    __syncthreads();
#pragma unroll
    for (int u = 0; u < OUT_VECTORS; u++) {
        u64 begin = first + u * THREADS * Vector::ELEMENTS;
        if (out_aligned && begin + Vector::ELEMENTS <= n && !vector[u].may_be_nan()) {
            *reinterpret_cast<uint4*>(out + begin) = vector[u].results(values);
        } else {
            Vector::store_elements(vector[u].bytes, vector[u].absmax, values, out, begin, n);
        }
    }
}
