// A packed matrix times the vectors of several streams, for the instruction set being compiled.
//
// Outputs lie in the lanes, inputs are broadcast in ascending order, one fused multiply-add each. So a sum has one
// order whatever the lane count, the tile and the batch, and float32 codes are the same everywhere. int8 sums are
// exact. bfloat16 keeps that order too, except on avx512_bf16, whose instruction adds pairs.
#pragma once

#include "simd.h"
#include "wavenet_generate.h"

namespace audiokernels {
namespace AUDIOKERNELS_ISA {
namespace {

#define AK_MEMBER static __attribute__((always_inline))  // as AK_INLINE, in a class

constexpr int kParts = kRowLanes / kLanes;  // native vectors in a group of 16 outputs

// Most groups of 16 outputs a tile of 1, 2 or 4 streams may hold before its sums leave the registers.
#if defined(__AVX512F__)
constexpr int kMostGroups[3] = {10, 8, 5};
#elif defined(__AVX2__)
constexpr int kMostGroups[3] = {5, 2, 1};
#else
constexpr int kMostGroups[3] = {2, 1, 1};
#endif
constexpr int kTiles[3] = {1, 2, 4};

struct Matrix {
  const float* bias;      // (rows)
  const float* scale;     // int8: (taps, rows)
  const int32_t* offset;  // int8: (taps, rows)
  const uint8_t* lanes;   // (taps, steps, rows) of 32 bits
  int64_t rows, taps, steps;
  int64_t tap_stride;     // inputs between taps, padded
  const uint8_t* follow;  // the weights to be read after these
};

// Input rows of a matrix, one a stream, `stride` inputs apart.
struct Inputs {
  const void* data;
  const float* scale;  // int8: (batch, taps)
  int64_t stride;
};

struct Rows {
  float* data;
  int64_t stride;  // floats between streams
  float* operator[](int64_t b) const { return data + b * stride; }
};

static void quantize(const float* x, int64_t n, int8_t* q, float* scale) {
  typedef int8_t VBytes __attribute__((vector_size(kLanes)));
  VFloat most = splat(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) most = max(abs(load(x + i)), most);
  const float largest = reduce_max(most);
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  *scale = largest / 127.0f;
  for (int64_t i = 0; i < n; i += kLanes) {
    const VBytes bytes = __builtin_convertvector(round_to_int(load(x + i) * splat(inverse)), VBytes);
    memcpy(q + i, &bytes, sizeof bytes);
  }
}

// One piece of a product: `steps` inputs of one tap times a slice of rows.
struct Block {
  const int32_t* lanes;  // (steps, lanes_stride)
  int64_t lanes_stride, steps;
  int64_t row;    // the slice's first output
  int64_t input;  // the first input of the block in an input row
  int64_t tap, taps;
  const float* scale;  // int8, of the slice and tap
  const int32_t* offset;
};

// ---- the inner product of each pack type: how it wants its inputs (In, prepare), what one 32-bit step of them looks
// ---- like in registers (Step, broadcast), and how it adds a step times a vector of weights ----

AK_INLINE Inputs as_they_are(const Rows& in) { return {in.data, nullptr, in.stride}; }

// float32 and bfloat16 carry the float sum on from `out`; int8 sums a tap in int32 and adds it scaled.
struct FloatSums {
  using Sum = VFloat;
  AK_MEMBER VFloat start(const Block&, const float* out, int64_t i) { return load(out + i); }
  AK_MEMBER void finish(VFloat acc, const Block&, const Inputs&, int64_t, float* out, int64_t i) {
    store(out + i, acc);
  }
};

struct DotFloat32 : FloatSums {
  using In = float;
  static constexpr int kGroup = 1;
  struct Step {
    VFloat x;
  };
  AK_MEMBER Inputs prepare(const Matrix&, const Rows& in, int64_t, void*, float*) { return as_they_are(in); }
  AK_MEMBER Step broadcast(const In* p) { return {splat(*p)}; }
  AK_MEMBER VFloat add(VFloat acc, VInt w, Step s) { return fma((VFloat)w, s.x, acc); }
};

#if defined(__AVX512BF16__)
struct DotBFloat16 : FloatSums {
  using In = uint16_t;
  static constexpr int kGroup = 2;
  struct Step {
    __m512bh x;
  };
  AK_MEMBER Inputs prepare(const Matrix& m, const Rows& in, int64_t batch, void* out, float*) {
    uint16_t* rounded = static_cast<uint16_t*>(out);
    for (int64_t b = 0; b < batch; b++)
      for (int64_t i = 0; i < m.taps * m.tap_stride; i += kLanes) {
        const __m256bh half = _mm512_cvtneps_pbh(load(in[b] + i));
        memcpy(rounded + b * in.stride + i, &half, sizeof half);
      }
    return {rounded, nullptr, in.stride};
  }
  AK_MEMBER Step broadcast(const In* p) {
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return {(__m512bh)_mm512_set1_epi32(pair)};
  }
  AK_MEMBER VFloat add(VFloat acc, VInt w, Step s) { return _mm512_dpbf16_ps(acc, (__m512bh)w, s.x); }
};
#else
struct DotBFloat16 : FloatSums {
  using In = float;
  static constexpr int kGroup = 2;
  struct Step {
    VFloat even, odd;
  };
  AK_MEMBER Inputs prepare(const Matrix&, const Rows& in, int64_t, void*, float*) { return as_they_are(in); }
  AK_MEMBER Step broadcast(const In* p) { return {splat(p[0]), splat(p[1])}; }
  AK_MEMBER VFloat add(VFloat acc, VInt w, Step s) {
    acc = fma((VFloat)(w << 16), s.even, acc);
    return fma((VFloat)(w & splat_int(int32_t(0xFFFF0000))), s.odd, acc);
  }
};
#endif

struct DotInt8 {
  using In = int8_t;
  using Sum = VInt;
  static constexpr int kGroup = 4;
  AK_MEMBER VInt start(const Block& block, const float*, int64_t i) {
    return kUnsigned ? load_int(block.offset + i) : VInt{};
  }
  AK_MEMBER void finish(VInt acc, const Block& block, const Inputs& in, int64_t b, float* out, int64_t i) {
    const VFloat scale = load(block.scale + i) * splat(in.scale[b * block.taps + block.tap]);
    store(out + i, fma(to_float(acc), scale, load(out + i)));
  }
  AK_MEMBER Inputs prepare(const Matrix& m, const Rows& in, int64_t batch, void* out, float* scales) {
    int8_t* q = static_cast<int8_t*>(out);
    for (int64_t b = 0; b < batch; b++)
      for (int64_t tap = 0; tap < m.taps; tap++) {
        const int64_t at = tap * m.tap_stride;
        quantize(in[b] + at, m.tap_stride, q + b * in.stride + at, scales + b * m.taps + tap);
      }
    return {q, scales, in.stride};
  }
#if defined(__AVX512VNNI__)
  static constexpr bool kUnsigned = true;  // activations carry +128; the pack's offset takes it away again
  struct Step {
    VInt x;
  };
  AK_MEMBER Step broadcast(const In* p) { return {splat_int(load_quad(p) ^ int32_t(0x80808080))}; }
  AK_MEMBER VInt add(VInt acc, VInt w, Step s) {
    return (VInt)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)s.x, (__m512i)w);
  }
#elif defined(__AVX512BW__)
  static constexpr bool kUnsigned = false;  // |x| times w with x's sign: pairs stay within int16
  struct Step {
    __m512i magnitude;
    __mmask64 negative;
  };
  AK_MEMBER Step broadcast(const In* p) {
    const __m512i x = _mm512_set1_epi32(load_quad(p));
    return {_mm512_abs_epi8(x), _mm512_movepi8_mask(x)};
  }
  AK_MEMBER VInt add(VInt acc, VInt w, Step s) {
    const __m512i signed_w = _mm512_mask_sub_epi8((__m512i)w, s.negative, _mm512_setzero_si512(), (__m512i)w);
    const __m512i pairs = _mm512_maddubs_epi16(s.magnitude, signed_w);
    return acc + (VInt)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
  }
#elif defined(__AVX2__)
  static constexpr bool kUnsigned = false;
  struct Step {
    __m256i x, magnitude;
  };
  AK_MEMBER Step broadcast(const In* p) {
    const __m256i x = _mm256_set1_epi32(load_quad(p));
    return {x, _mm256_abs_epi8(x)};
  }
  AK_MEMBER VInt add(VInt acc, VInt w, Step s) {
    const __m256i pairs = _mm256_maddubs_epi16(s.magnitude, _mm256_sign_epi8((__m256i)w, s.x));
    return acc + (VInt)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
#else
  static constexpr bool kUnsigned = false;
  struct Step {
    int32_t x[4];
  };
  AK_MEMBER Step broadcast(const In* p) { return {{p[0], p[1], p[2], p[3]}}; }
  AK_MEMBER VInt add(VInt acc, VInt w, Step s) {  // byte j of each lane, sign-extended
    acc += splat_int(s.x[0]) * ((w << 24) >> 24);
    acc += splat_int(s.x[1]) * ((w << 16) >> 24);
    acc += splat_int(s.x[2]) * ((w << 8) >> 24);
    return acc + splat_int(s.x[3]) * (w >> 24);
  }
#endif
  AK_MEMBER int32_t load_quad(const In* p) {
    int32_t quad;
    memcpy(&quad, p, sizeof quad);
    return quad;
  }
};

// ---- out += matrix * in, block by block ----

// With several tiles on the same weights, the bus is idle from the second one on: fetch the next matrix meanwhile.
struct Ahead {
  const uint8_t* at;
  __attribute__((always_inline)) void step() {
    __builtin_prefetch(at, 0, 2);
    at += 64;
  }
};

// NB streams from `first` on, G groups of 16 outputs.
template <class Dot, int G, int NB>
static void tile(const Block& block, const Inputs& in, int64_t first, const Rows& out, Ahead& ahead) {
  constexpr int A = G * kParts;
  const auto* x = static_cast<const typename Dot::In*>(in.data) + first * in.stride + block.input;
  const int32_t* w = block.lanes;
  typename Dot::Sum acc[NB][A];
  for (int b = 0; b < NB; b++)
    for (int i = 0; i < A; i++) acc[b][i] = Dot::start(block, out[first + b] + block.row, i * kLanes);
  for (int64_t k = 0; k < block.steps; k++, x += Dot::kGroup, w += block.lanes_stride) {
    if constexpr (NB == 4) ahead.step();
    typename Dot::Step step[NB];
    for (int b = 0; b < NB; b++) step[b] = Dot::broadcast(x + b * in.stride);
    for (int i = 0; i < A; i++) {
      const VInt lanes = load_int(w + i * kLanes);
      for (int b = 0; b < NB; b++) acc[b][i] = Dot::add(acc[b][i], lanes, step[b]);
    }
  }
  for (int b = 0; b < NB; b++)
    for (int i = 0; i < A; i++) Dot::finish(acc[b][i], block, in, first + b, out[first + b] + block.row, i * kLanes);
}

// `groups` at run time -> the tile compiled for it.
template <class Dot, int NB, int G>
AK_INLINE void tile_of(int groups, const Block& block, const Inputs& in, int64_t first, const Rows& out, Ahead& ahead) {
  if (groups == G) return tile<Dot, G, NB>(block, in, first, out, ahead);
  if constexpr (G > 1) tile_of<Dot, NB, G - 1>(groups, block, in, first, out, ahead);
}

// Streams first .. batch - 1 in tiles of one kind, tap by tap; returns the first stream left. Slices of rows are even:
// a short last one would wait for its own sums.
template <class Dot, int Kind>
static int64_t rows_of(const Matrix& m, const Inputs& in, int64_t first, int64_t batch, const Rows& out) {
  constexpr int most = kMostGroups[Kind], nb = kTiles[Kind];
  const int64_t end = batch - (batch - first) % nb;
  const int groups = int(m.rows / kRowLanes), slices = (groups + most - 1) / most;
  Ahead ahead{m.follow};
  int64_t row = 0;
  for (int s = 0; s < slices && first < end; s++) {
    const int here = groups / slices + (s < groups % slices);
    for (int64_t tap = 0; tap < m.taps; tap++) {
      const int32_t* lanes = reinterpret_cast<const int32_t*>(m.lanes) + tap * m.steps * m.rows + row;
      const int64_t at = tap * m.rows + row;
      const Block block{lanes,
                        m.rows,
                        m.steps,
                        row,
                        tap * m.tap_stride,
                        tap,
                        m.taps,
                        m.scale ? m.scale + at : nullptr,
                        m.offset ? m.offset + at : nullptr};
      for (int64_t b = first; b < end; b += nb) tile_of<Dot, nb, most>(here, block, in, b, out, ahead);
    }
    row += here * kRowLanes;
  }
  return end;
}

}  // namespace
}  // namespace AUDIOKERNELS_ISA
}  // namespace audiokernels
