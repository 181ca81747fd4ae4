// Attention of a block: the ring of keys and values of its heads, or of a part of a head.
//
// The block's keys of a layer lie one after the other. Where the plan has room for them, a bulk copy brings them to
// shared memory while the block works on what comes before; the position's own key, which is made meanwhile, goes there
// and into the ring.
#pragma once

#include "transformer_block.h"

namespace audiokernels {
namespace {

constexpr int kAhead = 4;  // rows of values that a lane asks for before it makes scores

// Where the keys and values of a layer are: of head 0 on, though only the block's own may be there.
struct Ring {
  uint32_t *keys, *values;
};

struct Attention : Block {
  uint32_t stagings = 0;  // that the block has waited for

  using Block::Block;

  __device__ uint4 load_four(const uint32_t* p) const {
    return c.aligned ? *reinterpret_cast<const uint4*>(p) : uint4{p[0], p[1], p[2], p[3]};
  }
  __device__ uint2 load_two(const uint32_t* p) const {
    return c.aligned ? *reinterpret_cast<const uint2*>(p) : uint2{p[0], p[1]};
  }

  // Those of the state.
  __device__ Ring ring_of(int layer) const {
    uint32_t* keys = reinterpret_cast<uint32_t*>(state + c.first_ring + layer * c.layer_floats);
    return {keys, keys + int64_t(c.n_head) * c.key_blocks() * c.key_words};
  }
  // A layer's, with what is staged of it.
  __device__ Ring staged_of(Ring ring) const {
    if (c.staged > 0)
      ring.keys = reinterpret_cast<uint32_t*>(shared + at.keys) - int64_t(heads.first_key(c)) * c.key_words;
    if (c.staged > 1)
      ring.values = reinterpret_cast<uint32_t*>(shared + at.values) - int64_t(heads.first_key(c)) * c.value_words;
    return ring;
  }
  // Where a head's block of keys begins.
  __device__ uint32_t* keys_at(const Ring& ring, int head, int block) const {
    return ring.keys + (int64_t(head) * c.key_blocks() + block) * c.key_words;
  }
  __device__ uint32_t* values_at(const Ring& ring, int head, int block) const {
    return ring.values + (int64_t(head) * c.key_blocks() + block) * c.value_words;
  }

  // ---- staging: begins when nobody reads what was there before

  __device__ void start_staging() const {
#ifdef AK_CLUSTERS
    if (thread_of() == 0) ptx::mbarrier_init(ptx::shared_address(shared + at.bars + 16), 1);
#endif
  }
  __device__ void stage(int layer) const {
#ifdef AK_CLUSTERS
    if (c.staged == 0 || thread_of() > 0) return;
    const uint32_t bar = ptx::shared_address(shared + at.bars + 16);
    const int first = heads.first_key(c), blocks = heads.key_count(c);
    const uint32_t keys = uint32_t(4 * blocks * c.key_words), values = uint32_t(4 * blocks * c.value_words);
    ptx::mbarrier_arrive_expect(bar, keys + (c.staged > 1 ? values : 0));
    if (blocks == 0) return;
    const Ring ring = ring_of(layer);
    ptx::bulk_load(ptx::shared_address(shared + at.keys), keys_at(ring, 0, first), keys, bar);
    if (c.staged > 1) ptx::bulk_load(ptx::shared_address(shared + at.values), values_at(ring, 0, first), values, bar);
#endif
  }
  __device__ void await_staging() {
#ifdef AK_CLUSTERS
    if (c.staged > 0) wait(ptx::shared_address(shared + at.bars + 16), stagings++);
#endif
  }
  template <class Cache>
  static __device__ void write_cell(uint32_t* cell, int member, float value) {
    if constexpr (Cache::kGroup == 1)
      *cell = __float_as_uint(value);
    else
      reinterpret_cast<uint16_t*>(cell)[member] = uint16_t(ptx::pack(value, 0.0f, ptx::BFloat16{}));
  }

  // Of a head, that has this block of keys.
  __device__ int part_of(int block) const {
    int part = 0;
    while (c.first_key_block[part + 1] <= block) part++;
    return part;
  }

