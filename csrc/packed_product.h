// A packed matrix times the vectors of several streams, for the instruction set being compiled.
//
// Outputs lie in the lanes, inputs are broadcast in ascending order, one fused multiply-add each. So a sum has one
// order whatever the lane count, the tile and the batch, and float32 codes are the same everywhere. int8 sums are
// exact. float16 and bfloat16 keep that order too, bfloat16 not on avx512_bf16, whose instruction adds pairs.
//
// On avx512_amx bfloat16 has the order of a tile product (csrc/tiles.h): even and odd products of 32 inputs apart, then
// both, then that to the sum. Two streams and more are multiplied by tiles, 16 sharing a pass over the weights; a
// single one by vectors in the same order, since tiles slow the processor's clock for all around them. int8 of WaveNet
// takes tiles from three streams on.
#pragma once

#include "generation.h"
#include "sampling.h"
#include "simd.h"
#include "tiles.h"

namespace audiokernels {
namespace AUDIOKERNELS_ISA {
namespace {

#define AK_MEMBER static __attribute__((always_inline))  // as AK_INLINE, in a class

constexpr int kParts = kRowLanes / kLanes;  // native vectors in a group of 16 outputs

// Tiles of 1, 2, 4 and 8 streams, and the most groups of 16 outputs one may hold before its sums leave the registers.
constexpr int kTiles[4] = {1, 2, 4, 8};
#if defined(__AVX512F__)
constexpr int kMostGroups[4] = {10, 8, 5, 3};
#elif defined(__AVX2__)
constexpr int kMostGroups[4] = {5, 2, 1, 0};
#else
constexpr int kMostGroups[4] = {2, 1, 1, 0};
#endif

struct Matrix {
  const float* bias;      // (rows)
  const float* scale;     // int8: (taps, rows)
  const int32_t* offset;  // int8: (taps, rows)
  const uint8_t* lanes;   // (taps, steps, rows) of 32 bits
  int64_t rows, taps, steps;
  int64_t tap_stride;     // inputs between taps, padded
  const uint8_t* follow;  // the weights to be read after these
};

// A vector of every stream: groups of 16 values, a group of all streams side by side. So one pointer reaches the
// streams of a tile, and what treats all values alike runs over rows * batch of them.
struct Streams {
  float* data;
  int64_t batch;
  __attribute__((always_inline)) float* at(int64_t row, int64_t b) const {  // row: a multiple of 16
    return data + row * batch + b * kRowLanes;
  }
  __attribute__((always_inline)) Streams from(int64_t row) const { return {at(row, 0), batch}; }
};

// The inputs of a matrix in the same layout, as its pack type wants them.
struct Inputs {
  const void* past;  // of all taps but the last
  const void* now;   // of the last tap
  float* scale;      // int8: (batch, taps)
};

struct Workspace {
  Streams past;  // the taps before the newest: width - 1 times inputs padded
  void* packed;  // inputs rounded to the pack type
  float* scales;
};

// One piece of a product: `steps` inputs of one tap times a slice of rows.
struct Block {
  const int32_t* lanes;  // (steps, lanes_stride)
  int64_t lanes_stride, steps;
  const void* input;  // of stream 0
  Streams from, out;  // the slice of what the sums start from, and of where they go
  int64_t tap, taps;
  const float* scale;  // int8, of the slice and tap, and of the inputs
  const float* input_scale;
  const int32_t* offset;
};

// ---- the inner product of each pack type: how it wants its inputs (In, prepare), what 32 bits of them look like in
// ---- registers (Step, broadcast) and a vector of weights (Weights, widen), and how it adds their product ----

// Floats carry the float sum on from tap to tap; int8 sums a tap in int32 and adds it scaled.
struct FloatSums {
  using Sum = VFloat;
  AK_MEMBER VFloat start(const Block&, const float* from, int64_t) { return load(from); }
  AK_MEMBER void finish(VFloat acc, const Block&, int64_t, const float*, float* out, int64_t) { store(out, acc); }
};

struct FloatInputs : FloatSums {
  using In = float;
  AK_MEMBER Inputs prepare(const Matrix&, const Streams& past, const Streams& now, void*, float*) {
    return {past.data, now.data, nullptr};
  }
};

struct DotFloat32 : FloatInputs {
  static constexpr int kGroup = 1;
  using Step = VFloat;
  using Weights = VFloat;
  AK_MEMBER Step broadcast(const In* p) { return splat(*p); }
  AK_MEMBER Weights widen(VInt w) { return (VFloat)w; }
  AK_MEMBER VFloat add(VFloat acc, Weights w, Step s) { return fma(w, s, acc); }
};

// Two 16-bit weights in a lane, widened.
struct FloatPairs : FloatInputs {
  static constexpr int kGroup = 2;
  struct Step {
    float even, odd;
  };
  struct Weights {
    VFloat even, odd;
  };
  AK_MEMBER Step broadcast(const In* p) { return {p[0], p[1]}; }
  AK_MEMBER VFloat add(VFloat acc, Weights w, Step s) {
    return fma(w.odd, splat(s.odd), fma(w.even, splat(s.even), acc));
  }
};

struct DotFloat16 : FloatPairs {
#if defined(__AVX512F__)
  AK_MEMBER VFloat widen_low(VInt w) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)w)); }
