// What a kernel body asks of the machine it runs on, in PTX. tests/cuda/emulator has the host's version.
#pragma once

#include "gram_sketch_cluster.h"
#include "tile.h"

namespace lk {

extern __shared__ __align__(1024) uint8_t shared_memory[];

// One thread of a thread block: copies, matrix products of a warp.
class Block {
 public:
  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int64_t block() const { return blockIdx.x; }
  __device__ __forceinline__ uint8_t* shared() const { return shared_memory; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ void add(float* to, float value) const { atomicAdd(to, value); }

  // 16 bytes of shared memory from `bytes` bytes and zeros. Nothing is read when bytes is 0.
  __device__ __forceinline__ void copy_async(uint32_t to, const void* from, int bytes) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from), "r"(bytes)
                 : "memory");
  }
  __device__ __forceinline__ void commit_copies() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int pending>
  __device__ __forceinline__ void wait_copies() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
  }

  // Four 8 x 8 matrices; every lane gives the address of one row.
  template <bool transposed>
  __device__ __forceinline__ void load_matrices(uint32_t (&words)[4], uint32_t from) const {
    if constexpr (transposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                   : "r"(address(from))
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                   : "r"(address(from))
                   : "memory");
    }
  }

  // c [16, 8] += a [16, 16] b [16, 8].
  template <class Element>
  __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) const {
#define LK_MMA(type)                                                                                     \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                    \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                    \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
    if constexpr (Element::kNarrowRange) {
      LK_MMA("f16");
    } else {
      LK_MMA("bf16");
    }
#undef LK_MMA
  }

 protected:
  __device__ __forceinline__ static uint32_t address(uint32_t offset) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory)) + offset;
  }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

#define LK_SPECIAL(name)                         \
  uint32_t value;                                \
  asm("mov.u32 %0, " name ";" : "=r"(value));    \
  return value;

// One thread of a cluster of thread blocks on sm_90a: asynchronous matrix products of a warpgroup.
class Cluster : public Block {
 public:
  __device__ __forceinline__ int rank() const { LK_SPECIAL("%%cluster_ctarank") }
  __device__ __forceinline__ int ranks() const { LK_SPECIAL("%%cluster_nctarank") }
  __device__ __forceinline__ int64_t cluster() const { LK_SPECIAL("%%clusterid.x") }
  __device__ __forceinline__ int64_t clusters() const { LK_SPECIAL("%%nclusterid.x") }
  __device__ __forceinline__ void cluster_arrive() const {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  }
  __device__ __forceinline__ void cluster_wait() const {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
  __device__ __forceinline__ void store(uint32_t to, uint32_t word) const {
    *reinterpret_cast<uint32_t*>(shared_memory + to) = word;
  }
  // Makes this thread's stores and finished copies visible to asynchronous products, once threads have met.
  __device__ __forceinline__ void fence_async() const {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __device__ __forceinline__ void store_remote(int rank, uint32_t to, const Quad& quad) const {
    uint32_t remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address(to)), "r"(rank));
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(remote), "f"(quad.value[0]),
                 "f"(quad.value[1]), "f"(quad.value[2]), "f"(quad.value[3])
                 : "memory");
  }
  __device__ __forceinline__ float shuffle_xor(float value, int lane) const {
    return __shfl_xor_sync(0xFFFFFFFFu, value, lane);
  }
  __device__ __forceinline__ uint64_t descriptor(uint32_t offset) const { return panel_descriptor(address(offset)); }

  // Products are asynchronous from `begin_products` to `finish_products`, which name the accumulators, as `keep` does
  // the left operands before and after, so that the compiler computes and uses them outside only.
  template <int n>
  __device__ __forceinline__ void begin_products(float (&accumulator)[n]) const {
    touch(accumulator);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  }
  __device__ __forceinline__ void commit_products() const {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }
  template <int n>
  __device__ __forceinline__ void finish_products(float (&accumulator)[n]) const {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    touch(accumulator);
  }
  template <int n>
  __device__ __forceinline__ void keep(uint32_t (&operand)[n]) const {
    LK_UNROLL
    for (int i = 0; i < n; ++i) asm volatile("" : "+r"(operand[i])::"memory");
  }

#define LK_REGISTERS_8(c, i)                                                                               \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), \
      "+f"(c[i + 7])
#define LK_NAMES_16 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define LK_NAMES_32                                                                                      \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"

  // c [64, n] += a [64, 16] b [16, n], both from shared memory: a in rows of M, b in rows of N.
  template <class Element, int n>
  __device__ __forceinline__ void product(float (&c)[n / 2], uint64_t a, uint64_t b) const {
#define LK_WGMMA(type)                                                                                          \
  if constexpr (n == 64) {                                                                                      \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " LK_NAMES_32                    \
                 ", %32, %33, 1, 1, 1, 0, 0;"                                                                   \
                 : LK_REGISTERS_8(c, 0), LK_REGISTERS_8(c, 8), LK_REGISTERS_8(c, 16), LK_REGISTERS_8(c, 24)     \
                 : "l"(a), "l"(b));                                                                             \
  } else {                                                                                                      \
    static_assert(n == 32, "");                                                                                 \
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type " " LK_NAMES_16                    \
                 ", %16, %17, 1, 1, 1, 0, 0;"                                                                   \
                 : LK_REGISTERS_8(c, 0), LK_REGISTERS_8(c, 8)                                                   \
                 : "l"(a), "l"(b));                                                                             \
  }
    if constexpr (Element::kNarrowRange) {
      LK_WGMMA("f16")
    } else {
      LK_WGMMA("bf16")
    }
#undef LK_WGMMA
  }

  // c [64, 64] += a [64, 16] b [16, 64], a from registers, b from shared memory in rows of K.
  template <class Element>
  __device__ __forceinline__ void transposed_product(float (&c)[32], const uint32_t* a, uint64_t b) const {
#define LK_WGMMA(type)                                                                                          \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " LK_NAMES_32                      \
               ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                                       \
               : LK_REGISTERS_8(c, 0), LK_REGISTERS_8(c, 8), LK_REGISTERS_8(c, 16), LK_REGISTERS_8(c, 24)       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
    if constexpr (Element::kNarrowRange) {
      LK_WGMMA("f16");
    } else {
      LK_WGMMA("bf16");
    }
#undef LK_WGMMA
  }

 private:
  template <int n>
  __device__ __forceinline__ static void touch(float (&accumulator)[n]) {
    LK_UNROLL
    for (int i = 0; i < n; ++i) asm volatile("" : "+f"(accumulator[i])::"memory");
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace lk
