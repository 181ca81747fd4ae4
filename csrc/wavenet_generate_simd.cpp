// The sample loop of WaveNet generation, compiled once per instruction set.
//
// A matrix times vectors: outputs lie in the lanes, inputs are broadcast in ascending order, one fused multiply-add
// each. So a sum has one order whatever the lane count, the tile and the batch, and float32 codes are the same
// everywhere. int8 sums are exact. bfloat16 keeps that order too, except on avx512_bf16, whose instruction adds pairs.
#include "wavenet_generate.h"

#include "simd.h"

namespace audiokernels {
namespace AUDIOKERNELS_ISA {
namespace {

#define AK_MEMBER static __attribute__((always_inline))

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
  int64_t row;            // the slice's first output
  int64_t input;          // the first input of the block in an input row
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
    for (int i = 0; i < A; i++)
      Dot::finish(acc[b][i], block, in, first + b, out[first + b] + block.row, i * kLanes);
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
      const Block block{lanes, m.rows, m.steps, row, tap * m.tap_stride, tap, m.taps, m.scale + at, m.offset + at};
      for (int64_t b = first; b < end; b += nb) tile_of<Dot, nb, most>(here, block, in, b, out, ahead);
    }
    row += here * kRowLanes;
  }
  return end;
}

// Everything a thread needs, carved out of job.scratch.
struct Scratch {
  Rows base;     // bias + projected condition: (n_layer, gate_rows) a stream
  float* skip;   // the skip biases of all layers, summed
  Rows in;       // inputs of the matrix at work: (taps, inputs padded)
  Rows z;        // gate_rows
  Rows x;        // residual_rows | skip_rows
  Rows head;     // head rows
  Rows logits;   // class rows
  Rows slots;    // int32: where each layer's ring stands, and its length
  void* packed;  // inputs rounded to the pack type
  float* scales;
};

struct Net {
  const WaveNetShape& s;
  const WaveNetJob& job;
  const float *embedding, *condition;
  const uint8_t* layers;
  int64_t x_rows, z_rows, skip_rows, class_rows;
  Scratch scratch;
};

static Matrix read_matrix(const WaveNetShape& s, const uint8_t*& p, int64_t rows, int64_t taps, int64_t inputs) {
  Matrix m{};
  const uint8_t* end = p + s.matrix_bytes(rows, taps, inputs);
  m.rows = rows, m.taps = taps, m.tap_stride = pad_lanes(inputs);
  const int64_t group = int64_t{1} << s.dtype;
  m.steps = (inputs + group - 1) / group;
  m.bias = reinterpret_cast<const float*>(p);
  p += 4 * rows;
  if (s.dtype == kInt8) {
    m.scale = reinterpret_cast<const float*>(p);
    m.offset = reinterpret_cast<const int32_t*>(p + 4 * taps * rows);
    p += 8 * taps * rows;
  }
  m.lanes = p;
  m.follow = p = end;
  return m;
}

// out[b] += matrix * in[b]; streams of one tile share every weight that is read.
template <class Dot>
static void multiply(const Net& net, const Matrix& m, const Rows& out) {
  const int64_t batch = net.job.batch;
  const Inputs in = Dot::prepare(m, net.scratch.in, batch, net.scratch.packed, net.scratch.scales);
  int64_t first = rows_of<Dot, 2>(m, in, 0, batch, out);
  first = rows_of<Dot, 1>(m, in, first, batch, out);
  rows_of<Dot, 0>(m, in, first, batch, out);
}

AK_INLINE void add_rows(float* out, const float* a, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(out + i, load(out + i) + load(a + i));
}
AK_INLINE void copy_rows(float* out, const float* a, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(out + i, load(a + i));
}
AK_INLINE void relu_rows(float* out, const float* a, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(out + i, max(load(a + i), splat(0.0f)));
}

static void sum_skip_biases(const Net& net) {
  const uint8_t* p = net.layers;
  for (int64_t i = 0; i < net.skip_rows; i++) net.scratch.skip[i] = 0.0f;
  for (int64_t layer = 0; layer < net.s.n_layer; layer++) {
    read_matrix(net.s, p, net.z_rows, net.s.width, net.s.residual);
    const Matrix mix = read_matrix(net.s, p, net.s.mix_rows(layer), 1, net.s.hidden);
    add_rows(net.scratch.skip, mix.bias + mix.rows - net.skip_rows, net.skip_rows);
  }
}

// Bias plus the projection of the frame that stream b is in, for every layer.
static void project_condition(const Net& net, int64_t b, int64_t frame) {
  const WaveNetShape& s = net.s;
  const uint8_t* p = net.layers;
  const float* c = frame < 0 ? nullptr : net.job.condition + (b * net.job.frames + frame) * s.condition;
  for (int64_t layer = 0; layer < s.n_layer; layer++) {
    const Matrix conv = read_matrix(s, p, net.z_rows, s.width, s.residual);
    read_matrix(s, p, s.mix_rows(layer), 1, s.hidden);
    float* base = net.scratch.base[b] + layer * net.z_rows;
    copy_rows(base, conv.bias, net.z_rows);
    for (int64_t k = 0; c && k < s.condition; k++) {
      const float* w = net.condition + (layer * s.condition + k) * net.z_rows;
      for (int64_t i = 0; i < net.z_rows; i += kLanes)
        store(base + i, fma(load(w + i), splat(c[k]), load(base + i)));
    }
  }
}

