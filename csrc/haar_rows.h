// Rows of the Haar kernels' tensors, a vector of channels at a time, for the instruction set being compiled.
#pragma once

#include "haar.h"
#include "simd.h"

// Else an array of vectors would live in memory.
#define AK_UNROLL _Pragma("GCC unroll 16")

namespace audiokernels {
namespace AUDIOKERNELS_ISA {
namespace {

struct Float32 {
  typedef float Number;
  AK_INLINE VFloat load(const float* p) { return AUDIOKERNELS_ISA::load(p); }
  AK_INLINE void store(float* p, VFloat v) { AUDIOKERNELS_ISA::store(p, v); }
};

struct BFloat16 {
  typedef uint16_t Number;
  AK_INLINE VFloat load(const uint16_t* p) { return load_bfloat16(p); }
  AK_INLINE void store(uint16_t* p, VFloat v) { store_bfloat16(p, v); }
};

struct Float16 {
  typedef uint16_t Number;
  AK_INLINE VFloat load(const uint16_t* p) { return load_float16(p); }
  AK_INLINE void store(uint16_t* p, VFloat v) { store_float16(p, v); }
};

// n channels, zeros after them.
template <class D>
AK_INLINE VFloat load_some(const typename D::Number* p, int64_t n) {
  if (__builtin_expect(n == kLanes, 1)) return D::load(p);
  typename D::Number some[kLanes] = {};
  for (int64_t i = 0; i < n; i++) some[i] = p[i];
  return D::load(some);
}

template <class D>
AK_INLINE void store_some(typename D::Number* p, VFloat v, int64_t n) {
  if (__builtin_expect(n == kLanes, 1)) return D::store(p, v);
  typename D::Number some[kLanes];
  D::store(some, v);
  for (int64_t i = 0; i < n; i++) p[i] = some[i];
}

AK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
AK_INLINE VFloat select(VInt condition, VFloat a, VFloat b) { return condition ? a : b; }
AK_INLINE VFloat where(VInt condition, VFloat v) { return (VFloat)(condition & (VInt)v); }  // else 0

}  // namespace
}  // namespace AUDIOKERNELS_ISA
}  // namespace audiokernels
