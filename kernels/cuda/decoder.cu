// What a decoder computes between its products: the entry points. `kernels/src/cuda/decoder.rs` says how
// each is launched.
//
// The host compiles this with build.sh; tests also compile it as C++ (emulator.cpp).
#include "common.cuh"
#include "decoder_attention.cuh"
#include "decoder_choose.cuh"
#include "decoder_common.cuh"
#include "decoder_rows.cuh"
#include "experts_common.cuh"
#include "linear_common.cuh"

#define FOR_EACH_FLOAT(DEFINE) DEFINE(f32, F32) DEFINE(f16, F16) DEFINE(bf16, Bf16)

#define DECODER_ROWS(SUFFIX, FLOAT)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS) tightfit_decoder_norm_##SUFFIX(                              \
        FLOAT::Bits* x, const FLOAT::Bits* add, const FLOAT::Bits* weight, FLOAT::Bits* y, u32 n, float eps,           \
        float offset) {                                                                                                \
        decoder_norm<FLOAT>(x, add, weight, y, n, eps, offset);                                                        \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) tightfit_decoder_gate_##SUFFIX(                              \
        const FLOAT::Bits* gate, const FLOAT::Bits* up, FLOAT::Bits* y, u64 elements, u32 activation) {                \
        decoder_each<FLOAT>(gate, up, y, elements, [&](float a, float b) { return activate(activation, 0.0f, a, b); }); \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        tightfit_decoder_add_##SUFFIX(FLOAT::Bits* x, const FLOAT::Bits* add, u64 elements) {                          \
        decoder_each<FLOAT>(x, add, x, elements, [](float a, float b) { return a + b; });                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) tightfit_decoder_combine_##SUFFIX(                           \
        const FLOAT::Bits* x, const float* weights, FLOAT::Bits* y, u32 rows, u32 k, u32 columns) {                    \
        decoder_combine<FLOAT>(x, weights, y, rows, k, columns);                                                       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) tightfit_decoder_dense_1_##SUFFIX(                           \
        const FLOAT::Bits* weights, const FLOAT::Bits* x, const FLOAT::Bits* bias, FLOAT::Bits* y, u32 rows,           \
        u32 outputs, u32 inputs) {                                                                                     \
        decoder_dense<FLOAT, 1>(weights, x, bias, y, rows, outputs, inputs);                                           \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) tightfit_decoder_dense_8_##SUFFIX(                           \
        const FLOAT::Bits* weights, const FLOAT::Bits* x, const FLOAT::Bits* bias, FLOAT::Bits* y, u32 rows,           \
        u32 outputs, u32 inputs) {                                                                                     \
        decoder_dense<FLOAT, 8>(weights, x, bias, y, rows, outputs, inputs);                                           \
    }

FOR_EACH_FLOAT(DECODER_ROWS)

extern "C" __global__ void __launch_bounds__(THREADS) tightfit_decoder_gather_16(
    const u16* table, const u32* ids, u16* y, u32* error, u32 rows, u32 table_rows, u32 n) {
    decoder_gather<u16>(table, ids, y, error, rows, table_rows, n);
}
extern "C" __global__ void __launch_bounds__(THREADS) tightfit_decoder_gather_32(
    const u32* table, const u32* ids, u32* y, u32* error, u32 rows, u32 table_rows, u32 n) {
    decoder_gather<u32>(table, ids, y, error, rows, table_rows, n);
}

#define DECODER_ATTEND(NAME, FLOAT, HEADS)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
        NAME(const FLOAT::Bits* q, const FLOAT::Bits* keys, const FLOAT::Bits* values, const u32* positions,          \
             FLOAT::Bits* y, u8* workspace, u32* error, u32 rows, u32 q_heads, u32 kv_heads, u32 head, u32 capacity,  \
             u32 window, u32 length, u32 splits, float scale) {                                                       \
        decoder_attend<FLOAT, HEADS>(q, keys, values, positions, y, workspace, error, rows, q_heads, kv_heads, head,  \
                                     capacity, window, length, splits, scale);                                        \
    }

#define DECODER_ATTENTION(SUFFIX, FLOAT)                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) tightfit_decoder_rotate_##SUFFIX(                           \
        FLOAT::Bits* q, const FLOAT::Bits* k, const FLOAT::Bits* v, const FLOAT::Bits* q_norm,                        \
        const FLOAT::Bits* k_norm, const u32* positions, const float* frequencies, FLOAT::Bits* keys,                 \
        FLOAT::Bits* values, u32* error, u32 rows, u32 q_heads, u32 kv_heads, u32 head, u32 rotary, u32 capacity,     \
        float scaling, float eps, float offset) {                                                                     \
        decoder_rotate<FLOAT>(q, k, v, q_norm, k_norm, positions, frequencies, keys, values, error, rows, q_heads,    \
                              kv_heads, head, rotary, capacity, scaling, eps, offset);                                \
    }                                                                                                                 \
    DECODER_ATTEND(tightfit_decoder_attend_1_##SUFFIX, FLOAT, 1)

FOR_EACH_FLOAT(DECODER_ATTENTION)

DECODER_ATTEND(tightfit_decoder_attend_8_f16, F16, 8)
DECODER_ATTEND(tightfit_decoder_attend_8_bf16, Bf16, 8)

#define DECODER_CHOOSE(SUFFIX, FLOAT)                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
        tightfit_decoder_top_##SUFFIX(const FLOAT::Bits* x, u32* ids, float* values, u8* workspace, u32 rows, u32 n,  \
                                      u32 k, u32 blocks) {                                                            \
        decoder_top<FLOAT>(x, ids, values, workspace, rows, n, k, blocks);                                            \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
        tightfit_decoder_route_##SUFFIX(const FLOAT::Bits* scores, int* ids, float* weights, u32 rows, u32 experts,   \
                                        u32 k, u32 normalize) {                                                       \
        decoder_route<FLOAT>(scores, ids, weights, rows, experts, k, normalize);                                      \
    }

FOR_EACH_FLOAT(DECODER_CHOOSE)
