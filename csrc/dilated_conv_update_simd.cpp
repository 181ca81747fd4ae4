// Row dots of dilated_conv_update, compiled once per instruction set. Weights are read in their own dtype; products
// are summed in float32, lane by lane, then over the lanes.
#include "dilated_conv_update.h"
#include "simd.h"

namespace audiokernels {
namespace AUDIOKERNELS_ISA {
namespace {

struct Float32 {
  typedef float Number;
  AK_INLINE VFloat load(const float* p) { return AUDIOKERNELS_ISA::load(p); }
};

struct BFloat16 {
  typedef uint16_t Number;
  AK_INLINE VFloat load(const uint16_t* p) { return load_bfloat16(p); }
};

struct Float16 {
  typedef uint16_t Number;
  AK_INLINE VFloat load(const uint16_t* p) { return load_float16(p); }
};

AK_INLINE float sum_lanes(VFloat v) {
  float lane[kLanes];
  store(lane, v);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) lane[i] += lane[i + half];
  }
  return lane[0];
}

// The last n % kLanes weights of a row, zeros after them.
template <class W>
AK_INLINE VFloat load_tail(const typename W::Number* p, int64_t count) {
  typename W::Number buffer[kLanes] = {};
  for (int64_t i = 0; i < count; i++) buffer[i] = p[i];
  return W::load(buffer);
}

template <class W, int rows>
AK_INLINE void dots(const typename W::Number* weight, int64_t stride, const float* taps, int64_t n, float* sums) {
  VFloat acc[rows] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const VFloat tap = load(taps + j);
    for (int r = 0; r < rows; r++) acc[r] = multiply_add(W::load(weight + r * stride + j), tap, acc[r]);
  }
  if (j < n) {
    const VFloat tap = load_tail<Float32>(taps + j, n - j);
    for (int r = 0; r < rows; r++) acc[r] = multiply_add(load_tail<W>(weight + r * stride + j, n - j), tap, acc[r]);
  }
  for (int r = 0; r < rows; r++) sums[r] = sum_lanes(acc[r]);
}

template <class W, int rows>
AK_INLINE void dots_over_batch(const RowDots& d, int64_t r) {
  const typename W::Number* weight = (const typename W::Number*)d.weight + r * d.weight_stride;
  for (int64_t b = 0; b < d.batch; b++) {
    dots<W, rows>(weight, d.weight_stride, d.taps + b * d.n, d.n, d.sums + b * d.rows + r);
  }
}

template <class W>
AK_INLINE void all_dots(const RowDots& d, int64_t first, int64_t last) {
  int64_t r = first;
  for (; r + 8 <= last; r += 8) dots_over_batch<W, 8>(d, r);  // eight rows stay in the cache over the batch
  for (; r < last; r++) dots_over_batch<W, 1>(d, r);
}

}  // namespace

void dilated_conv_dots(Dtype dtype, const RowDots& d, int64_t first, int64_t last) {
  switch (dtype) {
    case Dtype::bfloat16: return all_dots<BFloat16>(d, first, last);
    case Dtype::float16: return all_dots<Float16>(d, first, last);
    default: return all_dots<Float32>(d, first, last);
  }
}

}  // namespace AUDIOKERNELS_ISA
}  // namespace audiokernels
