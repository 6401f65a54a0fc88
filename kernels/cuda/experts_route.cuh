// Before products with experts and behind them: pairs sorted by expert, and sums over a token's experts.
#pragma once

#include "experts_common.cuh"

static constexpr int ROUTE_THREADS = 1024, ROUTE_WARPS = ROUTE_THREADS / LANES;
// Experts of a thread.
static constexpr u32 MOST_EXPERTS = 4 * ROUTE_THREADS;

// The sums of two numbers over all threads before this one; `all` gets those over all.
static __device__ uint2 sum_before(uint2 value, uint2& all) {
    __shared__ uint2 of_warps[ROUTE_WARPS];
    const u32 lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    auto sum_of_lanes = [&](uint2 sum) {
#pragma unroll
        for (u32 distance = 1; distance < LANES; distance *= 2) {
            u32 source = lane >= distance ? lane - distance : lane;
            u32 x = __shfl_sync(ALL_LANES, sum.x, int(source)), y = __shfl_sync(ALL_LANES, sum.y, int(source));
            if (lane >= distance) {
                sum.x += x;
                sum.y += y;
            }
        }
        return sum;
    };
    uint2 sum = sum_of_lanes(value);
    if (lane == LANES - 1) of_warps[warp] = sum;
    __syncthreads();
    if (warp == 0) of_warps[lane] = sum_of_lanes(of_warps[lane]);
    __syncthreads();
    all = of_warps[ROUTE_WARPS - 1];
    uint2 before = warp == 0 ? make_uint2(0, 0) : of_warps[warp - 1];
    return make_uint2(before.x + sum.x - value.x, before.y + sum.y - value.y);
}

// Of one thread block. What the numbers of experts that do not exist choose is left out. The order of an
// expert's pairs is not specified: results do not depend on it.
static __device__ void experts_route(const int* ids, u8* routing, u32 pairs, u32 experts, u32 rows) {
    __shared__ u32 counts[MOST_EXPERTS];
    const u32 thread = threadIdx.x;
    for (u32 expert = thread; expert < experts; expert += ROUTE_THREADS) counts[expert] = 0;
    __syncthreads();
    launch_dependents();
    wait_for_earlier_grids();
    for (u32 pair = thread; pair < pairs; pair += ROUTE_THREADS) {
        u32 expert = u32(ids[pair]);
        if (expert < experts) atomicAdd(counts + expert, 1u);
    }
    __syncthreads();

    const u32 of_thread = (experts + ROUTE_THREADS - 1) / ROUTE_THREADS;
    const u32 first = min(thread * of_thread, experts), end = min(first + of_thread, experts);
    // Pairs and tiles.
    uint2 mine = make_uint2(0, 0), all;
    for (u32 expert = first; expert < end; expert++) {
        mine.x += counts[expert];
        mine.y += (counts[expert] + rows - 1) / rows;
    }
    uint2 at = sum_before(mine, all);
    uint4* tiles = reinterpret_cast<uint4*>(routing + tiles_begin(pairs));
    for (u32 expert = first; expert < end; expert++) {
        u32 count = counts[expert];
        for (u32 row = 0; row < count; row += rows) {
            tiles[at.y++] = make_uint4(expert, at.x + row, min(rows, count - row), 0);
        }
        // From here on, where the expert's next pair goes.
        counts[expert] = at.x;
        at.x += count;
    }
    if (thread == 0) *reinterpret_cast<u32*>(routing) = all.y;
    __syncthreads();
    u32* by_expert = reinterpret_cast<u32*>(routing + PAIRS_BEGIN);
    for (u32 pair = thread; pair < pairs; pair += ROUTE_THREADS) {
        u32 expert = u32(ids[pair]);
        if (expert < experts) by_expert[atomicAdd(counts + expert, 1u)] = pair;
    }
}

// y[token] = the sum of weight times part over the token's choices, in their order. A thread block has 256
// outputs of a token.
template <class Float>
__device__ void experts_combine(const float* parts, const int* ids, const float* weights, typename Float::Bits* y,
                                u32 tokens, u32 choices, u32 experts, u32 outputs) {
    launch_dependents();
    wait_for_earlier_grids();
    constexpr u32 AT_ONCE = 8;
    const u32 blocks = max((outputs + THREADS - 1) / THREADS, 1u), token = blockIdx.x / blocks;
    const u32 output = blockIdx.x % blocks * THREADS + threadIdx.x;
    if (token >= tokens || output >= outputs) return;
    float sum = 0.0f;
    for (u32 first = 0; first < choices; first += AT_ONCE) {
        float part[AT_ONCE], weight[AT_ONCE];
        bool valid[AT_ONCE];
#pragma unroll
        for (u32 c = 0; c < AT_ONCE; c++) {
            u64 pair = u64(token) * choices + first + c;
            valid[c] = first + c < choices && u32(ids[pair]) < experts;
            part[c] = valid[c] ? parts[pair * outputs + output] : 0.0f;
            weight[c] = valid[c] ? weights[pair] : 0.0f;
        }
#pragma unroll
        for (u32 c = 0; c < AT_ONCE; c++) {
            if (valid[c]) sum = __fmaf_rn(weight[c], part[c], sum);
        }
    }
    y[u64(token) * outputs + output] = typename Float::Bits(Float::template encode<true>(sum));
}
