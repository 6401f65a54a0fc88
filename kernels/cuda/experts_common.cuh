// What the kernels of experts share: how pairs of a token and an expert are dealt out to tiles, and what
// becomes of sums.
//
// A stack of experts is one matrix W [experts * outputs, inputs], quantized as a whole or in parts. Pair
// `token * choices + choice` is a row of what is computed. A tile of rows is of pairs of one expert.
#pragma once

#include "linear_common.cuh"

// The bits of a product's form. `kernels/src/cuda/experts.rs` has them too.
static constexpr u32 FORM_GATED = 1u, FORM_INTERLEAVED = 2u, FORM_PARTS = 4u;
// Whether there is one token: each pair is a tile, and `routing` the experts' numbers.
static constexpr u32 FORM_ONE_TOKEN = 8u;
// Whether routing is known to be complete before the launch before has ended.
static constexpr u32 FORM_FOLLOWS = 16u;
static constexpr u32 FORM_ACTIVATION = 8;

enum Activation : u32 { SILU, GELU, GELU_TANH, CLAMPED };

// Of what `experts_route` leaves: the number of tiles, at 16 the pairs by expert, and the tiles behind
// them, at a multiple of 16.
static constexpr u32 PAIRS_BEGIN = 16;
static __device__ u64 tiles_begin(u32 pairs) { return (PAIRS_BEGIN + u64(pairs) * 4 + 15) / 16 * 16; }

struct RowTile {
    u32 expert;
    // Of the pairs by expert.
    u32 begin, count;
};

// Not a part of its callers, which would have it many times.
static __device__ __noinline__ float activate(u32 activation, float limit, float gate, float up) {
    if (activation == SILU) return gate / (1.0f + expf(-gate)) * up;
    // Twice the share of the normal distribution below the gate, without the difference from 1.
    if (activation == GELU) return 0.5f * gate * erfcf(-0.70710678f * gate) * up;
    if (activation == GELU_TANH) {
        // (1 + tanh(z)) / 2 is 1 / (1 + exp(-2 z)).
        float z = 0.79788456f * (gate + 0.044715f * gate * gate * gate);
        return gate / (1.0f + expf(-2.0f * z)) * up;
    }
    // NaN is neither above nor below.
    if (gate > limit) gate = limit;
    if (up > limit) up = limit;
    if (up < -limit) up = -limit;
    return (up + 1.0f) * (gate / (1.0f + expf(-1.702f * gate)));
}

// What recovers the scales of a row with double quantization. Blocks are counted from where W begins.
struct Nested {
    const float* absmax;
    float mean;
};

// A product with experts: what the kernels' arguments say.
template <class Float>
struct Experts {
    using Bits = typename Float::Bits;

    Weights weights;
    const Bits* x;
    const Bits* bias;
    void* y;
    const u8* routing;
    u32 pairs;
    // That have the same row of x.
    u32 pairs_of_row;
    u32 experts, outputs, inputs, form;
    float limit;

    __device__ bool gated() const { return (form & FORM_GATED) != 0; }
    // Columns of y.
    __device__ u32 results() const { return gated() ? outputs / 2 : outputs; }

    // What follows reads what the kernel before has written: from the L2, where it is even if this
    // kernel has begun before that one ended.
    __device__ u32 row_tiles() const {
        if ((form & FORM_ONE_TOKEN) != 0) return pairs;
        return load_from_l2(reinterpret_cast<const u32*>(routing));
    }

    __device__ RowTile row_tile(u32 index) const {
        if ((form & FORM_ONE_TOKEN) != 0) {
            u32 expert = load_from_l2(reinterpret_cast<const u32*>(routing) + index);
            // A tile without rows, of weights that are there.
            return expert < experts ? RowTile{expert, index, 1} : RowTile{0, index, 0};
        }
        uint4 tile = load_from_l2(reinterpret_cast<const uint4*>(routing + tiles_begin(pairs)) + index);
        return {tile.x, tile.y, tile.z};
    }

    __device__ u32 pair(const RowTile& tile, u32 row) const {
        if ((form & FORM_ONE_TOKEN) != 0) return tile.begin;
        return load_from_l2(reinterpret_cast<const u32*>(routing + PAIRS_BEGIN) + tile.begin + row);
    }

    __device__ u32 row_of_x(u32 pair) const { return pairs_of_row == 1 ? pair : pair / pairs_of_row; }

    // The row of an expert's weights that is the gate of a result, or the other one.
    __device__ u32 gate_row(u32 result, u32 other) const {
        return (form & FORM_INTERLEAVED) != 0 ? 2 * result + other : other * (outputs / 2) + result;
    }

    // Whether each expert is a tensor that has been quantized by itself, or each half of its outputs, with double
    // quantization: a multiple of 256 blocks. Each has a mean, at multiples of 16 bytes, and nested scales that
    // begin at a multiple of 256 bytes.
    __device__ bool halves_apart() const { return (form & 64u) != 0; }
    __device__ bool apart() const { return (form & 96u) != 0; }

    // With double quantization.
    __device__ Nested nested_of(u32 expert, u32 row) const {
        if (!apart()) return {weights.nested_absmax, *weights.offset};
        const u32 rows = halves_apart() ? outputs / 2 : outputs;
        const u32 tensor = halves_apart() ? 2 * expert + (row >= rows ? 1 : 0) : expert;
        // Between the nested scales of one and those of the next is what they are short of 64.
        const u32 gap = (64 - u32(u64(rows) * inputs >> (weights.block_bits + 8)) % 64) % 64;
        return {weights.nested_absmax + u64(tensor) * gap, weights.offset[u64(tensor) * 4]};
    }

    __device__ float bias_of(u32 expert, u32 row) const {
        return bias == nullptr ? 0.0f : Float::decode(bias[u64(expert) * outputs + row]);
    }

    __device__ float activated(float gate, float up) const {
        return activate(form >> FORM_ACTIVATION, limit, gate, up);
    }

    __device__ void write(u32 pair, u32 result, float value) const {
        u64 at = u64(pair) * results() + result;
        if ((form & FORM_PARTS) != 0) {
            static_cast<float*>(y)[at] = value;
        } else {
            static_cast<Bits*>(y)[at] = Bits(Float::template encode<true>(value));
        }
    }
};
