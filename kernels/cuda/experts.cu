// Products with stacks of experts: the entry points. `kernels/src/cuda/experts.rs` says how each is
// launched.
//
// The host compiles this with build.sh; tests also compile it as C++ (emulator.cpp).
#include "common.cuh"
#include "experts_common.cuh"
#include "experts_fetch.cuh"
#include "experts_general.cuh"
#include "experts_route.cuh"
#include "experts_tiles.cuh"
#include "linear_common.cuh"
#include "linear_fetch.cuh"
#include "linear_general.cuh"
#include "linear_multiply.cuh"

extern "C" __global__ void __launch_bounds__(ROUTE_THREADS)
    tightfit_experts_route(const int* ids, u8* routing, u32 pairs, u32 experts, u32 rows) {
    experts_route(ids, routing, pairs, experts, rows);
}

#define EXPERTS_COMBINE(NAME, FLOAT)                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                          \
        NAME(const float* parts, const int* ids, const float* weights, FLOAT::Bits* y, u32 tokens, u32 choices,    \
             u32 experts, u32 outputs) {                                                                           \
        experts_combine<FLOAT>(parts, ids, weights, y, tokens, choices, experts, outputs);                         \
    }

EXPERTS_COMBINE(tightfit_experts_combine_f32, F32)
EXPERTS_COMBINE(tightfit_experts_combine_f16, F16)
EXPERTS_COMBINE(tightfit_experts_combine_bf16, Bf16)

#define EXPERTS_PARAMETERS(FLOAT)                                                                                  \
    const u8 *codes, const void *scales, const float *nested_absmax, const float *offset, const float *map,        \
        const FLOAT::Bits *x, const FLOAT::Bits *bias, void *y, const u8 *routing, u8 *workspace, u32 pairs,       \
        u32 pairs_of_row, u32 experts, u32 outputs, u32 inputs, u32 block_size, u32 quant_type, u32 form, float limit
#define EXPERTS_PRODUCT                                                                                            \
    {                                                                                                              \
        weights_of(codes, scales, nested_absmax, offset, map, block_size, quant_type), x, bias, y, routing, pairs, \
            pairs_of_row, experts, outputs, inputs, form, limit                                                    \
    }

#define EXPERTS_GENERAL(NAME, FLOAT)                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(EXPERTS_PARAMETERS(FLOAT)) { \
        experts_general<FLOAT>(EXPERTS_PRODUCT);                                            \
    }

EXPERTS_GENERAL(tightfit_experts_general_f32, F32)
EXPERTS_GENERAL(tightfit_experts_general_f16, F16)
EXPERTS_GENERAL(tightfit_experts_general_bf16, Bf16)

#if ARCHITECTURE >= 800

// Inputs of a unit, rows in tiles of 8, stages, and thread blocks that one multiprocessor shall take.
#define EXPERTS_TILES(NAME, FLOAT, INPUTS, COLUMN_TILES, STAGES, BLOCKS)                             \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(EXPERTS_PARAMETERS(FLOAT)) { \
        experts_tiles<FLOAT, INPUTS, COLUMN_TILES, STAGES>(EXPERTS_PRODUCT, workspace);              \
    }

EXPERTS_TILES(tightfit_experts_8_f16, F16, 256, 1, 3, 2)
EXPERTS_TILES(tightfit_experts_16_f16, F16, 256, 2, 3, 2)
EXPERTS_TILES(tightfit_experts_64_f16, F16, 128, 8, 4, 1)
EXPERTS_TILES(tightfit_experts_8_bf16, Bf16, 256, 1, 3, 2)
EXPERTS_TILES(tightfit_experts_16_bf16, Bf16, 256, 2, 3, 2)
EXPERTS_TILES(tightfit_experts_64_bf16, Bf16, 128, 8, 4, 1)

#endif
