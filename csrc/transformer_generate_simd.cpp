// The sample loop of transformer generation, compiled once per instruction set.
//
// Keys lie in the lanes when scores are made, channels when values are summed: no sum runs over the lanes, and every
// sum has one order, whatever their count. At batch 1 a step is bound by reading the cache and the weights.
#include <cmath>

#include "packed_product.h"
#include "transformer_generate.h"

namespace audiokernels {
namespace AUDIOKERNELS_ISA {
namespace {

constexpr float kEpsilon = 1e-5f;  // of the norms
constexpr double kRotaryBase = 10000.0;
constexpr int kChains = 4;        // sums of values that run side by side
constexpr int64_t kAhead = 1024;  // the cache is fetched so many numbers ahead: the hardware stops at a page's end
constexpr float kFaint = -40.0f;  // a weight of e^-40 of the largest is lost in float32, and would lead to subnormals

// Everything a thread needs, carved out of job.scratch.
struct Scratch {
  Streams base;      // projected condition
  Streams x;         // embd rows
  Streams h;         // normalised x
  Streams qkv;       // 3 * heads_rows
  Streams attended;  // heads_rows
  Streams inner;     // of the MLP
  Streams logits;    // class rows
  Streams fused;     // fuse rows
  Streams c, z;      // of the context network
  Workspace workspace;
  float* row;     // some rows of one stream
  float* heads;   // q, k, v of one stream
  float* scores;  // capacity
  float *cos, *sin;
  double* frequency;
};

struct Net {
  const TransformerShape& s;
  const GenerationJob& job;
  const float *embedding, *condition, *context;
  const uint8_t* matrices;
  int64_t embd, heads, class_rows, capacity;
  Scratch scratch;

