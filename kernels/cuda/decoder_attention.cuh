// Attention over a cache of keys and values [capacity, kv_heads, head], and what fills it.
#pragma once

#include "decoder_common.cuh"

// Queries, keys and values of new rows: norms of heads where there are weights for them, rotary embedding
// of the first `rotary` elements (element i with i + rotary / 2), and keys and values into the cache, at
// the rows' positions. A warp has a head of a row.
template <class Float>
__device__ void decoder_rotate(typename Float::Bits* q, const typename Float::Bits* k, const typename Float::Bits* v,
                               const typename Float::Bits* q_norm, const typename Float::Bits* k_norm,
                               const u32* positions, const float* frequencies, typename Float::Bits* keys,
                               typename Float::Bits* values, u32* error, u32 rows, u32 q_heads, u32 kv_heads,
                               u32 head, u32 rotary, u32 capacity, float scaling, float eps, float offset) {
    using Bits = typename Float::Bits;
    launch_dependents();
    wait_for_earlier_grids();
    const u32 lane = threadIdx.x % LANES, all_heads = q_heads + 2 * kv_heads;
    const u64 warp = u64(blockIdx.x) * WARPS + threadIdx.x / LANES;
    if (all_heads == 0 || warp / all_heads >= rows) return;
    const u32 row = u32(warp / all_heads);
    u32 number = u32(warp % all_heads);
    const u32 position = positions[row];
    const bool known = position < capacity;
    if (number == 0 && lane == 0 && !known) tell(error, BAD_POSITION);

    const Bits *from, *weight;
    Bits* to;
    if (number < q_heads) {
        to = q + (u64(row) * q_heads + number) * head;
        from = to;
        weight = q_norm;
    } else {
        if (!known) return;
        number -= q_heads;
        const bool is_value = number >= kv_heads;
        if (is_value) number -= kv_heads;
        from = (is_value ? v : k) + (u64(row) * kv_heads + number) * head;
        to = (is_value ? values : keys) + (u64(position) * kv_heads + number) * head;
        if (is_value) {
            for (u32 i = lane; i < head; i += LANES) to[i] = from[i];
            return;
        }
        weight = k_norm;
    }
    float factor = 1.0f;
    if (weight != nullptr) {
        float sum = 0.0f;
        for (u32 i = lane; i < head; i += LANES) {
            float value = Float::decode(from[i]);
            sum += value * value;
        }
        factor = 1.0f / sqrtf(sum_of_warp(sum) / float(head) + eps);
    }
    auto element = [&](u32 i) {
        float value = Float::decode(from[i]);
        return weight == nullptr ? value : value * factor * (offset + Float::decode(weight[i]));
    };
    const u32 half = rotary / 2;
    for (u32 i = lane; i < half; i += LANES) {
        float angle = float(position) * frequencies[i];
        float cosine = cosf(angle) * scaling, sine = sinf(angle) * scaling;
        float a = element(i), b = element(i + half);
        to[i] = Bits(Float::template encode<true>(a * cosine - b * sine));
        to[i + half] = Bits(Float::template encode<true>(b * cosine + a * sine));
    }
    // What is not rotated either is where it should be already, or goes there.
    for (u32 i = 2 * half + lane; i < head; i += LANES) to[i] = Bits(Float::template encode<true>(element(i)));
}

// Keys that a thread block has at a time, the largest head, and the most blocks that share a row.
static constexpr u32 ATTEND_KEYS = 64, MOST_HEAD = 256, MOST_SPLITS = 64;