#else
  // Exponent and mantissa move to their places and 2^112 mends the bias: exact; infinity and NaN are put right.
  AK_MEMBER VFloat widen_low(VInt w) {
    const VInt magnitude = w & splat_int(0x7FFF);
    const VInt endless = (magnitude > splat_int(0x7BFF)) & splat_int(0x7F800000);
    return (VFloat)((VInt)((VFloat)(magnitude << 13) * splat(0x1p112f)) | endless | (w & splat_int(0x8000)) << 16);
  }
#endif
  AK_MEMBER Weights widen(VInt w) { return {widen_low(w), widen_low(w >> 16)}; }
};

struct WideBFloat16 : FloatPairs {
  AK_MEMBER Weights widen(VInt w) {
    w = in_register(w);
    return {(VFloat)(w << 16), (VFloat)(w & splat_int(int32_t(0xFFFF0000)))};
  }
};

#if defined(AK_BFLOAT16_PAIRS)
struct DotBFloat16 : FloatSums {
  using In = uint16_t;
  static constexpr int kGroup = 2;
  using Step = VInt;
  using Weights = VInt;
  AK_MEMBER void round(const float* in, int64_t n, uint16_t* out) {
    for (int64_t i = 0; i < n; i += kLanes) store_rounded(out + i, load(in + i));
  }
  AK_MEMBER Inputs prepare(const Matrix& m, const Streams& past, const Streams& now, void* out, float*) {
    const int64_t tap = m.tap_stride * now.batch;
    uint16_t* rounded = static_cast<uint16_t*>(out);
    round(past.data, (m.taps - 1) * tap, rounded);
    round(now.data, tap, rounded + (m.taps - 1) * tap);
    return {rounded, rounded + (m.taps - 1) * tap, nullptr};
  }
  AK_MEMBER Step broadcast(const In* p) {
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return splat_int(pair);
  }
  AK_MEMBER Weights widen(VInt w) { return w; }
  AK_MEMBER VFloat add(VFloat acc, Weights w, Step s) { return add_pairs(w, s, acc); }
};
#else
using DotBFloat16 = WideBFloat16;
#endif

#if defined(AUDIOKERNELS_TILES)
// The sums of a tile product to the bit, where subnormals are flushed: even and odd products of 32 inputs apart.
struct TileOrder : WideBFloat16 {
  static constexpr bool kAlone = true;  // for a single stream
  struct Sum {
    VFloat whole, even, odd;
  };
  AK_MEMBER void round(const float* in, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += kLanes) {
      uint16_t half[kLanes];
      store_rounded(half, load(in + i));
      store(out + i, load_bfloat16(half));
    }
  }
  AK_MEMBER Inputs prepare(const Matrix& m, const Streams& past, const Streams& now, void* out, float*) {
    const int64_t last = (m.taps - 1) * m.tap_stride * now.batch;
    float* const rounded = static_cast<float*>(out);
    round(past.data, last, rounded);
    round(now.data, m.tap_stride * now.batch, rounded + last);
    return {rounded, rounded + last, nullptr};
  }
  AK_MEMBER Sum start(const Block&, const float* from, int64_t) { return {load(from), VFloat{}, VFloat{}}; }
  AK_MEMBER Sum add(Sum sum, Weights w, Step s) {
    return {sum.whole, fma(w.even, splat(s.even), sum.even), fma(w.odd, splat(s.odd), sum.odd)};
  }
  AK_MEMBER Sum carry(Sum sum) { return {sum.whole + (sum.even + sum.odd), VFloat{}, VFloat{}}; }
  AK_MEMBER void finish(Sum sum, const Block&, int64_t, const float*, float* out, int64_t) { store(out, sum.whole); }
};
#endif