  // Turns q by the position; the turned key and the value go into their slot, if this block has it: in the state, and
  // in what is staged of it.
  template <class Cache>
  __device__ void remember(const Ring& ring, const Ring& staged) const {
    constexpr int g = Cache::kGroup;
    const int d = c.headdim, d16 = c.head_rows, half = d / 2, block = slot / int(kKeyBlock), in_block = slot % 64;
    const int part = part_of(block);
    float *q = floats(at.qkv), *k = q + heads.count() * d16, *v = k + heads.count() * d16;
    const auto mine = [&](int head) {
      const int unit = head * c.parts + part;
      return unit >= heads.first_unit && unit < heads.end_unit;
    };
#pragma unroll 1
    for (int i = thread_of(); i < heads.count() * half; i += kThreads) {
      const Quotient of(i, half);
      const int head = heads.first + of.quotient, channel = of.remainder, a = of.quotient * d16 + channel, b = a + half;
      float low = k[a], high = k[b];
      if (c.positions == kRotary) {
        const float cosine = floats(at.cos)[channel], sine = floats(at.sin)[channel], x = q[a], y = q[b];
        q[a] = x * cosine - y * sine;
        q[b] = y * cosine + x * sine;
        low = k[a] * cosine - k[b] * sine;
        high = k[b] * cosine + k[a] * sine;
      }
      if (!mine(head)) continue;
      const auto write = [&](const Ring& to) {
        uint32_t* cells = keys_at(to, head, block) + in_block;
        write_cell<Cache>(cells + channel / g * kKeyBlock, channel % g, low);
        write_cell<Cache>(cells + (channel + half) / g * kKeyBlock, (channel + half) % g, high);
      };
      write(ring);
      if (c.staged > 0) write(staged);
    }
#pragma unroll 1
    for (int i = thread_of(); i < heads.count() * d16; i += kThreads) {
      const Quotient of(i, d16);
      if (const int head = heads.first + of.quotient; mine(head)) {
        const auto write = [&](const Ring& to) {
          write_cell<Cache>(values_at(to, head, block) + in_block / g * d16 + of.remainder, in_block % g, v[i]);
        };
        write(ring);
        if (c.staged > 1) write(staged);
      }
    }
  }

  // Warp task of attention: the key blocks first, first + subs, .. < end of a head, with a running largest score.
  // Leaves that, the sum of weights, and the weighted sum of values in `result`: of 128 channels, from quad `from` on.
  template <class Cache>
  __device__ void attend_some(const Ring& ring, int head, int first, int end, const float* q, float* result,
                              int from) const {
    constexpr int g = Cache::kGroup;
    const int d = c.headdim, d16 = c.head_rows, lane = lane_of(), quads = lesser(d16 / 4 - from, 32);
    int shift = 2;  // 2^shift lanes share a row of values
    while (1 << shift < quads) shift++;
    const int width = 1 << shift, quad = lane & (width - 1), row = lane >> shift, rows = 32 >> shift;
    float most = -INFINITY, sum = 0.0f, sums[4] = {};  // sum: of the lane's two keys of each block
    float* weights = floats(at.weights) + warp_of() * kKeyBlock;
    // Opaque, or the compiler divides by it to count the turns.
#pragma unroll 1
    for (int block = first; block < end && int64_t(block) * kKeyBlock <= position; block += ptx::opaque(c.subs)) {
      const uint32_t* values = values_at(ring, head, block) + 4 * (from + quad);
      uint4 ahead[kAhead];  // of the values, on their way while the scores are made
      for (int j = 0; j < kAhead && quad < quads && row + j * rows < kKeyBlock / g; j++)
        ahead[j] = load_four(values + (row + j * rows) * d16);
      float scores[2] = {};
      const uint32_t* cell = keys_at(ring, head, block) + 2 * lane;
#pragma unroll 8
      for (int i = 0; i < d; i += g, cell += kKeyBlock) {
        const uint2 two = load_two(cell);
        scores[0] = Cache::add(scores[0], two.x, q + i, 1);
        scores[1] = Cache::add(scores[1], two.y, q + i, 1);
      }
      for (int i = 0; i < 2; i++) {
        int age = slot - (block * int(kKeyBlock) + 2 * lane + i);
        if (age < 0) age += c.capacity();
        if (age >= c.window || age > position) scores[i] = -INFINITY;
      }
      const float largest = fmaxf(most, warp_max(fmaxf(scores[0], scores[1])));
      if (largest == -INFINITY) continue;            // the window ends within this block, before its first key
      const float fade = weight_of(most - largest);  // 0 of -infinity
      most = largest;
      for (int i = 0; i < 2; i++) scores[i] = scores[i] == -INFINITY ? 0.0f : weight_of(scores[i] - largest);
      sum = fmaf(sum, fade, scores[0] + scores[1]);
      *reinterpret_cast<float2*>(weights + 2 * lane) = float2{scores[0], scores[1]};
      __syncwarp();
      for (int i = 0; i < 4; i++) sums[i] *= fade;
      if (quad < quads) {
        for (int j = 0; j < kAhead && row + j * rows < kKeyBlock / g; j++)
          add_values<Cache>(sums, ahead[j], weights + (row + j * rows) * g);
#pragma unroll 4
        for (int j = row + kAhead * rows; j < kKeyBlock / g; j += rows)
          add_values<Cache>(sums, load_four(values + j * d16), weights + j * g);
      }
      __syncwarp();
    }
    for (int bits = 16; bits >= width; bits /= 2)
      for (int i = 0; i < 4; i++) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], bits);
    sum = warp_sum(sum);
    if (lane == 0) result[0] = most, result[1] = sum;
    if (row == 0 && quad < quads)
      *reinterpret_cast<float4*>(result + 4 + 4 * (from + quad)) = {sums[0], sums[1], sums[2], sums[3]};
  }
  template <class Cache>
  static __device__ void add_values(float (&sums)[4], const uint4& four, const float* weights) {
    sums[0] = Cache::add(sums[0], four.x, weights, 1);
    sums[1] = Cache::add(sums[1], four.y, weights, 1);
    sums[2] = Cache::add(sums[2], four.z, weights, 1);
    sums[3] = Cache::add(sums[3], four.w, weights, 1);
  }

