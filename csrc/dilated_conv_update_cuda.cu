// dilated_conv_update on a GPU: compiled for every architecture of the build, not yet run on one.
// A warp forms one output at a time, lanes along a weight row, so that weights are read coalesced; sums are float32
// (float64 for float64), in an order that depends on the sizes only.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dilated_conv_update_cuda.h"
#include "ptx.h"

namespace audiokernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kMaxBlocks = 65536;

__device__ inline float to_sum(float v) { return v; }
__device__ inline float to_sum(__half v) { return __half2float(v); }
__device__ inline float to_sum(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline double to_sum(double v) { return v; }
__device__ inline void from_sum(float v, float* out) { *out = v; }
__device__ inline void from_sum(float v, __half* out) { *out = __float2half_rn(v); }
__device__ inline void from_sum(float v, __nv_bfloat16* out) { *out = __float2bfloat16_rn(v); }
__device__ inline void from_sum(double v, double* out) { *out = v; }

template <class T>
using Sum = decltype(to_sum(T{}));

// The ring's slot `steps` after a row's position, 0 <= steps < length; any int32 position gives a slot inside the ring.
__device__ inline int64_t ring_slot(const DilatedConvUpdate& c, int64_t b, int64_t steps) {
  const int32_t position = c.position[b * c.position_stride];
  const int64_t first = c.length > INT32_MAX ? position : position % static_cast<int32_t>(c.length);
  const int64_t slot = first + steps + (first < 0 ? c.length : 0);
  return slot < c.length ? slot : slot - c.length;
}

// The inputs that tap k of batch row b meets: the last tap meets x, the others a slot of the ring.
template <class T>
struct Inputs {
  const T* data;
  int64_t stride;

  __device__ Inputs(const DilatedConvUpdate& c, int64_t b, int64_t k) {
    if (k == c.width - 1) {
      data = static_cast<const T*>(c.x) + b * c.x_stride[0];
      stride = c.x_stride[1];
    } else {
      const int64_t slot = ring_slot(c, b, k * c.dilation);
      data = static_cast<const T*>(c.conv_state) + b * c.state_stride[0] + slot * c.state_stride[1];
      stride = c.state_stride[2];
    }
  }
  __device__ T operator[](int64_t i) const { return data[i * stride]; }
};

template <class T>
__device__ inline void write_ring(const DilatedConvUpdate& c, int64_t b, int64_t first, int64_t step) {
  const Inputs<T> x(c, b, c.width - 1);
  T* oldest = static_cast<T*>(c.conv_state) + b * c.state_stride[0] + ring_slot(c, b, 0) * c.state_stride[1];
  for (int64_t i = first; i < c.dim_in; i += step) oldest[i * c.state_stride[2]] = x[i];
}

template <class S>
__device__ inline S sum_warp(S v) {
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_down_sync(0xffffffffu, v, offset);
  return v;
}

template <class T>
__device__ inline void finish(const DilatedConvUpdate& c, int64_t b, int64_t r, Sum<T> sum) {
  if (c.bias) sum += to_sum(static_cast<const T*>(c.bias)[r * c.bias_stride]);
  from_sum(sum, static_cast<T*>(c.out) + b * c.dim_out + r);
}

template <class T>
__global__ void __launch_bounds__(kThreads) fused_kernel(const __grid_constant__ DilatedConvUpdate c) {
  Sum<T>* taps = reinterpret_cast<Sum<T>*>(ptx::dynamic_shared());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t b = blockIdx.x; b < c.batch; b += gridDim.x) {
    for (int64_t k = 0; k < c.width; k++) {
      const Inputs<T> inputs(c, b, k);
      for (int64_t i = threadIdx.x; i < c.dim_in; i += kThreads) taps[i * c.width + k] = to_sum(inputs[i]);
    }
    __syncthreads();  // every tap is read before the oldest one is overwritten
    if (c.width > 1) write_ring<T>(c, b, threadIdx.x, kThreads);
    for (int64_t r = warp; r < c.dim_out; r += kWarps) {
      const T* row = static_cast<const T*>(c.weight) + r * c.weight_stride;
      Sum<T> sum = 0;
      for (int64_t j = lane; j < c.taps; j += 32) sum += to_sum(row[j]) * taps[j];
      sum = sum_warp(sum);
      if (lane == 0) finish<T>(c, b, r, sum);
    }
    __syncthreads();  // the next row's taps take the place of these
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) split_kernel(const __grid_constant__ DilatedConvUpdate c) {
  const int lane = threadIdx.x % 32;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; at < c.batch * c.dim_out;
       at += step) {
    const int64_t b = at / c.dim_out, r = at % c.dim_out;
    const T* row = static_cast<const T*>(c.weight) + r * c.weight_stride;
    Sum<T> sum = 0;
    for (int64_t k = 0; k < c.width; k++) {  // the second tap finds the row's cache lines loaded
      const Inputs<T> inputs(c, b, k);
      for (int64_t i = lane; i < c.dim_in; i += 32) sum += to_sum(row[i * c.width + k]) * to_sum(inputs[i]);
    }
    sum = sum_warp(sum);
    if (lane == 0) finish<T>(c, b, r, sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) ring_kernel(const __grid_constant__ DilatedConvUpdate c) {
  for (int64_t b = blockIdx.x; b < c.batch; b += gridDim.x) write_ring<T>(c, b, threadIdx.x, kThreads);
}

cudaLaunchConfig_t grid_of(int64_t blocks, int64_t shared, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  return config;
}

template <class T>
cudaError_t launch(const DilatedConvUpdate& c, DilatedConvUpdateKernel kernel, cudaStream_t stream) {
  if (c.batch == 0) return cudaSuccess;
  const auto rows =
      grid_of(c.batch, kernel == DilatedConvUpdateKernel::cuda_fused ? c.taps * sizeof(Sum<T>) : 0, stream);
  if (kernel == DilatedConvUpdateKernel::cuda_fused) return cudaLaunchKernelEx(&rows, fused_kernel<T>, c);
  const auto outputs = grid_of((c.batch * c.dim_out + kWarps - 1) / kWarps, 0, stream);
  const cudaError_t error = c.dim_out > 0 ? cudaLaunchKernelEx(&outputs, split_kernel<T>, c) : cudaSuccess;
  return error == cudaSuccess && c.width > 1 ? cudaLaunchKernelEx(&rows, ring_kernel<T>, c) : error;
}

}  // namespace

cudaError_t dilated_conv_update_cuda(const DilatedConvUpdate& c, DilatedConvUpdateKernel kernel, Dtype dtype,
                                     cudaStream_t stream) {
  switch (dtype) {
    case Dtype::float64: return launch<double>(c, kernel, stream);
    case Dtype::bfloat16: return launch<__nv_bfloat16>(c, kernel, stream);
    case Dtype::float16: return launch<__half>(c, kernel, stream);
    default: return launch<float>(c, kernel, stream);
  }
}

}  // namespace audiokernels
