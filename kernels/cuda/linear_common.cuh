// What the products share: how weights are described and decoded, and the instructions that have
// no name in C++. Each of these has the same meaning in host_shim.h.
//
// Weights W [outputs, inputs] lie in bitsandbytes' layout: the flattened tensor's codes two to a
// byte, the first in the high half, and a scale for each block of the flattened tensor. A row may
// begin in the middle of a byte or of a block.
#pragma once

#include "common.cuh"
#include "tables.cuh"

// What the code is compiled for: 750, 800 or 900. The emulator has everything.
#ifdef __CUDACC__
#define ARCHITECTURE __CUDA_ARCH__
// Aligned so that what is copied to it comes in as few pieces as can be.
extern __shared__ __align__(1024) uint4 dynamic_shared[];
#else
#define ARCHITECTURE 900
#define dynamic_shared shim::own_memory()
#endif

struct Weights {
    const u8* codes;
    // f32, or with double quantization u8.
    const void* scales;
    // Null without double quantization.
    const float* nested_absmax;
    const float* offset;
    const float* map;
    u32 block_bits;
    u32 quant_type;

    // The scale of a block of the flattened tensor, as `dequantize_absmax` recovers it.
    __device__ float scale(u64 block) const {
        if (nested_absmax == nullptr) return static_cast<const float*>(scales)[block];
        float value = map[static_cast<const u8*>(scales)[block]];
        return __fadd_rn(__fmul_rn(value, nested_absmax[block >> 8]), *offset);
    }

    // The same with double quantization, of these nested scales and this mean.
    __device__ float scale(u64 block, const float* nested, float mean) const {
        float value = map[static_cast<const u8*>(scales)[block]];
        return __fadd_rn(__fmul_rn(value, nested[block >> 8]), mean);
    }
};

static __device__ Weights weights_of(const u8* codes, const void* scales, const float* nested_absmax,
                                     const float* offset, const float* map, u32 block_size, u32 quant_type) {
    return {codes, scales, nested_absmax, offset, map, u32(31 - __clz(int(block_size))), quant_type & 1u};
}

// Codes as elements of a 16-bit float type lose less if they are all multiplied with the same
// number first, which the sums are divided by. FP4's codes become exact; for NF4 the factor is the
// one for which the sum of the squares of what rounding loses is least.
template <class Float>
struct CodeFactor;
template <>
struct CodeFactor<Bf16> {
    static constexpr float NF4 = 1.437006f, FP4 = 3.0f;
};
template <>
struct CodeFactor<F16> {
    static constexpr float NF4 = 1.6776895f, FP4 = 3.0f;
};

template <class Float>
static __device__ float code_factor(u32 quant_type) {
    return quant_type == 0 ? CodeFactor<Float>::NF4 : CodeFactor<Float>::FP4;
}

// A code times the factor as an element of the type. Picked from constants: a table would have to
// come from memory first.
template <class Float>
static __device__ __forceinline__ u32 code_element(u32 code, u32 quant_type) {
    float value = 0.0f;
    float factor = code_factor<Float>(quant_type);
#pragma unroll
    for (u32 i = 0; i < 16; i++) {
        if (code == i) value = __int_as_float(int(quant_type == 0 ? code_value_bits(0, i) : code_value_bits(1, i)));
    }
    return Float::template encode<false>(__fmul_rn(value, factor));
}

// Both codes of a byte, the first one low.
template <class Float>
static __device__ u32 code_pair(u32 byte, u32 quant_type) {
    return code_element<Float>(byte >> 4, quant_type) | code_element<Float>(byte & 15u, quant_type) << 16;
}

#ifdef __CUDACC__

static __device__ __forceinline__ u32 shared_address(const void* pointer) {
    return u32(__cvta_generic_to_shared(pointer));
}

// Instructions of the programmatic dependent launch; without it they do nothing.
static __device__ __forceinline__ void launch_dependents() {
#if ARCHITECTURE >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
static __device__ __forceinline__ void wait_for_earlier_grids() {
#if ARCHITECTURE >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// What other thread blocks have written.
template <class Value>
static __device__ __forceinline__ Value load_from_l2(const Value* from) {
    return __ldcg(from);
}

// Counts this thread block in: what its threads wrote before the last barrier is there for whoever
// counts later, and what those who counted earlier wrote is there for it behind the next one.
static __device__ __forceinline__ u32 count_arrival(u32* counter) {
    u32 before;
    asm volatile("fence.acq_rel.gpu;\n\tatom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(counter)
                 : "memory");
    return before;
}

#if ARCHITECTURE >= 800

// Asynchronous copies from global to shared memory, in groups. 16 bytes are not kept in the L1.
static __device__ __forceinline__ void copy_async_16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
static __device__ __forceinline__ void copy_async_8(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
static __device__ __forceinline__ void copy_async_4(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
static __device__ __forceinline__ void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most so many groups of this thread are on their way.
template <int GROUPS>
static __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// A warp's product of a 16 x 16 tile of A (rows g and g + 8 of lane 4 g + t, columns 2 t, 2 t + 1
// and these + 8) and a 16 x 8 tile of B (rows like A's columns, column g), added to `sum`: rows g
// and g + 8, columns 2 t and 2 t + 1.
template <class Float>
static __device__ __forceinline__ void multiply_tile(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if (Float::NAN_IS_EXTRA) {
        asm(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// Four matrices of 8 x 8 elements of 16 bits, transposed: lane l gives the address of row l % 8 of
// matrix l / 8, and lane 4 g + t gets of each the elements of column g and rows 2 t and 2 t + 1.
static __device__ __forceinline__ void load_transposed(u32 (&a)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same four matrices as they lie: of each, row g and columns 2 t and 2 t + 1.
static __device__ __forceinline__ void load_straight(u32 (&b)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Two elements of binary16, the first one low.
static __device__ __forceinline__ float2 halves_to_floats(u32 pair) {
    float2 values;
    asm("{\n\t.reg .b16 low, high;\n\tmov.b32 {low, high}, %2;\n\tcvt.f32.f16 %0, low;\n\tcvt.f32.f16 %1, high;\n\t}"
        : "=f"(values.x), "=f"(values.y)
        : "r"(pair));
    return values;
}

// Two values rounded to the type, the first one low.
template <class Float>
static __device__ __forceinline__ u32 round_pair(float first, float second) {
    u32 pair;
    if (Float::NAN_IS_EXTRA) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    }
    return pair;
}

#endif
#endif