  // The tasks of a unit into `attended`, normalised, and its largest score and sum into `merge`; by a warp.
  __device__ void merge_unit(float* results, float* attended, float* merge) const {
    const int lane = lane_of(), subs = c.subs, d16 = c.head_rows, stride = d16 + 4;
    const float mine = lane < subs ? results[lane * stride] : -INFINITY;
    const float most = warp_max(mine), sum = lane < subs ? results[lane * stride + 1] : 0.0f;
    const float weight = sum > 0.0f ? weight_of(mine - most) : 0.0f, total = warp_sum(weight * sum);
    const float scale = total > 0.0f ? weight / total : 0.0f;
    for (int i = lane; i < rounded(d16, 32); i += 32) {  // whole warps
      float value = 0.0f;
#pragma unroll 8
      for (int sub = 0; sub < subs; sub++)
        value = fmaf(__shfl_sync(kAllLanes, scale, sub), results[sub * stride + 4 + (i < d16 ? i : 0)], value);
      if (i < d16) attended[i] = value;
    }
    if (lane == 0 && c.parts > 1) merge[0] = most, merge[1] = total;
  }

  // Of a layer. A barrier and stage() must follow.
  template <class Cache>
  __device__ void attend(int layer) {
    const Ring ring = staged_of(ring_of(layer));
    await_staging();
    remember<Cache>(ring_of(layer), ring);
    __syncthreads();
    const int subs = c.subs, d16 = c.head_rows, stride = d16 + 4;
    for (int first = heads.first_unit; first < heads.end_unit; first += at.wave) {
      const int units = lesser(heads.end_unit - first, at.wave);
#pragma unroll 1
      for (int task = warp_of(); task < units * subs; task += kWarps) {
        const Quotient unit(task, subs);
        const Quotient head(first + unit.quotient - heads.first * c.parts, c.parts);  // of this block's
        const int begin = c.first_key_block[head.remainder], end = c.first_key_block[head.remainder + 1];
        for (int from = 0; from < d16 / 4; from += 32)  // once, unless a head has more than 128 channels
          attend_some<Cache>(ring, heads.first + head.quotient, begin + unit.remainder, end,
                             floats(at.qkv) + head.quotient * d16, floats(at.states) + task * stride, from);
      }
      __syncthreads();
#pragma unroll 1
      for (int i = warp_of(); i < units; i += kWarps) {
        const int local = first - heads.first_unit + i;
        merge_unit(floats(at.states) + i * subs * stride, floats(at.attended) + local * d16,
                   floats(at.merge) + 2 * local);
      }
      __syncthreads();
    }
#ifdef AK_CLUSTERS
    // What `remember` wrote, bulk copies read and overwrite; by now the fence finds the writes done.
    if (c.staged > 0) ptx::fence_async_global();
#endif
  }
};

}  // namespace
}  // namespace audiokernels
