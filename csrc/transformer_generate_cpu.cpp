// Transformer generation on the CPU: sizes, registration. The loops are transformer_generate_simd.cpp.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "generation_call.h"
#include "transformer_generate.h"

namespace audiokernels {

// ---- the packed layout, as audiokernels/transformer_pack.py writes it ----

namespace {
constexpr int64_t kShapeInts = 15;  // before the widths
constexpr int64_t kMaxSlots = int64_t{1} << 24;
constexpr int64_t kMaxLevel = 20;
}  // namespace

int64_t TransformerShape::headdim() const { return n_embd / n_head; }
int64_t TransformerShape::head_rows() const { return pad_lanes(headdim()); }
int64_t TransformerShape::heads_rows() const { return n_head * head_rows(); }
int64_t TransformerShape::capacity() const { return (window + kKeyBlock - 1) / kKeyBlock * kKeyBlock; }
int64_t TransformerShape::angles() const { return (positions == kRotary ? headdim() : n_embd + 1) / 2; }
int64_t TransformerShape::context_rows(int64_t layer) const { return pad_lanes(layer + 1 < n_width ? context : code); }
int64_t TransformerShape::fuse_rows() const {
  switch (fusion) {
    case kFuseLogits: return pad_lanes(n_class);
    case kFuseAdd: return pad_lanes(n_embd);
    case kFuseFilm: return 2 * pad_lanes(n_embd);
    default: return 0;
  }
}
int64_t TransformerShape::table_bytes() const {
  return 4 * ((n_class + condition) * pad_lanes(n_embd) + n_class * pad_lanes(context));
}
int64_t TransformerShape::pack_bytes() const {
  int64_t bytes = table_bytes() + matrix_bytes(dtype, pad_lanes(n_class), 1, n_embd);
  for (int64_t l = 0; l < n_width; l++) bytes += matrix_bytes(dtype, context_rows(l), widths[l], context);
  if (n_width) bytes += matrix_bytes(dtype, fuse_rows(), 1, code);
  const int64_t embd = pad_lanes(n_embd);
  return bytes +
         n_layer * (matrix_bytes(dtype, 3 * heads_rows(), 1, n_embd) + matrix_bytes(dtype, embd, 1, heads_rows()) +
                    matrix_bytes(dtype, pad_lanes(n_inner), 1, n_embd) + matrix_bytes(dtype, embd, 1, n_inner));
}
int64_t TransformerShape::key_floats() const { return n_head * capacity() * headdim() / (int64_t{1} << cache); }
int64_t TransformerShape::value_floats() const { return n_head * capacity() * head_rows() / (int64_t{1} << cache); }
int64_t TransformerShape::haar_floats() const {
  int64_t floats = 0;
  for (int64_t i = 0; i < n_haar; i++)
    if (haar[2 * i]) floats += haar[2 * i + 1] << haar[2 * i];
  return floats;
}
int64_t TransformerShape::state_floats() const {
  int64_t slots = 0, d = 1;
  for (int64_t l = 0; l < n_width; d *= widths[l++]) slots += (widths[l] - 1) * d;
  return kStateHeader + slots * pad_lanes(context) + n_layer * (key_floats() + value_floats() + haar_floats());
}
int64_t TransformerShape::most_width() const { return n_width ? *std::max_element(widths, widths + n_width) : 1; }
int64_t TransformerShape::max_inputs() const {
  return std::max({most_width() * pad_lanes(context), pad_lanes(code), pad_lanes(n_embd), heads_rows(),
                   pad_lanes(n_inner), pad_lanes(n_class)});
}
int64_t TransformerShape::scratch_floats(int64_t batch) const {
  const int64_t embd = pad_lanes(n_embd), context = pad_lanes(std::max(this->context, code));
  const int64_t rows = 4 * embd + 4 * heads_rows() + pad_lanes(n_inner) + pad_lanes(n_class) + fuse_rows() +
                       2 * context + most_width() * (pad_lanes(this->context) + kRowLanes) + 2 * kRowLanes;
  return batch * (rows + max_inputs()) + capacity() + 3 * heads_rows() + max_inputs() + embd + 2 * kRowLanes;
}

TransformerShape transformer_shape(const int64_t* p, int64_t count) {
  const auto require = [](bool ok, const char* rule) {
    if (!ok) throw std::invalid_argument(std::string("shape: ") + rule);
  };
  require(count >= kShapeInts, "fifteen sizes, then widths and levels");
  TransformerShape s{p[0], p[1],  p[2],  p[3],  p[4],  p[5],  p[6],           p[7],    p[8],
                     p[9], p[10], p[11], p[12], p[13], p[14], p + kShapeInts, nullptr, 0};
  require(s.n_width >= 0 && s.n_width <= count - kShapeInts, "as many widths as it says");
  require((count - kShapeInts - s.n_width) % 2 == 0, "levels with their counts");
  s.haar = s.widths + s.n_width;
  s.n_haar = (count - kShapeInts - s.n_width) / 2;
  require(s.dtype >= kFloat32 && s.dtype <= kInt8, "dtype must be 0, 1 or 2");
  require(s.cache == kFloat32 || s.cache == kBFloat16, "cache must be 0 or 1");
  require(s.positions == kRotary || s.positions == kSinusoidal, "positions must be 0 or 1");
  require(s.fusion >= kNoFusion && s.fusion <= kFuseFilm && (s.fusion == kNoFusion) == (s.n_width == 0),
          "fusion must be 1, 2 or 3 with a context network, else 0");
  for (int64_t size : {s.n_head, s.n_embd, s.n_inner})
    require(size >= 1 && size <= kMaxInputs, "channels and heads must be 1 .. 65536");
  require(s.n_embd % s.n_head == 0 && s.headdim() % 2 == 0 && s.headdim() >= 8 && s.headdim() <= 256,
          "heads must have an even number of channels, 8 .. 256");
  require(s.n_layer >= 1 && s.n_layer <= 1000, "n_layer must be 1 .. 1000");
  require(s.n_class >= 2 && s.n_class <= 32768, "n_class must be 2 .. 32768");
  require(s.window >= 1 && s.window <= kMaxSlots, "window out of range");
  require(s.condition >= 0 && s.condition <= kMaxInputs, "condition channels must be 0 .. 65536");
  require(s.hop >= 1, "hop must be >= 1");
  int64_t seen = 1;
  for (int64_t l = 0; l < s.n_width; l++) {
    require(s.widths[l] >= 1 && s.widths[l] <= kMaxSlots / seen, "widths out of range");
    seen *= s.widths[l];
  }
  const int64_t least = s.n_width ? 1 : 0, most = s.n_width ? kMaxInputs : 0;
  for (int64_t size : {s.context, s.code})
    require(size >= least && size <= most, "context channels must be 1 .. 65536 with a context network, else 0");
  int64_t channels = 0;
  for (int64_t i = 0; i < s.n_haar; i++) {
    require(s.haar[2 * i] >= 0 && s.haar[2 * i] <= kMaxLevel, "levels must be 0 .. 20");
    require(s.haar[2 * i + 1] >= 1 && s.haar[2 * i + 1] <= s.n_embd - channels, "counts must sum to n_embd");
    channels += s.haar[2 * i + 1];
  }
  require(s.n_haar == 0 || channels == s.n_embd, "counts must sum to n_embd");
  return s;
}

namespace {

void run_part(const TransformerShape& shape, const GenerationJob& job) {
#define AUDIOKERNELS_CASE(name) \
  case Isa::name: return name::transformer_run(shape, job);
  switch (isa()) {
    AUDIOKERNELS_FOR_EACH_ISA(AUDIOKERNELS_CASE)
    default: return generic::transformer_run(shape, job);
  }
#undef AUDIOKERNELS_CASE
}

// ---- the op ----

std::tuple<Tensor, Tensor> transformer_generate(Tensor weights, std::vector<int64_t> shape_ints, Tensor state,
                                                Tensor uniforms, std::optional<Tensor> codes,
                                                std::optional<Tensor> condition, double temperature, bool return_logits,
                                                std::optional<int64_t> top_k, std::optional<double> top_p) {
  const TransformerShape shape = transformer_shape(shape_ints.data(), int64_t(shape_ints.size()));
  const GenerationSizes sizes{shape.pack_bytes(), shape.state_floats(), shape.n_class, shape.condition, shape.hop};
  return generate(sizes,
                  {weights, state, uniforms, codes, condition, check_sampling(temperature, top_k, top_p, shape.n_class),
                   return_logits},
                  [&](const GenerationJob& job, int64_t begin, int64_t end) {
                    run_streams(job, begin, end, shape.scratch_floats(end - begin),
                                [&](const GenerationJob& part) { run_part(shape, part); });
                  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(audiokernels, CPU, m) { m.impl("transformer_generate", TORCH_BOX(&transformer_generate)); }

}  // namespace audiokernels
