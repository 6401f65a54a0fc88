// The part of CUDA C++ that the kernels use, for a C++ compiler on the CPU.
//
// A thread block runs as fibers on one thread of the CPU: each runs until it waits for others, at a
// barrier or in an exchange within its warp. Who waits for what is checked, so that a kernel whose
// threads disagree stops with a message instead of giving wrong results. Correct, not fast.
//
// Compile without fast math and without contraction (-ffp-contract=off): each operation is one
// IEEE operation then, as on the GPU.
#pragma once

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __noinline__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Of the one thread block that runs at a time. Like on the GPU it holds what was left there.
#define __shared__ static

struct Index {
    unsigned x;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

inline thread_local Index threadIdx, blockIdx, gridDim;

namespace shim {

[[noreturn]] inline void stop(const char* problem) {
    std::fprintf(stderr, "thread %u of block %u: %s\n", threadIdx.x, blockIdx.x, problem);
    std::exit(3);
}

constexpr unsigned WARP = 32;
constexpr std::size_t STACK = 64 * 1024;

// What a fiber waits for. All whom it concerns must wait for the same.
enum class Wait { NOTHING, BLOCK_OR, EXCHANGE, VOTE, EXITED };

// An asynchronous copy to shared memory. It is made when its thread waits for it, and not earlier.
struct Copy {
    void* to;
    const void* from;
    unsigned bytes;
};

struct Fiber {
    std::unique_ptr<char[]> stack{new char[STACK]};
    ucontext_t start;
    std::jmp_buf resume;
    bool started = false;
    Wait wait = Wait::NOTHING;
    // Given by the fiber: a value, and the lane whose value it wants; then what it gets.
    std::uint64_t value = 0;
    unsigned source = 0;
    // Groups of copies on their way, the oldest first, and the group that is not ended yet.
    std::deque<std::vector<Copy>> copies;
    std::vector<Copy> group;
};

struct Block {
    std::vector<Fiber> fibers;
    std::function<void()> kernel;
    ucontext_t scheduler_start;
    std::jmp_buf scheduler;
    unsigned current = 0;

