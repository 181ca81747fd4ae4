// Element types, for the files that torch's headers do not reach: those of an instruction set, and CUDA's.
#pragma once

#include <cstdint>

namespace audiokernels {

enum class Dtype { float32, bfloat16, float16, float64 };

// Never a shared inline copy: this header is compiled once per instruction set.
__attribute__((always_inline)) inline int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

}  // namespace audiokernels
