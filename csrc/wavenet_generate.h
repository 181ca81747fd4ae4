// WaveNet generation on the CPU: the sizes, the packed layout (audiokernels/wavenet_pack.py) and the job of one thread.
#pragma once

#include <cstdint>

#include "generation.h"
#include "isa.h"

namespace audiokernels {

// WaveNetShape.to_ints() of the Python side, in its order; the functions mirror those of audiokernels/wavenet_pack.py.
struct WaveNetShape {
  int64_t dtype, residual, hidden, skip, head, n_class, width, condition, hop;
  const int64_t* dilations;
  int64_t n_layer;

  int64_t residual_rows() const;
  int64_t gate_rows() const;  // tanh half | sigmoid half
  int64_t skip_rows() const;
  int64_t mix_rows(int64_t layer) const;  // residual | skip; the last layer has the skip part alone
  int64_t table_bytes() const;            // embedding and condition
  int64_t pack_bytes() const;
  int64_t ring_slots(int64_t layer) const;
  int64_t state_floats() const;
  int64_t max_inputs() const;                   // the longest padded input row of a matrix
  int64_t scratch_floats(int64_t batch) const;  // see Scratch in wavenet_generate_simd.cpp
};

#define AUDIOKERNELS_DECLARE(isa)                                        \
  namespace isa {                                                        \
  void wavenet_run(const WaveNetShape& shape, const GenerationJob& job); \
  }
AUDIOKERNELS_FOR_EACH_ISA(AUDIOKERNELS_DECLARE)
#undef AUDIOKERNELS_DECLARE

// Reads WaveNetShape.to_ints(); throws std::invalid_argument if the numbers make no sense.
WaveNetShape wavenet_shape(const int64_t* ints, int64_t count);

// Runs the streams begin .. end - 1 of a job on this thread, with the instruction set in use.
void wavenet_run_streams(const WaveNetShape& shape, const GenerationJob& job, int64_t begin, int64_t end);

}  // namespace audiokernels
