// What the Haar ops on the CPU share; audiokernels/haar_*.py define them. A call here is one sequence of a batch.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace audiokernels {

constexpr int kHaarStripLevel = 3;  // levels that a strip of 8 steps holds; higher ones are summed from strips
constexpr int64_t kHaarStrip = 1 << kHaarStripLevel;
constexpr int kHaarMostLanes = 16;

// Up to a vector of neighbouring channels, none of level 0. `level` is at most the first that holds the sequence.
struct HaarColumn {
  int64_t first;                  // channel
  int32_t n;                      // channels; lanes past them have the last one's level
  int32_t low, high;              // the least and the greatest level
  uint64_t levels;                // bit l: a lane has level l
  int32_t sums;                   // its place in HaarPool::sums; -1 where no level is beyond a strip
  int32_t level[kHaarMostLanes];  // of every lane
  float width[kHaarMostLanes];    // causal: what a full window is divided by
  float scale[kHaarMostLanes];    // 1 / width
};

enum class HaarMode { block, window, count, count_adjoint };  // window's adjoint is window on the reversed sequence

struct HaarPool {
  Dtype dtype;
  HaarMode mode;
  int64_t seqlen, dim;
  const void* x;  // of step 0; the adjoint reverses time by negative rows
  void* y;        // x itself in place
  int64_t x_row, y_row;
  const HaarColumn* columns;
  const int64_t* copied;  // [first, count, ...] channels of level 0
  int64_t n_columns, n_copied;
  // (column with sums, strip, lane): of the strips; then what haar_pool_write adds to a strip's own. Causal modes: null
  // if haar_pool_write gets all strips, and so makes the sums itself
  float* sums;
  float* rings;  // (column with sums, ring_strips(), lane), zeros before the first strip; causal modes

  __attribute__((always_inline)) int64_t strips() const { return (seqlen + kHaarStrip - 1) / kHaarStrip; }
  __attribute__((always_inline)) int64_t ring_strips() const { return 2 * strips(); }  // 1 + 2 + 4 .. up to any level
};

// A part of the results. In place its strips are written from the last to the first.
struct HaarPart {
  int64_t first_strip, last_strip, first_column, last_column;
};

// The transform of one sequence; stages of three levels keep a strip of rows between them.
struct HaarWavelet {
  Dtype dtype;
  bool edge;
  int64_t seqlen, padded, n_levels, dim;
  void* x;  // (seqlen, dim), read or written
  int64_t x_row;
  void* coeffs;  // (padded, dim): [a_J | d_J | .. | d_1]
  int64_t coeffs_row;
  float* scratch;  // haar_wavelet_stages(n_levels) * kHaarStrip * dim
};

constexpr __attribute__((always_inline)) int64_t haar_wavelet_stages(int64_t n_levels) {
  return n_levels ? (n_levels + kHaarStripLevel - 1) / kHaarStripLevel : 1;
}

// A step of one sequence; numbers are float (double for float64).
struct HaarUpdate {
  bool float64, count;
  int64_t position, seqlen;
  const int64_t* runs;
  int64_t n_runs;
  void* x;  // taken, and replaced by y
  void* state;
};

#define AUDIOKERNELS_DECLARE(isa)                                                                              \
  namespace isa {                                                                                              \
  int haar_lanes();                                                                                            \
  void haar_pool_sums(const HaarPool& call, int64_t first, int64_t last);    /* of strips first .. last - 1 */ \
  void haar_pool_combine(const HaarPool& call, int64_t first, int64_t last); /* the sums of these columns */   \
  void haar_pool_write(const HaarPool& call, const HaarPart& part);                                            \
  void haar_dwt(const HaarWavelet& call, int64_t first, int64_t last); /* these channels */                    \
  void haar_idwt(const HaarWavelet& call, int64_t first, int64_t last);                                        \
  void haar_pool_update(const HaarUpdate& call);                                                               \
  }
AUDIOKERNELS_FOR_EACH_FLOAT_ISA(AUDIOKERNELS_DECLARE)
#undef AUDIOKERNELS_DECLARE

}  // namespace audiokernels
