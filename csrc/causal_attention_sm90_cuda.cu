// Causal attention with small heads, forward, sm_90 and later; compiled, not yet run on a GPU.
//
// A block takes 128 queries of one head: four warps of 32 rows that compute by mma.sync, and one that loads 256 keys
// and values at a time through tensor maps, three tiles ahead of them at most. Blocks with the most keys start first,
// the heads of a block side by side; blocks and tiles are counted from the last query, so that a ragged block is the
// one with the fewest keys. A warp goes in steps of 16 keys:
//
//   1. those on the diagonal, masked, by the exact online softmax: they fix a reference m for each row;
//   2. those that all its rows see: weights 2^(x - m), neither a maximum nor a rescaling;
//   3. those at the window's edge: the same, masked.
//
// m is a whole number: 2^m rescales exactly, and lets one of four pairs of exponentials in 2. be a cubic in bfloat16,
// where the exponential unit is the bottleneck, with the scale for nothing: x - m is split by one fused multiply-add.
// Weights are rounded to bfloat16; a product with ones sums what is rounded. Nothing is lost by a fixed m as long as a
// row's sum stays below 2^100 (see causal_attention_triton.py).
//
// What is wrong afterwards is done again from global memory by the exact online softmax, 16 rows at a time, and only
// that is replaced: all of a row whose sum is out of range, of others the numbers that are not finite. Masked keys
// count exactly nothing: values that are not finite are taken out of 1. and 3., and reach those that see them in the
// second pass. So nobody's bits depend on what he does not see.
#include <cuda.h>

#include "causal_attention_sm90_cuda.h"
#include "ptx.h"

namespace audiokernels {
namespace {

constexpr int kWarps = 4, kThreads = 32 * (kWarps + 1), kBlocks = 4;  // blocks: of a multiprocessor
constexpr int kWarpRows = 32, kRows = kWarps * kWarpRows, kKeys = 256, kStages = 3;
constexpr int kHeaddim = 16, kTileBytes = kKeys * kHeaddim * 2, kStageBytes = 2 * kTileBytes;
constexpr int kSharedBytes = kStages * kStageBytes + 2 * kStages * 8;  // the stages, then their barriers

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

constexpr int kStep = 16;                                    // keys
constexpr uint32_t kRowBytes = 2 * kHeaddim;                 // unsigned: addresses wrap
constexpr uint32_t kAll = 0xffffffffu, kOnes = 0x3f803f80u;  // lanes; two ones
constexpr float kInfinity = __builtin_inff(), kNan = __builtin_nanf("");

// Sums of 16 rows and 8 columns: a lane has [0] and [1] of its row lane / 4, [2] and [3] of the row 8 below, columns
// lane % 4 * 2 and the next.
using Sums = float[4];

__device__ inline int down(int key) { return key & -kStep; }
__device__ inline int up(int key) { return down(key + kStep - 1); }

// What a block computes: grid (nheads, batch, blocks of queries).
struct Block {
  unsigned batch, head, head_kv;
  int row;         // the first; negative in a ragged block
  int begin, end;  // keys; tiles are counted from `end`

