// Weights that stay in shared memory: a block's part of a matrix, copied there at the start.
#pragma once

#include "transformer_block.h"

namespace audiokernels {
namespace {

// What a block multiplies with: groups of 16 rows of a matrix in the pack, in runs of `run` groups, `stride` apart; or
// the same rows by themselves, with the inputs of a slice or more. Steps of inputs count from the pack's first one.
struct Operand : PackedMatrix {
  int first, groups, run, stride;
  int skipped;  // steps that are not there

  __device__ int group_of(int i) const {
    const Quotient at(i, run);
    return first + at.quotient * stride + at.remainder;
  }
};

__device__ inline Operand all_rows(const PackedMatrix& m) { return {m, 0, m.rows / 16, m.rows / 16, 0, 0}; }

// Where `whole`, of one tap, lies in shared memory with `steps` of its steps from step `skipped` on; `to` moves past
// it.
template <class Dot>
__device__ Operand resident_part(const Operand& whole, int skipped, int steps, char*& to) {
  const int rows = 16 * whole.groups;
  Operand part{{}, 0, whole.groups, larger(whole.groups, 1), 0, skipped};
  part.bias = reinterpret_cast<const float*>(to);
  part.scale = part.bias + rows;
  part.lanes = reinterpret_cast<const uint4*>(Dot::kByTap ? part.scale + rows : part.scale);
  part.rows = rows, part.taps = 1, part.steps = steps;
  to += 4 * rows * (1 + Dot::kByTap + steps);
  return part;
}

// Fills it.
template <class Dot>
__device__ void load_part(const Operand& whole, const Operand& part) {
  const int quads = part.rows / 4;
#pragma unroll 1
  for (int i = thread_of(); i < part.rows; i += kThreads) {
    const int row = 16 * whole.group_of(i / 16) + i % 16;
    const_cast<float*>(part.bias)[i] = __ldg(whole.bias + row);
    if (Dot::kByTap) const_cast<float*>(part.scale)[i] = __ldg(whole.scale + row);
  }
#pragma unroll 2
  for (int i = thread_of(); i < part.steps * quads; i += kThreads) {
    const int step = i / quads + part.skipped, quad = i % quads;
    const_cast<uint4*>(part.lanes)[i] =
        __ldg(whole.lanes + int64_t(step) * (whole.rows / 4) + 4 * whole.group_of(quad / 4) + quad % 4);
  }
}

}  // namespace
}  // namespace audiokernels