  __attribute__((always_inline)) float* state(int64_t b) const { return job.state + b * job.state_stride; }
  __attribute__((always_inline)) int64_t position(int64_t b) const { return state_position(state(b)); }
};

// ---- the cache: 32 bits hold one float32, or the bfloat16 of two neighbours (channels of a key, keys of a value) ----

struct CacheFloat32 {
  static constexpr int kGroup = 1;
  AK_MEMBER VFloat add(VFloat acc, const float* cell, const float* factor) {
    return fma(load(cell), splat(factor[0]), acc);
  }
  AK_MEMBER void write(float* cell, int64_t, float value) { *cell = value; }
};

struct CacheBFloat16 {
  static constexpr int kGroup = 2;
  AK_MEMBER VFloat add(VFloat acc, const float* cell, const float* factor) {
    const VInt pair = load_int(cell);
    acc = fma((VFloat)(pair << 16), splat(factor[0]), acc);
    return fma((VFloat)(pair & splat_int(int32_t(0xFFFF0000))), splat(factor[1]), acc);
  }
  AK_MEMBER void write(float* cell, int64_t member, float value) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const uint16_t half = value == value ? uint16_t(rounded) : uint16_t(0x7FC0);
    memcpy(reinterpret_cast<uint16_t*>(cell) + member, &half, sizeof half);
  }
};

// The key and value of a position, into their slot.
template <class Cache>
static void remember(const Net& net, float* keys, float* values, int64_t slot) {
  constexpr int g = Cache::kGroup;
  const int64_t d = net.s.headdim(), d16 = net.s.head_rows(), slots = net.capacity;
  for (int64_t head = 0; head < net.s.n_head; head++) {
    const float* k = net.scratch.heads + net.heads + head * d16;
    const float* v = k + net.heads;
    float* block = keys + (head * slots + slot / kKeyBlock * kKeyBlock) * d / g + slot % kKeyBlock;
    for (int64_t i = 0; i < d; i++) Cache::write(block + i / g * kKeyBlock, i % g, k[i]);
    float* cells = values + (head * slots / g + slot / g) * d16;
    for (int64_t i = 0; i < d16; i++) Cache::write(cells + i, slot % g, v[i]);
  }
}

// scores[j] = q . k_j of the first `used` slots, a multiple of kKeyBlock.
template <class Cache>
static void score(const float* q, const float* keys, int64_t d, int64_t used, float* scores) {
  constexpr int n = kKeyBlock / kLanes;
  for (int64_t j = 0; j < used; j += kKeyBlock) {
    VFloat acc[n] = {};
    for (int64_t i = 0; i < d; i += Cache::kGroup, keys += kKeyBlock) {
      for (int l = 0; l < kKeyBlock; l += kRowLanes) __builtin_prefetch(keys + kAhead + l);
      for (int l = 0; l < n; l++) acc[l] = Cache::add(acc[l], keys + l * kLanes, q + i);
    }
    for (int l = 0; l < n; l++) store(scores + j + l * kLanes, acc[l]);
  }
}

AK_INLINE void forget(float* scores, int64_t from, int64_t to) {
  for (int64_t j = from; j < to; j++) scores[j] = -__builtin_inff();
}

// Scores of the slots that the query at `position` does not see: minus infinity.
static void mask(const Net& net, int64_t position, int64_t used, float* scores) {
  if (position < net.s.window) return forget(scores, position + 1, used);
  const int64_t first = (position + 1) % net.capacity, end = first + net.capacity - net.s.window;
  forget(scores, first, end < used ? end : used);
  if (end > net.capacity) forget(scores, 0, end - net.capacity);
}

// scores -> weights exp(score - largest), whose sum is added to `sums` (one a lane of 16).
AK_INLINE void weigh(float* scores, VFloat largest, VFloat* sums) {
  for (int l = 0; l < kParts; l++) {
    const VFloat x = load(scores + l * kLanes) - largest;
    const VFloat weight = x < splat(kFaint) ? splat(0.0f) : exp_clamped(x, -kFaint);
    store(scores + l * kLanes, weight);
    sums[l] += weight;
  }
}

// out[16 * G] = the values of the first `used` slots, weighted by the softmax of their scores. The first call for a
// head makes weights of the scores, 16 at a time: their arithmetic hides behind the reading of the values.
template <class Cache, int G, bool first>
static void sum_values(const TransformerShape& s, const float* values, int64_t used, float* scores, float* scale,
                       float* out) {
  constexpr int n = G * kParts, g = Cache::kGroup;
  const int64_t d16 = s.head_rows();
  VFloat largest = load(scores), sums[kParts] = {}, acc[kChains][n] = {};
  if constexpr (first) {
    for (int64_t j = kLanes; j < used; j += kLanes) largest = max(load(scores + j), largest);
    largest = splat(reduce_max(largest));
  }
  for (int64_t j = 0; j < used; j += kRowLanes) {
    if constexpr (first) weigh(scores + j, largest, sums);
    for (int64_t i = j; i < j + kRowLanes; i += kChains * g, values += kChains * d16)
      for (int chain = 0; chain < kChains; chain++) {
        const float* cells = values + chain * d16;
        for (int l = 0; l < G; l++) __builtin_prefetch(cells + kAhead + l * kRowLanes);
        for (int l = 0; l < n; l++)
          acc[chain][l] = Cache::add(acc[chain][l], cells + l * kLanes, scores + i + chain * g);
      }
  }
  if constexpr (first) {
    float lanes[kRowLanes];
    for (int l = 0; l < kParts; l++) store(lanes + l * kLanes, sums[l]);
    *scale = 1.0f / sum_block(lanes);
  }
  for (int l = 0; l < n; l++)
    store(out + l * kLanes, ((acc[0][l] + acc[1][l]) + (acc[2][l] + acc[3][l])) * splat(*scale));
}

// Turns channel i of every head with channel i + headdim / 2.
static void rotate(const TransformerShape& s, float* heads, const float* cos, const float* sin) {
  const int64_t d = s.headdim(), d16 = s.head_rows();
  for (int64_t head = 0; head < s.n_head; head++, heads += d16)
    for (int64_t i = 0; i < d / 2; i++) {
      const float a = heads[i], b = heads[i + d / 2];
      heads[i] = a * cos[i] - b * sin[i];
      heads[i + d / 2] = b * cos[i] + a * sin[i];
    }
}

static void find_angles(const Net& net, int64_t b) {
  const double position = double(net.position(b));
  const int64_t count = net.s.angles();
  for (int64_t i = 0; i < count; i++) {
    const double angle = position * net.scratch.frequency[i];
    net.scratch.cos[b * count + i] = float(::cos(angle));
    net.scratch.sin[b * count + i] = float(::sin(angle));
  }
}

// qkv -> attended, of every stream.
template <class Cache>
static void attend(const Net& net, int64_t ring_offset) {
  const TransformerShape& s = net.s;
  const Scratch& k = net.scratch;
  const int64_t d = s.headdim(), d16 = s.head_rows();
  for (int64_t b = 0; b < net.job.batch; b++) {
    float* keys = net.state(b) + ring_offset;
    float* values = keys + s.key_floats();
    const int64_t position = net.position(b);
    take(k.heads, k.qkv, b, 3 * net.heads);
    if (s.positions == kRotary) {
      rotate(s, k.heads, k.cos + b * s.angles(), k.sin + b * s.angles());
      rotate(s, k.heads + net.heads, k.cos + b * s.angles(), k.sin + b * s.angles());
    }
    remember<Cache>(net, keys, values, position % net.capacity);
    const int64_t written = position + 1 < net.capacity ? position + 1 : net.capacity;
    const int64_t used = (written + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
    for (int64_t head = 0; head < s.n_head; head++) {
      const int64_t cells = head * net.capacity / Cache::kGroup;
      score<Cache>(k.heads + head * d16, keys + cells * d, d, used, k.scores);
      mask(net, position, used, k.scores);
      const float* v = values + cells * d16;
      float *out = k.row + head * d16, scale = 0.0f;
      if (d16 == kRowLanes) {
        sum_values<Cache, 1, true>(s, v, used, k.scores, &scale, out);
      } else {
        sum_values<Cache, 2, true>(s, v, used, k.scores, &scale, out);
        for (int64_t i = 32; i < d16; i += kRowLanes)
          sum_values<Cache, 1, false>(s, v + i, used, k.scores, &scale, out + i);
      }
    }
    put(k.attended, b, k.row, net.heads);
  }
}

// ---- the parts around attention ----

// Centred and scaled: the affine part is in the matrix that follows.
static void normalize(const Net& net, const Streams& out, const Streams& in) {
  const int64_t n = net.s.n_embd, rows = net.embd;
  const float count = float(n);
  for (int64_t b = 0; b < in.batch; b++) {
    float lanes[kRowLanes];
    VFloat sums[kParts] = {};
    for (int64_t i = 0; i < rows; i += kRowLanes)
      for (int l = 0; l < kParts; l++) sums[l] += load(in.at(i, b) + l * kLanes);
    for (int l = 0; l < kParts; l++) store(lanes + l * kLanes, sums[l]), sums[l] = VFloat{};
    const VFloat mean = splat(sum_block(lanes) / count);
    for (int64_t i = 0; i < rows; i += kRowLanes) {
      float* at = out.at(i, b);
      for (int l = 0; l < kParts; l++) store(at + l * kLanes, load(in.at(i, b) + l * kLanes) - mean);
      for (int64_t j = n - i; j < kRowLanes; j++) at[j] = 0.0f;  // padding
      for (int l = 0; l < kParts; l++) sums[l] = fma(load(at + l * kLanes), load(at + l * kLanes), sums[l]);
    }
    for (int l = 0; l < kParts; l++) store(lanes + l * kLanes, sums[l]);
    const VFloat scale = splat(1.0f / __builtin_sqrtf(sum_block(lanes) / count + kEpsilon));
    for (int64_t i = 0; i < rows; i += kRowLanes)
      for (int l = 0; l < kParts; l++) store(out.at(i, b) + l * kLanes, load(out.at(i, b) + l * kLanes) * scale);
  }
}

// out = matrix * in + bias
template <class Dot>
static void affine(const Net& net, const Matrix& m, const Streams& in, const Streams& out) {
  put_all(out, m.bias, m.rows);
  multiply<Dot>(net.scratch.workspace, m, in, out, out);
}

// x += matrix * in + bias
template <class Dot>
static void add_affine(const Net& net, const Matrix& m, const Streams& in, const Streams& x) {
  add_all(x, m.bias, m.rows);
  multiply<Dot>(net.scratch.workspace, m, in, x, x);
}

// The code of the context network into k.c: the rings of its layers move by a step.
template <class Dot>
static void run_context(const Net& net, const uint8_t*& p, int64_t& ring_offset) {
  const TransformerShape& s = net.s;
  const Scratch& k = net.scratch;
  const int64_t rows = pad_lanes(s.context);
  for (int64_t b = 0; b < net.job.batch; b++) put(k.c, b, net.context + int64_t(net.state(b)[2]) * rows, rows);
  for (int64_t layer = 0, d = 1; layer < s.n_width; d *= s.widths[layer++]) {
    const int64_t width = s.widths[layer], length = (width - 1) * d;
    const Matrix m = read_matrix(s.dtype, p, s.context_rows(layer), width, s.context);
    for (int64_t b = 0; length && b < net.job.batch; b++) {
      float* ring = net.state(b) + ring_offset;
      const int64_t oldest = net.position(b) % length;  // where the newest will be written
      for (int64_t tap = 0, slot = oldest; tap + 1 < width;
           tap++, slot = slot + d < length ? slot + d : slot + d - length)
        put(k.workspace.past.from(tap * rows), b, ring + slot * rows, rows);
      take(ring + oldest * rows, k.c, b, rows);
    }
    affine<Dot>(net, m, k.c, k.z);
    relu(k.c, k.z, m.rows);
    ring_offset += length * rows;
  }
}

// Bias-free projection of the frame that stream b is in.
static void project_condition(const Net& net, int64_t b, int64_t frame) {
  const float* c = net.job.condition + (b * net.job.frames + frame) * net.s.condition;
  for (int64_t i = 0; i < net.embd; i += kRowLanes)
    for (int l = 0; l < kRowLanes; l += kLanes) {
      VFloat sum{};
      for (int64_t j = 0; j < net.s.condition; j++)
        sum = fma(load(net.condition + j * net.embd + i + l), splat(c[j]), sum);
      store(net.scratch.base.at(i, b) + l, sum);
    }
}

// What the first layer reads.
template <class Dot>
static void embed(const Net& net, int64_t t, const uint8_t*& p, int64_t& ring_offset) {
  const TransformerShape& s = net.s;
  const Scratch& k = net.scratch;
  const int64_t n = net.embd * net.job.batch, angles = s.angles();
  for (int64_t b = 0; b < net.job.batch; b++) {
    const int64_t position = net.position(b);
    put(k.x, b, net.embedding + int64_t(net.state(b)[2]) * net.embd, net.embd);
    if (s.condition && (t == 0 || position % s.hop == 0))
      project_condition(net, b, position / s.hop - (position - t) / s.hop);
    find_angles(net, b);
  }
  if (s.n_width) {
    run_context<Dot>(net, p, ring_offset);
    affine<Dot>(net, read_matrix(s.dtype, p, s.fuse_rows(), 1, s.code), k.c, k.fused);
    for (int64_t i = 0; s.fusion == kFuseAdd && i < n; i += kLanes)
      store(k.x.data + i, load(k.x.data + i) + load(k.fused.data + i));
    for (int64_t i = 0; s.fusion == kFuseFilm && i < n; i += kLanes) {
      const VFloat x = load(k.x.data + i);
      store(k.x.data + i, fma(x, load(k.fused.data + i), x) + load(k.fused.data + n + i));
    }
  }
  for (int64_t i = 0; s.condition && i < n; i += kLanes)
    store(k.x.data + i, load(k.x.data + i) + load(k.base.data + i));
  if (s.positions == kSinusoidal)
    for (int64_t b = 0; b < net.job.batch; b++)
      for (int64_t i = 0; i < s.n_embd; i++) {
        const int64_t at = b * angles + (i < angles ? i : i - angles);
        k.x.at(i / kRowLanes * kRowLanes, b)[i % kRowLanes] += i < angles ? k.sin[at] : k.cos[at];
      }
}

// Causal Haar pooling: the mean of the last 2^level rows of every channel.
static void pool(const Net& net, int64_t ring_offset) {
  float* row = net.scratch.row;
  for (int64_t b = 0; b < net.job.batch; b++) {
    float* ring = net.state(b) + ring_offset;
    take(row, net.scratch.x, b, net.embd);
    int64_t channel = 0;
    for (int64_t run = 0; run < net.s.n_haar; run++) {
      const int64_t level = net.s.haar[2 * run], count = net.s.haar[2 * run + 1], slots = int64_t{1} << level;
      float* part = row + channel;
      channel += count;
      if (level == 0) continue;
      memcpy(ring + (net.position(b) & (slots - 1)) * count, part, size_t(count) * sizeof(float));
      for (int64_t i = 0; i < count; i++) part[i] = 0.0f;
      for (int64_t slot = 0; slot < slots; slot++, ring += count)
        for (int64_t i = 0; i < count; i++) part[i] += ring[i];
      for (int64_t i = 0; i < count; i++) part[i] *= 1.0f / float(slots);
    }
    put(net.scratch.x, b, row, net.embd);
  }
}

template <class Dot, class Cache>
static void run(const Net& net) {
  const TransformerShape& s = net.s;
  const GenerationJob& job = net.job;
  const Scratch& k = net.scratch;
  for (int64_t t = 0; t < job.n; t++) {
    const uint8_t* p = net.matrices;
    int64_t ring_offset = kStateHeader;
    embed<Dot>(net, t, p, ring_offset);
    for (int64_t layer = 0; layer < s.n_layer; layer++) {
      const Matrix qkv = read_matrix(s.dtype, p, 3 * net.heads, 1, s.n_embd);
      const Matrix proj = read_matrix(s.dtype, p, net.embd, 1, net.heads);
      const Matrix up = read_matrix(s.dtype, p, pad_lanes(s.n_inner), 1, s.n_embd);
      const Matrix down = read_matrix(s.dtype, p, net.embd, 1, s.n_inner);
      normalize(net, k.h, k.x);
      affine<Dot>(net, qkv, k.h, k.qkv);
      attend<Cache>(net, ring_offset);
      ring_offset += s.key_floats() + s.value_floats();
      add_affine<Dot>(net, proj, k.attended, k.x);
      normalize(net, k.h, k.x);
      affine<Dot>(net, up, k.h, k.inner);
      relu(k.inner, k.inner, up.rows);
      add_affine<Dot>(net, down, k.inner, k.x);
      if (s.n_haar) {
        pool(net, ring_offset);
        ring_offset += s.haar_floats();
      }
    }
    if (needs_logits(job, t)) {
      Matrix out = read_matrix(s.dtype, p, net.class_rows, 1, s.n_embd);
      out.follow = net.matrices;
      normalize(net, k.h, k.x);
      affine<Dot>(net, out, k.h, k.logits);
      for (int64_t i = 0; s.fusion == kFuseLogits && i < net.class_rows * job.batch; i += kLanes)
        store(k.logits.data + i, load(k.logits.data + i) + load(k.fused.data + i));
    }
    finish_step(job, t, k.logits, k.row);
  }
}

}  // namespace

void transformer_run(const TransformerShape& s, const GenerationJob& job) {
  Net net{s,
          job,
          nullptr,
          nullptr,
          nullptr,
          nullptr,
          pad_lanes(s.n_embd),
          s.heads_rows(),
          pad_lanes(s.n_class),
          s.capacity(),
          {}};
  net.embedding = reinterpret_cast<const float*>(job.pack);
  net.condition = net.embedding + s.n_class * net.embd;
  net.context = net.condition + s.condition * net.embd;
  net.matrices = job.pack + s.table_bytes();

  float* at = job.scratch;
  const auto floats = [&](int64_t n) { return (at += n) - n; };
  const auto streams = [&](int64_t rows) { return Streams{floats(job.batch * rows), job.batch}; };
  const int64_t context = pad_lanes(s.context > s.code ? s.context : s.code);
  const int64_t angles = s.angles();
  Scratch& k = net.scratch;
  k.base = streams(net.embd);
  k.x = streams(net.embd);
  k.h = streams(net.embd);
  k.qkv = streams(3 * net.heads);
  k.attended = streams(net.heads);
  k.inner = streams(pad_lanes(s.n_inner));
  k.logits = streams(net.class_rows);
  k.fused = streams(s.fuse_rows());
  k.c = streams(context);
  k.z = streams(context);
  k.workspace.past = streams(s.most_width() * pad_lanes(s.context));
  k.workspace.scales = floats(job.batch * s.most_width() * kRowLanes);
  k.workspace.packed = floats(job.batch * s.max_inputs());
  k.scores = floats(net.capacity);
  k.heads = floats(3 * net.heads);
  k.row = floats(s.max_inputs());
  k.cos = floats(job.batch * pad_lanes(angles));
  k.sin = floats(job.batch * pad_lanes(angles));
  k.frequency = reinterpret_cast<double*>(floats(2 * pad_lanes(angles)));
  const double channels = double(s.positions == kRotary ? s.headdim() : s.n_embd);
  for (int64_t i = 0; i < angles; i++) k.frequency[i] = ::pow(kRotaryBase, -2.0 * double(i) / channels);

  const auto run_with = [&](auto dot) {
    using Dot = decltype(dot);
    s.cache == kFloat32 ? run<Dot, CacheFloat32>(net) : run<Dot, CacheBFloat16>(net);
  };
  if (s.dtype == kFloat32) run_with(DotFloat32{});
  if (s.dtype == kBFloat16) run_bfloat16(job.batch, run_with);
  if (s.dtype == kInt8) run_with(DotInt8{});  // with tiles it was slower: attention takes most of the time
}

}  // namespace AUDIOKERNELS_ISA
}  // namespace audiokernels
