// What all parts of a transformer's kernel know: the block, its threads, small arithmetic.
#pragma once

#include "generation_device.h"
#include "transformer_generate_cuda.h"

namespace audiokernels {
namespace {

constexpr int kThreads = kTransformerThreads, kWarps = kThreads / 32;
constexpr float kFaint = -40.0f;  // as on the CPU: a weight of e^-40 of the largest is lost in float32

__device__ inline float weight_of(float x) { return x < kFaint ? 0.0f : exp_clamped(x, -kFaint); }

// Opaque, so that what follows from them is not kept in registers through the whole loop.
__device__ inline int thread_of() { return ptx::opaque(int(threadIdx.x)); }
__device__ inline int warp_of() { return thread_of() / 32; }
__device__ inline int lane_of() { return thread_of() % 32; }

// i / by and i % by, where the quotient is small: a division takes some 40 cycles.
struct Quotient {
  int quotient = 0, remainder;
  __device__ Quotient(int i, int by) : remainder(i) {
    while (remainder >= by) remainder -= by, quotient++;
  }
};

// A block of a stream: its sizes and shared memory, and where the stream stands.
struct Block {
  const TransformerCall& c;
  const TransformerPlaces& at;
  char* shared;
  int rank;  // among the stream's blocks
  Heads heads;
  float* state;
  int64_t position;
  int slot;  // of the ring of keys

  __device__ Block(const TransformerCall& call, const TransformerPlaces& places, int rank)
      : c(call),
        at(places),
        shared(ptx::dynamic_shared()),
        rank(rank),
        heads(call, rank),
        state(call.state + stream() * call.state_stride),
        position(read_position(state)) {
    slot = int(position % c.capacity());
  }

  __device__ int64_t stream() const { return unsigned(blockIdx.x) / unsigned(c.blocks); }
  __device__ int64_t start() const { return read_position(state); }  // of the call: the header is written at its end
  __device__ float* floats(int offset) const { return reinterpret_cast<float*>(shared + offset); }
  __device__ int* ints(int offset) const { return reinterpret_cast<int*>(shared + offset); }
  __device__ int& code() const { return *ints(at.code); }  // the last one
  __device__ Cut share(const Slices& slices) const { return {slices, rank}; }
};

}  // namespace
}  // namespace audiokernels
