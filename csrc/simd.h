// The float vector of the instruction set that a *_simd.cpp file is being compiled for.
//
// Everything here is deterministic over instruction sets: lanes never mix, fma rounds once everywhere, and exp is the
// same polynomial. Only static functions: an inline one compiled for AVX-512 could be the copy that the linker keeps.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace audiokernels {
namespace AUDIOKERNELS_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
typedef float VFloat __attribute__((vector_size(64)));
typedef int32_t VInt __attribute__((vector_size(64)));
#elif defined(__AVX2__)
constexpr int kLanes = 8;
typedef float VFloat __attribute__((vector_size(32)));
typedef int32_t VInt __attribute__((vector_size(32)));
#else
constexpr int kLanes = 4;
typedef float VFloat __attribute__((vector_size(16)));
typedef int32_t VInt __attribute__((vector_size(16)));
#endif

#define AK_INLINE static inline __attribute__((always_inline))

AK_INLINE VFloat load(const float* p) {
  VFloat v;
  memcpy(&v, p, sizeof v);
  return v;
}
AK_INLINE VInt load_int(const void* p) {
  VInt v;
  memcpy(&v, p, sizeof v);
  return v;
}
// gcc would read from memory what is used twice, twice.
AK_INLINE VInt in_register(VInt v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#endif
  return v;
}
AK_INLINE void store(float* p, VFloat v) { memcpy(p, &v, sizeof v); }
AK_INLINE void store_int(void* p, VInt v) { memcpy(p, &v, sizeof v); }
AK_INLINE VFloat splat(float x) { return x - VFloat{}; }
AK_INLINE VInt splat_int(int32_t x) { return x - VInt{}; }
// As the instructions do it: b if either is NaN.
#if defined(__AVX512F__)
AK_INLINE VFloat max(VFloat a, VFloat b) { return _mm512_maskz_max_ps(0xFFFF, a, b); }
AK_INLINE VFloat min(VFloat a, VFloat b) { return _mm512_maskz_min_ps(0xFFFF, a, b); }
#elif defined(__AVX2__)
AK_INLINE VFloat max(VFloat a, VFloat b) { return _mm256_max_ps(a, b); }
AK_INLINE VFloat min(VFloat a, VFloat b) { return _mm256_min_ps(a, b); }
#else
AK_INLINE VFloat max(VFloat a, VFloat b) { return a > b ? a : b; }
AK_INLINE VFloat min(VFloat a, VFloat b) { return a < b ? a : b; }
#endif
AK_INLINE VFloat abs(VFloat v) { return (VFloat)((VInt)v & splat_int(0x7FFFFFFF)); }
AK_INLINE VFloat to_float(VInt v) { return __builtin_convertvector(v, VFloat); }

