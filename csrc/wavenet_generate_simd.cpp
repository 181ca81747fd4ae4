// The sample loop of WaveNet generation, compiled once per instruction set.
#include "wavenet_generate.h"
#include "wavenet_product.h"

namespace audiokernels {
namespace AUDIOKERNELS_ISA {
namespace {

// Everything a thread needs, carved out of job.scratch.
struct Scratch {
  Streams base;    // bias + projected condition: n_layer times gate_rows
  Streams past;    // the taps before the newest: width - 1 times inputs padded
  Streams z;       // gate_rows
  Streams h;       // the gate's output, and the inputs of the head's matrices
  Streams x;       // residual_rows | skip_rows
  Streams head;    // head rows
  Streams logits;  // class rows
  float* row;      // the logits of one stream
  float* skip;     // the skip biases of all layers, summed
  int32_t* slots;  // (batch, n_layer): the oldest slot of each layer's ring, which is the next to be written
  void* packed;    // inputs rounded to the pack type
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
  const int64_t group = s.dtype == kFloat32 ? 1 : s.dtype == kInt8 ? 4 : 2;
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

// out = from + matrix * in; streams of one tile share every weight that is read.
template <class Dot>
static void multiply(const Net& net, const Matrix& m, const Streams& in, const Streams& from, const Streams& out) {
  const Scratch& k = net.scratch;
  const Inputs inputs = Dot::prepare(m, k.past, in, k.packed, k.scales);
  int64_t first = rows_of<Dot, 3>(m, inputs, 0, from, out);
  first = rows_of<Dot, 2>(m, inputs, first, from, out);
  first = rows_of<Dot, 1>(m, inputs, first, from, out);
  rows_of<Dot, 0>(m, inputs, first, from, out);
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

static void sum_skip_biases(const Net& net) {
  const uint8_t* p = net.layers;
  for (int64_t i = 0; i < net.skip_rows; i++) net.scratch.skip[i] = 0.0f;
  for (int64_t layer = 0; layer < net.s.n_layer; layer++) {
    read_matrix(net.s, p, net.z_rows, net.s.width, net.s.residual);
    const Matrix mix = read_matrix(net.s, p, net.s.mix_rows(layer), 1, net.s.hidden);
    const float* bias = mix.bias + mix.rows - net.skip_rows;
    for (int64_t i = 0; i < net.skip_rows; i++) net.scratch.skip[i] += bias[i];
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
    const Streams base = net.scratch.base.from(layer * net.z_rows);
    put(base, b, conv.bias, net.z_rows);
    for (int64_t k = 0; c && k < s.condition; k++) {
      const float* w = net.condition + (layer * s.condition + k) * net.z_rows;
      for (int64_t i = 0; i < net.z_rows; i += kRowLanes)
        for (int j = 0; j < kRowLanes; j += kLanes) {
          float* at = base.at(i, b) + j;
          store(at, fma(load(w + i + j), splat(c[k]), load(at)));
        }
    }
  }
}

AK_INLINE float sum_block(const float* p) {
  float sum = 0.0f;
  for (int64_t i = 0; i < 16; i++) sum += p[i];
  return sum;
}

// The first class whose cumulative probability exceeds u. Blocks of 16 are summed in order, then their sums.
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
  float* p = logits;
  const VFloat inverse = splat(1.0f / temperature);
  for (int64_t i = 0; i < rows; i += kLanes) {
    const VFloat l = (load(logits + i) - splat(largest)) * inverse;
    store(p + i, l < splat(-87.0f) ? splat(0.0f) : exp_clamped(l, 87.0f));
  }
  float total = 0.0f;
  for (int64_t i = 0; i < rows; i += 16) total += sum_block(p + i);
  const float target = u * total;
  float before = 0.0f;
  for (int64_t i = 0; i < rows; i += 16) {
    const float block = sum_block(p + i);
    if (before + block > target) {
      float within = 0.0f;
      int64_t j = 0;
      while (before + (within += p[i + j]) <= target) j++;  // ends: the last sum is `block` again
      return int32_t(i + j);
    }
    before += block;
  }
  for (int64_t i = n_class - 1; i > 0; i--)  // u * total was rounded up to the total: the last class that can be
    if (p[i] > 0.0f) return int32_t(i);
  return 0;
}

// The next layer's oldest tap lies anywhere in a ring of megabytes: ask for it while this layer multiplies.
static void fetch_taps(const Net& net, int64_t layer, int64_t ring_offset) {
  if (layer >= net.s.n_layer) return;
  const int64_t d = net.s.dilations[layer], length = net.s.ring_slots(layer);
  for (int64_t b = 0; b < net.job.batch; b++) {
    int64_t slot = net.scratch.slots[b * net.s.n_layer + layer];
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
    int32_t& oldest = k.slots[b * s.n_layer + layer];
    float* ring = net.job.state + b * net.job.state_stride + ring_offset;
    int32_t slot = oldest;  // the oldest tap lies where the newest will be written
    for (int64_t tap = 0; tap + 1 < s.width; tap++) {
      put(k.past.from(tap * net.x_rows), b, ring + int64_t(slot) * net.x_rows, net.x_rows);
      slot += d;
      if (slot >= length) slot -= length;
    }
    if (length > 0) {
      take(ring + int64_t(oldest) * net.x_rows, k.x, b, net.x_rows);
      if (++oldest == length) oldest = 0;
    }
  }
  fetch_taps(net, layer + 1, ring_offset + length * net.x_rows);
  multiply<Dot>(net, conv, k.x, k.base.from(layer * net.z_rows), k.z);
  const int64_t half = net.z_rows / 2 * net.job.batch;
  for (int64_t i = 0; i < half; i += kLanes) store(k.h.data + i, gate(load(k.z.data + i), load(k.z.data + half + i)));
  if (first == 0) add_all(k.x, mix.bias, net.x_rows);
  multiply<Dot>(net, mix, k.h, k.x.from(first), k.x.from(first));
}

// Skip sums -> logits of every stream.
template <class Dot>
static void run_head(const Net& net, const uint8_t* p) {
  const WaveNetShape& s = net.s;
  const Scratch& k = net.scratch;
  const Matrix head = read_matrix(s, p, pad_lanes(s.head), 1, s.skip);
  Matrix out = read_matrix(s, p, net.class_rows, 1, s.head);
  out.follow = net.layers;
  relu(k.h, k.x.from(net.x_rows), net.skip_rows);
  put_all(k.head, head.bias, head.rows);
  multiply<Dot>(net, head, k.h, k.head, k.head);
  relu(k.h, k.head, head.rows);
  put_all(k.logits, out.bias, out.rows);
  multiply<Dot>(net, out, k.h, k.logits, k.logits);
}

template <class Dot>
static void run(const Net& net) {
  const WaveNetShape& s = net.s;
  const WaveNetJob& job = net.job;
  const Scratch& k = net.scratch;
  for (int64_t t = 0; t < job.n; t++) {
    for (int64_t b = 0; b < job.batch; b++) {
      float* state = job.state + b * job.state_stride;
      put(k.x, b, net.embedding + int64_t(state[2]) * net.x_rows, net.x_rows);
      put(k.x.from(net.x_rows), b, k.skip, net.skip_rows);
      if (s.condition) {
        const int64_t position = state_position(state);
        if (t == 0 || position % s.hop == 0) project_condition(net, b, position / s.hop - (position - t) / s.hop);
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
      if (needs_logits) take(k.row, k.logits, b, net.class_rows);
      if (job.logits) memcpy(job.logits + (b * job.n + t) * s.n_class, k.row, size_t(s.n_class) * sizeof(float));
      const int32_t code = t < job.forced ? job.codes[b * job.forced + t]
                                          : draw(k.row, s.n_class, job.uniforms[b * job.n + t], job.temperature);
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
  const auto floats = [&](int64_t n) { return (at += n) - n; };
  const auto streams = [&](int64_t rows) { return Streams{floats(job.batch * rows), job.batch}; };
  Scratch& k = net.scratch;
  k.base = streams(s.n_layer * net.z_rows);
  k.past = streams((s.width - 1) * net.x_rows);
  k.z = streams(net.z_rows);
  k.h = streams(s.max_inputs());
  k.x = streams(net.x_rows + net.skip_rows);
  k.head = streams(pad_lanes(s.head));
  k.logits = streams(net.class_rows);
  k.packed = floats(job.batch * s.max_inputs());
  k.scales = floats(job.batch * pad_lanes(s.width));
  k.slots = reinterpret_cast<int32_t*>(floats(job.batch * pad_lanes(s.n_layer)));
  k.row = floats(net.class_rows);
  k.skip = floats(net.skip_rows);
  sum_skip_biases(net);

  for (int64_t b = 0; b < job.batch; b++) {
    const int64_t position = state_position(job.state + b * job.state_stride);
    for (int64_t layer = 0; layer < s.n_layer; layer++) {
      const int64_t length = s.ring_slots(layer);
      k.slots[b * s.n_layer + layer] = length ? int32_t(position % length) : 0;
    }
    if (!s.condition) project_condition(net, b, -1);
  }
  if (s.dtype == kFloat32) run<DotFloat32>(net);
  if (s.dtype == kBFloat16) run<DotBFloat16>(net);
  if (s.dtype == kInt8) run<DotInt8>(net);
  if (s.dtype == kFloat16) run<DotFloat16>(net);
}

}  // namespace AUDIOKERNELS_ISA
}  // namespace audiokernels
