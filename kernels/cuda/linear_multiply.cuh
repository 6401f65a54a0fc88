// What a warp does with a unit of linear_fetch.cuh that has come into shared memory.
#pragma once

#include "linear_common.cuh"
#include "linear_fetch.cuh"

#if ARCHITECTURE >= 800

static __device__ __forceinline__ float of_half(float offset, u32) { return offset; }
static __device__ __forceinline__ float of_half(const float (&offset)[2], u32 half) { return offset[half]; }

// The scales of a lane's outputs, those of rows 0 and 8 of each tile of 16. `in_slab`: the unit's first
// granule there. `coded`: whether the slab has codes of scales, with their nested absmax, instead. `offset` is that of
// all outputs, or those of rows 0 and 8.
template <class Shape, u32 OUTPUT_TILES, class Offset>
__device__ __forceinline__ void read_scales(float (&scale)[OUTPUT_TILES][2][Shape::GRANULES], const u8* scales,
                                            u32 in_slab, bool coded, u32 inputs, const float* map,
                                            const Offset& offset) {
#pragma unroll
    for (u32 r = 0; r < OUTPUT_TILES; r++) {
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const u8* row = scales + (r * 16 + half * 8) * Shape::SLAB_ROW;
            if (coded) {
                u32 four = *reinterpret_cast<const u32*>(row + in_slab / 4 * 4);
                if (Shape::GRANULES == 2) four >>= (in_slab & 2u) * 8;
                float absmax = *reinterpret_cast<const float*>(row + 8 + (inputs % 512 == 0 ? 0 : in_slab / 4 * 4));
#pragma unroll
                for (u32 i = 0; i < Shape::GRANULES; i++) {
                    scale[r][half][i] = __fadd_rn(__fmul_rn(map[four >> i * 8 & 255u], absmax), of_half(offset, half));
                }
            } else if (Shape::GRANULES == 4) {
                float4 four = *reinterpret_cast<const float4*>(row + in_slab * 4);
                scale[r][half][0] = four.x;
                scale[r][half][1] = four.y;
                scale[r][half][Shape::GRANULES - 2] = four.z;
                scale[r][half][Shape::GRANULES - 1] = four.w;
            } else {
                float2 two = *reinterpret_cast<const float2*>(row + in_slab * 4);
                scale[r][half][0] = two.x;
                scale[r][half][1] = two.y;
            }
        }
    }
}

// Adds a unit's products to the sums of a warp's outputs. What differs between lanes in where things
// are: `lane_entry` in an entry of the table, `code_place` in the codes, `x_places` in rows of x.
// `RAGGED`: whether it pays to look for tiles of columns that are not there.
template <class Float, class Shape, bool RAGGED, u32 OUTPUT_TILES, u32 COLUMN_TILES>
__device__ __forceinline__ void multiply_by_warps(float (&sum)[OUTPUT_TILES][COLUMN_TILES][4],
                                                  const float (&scale)[OUTPUT_TILES][2][Shape::GRANULES],
                                                  const u8* codes, const u8* columns_of_x, const u32* table,
                                                  u32 granules, u32 columns, u32 lane_entry, u32 code_place,
                                                  const u32 (&x_places)[2]) {
    const u32 group = threadIdx.x % LANES >> 2;
    uint2 bytes[Shape::GRANULES][OUTPUT_TILES][2];
#pragma unroll
    for (u32 granule = 0; granule < Shape::GRANULES; granule++) {
#pragma unroll
        for (u32 r = 0; r < OUTPUT_TILES; r++) {
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                bytes[granule][r][half] = *reinterpret_cast<const uint2*>(
                    codes + (code_place ^ granule * 32) + (r * 16 + half * 8) * Shape::CODE_ROW);
            }
        }
    }
#pragma unroll
    for (u32 granule = 0; granule < Shape::GRANULES; granule++) {
        u32 a[OUTPUT_TILES][4][4];
#pragma unroll
        for (u32 r = 0; r < OUTPUT_TILES; r++) {
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
#pragma unroll
                for (u32 i = 0; i < 8; i++) {
                    u32 word = i < 4 ? bytes[granule][r][half].x : bytes[granule][r][half].y, shift = i % 4 * 8;
                    // The byte times the width of an entry, plus the lane.
                    u32 entry = (shift >= 7 ? word >> (shift - 7) : word << (7 - shift)) & 0x7f80u;
                    a[r][i / 2][i % 2 * 2 + half] =
                        *reinterpret_cast<const u32*>(reinterpret_cast<const u8*>(table) + (entry | lane_entry));
                }
            }
        }
#pragma unroll
        for (u32 n = 0; n < COLUMN_TILES; n++) {
            if (RAGGED && n * 8 >= columns) break;
            uint4 low = make_uint4(0, 0, 0, 0), high = low;
            // What is not there counts nothing.
            if (n * 8 + group < columns && granule < granules) {
                const u8* row = columns_of_x + n * 8 * Shape::X_ROW + granule * 128;
                low = *reinterpret_cast<const uint4*>(row + x_places[0]);
                high = *reinterpret_cast<const uint4*>(row + x_places[1]);
            }
#pragma unroll
            for (u32 r = 0; r < OUTPUT_TILES; r++) {
                float product[4] = {};
                multiply_tile<Float>(product, a[r][0], low.x, low.y);
                multiply_tile<Float>(product, a[r][1], low.z, low.w);
                multiply_tile<Float>(product, a[r][2], high.x, high.y);
                multiply_tile<Float>(product, a[r][3], high.z, high.w);
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    sum[r][n][i] = __fmaf_rn(scale[r][i / 2][granule], product[i], sum[r][n][i]);
                }
            }
        }
    }
}

#endif
