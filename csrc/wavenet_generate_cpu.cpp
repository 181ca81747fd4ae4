// WaveNet generation on the CPU: checks, threads over the batch, registration. The loops are wavenet_generate_simd.cpp.
#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "torch_stable.h"
#include "wavenet_generate.h"

namespace audiokernels {

// ---- the packed layout, as audiokernels/wavenet_pack.py writes it ----

namespace {
constexpr int64_t kMaxInputs = 65536;  // 255 * 127 * inputs stays below 2^31
constexpr int64_t kShapeInts = 9;      // before the dilations
constexpr int64_t kMaxRingSlots = int64_t{1} << 30;
}  // namespace

int64_t WaveNetShape::group() const { return dtype == kFloat32 ? 1 : dtype == kInt8 ? 4 : 2; }
int64_t WaveNetShape::residual_rows() const { return pad_lanes(residual); }
int64_t WaveNetShape::gate_rows() const { return 2 * pad_lanes(hidden); }
int64_t WaveNetShape::skip_rows() const { return pad_lanes(skip); }
int64_t WaveNetShape::mix_rows(int64_t layer) const {
  return skip_rows() + (layer + 1 < n_layer ? residual_rows() : 0);
}
int64_t WaveNetShape::matrix_bytes(int64_t rows, int64_t taps, int64_t inputs) const {
  const int64_t scales = dtype == kInt8 ? 8 * taps * rows : 0;
  return 4 * rows + scales + taps * ((inputs + group() - 1) / group()) * rows * 4;
}
int64_t WaveNetShape::table_bytes() const {
  return 4 * (n_class * residual_rows() + n_layer * condition * gate_rows());
}
int64_t WaveNetShape::pack_bytes() const {
  int64_t bytes = table_bytes() + matrix_bytes(pad_lanes(head), 1, skip) + matrix_bytes(pad_lanes(n_class), 1, head);
  for (int64_t l = 0; l < n_layer; l++)
    bytes += matrix_bytes(gate_rows(), width, residual) + matrix_bytes(mix_rows(l), 1, hidden);
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
  for (int64_t l = 0; l < s.n_layer; l++)
    require(s.dilations[l] >= 1 && s.dilations[l] <= kMaxRingSlots / s.width, "dilation out of range");
  return s;
}

void wavenet_check_state(const WaveNetShape& shape, const float* state, int64_t batch, int64_t stride) {
  const auto whole = [](float v, float limit) { return v >= 0.0f && v < limit && v == std::floor(v); };
  for (int64_t b = 0; b < batch; b++, state += stride)
    if (!whole(state[0], float(kPositionBase)) || !whole(state[1], 16777216.0f) ||
        !whole(state[2], float(shape.n_class)))
      throw std::invalid_argument("state: its header does not hold a position and a code of this pack");
}

int64_t wavenet_frames(const WaveNetShape& shape, const float* state, int64_t batch, int64_t stride, int64_t n) {
  int64_t frames = 0;
  for (int64_t b = 0; n > 0 && b < batch; b++)
    frames = std::max(frames, (state_position(state + b * stride) % shape.hop + n - 1) / shape.hop + 1);
  return frames;
}

void wavenet_run_streams(const WaveNetJob& job, int64_t begin, int64_t end) {
  WaveNetJob part = job;
  const int64_t code_bytes = job.shape->n_class <= 256 ? 1 : 2;
  part.batch = end - begin;
  part.state += begin * job.state_stride;
  part.uniforms += begin * job.n;
  if (part.codes) part.codes += begin * job.forced;
  if (part.condition) part.condition += begin * job.frames * job.shape->condition;
  part.out = static_cast<uint8_t*>(job.out) + begin * job.n * code_bytes;
  if (part.logits) part.logits += begin * job.n * job.shape->n_class;
  std::vector<float> scratch(size_t(job.shape->scratch_floats(part.batch)) + 16);
  const size_t misaligned = reinterpret_cast<uintptr_t>(scratch.data()) / sizeof(float) % 16;
  part.scratch = scratch.data() + (16 - misaligned) % 16;
#define AUDIOKERNELS_CASE(name) \
  case Isa::name: return name::wavenet_run(part);
  switch (isa()) {
    AUDIOKERNELS_FOR_EACH_ISA(AUDIOKERNELS_CASE)
    default: return generic::wavenet_run(part);
  }
#undef AUDIOKERNELS_CASE
}

// ---- the op ----

namespace {

void check_tensor(const Tensor& t, const char* name, ScalarType dtype, int64_t dim) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU like the pack");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions, got ", t.dim());
}

template <class T>
void read_codes(const Tensor& codes, int64_t n_class, std::vector<int32_t>& out) {
  const T* data = static_cast<const T*>(codes.data_ptr());
  const int64_t rows = codes.size(0), columns = codes.size(1);
  for (int64_t b = 0; b < rows; b++)
    for (int64_t t = 0; t < columns; t++) {
      const int64_t code = data[b * codes.stride(0) + t * codes.stride(1)];
      STD_TORCH_CHECK(code >= 0 && code < n_class, "codes must be in 0 .. ", n_class - 1, ", got ", code);
      out.push_back(int32_t(code));
    }
}

