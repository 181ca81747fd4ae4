#include "cuda_stream.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "torch_stable.h"

namespace audiokernels {

void* current_cuda_stream(int32_t device_index) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(function != nullptr, "this torch has no CUDA (aoti_torch_get_current_cuda_stream was not found)");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(function(device_index, &stream));
  return stream;
}

bool torch_is_rocm() { return dlopen("libtorch_hip.so", RTLD_LAZY | RTLD_NOLOAD) != nullptr; }

void check_cuda(const char* op, int error, const char* text) {
  if (error == 0) return;
  throw std::runtime_error(std::string(op) + ": CUDA error " + std::to_string(error) + ": " + text +
                           (error == 209 ? "; this GPU's architecture was not compiled in: rebuild with "
                                           "TORCH_CUDA_ARCH_LIST naming it"
                                         : ""));
}

}  // namespace audiokernels
