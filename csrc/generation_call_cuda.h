// A call of <room>_generate on a GPU: its checks, its results, its launch. Host code of all rooms.
#pragma once

#include "generation_call.h"
#include "generation_cuda.h"

namespace audiokernels {

// Fills what all rooms have in common. Checks without waiting for the GPU: what lies in its memory is the kernels' own
// care.
void check_cuda_call(const GenerationSizes& sizes, const GenerationCall& call, CudaCall& c);

// Makes the results of a checked call, `room`_generate, and gives torch's current stream to `launch`.
std::tuple<Tensor, Tensor> generate_on_cuda(const char* room, const GenerationCall& call, CudaCall& c,
                                            const std::function<cudaError_t(cudaStream_t)>& launch);

}  // namespace audiokernels