  __device__ explicit Block(const AttentionCall& c) {
    batch = blockIdx.y, head = blockIdx.x, head_kv = blockIdx.x / unsigned(c.group);
    row = c.seqlen_q - kRows * (int(blockIdx.z) + 1);
    const int offset = c.seqlen_k - c.seqlen_q;
    end = up(row + kRows + offset);
    begin = down(max(0, max(row, 0) + offset - c.window + 1));
  }
};

__device__ inline void wait(uint32_t bar, int phase) {
  while (!ptx::mbarrier_try_wait(bar, uint32_t(phase & 1))) {
  }
}

__device__ inline uint32_t full(uint32_t base, int stage) { return base + kStages * kStageBytes + 16 * stage; }
__device__ inline uint32_t empty(uint32_t base, int stage) { return full(base, stage) + 8; }

// One thread brings the tiles. What lies outside of the tensor comes as zeros.
__device__ inline void load_tiles(const Block& block, const CUtensorMap* keys, const CUtensorMap* values,
                                  uint32_t base) {
  int stage = 0, round = 0;
  for (int start = block.end - kKeys; start + kKeys > block.begin; start -= kKeys) {
    if (round > 0) wait(empty(base, stage), round - 1);
    const uint32_t bar = full(base, stage), to = base + stage * kStageBytes;
    ptx::mbarrier_arrive_expect(bar, kStageBytes);
    ptx::tensor_load(to, keys, 0, start, int(block.head_kv), int(block.batch), bar);
    ptx::tensor_load(to + kTileBytes, values, 0, start, int(block.head_kv), int(block.batch), bar);
    if (++stage == kStages) stage = 0, round++;
  }
}

// 2^(s scale - m) for both s, in bfloat16 by range reduction in float32 and a cubic in bfloat16; `shift` is kMagic - m.
// NaN where s is not finite, at least 2^126 where it would be 2^127.
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: a float32 near it is its integer part
__device__ inline uint32_t exp2_polynomial(float s0, float s1, float scale, float shift) {
  const float r0 = fmaf(s0, scale, shift), r1 = fmaf(s1, scale, shift);
  const uint32_t f = ptx::pack(fmaf(s0, scale, shift - r0), fmaf(s1, scale, shift - r1), ptx::BFloat16{});
  const int e0 = __viaddmin_s32_relu(__float_as_int(r0), 127 - 0x4b400000, 254);  // exponent's bits: 0 is a weight of 0
  const int e1 = __viaddmin_s32_relu(__float_as_int(r1), 127 - 0x4b400000, 254);
  uint32_t p = ptx::fma_two(0x3d633d63u, f, 0x3e763e76u, ptx::BFloat16{});
  p = ptx::fma_two(p, f, 0x3f313f31u, ptx::BFloat16{});
  p = ptx::fma_two(p, f, kOnes, ptx::BFloat16{});
  return ptx::multiply_two(p, uint32_t(e1) * 0x800000u + uint32_t(e0) * 128u, ptx::BFloat16{});
}

__device__ inline uint32_t exp2_pair(float s0, float s1, float scale, float m) {
  return ptx::pack(ptx::exp2_approx(fmaf(s0, scale, -m)), ptx::exp2_approx(fmaf(s1, scale, -m)), ptx::BFloat16{});
}

__device__ inline bool is_finite(float x) { return fabsf(x) < kInfinity; }

// Two bfloat16; 0 in the place of those that are not finite.
__device__ inline uint32_t finite_two(uint32_t word) {
  if ((word & 0x7f80u) == 0x7f80u) word &= 0xffff0000u;
  if ((word & 0x7f800000u) == 0x7f800000u) word &= 0xffffu;
  return word;
}
__device__ inline uint4 finite_all(const uint4& v) {
  return {finite_two(v.x), finite_two(v.y), finite_two(v.z), finite_two(v.w)};
}
__device__ inline bool differ(const uint4& a, const uint4& b) {
  return ((a.x ^ b.x) | (a.y ^ b.y) | (a.z ^ b.z) | (a.w ^ b.w)) != 0;
}

// For each of two bfloat16: 1 for inf, 2^5 for -inf, 2^10 for NaN, so that a sum of 16 counts all three.
__device__ inline uint32_t code_two(uint32_t word) {
  const auto code = [](uint32_t half) {
    return half == 0x7f80u ? 0x3f80u : half == 0xff80u ? 0x4200u : (half & 0x7f80u) == 0x7f80u ? 0x4480u : 0u;
  };
  return code(word & 0xffffu) | code(word >> 16) << 16;
}

// 16 rows, as a lane has them: [0] is row lane / 4, [1] the row 8 below.
struct Rows {
  uint4 q;
  float m[2];
  Sums out[2];  // numbers 0 to 7 and 8 to 15 of the heads
  Sums sum;     // even columns: of the rounded weights; odd ones: a lane's part of what masked steps lost by rounding

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < 4; i++) out[0][i] = out[1][i] = sum[i] = 0;
    m[0] = m[1] = -kInfinity;
  }

  // s: of 8 keys and the 8 after them
  __device__ void scores(Sums (&s)[2], const uint4& keys) const {
    ptx::mma_first(s[0], q, {keys.x, keys.y}, ptx::BFloat16{});
    ptx::mma_first(s[1], q, {keys.z, keys.w}, ptx::BFloat16{});
  }

