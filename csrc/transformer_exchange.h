// How the slices' sums, and rows that each block has some of, reach all blocks of a stream.
//
// A value of an exchange travels with its completion (st.async on an mbarrier of the receiver), into one of two buffers
// in turn. A block sends for exchange i + 2 after it has received i + 1 from all others, which they sent after they had
// read i: nothing is overwritten early. So a block that has nothing to send still sends a token.
#pragma once

#include "transformer_block.h"

namespace audiokernels {
namespace {

struct Alone {
  float* buffer;

  __device__ Alone(const TransformerCall&, const TransformerPlaces& at, char* shared)
      : buffer(reinterpret_cast<float*>(shared + at.buffer)) {}
  static __device__ int rank() { return 0; }
  __device__ void start() const {}
  __device__ void begin(int, int) const {}
  __device__ void put_four(int offset, const float4& v, int sub) const {
    if (sub == 0) *reinterpret_cast<float4*>(buffer + offset) = v;
  }
  __device__ void put(int offset, float v) const { buffer[offset] = v; }
  __device__ const float* finish() const {  // what all have put since begin
    __syncthreads();
    return buffer;
  }
  __device__ void end() const {}
};

#ifdef AK_CLUSTERS
struct Together {
  float* buffer;
  uint32_t bars;
  int blocks, floats;
  uint32_t count = 0;  // of exchanges

  __device__ Together(const TransformerCall& c, const TransformerPlaces& at, char* shared)
      : buffer(reinterpret_cast<float*>(shared + at.buffer)),
        bars(ptx::shared_address(shared + at.bars)),
        blocks(c.blocks),
        floats(at.buffer_floats) {}
  static __device__ int rank() { return int(ptx::cluster_rank()); }
  __device__ void start() const {
    if (thread_of() == 0) {
      ptx::mbarrier_init(bars, 1);
      ptx::mbarrier_init(bars + 8, 1);
      ptx::mbarrier_fence_init();
    }
    end();
  }
  __device__ float* here() const { return buffer + int(count & 1) * floats; }
  __device__ uint32_t bar() const { return bars + 8 * (count & 1); }
  // An exchange of so many bytes, made by the first `senders` blocks.
  __device__ void begin(int bytes, int senders) const {
    if (thread_of() > 0) return;
    ptx::mbarrier_arrive_expect(bar(), uint32_t(bytes + 4 * (blocks - senders)));
    if (rank() >= senders) put(floats - 1, 0.0f);
  }
  __device__ void put_four(int offset, const float4& v, int sub) const {
    const uint4 bits{__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)};
    const uint32_t to = ptx::shared_address(here() + offset);
    for (int rank = sub; rank < blocks; rank += kSubs)
      ptx::store_async(ptx::map_shared(to, rank), bits, ptx::map_shared(bar(), rank));
  }
  __device__ void put(int offset, float v) const {
    const uint32_t to = ptx::shared_address(here() + offset);
#pragma unroll 4
    for (int rank = 0; rank < blocks; rank++)
      ptx::store_async(ptx::map_shared(to, rank), __float_as_uint(v), ptx::map_shared(bar(), rank));
  }
  __device__ const float* finish() {
    wait(bar(), count / 2);
    const float* received = here();
    count++;
    return received;
  }
  __device__ void end() const {  // no block ends, or is written to, before the others are there
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
};
#endif

}  // namespace
}  // namespace audiokernels
