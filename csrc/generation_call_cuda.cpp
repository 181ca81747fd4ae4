#include "generation_call_cuda.h"

#include <string>

#include "cuda_stream.h"

namespace audiokernels {

void check_cuda_call(const GenerationSizes& sizes, const GenerationCall& call, CudaCall& c) {
  const Tensor &weights = call.weights, &state = call.state, &uniforms = call.uniforms;
  const auto on_device = [&](const Tensor& t, const char* name, int64_t dim) {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == weights.get_device_index(), name,
                    " must be on the device of the pack");
    STD_TORCH_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions, got ", t.dim());
  };
  STD_TORCH_CHECK(weights.is_cuda() && weights.scalar_type() == ScalarType::Byte && weights.dim() == 1 &&
                      weights.numel() == sizes.pack_bytes && weights.is_contiguous(),
                  "weights must be a contiguous CUDA tensor of ", sizes.pack_bytes, " bytes");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(weights.data_ptr()) % 16 == 0, "weights must be aligned to 16 bytes");
  on_device(state, "state", 2);
  on_device(uniforms, "uniforms", 2);
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Float && uniforms.scalar_type() == ScalarType::Float,
                  "state and uniforms must be float32");
  c.n_class = int(sizes.n_class), c.hop = sizes.hop;
  c.batch = uniforms.size(0), c.n = uniforms.size(1);
  c.pack = static_cast<const uint8_t*>(weights.data_ptr());
  STD_TORCH_CHECK(state.size(0) == c.batch && state.size(1) == sizes.state_floats, "state must have shape (", c.batch,
                  ", ", sizes.state_floats, ")");
  STD_TORCH_CHECK(state.stride(1) == 1 && (c.batch <= 1 || state.stride(0) >= state.size(1)),
                  "state rows must be contiguous and apart");
  c.state = static_cast<float*>(state.data_ptr());
  c.state_stride = state.stride(0);
  c.uniforms = static_cast<const float*>(uniforms.data_ptr());
  for (int i = 0; i < 2; i++) c.uniforms_stride[i] = uniforms.stride(i);
  c.sampling = call.sampling;
  if (call.codes) {
    const Tensor& codes = *call.codes;
    on_device(codes, "codes", 2);
    const ScalarType type = codes.scalar_type();
    STD_TORCH_CHECK(
        type == ScalarType::Byte || type == ScalarType::Short || type == ScalarType::Int || type == ScalarType::Long,
        "codes must be uint8, int16, int32 or int64");
    STD_TORCH_CHECK(codes.size(0) == c.batch && codes.size(1) <= c.n, "codes must have shape (batch, m <= n)");
    c.codes = codes.data_ptr();
    c.forced = codes.size(1);
    c.code_bytes = int(codes.element_size());
    for (int i = 0; i < 2; i++) c.codes_stride[i] = codes.stride(i);
  }
  STD_TORCH_CHECK((sizes.condition > 0) == call.condition.has_value(),
                  "condition must be given exactly for a pack with condition channels");
  if (call.condition) {
    const Tensor& condition = *call.condition;
    on_device(condition, "condition", 3);
    STD_TORCH_CHECK(condition.scalar_type() == ScalarType::Float, "condition must be float32");
    const bool empty = c.batch == 0 || c.n == 0;
    c.n_frames = condition.size(1);
    STD_TORCH_CHECK(
        condition.size(0) == c.batch && condition.size(2) == sizes.condition &&
            (empty || (c.n_frames >= (c.n - 1) / sizes.hop + 1 && c.n_frames <= (c.n + sizes.hop - 2) / sizes.hop + 1)),
        "condition must have shape (batch, frames that n samples touch, ", sizes.condition, ")");
    c.frames = static_cast<const float*>(condition.data_ptr());
    for (int i = 0; i < 3; i++) c.frames_stride[i] = condition.stride(i);
  }
}

std::tuple<Tensor, Tensor> generate_on_cuda(const char* room, const GenerationCall& call, CudaCall& c,
                                            const std::function<cudaError_t(cudaStream_t)>& launch) {
  const int32_t device = call.weights.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const ScalarType code_type = c.n_class <= 256 ? ScalarType::Byte : ScalarType::Short;
  Tensor out = torch::stable::new_empty(call.uniforms, {c.batch, c.n}, code_type);
  Tensor logits = call.return_logits ? torch::stable::new_empty(call.uniforms, {c.batch, c.n, int64_t(c.n_class)})
                                     : torch::stable::new_empty(call.uniforms, {0});
  if (c.batch == 0 || c.n == 0) return {out, logits};
  c.out = out.data_ptr();
  c.logits = call.return_logits ? static_cast<float*>(logits.data_ptr()) : nullptr;
  const cudaError_t error = launch(static_cast<cudaStream_t>(current_cuda_stream(device)));
  check_cuda((std::string(room) + "_generate").c_str(), error, cudaGetErrorString(error));
  return {out, logits};
}

}  // namespace audiokernels
