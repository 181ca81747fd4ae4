// A call of <room>_generate on a GPU: what the kernels of all rooms need to know of it. Torch-free.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "generation.h"

namespace audiokernels {

struct CudaCall {
  int n_class;
  int64_t hop, batch, n;
  const uint8_t* pack;
  int64_t table_bytes;  // embedding and condition, before the matrices
  float* state;
  int64_t state_stride;
  const float* uniforms;
  int64_t uniforms_stride[2];
  const void* codes;  // known ones, integers of code_bytes, the first `forced` of each row
  int64_t codes_stride[2], forced;
  int code_bytes;
  const float* frames;  // condition: (batch, n_frames, channels), or null
  int64_t frames_stride[3], n_frames;
  void* out;      // (batch, n) uint8, or int16 above 256 classes
  float* logits;  // (batch, n, n_class), or null
  Sampling sampling;
};

// Whether the current device runs a kernel's code for clusters (AK_CLUSTERS of generation_device.h): a build for other
// architectures has an empty one.
template <class Kernel>
bool has_clusters(Kernel* kernel) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  return error == cudaSuccess && attributes.ptxVersion >= 90 && attributes.ptxVersion < 120;
}

// Lets a kernel have all the shared memory that a block may have; what a launch needs, the launch says. Never less: the
// attribute is the kernel's, and another thread may be about to launch it with more.
template <class Kernel>
cudaError_t allow_all_shared(Kernel* kernel) {
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return error == cudaSuccess ? cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                     cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)
                              : error;
}

}  // namespace audiokernels