// The first class whose cumulative probability exceeds u: blocks of 16 summed in order, then the sums of the blocks.
static int32_t draw(float* logits, int64_t n_class, float u, float temperature) {
  const int64_t rows = pad_lanes(n_class);
  for (int64_t i = n_class; i < rows; i++) logits[i] = -__builtin_inff();
  VFloat most = load(logits);
  for (int64_t i = kLanes; i < rows; i += kLanes) most = max(load(logits + i), most);
  const float largest = reduce_max(most);
  if (temperature == 0.0f) {
    for (int64_t i = 0; i < n_class; i++)
      if (logits[i] == largest) return int32_t(i);
    return 0;
  }
  const VFloat inverse = splat(1.0f / temperature);
  for (int64_t i = 0; i < rows; i += kLanes) {
    const VFloat l = (load(logits + i) - splat(largest)) * inverse;
    store(logits + i, l < splat(-87.0f) ? splat(0.0f) : exp_clamped(l, 87.0f));
  }
  float total = 0.0f;
  for (int64_t i = 0; i < rows; i += 16) {
    float block = 0.0f;
    for (int64_t j = 0; j < 16; j++) block += logits[i + j];
    total += block;
  }
  const float target = u * total;
  float before = 0.0f;
  int64_t last = 0;  // the last class with a probability: what rounding u * total up to the total gets
  for (int64_t i = 0; i < rows; i += 16) {
    float block = 0.0f;
    for (int64_t j = 0; j < 16; j++) block += logits[i + j];
    if (before + block > target) {
      float within = 0.0f;
      for (int64_t j = 0; j < 16; j++) {
        within += logits[i + j];
        if (logits[i + j] > 0.0f) last = i + j;
        if (before + within > target) return int32_t(i + j);
      }
      return int32_t(last);
    }
    for (int64_t j = 0; j < 16; j++)
      if (logits[i + j] > 0.0f) last = i + j;
    before += block;
  }
  return int32_t(last);
}

// The next layer's oldest tap lies anywhere in a ring of megabytes: ask for it while this layer multiplies.
static void fetch_taps(const Net& net, int64_t layer, int64_t ring_offset) {
  if (layer >= net.s.n_layer) return;
  const int64_t d = net.s.dilations[layer], length = net.s.ring_slots(layer);
  for (int64_t b = 0; b < net.job.batch; b++) {
    int64_t slot = reinterpret_cast<const int32_t*>(net.scratch.slots[b])[layer];
    for (int64_t tap = 0; tap + 1 < net.s.width; tap++, slot = slot + d < length ? slot + d : slot + d - length) {
      const float* at = net.job.state + b * net.job.state_stride + ring_offset + slot * net.x_rows;
      for (int64_t i = 0; i < net.x_rows; i += 16) __builtin_prefetch(at + i, 1);
    }
  }
}

// One layer of every stream: rings, dilated taps, gate, residual and skip.
template <class Dot>
static void run_layer(const Net& net, int64_t layer, const uint8_t*& p, int64_t ring_offset) {
  const WaveNetShape& s = net.s;
  const Scratch& k = net.scratch;
  const Matrix conv = read_matrix(s, p, net.z_rows, s.width, s.residual);
  const Matrix mix = read_matrix(s, p, s.mix_rows(layer), 1, s.hidden);
  const int64_t first = layer + 1 < s.n_layer ? 0 : net.x_rows;  // the last layer leaves the residual alone
  const int32_t d = int32_t(s.dilations[layer]), length = int32_t(s.ring_slots(layer));
  for (int64_t b = 0; b < net.job.batch; b++) {
    int32_t& at = reinterpret_cast<int32_t*>(k.slots[b])[layer];
    float* ring = net.job.state + b * net.job.state_stride + ring_offset;
    float* in = k.in[b];
    int32_t slot = at;  // the oldest tap lies where the newest will be written
    for (int64_t tap = 0; tap + 1 < s.width; tap++, in += net.x_rows) {
      copy_rows(in, ring + int64_t(slot) * net.x_rows, net.x_rows);
      slot += d;
      if (slot >= length) slot -= length;
    }
    copy_rows(in, k.x[b], net.x_rows);
    if (length > 0) {
      copy_rows(ring + int64_t(at) * net.x_rows, k.x[b], net.x_rows);
      if (++at == length) at = 0;
    }
    copy_rows(k.z[b], k.base[b] + layer * net.z_rows, net.z_rows);
  }
  fetch_taps(net, layer + 1, ring_offset + length * net.x_rows);
  multiply<Dot>(net, conv, k.z);
  const int64_t half = net.z_rows / 2;
  for (int64_t b = 0; b < net.job.batch; b++) {
    const float* z = k.z[b];
    for (int64_t i = 0; i < half; i += kLanes) store(k.in[b] + i, gate(load(z + i), load(z + half + i)));
    if (first == 0) add_rows(k.x[b], mix.bias, net.x_rows);
  }
  multiply<Dot>(net, mix, {k.x.data + first, k.x.stride});
}

