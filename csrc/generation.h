// What the generators share on the CPU: packed matrices (audiokernels/_packing.py), the head of a state, a thread's
// job.
#pragma once

#include <cstdint>

namespace audiokernels {

enum PackDtype : int64_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kFloat16 = 3 };

constexpr int64_t kRowLanes = 16;     // outputs are padded to this
constexpr int64_t kStateHeader = 16;  // floats: position % 2^20, position / 2^20, last code, unused
constexpr int64_t kPositionBase = 1 << 20;
constexpr int64_t kMaxInputs = 65536;  // 255 * 127 * inputs stays below 2^31

// Never a shared inline copy: this header is compiled once per instruction set.
__attribute__((always_inline)) constexpr int64_t pad_lanes(int64_t n) {
  return (n + kRowLanes - 1) / kRowLanes * kRowLanes;
}

// Inputs in one 32-bit lane.
__attribute__((always_inline)) constexpr int64_t lane_inputs(int64_t dtype) {
  return dtype == kFloat32 ? 1 : dtype == kInt8 ? 4 : 2;
}

__attribute__((always_inline)) constexpr int64_t matrix_bytes(int64_t dtype, int64_t rows, int64_t taps,
                                                              int64_t inputs) {
  const int64_t group = lane_inputs(dtype);
  return 4 * rows + (dtype == kInt8 ? 8 * taps * rows : 0) + taps * ((inputs + group - 1) / group) * rows * 4;
}

__attribute__((always_inline)) inline int64_t state_position(const float* state) {
  return int64_t(state[0]) + kPositionBase * int64_t(state[1]);
}

// How a code is drawn; audiokernels/sampling.py has the rule.
struct Sampling {
  float temperature;
  int32_t top_k;  // 0: all classes stay
  float top_p;    // 1: all that top_k leaves stay
};

// One thread's part of a call: n samples of `batch` streams, everything checked before.
struct GenerationJob {
  const uint8_t* pack;
  float* state;  // batch rows, state_stride apart
  int64_t state_stride;
  const float* uniforms;  // (batch, n)
  const int32_t* codes;   // (batch, forced)
  int64_t forced;
  const float* condition;  // (batch, frames, channels), or null
  int64_t frames, channels;
  void* out;      // (batch, n) uint8, or int16 above 256 classes
  float* logits;  // (batch, n, n_class), or null
  int64_t n_class, batch, n;
  Sampling sampling;
  float* scratch;  // aligned to 64 bytes
};

}  // namespace audiokernels
