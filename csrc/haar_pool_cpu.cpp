// haar_pool and haar_pool_ on the CPU: checks, threads, registration. The hot loops are *_simd.cpp; float64 is here.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "haar_cpu.h"

namespace audiokernels {
namespace {

struct Kernels {
  int lanes;
  decltype(&generic::haar_pool_sums) sums, combine;
  decltype(&generic::haar_pool_write) write;
};

Kernels pick_kernels() {
#define AUDIOKERNELS_KERNELS(name) \
  {name::haar_lanes(), &name::haar_pool_sums, &name::haar_pool_combine, &name::haar_pool_write}
#define AUDIOKERNELS_CASE(name) \
  case Isa::name: return AUDIOKERNELS_KERNELS(name);
  switch (float_isa()) {
    AUDIOKERNELS_FOR_EACH_FLOAT_ISA(AUDIOKERNELS_CASE)
    default: return AUDIOKERNELS_KERNELS(generic);
  }
#undef AUDIOKERNELS_CASE
#undef AUDIOKERNELS_KERNELS
}

HaarMode haar_mode(bool causal, bool count, bool adjoint) {
  if (!causal) return HaarMode::block;
  return !count ? HaarMode::window : adjoint ? HaarMode::count_adjoint : HaarMode::count;
}

// The first level whose blocks hold the sequence; 1 at least.
int whole_level(int64_t seqlen) {
  int level = 1;
  while ((int64_t(1) << level) < seqlen) level++;
  return level;
}

// What a full causal window is divided by.
double width(int64_t level, HaarMode mode, int64_t seqlen) {
  const bool counted = mode == HaarMode::count || mode == HaarMode::count_adjoint;
  return level >= 0 ? double(int64_t(1) << level) : counted ? 0x1p62 : double(seqlen);
}

// The plan of a call for vectors of `lanes` channels.
struct Plan {
  std::vector<HaarColumn> columns;
  std::vector<int64_t> copied;
  int32_t n_sums = 0;

  Plan(const std::vector<int64_t>& runs, HaarMode mode, int64_t seqlen, int lanes) {
    const int whole = whole_level(seqlen);
    int64_t channel = 0;
    for (size_t i = 0; i < runs.size(); channel += runs[i + 1], i += 2) {
      if (runs[i + 1] == 0) continue;
      if (runs[i] == 0) {
        copied.insert(copied.end(), {channel, runs[i + 1]});
        continue;
      }
      const int level = runs[i] < 0 || runs[i] > whole ? whole : int(runs[i]);
      for (int64_t c = channel; c < channel + runs[i + 1]; c++) {
        if (columns.empty() || columns.back().n == lanes || columns.back().first + columns.back().n < c)
          columns.push_back({c, 0, level, level, 0, -1, {}, {}, {}});
        add_lanes(columns.back(), level, float(width(runs[i], mode, seqlen)));
      }
    }
    for (HaarColumn& column : columns) {
      if (column.high > kHaarStripLevel) column.sums = n_sums++;
    }
  }