  // ones: two in the lanes of even columns
  __device__ void add(const uint4& weights, const uint4& values, uint32_t ones) {
    ptx::mma(out[0], weights, {values.x, values.y}, ptx::BFloat16{});
    ptx::mma(out[1], weights, {values.z, values.w}, ptx::BFloat16{});
    ptx::mma(sum, weights, {ones, ones}, ptx::BFloat16{});
  }

  // The reference is raised to the largest of these scores too.
  __device__ void raise(const Sums (&s)[2], float scale) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float most = fmaxf(fmaxf(s[0][2 * h], s[0][2 * h + 1]), fmaxf(s[1][2 * h], s[1][2 * h + 1]));
      most = fmaxf(most, __shfl_xor_sync(kAll, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAll, most, 2));
      const float before = m[h];
      m[h] = fmaxf(before, ceilf(most * scale));
      const float factor = ptx::exp2_approx(before - reference(h));
#pragma unroll
      for (int i = 2 * h; i < 2 * h + 2; i++) out[0][i] *= factor, out[1][i] *= factor, sum[i] *= factor;
    }
  }
  __device__ float reference(int h) const { return m[h] == -kInfinity ? 0.0f : m[h]; }  // nothing seen: weights of 0

  // Of a masked step, and its part of the sum.
  __device__ uint4 weights(const Sums (&s)[2], float scale) {
    const auto two = [&](int j, int h) {
      const float w0 = ptx::exp2_approx(fmaf(s[j][2 * h], scale, -reference(h)));
      const float w1 = ptx::exp2_approx(fmaf(s[j][2 * h + 1], scale, -reference(h)));
      const uint32_t word = ptx::pack(w0, w1, ptx::BFloat16{});
      sum[2 * h + 1] += w0 - ptx::half_of(word, 0, ptx::BFloat16{}) + (w1 - ptx::half_of(word, 1, ptx::BFloat16{}));
      return word;
    };
    return {two(0, 0), two(0, 1), two(1, 0), two(1, 1)};
  }

  __device__ float log2_sum(int h) const {
    float lost = sum[2 * h + 1];
    lost += __shfl_xor_sync(kAll, lost, 1);
    lost += __shfl_xor_sync(kAll, lost, 2);
    return log2f(sum[2 * h] + lost);
  }
};

// A warp and its 32 rows.
struct Warp {
  const AttentionCall& c;
  float scale;                            // without its sign, which q has
  int lane, row, offset;                  // position of a query: its row + offset
  int first, full_begin, full_end, last;  // keys: steps from `full_begin` to `full_end` all rows see whole
  bool cleaned = false;                   // a value that is not finite was taken out
  uint32_t ones;
  Rows rows[2];
  float shift[2];

  __device__ Warp(const AttentionCall& c, const Block& block) : c(c) {
    const int thread = int(threadIdx.x);
    // a scale of 0 is as good as a very small one, with which -inf stays -inf
    scale = fmaxf(fabsf(c.scale), 0x1p-100f);
    lane = thread % 32, row = block.row + thread / 32 * kWarpRows, offset = c.seqlen_k - c.seqlen_q;
    ones = lane / 4 % 2 ? 0 : kOnes;
    const int low = max(row, 0) + offset;
    last = row + kWarpRows - 1 + offset;
    first = down(max(0, low - c.window + 1));
    full_end = down(low);  // so that every row sees itself on the diagonal
    full_begin = min(up(max(0, last - c.window + 1)), full_end);
  }

  // ---- rows: part i (0, 1), half h; those before the first one have its q, see nothing and are not stored

  __device__ int row_of(int i, int h) const { return row + 16 * i + 8 * h + lane / 4; }
  __device__ int position(int i, int h) const { return row_of(i, h) + offset; }
  __device__ bool sees(int position, int key) const { return key <= position && key > position - c.window; }

  __device__ uint32_t load_query(const Block& block, int row, int number) const {
    const uint16_t* from = c.q + block.batch * c.q_stride[0] + block.head * c.q_stride[1] + row * c.q_stride[2];
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (number + i < c.headdim) word |= uint32_t(from[(number + i) * c.q_stride[3]]) << 16 * i;
    return c.scale < 0 ? word ^ 0x80008000u : word;
  }
  __device__ uint4 load_queries(int i) const {
    const Block block(c);
    const int top = max(row_of(i, 0), 0), low = max(row_of(i, 1), 0), number = lane % 4 * 2;
    return {load_query(block, top, number), load_query(block, low, number), load_query(block, top, number + 8),
            load_query(block, low, number + 8)};
  }

