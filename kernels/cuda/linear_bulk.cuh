// Copies of whole tiles that the hardware makes by itself, the barriers in shared memory that tell when
// they have come, and clusters of thread blocks (compute capability 9.0). Each has the same meaning in
// host_shim.h.
#pragma once

#include "linear_common.cuh"

// Describes a matrix in global memory and a tile of it: made by cuTensorMapEncodeTiled.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

#if defined(__CUDACC__) && ARCHITECTURE >= 900

#define CLUSTER_OF(COUNT) __cluster_dims__(COUNT, 1, 1)

// A barrier has phases, the first one even. One ends when so many threads have arrived and all bytes that
// were announced have come.
static __device__ __forceinline__ void init_barrier(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Behind it and the next meeting of the cluster, barriers are there for everybody.
static __device__ __forceinline__ void show_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

static __device__ __forceinline__ void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and announces bytes.
static __device__ __forceinline__ void arrive_and_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Arrives at the same barrier of another thread block of the cluster.
static __device__ __forceinline__ void arrive_at(u64* barrier, u32 rank) {
    asm volatile(
        "{\n\t.reg .b32 remote;\n\tmapa.shared::cluster.u32 remote, %0, %1;\n\t"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n\t}" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}

// Waits until the phase of this parity has ended.
static __device__ __forceinline__ void wait_for_phase(u64* barrier, u32 parity) {
    u32 is_over;
    do {
        asm volatile(
            "{\n\t.reg .pred over;\n\tmbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n\t"
            "selp.u32 %0, 1, 0, over;\n\t}"
            : "=r"(is_over)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    } while (is_over == 0);
}

// Copies the tile whose first element is in that column and row; the barrier counts its bytes. What lies
// outside of the matrix is zero.
static __device__ __forceinline__ void copy_tile(void* to, const TensorMap& map, u32 column, u32 row, u64* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
        : "memory");
}

// The same to the same place of every thread block of the cluster that `ranks` has a bit of, each of whose
// barriers counts the bytes.
static __device__ __forceinline__ void copy_tile_to(u32 ranks, void* to, const TensorMap& map, u32 column, u32 row,
                                                    u64* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"((unsigned short)(ranks))
        : "memory");
}

static __device__ __forceinline__ void prepare_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

static __device__ __forceinline__ u32 rank_in_cluster() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of all thread blocks of the cluster.
static __device__ __forceinline__ void meet_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// All threads of a warpgroup give registers back until they have so many, or wait until they get them.
template <u32 COUNT>
static __device__ __forceinline__ void keep_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <u32 COUNT>
static __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// The first so many threads of the block.
template <u32 THREADS>
static __device__ __forceinline__ void meet_threads() {
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

#endif
