// A step of haar_pool_update, compiled once per instruction set; the compiler makes vectors of the loops over channels.
#include "haar_rows.h"

namespace audiokernels {
namespace AUDIOKERNELS_ISA {
namespace {

// One run: n channels of a level above 0 or of level -1. `x` becomes the windows' means.
template <class S>
struct Run {
  S *x, *state;
  int64_t n, level, position;
  S width;

  S* slot(int64_t j) const { return state + (1 + j) * n; }

  void step() const {
    const int64_t block = level < 0 ? INT64_MAX : int64_t(1) << level, phase = level < 0 ? position : position % block;
    const bool ring = level > 0, last = ring && phase == block - 1;
    if (phase == 0) memset(state, 0, 2 * n * sizeof(S));
    add(ring && !last ? slot(phase + 1) : nullptr, ring && phase > 0 ? slot(phase) : nullptr);
    if (last) sum_slots(block);
  }

  // Knuth's two-sum: `low` takes what the addition to `high` rounds away.
  void add(const S* rest, S* now) const {
    S *high = state, *low = state + n;
    for (int64_t i = 0; i < n; i++) {
      const S value = x[i], total = high[i] + value, part = total - high[i];
      const S lost = (high[i] - (total - part)) + (value - part);
      low[i] += lost == lost ? lost : 0;
      high[i] = total;
      x[i] = ((rest ? total + rest[i] : total) + low[i]) / width;
      if (now) now[i] = value;
    }
  }

  // The block is full: each slot becomes the sum of itself and those after it.
  void sum_slots(int64_t block) const {
    constexpr int64_t some = 16;
    for (int64_t first = 0; first < n; first += some) {
      double sums[some] = {};
      const int64_t count = least(some, n - first);
      for (int64_t j = block - 1; j > 0; j--) {
        S* values = slot(j) + first;
        for (int64_t i = 0; i < count; i++) values[i] = S(sums[i] += values[i]);
      }
    }
  }
};

template <class S>
void update(const HaarUpdate& u) {
  S *x = (S*)u.x, *state = (S*)u.state;
  for (int64_t r = 0; r < u.n_runs; r++) {
    const int64_t level = u.runs[2 * r], n = u.runs[2 * r + 1], steps = u.position + 1;
    const int64_t rows = level == 0 ? 0 : level < 0 ? 2 : (int64_t(1) << level) + 1;
    if (rows && n) {
      const int64_t block = level < 0 ? (u.count ? steps : u.seqlen) : int64_t(1) << level;
      Run<S>{x, state, n, level, u.position, S(u.count ? least(steps, block) : block)}.step();
    }
    x += n, state += rows * n;
  }
}

}  // namespace

void haar_pool_update(const HaarUpdate& u) { u.float64 ? update<double>(u) : update<float>(u); }

}  // namespace AUDIOKERNELS_ISA
}  // namespace audiokernels
