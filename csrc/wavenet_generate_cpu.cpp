// WaveNet generation on the CPU: checks, threads over the batch, registration. The loops are wavenet_generate_simd.cpp.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "generation_call.h"
#include "wavenet_generate.h"

namespace audiokernels {

// ---- the packed layout, as audiokernels/wavenet_pack.py writes it ----

namespace {
constexpr int64_t kShapeInts = 9;  // before the dilations
constexpr int64_t kMaxRingSlots = int64_t{1} << 30;
}  // namespace

int64_t WaveNetShape::residual_rows() const { return pad_lanes(residual); }
int64_t WaveNetShape::gate_rows() const { return 2 * pad_lanes(hidden); }
int64_t WaveNetShape::skip_rows() const { return pad_lanes(skip); }
int64_t WaveNetShape::mix_rows(int64_t layer) const {
  return skip_rows() + (layer + 1 < n_layer ? residual_rows() : 0);
}
int64_t WaveNetShape::table_bytes() const {
  return 4 * (n_class * residual_rows() + n_layer * condition * gate_rows());
}
int64_t WaveNetShape::pack_bytes() const {
  int64_t bytes =
      table_bytes() + matrix_bytes(dtype, pad_lanes(head), 1, skip) + matrix_bytes(dtype, pad_lanes(n_class), 1, head);
  for (int64_t l = 0; l < n_layer; l++)
    bytes += matrix_bytes(dtype, gate_rows(), width, residual) + matrix_bytes(dtype, mix_rows(l), 1, hidden);
  return bytes;
}
int64_t WaveNetShape::ring_slots(int64_t layer) const { return (width - 1) * dilations[layer]; }
int64_t WaveNetShape::state_floats() const {
  int64_t slots = 0;
  for (int64_t l = 0; l < n_layer; l++) slots += ring_slots(l);
  return kStateHeader + slots * residual_rows();
}
int64_t WaveNetShape::max_inputs() const {
  return std::max({width * residual_rows(), pad_lanes(hidden), skip_rows(), pad_lanes(head)});
}
int64_t WaveNetShape::scratch_floats(int64_t batch) const {
  const int64_t rows = n_layer * gate_rows() + gate_rows() + residual_rows() + skip_rows() + pad_lanes(head) +
                       pad_lanes(n_class) + pad_lanes(n_layer) + pad_lanes(width) + (width - 1) * residual_rows();
  return batch * (rows + 2 * max_inputs()) + skip_rows() + pad_lanes(n_class);
}

WaveNetShape wavenet_shape(const int64_t* ints, int64_t count) {
  const auto require = [](bool ok, const char* rule) {
    if (!ok) throw std::invalid_argument(std::string("shape: ") + rule);
  };
  require(count > kShapeInts, "nine sizes, then one dilation a layer");
  const WaveNetShape s{ints[0], ints[1], ints[2], ints[3],           ints[4],           ints[5],
                       ints[6], ints[7], ints[8], ints + kShapeInts, count - kShapeInts};
  require(s.dtype >= kFloat32 && s.dtype <= kFloat16, "dtype must be 0 .. 3");
  for (int64_t size : {s.residual, s.hidden, s.skip, s.head, s.width})
    require(size >= 1 && size <= kMaxInputs, "channels and width must be 1 .. 65536");
  require(s.n_class >= 2 && s.n_class <= 32768, "n_class must be 2 .. 32768");
  require(s.condition >= 0 && s.condition <= kMaxInputs, "condition channels must be 0 .. 65536");
  require(s.hop >= 1, "hop must be >= 1");
  require(s.n_layer <= 1000, "n_layer must be 1 .. 1000");  // so that no size overflows
  for (int64_t l = 0; l < s.n_layer; l++)
    require(s.dilations[l] >= 1 && s.dilations[l] <= kMaxRingSlots / s.width, "dilation out of range");
  return s;
}

void wavenet_run_streams(const WaveNetShape& shape, const GenerationJob& job, int64_t begin, int64_t end) {
  run_streams(job, begin, end, shape.scratch_floats(end - begin), [&](const GenerationJob& part) {
#define AUDIOKERNELS_CASE(name) \
  case Isa::name: return name::wavenet_run(shape, part);
    switch (isa()) {
      AUDIOKERNELS_FOR_EACH_ISA(AUDIOKERNELS_CASE)
      default: return generic::wavenet_run(shape, part);
    }
#undef AUDIOKERNELS_CASE
  });
}

// ---- the op ----

namespace {

std::tuple<Tensor, Tensor> wavenet_generate(Tensor weights, std::vector<int64_t> shape_ints, Tensor state,
                                            Tensor uniforms, std::optional<Tensor> codes,
                                            std::optional<Tensor> condition, double temperature, bool return_logits,
                                            std::optional<int64_t> top_k, std::optional<double> top_p) {
  const WaveNetShape shape = wavenet_shape(shape_ints.data(), int64_t(shape_ints.size()));
  const GenerationSizes sizes{shape.pack_bytes(), shape.state_floats(), shape.n_class, shape.condition, shape.hop};
  return generate(
      sizes,
      {weights, state, uniforms, codes, condition, check_sampling(temperature, top_k, top_p, shape.n_class),
       return_logits},
      [&](const GenerationJob& job, int64_t begin, int64_t end) { wavenet_run_streams(shape, job, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(audiokernels, CPU, m) { m.impl("wavenet_generate", TORCH_BOX(&wavenet_generate)); }

}  // namespace audiokernels
