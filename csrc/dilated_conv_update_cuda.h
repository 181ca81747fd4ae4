// The torch-free launcher of dilated_conv_update_cuda.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "dilated_conv_update.h"

namespace audiokernels {

cudaError_t dilated_conv_update_cuda(const DilatedConvUpdate& c, DilatedConvUpdateKernel kernel, Dtype dtype,
                                     cudaStream_t stream);

}  // namespace audiokernels
