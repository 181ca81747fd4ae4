// dilated_conv_update on CUDA: the binding of dilated_conv_update_cuda.cu.
#include "dilated_conv_update_cuda.h"

#include "cuda_stream.h"

namespace audiokernels {
namespace {

Tensor dilated_conv_update(Tensor x, Tensor conv_state, Tensor weight, std::optional<Tensor> bias, Tensor position,
                           int64_t dilation) {
  Tensor out = x;
  const DilatedConvUpdate call = dilated_conv_update_check(x, conv_state, weight, bias, position, dilation, out);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  int multiprocessors = 0;
  const cudaError_t queried =
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, x.get_device_index());
  check_cuda("dilated_conv_update", queried, cudaGetErrorString(queried));
  const Dtype dtype = dtype_of(x.scalar_type());
  const DilatedConvUpdateKernel kernel =
      dilated_conv_update_plan(true, dtype == Dtype::float64, call.batch, call.dim_out, call.taps, multiprocessors);
  void* stream = current_cuda_stream(x.get_device_index());
  const cudaError_t error = dilated_conv_update_cuda(call, kernel, dtype, static_cast<cudaStream_t>(stream));
  check_cuda("dilated_conv_update", error, cudaGetErrorString(error));
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(audiokernels, CUDA, m) {
  if (!torch_is_rocm()) m.impl("dilated_conv_update", TORCH_BOX(&dilated_conv_update));
}

}  // namespace
}  // namespace audiokernels
