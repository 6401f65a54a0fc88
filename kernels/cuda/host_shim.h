// The part of CUDA C++ that the kernels use, for a C++ compiler on the CPU.
//
// A thread block, or a cluster of them, runs as fibers on one thread of the CPU: each runs until it waits
// for others, at a barrier or in an exchange within its warp. Who waits for what is checked, so that a kernel
// whose threads disagree stops with a message instead of giving wrong results. Correct, not fast.
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
#define __grid_constant__
// How many run at a time is said to `launch`.
#define CLUSTER_OF(COUNT)
// Of the one thread block that runs at a time: those of clusters have dynamic shared memory only. Like on the
// GPU it holds what was left there.
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
enum class Wait { NOTHING, BLOCK_OR, THREADS, CLUSTER, PHASE, EXCHANGE, VOTE, EXITED };

// An asynchronous copy to shared memory. It is made when its thread waits for it, and not earlier.
struct Copy {
    void* to;
    const void* from;
    unsigned bytes;
};

// A product of a warpgroup that is on its way: a thread's part of it. It is computed when its thread waits
// for it, from what is in shared memory then.
struct Multiplication {
    float* sum;
    unsigned columns;
    bool add;
    // Of the thread's two rows.
    double left[2][16];
    unsigned long long right;
    double (*element)(unsigned);
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
    // The same of products.
    std::deque<std::vector<Multiplication>> products;
    std::vector<Multiplication> product_group;
};

// The dynamic shared memory of each block of a cluster. Behind what the launch gives it is none.
constexpr std::size_t DYNAMIC_BYTES = 232448;
constexpr unsigned MOST_CLUSTER = 2;
struct alignas(1024) DynamicMemory {
    unsigned char bytes[DYNAMIC_BYTES];
};
inline DynamicMemory memories[MOST_CLUSTER];
inline std::size_t dynamic_bytes = 0;

// A barrier in shared memory, as wide as on the GPU.
struct PhaseBarrier {
    unsigned char expected, pending, parity, is_ready;
    // Announced and not come yet; less than zero if they came first.
    std::int32_t bytes;

    void settle() {
        if (pending != 0 || bytes != 0) return;
        parity ^= 1;
        pending = expected;
    }
};
static_assert(sizeof(PhaseBarrier) == 8);

// A tile that the copy engine brings. It comes at once or as late as can be, by turns.
struct TileCopy {
    unsigned char* to;
    PhaseBarrier* barrier;
    // Rows of the tile; where they come from, and how much is there.
    unsigned width, height, swizzle;
    const unsigned char* from;
    std::uint64_t row_bytes;
    unsigned there, rows_there;

    void make() const {
        for (unsigned row = 0; row < height; row++) {
            for (unsigned piece = 0; piece < width / 16; piece++) {
                unsigned place = row * width + piece * 16;
                // Addresses of shared memory are multiples of the pattern.
                unsigned char* at = to + (place ^ ((place >> 7 & (swizzle / 16 - 1)) << 4));
                unsigned have = row < rows_there && there > piece * 16 ? there - piece * 16 : 0;
                std::memset(at, 0, 16);
                if (have > 0) std::memcpy(at, from + row * row_bytes + piece * 16, have < 16 ? have : 16);
            }
        }
        barrier->bytes -= std::int32_t(width * height);
        barrier->settle();
    }
};

// The thread blocks that run at a time: one, or those of a cluster.
struct Blocks {
    // Of one block after the other.
    std::vector<Fiber> fibers;
    std::function<void()> kernel;
    ucontext_t scheduler_start;
    std::jmp_buf scheduler;
    unsigned current = 0, threads = 0, cluster = 1;
    std::deque<TileCopy> tiles;
    bool tiles_come_late = false;

    static void entry();
    void run(unsigned first_block, bool backwards);
    std::uint64_t wait_for(Wait wait, std::uint64_t value, unsigned source);
    bool release_warp(unsigned first, unsigned end);
    bool release_all(Wait wait, unsigned first, unsigned end);
    bool release_phases();
    unsigned rank() const { return current / threads; }
};

inline Blocks block;

inline void Blocks::entry() {
    block.kernel();
    block.fibers[block.current].wait = Wait::EXITED;
    _longjmp(block.scheduler, 1);
}

inline std::uint64_t Blocks::wait_for(Wait wait, std::uint64_t value, unsigned source) {
    Fiber& fiber = fibers[current];
    fiber.wait = wait;
    fiber.value = value;
    fiber.source = source;
    if (_setjmp(fiber.resume) == 0) _longjmp(scheduler, 1);
    return fibers[current].value;
}

