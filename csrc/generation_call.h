// A call of <room>_generate: its checks, its results, its threads. Host code of both rooms.
#pragma once

#include <functional>
#include <optional>
#include <tuple>

#include "generation.h"
#include "torch_stable.h"

namespace audiokernels {

// What the checks need to know of a pack's shape.
struct GenerationSizes {
  int64_t pack_bytes, state_floats, n_class, condition, hop;
};

// The arguments of the op.
struct GenerationCall {
  Tensor weights, state, uniforms;
  std::optional<Tensor> codes, condition;
  Sampling sampling;
  bool return_logits;
};

// Throws std::runtime_error for a number that is out of range.
Sampling check_sampling(double temperature, std::optional<int64_t> top_k, std::optional<double> top_p, int64_t n_class);

// Throws std::invalid_argument if the header of a state row does not hold a position and a code.
void check_state_header(int64_t n_class, const float* state, int64_t batch, int64_t stride);

// Frames of condition that the next n samples of these streams touch, from the frame of the position on.
int64_t touched_frames(int64_t hop, const float* state, int64_t batch, int64_t stride, int64_t n);

// Streams begin .. end - 1 of a job, with `floats` of scratch, given to `run`.
void run_streams(const GenerationJob& job, int64_t begin, int64_t end, int64_t floats,
                 const std::function<void(const GenerationJob&)>& run);

// Checks everything before the state is touched, then gives parts of the batch to `run` on torch's threads.
std::tuple<Tensor, Tensor> generate(const GenerationSizes& sizes, const GenerationCall& call,
                                    const std::function<void(const GenerationJob&, int64_t, int64_t)>& run);

}  // namespace audiokernels
