#include "generation_call.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

namespace audiokernels {
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

}  // namespace

Sampling check_sampling(double temperature, std::optional<int64_t> top_k, std::optional<double> top_p,
                        int64_t n_class) {
  STD_TORCH_CHECK(std::isfinite(temperature) && temperature >= 0, "temperature must be finite and >= 0, got ",
                  temperature);
  STD_TORCH_CHECK(!top_k || *top_k >= 1, "top_k must be >= 1, got ", top_k.value_or(0));
  STD_TORCH_CHECK(!top_p || (*top_p > 0 && *top_p <= 1), "top_p must be above 0 and at most 1, got ",
                  top_p.value_or(0));
  const double least = std::numeric_limits<float>::min();  // a share that is 0 in float32 would keep no class
  // A quotient that is 0 or infinite in float32 would make NaN of some difference of logits.
  return {float(temperature > 0 ? std::clamp(temperature, least, 1 / least) : 0),
          top_k && *top_k < n_class ? int32_t(*top_k) : 0, float(top_p ? std::max(*top_p, least) : 1)};
}

void check_state_header(int64_t n_class, const float* state, int64_t batch, int64_t stride) {
  const auto whole = [](float v, float limit) { return v >= 0.0f && v < limit && v == std::floor(v); };
  for (int64_t b = 0; b < batch; b++, state += stride)
    if (!whole(state[0], float(kPositionBase)) || !whole(state[1], 16777216.0f) || !whole(state[2], float(n_class)))
      throw std::invalid_argument("state: its header does not hold a position and a code of this pack");
}

int64_t touched_frames(int64_t hop, const float* state, int64_t batch, int64_t stride, int64_t n) {
  int64_t frames = 0;
  for (int64_t b = 0; n > 0 && b < batch; b++)
    frames = std::max(frames, (state_position(state + b * stride) % hop + n - 1) / hop + 1);
  return frames;
}

void run_streams(const GenerationJob& job, int64_t begin, int64_t end, int64_t floats,
                 const std::function<void(const GenerationJob&)>& run) {
  GenerationJob part = job;
  part.batch = end - begin;
  part.state += begin * job.state_stride;
  part.uniforms += begin * job.n;
  if (part.codes) part.codes += begin * job.forced;
  if (part.condition) part.condition += begin * job.frames * job.channels;
  part.out = static_cast<uint8_t*>(job.out) + begin * job.n * (job.n_class <= 256 ? 1 : 2);
  if (part.logits) part.logits += begin * job.n * job.n_class;
  std::vector<float> scratch(size_t(floats) + 16);
  const size_t misaligned = reinterpret_cast<uintptr_t>(scratch.data()) / sizeof(float) % 16;
  part.scratch = scratch.data() + (16 - misaligned) % 16;
  run(part);
}

std::tuple<Tensor, Tensor> generate(const GenerationSizes& sizes, const GenerationCall& call,
                                    const std::function<void(const GenerationJob&, int64_t, int64_t)>& run) {
  check_tensor(call.weights, "weights", ScalarType::Byte, 1);
  STD_TORCH_CHECK(call.weights.numel() == sizes.pack_bytes && call.weights.is_contiguous(),
                  "weights must be contiguous and hold ", sizes.pack_bytes, " bytes, got ", call.weights.numel());
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(call.weights.data_ptr()) % 4 == 0, "weights must be aligned to 4 bytes");
  check_tensor(call.uniforms, "uniforms", ScalarType::Float, 2);
  const Tensor& state = call.state;
  const int64_t batch = call.uniforms.size(0), n = call.uniforms.size(1);
  check_tensor(state, "state", ScalarType::Float, 2);
  STD_TORCH_CHECK(state.size(0) == batch && state.size(1) == sizes.state_floats, "state must have shape (", batch, ", ",
                  sizes.state_floats, "), got (", state.size(0), ", ", state.size(1), ")");
  STD_TORCH_CHECK(state.stride(1) == 1 && (batch <= 1 || state.stride(0) >= state.size(1)),
                  "state rows must be contiguous and apart");
  STD_TORCH_CHECK((sizes.condition > 0) == call.condition.has_value(),
                  "condition must be given exactly for a pack with condition channels");
  GenerationJob job{};
  job.pack = static_cast<const uint8_t*>(call.weights.data_ptr());
  job.state = static_cast<float*>(state.data_ptr());
  job.state_stride = state.stride(0);
  job.n_class = sizes.n_class, job.batch = batch, job.n = n, job.channels = sizes.condition;
  job.sampling = call.sampling;
  check_state_header(sizes.n_class, job.state, batch, job.state_stride);

  const Tensor draws = torch::stable::contiguous(call.uniforms);
  job.uniforms = static_cast<const float*>(draws.data_ptr());
  for (int64_t i = 0; i < batch * n; i++)
    STD_TORCH_CHECK(job.uniforms[i] >= 0.0f && job.uniforms[i] < 1.0f, "uniforms must be in [0, 1), got ",
                    job.uniforms[i]);
  std::vector<int32_t> known;
  if (call.codes) {
    known = known_codes(*call.codes, batch, n, sizes.n_class);
    job.codes = known.data();
    job.forced = call.codes->size(1);
  }
  std::optional<Tensor> frames;
  if (call.condition) {
    const Tensor& condition = *call.condition;
    check_tensor(condition, "condition", ScalarType::Float, 3);
    job.frames = touched_frames(sizes.hop, job.state, batch, job.state_stride, n);
    STD_TORCH_CHECK(
        condition.size(0) == batch && condition.size(1) == job.frames && condition.size(2) == sizes.condition,
        "condition must have shape (", batch, ", ", job.frames, ", ", sizes.condition, ")");
    frames = torch::stable::contiguous(condition);
    job.condition = static_cast<const float*>(frames->data_ptr());
  }

  const ScalarType code_type = sizes.n_class <= 256 ? ScalarType::Byte : ScalarType::Short;
  Tensor out = torch::stable::new_empty(call.uniforms, {batch, n}, code_type);
  Tensor logits = call.return_logits ? torch::stable::new_empty(call.uniforms, {batch, n, sizes.n_class})
                                     : torch::stable::new_empty(call.uniforms, {0});
  if (batch == 0 || n == 0) return {out, logits};
  job.out = out.data_ptr();
  job.logits = call.return_logits ? static_cast<float*>(logits.data_ptr()) : nullptr;
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) { run(job, begin, end); });
  return {out, logits};
}

}  // namespace audiokernels
