// What the Haar ops' files on the CPU's side of torch share: checks, results, memory, threads.
#pragma once

#include <vector>

#include "floats.h"
#include "haar.h"
#include "torch_stable.h"

namespace audiokernels {

inline void check_rows(const Tensor& x, const char* name, int64_t dims) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
                      dtype == ScalarType::Double,
                  name, " must be float32, bfloat16, float16 or float64");
  STD_TORCH_CHECK(x.dim() == dims, name, " must have ", dims, " dimensions, got ", x.dim());
}

inline void check_runs(const std::vector<int64_t>& runs, int64_t dim) {
  STD_TORCH_CHECK(runs.size() % 2 == 0, "runs must be pairs of a level and a count");
  int64_t left = dim;
  for (size_t i = 0; i < runs.size(); i += 2) {
    STD_TORCH_CHECK(-1 <= runs[i] && runs[i] <= 62, "levels must be -1 or 0..62, got ", runs[i]);
    STD_TORCH_CHECK(0 <= runs[i + 1] && runs[i + 1] <= left, "runs must have counts >= 0 that sum to ", dim);
    left -= runs[i + 1];
  }
  STD_TORCH_CHECK(left == 0, "runs must cover the ", dim, " channels of x");
}

// Itself if its channels are adjacent, else a copy.
inline Tensor adjacent(const Tensor& x) {
  return x.size(2) <= 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

// Uninitialised and contiguous (batch, seqlen, dim), batch, dim and dtype of x.
inline Tensor empty_rows(const Tensor& x, int64_t seqlen) {
  const auto at_least_1 = [](int64_t n) { return n > 1 ? n : 1; };
  const int64_t sizes[] = {x.size(0), seqlen, x.size(2)}, row = at_least_1(sizes[2]);
  const int64_t strides[] = {row * at_least_1(seqlen), row, 1};
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return empty_strided(x, 3, sizes, strides, dtype);
}

constexpr int64_t kHaarGrain = 1 << 15;  // numbers below which a second thread costs more than it saves

struct Alone {
  template <class F>
  void operator()(int64_t n, int64_t, const F& f) const {
    f(0, n);
  }
};

// sequences(first, last, each) for the whole batch: whole sequences a thread, or where they are few one after the
// other, each of them shared. each(n, work, f) calls f(first, last) over 0 .. n - 1, of `work` numbers each.
template <class Sequences>
void over_batch(int64_t batch, int64_t numbers, const Sequences& sequences) {
  const Alone alone;
  const auto shared = [](int64_t n, int64_t work, const auto& f) {
    torch::stable::parallel_for(0, n, kHaarGrain / work + 1, f);
  };
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || batch * numbers <= kHaarGrain)
    sequences(0, batch, alone);
  else if (batch >= 4 * threads)
    torch::stable::parallel_for(0, batch, kHaarGrain / numbers + 1,
                                [&](int64_t first, int64_t last) { sequences(first, last, alone); });
  else
    sequences(0, batch, shared);
}

}  // namespace audiokernels
