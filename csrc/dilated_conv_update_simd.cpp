// Row dots of dilated_conv_update, compiled once per instruction set. Weights are read in their own dtype; products
// are summed in float32, lane by lane, then over the lanes.
#include "dilated_conv_update.h"
#include "simd.h"

namespace audiokernels {
namespace AUDIOKERNELS_ISA {
namespace {

AK_INLINE VFloat multiply_add(VFloat a, VFloat b, VFloat c) {
#if defined(__FP_FAST_FMAF)
  return fma(a, b, c);
#else
  return a * b + c;  // no fused instruction here, and no need of one
#endif
}

struct Float32 {
  typedef float Number;
  AK_INLINE VFloat load(const float* p) { return AUDIOKERNELS_ISA::load(p); }
};

struct BFloat16 {
  typedef uint16_t Number;
  AK_INLINE VFloat load(const uint16_t* p) {
    typedef uint16_t VHalf __attribute__((vector_size(2 * kLanes)));
    VHalf v;
    memcpy(&v, p, sizeof v);
    return (VFloat)(__builtin_convertvector(v, VInt) << 16);
  }
};

struct Float16 {
  typedef uint16_t Number;
  AK_INLINE VFloat load(const uint16_t* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    // exponent and mantissa move to their places and 2^112 mends the bias: exact, subnormals too
    VFloat r;
    for (int i = 0; i < kLanes; i++) {
      const uint32_t bits = p[i];
      const uint32_t magnitude = bits & 0x7fff;
      uint32_t f = magnitude << 13;
      float value;
      memcpy(&value, &f, 4);
      value *= 0x1p112f;
      memcpy(&f, &value, 4);
      if (magnitude >= 0x7c00) f = 0x7f800000 | (magnitude & 0x3ff) << 13;  // infinity or NaN
      f |= (bits & 0x8000) << 16;
      memcpy(&value, &f, 4);
      r[i] = value;
    }
    return r;
#endif
  }
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

void dilated_conv_dots(DilatedConvDtype dtype, const RowDots& d, int64_t first, int64_t last) {
  switch (dtype) {
    case DilatedConvDtype::bfloat16: return all_dots<BFloat16>(d, first, last);
    case DilatedConvDtype::float16: return all_dots<Float16>(d, first, last);
    default: return all_dots<Float32>(d, first, last);
  }
}

}  // namespace AUDIOKERNELS_ISA
}  // namespace audiokernels