// Skip sums -> logits of every stream.
template <class Dot>
static void run_head(const Net& net, const uint8_t* p) {
  const WaveNetShape& s = net.s;
  const Scratch& k = net.scratch;
  const Matrix head = read_matrix(s, p, pad_lanes(s.head), 1, s.skip);
  Matrix out = read_matrix(s, p, net.class_rows, 1, s.head);
  out.follow = net.layers;
  for (int64_t b = 0; b < net.job.batch; b++) {
    relu_rows(k.in[b], k.x[b] + net.x_rows, net.skip_rows);
    copy_rows(k.head[b], head.bias, head.rows);
  }
  multiply<Dot>(net, head, k.head);
  for (int64_t b = 0; b < net.job.batch; b++) {
    relu_rows(k.in[b], k.head[b], head.rows);
    copy_rows(k.logits[b], out.bias, out.rows);
  }
  multiply<Dot>(net, out, k.logits);
}

template <class Dot>
static void run(const Net& net) {
  const WaveNetShape& s = net.s;
  const WaveNetJob& job = net.job;
  const Scratch& k = net.scratch;
  for (int64_t t = 0; t < job.n; t++) {
    for (int64_t b = 0; b < job.batch; b++) {
      float* state = job.state + b * job.state_stride;
      copy_rows(k.x[b], net.embedding + int64_t(state[2]) * net.x_rows, net.x_rows);
      copy_rows(k.x[b] + net.x_rows, k.skip, net.skip_rows);
      if (s.condition) {
        const int64_t position = state_position(state);
        if (t == 0 || position % s.hop == 0)
          project_condition(net, b, position / s.hop - (position - t) / s.hop);
      }
    }
    const uint8_t* p = net.layers;
    int64_t ring_offset = kStateHeader;
    for (int64_t layer = 0; layer < s.n_layer; layer++) {
      run_layer<Dot>(net, layer, p, ring_offset);
      ring_offset += s.ring_slots(layer) * net.x_rows;
    }
    const bool needs_logits = job.logits || t >= job.forced;
    if (needs_logits) run_head<Dot>(net, p);
    for (int64_t b = 0; b < job.batch; b++) {
      float* state = job.state + b * job.state_stride;
      if (job.logits)
        memcpy(job.logits + (b * job.n + t) * s.n_class, k.logits[b], size_t(s.n_class) * sizeof(float));
      const int32_t code = t < job.forced ? job.codes[b * job.forced + t]
                                          : draw(k.logits[b], s.n_class, job.uniforms[b * job.n + t], job.temperature);
      if (s.n_class <= 256)
        static_cast<uint8_t*>(job.out)[b * job.n + t] = uint8_t(code);
      else
        static_cast<int16_t*>(job.out)[b * job.n + t] = int16_t(code);
      const int64_t next = state_position(state) + 1;
      state[0] = float(next % kPositionBase);
      state[1] = float(next / kPositionBase);
      state[2] = float(code);
    }
  }
}

}  // namespace

void wavenet_run(const WaveNetJob& job) {
  const WaveNetShape& s = *job.shape;
  Net net{s, job, nullptr, nullptr, nullptr, s.residual_rows(), s.gate_rows(), s.skip_rows(), pad_lanes(s.n_class), {}};
  net.embedding = reinterpret_cast<const float*>(job.pack);
  net.condition = net.embedding + s.n_class * net.x_rows;
  net.layers = job.pack + s.table_bytes();

  float* at = job.scratch;
  const auto carve = [&](int64_t stride) {
    const Rows rows{at, stride};
    at += job.batch * stride;
    return rows;
  };
  Scratch& k = net.scratch;
  k.base = carve(s.n_layer * net.z_rows);
  k.in = carve(s.max_inputs());
  k.z = carve(net.z_rows);
  k.x = carve(net.x_rows + net.skip_rows);
  k.head = carve(pad_lanes(s.head));
  k.logits = carve(net.class_rows);
  k.slots = carve(pad_lanes(s.n_layer));
  k.packed = carve(s.max_inputs()).data;
  k.scales = carve(pad_lanes(s.width)).data;
  k.skip = at;
  sum_skip_biases(net);

  for (int64_t b = 0; b < job.batch; b++) {
    const int64_t position = state_position(job.state + b * job.state_stride);
    for (int64_t layer = 0; layer < s.n_layer; layer++) {
      const int64_t length = s.ring_slots(layer);
      reinterpret_cast<int32_t*>(k.slots[b])[layer] = length ? int32_t(position % length) : 0;
    }
    if (!s.condition) project_condition(net, b, -1);
  }
  if (s.dtype == kFloat32) run<DotFloat32>(net);
  if (s.dtype == kBFloat16) run<DotBFloat16>(net);
  if (s.dtype == kInt8) run<DotInt8>(net);
}

}  // namespace AUDIOKERNELS_ISA
}  // namespace audiokernels
