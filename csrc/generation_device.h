// What the generators' kernels for GPUs share: the state's header, forced codes, packed matrices, exp, the draw, waits.
#pragma once

#include <cuda_fp16.h>

#include "generation_cuda.h"
#include "ptx.h"

namespace audiokernels {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// Whatever a header holds, the position and the code are ones that exist.
__device__ inline int64_t header_number(float v, int64_t limit) {
  return v >= 0.0f && v < float(limit) ? int64_t(v) : 0;
}
__device__ inline int64_t read_position(const float* state) {
  return header_number(state[0], kPositionBase) + kPositionBase * header_number(state[1], 1 << 24);
}
__device__ inline int read_code(const CudaCall& c, const float* state) {
  return int(header_number(state[2], c.n_class));
}
__device__ inline void write_header(float* state, int64_t position, int code) {
  state[0] = float(position % kPositionBase);
  state[1] = float(position / kPositionBase);
  state[2] = float(code);
}

// Known code t of stream b; one that is out of range becomes the nearest that is in it.
__device__ inline int forced_code(const CudaCall& c, int64_t b, int64_t t) {
  const int64_t at = b * c.codes_stride[0] + t * c.codes_stride[1];
  int64_t code = 0;
  switch (c.code_bytes) {
    case 1: code = static_cast<const uint8_t*>(c.codes)[at]; break;
    case 2: code = static_cast<const int16_t*>(c.codes)[at]; break;
    case 4: code = static_cast<const int32_t*>(c.codes)[at]; break;
    default: code = static_cast<const int64_t*>(c.codes)[at];
  }
  return int(code < 0 ? 0 : code < c.n_class ? code : c.n_class - 1);
}
__device__ inline void write_code(const CudaCall& c, int64_t b, int64_t t, int code) {
  if (c.n_class <= 256)
    static_cast<uint8_t*>(c.out)[b * c.n + t] = uint8_t(code);
  else
    static_cast<int16_t*>(c.out)[b * c.n + t] = int16_t(code);
}
// The frame of condition that holds `position` in a call that began at `first`; never past the last one.
__device__ inline int64_t frame_of(const CudaCall& c, int64_t first, int64_t position) {
  const int64_t frame = position / c.hop - first / c.hop;
  return frame < c.n_frames ? frame : c.n_frames - 1;
}

// ---- the polynomials of simd.h

__device__ inline float exp_within(float x) {
  constexpr float kRound = 12582912.0f;
  const float t = fmaf(x, 0x1.715476p+0f, kRound);
  const float n = t - kRound;
  float r = fmaf(n, -0x1.62e4p-1f, x);
  r = fmaf(n, -0x1.7f7d1cp-20f, r);
  float p = 0x1.6d4386p-10f;
  p = fmaf(p, r, 0x1.120ba6p-7f);
  p = fmaf(p, r, 0x1.5554e8p-5f);
  p = fmaf(p, r, 0x1.5554dcp-3f);
  p = fmaf(p, r, 0x1p-1f);
  p = fmaf(p, r, 1.0f);
  p = fmaf(p, r, 1.0f);
  return __uint_as_float(__float_as_uint(p) + (__float_as_uint(t) << 23));
}
__device__ inline float exp_clamped(float x, float limit) { return exp_within(fmaxf(fminf(x, limit), -limit)); }

// ---- the inner product of each pack type: inputs in a 32-bit lane, and how one lane of weights is added

struct FloatSums {
  using Sum = float;
  using In = float;
  static constexpr bool kByTap = false;
};
struct DotFloat32 : FloatSums {
  static constexpr int kGroup = 1;
  static __device__ float add(float sum, uint32_t w, const float* in, int) {
    return fmaf(__uint_as_float(w), in[0], sum);
  }
};
struct DotBFloat16 : FloatSums {
  static constexpr int kGroup = 2;
  static __device__ float add(float sum, uint32_t w, const float* in, int next) {
    return fmaf(__uint_as_float(w & 0xffff0000u), in[next], fmaf(__uint_as_float(w << 16), in[0], sum));
  }
};
struct DotFloat16 : FloatSums {
  static constexpr int kGroup = 2;
  static __device__ float widen(uint32_t w) { return __half2float(__ushort_as_half(uint16_t(w))); }
  static __device__ float add(float sum, uint32_t w, const float* in, int next) {
    return fmaf(widen(w >> 16), in[next], fmaf(widen(w), in[0], sum));
  }
};
struct DotInt8 {  // a tap at a time: each has scales of its own
  using Sum = int;
  using In = int;
  static constexpr bool kByTap = true;
  static constexpr int kGroup = 4;
  static __device__ int add(int sum, uint32_t w, const int* in, int) { return __dp4a(int(w), in[0], sum); }
};

// A matrix of audiokernels/_packing.py.
struct PackedMatrix {
  const float* bias;   // (rows)
  const float* scale;  // int8: (taps, rows)
  const uint4* lanes;  // (taps, steps, rows) of 32 bits, four rows a uint4
  int rows, taps, steps;
};

template <class Dot>
__device__ PackedMatrix read_matrix(const uint8_t*& p, int rows, int taps, int inputs) {
  PackedMatrix m{reinterpret_cast<const float*>(p),       nullptr, nullptr, rows, taps,
                 (inputs + Dot::kGroup - 1) / Dot::kGroup};
  p += 4 * rows;
  if (Dot::kByTap) {
    m.scale = reinterpret_cast<const float*>(p);
    p += 8 * taps * rows;  // the offsets behind them are for other kernels
  }
  m.lanes = reinterpret_cast<const uint4*>(p);
  p += int64_t{4} * taps * m.steps * rows;
  return m;
}

// ---- the draw, by one warp: the first class whose cumulative probability exceeds u

// Floats as integers of the same order, and back.
__device__ inline int rising(int bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

__device__ inline float warp_max(float v) {  // a NaN counts as -infinity
  return __int_as_float(rising(__reduce_max_sync(kAllLanes, rising(__float_as_int(fmaxf(v, -INFINITY))))));
}
__device__ inline int warp_min(int v) { return __reduce_min_sync(kAllLanes, v); }
__device__ inline int warp_max(int v) { return __reduce_max_sync(kAllLanes, v); }

__device__ inline float warp_sum(float v) {  // the same in every lane
  for (int i = 16; i > 0; i /= 2) v += __shfl_xor_sync(kAllLanes, v, i);
  return v;
}

struct Top {
  int count;
  float sum;
};

// Of x[i * stride] those that are at least `least`: how many, and their sum, a lane with every 32nd of them.
__device__ inline Top top_from(const float* x, int stride, int n, float least) {
  Top top{};
  for (int i = threadIdx.x % 32; i < n; i += 32)
    if (const float v = x[i * stride]; v >= least) top.count++, top.sum += v;
  return {__reduce_add_sync(kAllLanes, top.count), warp_sum(top.sum)};
}

// leave_out of sampling.h, by a warp; at least least.count of x and the sum least.sum stay.
__device__ inline void leave_out(float* x, int stride, int n, float lowest, Top least) {
  int low = rising(__float_as_int(lowest)), high = rising(__float_as_int(INFINITY)), most = n, fewest = 0;
  while (low + 1 < high && most - fewest > 1) {
    const int middle = (low & high) + ((low ^ high) >> 1);
    const Top top = top_from(x, stride, n, __int_as_float(rising(middle)));
    if (top.count >= least.count && top.sum >= least.sum)
      low = middle, most = top.count;
    else
      high = middle, fewest = top.count;
  }
  for (int i = threadIdx.x % 32; i < n; i += 32)
    if (!(x[i * stride] >= __int_as_float(rising(low)))) x[i * stride] = lowest;
}

// Blocks of 16 probabilities are summed in order, then their sums, as on the CPU. `logit` [i * stride], n_class rounded
// up to 16 of them, is overwritten; `sums` holds a number a block.
__device__ inline int draw(const CudaCall& c, float* logit, int stride, float* sums, float u) {
  const int n_class = c.n_class, lane = threadIdx.x % 32, blocks = (n_class + 15) / 16;
  float most = -INFINITY;
  for (int i = lane; i < n_class; i += 32) most = fmaxf(most, logit[i * stride]);
  most = warp_max(most);
  if (c.sampling.temperature == 0.0f) {
    int first = n_class;
    for (int i = lane; i < n_class; i += 32)
      if (logit[i * stride] == most && i < first) first = i;
    first = warp_min(first);
    return first < n_class ? first : 0;
  }
  if (c.sampling.top_k > 0) leave_out(logit, stride, n_class, -INFINITY, {c.sampling.top_k, -INFINITY});
  const float inverse = 1.0f / c.sampling.temperature;
  int last = 0;  // the last class that can be drawn
  for (int i = lane; i < 16 * blocks; i += 32) {
    const float l = i < n_class ? (logit[i * stride] - most) * inverse : -INFINITY;
    const float p = l >= -87.0f ? exp_clamped(l, 87.0f) : 0.0f;  // 0 of NaN too
    logit[i * stride] = p;
    if (p > 0.0f) last = i;
  }
  if (c.sampling.top_p < 1.0f) {
    leave_out(logit, stride, n_class, 0.0f, {1, c.sampling.top_p * top_from(logit, stride, n_class, 0.0f).sum});
    last = 0;
    for (int i = lane; i < n_class; i += 32)
      if (logit[i * stride] > 0.0f) last = i;
  }
  last = warp_max(last);
  __syncwarp();
  for (int i = lane; i < blocks; i += 32) {
    float sum = 0.0f;
    for (int j = 0; j < 16; j++) sum += logit[(16 * i + j) * stride];
    sums[i] = sum;
  }
  __syncwarp();
  float total = 0.0f;
  for (int i = 0; i < blocks; i++) total += sums[i];
  const float target = u * total;
  float before = 0.0f;
  for (int i = 0; i < blocks; i++) {  // every lane finds the same
    if (before + sums[i] > target) {
      float within = 0.0f;
      for (int j = 0; j < 15; j++) {
        within += logit[(16 * i + j) * stride];
        if (before + within > target) return 16 * i + j;
      }
      return 16 * i + 15;
    }
    before += sums[i];
  }
  return last;  // u * total was rounded up to the total
}

// ---- clusters

// sm_120 has clusters too, but not the shared memory.
#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
#define AK_CLUSTERS

// Ends when the phase of that parity has; a wait for a block that failed ends the launch with an error. What others
// wrote into shared memory is seen then, what other blocks wrote into global memory is not.
__device__ inline void wait(uint32_t bar, int64_t phase) {
  const auto ended = [&] { return ptx::mbarrier_try_wait(bar, uint32_t(phase & 1)); };
  if (ended()) return;
  constexpr uint64_t kPatience = 20'000'000'000ull;
  const uint64_t start = ptx::nanoseconds();
  while (!ended())
    if (ptx::nanoseconds() - start > kPatience) ptx::trap();
}

#endif

}  // namespace
}  // namespace audiokernels