 private:
  static void add_lanes(HaarColumn& column, int level, float width) {
    for (int lane = column.n++; lane < kHaarMostLanes; lane++)
      column.level[lane] = level, column.width[lane] = width, column.scale[lane] = 1 / width;
    column.levels |= uint64_t(1) << level;
    column.low = level < column.low ? level : column.low;
    column.high = level > column.high ? level : column.high;
  }
};

// What differs between the sequences of a batch: where they lie.
struct Batch {
  int64_t size, x_stride, y_stride, bytes;
};

template <class Each>
void pool_sequence(const HaarPool& c, const Kernels& kernels, const Each& each) {
  const int64_t strips = c.strips(), strip_work = c.dim * kHaarStrip, column_work = c.seqlen * kernels.lanes;
  if (c.sums) {
    each(strips, strip_work, [&](int64_t first, int64_t last) { kernels.sums(c, first, last); });
    each(c.n_columns, column_work, [&](int64_t first, int64_t last) { kernels.combine(c, first, last); });
  }
  if (c.x == c.y && c.mode != HaarMode::block) {  // a window reads steps of strips before
    each(c.n_columns, column_work, [&](int64_t first, int64_t last) { kernels.write(c, {0, strips, first, last}); });
  } else {
    each(strips, strip_work, [&](int64_t first, int64_t last) { kernels.write(c, {first, last, 0, c.n_columns}); });
  }
}

void pool_batch(HaarPool c, const Batch& batch, const Plan& plan, const Kernels& kernels) {
  c.columns = plan.columns.data(), c.n_columns = int64_t(plan.columns.size());
  c.copied = plan.copied.data(), c.n_copied = int64_t(plan.copied.size() / 2);
  const int64_t numbers = plan.n_sums * c.strips() * kernels.lanes;
  const bool causal = c.mode != HaarMode::block;
  const int64_t ring_numbers = causal ? plan.n_sums * c.ring_strips() * kernels.lanes : 0;
  const auto sequences = [&]<class Each>(int64_t first, int64_t last, const Each& each) {
    const bool in_order = causal && std::is_same_v<Each, Alone> && c.x != c.y;
    const Floats sums = new_floats(in_order ? 0 : numbers), rings = new_floats(ring_numbers);
    HaarPool one = c;
    one.sums = numbers && !in_order ? sums.get() : nullptr;
    one.rings = rings.get();
    for (int64_t b = first; b < last; b++) {
      one.x = static_cast<const char*>(c.x) + b * batch.x_stride * batch.bytes;
      one.y = static_cast<char*>(c.y) + b * batch.y_stride * batch.bytes;
      std::fill_n(one.rings, ring_numbers, 0.0f);
      pool_sequence(one, kernels, each);
    }
  };
  over_batch(batch.size, c.seqlen * c.dim, sequences);
}

// ---- float64 ----

// In place, one channel of a sequence; `level` as in runs.
void pool_channel(double* v, int64_t n, int64_t level, HaarMode mode) {
  const int whole = whole_level(n);
  const int64_t block = int64_t(1) << (level < 0 || level > whole ? whole : level);
  if (mode == HaarMode::block) {
    for (int64_t start = 0; start < n; start += block) {
      const int64_t end = start + block < n ? start + block : n;
      double sum = 0;
      for (int64_t t = start; t < end; t++) sum += v[t];
      for (int64_t t = start; t < end; t++) v[t] = sum / double(end - start);
    }
    return;
  }
  const double most = width(level, mode, n);
  const auto steps = [&](int64_t t) { return double(t + 1) < most ? double(t + 1) : most; };
  if (mode == HaarMode::count_adjoint)
    for (int64_t t = 0; t < n; t++) v[t] /= steps(n - 1 - t);
  for (int64_t half = 1; half < block; half *= 2)
    for (int64_t t = n - 1; t >= half; t--) v[t] += v[t - half];
  if (mode != HaarMode::count_adjoint)
    for (int64_t t = 0; t < n; t++) v[t] /= mode == HaarMode::count ? steps(t) : most;
}

void pool_double(const HaarPool& c, const Batch& batch, const std::vector<int64_t>& runs) {
  std::vector<double> channel(c.seqlen);
  for (int64_t b = 0; b < batch.size; b++) {
    const double* x = static_cast<const double*>(c.x) + b * batch.x_stride;
    double* y = static_cast<double*>(c.y) + b * batch.y_stride;
    for (size_t i = 0; i < runs.size(); i += 2) {
      for (int64_t k = 0; k < runs[i + 1]; k++, x++, y++) {
        if (runs[i] == 0 && c.x == c.y) continue;
        for (int64_t t = 0; t < c.seqlen; t++) channel[t] = x[t * c.x_row];
        if (runs[i]) pool_channel(channel.data(), c.seqlen, runs[i], c.mode);
        for (int64_t t = 0; t < c.seqlen; t++) y[t * c.y_row] = channel[t];
      }
    }
  }
}

// ---- the ops ----

// x and y have adjacent channels.
void pool(const Tensor& x, const Tensor& y, const std::vector<int64_t>& runs, HaarMode mode, bool reversed) {
  HaarPool c{};
  c.dtype = dtype_of(x.scalar_type());
  c.mode = mode;
  c.seqlen = x.size(1), c.dim = x.size(2);
  const Batch batch{x.size(0), x.stride(0), y.stride(0), bytes_of(c.dtype)};
  c.x_row = x.stride(1), c.y_row = y.stride(1);
  c.x = x.data_ptr(), c.y = y.data_ptr();
  if (reversed) {
    c.x = static_cast<const char*>(c.x) + (c.seqlen - 1) * c.x_row * batch.bytes;
    c.y = static_cast<char*>(c.y) + (c.seqlen - 1) * c.y_row * batch.bytes;
    c.x_row = -c.x_row, c.y_row = -c.y_row;
  }
  if (c.dtype == Dtype::float64) return pool_double(c, batch, runs);
  const Kernels kernels = pick_kernels();
  pool_batch(c, batch, Plan(runs, mode, c.seqlen, kernels.lanes), kernels);
}

Tensor haar_pool(Tensor x, std::vector<int64_t> runs, bool causal, bool count, bool adjoint) {
  check_rows(x, "x", 3);
  check_runs(runs, x.size(2));
  Tensor y = empty_rows(x, x.size(1));
  if (x.numel()) pool(adjacent(x), y, runs, haar_mode(causal, count, adjoint), causal && adjoint);
  return y;
}

void haar_pool_(Tensor x, std::vector<int64_t> runs, bool causal, bool count) {
  check_rows(x, "x", 3);
  check_runs(runs, x.size(2));
  for (int i = 0; i < 3; i++) STD_TORCH_CHECK(x.size(i) <= 1 || x.stride(i) != 0, "x must not be an expanded view");
  if (x.numel() == 0) return;
  const HaarMode mode = haar_mode(causal, count, false);
  if (x.size(2) <= 1 || x.stride(2) == 1) return pool(x, x, runs, mode, false);
  Tensor rows = torch::stable::contiguous(x);  // a copy, because the channels of x are not adjacent
  pool(rows, rows, runs, mode, false);
  torch::stable::copy_(x, rows);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(audiokernels, CPU, m) {
  m.impl("haar_pool", TORCH_BOX(&haar_pool));
  m.impl("haar_pool_", TORCH_BOX(&haar_pool_));
}

}  // namespace audiokernels
