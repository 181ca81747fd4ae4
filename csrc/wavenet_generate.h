// WaveNet generation on the CPU: the sizes, the packed layout (audiokernels/wavenet_pack.py) and the job of one thread.
#pragma once

#include <cstdint>

#include "isa.h"

namespace audiokernels {

enum WaveNetDtype : int64_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kFloat16 = 3 };

constexpr int64_t kRowLanes = 16;     // outputs are padded to this
constexpr int64_t kStateHeader = 16;  // floats: position % 2^20, position / 2^20, last code, unused
constexpr int64_t kPositionBase = 1 << 20;

// Never a shared inline copy: this header is compiled once per instruction set.
__attribute__((always_inline)) constexpr int64_t pad_lanes(int64_t n) {
  return (n + kRowLanes - 1) / kRowLanes * kRowLanes;
}

// WaveNetShape.to_ints() of the Python side, in its order; the functions mirror those of audiokernels/wavenet_pack.py.
struct WaveNetShape {
  int64_t dtype, residual, hidden, skip, head, n_class, width, condition, hop;
  const int64_t* dilations;
  int64_t n_layer;

  int64_t group() const;  // inputs in one 32-bit lane
  int64_t residual_rows() const;
  int64_t gate_rows() const;  // tanh half | sigmoid half
  int64_t skip_rows() const;
  int64_t mix_rows(int64_t layer) const;  // residual | skip; the last layer has the skip part alone
  int64_t matrix_bytes(int64_t rows, int64_t taps, int64_t inputs) const;
  int64_t table_bytes() const;  // embedding and condition
  int64_t pack_bytes() const;
  int64_t ring_slots(int64_t layer) const;
  int64_t state_floats() const;
  int64_t max_inputs() const;                   // the longest padded input row of a matrix
  int64_t scratch_floats(int64_t batch) const;  // see Scratch in wavenet_generate_simd.cpp
};

__attribute__((always_inline)) inline int64_t state_position(const float* state) {
  return int64_t(state[0]) + kPositionBase * int64_t(state[1]);
}

// One thread's part of a call: n samples of `batch` streams, everything checked before.
struct WaveNetJob {
  const WaveNetShape* shape;
  const uint8_t* pack;
  float* state;  // batch rows, state_stride apart
  int64_t state_stride;
  const float* uniforms;  // (batch, n)
  const int32_t* codes;   // (batch, forced)
  int64_t forced;
  const float* condition;  // (batch, frames, channels), or null
  int64_t frames;
  void* out;      // (batch, n) uint8, or int16 above 256 classes
  float* logits;  // (batch, n, n_class), or null
  int64_t batch, n;
  float temperature;
  float* scratch;  // shape->scratch_floats(batch); set by wavenet_run_streams
};

#define AUDIOKERNELS_DECLARE(isa)          \
  namespace isa {                          \
  void wavenet_run(const WaveNetJob& job); \
  }
AUDIOKERNELS_FOR_EACH_ISA(AUDIOKERNELS_DECLARE)
#undef AUDIOKERNELS_DECLARE

// Reads WaveNetShape.to_ints(); throws std::invalid_argument if the numbers make no sense.
WaveNetShape wavenet_shape(const int64_t* ints, int64_t count);

// Throws std::invalid_argument if the header of a state row does not hold a position and a code.
void wavenet_check_state(const WaveNetShape& shape, const float* state, int64_t batch, int64_t stride);

// Frames of condition that the next n samples of these streams touch, from the frame of the position on.
int64_t wavenet_frames(const WaveNetShape& shape, const float* state, int64_t batch, int64_t stride, int64_t n);

// Runs the streams begin .. end - 1 of a job on this thread, with the instruction set in use.
void wavenet_run_streams(const WaveNetJob& job, int64_t begin, int64_t end);

}  // namespace audiokernels