std::vector<int32_t> known_codes(const Tensor& codes, int64_t batch, int64_t n, int64_t n_class) {
  STD_TORCH_CHECK(codes.is_cpu() && codes.dim() == 2, "codes must be a CPU tensor of 2 dimensions");
  STD_TORCH_CHECK(codes.size(0) == batch && codes.size(1) <= n, "codes must have shape (batch, m <= n)");
  std::vector<int32_t> out;
  out.reserve(size_t(codes.numel()));
  switch (codes.scalar_type()) {
    case ScalarType::Byte: read_codes<uint8_t>(codes, n_class, out); break;
    case ScalarType::Short: read_codes<int16_t>(codes, n_class, out); break;
    case ScalarType::Int: read_codes<int32_t>(codes, n_class, out); break;
    case ScalarType::Long: read_codes<int64_t>(codes, n_class, out); break;
    default: STD_TORCH_CHECK(false, "codes must be uint8, int16, int32 or int64");
  }
  return out;
}

// Everything is checked before the state is touched.
std::tuple<Tensor, Tensor> wavenet_generate(Tensor weights, std::vector<int64_t> shape_ints, Tensor state,
                                            Tensor uniforms, std::optional<Tensor> codes,
                                            std::optional<Tensor> condition, double temperature, bool return_logits) {
  const WaveNetShape shape = wavenet_shape(shape_ints.data(), int64_t(shape_ints.size()));
  check_tensor(weights, "weights", ScalarType::Byte, 1);
  STD_TORCH_CHECK(weights.numel() == shape.pack_bytes() && weights.is_contiguous(),
                  "weights must be contiguous and hold ", shape.pack_bytes(), " bytes, got ", weights.numel());
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(weights.data_ptr()) % 4 == 0, "weights must be aligned to 4 bytes");
  check_tensor(uniforms, "uniforms", ScalarType::Float, 2);
  const int64_t batch = uniforms.size(0), n = uniforms.size(1);
  check_tensor(state, "state", ScalarType::Float, 2);
  STD_TORCH_CHECK(state.size(0) == batch && state.size(1) == shape.state_floats(), "state must have shape (", batch,
                  ", ", shape.state_floats(), "), got (", state.size(0), ", ", state.size(1), ")");
  STD_TORCH_CHECK(state.stride(1) == 1 && (batch <= 1 || state.stride(0) >= state.size(1)),
                  "state rows must be contiguous and apart");
  STD_TORCH_CHECK(std::isfinite(temperature) && temperature >= 0, "temperature must be finite and >= 0, got ",
                  temperature);
  STD_TORCH_CHECK((shape.condition > 0) == condition.has_value(),
                  "condition must be given exactly for a pack with condition channels");
  WaveNetJob job{};
  job.shape = &shape;
  job.pack = static_cast<const uint8_t*>(weights.data_ptr());
  job.state = static_cast<float*>(state.data_ptr());
  job.state_stride = state.stride(0);
  job.batch = batch, job.n = n;
  job.temperature = float(temperature);
  wavenet_check_state(shape, job.state, batch, job.state_stride);

  const Tensor draws = torch::stable::contiguous(uniforms);
  job.uniforms = static_cast<const float*>(draws.data_ptr());
  for (int64_t i = 0; i < batch * n; i++)
    STD_TORCH_CHECK(job.uniforms[i] >= 0.0f && job.uniforms[i] < 1.0f, "uniforms must be in [0, 1), got ",
                    job.uniforms[i]);
  std::vector<int32_t> known;
  if (codes) {
    known = known_codes(*codes, batch, n, shape.n_class);
    job.codes = known.data();
    job.forced = codes->size(1);
  }
  std::optional<Tensor> frames;
  if (condition) {
    check_tensor(*condition, "condition", ScalarType::Float, 3);
    job.frames = wavenet_frames(shape, job.state, batch, job.state_stride, n);
    STD_TORCH_CHECK(
        condition->size(0) == batch && condition->size(1) == job.frames && condition->size(2) == shape.condition,
        "condition must have shape (", batch, ", ", job.frames, ", ", shape.condition, ")");
    frames = torch::stable::contiguous(*condition);
    job.condition = static_cast<const float*>(frames->data_ptr());
  }

  const ScalarType code_type = shape.n_class <= 256 ? ScalarType::Byte : ScalarType::Short;
  Tensor out = torch::stable::new_empty(uniforms, {batch, n}, code_type);
  Tensor logits = return_logits ? torch::stable::new_empty(uniforms, {batch, n, shape.n_class})
                                : torch::stable::new_empty(uniforms, {0});
  if (batch == 0 || n == 0) return {out, logits};
  job.out = out.data_ptr();
  job.logits = return_logits ? static_cast<float*>(logits.data_ptr()) : nullptr;
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) { wavenet_run_streams(job, begin, end); });
  return {out, logits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(audiokernels, CPU, m) { m.impl("wavenet_generate", TORCH_BOX(&wavenet_generate)); }

}  // namespace audiokernels
