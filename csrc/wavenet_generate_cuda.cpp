// wavenet_generate on CUDA: checks and binding of the kernels. What to launch comes from audiokernels/wavenet_plan.py.
#include "wavenet_generate_cuda.h"

#include <optional>
#include <tuple>
#include <vector>

#include "cuda_stream.h"
#include "generation_call.h"

namespace audiokernels {
namespace {

WaveNetCall sizes_of(const WaveNetShape& s) {
  STD_TORCH_CHECK(s.n_layer <= kMostLayers, "more than ", kMostLayers, " layers");
  WaveNetCall c{};
  c.dtype = int(s.dtype), c.residual = int(s.residual), c.hidden = int(s.hidden), c.skip = int(s.skip);
  c.head = int(s.head), c.n_class = int(s.n_class), c.width = int(s.width), c.condition = int(s.condition);
  c.n_layer = int(s.n_layer), c.hop = s.hop;
  c.x_rows = int(s.residual_rows()), c.h_rows = int(s.gate_rows() / 2), c.skip_rows = int(s.skip_rows());
  c.head_rows = int(pad_lanes(s.head)), c.class_rows = int(pad_lanes(s.n_class));
  for (int64_t l = 0; l < s.n_layer; l++) c.dilations[l] = int32_t(s.dilations[l]);
  return c;
}

WaveNetCluster cluster_of(const std::vector<int64_t>& plan) {
  STD_TORCH_CHECK(plan.size() == 3, "plan must hold groups, layer blocks and head blocks");
  return {int(plan[0]), int(plan[1]), int(plan[2])};
}

// Checks without waiting for the GPU: what lies in its memory is the kernels' own care.
WaveNetCall check_call(const WaveNetShape& s, const Tensor& weights, const Tensor& state, const Tensor& uniforms,
                       const std::optional<Tensor>& codes, const std::optional<Tensor>& condition,
                       const Sampling& sampling) {
  const auto on_device = [&](const Tensor& t, const char* name, int64_t dim) {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == weights.get_device_index(), name,
                    " must be on the device of the pack");
    STD_TORCH_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions, got ", t.dim());
  };
  STD_TORCH_CHECK(weights.is_cuda() && weights.scalar_type() == ScalarType::Byte && weights.dim() == 1 &&
                      weights.numel() == s.pack_bytes() && weights.is_contiguous(),
                  "weights must be a contiguous CUDA tensor of ", s.pack_bytes(), " bytes");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(weights.data_ptr()) % 16 == 0, "weights must be aligned to 16 bytes");
  on_device(state, "state", 2);
  on_device(uniforms, "uniforms", 2);
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Float && uniforms.scalar_type() == ScalarType::Float,
                  "state and uniforms must be float32");
  WaveNetCall c = sizes_of(s);
  c.batch = uniforms.size(0), c.n = uniforms.size(1);
  c.pack = static_cast<const uint8_t*>(weights.data_ptr());
  c.table_bytes = s.table_bytes();
  STD_TORCH_CHECK(state.size(0) == c.batch && state.size(1) == s.state_floats(), "state must have shape (", c.batch,
                  ", ", s.state_floats(), ")");
  STD_TORCH_CHECK(state.stride(1) == 1 && (c.batch <= 1 || state.stride(0) >= state.size(1)),
                  "state rows must be contiguous and apart");
  c.state = static_cast<float*>(state.data_ptr());
  c.state_stride = state.stride(0);
  c.uniforms = static_cast<const float*>(uniforms.data_ptr());
  for (int i = 0; i < 2; i++) c.uniforms_stride[i] = uniforms.stride(i);
  c.sampling = sampling;
  if (codes) {
    on_device(*codes, "codes", 2);
    const ScalarType type = codes->scalar_type();
    STD_TORCH_CHECK(
        type == ScalarType::Byte || type == ScalarType::Short || type == ScalarType::Int || type == ScalarType::Long,
        "codes must be uint8, int16, int32 or int64");
    STD_TORCH_CHECK(codes->size(0) == c.batch && codes->size(1) <= c.n, "codes must have shape (batch, m <= n)");
    c.codes = codes->data_ptr();
    c.forced = codes->size(1);
    c.code_bytes = int(codes->element_size());
    for (int i = 0; i < 2; i++) c.codes_stride[i] = codes->stride(i);
  }
  STD_TORCH_CHECK((s.condition > 0) == condition.has_value(),
                  "condition must be given exactly for a pack with condition channels");
  if (condition) {
    on_device(*condition, "condition", 3);
    STD_TORCH_CHECK(condition->scalar_type() == ScalarType::Float, "condition must be float32");
    const bool empty = c.batch == 0 || c.n == 0;
    c.n_frames = condition->size(1);
    STD_TORCH_CHECK(condition->size(0) == c.batch && condition->size(2) == s.condition &&
                        (empty || (c.n_frames >= (c.n - 1) / s.hop + 1 && c.n_frames <= (c.n + s.hop - 2) / s.hop + 1)),
                    "condition must have shape (batch, frames that n samples touch, ", s.condition, ")");
    c.frames = static_cast<const float*>(condition->data_ptr());
    for (int i = 0; i < 3; i++) c.frames_stride[i] = condition->stride(i);
  }
  return c;
}