    static void entry();
    void run(unsigned threads, bool backwards);
    std::uint64_t wait_for(Wait wait, std::uint64_t value, unsigned source);
    bool release_warp(unsigned first, unsigned end);
    bool release_block(unsigned threads);
};

inline Block block;

// The dynamic shared memory of the block. Behind what the launch gives it is none.
constexpr std::size_t DYNAMIC_BYTES = 232448;
alignas(1024) inline unsigned char dynamic_memory[DYNAMIC_BYTES];
inline std::size_t dynamic_bytes = 0;

inline void Block::entry() {
    block.kernel();
    block.fibers[block.current].wait = Wait::EXITED;
    _longjmp(block.scheduler, 1);
}

inline std::uint64_t Block::wait_for(Wait wait, std::uint64_t value, unsigned source) {
    Fiber& fiber = fibers[current];
    fiber.wait = wait;
    fiber.value = value;
    fiber.source = source;
    if (_setjmp(fiber.resume) == 0) _longjmp(scheduler, 1);
    return fibers[current].value;
}

// Carries out an exchange or a vote once all lanes of a warp take part in it.
inline bool Block::release_warp(unsigned first, unsigned end) {
    Wait wait = fibers[first].wait;
    if (wait != Wait::EXCHANGE && wait != Wait::VOTE) return false;
    std::uint64_t values[WARP] = {}, ballot = 0;
    for (unsigned i = first; i < end; i++) {
        if (fibers[i].wait != wait) return false;
        values[i - first] = fibers[i].value;
        ballot |= std::uint64_t(fibers[i].value != 0) << (i - first);
    }
    for (unsigned i = first; i < end; i++) {
        fibers[i].value = wait == Wait::VOTE ? ballot : values[fibers[i].source];
        fibers[i].wait = Wait::NOTHING;
    }
    return true;
}

inline bool Block::release_block(unsigned threads) {
    std::uint64_t any = 0;
    for (unsigned i = 0; i < threads; i++) {
        if (fibers[i].wait != Wait::BLOCK_OR) return false;
        any |= fibers[i].value;
    }
    for (unsigned i = 0; i < threads; i++) {
        fibers[i].value = any;
        fibers[i].wait = Wait::NOTHING;
    }
    return true;
}

inline void Block::run(unsigned threads, bool backwards) {
    if (threads % WARP != 0) stop("warps are not whole");
    if (fibers.size() < threads) fibers.resize(threads);
    for (unsigned i = 0; i < threads; i++) {
        fibers[i].started = false;
        fibers[i].wait = Wait::NOTHING;
        fibers[i].copies.clear();
        fibers[i].group.clear();
    }
    for (bool moved = true; moved;) {
        moved = false;
        for (unsigned step = 0; step < threads; step++) {
            current = backwards ? threads - 1 - step : step;
            if (fibers[current].wait != Wait::NOTHING) continue;
            moved = true;
            threadIdx.x = current;
            if (_setjmp(scheduler) == 0) {
                Fiber& fiber = fibers[current];
                if (fiber.started) _longjmp(fiber.resume, 1);
                fiber.started = true;
                getcontext(&fiber.start);
                fiber.start.uc_stack.ss_sp = fiber.stack.get();
                fiber.start.uc_stack.ss_size = STACK;
                fiber.start.uc_link = nullptr;
                makecontext(&fiber.start, &Block::entry, 0);
                setcontext(&fiber.start);
            }
        }
        for (unsigned first = 0; first < threads; first += WARP) moved |= release_warp(first, first + WARP);
        moved |= release_block(threads);
    }
    for (unsigned i = 0; i < threads; i++) {
        threadIdx.x = i;
        if (fibers[i].wait != Wait::EXITED) stop("waits for threads that do not come");
        if (!fibers[i].group.empty()) stop("ends with copies that nobody can wait for");
        for (const std::vector<Copy>& group : fibers[i].copies) {
            if (!group.empty()) stop("ends before its copies");
        }
    }
}

// Runs a grid, block after block, the threads of every other block in the opposite order.
inline void launch(unsigned grid, unsigned threads, std::size_t shared_bytes, std::function<void()> kernel) {
    if (shared_bytes > DYNAMIC_BYTES) stop("more shared memory than there is");
    dynamic_bytes = shared_bytes;
    block.kernel = std::move(kernel);
    gridDim.x = grid;
    for (unsigned index = 0; index < grid; index++) {
        blockIdx.x = index;
        // As floats of any type it is NaN, so that reading what nobody wrote shows.
        if (shared_bytes > 0) std::memset(dynamic_memory, 0xff, DYNAMIC_BYTES);
        block.run(threads, index % 2 == 1);
        if (shared_bytes == 0) continue;
        for (std::size_t i = shared_bytes; i < DYNAMIC_BYTES; i++) {
            if (dynamic_memory[i] != 0xff) stop("writes behind its shared memory");
        }
    }
}

inline void copy_async(void* to, const void* from, unsigned bytes) {
    auto begin = reinterpret_cast<std::uintptr_t>(to);
    if (begin % bytes != 0 || reinterpret_cast<std::uintptr_t>(from) % bytes != 0) stop("a copy is not aligned");
    auto memory = reinterpret_cast<std::uintptr_t>(dynamic_memory);
    if (begin < memory || begin + bytes > memory + dynamic_bytes) stop("a copy goes beside the shared memory");
    block.fibers[block.current].group.push_back({to, from, bytes});
}

inline void end_copy_group() {
    Fiber& fiber = block.fibers[block.current];
    fiber.copies.push_back(std::move(fiber.group));
    fiber.group.clear();
}

inline void wait_for_copies(std::size_t groups) {
    Fiber& fiber = block.fibers[block.current];
    for (; fiber.copies.size() > groups; fiber.copies.pop_front()) {
        for (const Copy& copy : fiber.copies.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    }
}

// What the threads of a block give to a product of warpgroups.
constexpr unsigned WARPGROUPS_THREADS = 256;

// What the lanes of one warp at a time give to a product.
struct Operands {
    unsigned a[4], b[2];
};

template <class To, class From>
To bits(From from) {
    static_assert(sizeof(To) >= sizeof(From), "nothing may be cut off");
    To to = {};
    std::memcpy(&to, &from, sizeof from);
    return to;
}

template <class Value>
Value exchange(unsigned lanes, Value value, unsigned source) {
    if (lanes != 0xffffffffu) stop("only whole warps are known here");
    std::uint64_t got = block.wait_for(Wait::EXCHANGE, bits<std::uint64_t>(value), source);
    std::memcpy(&value, &got, sizeof value);
    return value;
}

inline unsigned vote(unsigned lanes, bool value) {
    if (lanes != 0xffffffffu) stop("only whole warps are known here");
    return unsigned(block.wait_for(Wait::VOTE, value, 0));
}

}  // namespace shim

inline void __syncthreads() { shim::block.wait_for(shim::Wait::BLOCK_OR, 0, 0); }
inline int __syncthreads_or(int value) { return int(shim::block.wait_for(shim::Wait::BLOCK_OR, value != 0, 0)); }

template <class Value>
Value __shfl_sync(unsigned lanes, Value value, unsigned source) {
    return shim::exchange(lanes, value, source % shim::WARP);
}

template <class Value>
Value __shfl_xor_sync(unsigned lanes, Value value, int mask) {
    return shim::exchange(lanes, value, (threadIdx.x % shim::WARP) ^ unsigned(mask));
}

template <class Value>
Value __shfl_down_sync(unsigned lanes, Value value, unsigned distance) {
    unsigned lane = threadIdx.x % shim::WARP;
    return shim::exchange(lanes, value, lane + distance < shim::WARP ? lane + distance : lane);
}

inline unsigned __ballot_sync(unsigned lanes, int value) { return shim::vote(lanes, value != 0); }
inline int __any_sync(unsigned lanes, int value) { return shim::vote(lanes, value != 0) != 0; }

template <class Number>
Number atomicAdd(Number* sum, Number value) {
    Number before = *sum;
    *sum += value;
    return before;
}

inline unsigned atomicOr(unsigned* bits, unsigned value) {
    unsigned before = *bits;
    *bits |= value;
    return before;
}

inline int __float_as_int(float x) { return shim::bits<int>(x); }
inline float __int_as_float(int x) { return shim::bits<float>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline float __double2float_rn(double x) { return float(x); }
// NaN becomes 0, as in PTX. Nothing here is too large for an int.
inline int __float2int_rd(float x) { return x != x ? 0 : int(__builtin_floorf(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
template <class Number>
Number max(Number a, Number b) { return a < b ? b : a; }
template <class Number>
Number min(Number a, Number b) { return b < a ? b : a; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Byte `i` of the result is the one of the eight bytes of `low` and `high` that digit `i` says.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    std::uint64_t bytes = std::uint64_t(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= unsigned(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}

// The upper word of both, shifted to the left.
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned distance) {
    return unsigned((std::uint64_t(high) << 32 | low) << (distance % 32) >> 32);
}

inline void __syncwarp() { shim::vote(0xffffffffu, false); }
inline void __threadfence() {}
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline void launch_dependents() {}
inline void wait_for_earlier_grids() {}
template <class Value>
Value load_from_l2(const Value* from) {
    return *from;
}
inline unsigned count_arrival(unsigned* counter) { return (*counter)++; }
inline void copy_async_16(void* to, const void* from) { shim::copy_async(to, from, 16); }
inline void copy_async_8(void* to, const void* from) { shim::copy_async(to, from, 8); }
inline void copy_async_4(void* to, const void* from) { shim::copy_async(to, from, 4); }
inline void end_copy_group() { shim::end_copy_group(); }
template <int GROUPS>
void wait_for_copies() {
    shim::wait_for_copies(GROUPS);
}

inline float half_to_float(unsigned short bits) {
    float magnitude;
    if ((bits & 0x7c00) == 0x7c00) {
        magnitude = __int_as_float(0x7f800000 | (bits & 0x3ff) << 13);
    } else if ((bits & 0x7c00) != 0) {
        magnitude = __int_as_float((bits & 0x7fff) * 8192 + (112 << 23));
    } else {
        magnitude = float(bits & 0x3ff) * 0x1p-24f;
    }
    return __int_as_float(__float_as_int(magnitude) | int((bits & 0x8000u) << 16));
}

inline unsigned short float_to_half(float value) {
    unsigned all = unsigned(__float_as_int(value));
    unsigned sign = all >> 16 & 0x8000u, magnitude = all & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (unsigned short)(sign | 0x7fffu);
    // 65520 is the first that rounds to infinity.
    if (magnitude >= 0x477ff000u) return (unsigned short)(sign | 0x7c00u);
    // Rounds at the last bit that binary16 has there: adds and takes away what has its ulp 13 bits
    // up, or 2^-24 at the low end.
    float x = __int_as_float(int(magnitude));
    unsigned exponent = magnitude >> 23 > 113u ? magnitude >> 23 : 113u;
    volatile float rounder = __int_as_float(int((exponent + 13) << 23));
    volatile float sum = x + rounder;
    float rounded = sum - rounder;
    return (unsigned short)(sign | unsigned(rounded < 0x1p-14f ? rounded * 0x1p24f
                                            : float((__float_as_int(rounded) - (112 << 23)) >> 13)));
}

// The product of a warp's 16 x 16 and 16 x 8 tiles of 16-bit floats, added to `sum`. As on the GPU,
// products are exact; their order is not specified there, and here they are summed up as doubles.
template <class Float>
void multiply_tile(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    static shim::Operands operands[64][shim::WARP];
    unsigned lane = threadIdx.x % shim::WARP;
    shim::Operands(&warp)[shim::WARP] = operands[threadIdx.x / shim::WARP];
    warp[lane] = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    __syncwarp();
    auto element = [](unsigned pair, unsigned i) { return double(Float::decode(pair >> i * 16 & 0xffffu)); };
    double add[4] = {};
    for (unsigned i = 0; i < 4; i++) {
        unsigned row = lane / 4, column = lane % 4 * 2 + i % 2;
        for (unsigned k = 0; k < 16; k++) {
            unsigned of_a = warp[row * 4 + k % 8 / 2].a[i / 2 + k / 8 * 2];
            unsigned of_b = warp[column * 4 + k % 8 / 2].b[k / 8];
            add[i] += element(of_a, k % 2) * element(of_b, k % 2);
        }
    }
    __syncwarp();
    for (unsigned i = 0; i < 4; i++) sum[i] = float(double(sum[i]) + add[i]);
}

// Two values rounded to the type.
template <class Float>
unsigned round_pair(float first, float second) {
    return Float::template encode<true>(first) | Float::template encode<true>(second) << 16;
}

inline float2 halves_to_floats(unsigned pair) {
    return {half_to_float((unsigned short)(pair & 0xffffu)), half_to_float((unsigned short)(pair >> 16))};
}

// Four matrices of 8 x 8 elements of 16 bits, transposed or not.
inline void load_matrices(unsigned (&a)[4], const void* row, bool transposed) {
    static const void* rows[64][shim::WARP];
    unsigned lane = threadIdx.x % shim::WARP;
    const void*(&warp)[shim::WARP] = rows[threadIdx.x / shim::WARP];
    if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) shim::stop("a row of a matrix is not aligned");
    warp[lane] = row;
    __syncwarp();
    for (unsigned i = 0; i < 4; i++) {
        unsigned short pair[2];
        for (unsigned j = 0; j < 2; j++) {
            unsigned pair_index = lane % 4 * 2 + j, other = lane / 4;
            const void* of_row = warp[i * 8 + (transposed ? pair_index : other)];
            std::memcpy(&pair[j], static_cast<const char*>(of_row) + (transposed ? other : pair_index) * 2, 2);
        }
        a[i] = pair[0] | unsigned(pair[1]) << 16;
    }
    __syncwarp();
}

inline void load_transposed(unsigned (&a)[4], const void* row) { load_matrices(a, row, true); }
inline void load_straight(unsigned (&b)[4], const void* row) { load_matrices(b, row, false); }

// Products of warpgroups. The right operand is described by its address.
inline unsigned long long describe_tile(const void* tile) { return reinterpret_cast<std::uintptr_t>(tile); }
inline void show_to_tensor_cores() {}
inline void begin_products() {}
inline void end_products() {}
inline void wait_for_products() {}
inline void wait_for_earlier_products() {}
template <unsigned COUNT>
void keep_behind_wait(float (&)[COUNT]) {}

// All threads of the block take part, since all warpgroups do the same here. The right operand's
// rows, of 128 bytes, lie in groups of eight at multiples of 1024, each 16 bytes at the place that is
// theirs exclusive-or the row.
template <class Float, unsigned COUNT>
void multiply_async(float (&sum)[COUNT], const unsigned (&a)[4], unsigned long long b, bool add) {
    static unsigned operands[shim::WARPGROUPS_THREADS][4];
    std::memcpy(operands[threadIdx.x], a, sizeof a);
    __syncthreads();
    auto element = [](unsigned bits) { return double(Float::decode(bits & 0xffffu)); };
    unsigned lane = threadIdx.x % shim::WARP, first = threadIdx.x - lane;
    double left[2][16];
    for (unsigned half = 0; half < 2; half++) {
        for (unsigned k = 0; k < 16; k++) {
            unsigned pair = operands[first + lane / 4 * 4 + k % 8 / 2][half + k / 8 * 2];
            left[half][k] = element(pair >> k % 2 * 16);
        }
    }
    for (unsigned i = 0; i < COUNT; i++) {
        unsigned column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        double products = 0;
        for (unsigned k = 0; k < 16; k++) {
            unsigned long long address = b + column * 128 + k * 2;
            address ^= (address >> 7 & 7) << 4;
            unsigned short bits;
            std::memcpy(&bits, reinterpret_cast<const void*>(address), sizeof bits);
            products += left[i / 2 % 2][k] * element(bits);
        }
        sum[i] = float((add ? double(sum[i]) : 0.0) + products);
    }
    __syncthreads();
}