struct DotInt8 {
  using In = int8_t;
  using Sum = VInt;
  using Weights = VInt;
  static constexpr int kGroup = 4;
  AK_MEMBER VInt start(const Block& block, const float*, int64_t i) {
    return kUnsigned ? load_int(block.offset + i) : VInt{};
  }
  AK_MEMBER void finish(VInt acc, const Block& block, int64_t b, const float* from, float* out, int64_t i) {
    const VFloat scale = load(block.scale + i) * splat(block.input_scale[b * block.taps + block.tap]);
    store(out, fma(to_float(acc), scale, load(from)));
  }
  // `rows` inputs of stream b, scaled by their largest one, in groups of `n` values of all streams.
  template <int n = kRowLanes>
  AK_MEMBER void quantize(const Streams& in, int64_t b, int64_t rows, int8_t* out, float* scale) {
    typedef int8_t VBytes __attribute__((vector_size(kLanes)));
    VFloat most = splat(0.0f);
    for (int64_t row = 0; row < rows; row += kRowLanes)
      for (int i = 0; i < kRowLanes; i += kLanes) most = max(abs(load(in.at(row, b) + i)), most);
    const float largest = reduce_max(most);
    const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
    *scale = largest / 127.0f;
    for (int64_t row = 0; row < rows; row += kRowLanes)
      for (int i = 0; i < kRowLanes; i += kLanes) {
        const VInt q = round_to_int(load(in.at(row, b) + i) * splat(inverse));
        const VBytes bytes = __builtin_convertvector(kUnsigned ? q ^ splat_int(0x80) : q, VBytes);
        memcpy(out + row / n * n * in.batch + b * n + row % n + i, &bytes, sizeof bytes);
      }
  }
  AK_MEMBER Inputs prepare(const Matrix& m, const Streams& past, const Streams& now, void* out, float* scales) {
    int8_t* const q = static_cast<int8_t*>(out);
    const int64_t last = m.taps - 1, tap_bytes = m.tap_stride * now.batch;
    for (int64_t b = 0; b < now.batch; b++)
      for (int64_t tap = 0; tap <= last; tap++)
        quantize(tap < last ? past.from(tap * m.tap_stride) : now, b, m.tap_stride, q + tap * tap_bytes,
                 scales + b * m.taps + tap);
    return {q, q + last * tap_bytes, scales};
  }
  AK_MEMBER Weights widen(VInt w) { return w; }
  AK_MEMBER int32_t load_quad(const In* p) {
    int32_t quad;
    memcpy(&quad, p, sizeof quad);
    return quad;
  }
#if defined(__AVX512VNNI__)
  static constexpr bool kUnsigned = true;  // inputs carry +128; the pack's offset takes it away again
  using Step = VInt;
  AK_MEMBER Step broadcast(const In* p) { return splat_int(load_quad(p)); }
  AK_MEMBER VInt add(VInt acc, Weights w, Step s) {
    return (VInt)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)s, (__m512i)w);
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
  AK_MEMBER VInt add(VInt acc, Weights w, Step s) {
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
  AK_MEMBER VInt add(VInt acc, Weights w, Step s) {
    const __m256i pairs = _mm256_maddubs_epi16(s.magnitude, _mm256_sign_epi8((__m256i)w, s.x));
    return acc + (VInt)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
#else
  static constexpr bool kUnsigned = false;
  struct Step {
    int32_t x[4];
  };
  AK_MEMBER Step broadcast(const In* p) { return {{p[0], p[1], p[2], p[3]}}; }
  AK_MEMBER VInt add(VInt acc, Weights w, Step s) {  // byte j of each lane, sign-extended
    acc += splat_int(s.x[0]) * ((w << 24) >> 24);
    acc += splat_int(s.x[1]) * ((w << 16) >> 24);
    acc += splat_int(s.x[2]) * ((w << 8) >> 24);
    return acc + splat_int(s.x[3]) * (w >> 24);
  }
#endif
};

// ---- out = from + matrix * in, block by block ----

constexpr int kStepsAhead = 8;  // weights are fetched so many steps ahead: the hardware stops at a page's end

// With several tiles on the same weights, the bus is idle from the second one on: fetch the next matrix meanwhile.
struct Ahead {
  const uint8_t* at;
  __attribute__((always_inline)) void step(int lines) {
    for (int i = 0; i < lines; i++, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// NB streams from `first` on, G groups of 16 outputs.
template <class Dot, int G, int NB>
static void tile(const Block& block, int64_t first, Ahead& ahead) {
  constexpr int A = G * kParts, kSteps = kRowLanes / Dot::kGroup;  // vectors of sums, steps in a group of inputs
  const auto row = [](int i) { return int64_t(i) / kParts * kRowLanes; };
  const auto lane = [](int i) { return i % kParts * kLanes; };
  const int64_t next_group = (block.out.batch - 1) * kRowLanes;
  const auto* x = static_cast<const typename Dot::In*>(block.input) + first * kRowLanes;
  const int32_t* w = block.lanes;
  typename Dot::Sum acc[NB][A];
  for (int b = 0; b < NB; b++)
    for (int i = 0; i < A; i++) acc[b][i] = Dot::start(block, block.from.at(row(i), first + b) + lane(i), i * kLanes);
  for (int64_t left = block.steps; left > 0; left -= kSteps, x += next_group) {
    for (int64_t k = left < kSteps ? left : kSteps; k > 0; k--, x += Dot::kGroup, w += block.lanes_stride) {
      for (int i = 0; i < G && NB < 4; i++) __builtin_prefetch(w + kStepsAhead * block.lanes_stride + i * kRowLanes);
      if constexpr (NB >= 4) ahead.step(NB / 4);
      typename Dot::Weights weights[A];
      for (int i = 0; i < A; i++) weights[i] = Dot::widen(load_int(w + i * kLanes));
      for (int b = 0; b < NB; b++) {
        const typename Dot::Step step = Dot::broadcast(x + b * kRowLanes);
        for (int i = 0; i < A; i++) acc[b][i] = Dot::add(acc[b][i], weights[i], step);
      }
    }
    if constexpr (requires { Dot::carry(acc[0][0]); })
      if (left <= kSteps || (block.steps - left) / kSteps % 2)  // 32 inputs are done, or all
        for (int b = 0; b < NB; b++)
          for (int i = 0; i < A; i++) acc[b][i] = Dot::carry(acc[b][i]);
  }
  for (int b = 0; b < NB; b++)
    for (int i = 0; i < A; i++)
      Dot::finish(acc[b][i], block, first + b, block.from.at(row(i), first + b) + lane(i),
                  block.out.at(row(i), first + b) + lane(i), i * kLanes);
}

// `groups` at run time -> the tile compiled for it.
template <class Dot, int NB, int G>
AK_INLINE void tile_of(int groups, const Block& block, int64_t first, Ahead& ahead) {
  if (groups == G) return tile<Dot, G, NB>(block, first, ahead);
  if constexpr (G > 1) tile_of<Dot, NB, G - 1>(groups, block, first, ahead);
}

// Streams first .. batch - 1 in tiles of one kind, tap by tap; returns the first stream left. Slices of rows are even:
// a short last one would wait for its own sums.
template <class Dot, int Kind>
static int64_t rows_of(const Matrix& m, const Inputs& in, int64_t first, const Streams& from, const Streams& out) {
  constexpr int most = kMostGroups[Kind], nb = kTiles[Kind];
  if constexpr (most > 0) {
    const int64_t end = out.batch - (out.batch - first) % nb;
    const int groups = int(m.rows / kRowLanes), slices = (groups + most - 1) / most;
    const int64_t tap_inputs = m.tap_stride * out.batch;
    Ahead ahead{m.follow};
    int64_t row = 0;
    for (int s = 0; s < slices && first < end; s++) {
      const int here = groups / slices + (s < groups % slices);
      for (int64_t tap = 0; tap < m.taps; tap++) {
        const auto* past = static_cast<const typename Dot::In*>(in.past) + tap * tap_inputs;
        const int64_t at = tap * m.rows + row;
        const Block block{reinterpret_cast<const int32_t*>(m.lanes) + tap * m.steps * m.rows + row,
                          m.rows,
                          m.steps,
                          tap + 1 < m.taps ? past : in.now,
                          (tap == 0 ? from : out).from(row),
                          out.from(row),
                          tap,
                          m.taps,
                          m.scale ? m.scale + at : nullptr,
                          in.scale,
                          m.offset ? m.offset + at : nullptr};
        for (int64_t b = first; b < end; b += nb) tile_of<Dot, nb, most>(here, block, b, ahead);
      }
      row += here * kRowLanes;
    }
    return end;
  }
  return first;
}

// ---- the same by tile registers: a stream a row of the inputs and of the sums, 16 words of inputs a product ----

#if defined(AUDIOKERNELS_TILES)
constexpr int kInputTile = kSumTiles, kWeightTile = kSumTiles + 1;  // and two more of weights, in turn

struct BFloat16Tiles {
  using In = uint16_t;
  static constexpr int kInputs = 2 * kTileWords;
  static constexpr bool kTapsApart = false;
  AK_MEMBER void round(const Streams& in, int64_t rows, In* out) {  // (rows / 32, stream, 32)
    for (int64_t row = 0; row < rows; row += kInputs)
      for (int64_t b = 0; b < in.batch; b++, out += kInputs) {
        const VFloat second = row + kRowLanes < rows ? load(in.at(row + kRowLanes, b)) : VFloat{};
        store_int(out, round_both(load(in.at(row, b)), second));
      }
  }
  AK_MEMBER Inputs prepare(const Matrix& m, const Streams& past, const Streams& now, int64_t tap, void* out, float*) {
    In* const rounded = static_cast<In*>(out);
    for (int64_t t = 0; t + 1 < m.taps; t++) round(past.from(t * m.tap_stride), m.tap_stride, rounded + t * tap);
    round(now, m.tap_stride, rounded + (m.taps - 1) * tap);
    return {rounded, nullptr, nullptr};
  }
  template <int t, int w>
  AK_MEMBER void add() {
    add_bfloat16_product<t, kInputTile, w>();
  }
  template <int t>
  AK_MEMBER void start(const float* from) {
    load_tile<t>(from, 4 * kRowLanes);
  }
  template <int t>
  AK_MEMBER void finish(const Block& block, int64_t first, int64_t) {
    store_tile<t>(block.out.at(t * kRowLanes, first), 4 * kRowLanes);
  }
};

struct Int8Tiles {
  using In = uint8_t;
  static constexpr int kInputs = 4 * kTileWords;
  static constexpr bool kTapsApart = true;  // each has a scale of its own
  AK_MEMBER Inputs prepare(const Matrix& m, const Streams& past, const Streams& now, int64_t tap, void* out,
                           float* scales) {
    for (int64_t b = 0; b < now.batch; b++)
      for (int64_t t = 0; t < m.taps; t++)
        DotInt8::quantize<kInputs>(t + 1 < m.taps ? past.from(t * m.tap_stride) : now, b, m.tap_stride,
                                   static_cast<int8_t*>(out) + t * tap, scales + b * m.taps + t);
    return {out, nullptr, scales};
  }
  template <int t, int w>
  AK_MEMBER void add() {
    add_int8_product<t, kInputTile, w>();
  }
  template <int t>
  AK_MEMBER void start(const float*) {
    zero_tile<t>();
  }
  template <int t>
  AK_MEMBER void finish(const Block& block, int64_t first, int64_t streams) {
    constexpr int i = t * kRowLanes;
    alignas(64) int32_t sums[kTileRows][kTileWords];
    store_tile<t>(sums, sizeof sums[0]);
    for (int64_t b = 0; b < streams; b++)
      DotInt8::finish(load_int(sums[b]) + load_int(block.offset + i), block, first + b, block.from.at(i, first + b),
                      block.out.at(i, first + b), i);
  }
};

// 16 steps of 16 outputs' weights, or the last `steps` and zeros.
template <int t>
AK_INLINE void load_weights(const int32_t* w, int64_t stride, int64_t steps) {
  if (steps >= kTileRows) return load_tile<t>(w, 4 * stride);
  alignas(64) int32_t padded[kTileRows][kTileWords] = {};
  for (int64_t k = 0; k < steps; k++) memcpy(padded[k], w + k * stride, sizeof padded[k]);
  load_tile<t>(padded, sizeof padded[0]);
}

// G groups of 16 outputs of the streams from `first` on; `block` is of the first tap.
template <class Tiles, int G>
static void tile_slice(const Matrix& m, Block block, int64_t tap_inputs, int64_t first, int64_t streams) {
  const auto* x = static_cast<const typename Tiles::In*>(block.input) + first * Tiles::kInputs;
  for (; block.tap < m.taps; block.tap++, x += tap_inputs, block.lanes += m.steps * m.rows) {
    if (Tiles::kTapsApart || block.tap == 0)
      for_each_tile<G>([&]<int t>(TileCount<t>) { Tiles::template start<t>(block.from.at(t * kRowLanes, first)); });
    for (int64_t k = 0; k < m.steps; k += kTileRows) {
      load_tile<kInputTile>(x + k / kTileRows * Tiles::kInputs * block.out.batch, 64);
      for_each_tile<G>([&]<int t>(TileCount<t>) {
        constexpr int kWeights = kWeightTile + t % 3;
        load_weights<kWeights>(block.lanes + k * m.rows + t * kRowLanes, m.rows, m.steps - k);
        Tiles::template add<t, kWeights>();
      });
    }
    if (Tiles::kTapsApart || block.tap + 1 == m.taps)
      for_each_tile<G>([&]<int t>(TileCount<t>) { Tiles::template finish<t>(block, first, streams); });
    if (block.scale) block.scale += m.rows, block.offset += m.rows;
    block.from = block.out;
  }
}

// The streams of a batch go in even passes of at most 16.
AK_INLINE int64_t passes_of(int64_t batch) { return (batch + kTileRows - 1) / kTileRows; }
AK_INLINE void set_streams(int64_t streams) { set_rows(kWeightTile, streams); }

template <class Tiles>
static void multiply_by_tiles(const Workspace& k, const Matrix& m, const Streams& in, const Streams& from,
                              const Streams& out) {
  const int64_t batch = out.batch, passes = passes_of(batch);
  const int64_t tap_inputs = (m.steps + kTileRows - 1) / kTileRows * Tiles::kInputs * batch;
  const Inputs inputs = Tiles::prepare(m, k.past, in, tap_inputs, k.packed, k.scales);
  const int groups = int(m.rows / kRowLanes), slices = (groups + kSumTiles - 1) / kSumTiles;
  for (int64_t pass = 0, first = 0; pass < passes; pass++) {
    const int64_t streams = batch / passes + (pass < batch % passes);
    if (batch % passes) set_streams(streams);
    for (int64_t s = 0, row = 0; s < slices; s++) {
      const int here = groups / slices + (s < groups % slices);
      const Block block{reinterpret_cast<const int32_t*>(m.lanes) + row,
                        m.rows,
                        m.steps,
                        inputs.past,
                        from.from(row),
                        out.from(row),
                        0,
                        m.taps,
                        m.scale ? m.scale + row : nullptr,
                        inputs.scale,
                        m.offset ? m.offset + row : nullptr};
      with_tiles<kSumTiles>(here,
                            [&]<int G>(TileCount<G>) { tile_slice<Tiles, G>(m, block, tap_inputs, first, streams); });
      row += here * kRowLanes;
    }
    first += streams;
  }
}
#endif

// ---- a step's products ----

// Read a matrix's place in the pack, and step over it.
static Matrix read_matrix(int64_t dtype, const uint8_t*& p, int64_t rows, int64_t taps, int64_t inputs) {
  Matrix m{};
  const uint8_t* end = p + matrix_bytes(dtype, rows, taps, inputs);
  m.rows = rows, m.taps = taps, m.tap_stride = pad_lanes(inputs);
  const int64_t group = lane_inputs(dtype);
  m.steps = (inputs + group - 1) / group;
  m.bias = reinterpret_cast<const float*>(p);
  p += 4 * rows;
  if (dtype == kInt8) {
    m.scale = reinterpret_cast<const float*>(p);
    m.offset = reinterpret_cast<const int32_t*>(p + 4 * taps * rows);
    p += 8 * taps * rows;
  }
  m.lanes = p;
  m.follow = p = end;
  return m;
}

template <class Dot>
static void multiply_vectors(const Workspace& k, const Matrix& m, const Streams& in, const Streams& from,
                             const Streams& out) {
  const Inputs inputs = Dot::prepare(m, k.past, in, k.packed, k.scales);
  int64_t first = 0;
  if constexpr (!requires { Dot::kAlone; }) {
    first = rows_of<Dot, 3>(m, inputs, 0, from, out);
    first = rows_of<Dot, 2>(m, inputs, first, from, out);
    first = rows_of<Dot, 1>(m, inputs, first, from, out);
  }
  rows_of<Dot, 0>(m, inputs, first, from, out);
}

// out = from + matrix * in; streams of one tile share every weight that is read.
template <class Dot>
static void multiply(const Workspace& k, const Matrix& m, const Streams& in, const Streams& from, const Streams& out) {
#if defined(AUDIOKERNELS_TILES)
  if constexpr (requires { Dot::kTapsApart; })
    multiply_by_tiles<Dot>(k, m, in, from, out);
  else
#endif
    multiply_vectors<Dot>(k, m, in, from, out);
}

// ---- `run` with what multiplies packs of a type ----

#if defined(AUDIOKERNELS_TILES)
template <class Run, class Tiles>
AK_INLINE void run_tiles(int64_t batch, const Run& run, Tiles tiles) {
  const TileConfig before = begin_tiles();
  set_streams(batch / passes_of(batch));
  run(tiles);
  end_tiles(before);
}
#endif

template <class Run>
AK_INLINE void run_bfloat16(int64_t batch, const Run& run) {
#if defined(AUDIOKERNELS_TILES)
  const unsigned before = flush_subnormals();  // as tiles do
  if (batch > 1)
    run_tiles(batch, run, BFloat16Tiles{});
  else
    run(TileOrder{});  // reading is the limit here, and tiles slow the clock down
  keep_subnormals(before);
#else
  (void)batch;
  run(DotBFloat16{});
#endif
}

// Its sums are exact, by tiles or not.
template <class Run>
AK_INLINE void run_int8(int64_t batch, const Run& run) {
#if defined(AUDIOKERNELS_TILES)
  if (batch > 2) return run_tiles(batch, run, Int8Tiles{});
#endif
  (void)batch;
  run(DotInt8{});
}

// One stream's rows, which lie together in `row`.
AK_INLINE void put(const Streams& out, int64_t b, const float* row, int64_t rows) {
  for (int64_t i = 0; i < rows; i += kRowLanes)
    for (int j = 0; j < kRowLanes; j += kLanes) store(out.at(i, b) + j, load(row + i + j));
}
AK_INLINE void take(float* row, const Streams& in, int64_t b, int64_t rows) {
  for (int64_t i = 0; i < rows; i += kRowLanes)
    for (int j = 0; j < kRowLanes; j += kLanes) store(row + i + j, load(in.at(i, b) + j));
}
// The same rows of every stream.
AK_INLINE void put_all(const Streams& out, const float* row, int64_t rows) {
  for (int64_t b = 0; b < out.batch; b++) put(out, b, row, rows);
}
AK_INLINE void add_all(const Streams& out, const float* row, int64_t rows) {
  for (int64_t i = 0; i < rows; i += kRowLanes)
    for (int64_t b = 0; b < out.batch; b++)
      for (int j = 0; j < kRowLanes; j += kLanes) store(out.at(i, b) + j, load(out.at(i, b) + j) + load(row + i + j));
}
AK_INLINE void relu(const Streams& out, const Streams& in, int64_t rows) {
  for (int64_t i = 0; i < rows * in.batch; i += kLanes) store(out.data + i, max(load(in.data + i), splat(0.0f)));
}

// ---- the end of a step ----

AK_INLINE bool needs_logits(const GenerationJob& job, int64_t t) { return job.logits || t >= job.forced; }

// Step t of every stream is done but for its code, position and results. row: for the logits of one stream.
static void finish_step(const GenerationJob& job, int64_t t, const Streams& logits, float* row) {
  for (int64_t b = 0; b < job.batch; b++) {
    float* state = job.state + b * job.state_stride;
    if (needs_logits(job, t)) take(row, logits, b, pad_lanes(job.n_class));
    if (job.logits) memcpy(job.logits + (b * job.n + t) * job.n_class, row, size_t(job.n_class) * sizeof(float));
    const int32_t code = t < job.forced ? job.codes[b * job.forced + t]
                                        : draw(row, job.n_class, job.uniforms[b * job.n + t], job.sampling);
    if (job.n_class <= 256)
      static_cast<uint8_t*>(job.out)[b * job.n + t] = uint8_t(code);
    else
      static_cast<int16_t*>(job.out)[b * job.n + t] = int16_t(code);
    const int64_t next = state_position(state) + 1;
    state[0] = float(next % kPositionBase);
    state[1] = float(next / kPositionBase);
    state[2] = float(code);
  }
}

}  // namespace
}  // namespace AUDIOKERNELS_ISA
}  // namespace audiokernels
