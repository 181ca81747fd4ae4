// All inline PTX of this project, an instruction a function. Outside of nvcc their twins run the same kernels on the
// host (tests/cuda_on_host). Shared memory is named by 32-bit addresses; those of map_shared reach into a block of the
// cluster.
#pragma once

#include <cstdint>

#ifndef __CUDACC__
#include "ptx_on_host.h"
#else

namespace audiokernels::ptx {

#define AK_PTX __device__ __forceinline__

// ---- memory and special registers

// The block's dynamic shared memory: the only kind that kernels use.
AK_PTX char* dynamic_shared() {
  extern __shared__ __align__(128) char bytes[];
  return bytes;
}
AK_PTX uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

AK_PTX void trap() { asm volatile("trap;"); }  // ends the grid with an error

AK_PTX uint64_t nanoseconds() {
  uint64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}
AK_PTX uint32_t clock() {
  uint32_t t;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(t)::"memory");
  return t;
}

// The same number, of which the compiler knows nothing: what follows from it is computed where it is used, and not kept
// in a register.
AK_PTX int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
AK_PTX void prefetch(const void* p) {  // the line of global memory to L2
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
}

// ---- arithmetic

AK_PTX float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

AK_PTX float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

struct Float16 {};  // the types that mma multiplies
struct BFloat16 {};

// c += a b of 16 x 16, 16 x 8 and 16 x 8 elements, sums in float32.
AK_PTX void mma(float (&c)[4], const uint4& a, const uint2& b, Float16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}
AK_PTX void mma(float (&c)[4], const uint4& a, const uint2& b, BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

// c = a b
AK_PTX void mma_first(float (&c)[4], const uint4& a, const uint2& b, BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y), "f"(0.0f));
}

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
AK_PTX uint4 load_matrix_x4(uint32_t address) {
  uint4 m;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m.x), "=r"(m.y), "=r"(m.z), "=r"(m.w)
               : "r"(address)
               : "memory");
  return m;
}
AK_PTX uint4 load_matrix_x4_trans(uint32_t address) {
  uint4 m;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m.x), "=r"(m.y), "=r"(m.z), "=r"(m.w)
               : "r"(address)
               : "memory");
  return m;
}
AK_PTX uint2 load_matrix_x2_trans(uint32_t address) {
  uint2 m;
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(m.x), "=r"(m.y)
               : "r"(address)
               : "memory");
  return m;
}

// Two numbers rounded to 16 bits, the first one low; and one of them back.
AK_PTX uint32_t pack(float low, float high, Float16) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
AK_PTX uint32_t pack(float low, float high, BFloat16) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
AK_PTX float half_of(uint32_t word, int high, Float16) {
  float value;
  asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(word >> 16 * high));
  return value;
}
AK_PTX float half_of(uint32_t word, int high, BFloat16) {
  return __uint_as_float(high ? word & 0xffff0000u : word << 16);
}

// Byte i of the result is byte `selector >> 4 i & 7` of the eight of a and b.
AK_PTX uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t word;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(selector));
  return word;
}
// Two float16 at once, each result rounded once.
AK_PTX uint32_t subtract_two(uint32_t a, uint32_t b) {
  uint32_t word;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  return word;
}
AK_PTX uint32_t multiply_two(uint32_t a, uint32_t b) {
  uint32_t word;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  return word;
}
// Two bfloat16.
AK_PTX uint32_t fma_two(uint32_t a, uint32_t b, uint32_t c, BFloat16) {
  uint32_t word;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(c));
  return word;
}
AK_PTX uint32_t multiply_two(uint32_t a, uint32_t b, BFloat16) { return fma_two(a, b, 0x80008000u, BFloat16{}); }

// ---- barriers of a block; `threads` are those that sync and those that only arrive

AK_PTX void barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
AK_PTX void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- cp.async: 16 bytes from global to shared memory, sm_80 and later

AK_PTX void copy_async_16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(__cvta_generic_to_global(from)) : "memory");
}
AK_PTX void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Left>
AK_PTX void copy_async_wait() {  // until at most `Left` of the thread's groups are under way
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// ---- clusters, sm_90 and later

AK_PTX uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Not .aligned: the threads of a warp need not have come together again.
AK_PTX void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
AK_PTX void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// The address in block `rank` of what `address` is in this one.
AK_PTX uint32_t map_shared(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
AK_PTX uint32_t load_cluster(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

// ---- mbarriers

AK_PTX void mbarrier_init(uint32_t bar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
// Makes the initialisations seen by the cluster; cluster_arrive and cluster_wait must follow.
AK_PTX void mbarrier_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
AK_PTX void mbarrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
AK_PTX void mbarrier_arrive_cluster(uint32_t bar) {  // of any block of the cluster
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
}
AK_PTX void mbarrier_arrive_expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
// Waits a while for the end of the phase of that parity; false if it has not come. Orders shared memory alone: an
// acquire of all memory empties the multiprocessor's L1 cache.
AK_PTX bool mbarrier_try_wait(uint32_t bar, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{.reg .pred p; mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;"
      " fence.acquire.sync_restrict::shared::cluster.cluster;}"
      : "=r"(done)
      : "r"(bar), "r"(parity)
      : "memory");
  return done != 0;
}

// ---- asynchronous writes into a block of the cluster; they complete bytes of an mbarrier of that block

AK_PTX void store_async(uint32_t to, uint32_t value, uint32_t bar) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(to), "r"(value),
               "r"(bar)
               : "memory");
}
AK_PTX void store_async(uint32_t to, const uint2& v, uint32_t bar) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [%0], {%1,%2}, [%3];" ::"r"(to), "r"(v.x),
               "r"(v.y), "r"(bar)
               : "memory");
}
AK_PTX void store_async(uint32_t to, const uint4& v, uint32_t bar) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(to),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(bar)
               : "memory");
}
// From this block's shared memory, 16-byte aligned; fence_async before it orders the writes that made the source.
AK_PTX void bulk_copy(uint32_t to, uint32_t from, uint32_t bytes, uint32_t bar) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "r"(from), "r"(bytes), "r"(bar)
               : "memory");
}
AK_PTX void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(bar)
               : "memory");
}
// The box of a CUtensorMap of four dimensions that begins at x, y, z, w; zeros outside of the tensor.
AK_PTX void tensor_load(uint32_t to, const void* map, int x, int y, int z, int w, uint32_t bar) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2,%3,%4,%5}], [%6];" ::
          "r"(to),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(bar)
      : "memory");
}
AK_PTX void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
AK_PTX void fence_async_global() { asm volatile("fence.proxy.async;" ::: "memory"); }  // and of global memory
#endif

#undef AK_PTX

}  // namespace audiokernels::ptx
#endif
