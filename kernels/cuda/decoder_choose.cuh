// Choosing: the largest of a row, and what a router makes of its experts' scores.
#pragma once

#include "decoder_common.cuh"

// Ranks that are sorted at a time, and the most that are asked for.
static constexpr u32 SORTED = 2048, MOST_TOP = 256;

// Sorts `width` ranks, a power of two, the largest first.
static __device__ void sort_ranks(u64* ranks, u32 width) {
    for (u32 size = 2; size <= width; size *= 2) {
        for (u32 stride = size / 2; stride > 0; stride /= 2) {
            for (u32 i = threadIdx.x; i < width / 2; i += THREADS) {
                u32 low = 2 * i - (i & (stride - 1)), high = low + stride;
                u64 a = ranks[low], b = ranks[high];
                if ((a < b) == ((low & size) == 0)) {
                    ranks[low] = b;
                    ranks[high] = a;
                }
            }
            __syncthreads();
        }
    }
}

// Leaves the largest k of `count` ranks at the beginning of `ranks`, in their order, and zeros where there
// are fewer.
template <class Read>
static __device__ void find_top(u64* ranks, u32 count, u32 k, Read read) {
    if (k == 1) {
        u64 best = 0;
        for (u32 i = threadIdx.x; i < count; i += THREADS) {
            u64 rank = read(i);
            best = rank > best ? rank : best;
        }
        best = most_of_warp(best);
        if (threadIdx.x % LANES == 0) ranks[threadIdx.x / LANES] = best;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (u32 i = 1; i < WARPS; i++) ranks[0] = ranks[i] > ranks[0] ? ranks[i] : ranks[0];
        }
        __syncthreads();
        return;
    }
    u32 kept = 0;
    for (u32 begin = 0; begin < count || kept == 0;) {
        u32 taken = min(SORTED - kept, count - begin), width = 2;
        while (width < kept + taken || width < k) width *= 2;
        for (u32 i = kept + threadIdx.x; i < width; i += THREADS) {
            ranks[i] = i < kept + taken ? read(begin + i - kept) : 0;
        }
        __syncthreads();
        sort_ranks(ranks, width);
        begin += taken;
        kept = k;
    }
}

// The indices and values of the k largest of each row. `blocks` thread blocks have a row; the last one puts
// together what they found.
template <class Float>
__device__ void decoder_top(const typename Float::Bits* x, u32* ids, float* values, u8* workspace, u32 rows, u32 n,
                            u32 k, u32 blocks) {
    __shared__ u64 ranks[SORTED];
    __shared__ u32 arrived;
    launch_dependents();
    wait_for_earlier_grids();
    const u32 row = blockIdx.x / blocks, share = blockIdx.x % blocks;
    if (row >= rows) return;
    x += u64(row) * n;
    const u32 of_block = (n + blocks - 1) / blocks;
    const u32 begin = min(share * of_block, n), end = min(begin + of_block, n);
    find_top(ranks, end - begin, k, [&](u32 i) { return rank_of(Float::decode(x[begin + i]), begin + i); });
    if (blocks > 1) {
        u64* found = reinterpret_cast<u64*>(workspace + DECODER_COUNTER_BYTES) + u64(row) * blocks * k;
        for (u32 i = threadIdx.x; i < k; i += THREADS) found[share * k + i] = ranks[i];
        __syncthreads();
        u32* counter = reinterpret_cast<u32*>(workspace) + row;
        if (threadIdx.x == 0) arrived = count_arrival(counter);
        __syncthreads();
        if (arrived != blocks - 1) return;
        if (threadIdx.x == 0) *counter = 0;
        find_top(ranks, blocks * k, k, [&](u32 i) { return load_from_l2(found + i); });
    }
    for (u32 i = threadIdx.x; i < k; i += THREADS) {
        // There are no fewer than k, but nothing is read beside the row whatever there is.
        u32 index = min(index_of(ranks[i]), n - 1);
        ids[u64(row) * k + i] = index;
        values[u64(row) * k + i] = Float::decode(x[index]);
    }
}

// The k experts of each row with the largest scores and the softmax of these, over all experts or, if
// `normalize`, over the chosen ones. A warp has a row.
template <class Float>
__device__ void decoder_route(const typename Float::Bits* scores, int* ids, float* weights, u32 rows, u32 experts,
                              u32 k, u32 normalize) {
    launch_dependents();
    wait_for_earlier_grids();
    const u32 lane = threadIdx.x % LANES, row = blockIdx.x * WARPS + threadIdx.x / LANES;
    if (row >= rows) return;
    scores += u64(row) * experts;
    ids += u64(row) * k;
    weights += u64(row) * k;
    float most = __int_as_float(int(0xff800000u)), all = 0.0f;
    for (u32 i = lane; i < experts; i += LANES) most = fmaxf(most, Float::decode(scores[i]));
    most = most_of_warp(most);
    for (u32 i = lane; i < experts; i += LANES) all += expf(Float::decode(scores[i]) - most);
    all = sum_of_warp(all);
    u64 before = ~u64(0);
    float chosen = 0.0f;
    for (u32 c = 0; c < k; c++) {
        u64 best = 0;
        for (u32 i = lane; i < experts; i += LANES) {
            u64 rank = rank_of(Float::decode(scores[i]), i);
            if (rank < before && rank > best) best = rank;
        }
        before = most_of_warp(best);
        u32 expert = min(index_of(before), experts - 1);
        float weight = expf(Float::decode(scores[expert]) - most) / all;
        chosen += weight;
        if (lane == 0) {
            ids[c] = int(expert);
            weights[c] = weight;
        }
    }
    if (normalize == 0) return;
    __syncwarp();
    for (u32 c = lane; c < k; c += LANES) weights[c] /= chosen;
}