  // -inf for what is not seen; the first key of the step is `key`.
  __device__ void hide(Sums (&s)[2], int i, int key) const {
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (!sees(position(i, j / 2 % 2), key + j / 4 * 8 + lane % 4 * 2 + j % 2)) s[j / 4][j % 4] = -kInfinity;
  }

  // ---- steps

  // Keys and values of `steps` steps in shared memory.
  template <int kSteps>
  __device__ void whole(uint32_t keys, uint32_t values) {
    Sums s[kSteps][2][2];
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      const uint4 k = ptx::load_matrix_x4(keys + step * kStep * kRowBytes);
#pragma unroll
      for (int i = 0; i < 2; i++) rows[i].scores(s[step][i], k);
    }
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      const uint4 v = ptx::load_matrix_x4_trans(values + step * kStep * kRowBytes);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const auto& x = s[step][i];
        const float m0 = rows[i].m[0], m1 = rows[i].m[1];
        rows[i].add({exp2_polynomial(x[0][0], x[0][1], scale, shift[i]), exp2_pair(x[0][2], x[0][3], scale, m1),
                     exp2_pair(x[1][0], x[1][1], scale, m0), exp2_pair(x[1][2], x[1][3], scale, m1)},
                    v, ones);
      }
    }
  }

  template <bool kExact>
  __device__ void masked(uint32_t keys, uint32_t values, int key) {
    const uint4 k = ptx::load_matrix_x4(keys), raw = ptx::load_matrix_x4_trans(values), v = finite_all(raw);
    cleaned |= differ(raw, v);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      Sums s[2];
      rows[i].scores(s, k);
      hide(s, i, key);
      if (kExact) rows[i].raise(s, scale);
      const uint4 weights = rows[i].weights(s, scale);
      rows[i].add(weights, v, ones);
    }
  }

  // Lane's addresses of a tile's key 0 for ldmatrix; halves of a row change places where bit 7 of the address is set.
  __device__ uint32_t address(uint32_t tile, int start, int row, int half) const {
    const uint32_t at = tile + row * kRowBytes + half * 16;
    return (at ^ (at >> 3 & 16)) - start * kRowBytes;
  }
  __device__ uint32_t keys_of(uint32_t stage, int start) const {
    return address(stage, start, lane / 16 * 8 + lane % 8, lane / 8 % 2);
  }
  __device__ uint32_t values_of(uint32_t stage, int start) const {
    return address(stage + kTileBytes, start, lane / 8 % 2 * 8 + lane % 8, lane / 16);
  }

  // It is in the first tile.
  __device__ void diagonal(uint32_t stage, int start) {
    const uint32_t keys = keys_of(stage, start), values = values_of(stage, start);
#pragma unroll 1
    for (int key = full_end; key <= last; key += kStep)
      masked<true>(keys + key * kRowBytes, values + key * kRowBytes, key);
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int h = 0; h < 2; h++) rows[i].m[h] = rows[i].reference(h);
      shift[i] = fabsf(rows[i].m[0]) < 0x1p22f ? kMagic - rows[i].m[0] : kNan;  // NaN: the row is done again
    }
  }

  __device__ void tile(uint32_t stage, int start) {
    const uint32_t keys = keys_of(stage, start), values = values_of(stage, start);
    const int full_stop = min(full_end, start + kKeys), edge_stop = min(full_begin, start + kKeys);
    int key = max(full_begin, start);
#pragma unroll 1
    for (; key + 2 * kStep <= full_stop; key += 2 * kStep) whole<2>(keys + key * kRowBytes, values + key * kRowBytes);
    if (key < full_stop) whole<1>(keys + key * kRowBytes, values + key * kRowBytes);
#pragma unroll 1
    for (key = max(first, start); key < edge_stop; key += kStep)
      masked<false>(keys + key * kRowBytes, values + key * kRowBytes, key);
  }

  // ---- results

  // Of the lane's numbers of a row those of the bits `numbers`.
  __device__ void store(const Block& block, int i, int h, uint32_t numbers, const Sums (&out)[2]) const {
    uint16_t* to = c.out + block.batch * c.o_stride[0] + block.head * c.o_stride[1] + row_of(i, h) * c.o_stride[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int number = j * 8 + lane % 4 * 2;
      if (number >= c.headdim) continue;
      const uint32_t word = ptx::pack(out[j][2 * h], out[j][2 * h + 1], ptx::BFloat16{});
      const uint32_t which = numbers >> (4 * j + 2 * h) & 3;
      if (which == 3)
        *reinterpret_cast<uint32_t*>(to + number) = word;
      else if (which != 0)
        to[number + (which >> 1)] = uint16_t(word >> 16 * (which >> 1));
    }
  }
  __device__ void store_lse(const Block& block, int i, int h, float lse) const {  // in log2 units
    float* to = c.lse + (int64_t(block.batch) * c.nheads + block.head) * c.seqlen_q;
    if (lane % 4 == 0) to[row_of(i, h)] = lse * 0.6931471805599453f;
  }

  // Of part i: 8 bits for the numbers that are wrong, as Sums counts them, 2 for the rows.
  __device__ uint32_t finish(int i) {
    const Block block(c);
    uint32_t wrong = 0;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float sum = rows[i].sum[2 * h], lse = rows[i].m[h] + rows[i].log2_sum(h);
      if (row_of(i, h) < 0) continue;
      if (!(sum >= 0.25f && sum < 0x1p100f)) wrong |= 0x100u << h | 0x33u << 2 * h;
      const float factor = 1.0f / sum;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float& number = rows[i].out[j / 2][2 * h + j % 2];
        if (!is_finite(number)) wrong |= 1u << (j / 2 * 4 + 2 * h + j % 2);
        number *= factor;
      }
      store(block, i, h, 0xffu, rows[i].out);
      store_lse(block, i, h, lse);
    }
    return wrong;
  }

  // ---- the second pass

  __device__ uint32_t load_two(const uint16_t* from, int64_t stride, int key, int number) const {  // of two keys
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (key + i <= last && number < c.headdim) word |= uint32_t(from[(key + i) * stride + number]) << 16 * i;
    return word;
  }

  // Part i again, exactly, without the help of the other warps; replaces what is wrong or sees what is not finite.
  __device__ void again(int i, uint32_t wrong) {
    const Block block(c);
    const uint16_t* k = c.k + block.batch * c.k_stride[0] + block.head_kv * c.k_stride[1];
    const uint16_t* v = c.v + block.batch * c.v_stride[0] + block.head_kv * c.v_stride[1];
    const int two = lane % 4 * 2, one = lane / 4;
    Rows part;
    part.clear();
    part.q = load_queries(i);
    Sums extra[2] = {};  // inf, -inf or NaN
#pragma unroll 1
    for (int key = first; key <= last; key += kStep) {
      const auto pair = [&](int key, int number) {
        const bool inside = key <= last && number < c.headdim;
        return inside ? *reinterpret_cast<const uint32_t*>(k + key * c.k_stride[2] + number) : 0;
      };
      Sums s[2];
      part.scores(
          s, {pair(key + one, two), pair(key + one, two + 8), pair(key + one + 8, two), pair(key + one + 8, two + 8)});
      hide(s, i, key);
      part.raise(s, scale);
      const auto pairs = [&](int key, int number) { return load_two(v, c.v_stride[2], key, number); };
      const uint4 raw = {pairs(key + two, one), pairs(key + two + 8, one), pairs(key + two, one + 8),
                         pairs(key + two + 8, one + 8)};
      const uint4 values = finite_all(raw);
      const uint4 weights = part.weights(s, scale);
      part.add(weights, values, ones);
      if (!__any_sync(kAll, differ(raw, values))) continue;
      const auto seen = [&](int h, int key) {
        const int at = position(i, h);
        return (sees(at, key) ? 0x3f80u : 0u) | (sees(at, key + 1) ? 0x3f800000u : 0u);
      };
      const uint4 visible = {seen(0, key + two), seen(1, key + two), seen(0, key + two + 8), seen(1, key + two + 8)};
      Sums counts[2];
      ptx::mma_first(counts[0], visible, {code_two(raw.x), code_two(raw.y)}, ptx::BFloat16{});
      ptx::mma_first(counts[1], visible, {code_two(raw.z), code_two(raw.w)}, ptx::BFloat16{});
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const int count = int(counts[j / 4][j % 4]);
        float& total = extra[j / 4][j % 4];
        if (count >= 1024) total = kNan;
        if (count & 31) total += kInfinity;
        if (count >> 5 & 31) total -= kInfinity;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float factor = 1.0f / part.sum[2 * h], lse = part.m[h] + part.log2_sum(h);
      if (row_of(i, h) < 0) continue;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float more = extra[j / 2][2 * h + j % 2];
        float& number = part.out[j / 2][2 * h + j % 2];
        if (!is_finite(more)) wrong |= 1u << (j / 2 * 4 + 2 * h + j % 2);
        number = number * factor + more;
      }
      store(block, i, h, wrong, part.out);
      if (wrong >> (8 + h) & 1) store_lse(block, i, h, lse);
    }
  }

  __device__ void run(uint32_t base, const Block& block) {
    const bool idle = row + kWarpRows <= 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      rows[i].clear();
      if (!idle) rows[i].q = load_queries(i);
    }
    int start = block.end - kKeys, stage = 0, round = 0;
    wait(full(base, 0), 0);
    if (!idle) diagonal(base, start);
