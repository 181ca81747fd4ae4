// The sample loop of WaveNet generation, compiled once per instruction set.
#include "packed_product.h"
#include "wavenet_generate.h"

namespace audiokernels {
namespace AUDIOKERNELS_ISA {
namespace {

// Everything a thread needs, carved out of job.scratch.
struct Scratch {
  Streams base;    // bias + projected condition: n_layer times gate_rows
  Streams z;       // gate_rows
  Streams h;       // the gate's output, and the inputs of the head's matrices
  Streams x;       // residual_rows | skip_rows
  Streams head;    // head rows
  Streams logits;  // class rows
  float* row;      // the logits of one stream
  float* skip;     // the skip biases of all layers, summed
  int32_t* slots;  // (batch, n_layer): the oldest slot of each layer's ring, which is the next to be written
  Workspace workspace;
};

struct Net {
  const WaveNetShape& s;
  const GenerationJob& job;
  const float *embedding, *condition;
  const uint8_t* layers;
  int64_t x_rows, z_rows, skip_rows, class_rows;
  Scratch scratch;
};

static void sum_skip_biases(const Net& net) {
  const uint8_t* p = net.layers;
  for (int64_t i = 0; i < net.skip_rows; i++) net.scratch.skip[i] = 0.0f;
  for (int64_t layer = 0; layer < net.s.n_layer; layer++) {
    read_matrix(net.s.dtype, p, net.z_rows, net.s.width, net.s.residual);
    const Matrix mix = read_matrix(net.s.dtype, p, net.s.mix_rows(layer), 1, net.s.hidden);
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
    const Matrix conv = read_matrix(s.dtype, p, net.z_rows, s.width, s.residual);
    read_matrix(s.dtype, p, s.mix_rows(layer), 1, s.hidden);
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
  const Matrix conv = read_matrix(s.dtype, p, net.z_rows, s.width, s.residual);
  const Matrix mix = read_matrix(s.dtype, p, s.mix_rows(layer), 1, s.hidden);
  const int64_t first = layer + 1 < s.n_layer ? 0 : net.x_rows;  // the last layer leaves the residual alone
  const int32_t d = int32_t(s.dilations[layer]), length = int32_t(s.ring_slots(layer));
  for (int64_t b = 0; b < net.job.batch; b++) {
    int32_t& oldest = k.slots[b * s.n_layer + layer];
    float* ring = net.job.state + b * net.job.state_stride + ring_offset;
    int32_t slot = oldest;  // the oldest tap lies where the newest will be written
    for (int64_t tap = 0; tap + 1 < s.width; tap++) {
      put(k.workspace.past.from(tap * net.x_rows), b, ring + int64_t(slot) * net.x_rows, net.x_rows);
      slot += d;
      if (slot >= length) slot -= length;
    }
    if (length > 0) {
      take(ring + int64_t(oldest) * net.x_rows, k.x, b, net.x_rows);
      if (++oldest == length) oldest = 0;
    }
  }
  fetch_taps(net, layer + 1, ring_offset + length * net.x_rows);
  multiply<Dot>(k.workspace, conv, k.x, k.base.from(layer * net.z_rows), k.z);
  const int64_t half = net.z_rows / 2 * net.job.batch;
  for (int64_t i = 0; i < half; i += kLanes) store(k.h.data + i, gate(load(k.z.data + i), load(k.z.data + half + i)));
  if (first == 0) add_all(k.x, mix.bias, net.x_rows);
  multiply<Dot>(k.workspace, mix, k.h, k.x.from(first), k.x.from(first));
}

// Skip sums -> logits of every stream.
template <class Dot>
static void run_head(const Net& net, const uint8_t* p) {
  const WaveNetShape& s = net.s;
  const Scratch& k = net.scratch;
  const Matrix head = read_matrix(s.dtype, p, pad_lanes(s.head), 1, s.skip);
  Matrix out = read_matrix(s.dtype, p, net.class_rows, 1, s.head);
  out.follow = net.layers;
  relu(k.h, k.x.from(net.x_rows), net.skip_rows);
  put_all(k.head, head.bias, head.rows);
  multiply<Dot>(k.workspace, head, k.h, k.head, k.head);
  relu(k.h, k.head, head.rows);
  put_all(k.logits, out.bias, out.rows);
  multiply<Dot>(k.workspace, out, k.h, k.logits, k.logits);
}

template <class Dot>
static void run(const Net& net) {
  const WaveNetShape& s = net.s;
  const GenerationJob& job = net.job;
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
    if (needs_logits(job, t)) run_head<Dot>(net, p);
    finish_step(job, t, k.logits, k.row);
  }
}

}  // namespace

void wavenet_run(const WaveNetShape& s, const GenerationJob& job) {
  Net net{s, job, nullptr, nullptr, nullptr, s.residual_rows(), s.gate_rows(), s.skip_rows(), pad_lanes(s.n_class), {}};
  net.embedding = reinterpret_cast<const float*>(job.pack);
  net.condition = net.embedding + s.n_class * net.x_rows;
  net.layers = job.pack + s.table_bytes();

  float* at = job.scratch;
  const auto floats = [&](int64_t n) { return (at += n) - n; };
  const auto streams = [&](int64_t rows) { return Streams{floats(job.batch * rows), job.batch}; };
  Scratch& k = net.scratch;
  k.base = streams(s.n_layer * net.z_rows);
  k.workspace.past = streams((s.width - 1) * net.x_rows);
  k.z = streams(net.z_rows);
  k.h = streams(s.max_inputs());
  k.x = streams(net.x_rows + net.skip_rows);
  k.head = streams(pad_lanes(s.head));
  k.logits = streams(net.class_rows);
  k.workspace.packed = floats(job.batch * s.max_inputs());
  k.workspace.scales = floats(job.batch * pad_lanes(s.width));
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
  const auto run_with = [&](auto dot) { run<decltype(dot)>(net); };
  if (s.dtype == kFloat32) run_with(DotFloat32{});
  if (s.dtype == kBFloat16) run_bfloat16(job.batch, run_with);
  if (s.dtype == kInt8) run_int8(job.batch, run_with);
  if (s.dtype == kFloat16) run_with(DotFloat16{});
}

}  // namespace AUDIOKERNELS_ISA
}  // namespace audiokernels
