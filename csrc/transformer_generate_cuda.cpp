// transformer_generate on CUDA: binding of the kernel. What to launch comes from audiokernels/transformer_plan.py.
#include "transformer_generate_cuda.h"

#include <optional>
#include <tuple>
#include <vector>

#include "cuda_stream.h"
#include "generation_call_cuda.h"

namespace audiokernels {
namespace {

// Keys and values lie at multiples of 16 bytes where the rings of all layers of pooling end at one.
bool is_aligned(const TransformerShape& s, const TransformerCall& c) {
  const bool rows = c.batch <= 1 || c.state_stride % 4 == 0;
  return rows && s.haar_floats() % 4 == 0 && reinterpret_cast<uintptr_t>(c.state) % 16 == 0;
}

TransformerCall sizes_of(const TransformerShape& s) {
  STD_TORCH_CHECK(s.n_width <= kMostWidths && s.n_haar <= kMostRuns, "more than ", kMostWidths,
                  " layers of the context network or ", kMostRuns, " runs of levels");
  TransformerCall c{};
  c.dtype = int(s.dtype), c.cache = int(s.cache), c.n_layer = int(s.n_layer), c.n_head = int(s.n_head);
  c.n_embd = int(s.n_embd), c.n_inner = int(s.n_inner), c.window = int(s.window), c.positions = int(s.positions);
  c.fusion = int(s.fusion), c.context = int(s.context), c.code = int(s.code), c.condition = int(s.condition);
  c.n_width = int(s.n_width), c.n_haar = int(s.n_haar), c.table_bytes = s.table_bytes();
  for (int64_t i = 0; i < s.n_width; i++) c.widths[i] = int32_t(s.widths[i]);
  for (int64_t i = 0; i < s.n_haar; i++) c.levels[i] = int32_t(s.haar[2 * i]), c.counts[i] = int32_t(s.haar[2 * i + 1]);
  return c;
}

std::tuple<Tensor, Tensor> _transformer_generate_cuda(Tensor weights, std::vector<int64_t> shape_ints, Tensor state,
                                                      Tensor uniforms, std::optional<Tensor> codes,
                                                      std::optional<Tensor> condition, double temperature,
                                                      bool return_logits, std::optional<int64_t> top_k,
                                                      std::optional<double> top_p, std::vector<int64_t> plan) {
  const TransformerShape shape = transformer_shape(shape_ints.data(), int64_t(shape_ints.size()));
  const GenerationCall arguments{weights,      state,     uniforms,
                                 codes,        condition, check_sampling(temperature, top_k, top_p, shape.n_class),
                                 return_logits};
  TransformerCall call = sizes_of(shape);
  check_cuda_call({shape.pack_bytes(), shape.state_floats(), shape.n_class, shape.condition, shape.hop}, arguments,
                  call);
  STD_TORCH_CHECK(plan.size() == 4,
                  "plan must hold a stream's blocks, their shared bytes, what is resident and staged");
  call.blocks = int(plan[0]), call.aligned = is_aligned(shape, call);
  call.resident = int(plan[2]), call.staged = call.aligned ? int(plan[3]) : 0;
  STD_TORCH_CHECK(call.blocks >= 1, "plan must have a block at least");
  call.finish();
  return generate_on_cuda("transformer", arguments, call,
                          [&](cudaStream_t stream) { return transformer_generate_cuda(call, int(plan[1]), stream); });
}

// How many clusters of so many blocks the device can run at once; 0 where it cannot, for whatever reason.
int64_t _transformer_clusters(Tensor device, int64_t blocks, int64_t shared_bytes) {
  const torch::stable::accelerator::DeviceGuard guard(device.get_device_index());
  int clusters = 0;
  if (transformer_clusters_cuda(int(blocks), int(shared_bytes), &clusters) == cudaSuccess) return clusters;
  cudaGetLastError();  // it shall not come up at another launch
  return 0;
}

STABLE_TORCH_LIBRARY_IMPL(audiokernels, CUDA, m) {
  if (torch_is_rocm()) return;
  m.impl("_transformer_generate_cuda", TORCH_BOX(&_transformer_generate_cuda));
  m.impl("_transformer_clusters", TORCH_BOX(&_transformer_clusters));
}

}  // namespace
}  // namespace audiokernels
