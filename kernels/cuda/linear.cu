// Products with 4-bit weights: the entry points. `kernels/src/cuda/linear.rs` says how each is
// launched.
//
// The host compiles this with build.sh; tests also compile it as C++ (emulator.cpp).
#include "common.cuh"
#include "linear_common.cuh"
#include "linear_fetch.cuh"
#include "linear_general.cuh"
#include "linear_many.cuh"
#include "linear_tiles.cuh"
#include "linear_transposed.cuh"

#define LINEAR_PARAMETERS(FLOAT)                                                                                    \
    const u8 *codes, const void *scales, const float *nested_absmax, const float *offset, const float *map,         \
        const FLOAT::Bits *x, const FLOAT::Bits *bias, FLOAT::Bits *y, u8 *workspace, u32 rows, u32 outputs,        \
        u32 inputs, u32 block_size, u32 quant_type, u32 shares
#define LINEAR_WEIGHTS weights_of(codes, scales, nested_absmax, offset, map, block_size, quant_type)

#define LINEAR_GENERAL(NAME, FLOAT)                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(LINEAR_PARAMETERS(FLOAT)) {       \
        linear_general<FLOAT>(LINEAR_WEIGHTS, x, bias, y, rows, outputs, inputs);                \
    }

LINEAR_GENERAL(tightfit_linear_general_f32, F32)
LINEAR_GENERAL(tightfit_linear_general_f16, F16)
LINEAR_GENERAL(tightfit_linear_general_bf16, Bf16)

// Here x is dy, and y is dx.
#define LINEAR_TRANSPOSED(NAME, FUNCTION, FLOAT)                                           \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(LINEAR_PARAMETERS(FLOAT)) { \
        FUNCTION<FLOAT>(LINEAR_WEIGHTS, x, y, rows, outputs, inputs);                      \
    }

LINEAR_TRANSPOSED(tightfit_linear_transposed_general_f32, linear_transposed_general, F32)
LINEAR_TRANSPOSED(tightfit_linear_transposed_general_f16, linear_transposed_general, F16)
LINEAR_TRANSPOSED(tightfit_linear_transposed_general_bf16, linear_transposed_general, Bf16)

#if ARCHITECTURE >= 800

#define LINEAR_TRANSPOSED_TILES(NAME, FLOAT, ROWS, BLOCKS)                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(LINEAR_PARAMETERS(FLOAT)) {       \
        linear_transposed<FLOAT, ROWS>(LINEAR_WEIGHTS, x, y, workspace, rows, outputs, inputs, shares);  \
    }

LINEAR_TRANSPOSED_TILES(tightfit_linear_transposed_64_f16, F16, 64, 2)
LINEAR_TRANSPOSED_TILES(tightfit_linear_transposed_128_f16, F16, 128, 1)
LINEAR_TRANSPOSED_TILES(tightfit_linear_transposed_64_bf16, Bf16, 64, 2)
LINEAR_TRANSPOSED_TILES(tightfit_linear_transposed_128_bf16, Bf16, 128, 1)

// Inputs of a unit, rows and outputs of a warp in tiles of 8 and 16, stages, and thread blocks that
// one multiprocessor shall take.
#define LINEAR_TILES_OF(WARPGROUP, NAME, FLOAT, INPUTS, COLUMN_TILES, OUTPUT_TILES, STAGES, BLOCKS)                          \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(LINEAR_PARAMETERS(FLOAT)) {             \
        linear_tiles<FLOAT, INPUTS, COLUMN_TILES, OUTPUT_TILES, STAGES, WARPGROUP>(LINEAR_WEIGHTS, x, bias, y, workspace, \
                                                                        rows, outputs, inputs, shares);        \
    }

#define LINEAR_TILES(...) LINEAR_TILES_OF(false, __VA_ARGS__)

LINEAR_TILES(tightfit_linear_8_f16, F16, 256, 1, 1, 3, 2)
LINEAR_TILES(tightfit_linear_16_f16, F16, 256, 2, 1, 3, 2)
LINEAR_TILES(tightfit_linear_32_f16, F16, 128, 4, 1, 4, 2)
LINEAR_TILES(tightfit_linear_64_f16, F16, 128, 8, 1, 4, 1)
LINEAR_TILES(tightfit_linear_8_bf16, Bf16, 256, 1, 1, 3, 2)
LINEAR_TILES(tightfit_linear_16_bf16, Bf16, 256, 2, 1, 3, 2)
LINEAR_TILES(tightfit_linear_32_bf16, Bf16, 128, 4, 1, 4, 2)
LINEAR_TILES(tightfit_linear_64_bf16, Bf16, 128, 8, 1, 4, 1)

#if ARCHITECTURE >= 900

#define LINEAR_WARPGROUPS(...) LINEAR_TILES_OF(true, __VA_ARGS__)

LINEAR_WARPGROUPS(tightfit_linear_wide_32_f16, F16, 128, 4, 1, 4, 2)
LINEAR_WARPGROUPS(tightfit_linear_wide_64_f16, F16, 128, 8, 1, 3, 2)
LINEAR_WARPGROUPS(tightfit_linear_wide_32_bf16, Bf16, 128, 4, 1, 4, 2)
LINEAR_WARPGROUPS(tightfit_linear_wide_64_bf16, Bf16, 128, 8, 1, 3, 2)

#define LINEAR_MANY(NAME, FLOAT, COLUMNS, TRANSPOSED)                                                                  \
    extern "C" __global__ void CLUSTER_OF(2) __launch_bounds__(Many::BLOCK, 1)                                         \
        NAME(LINEAR_PARAMETERS(FLOAT), const __grid_constant__ TensorMap map_of_x,                                     \
             const __grid_constant__ TensorMap map_of_codes) {                                                         \
        linear_many<FLOAT, COLUMNS, TRANSPOSED>(LINEAR_WEIGHTS, map_of_x, map_of_codes, bias, y, workspace, rows,      \
                                                outputs, inputs, shares);                                              \
    }

LINEAR_MANY(tightfit_linear_many_128_f16, F16, 128, false)
LINEAR_MANY(tightfit_linear_many_128_bf16, Bf16, 128, false)
LINEAR_MANY(tightfit_linear_many_256_f16, F16, 256, false)
LINEAR_MANY(tightfit_linear_many_256_bf16, Bf16, 256, false)
LINEAR_MANY(tightfit_linear_many_transposed_128_f16, F16, 128, true)
LINEAR_MANY(tightfit_linear_many_transposed_128_bf16, Bf16, 128, true)
LINEAR_MANY(tightfit_linear_many_transposed_256_f16, F16, 256, true)
LINEAR_MANY(tightfit_linear_many_transposed_256_bf16, Bf16, 256, true)

#endif
#endif