#pragma unroll 1
    for (; start + kKeys > block.begin; start -= kKeys) {
      wait(full(base, stage), round);
      if (!idle) tile(base + stage * kStageBytes, start);
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(empty(base, stage));
      if (++stage == kStages) stage = 0, round++;
    }
    if (idle) return;
    uint32_t wrong = finish(0);
    wrong |= finish(1) << 16;
    if (!__any_sync(kAll, wrong != 0 || cleaned)) return;
    Warp anew(c, Block(c));
#pragma unroll 1
    for (int i = 0; i < 2; i++, wrong >>= 16)
      if (__any_sync(kAll, (wrong & 0xffffu) != 0 || cleaned)) anew.again(i, wrong);
  }
};

#endif

__global__ void __launch_bounds__(kThreads, kBlocks)
    attention_kernel(const __grid_constant__ AttentionCall c, const __grid_constant__ CUtensorMap keys,
                     const __grid_constant__ CUtensorMap values) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const Block block(c);
  const uint32_t base = ptx::shared_address(ptx::dynamic_shared());
  if (threadIdx.x == 0)
    for (int stage = 0; stage < kStages; stage++) {
      ptx::mbarrier_init(full(base, stage), 1);
      ptx::mbarrier_init(empty(base, stage), kWarps);
    }
  ptx::mbarrier_fence_init();
  __syncthreads();
  if (int(threadIdx.x) < 32 * kWarps)
    Warp(c, block).run(base, block);
  else if (threadIdx.x == 32 * kWarps)
    load_tiles(block, &keys, &values, base);
