// The sample loop of WaveNet generation, compiled once per instruction set.
#include "wavenet_generate.h"
#include "wavenet_product.h"

namespace audiokernels {
namespace AUDIOKERNELS_ISA {
namespace {

// Everything a thread needs, carved out of job.scratch.
struct Scratch {
  Rows base;     // bias + projected condition: (n_layer, gate_rows) a stream
  float* skip;   // the skip biases of all layers, summed
  Rows in;       // inputs of the matrix at work: (taps, inputs padded)
  Rows z;        // gate_rows
  Rows x;        // residual_rows | skip_rows
  Rows head;     // head rows
  Rows logits;   // class rows
  Rows slots;    // int32: the oldest slot of each layer's ring, which is the next to be written
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
      for (int64_t i = 0; i < net.z_rows; i += kLanes) store(base + i, fma(load(w + i), splat(c[k]), load(base + i)));
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
      if (job.logits) memcpy(job.logits + (b * job.n + t) * s.n_class, k.logits[b], size_t(s.n_class) * sizeof(float));
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
