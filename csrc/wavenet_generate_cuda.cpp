// wavenet_generate on CUDA: checks and binding of the kernels. What to launch comes from audiokernels/wavenet_plan.py.
#include "wavenet_generate_cuda.h"

#include <optional>
#include <tuple>
#include <vector>

#include "cuda_stream.h"
#include "generation_call_cuda.h"

namespace audiokernels {
namespace {

WaveNetCall sizes_of(const WaveNetShape& s) {
  STD_TORCH_CHECK(s.n_layer <= kMostLayers, "more than ", kMostLayers, " layers");
  WaveNetCall c{};
  c.dtype = int(s.dtype), c.residual = int(s.residual), c.hidden = int(s.hidden), c.skip = int(s.skip);
  c.head = int(s.head), c.width = int(s.width), c.condition = int(s.condition);
  c.n_layer = int(s.n_layer), c.n_class = int(s.n_class);
  c.x_rows = int(s.residual_rows()), c.h_rows = int(s.gate_rows() / 2), c.skip_rows = int(s.skip_rows());
  c.head_rows = int(pad_lanes(s.head)), c.class_rows = int(pad_lanes(s.n_class));
  for (int64_t l = 0; l < s.n_layer; l++) c.dilations[l] = int32_t(s.dilations[l]);
  return c;
}

WaveNetCluster cluster_of(const std::vector<int64_t>& plan) {
  STD_TORCH_CHECK(plan.size() == 3, "plan must hold groups, layer blocks and head blocks");
  return {int(plan[0]), int(plan[1]), int(plan[2])};
}

// The call of a shape, checked.
WaveNetCall check_call(const WaveNetShape& s, const GenerationCall& call) {
  WaveNetCall c = sizes_of(s);
  check_cuda_call({s.pack_bytes(), s.state_floats(), s.n_class, s.condition, s.hop}, call, c);
  c.table_bytes = s.table_bytes();
  return c;
}

std::tuple<Tensor, Tensor> _wavenet_generate_cuda(Tensor weights, std::vector<int64_t> shape_ints, Tensor state,
                                                  Tensor uniforms, std::optional<Tensor> codes,
                                                  std::optional<Tensor> condition, double temperature,
                                                  bool return_logits, std::optional<int64_t> top_k,
                                                  std::optional<double> top_p, std::vector<int64_t> plan) {
  const WaveNetShape shape = wavenet_shape(shape_ints.data(), int64_t(shape_ints.size()));
  const GenerationCall arguments{weights,      state,     uniforms,
                                 codes,        condition, check_sampling(temperature, top_k, top_p, shape.n_class),
                                 return_logits};
  WaveNetCall call = check_call(shape, arguments);
  STD_TORCH_CHECK(plan.size() == 2 || plan.size() == 3, "plan must be one of wavenet_generate_plan");
  std::optional<Tensor> base;
  return generate_on_cuda("wavenet", arguments, call, [&](cudaStream_t stream) {
    if (condition) {
      base = torch::stable::new_empty(uniforms, {call.batch, shape.n_layer * shape.gate_rows()});
      call.base = static_cast<float*>(base->data_ptr());
    }
    return plan.size() == 2 ? wavenet_general_cuda(call, int(plan[0]), int(plan[1]), stream)
                            : wavenet_cluster_cuda(call, cluster_of(plan), stream);
  });
}

// The same by the cluster kernel, codes and all; `stages` counts the cycles of its first cluster's blocks.
void wavenet_stages(Tensor weights, std::vector<int64_t> shape_ints, Tensor state, Tensor uniforms,
                    std::vector<int64_t> plan, Tensor stages) {
  const WaveNetShape shape = wavenet_shape(shape_ints.data(), int64_t(shape_ints.size()));
  WaveNetCall call = check_call(shape, {weights, state, uniforms, std::nullopt, std::nullopt, {1.0f, 0, 1.0f}, false});
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