#endif
}

// cuTensorMapEncodeTiled of the driver, which is not linked.
cudaError_t tensor_map(CUtensorMap* map, const AttentionCall& c, const uint16_t* data, const int64_t (&stride)[3]) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
  if (error != cudaSuccess || found == nullptr) return error == cudaSuccess ? cudaErrorInvalidValue : error;
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  const cuuint64_t sizes[] = {cuuint64_t(c.headdim), cuuint64_t(c.seqlen_k), cuuint64_t(c.nheads / c.group),
                              cuuint64_t(c.batch)};
  cuuint64_t strides[3];  // from the last dimension on; that of a single one means nothing
  for (int i = 0; i < 3; i++) strides[i] = sizes[i + 1] == 1 ? 16 : 2 * cuuint64_t(stride[2 - i]);
  const cuuint32_t box[] = {kHeaddim, kKeys, 1, 1}, steps[] = {1, 1, 1, 1};
  const CUresult made = encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<uint16_t*>(data), sizes, strides,
                               box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t causal_attention_sm90_cuda(const AttentionCall& call, cudaStream_t stream) {
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(attention_kernel));
  if (error != cudaSuccess) return error;
  if (attributes.ptxVersion < 90) return cudaErrorNoKernelImageForDevice;  // an empty kernel
  CUtensorMap keys{}, values{};
  error = tensor_map(&keys, call, call.k, call.k_stride);
  if (error == cudaSuccess) error = tensor_map(&values, call, call.v, call.v_stride);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(attention_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(attention_kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(call.nheads), unsigned(call.batch), unsigned((call.seqlen_q + kRows - 1) / kRows));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, attention_kernel, call, keys, values);
}

}  // namespace audiokernels