// y = softmax(scale * q * transpose(keys)) * values. A thread block has up to HEADS queries of one row that have the
// same keys, and a share of these; the last of the blocks of a row puts their results together. With
// length 0 a row sees what is not behind its position, with a window only so many; else all of
// the first `length`.
template <class Float, u32 HEADS>
__device__ void decoder_attend(const typename Float::Bits* q, const typename Float::Bits* keys,
                               const typename Float::Bits* values, const u32* positions, typename Float::Bits* y,
                               u8* workspace, u32* error, u32 rows, u32 q_heads, u32 kv_heads, u32 head,
                               u32 capacity, u32 window, u32 length, u32 splits, float scale) {
    using Bits = typename Float::Bits;
    // Of a thread that multiplies keys: eight elements of each of four.
    constexpr u32 OF_KEY = 8, PASSES = 2, VECTORS = MOST_HEAD / (OF_KEY * EIGHT);
    constexpr u32 LOADS = 8;
    __shared__ __align__(16) float query[HEADS][MOST_HEAD];
    __shared__ __align__(16) float scores[ATTEND_KEYS][HEADS];
    __shared__ float sums[THREADS * 2 * HEADS];
    __shared__ float most[HEADS], total[HEADS], factor[HEADS];
    __shared__ u32 arrived;
    launch_dependents();
    wait_for_earlier_grids();

    const u32 thread = threadIdx.x, lane = thread % LANES, warp = thread / LANES;
    const u32 group = q_heads / kv_heads, chunks = (group + HEADS - 1) / HEADS;
    const u32 split = blockIdx.x % splits, unit = blockIdx.x / splits;
    const u32 chunk = unit % chunks, kv_head = unit / chunks % kv_heads, row = unit / chunks / kv_heads;
    if (row >= rows) return;
    const u32 first_head = kv_head * group + chunk * HEADS, heads = min(HEADS, group - chunk * HEADS);

    u32 begin = 0, end = length;
    if (length == 0) {
        u32 position = positions[row];
        if (position >= capacity) {
            if (thread == 0 && split == 0) tell(error, BAD_POSITION);
            position = capacity - 1;
        }
        end = position + 1;
        if (window != 0 && window < end) begin = end - window;
    }
    u32 share = (end - begin + splits - 1) / splits;
    share = (share + ATTEND_KEYS - 1) / ATTEND_KEYS * ATTEND_KEYS;
    const u32 active = (end - begin + share - 1) / share;
    if (split >= active) return;
    const u32 from = begin + split * share, to = min(end, from + share);

    const Bits* of_row = q + (u64(row) * q_heads + first_head) * head;
    for (u32 i = thread; i < HEADS * MOST_HEAD; i += THREADS) {
        u32 h = i / MOST_HEAD, e = i % MOST_HEAD;
        query[h][e] = h < heads && e < head ? Float::decode(of_row[h * head + e]) * scale : 0.0f;
    }
    if (thread < HEADS) {
        most[thread] = __int_as_float(int(0xff800000u));
        total[thread] = 0.0f;
    }
    __syncthreads();

    const u64 stride = u64(kv_heads) * head;
    keys += u64(kv_head) * head;
    values += u64(kv_head) * head;
    // Of a thread that adds values up: two elements of every so-manyeth key.
    const u32 pairs = head / 2, pair = thread % pairs, takers = min(u32(THREADS) / pairs, ATTEND_KEYS);
    const u32 taker = thread / pairs;
    float sum[HEADS][2] = {};

    for (u32 tile = from; tile < to; tile += ATTEND_KEYS) {
        const u32 count = min(to - tile, ATTEND_KEYS);
        {
            const u32 part = lane % OF_KEY, key = warp * (LANES / OF_KEY) * PASSES + lane / OF_KEY;
            Eight<Bits> loaded[PASSES][VECTORS];
#pragma unroll
            for (u32 p = 0; p < PASSES; p++) {
                u32 at = min(key + p * (LANES / OF_KEY), count - 1);
                const Bits* of_key = keys + u64(tile + at) * stride;
#pragma unroll
                for (u32 i = 0; i < VECTORS; i++) {
                    u32 e = (i * OF_KEY + part) * EIGHT;
                    if (e < head) loaded[p][i] = load_eight(of_key + e);
                }
            }
            float dots[PASSES][HEADS] = {};
#pragma unroll
            for (u32 i = 0; i < VECTORS; i++) {
                u32 e = (i * OF_KEY + part) * EIGHT;
                if (e >= head) continue;
#pragma unroll
                for (u32 h = 0; h < HEADS; h++) {
                    float4 low = *reinterpret_cast<const float4*>(&query[h][e]);
                    float4 high = *reinterpret_cast<const float4*>(&query[h][e + 4]);
                    const float of_query[EIGHT] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
                    for (u32 p = 0; p < PASSES; p++) {
#pragma unroll
                        for (u32 j = 0; j < EIGHT; j++) {
                            dots[p][h] = __fmaf_rn(Float::decode(loaded[p][i][j]), of_query[j], dots[p][h]);
                        }
                    }
                }
            }
#pragma unroll
            for (u32 p = 0; p < PASSES; p++) {
#pragma unroll
                for (u32 h = 0; h < HEADS; h++) {
                    float dot = dots[p][h];
#pragma unroll
                    for (int mask = OF_KEY / 2; mask > 0; mask /= 2) dot += __shfl_xor_sync(ALL_LANES, dot, mask);
                    if (part == h) scores[key + p * (LANES / OF_KEY)][h] = dot;
                }
            }
        }
        __syncthreads();
        if (warp < heads) {
            const float nothing = __int_as_float(int(0xff800000u));
            float a = lane < count ? scores[lane][warp] : nothing;
            float b = lane + LANES < count ? scores[lane + LANES][warp] : nothing;
            float before = most[warp], now = fmaxf(before, most_of_warp(fmaxf(a, b)));
            // Where all are negative infinity, so are the differences.
            float base = now == nothing ? 0.0f : now;
            a = lane < count ? expf(a - base) : 0.0f;
            b = lane + LANES < count ? expf(b - base) : 0.0f;
            scores[lane][warp] = a;
            scores[lane + LANES][warp] = b;
            float of_tile = sum_of_warp(a + b), shrink = expf(before - base);
            __syncwarp();
            if (lane == 0) {
                most[warp] = now;
                factor[warp] = shrink;
                total[warp] = total[warp] * shrink + of_tile;
            }
        }
        __syncthreads();
        if (taker < takers) {
#pragma unroll
            for (u32 h = 0; h < HEADS; h++) {
                if (h >= heads) continue;
                sum[h][0] *= factor[h];
                sum[h][1] *= factor[h];
            }
            for (u32 key = taker; key < count; key += takers * LOADS) {
                float2 loaded[LOADS];
#pragma unroll
                for (u32 i = 0; i < LOADS; i++) {
                    u32 at = min(key + i * takers, count - 1);
                    const Bits* two = values + u64(tile + at) * stride + pair * 2;
                    u32 low, high;
                    if (sizeof(Bits) == 2) {
                        u32 word = *reinterpret_cast<const u32*>(two);
                        low = word & 0xffffu;
                        high = word >> 16;
                    } else {
                        uint2 words = *reinterpret_cast<const uint2*>(two);
                        low = words.x;
                        high = words.y;
                    }
                    loaded[i].x = Float::decode(low);
                    loaded[i].y = Float::decode(high);
                }
#pragma unroll
                for (u32 i = 0; i < LOADS; i++) {
                    u32 at = key + i * takers;
                    if (at >= count) continue;
#pragma unroll
                    for (u32 h = 0; h < HEADS; h++) {
                        if (h >= heads) continue;
                        sum[h][0] = __fmaf_rn(scores[at][h], loaded[i].x, sum[h][0]);
                        sum[h][1] = __fmaf_rn(scores[at][h], loaded[i].y, sum[h][1]);
                    }
                }
            }
        }
        __syncthreads();
    }

    if (taker < takers) {
#pragma unroll
        for (u32 h = 0; h < HEADS; h++) {
            sums[(taker * HEADS + h) * head + pair * 2] = sum[h][0];
            sums[(taker * HEADS + h) * head + pair * 2 + 1] = sum[h][1];
        }
    }
    __syncthreads();
    const u32 results = heads * head, slot = HEADS * (head + 2);
    Bits* result = y + (u64(row) * q_heads + first_head) * head;
    u32* counters = reinterpret_cast<u32*>(workspace);
    float* slots = reinterpret_cast<float*>(workspace + DECODER_COUNTER_BYTES) + u64(unit) * splits * slot;
    float* mine = slots + split * slot;
    for (u32 i = thread; i < results; i += THREADS) {
        float all = 0.0f;
        for (u32 t = 0; t < takers; t++) all += sums[t * HEADS * head + i];
        if (active == 1) {
            result[i] = Bits(Float::template encode<true>(all / total[i / head]));
        } else {
            mine[i] = all;
        }
    }
    if (active == 1) return;
    if (thread < heads) {
        mine[HEADS * head + thread] = most[thread];
        mine[HEADS * (head + 1) + thread] = total[thread];
    }
    __syncthreads();
    if (thread == 0) arrived = count_arrival(counters + unit);
    __syncthreads();
    if (arrived != active - 1) return;

    // What the shares are multiplied with: in place of their sums, which nobody needs any more.
    static_assert(MOST_SPLITS <= THREADS * 2, "there is a place for each");
    if (thread == 0) counters[unit] = 0;
    if (warp < heads) {
        const u32 of_most = HEADS * head + warp, of_total = HEADS * (head + 1) + warp;
        float top = __int_as_float(int(0xff800000u));
        for (u32 s = lane; s < active; s += LANES) top = fmaxf(top, load_from_l2(slots + s * slot + of_most));
        top = most_of_warp(top);
        if (top == __int_as_float(int(0xff800000u))) top = 0.0f;
        float all = 0.0f;
        for (u32 s = lane; s < active; s += LANES) {
            float share_of = expf(load_from_l2(slots + s * slot + of_most) - top);
            sums[s * HEADS + warp] = share_of;
            all += share_of * load_from_l2(slots + s * slot + of_total);
        }
        all = sum_of_warp(all);
        if (lane == 0) total[warp] = all;
    }
    __syncthreads();
    for (u32 i = thread; i < results; i += THREADS) {
        float all = 0.0f;
        for (u32 s = 0; s < active; s++) all += sums[s * HEADS + i / head] * load_from_l2(slots + s * slot + i);
        result[i] = Bits(Float::template encode<true>(all / total[i / head]));
    }
}
