// haar_dwt and haar_idwt on the CPU: checks, threads, registration. The hot loops are *_simd.cpp; float64 is here.
#include <cmath>
#include <optional>

#include "haar_cpu.h"

namespace audiokernels {
namespace {

constexpr int64_t kMostLevels = 30;

struct Kernels {
  decltype(&generic::haar_dwt) dwt, idwt;
};

Kernels pick_kernels() {
#define AUDIOKERNELS_CASE(name) \
  case Isa::name: return {&name::haar_dwt, &name::haar_idwt};
  switch (float_isa()) {
    AUDIOKERNELS_FOR_EACH_FLOAT_ISA(AUDIOKERNELS_CASE)
    default: return {&generic::haar_dwt, &generic::haar_idwt};
  }
#undef AUDIOKERNELS_CASE
}

int64_t padded(int64_t seqlen, int64_t n_levels) {
  const int64_t block = int64_t(1) << n_levels;
  return (seqlen + block - 1) / block * block;
}

void check_levels(const Tensor& x, const char* name, int64_t n_levels) {
  check_rows(x, name, 3);
  STD_TORCH_CHECK(0 <= n_levels && n_levels <= kMostLevels, "n_levels must be 0..30, got ", n_levels);
}

// ---- float64: a channel of a sequence at a time, one level after the other ----

void dwt_channel(const HaarWavelet& w, const double* x, double* coeffs, double* a) {
  for (int64_t t = 0; t < w.padded; t++)
    a[t] = t < w.seqlen ? x[t * w.x_row] : w.edge ? x[(w.seqlen - 1) * w.x_row] : 0;
  int64_t n = w.padded;
  for (int64_t l = 0; l < w.n_levels; l++) {
    n /= 2;
    for (int64_t k = 0; k < n; k++) {
      const double even = a[2 * k], odd = a[2 * k + 1];
      coeffs[(n + k) * w.coeffs_row] = (even - odd) * std::sqrt(0.5);
      a[k] = (even + odd) * std::sqrt(0.5);
    }
  }
  for (int64_t k = 0; k < n; k++) coeffs[k * w.coeffs_row] = a[k];
}

void idwt_channel(const HaarWavelet& w, double* x, const double* coeffs, double* a) {
  int64_t n = w.padded >> w.n_levels;
  for (int64_t k = 0; k < n; k++) a[k] = coeffs[k * w.coeffs_row];
  for (; n < w.padded; n *= 2) {
    for (int64_t k = n - 1; k >= 0; k--) {
      const double sum = a[k], difference = coeffs[(n + k) * w.coeffs_row];
      a[2 * k] = (sum + difference) * std::sqrt(0.5);
      a[2 * k + 1] = (sum - difference) * std::sqrt(0.5);
    }
  }
  for (int64_t t = 0; t < w.seqlen; t++) x[t * w.x_row] = a[t];
}

void transform_double(const HaarWavelet& w, bool forward) {
  std::vector<double> a(w.padded);
  for (int64_t c = 0; c < w.dim; c++) {
    double *x = static_cast<double*>(w.x) + c, *coeffs = static_cast<double*>(w.coeffs) + c;
    if (forward)
      dwt_channel(w, x, coeffs, a.data());
    else
      idwt_channel(w, x, coeffs, a.data());
  }
}

// ---- the ops ----

// Both have adjacent channels, and neither is empty.
void transform(const Tensor& x, const Tensor& coeffs, int64_t n_levels, bool edge, bool forward) {
  HaarWavelet whole{};
  whole.dtype = dtype_of(x.scalar_type());
  whole.edge = edge;
  whole.seqlen = x.size(1), whole.padded = coeffs.size(1), whole.n_levels = n_levels, whole.dim = x.size(2);
  whole.x_row = x.stride(1), whole.coeffs_row = coeffs.stride(1);
  const int64_t bytes = bytes_of(whole.dtype), x_stride = x.stride(0), coeffs_stride = coeffs.stride(0);
  const auto sequence = [&](int64_t b) {
    HaarWavelet w = whole;
    w.x = static_cast<char*>(x.data_ptr()) + b * x_stride * bytes;
    w.coeffs = static_cast<char*>(coeffs.data_ptr()) + b * coeffs_stride * bytes;
    return w;
  };
  if (whole.dtype == Dtype::float64) {
    for (int64_t b = 0; b < x.size(0); b++) transform_double(sequence(b), forward);
    return;
  }
  const Kernels kernels = pick_kernels();
  const auto kernel = forward ? kernels.dwt : kernels.idwt;
  over_batch(x.size(0), whole.padded * whole.dim, [&](int64_t first, int64_t last, const auto& each) {
    const Floats scratch = new_floats(haar_wavelet_stages(n_levels) * kHaarStrip * whole.dim);
    constexpr int64_t group = 32;  // channels, a cache line or more
    for (int64_t b = first; b < last; b++) {
      HaarWavelet w = sequence(b);
      w.scratch = scratch.get();
      each((w.dim + group - 1) / group, w.padded * group,
           [&](int64_t begin, int64_t end) { kernel(w, begin * group, end * group < w.dim ? end * group : w.dim); });
    }
  });
}

Tensor haar_dwt(Tensor x, int64_t n_levels, bool edge) {
  check_levels(x, "x", n_levels);
  Tensor coeffs = empty_rows(x, padded(x.size(1), n_levels));
  if (x.numel()) transform(adjacent(x), coeffs, n_levels, edge, true);
  return coeffs;
}

Tensor haar_idwt(Tensor coeffs, int64_t n_levels, std::optional<int64_t> seqlen) {
  check_levels(coeffs, "coeffs", n_levels);
  const int64_t length = coeffs.size(1);
  STD_TORCH_CHECK(length % (int64_t(1) << n_levels) == 0, "coeffs must have a multiple of 2^n_levels steps, got ",
                  length);
  STD_TORCH_CHECK(!seqlen || (0 <= *seqlen && *seqlen <= length && padded(*seqlen, n_levels) == length),
                  "seqlen must give ", length, " steps when padded to a multiple of 2^n_levels");
  Tensor x = empty_rows(coeffs, seqlen ? *seqlen : length);
  if (x.numel()) transform(x, adjacent(coeffs), n_levels, false, false);
  return x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(audiokernels, CPU, m) {
  m.impl("haar_dwt", TORCH_BOX(&haar_dwt));
  m.impl("haar_idwt", TORCH_BOX(&haar_idwt));
}

}  // namespace audiokernels
