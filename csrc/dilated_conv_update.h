// One step of a causal dilated convolution with a ring of past inputs; audiokernels/dilated_conv_update.py defines it.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace audiokernels {

// Sizes and strides (in elements) of a call; pointers are of the call's dtype, the result is contiguous.
struct DilatedConvUpdate {
  int64_t batch, dim_in, dim_out, width, dilation;
  int64_t taps;    // dim_in * width, the length of a weight row
  int64_t length;  // (width - 1) * dilation, the slots of the ring
  const void* x;
  void* conv_state;
  const void* weight;  // a row is contiguous over (dim_in, width)
  const void* bias;    // null without one
  const int32_t* position;
  void* out;
  int64_t x_stride[2], state_stride[3], weight_stride, bias_stride, position_stride;
};

enum class DilatedConvUpdateKernel { cpu_simd, cpu_loop, cuda_fused, cuda_split };

// Which kernel a call takes. Fused: a block per batch row holds the row's taps in shared memory; that pays while the
// weights are few or the rows fill the GPU. Split: a warp per output over the whole GPU, then the ring is written
// by a second launch, since the slot being overwritten is the oldest tap.
inline DilatedConvUpdateKernel dilated_conv_update_plan(bool cuda, bool float64, int64_t batch, int64_t dim_out,
                                                        int64_t taps, int64_t multiprocessors) {
  if (!cuda) return float64 ? DilatedConvUpdateKernel::cpu_loop : DilatedConvUpdateKernel::cpu_simd;
  const bool fits = taps <= (48 << 10) / (float64 ? 8 : 4);
  return fits && (dim_out * taps <= 32768 || batch >= multiprocessors) ? DilatedConvUpdateKernel::cuda_fused
                                                                       : DilatedConvUpdateKernel::cuda_split;
}

// sums[b * rows + r] = sum_j weight[r * weight_stride + j] * taps[b * n + j] for r in [first, last) and every b.
struct RowDots {
  const void* weight;
  int64_t weight_stride;
  const float* taps;
  int64_t n, batch, rows;
  float* sums;
};

#define AUDIOKERNELS_DECLARE(isa)                                                     \
  namespace isa {                                                                     \
  void dilated_conv_dots(Dtype dtype, const RowDots& d, int64_t first, int64_t last); \
  }
AUDIOKERNELS_FOR_EACH_FLOAT_ISA(AUDIOKERNELS_DECLARE)
#undef AUDIOKERNELS_DECLARE

}  // namespace audiokernels

#if !defined(__CUDACC__) && !defined(AUDIOKERNELS_ISA)
#include "torch_stable.h"

namespace audiokernels {

// Checks a call on either device (std::runtime_error naming the argument and the rule) and allocates its result;
// `weight` is replaced by a contiguous copy if a row of it is not.
DilatedConvUpdate dilated_conv_update_check(const Tensor& x, const Tensor& conv_state, Tensor& weight,
                                            const std::optional<Tensor>& bias, const Tensor& position, int64_t dilation,
                                            Tensor& out);

}  // namespace audiokernels
#endif
