// Memory of the CPU's kernels, in files that are compiled once.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace audiokernels {

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float[], Free>;

// Uninitialised, on a cache line.
inline Floats new_floats(int64_t n) {
  auto* p = static_cast<float*>(std::aligned_alloc(64, size_t(n / 16 + 1) * 64));
  if (!p) throw std::bad_alloc();
  return Floats(p);
}

}  // namespace audiokernels