std::tuple<Tensor, Tensor> _wavenet_generate_cuda(Tensor weights, std::vector<int64_t> shape_ints, Tensor state,
                                                  Tensor uniforms, std::optional<Tensor> codes,
                                                  std::optional<Tensor> condition, double temperature,
                                                  bool return_logits, std::optional<int64_t> top_k,
                                                  std::optional<double> top_p, std::vector<int64_t> plan) {
  const WaveNetShape shape = wavenet_shape(shape_ints.data(), int64_t(shape_ints.size()));
  WaveNetCall call = check_call(shape, weights, state, uniforms, codes, condition,
                                check_sampling(temperature, top_k, top_p, shape.n_class));
  STD_TORCH_CHECK(plan.size() == 2 || plan.size() == 3, "plan must be one of wavenet_generate_plan");
  const torch::stable::accelerator::DeviceGuard guard(weights.get_device_index());
  const ScalarType code_type = shape.n_class <= 256 ? ScalarType::Byte : ScalarType::Short;
  Tensor out = torch::stable::new_empty(uniforms, {call.batch, call.n}, code_type);
  Tensor logits = return_logits ? torch::stable::new_empty(uniforms, {call.batch, call.n, shape.n_class})
                                : torch::stable::new_empty(uniforms, {0});
  if (call.batch == 0 || call.n == 0) return {out, logits};
  std::optional<Tensor> base;
  if (condition) {
    base = torch::stable::new_empty(uniforms, {call.batch, shape.n_layer * shape.gate_rows()});
    call.base = static_cast<float*>(base->data_ptr());
  }
  call.out = out.data_ptr();
  call.logits = return_logits ? static_cast<float*>(logits.data_ptr()) : nullptr;
  const auto stream = static_cast<cudaStream_t>(current_cuda_stream(weights.get_device_index()));
  const cudaError_t error = plan.size() == 2 ? wavenet_general_cuda(call, int(plan[0]), int(plan[1]), stream)
                                             : wavenet_cluster_cuda(call, cluster_of(plan), stream);
  check_cuda("wavenet_generate", error, cudaGetErrorString(error));
  return {out, logits};
}

// The same by the cluster kernel, codes and all; `stages` counts the cycles of its first cluster's blocks.
void wavenet_stages(Tensor weights, std::vector<int64_t> shape_ints, Tensor state, Tensor uniforms,
                    std::vector<int64_t> plan, Tensor stages) {
  const WaveNetShape shape = wavenet_shape(shape_ints.data(), int64_t(shape_ints.size()));
  WaveNetCall call = check_call(shape, weights, state, uniforms, std::nullopt, std::nullopt, {1.0f, 0, 1.0f});
  const WaveNetCluster cluster = cluster_of(plan);
  STD_TORCH_CHECK(stages.is_cuda() && stages.get_device_index() == weights.get_device_index() &&
                      stages.scalar_type() == ScalarType::Long && stages.is_contiguous() &&
                      stages.numel() == (cluster.layer_blocks + cluster.head_blocks) * kStages,
                  "stages must be int64 (blocks of a cluster, ", int(kStages), ") on the device of the pack");
  STD_TORCH_CHECK(call.batch > 0 && call.n > 0, "uniforms must not be empty");
  const torch::stable::accelerator::DeviceGuard guard(weights.get_device_index());
  const Tensor out = torch::stable::new_empty(uniforms, {call.batch, call.n}, ScalarType::Short);
  call.out = out.data_ptr();
  call.stages = static_cast<unsigned long long*>(stages.data_ptr());
  const auto stream = static_cast<cudaStream_t>(current_cuda_stream(weights.get_device_index()));
  const cudaError_t error = wavenet_cluster_cuda(call, cluster, stream);
  check_cuda("wavenet_stages", error, cudaGetErrorString(error));
}

// How many such clusters the device can run at once; 0 where it cannot, for whatever reason.
int64_t wavenet_clusters(Tensor device, std::vector<int64_t> shape_ints, std::vector<int64_t> plan) {
  const WaveNetShape shape = wavenet_shape(shape_ints.data(), int64_t(shape_ints.size()));
  const torch::stable::accelerator::DeviceGuard guard(device.get_device_index());
  int clusters = 0;
  if (wavenet_cluster_most(sizes_of(shape), cluster_of(plan), &clusters) == cudaSuccess) return clusters;
  cudaGetLastError();  // it shall not come up at another launch
  return 0;
}

STABLE_TORCH_LIBRARY_IMPL(audiokernels, CUDA, m) {
  if (torch_is_rocm()) return;
  m.impl("_wavenet_generate_cuda", TORCH_BOX(&_wavenet_generate_cuda));
  m.impl("_wavenet_stages", TORCH_BOX(&wavenet_stages));
  m.impl("_wavenet_clusters", TORCH_BOX(&wavenet_clusters));
}

}  // namespace
}  // namespace audiokernels