// The largest lane.
AK_INLINE float reduce_max(VFloat v) {
  float lanes[kLanes];
  memcpy(lanes, &v, sizeof v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

// a * b + c, rounded once.
#if defined(__AVX512F__)
AK_INLINE VFloat fma(VFloat a, VFloat b, VFloat c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__)
AK_INLINE VFloat fma(VFloat a, VFloat b, VFloat c) { return _mm256_fmadd_ps(a, b, c); }
#elif defined(__FP_FAST_FMAF)
AK_INLINE VFloat fma(VFloat a, VFloat b, VFloat c) {
  VFloat r;
  for (int i = 0; i < kLanes; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
}
#else
// No fused instruction: the product is exact in double, and so nearly is the sum. Rounding it twice goes wrong only if
// it ends in exactly half a float (or below the smallest normal one); then the sum is first rounded to odd in double
// (Boldo and Melquiond, 2008), which makes the rounding to float the only one.
typedef float HalfFloat __attribute__((vector_size(8)));
typedef double VDouble __attribute__((vector_size(16)));
typedef int64_t VLong __attribute__((vector_size(16)));
AK_INLINE VDouble round_to_odd(VDouble p, VDouble z, VDouble s) {
  const VDouble t = s - p;
  const VDouble error = (p - (s - t)) + (z - t);  // s + error = p + z exactly (Knuth's two-sum)
  const VLong bits = (VLong)s;
  const VLong step = ((error > 0) == (s > 0)) ? VLong{1, 1} : VLong{-1, -1};
  const VLong fix = ((error < 0) | (error > 0)) & ((bits & 1) == 0);  // not where s is infinite: error is NaN
  return (VDouble)(bits + (fix & step));
}
AK_INLINE VInt may_round_twice(VDouble s) {  // per 32-bit half: the low one ends in half a float; the high one is tiny
  const VInt bits = (VInt)s, magnitude = bits & VInt{0, 0x7FFFFFFF, 0, 0x7FFFFFFF};
  const VInt half = (bits & VInt{0x1FFFFFFF, 0, 0x1FFFFFFF, 0}) == VInt{0x10000000, -1, 0x10000000, -1};
  return half | ((magnitude < VInt{0, 0x38100000, 0, 0x38100000}) & (magnitude != VInt{}));
}
AK_INLINE VFloat fma(VFloat a, VFloat b, VFloat c) {
  const auto low = [](VFloat v) { return __builtin_convertvector(HalfFloat{v[0], v[1]}, VDouble); };
  const auto high = [](VFloat v) { return __builtin_convertvector(HalfFloat{v[2], v[3]}, VDouble); };
  const VDouble p0 = low(a) * low(b), p1 = high(a) * high(b), z0 = low(c), z1 = high(c);
  VDouble s0 = p0 + z0, s1 = p1 + z1;
  const VLong rare = (VLong)(may_round_twice(s0) | may_round_twice(s1));
  if (__builtin_expect((rare[0] | rare[1]) != 0, 0)) {
    s0 = round_to_odd(p0, z0, s0);
    s1 = round_to_odd(p1, z1, s1);
  }
  const HalfFloat r0 = __builtin_convertvector(s0, HalfFloat), r1 = __builtin_convertvector(s1, HalfFloat);
  return VFloat{r0[0], r0[1], r1[0], r1[1]};
}
#endif

// a * b + c, rounded once or twice: where nothing is to be bit-equal over instruction sets.
AK_INLINE VFloat multiply_add(VFloat a, VFloat b, VFloat c) {
#if defined(__FP_FAST_FMAF)
  return fma(a, b, c);
#else
  return a * b + c;  // no fused instruction here, and no need of one
#endif
}

// Subnormal numbers count as zero from here on. What is returned ends that. (Not a destructor: one would bring a weak
// symbol into the object.)
AK_INLINE unsigned flush_subnormals() {
#if defined(__x86_64__)
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);
  return before;
#else
  return 0;
#endif
}
AK_INLINE void keep_subnormals(unsigned before) {
#if defined(__x86_64__)
  _mm_setcsr(before);
#else
  (void)before;
#endif
}

// ---- 16-bit floats, as their bits ----

// Intrinsics, because gcc makes a __builtin_convertvector of two halves that it splits and joins.
AK_INLINE VInt widen(const uint16_t* p) {
#if defined(__AVX512F__)
  return (VInt)_mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (VInt)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  uint16_t v __attribute__((vector_size(2 * kLanes)));
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, VInt);
#endif
}
AK_INLINE void narrow(uint16_t* p, VInt v) {  // the low halves
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtepi32_epi16(0xFFFF, (__m512i)v));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_packus_epi32((__m256i)(v & 0xFFFF), _mm256_setzero_si256());
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08)));
#else
  typedef uint16_t VHalf __attribute__((vector_size(2 * kLanes)));
  const VHalf half = __builtin_convertvector(v, VHalf);
  memcpy(p, &half, sizeof half);
#endif
}

AK_INLINE VFloat load_bfloat16(const uint16_t* p) { return (VFloat)(widen(p) << 16); }
AK_INLINE void store_bfloat16(uint16_t* p, VFloat v) {  // to nearest, ties to even; NaN stays NaN
  const VInt bits = (VInt)v;
  const VInt rounded = (bits + splat_int(0x7FFF) + ((bits >> 16) & 1)) >> 16;
  narrow(p, v == v ? rounded : splat_int(0x7FC0));
}

AK_INLINE VFloat load_float16(const uint16_t* p) {
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
AK_INLINE void store_float16(uint16_t* p, VFloat v) {  // to nearest, ties to even
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; i++) {
    const float x = v[i], size = x < 0 ? -x : x;
    uint32_t bits, half;
    memcpy(&bits, &x, 4);
    if (!(size < 65520.0f)) {
      half = x == x ? 0x7c00 : 0x7e00;  // rounds to infinity; NaN
    } else if (size < 0x1p-14f) {
      const float shifted = size + 0.5f;  // a subnormal's last place is 2^-24, as that of 0.5 is
      memcpy(&half, &shifted, 4);
      half -= 0x3f000000;
    } else {
      const uint32_t magnitude = bits & 0x7fffffff;
      half = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    }
    p[i] = uint16_t(half | (bits >> 16 & 0x8000));
  }
#endif
}

