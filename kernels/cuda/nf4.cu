// NF4 kernels: the entry points. `kernels/src/cuda.rs` says how each is launched.
//
// The host compiles this to PTX with build.sh; tests also compile it as C++ (emulator.cpp).
#include "common.cuh"
#include "dequantize.cuh"
#include "double.cuh"
#include "quantize.cuh"
#include "sources.cuh"

#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)

#define QUANTIZE_NF4(NAME, FLOAT)                                                                              \
    KERNEL NAME(const FLOAT::Bits* source, u64 n, u32 block_size, u8* packed, float* absmax, u64* nonfinite) { \
        quantize_nf4<FLOAT>(source, n, block_size, packed, absmax, nonfinite);                                 \
    }

QUANTIZE_NF4(tightfit_quantize_nf4_f32, F32)
QUANTIZE_NF4(tightfit_quantize_nf4_f16, F16)
QUANTIZE_NF4(tightfit_quantize_nf4_bf16, Bf16)

#define QUANTIZE_SOURCE(NAME, FLOAT)                                                                              \
    KERNEL NAME(                                                                                                  \
        const u8* codes, const float* scales, u32 kind, u64 row_bytes, u32 columns, u32 tile_rows,                \
        u32 tile_columns, u32 first_row, u32 first_column, u64 n, u32 block_size, u8* packed, float* absmax,      \
        u64* nonfinite) {                                                                                         \
        Source source(codes, scales, kind, row_bytes, columns, tile_rows, tile_columns, first_row, first_column); \
        quantize_source<FLOAT>(source, n, block_size, packed, absmax, nonfinite);                                 \
    }

QUANTIZE_SOURCE(tightfit_quantize_source_f16, F16)
QUANTIZE_SOURCE(tightfit_quantize_source_bf16, Bf16)

#define DEQUANTIZE(NAME, FLOAT)                                                                           \
    KERNEL NAME(const u8* packed, const float* absmax, u64 n, u32 block_size, u32 quant_type, FLOAT::Bits* out) { \
        dequantize<FLOAT>(packed, absmax, n, block_size, quant_type, out);                                \
    }

DEQUANTIZE(tightfit_dequantize_f32, F32)
DEQUANTIZE(tightfit_dequantize_f16, F16)
DEQUANTIZE(tightfit_dequantize_bf16, Bf16)

KERNEL tightfit_sum_absmax(const float* absmax, u64 n, double* sums) { sum_groups(absmax, n, sums); }

KERNEL tightfit_sum_sums(const double* sums, u64 n, double* out) { sum_groups(sums, n, out); }

KERNEL tightfit_mean(const double* sums, u32 n, u64 values, float* mean) { mean_of_sums(sums, n, values, mean); }

KERNEL tightfit_quantize_absmax(
    const float* absmax, u64 n, const float* offset, u8* codes, float* nested_absmax) {
    quantize_absmax(absmax, n, offset, codes, nested_absmax);
}

KERNEL tightfit_dequantize_absmax(
    const u8* codes, u64 n, const float* nested_absmax, const float* offset, float* out) {
    dequantize_absmax(codes, n, nested_absmax, offset, out);
}
