// The part of CUDA C++ that the kernels use, for a C++ compiler on the CPU.
//
// A thread block runs as fibers on one thread of the CPU: each runs until it waits for others, at a
// barrier or in an exchange within its warp. Who waits for what is checked, so that a kernel whose
// threads disagree stops with a message instead of giving wrong results. Correct, not fast.
//
// Compile without fast math and without contraction (-ffp-contract=off): each operation is one
// IEEE operation then, as on the GPU.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __noinline__
#define __launch_bounds__(THREADS)
// Of the one thread block that runs at a time. Like on the GPU it holds what was left there.
#define __shared__ static

struct Index {
    unsigned x;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

inline thread_local Index threadIdx, blockIdx;

namespace shim {

[[noreturn]] inline void stop(const char* problem) {
    std::fprintf(stderr, "thread %u of block %u: %s\n", threadIdx.x, blockIdx.x, problem);
    std::exit(3);
}

constexpr unsigned WARP = 32;
constexpr std::size_t STACK = 64 * 1024;

// What a fiber waits for. All whom it concerns must wait for the same.
enum class Wait { NOTHING, BLOCK_OR, EXCHANGE, VOTE, EXITED };

struct Fiber {
    std::unique_ptr<char[]> stack{new char[STACK]};
    ucontext_t start;
    std::jmp_buf resume;
    bool started = false;
    Wait wait = Wait::NOTHING;
    // Given by the fiber: a value, and the lane whose value it wants; then what it gets.
    std::uint64_t value = 0;
    unsigned source = 0;
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
    }
}

// Runs a grid, block after block, the threads of every other block in the opposite order.
inline void launch(unsigned grid, unsigned threads, std::function<void()> kernel) {
    block.kernel = std::move(kernel);
    for (unsigned index = 0; index < grid; index++) {
        blockIdx.x = index;
        block.run(threads, index % 2 == 1);
    }
}

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

inline unsigned long long atomicAdd(unsigned long long* sum, unsigned long long value) {
    unsigned long long before = *sum;
    *sum += value;
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