// ---- pairs of bfloat16: two in a lane, the first one in its low half ----

#if defined(__AVX512BF16__) || defined(AUDIOKERNELS_EMULATE)
#define AK_BFLOAT16_PAIRS
#endif

#if defined(__AVX512BF16__)
// a.low * b.low + (a.high * b.high + sum), each rounded once; subnormal numbers count as zero, whatever the mode.
AK_INLINE VFloat add_pairs(VInt a, VInt b, VFloat sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
}
// To nearest, ties to even. Of two vectors: 32 numbers in the order of their lanes, not paired.
AK_INLINE void store_rounded(uint16_t* p, VFloat v) {
  const __m256bh half = _mm512_cvtneps_pbh(v);
  memcpy(p, &half, sizeof half);
}
AK_INLINE VInt round_both(VFloat first, VFloat second) { return (VInt)(__m512i)_mm512_cvtne2ps_pbh(second, first); }
#elif defined(AUDIOKERNELS_EMULATE)
// The same as Intel's manual defines it (VDPBF16PS), for tests on a processor without it.
AK_INLINE VFloat flush(VFloat v) {
  const VInt bits = (VInt)v;
  return (VFloat)((bits & 0x7F800000) == 0 ? bits & int32_t(0x80000000) : bits);
}
AK_INLINE VFloat add_pairs(VInt a, VInt b, VFloat sum) {
  const VFloat high =
      fma(flush((VFloat)(a & int32_t(0xFFFF0000))), flush((VFloat)(b & int32_t(0xFFFF0000))), flush(sum));
  return flush(fma(flush((VFloat)(a << 16)), flush((VFloat)(b << 16)), flush(high)));
}
AK_INLINE void store_rounded(uint16_t* p, VFloat v) { store_bfloat16(p, flush(v)); }
AK_INLINE VInt round_both(VFloat first, VFloat second) {
  uint16_t numbers[2 * kLanes];
  store_rounded(numbers, first);
  store_rounded(numbers + kLanes, second);
  return load_int(numbers);
}
#endif

// Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
constexpr float kRound = 12582912.0f;
constexpr int32_t kRoundBits = 0x4B400000;
AK_INLINE VInt round_to_int(VFloat x) { return (VInt)(x + splat(kRound)) - splat_int(kRoundBits); }

// exp(x) for x in [-87, 88], within 1.1 half-ulps before the last rounding.
AK_INLINE VFloat exp_within(VFloat x) {
  const VFloat t = fma(x, splat(0x1.715476p+0f), splat(kRound));  // x / ln 2, rounded, in the low bits
  const VFloat n = t - splat(kRound);
  VFloat r = fma(n, splat(-0x1.62e4p-1f), x);  // ln 2 in two parts, the first one with zeros at its end
  r = fma(n, splat(-0x1.7f7d1cp-20f), r);
  VFloat p = splat(0x1.6d4386p-10f);
  p = fma(p, r, splat(0x1.120ba6p-7f));
  p = fma(p, r, splat(0x1.5554e8p-5f));
  p = fma(p, r, splat(0x1.5554dcp-3f));
  p = fma(p, r, splat(0x1p-1f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return (VFloat)((VInt)p + ((VInt)t << 23));
}

// exp(clamp(x, -limit, limit)), limit <= 87.
AK_INLINE VFloat exp_clamped(VFloat x, float limit) { return exp_within(max(min(x, splat(limit)), splat(-limit))); }

// tanh(a) * sigmoid(b) with one division; beyond +-15 and +-30 they are constant in float32.
AK_INLINE VFloat gate(VFloat a, VFloat b) {
  const VFloat one = splat(1.0f);
  const VFloat ea = exp_clamped(a * splat(-2.0f), 30.0f);
  const VFloat eb = exp_clamped(-b, 30.0f);
  return (one - ea) / ((one + ea) * (one + eb));
}

}  // namespace AUDIOKERNELS_ISA
}  // namespace audiokernels