// Carries out an exchange or a vote once all lanes of a warp take part in it.
inline bool Blocks::release_warp(unsigned first, unsigned end) {
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

// Lets threads go on once all of them wait for this.
inline bool Blocks::release_all(Wait wait, unsigned first, unsigned end) {
    std::uint64_t any = 0;
    for (unsigned i = first; i < end; i++) {
        if (fibers[i].wait != wait) return false;
        any |= fibers[i].value;
    }
    for (unsigned i = first; i < end; i++) {
        fibers[i].value = any;
        fibers[i].wait = Wait::NOTHING;
    }
    return true;
}

// Lets those go on whose phase has ended. `value` is the barrier's address, `source` the parity.
inline bool Blocks::release_phases() {
    bool moved = false;
    for (Fiber& fiber : fibers) {
        if (fiber.wait != Wait::PHASE) continue;
        const PhaseBarrier* barrier = reinterpret_cast<const PhaseBarrier*>(fiber.value);
        if (barrier->parity == fiber.source) continue;
        fiber.wait = Wait::NOTHING;
        moved = true;
    }
    return moved;
}

inline void Blocks::run(unsigned first_block, bool backwards) {
    const unsigned all = threads * cluster;
    if (fibers.size() < all) fibers.resize(all);
    for (unsigned i = 0; i < fibers.size(); i++) {
        fibers[i].started = false;
        fibers[i].wait = i < all ? Wait::NOTHING : Wait::EXITED;
        fibers[i].copies.clear();
        fibers[i].group.clear();
        fibers[i].products.clear();
        fibers[i].product_group.clear();
    }
    tiles.clear();
    tiles_come_late = backwards;
    for (bool moved = true; moved;) {
        moved = false;
        for (unsigned step = 0; step < all; step++) {
            current = backwards ? all - 1 - step : step;
            if (fibers[current].wait != Wait::NOTHING) continue;
            moved = true;
            threadIdx.x = current % threads;
            blockIdx.x = first_block + current / threads;
            if (_setjmp(scheduler) == 0) {
                Fiber& fiber = fibers[current];
                if (fiber.started) _longjmp(fiber.resume, 1);
                fiber.started = true;
                getcontext(&fiber.start);
                fiber.start.uc_stack.ss_sp = fiber.stack.get();
                fiber.start.uc_stack.ss_size = STACK;
                fiber.start.uc_link = nullptr;
                makecontext(&fiber.start, &Blocks::entry, 0);
                setcontext(&fiber.start);
            }
        }
        for (unsigned first = 0; first < all; first += WARP) moved |= release_warp(first, first + WARP);
        for (unsigned first = 0; first < all; first += threads) {
            moved |= release_all(Wait::BLOCK_OR, first, first + threads);
            // The value is how many threads it is for.
            if (fibers[first].wait == Wait::THREADS) {
                moved |= release_all(Wait::THREADS, first, first + unsigned(fibers[first].value));
            }
        }
        moved |= release_all(Wait::CLUSTER, 0, all);
        moved |= release_phases();
        if (!moved && !tiles.empty()) {
            tiles.front().make();
            tiles.pop_front();
            moved = true;
        }
    }
    for (unsigned i = 0; i < all; i++) {
        threadIdx.x = i % threads;
        blockIdx.x = first_block + i / threads;
        if (fibers[i].wait != Wait::EXITED) stop("waits for threads that do not come");
        if (!fibers[i].group.empty()) stop("ends with copies that nobody can wait for");
        if (!fibers[i].product_group.empty()) stop("ends with products that nobody can wait for");
        for (const std::vector<Copy>& group : fibers[i].copies) {
            if (!group.empty()) stop("ends before its copies");
        }
        for (const std::vector<Multiplication>& group : fibers[i].products) {
            if (!group.empty()) stop("ends before its products");
        }
    }
}

// Runs a grid, block after block or cluster after cluster, the threads of every other one in the opposite
// order.
inline void launch(unsigned grid, unsigned threads, std::size_t shared_bytes, unsigned cluster,
                   std::function<void()> kernel) {
    if (shared_bytes > DYNAMIC_BYTES) stop("more shared memory than there is");
    if (threads % WARP != 0) stop("warps are not whole");
    if (cluster > MOST_CLUSTER || grid % cluster != 0) stop("clusters are not whole");
    dynamic_bytes = shared_bytes;
    block.kernel = std::move(kernel);
    block.threads = threads;
    block.cluster = cluster;
    gridDim.x = grid;
    for (unsigned index = 0; index < grid; index += cluster) {
        blockIdx.x = index;
        for (unsigned rank = 0; rank < cluster && shared_bytes > 0; rank++) {
            // As floats of any type it is NaN, so that reading what nobody wrote shows.
            std::memset(memories[rank].bytes, 0xff, DYNAMIC_BYTES);
        }
        block.run(index, index / cluster % 2 == 1);
        for (unsigned rank = 0; rank < cluster && shared_bytes > 0; rank++) {
            for (std::size_t i = shared_bytes; i < DYNAMIC_BYTES; i++) {
                if (memories[rank].bytes[i] != 0xff) stop("writes behind its shared memory");
            }
        }
    }
}

inline unsigned char* own_memory() { return memories[block.rank()].bytes; }

// Where in its shared memory something is that a thread block says.
inline std::size_t place_of(const void* pointer, std::size_t bytes, std::size_t alignment) {
    auto at = reinterpret_cast<std::uintptr_t>(pointer), memory = reinterpret_cast<std::uintptr_t>(own_memory());
    if (at < memory || at + bytes > memory + dynamic_bytes) stop("is not in the block's shared memory");
    if ((at - memory) % alignment != 0) stop("is not aligned in shared memory");
    return at - memory;
}

inline PhaseBarrier* barrier_of(unsigned long long* barrier, unsigned rank) {
    std::size_t place = place_of(barrier, sizeof *barrier, alignof(unsigned long long));
    return reinterpret_cast<PhaseBarrier*>(memories[rank].bytes + place);
}

inline void arrive_at_barrier(PhaseBarrier* barrier) {
    if (barrier->is_ready != 1) stop("arrives at no barrier");
    if (barrier->pending == 0) stop("more threads arrive than were said");
    barrier->pending--;
    barrier->settle();
}

inline void copy_async(void* to, const void* from, unsigned bytes) {
    auto begin = reinterpret_cast<std::uintptr_t>(to);
    if (begin % bytes != 0 || reinterpret_cast<std::uintptr_t>(from) % bytes != 0) stop("a copy is not aligned");
    auto memory = reinterpret_cast<std::uintptr_t>(own_memory());
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

inline void end_product_group() {
    Fiber& fiber = block.fibers[block.current];
    fiber.products.push_back(std::move(fiber.product_group));
    fiber.product_group.clear();
}

inline void wait_for_product_groups(std::size_t groups) {
    Fiber& fiber = block.fibers[block.current];
    for (; fiber.products.size() > groups; fiber.products.pop_front()) {
        for (const Multiplication& product : fiber.products.front()) {
            unsigned lane = threadIdx.x % WARP;
            for (unsigned i = 0; i < product.columns / 2; i++) {
                unsigned column = i / 4 * 8 + lane % 4 * 2 + i % 2;
                double products = 0;
                for (unsigned k = 0; k < 16; k++) {
                    unsigned long long address = product.right + column * 128 + k * 2;
                    address ^= (address >> 7 & 7) << 4;
                    unsigned short bits;
                    std::memcpy(&bits, reinterpret_cast<const void*>(address), sizeof bits);
                    products += product.left[i / 2 % 2][k] * product.element(bits);
                }
                product.sum[i] = float((product.add ? double(product.sum[i]) : 0.0) + products);
            }
        }
    }
}

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
    static shim::Operands operands[shim::MOST_CLUSTER][64][shim::WARP];
    unsigned lane = threadIdx.x % shim::WARP;
    shim::Operands(&warp)[shim::WARP] = operands[shim::block.rank()][threadIdx.x / shim::WARP];
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
    static const void* rows[shim::MOST_CLUSTER][64][shim::WARP];
    unsigned lane = threadIdx.x % shim::WARP;
    const void*(&warp)[shim::WARP] = rows[shim::block.rank()][threadIdx.x / shim::WARP];
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
inline void end_products() { shim::end_product_group(); }
inline void wait_for_products() { shim::wait_for_product_groups(0); }
inline void wait_for_earlier_products() { shim::wait_for_product_groups(1); }
template <unsigned COUNT>
void keep_behind_wait(float (&)[COUNT]) {}

// Each warp has its own rows. The right operand's rows, of 128 bytes, lie in groups of eight at multiples of
// 1024, each 16 bytes at the place that is theirs exclusive-or the row.
template <class Float, unsigned COUNT>
void multiply_async(float (&sum)[COUNT], const unsigned (&a)[4], unsigned long long b, bool add) {
    static unsigned operands[shim::MOST_CLUSTER][64][shim::WARP][4];
    unsigned lane = threadIdx.x % shim::WARP;
    unsigned(&warp)[shim::WARP][4] = operands[shim::block.rank()][threadIdx.x / shim::WARP];
    std::memcpy(warp[lane], a, sizeof a);
    __syncwarp();
    shim::Multiplication product = {sum, COUNT * 2, add, {}, b,
                                    [](unsigned bits) { return double(Float::decode(bits & 0xffffu)); }};
    for (unsigned half = 0; half < 2; half++) {
        for (unsigned k = 0; k < 16; k++) {
            unsigned pair = warp[lane / 4 * 4 + k % 8 / 2][half + k / 8 * 2];
            product.left[half][k] = product.element(pair >> k % 2 * 16);
        }
    }
    __syncwarp();
    shim::block.fibers[shim::block.current].product_group.push_back(product);
}

// What linear_bulk.cuh has.
inline void init_barrier(unsigned long long* barrier, unsigned arrivals) {
    if (arrivals > 255) shim::stop("more arrivals than this knows");
    auto count = (unsigned char)(arrivals);
    *shim::barrier_of(barrier, shim::block.rank()) = {count, count, 0, 1, 0};
}
inline void show_barriers() {}
inline void arrive_at(unsigned long long* barrier, unsigned rank) {
    if (rank >= shim::block.cluster) shim::stop("arrives at a block that is not there");
    shim::arrive_at_barrier(shim::barrier_of(barrier, rank));
}
inline void arrive(unsigned long long* barrier) { arrive_at(barrier, shim::block.rank()); }
inline void arrive_and_expect(unsigned long long* barrier, unsigned bytes) {
    shim::barrier_of(barrier, shim::block.rank())->bytes += std::int32_t(bytes);
    arrive(barrier);
}
inline void wait_for_phase(unsigned long long* barrier, unsigned parity) {
    shim::PhaseBarrier* at = shim::barrier_of(barrier, shim::block.rank());
    if (at->is_ready != 1) shim::stop("waits at no barrier");
    // The phase of the other parity is the one before the first.
    if (at->parity == parity) shim::block.wait_for(shim::Wait::PHASE, reinterpret_cast<std::uintptr_t>(at), parity);
}
inline unsigned rank_in_cluster() { return shim::block.rank(); }
inline void meet_cluster() { shim::block.wait_for(shim::Wait::CLUSTER, 0, 0); }
template <unsigned THREADS>
void meet_threads() {
    shim::block.wait_for(shim::Wait::THREADS, THREADS, 0);
}
template <unsigned COUNT>
void keep_registers() {}
template <unsigned COUNT>
void take_registers() {}

// Where a TensorMap of linear_bulk.cuh has what: the emulator makes them.
namespace shim {
enum MapField { ADDRESS, ELEMENT_BYTES, COLUMNS, ROWS, ROW_BYTES, TILE_COLUMNS, TILE_ROWS, SWIZZLE, MAP_FIELDS };
}

template <class Map>
void prepare_map(const Map& map) {
    if (map.opaque[shim::ADDRESS] % 16 != 0 || map.opaque[shim::ROW_BYTES] % 16 != 0) shim::stop("a map is not aligned");
}

template <class Map>
void copy_tile_to(unsigned ranks, void* to, const Map& map, unsigned column, unsigned row, unsigned long long* barrier) {
    using namespace shim;
    const auto& of = map.opaque;
    unsigned element = unsigned(of[ELEMENT_BYTES]), width = unsigned(of[TILE_COLUMNS]) * element;
    TileCopy copy = {};
    copy.width = width;
    copy.height = unsigned(of[TILE_ROWS]);
    copy.swizzle = unsigned(of[SWIZZLE]);
    if (width != copy.swizzle) stop("a tile's rows are not as wide as its pattern");
    std::size_t place = place_of(to, std::size_t(width) * copy.height, copy.swizzle * 8);
    copy.row_bytes = of[ROW_BYTES];
    copy.there = column < of[COLUMNS] ? unsigned(std::uint64_t(of[COLUMNS] - column) * element < width
                                                      ? (of[COLUMNS] - column) * element
                                                      : width)
                                      : 0;
    copy.rows_there = row < of[ROWS] ? unsigned(of[ROWS] - row < copy.height ? of[ROWS] - row : copy.height) : 0;
    copy.from = reinterpret_cast<const unsigned char*>(of[ADDRESS]) + row * of[ROW_BYTES] + std::uint64_t(column) * element;
    for (unsigned rank = 0; rank < block.cluster; rank++) {
        if ((ranks >> rank & 1) == 0) continue;
        copy.to = memories[rank].bytes + place;
        copy.barrier = barrier_of(barrier, rank);
        if (block.tiles_come_late) {
            block.tiles.push_back(copy);
        } else {
            copy.make();
        }
    }
}
template <class Map>
void copy_tile(void* to, const Map& map, unsigned column, unsigned row, unsigned long long* barrier) {
    copy_tile_to(1u << shim::block.rank(), to, map, column, row, barrier);
}
