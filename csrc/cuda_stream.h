// What a CUDA binding needs of the torch that is running. Nothing of libtorch_cuda is linked, so that the same binary
// loads beside a CPU-only torch.
#pragma once

#include <cstdint>

namespace audiokernels {

void* current_cuda_stream(int32_t device_index);  // a cudaStream_t; throws std::runtime_error where there is no CUDA
bool torch_is_rocm();                             // there the key CUDA means HIP: nothing is registered for it
void check_cuda(const char* op, int error, const char* text);  // throws std::runtime_error unless error is 0

}  // namespace audiokernels
