// The draw of a code (audiokernels/sampling.py has the rule), compiled once per instruction set; every sum
// has one order.
#pragma once

#include "generation.h"
#include "simd.h"

namespace audiokernels {
namespace AUDIOKERNELS_ISA {
namespace {

AK_INLINE float sum_block(const float* p) {
  float sum = 0.0f;
  for (int64_t i = 0; i < 16; i++) sum += p[i];
  return sum;
}

struct Top {
  int32_t count;
  float sum;
};

// Of x those that are at least `least`: how many, and their sum, in 16 sums side by side that are then added in order.
static Top top_from(const float* x, int64_t rows, float least) {
  constexpr int parts = kRowLanes / kLanes;
  VFloat sum[parts] = {};
  VInt count[parts] = {};
  for (int64_t i = 0; i < rows; i += kRowLanes)
    for (int l = 0; l < parts; l++) {
      const VFloat v = load(x + i + l * kLanes);
      const VInt stays = v >= splat(least);
      sum[l] += (VFloat)((VInt)v & stays);
      count[l] -= stays;
    }
  float sums[kRowLanes];
  int32_t counts[kRowLanes];
  memcpy(sums, sum, sizeof sums);
  memcpy(counts, count, sizeof counts);
  Top top{};
  for (int i = 0; i < kRowLanes; i++) top.sum += sums[i], top.count += counts[i];
  return top;
}

// The bits of a float as an integer that rises with it, and back.
AK_INLINE int32_t rising(int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); }
AK_INLINE int32_t key_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return rising(bits);
}
AK_INLINE float float_of(int32_t key) {
  const int32_t bits = rising(key);
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Makes all of x `lowest` that lie below the largest threshold at which at least `count` of them stay, and the sum
// `sum`. Bisects the bits of the threshold until one number lies between the bounds, or the bounds meet.
static void leave_out(float* x, int64_t rows, float lowest, int32_t count, float sum) {
  int32_t low = key_of(lowest), high = key_of(__builtin_inff());
  int32_t most = int32_t(rows), fewest = 0;  // at the bounds
  while (low + 1 < high && most - fewest > 1) {
    const int32_t middle = (low & high) + ((low ^ high) >> 1);  // their mean, without overflow
    const Top top = top_from(x, rows, float_of(middle));
    if (top.count >= count && top.sum >= sum)
      low = middle, most = top.count;
    else
      high = middle, fewest = top.count;
  }
  const VFloat least = splat(float_of(low));
  for (int64_t i = 0; i < rows; i += kLanes) {
    const VFloat v = load(x + i);
    store(x + i, v >= least ? v : splat(lowest));
  }
}

// The first class whose cumulative probability exceeds u. Blocks of 16 are summed in order, then their sums.
static int32_t draw(float* logits, int64_t n_class, float u, const Sampling& sampling) {
  const int64_t rows = pad_lanes(n_class);
  for (int64_t i = n_class; i < rows; i++) logits[i] = -__builtin_inff();
  VFloat most = load(logits);
  for (int64_t i = kLanes; i < rows; i += kLanes) most = max(load(logits + i), most);
  const float largest = reduce_max(most);
  if (sampling.temperature == 0.0f) {
    for (int64_t i = 0; i < n_class; i++)
      if (logits[i] == largest) return int32_t(i);
    return 0;
  }
  if (sampling.top_k > 0) leave_out(logits, rows, -__builtin_inff(), sampling.top_k, -__builtin_inff());
  float* p = logits;
  const VFloat inverse = splat(1.0f / sampling.temperature);
  for (int64_t i = 0; i < rows; i += kLanes) {
    const VFloat l = (load(logits + i) - splat(largest)) * inverse;
    store(p + i, l >= splat(-87.0f) ? exp_clamped(l, 87.0f) : splat(0.0f));  // 0 of NaN too
  }
  if (sampling.top_p < 1.0f) leave_out(p, rows, 0.0f, 1, sampling.top_p * top_from(p, rows, 0.0f).sum);
  float total = 0.0f;
  for (int64_t i = 0; i < rows; i += 16) total += sum_block(p + i);
  const float target = u * total;
  float before = 0.0f;
  for (int64_t i = 0; i < rows; i += 16) {
    const float block = sum_block(p + i);
    if (before + block > target) {
      float within = 0.0f;
      int64_t j = 0;
      while (before + (within += p[i + j]) <= target) j++;  // ends: the last sum is `block` again
      return int32_t(i + j);
    }
    before += block;
  }
  for (int64_t i = n_class - 1; i > 0; i--)  // u * total was rounded up to the total: the last class that can be
    if (p[i] > 0.0f) return int32_t(i);
  return 0;
}

}  // namespace
}  // namespace AUDIOKERNELS_ISA
}  // namespace audiokernels
