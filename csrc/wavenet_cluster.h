// What the blocks of a cluster share: shared memory's places, waits, the pack's matrices, and the clock of the stages.
// wavenet_cluster_cuda.cu says how a cluster works.
#pragma once

#include <type_traits>

#include "generation_device.h"
#include "wavenet_generate_cuda.h"

namespace audiokernels {
namespace {

constexpr int kThreads = 384, kWarps = kThreads / 32;
constexpr int kStreams = 8;     // of a group: the columns of one matrix product
constexpr int kMostTiles = 16;  // rows of skip, head and output

// A row of tiles in shared memory: 16 rows of weights by 16 `steps` inputs, a tile as the lanes hold it; int8 with the
// scales of its rows behind it.
__host__ __device__ constexpr int tile_row_bytes(bool is_int8, int steps) {
  return is_int8 ? 256 * steps + 64 : 512 * steps;
}

__host__ __device__ constexpr int padded(int n, int to) { return (n + to - 1) / to * to; }
__host__ __device__ constexpr int most_local(int residual) { return residual > 64 ? 1 : 5; }  // layers of a block
__host__ __device__ constexpr int at_most(int n, int limit) { return n < limit ? n : limit; }

// Byte offsets into shared memory, the same in every block of a kind; `bytes` is what the larger kind takes.
// audiokernels/wavenet_plan.py knows the same sum.
struct Places {
  int in_full, weights, h, past, x, in_h, in_x, in_x32, z_bias, x_bias, rings, slots, codes, starts;  // of the layers
  int h_full, early_full, skip_full, head_full, logits_full;                                          // of the head
  int skip_weights, layer_h, partial, skip, head, logits, sums;
  int bytes;

  __host__ __device__ Places(const WaveNetCall& c, const WaveNetCluster& k) {
    const int channel = 2 * kStreams, vector = c.residual * channel, steps = c.residual / 16, groups = k.groups;
    const int row_bytes = tile_row_bytes(c.dtype == kInt8, steps);
    const int local = (c.n_layer + k.layer_blocks - 1) / k.layer_blocks;
    int at = 0;
    const auto take = [&](int n) {
      const int offset = at;
      at += padded(n, 16);
      return offset;
    };
    in_full = take(8 * groups);
    weights = take(local * c.width * 2 * steps * row_bytes);
    h = take(groups * local * vector), past = take(local * (c.width - 1) * vector), x = take(2 * vector);
    in_h = take(groups * vector), in_x = take(groups * vector), in_x32 = take(groups * 2 * vector);
    z_bias = take(local * 8 * c.residual), x_bias = take(local * 4 * c.residual), rings = take(local * 8);
    slots = take(groups * local * kStreams * 4), codes = take(groups * kStreams * 4);
    starts = take(groups * kStreams * 8);
    const int layer_bytes = at;
    at = 0;
    const int warps = warps_of(c, k), skip_warps = share_of(c.skip_rows, k);
    h_full = take(8 * groups * c.n_layer), early_full = take(8 * groups), skip_full = take(8 * groups);
    head_full = take(8 * groups), logits_full = take(8 * groups);
    skip_weights = take((c.n_layer - held_of(c)) * skip_warps * row_bytes);
    layer_h = take(groups * c.n_layer * vector), partial = take(groups * skip_warps * 32 * 16);
    skip = take(groups * padded(c.skip_rows, 32) * channel), head = take(groups * padded(c.head_rows, 32) * channel);
    logits = take(groups * drawn_by(k) * c.class_rows * 4), sums = take(warps * kMostTiles * 4);
    bytes = layer_bytes > at ? layer_bytes : at;
  }
  // Warps of a head block that share a matrix of so many rows, a tile of 16 each; and the most of any.
  static __host__ __device__ int share_of(int rows, const WaveNetCluster& k) {
    return (rows / 16 + k.head_blocks - 1) / k.head_blocks;
  }
  static __host__ __device__ int warps_of(const WaveNetCall& c, const WaveNetCluster& k) {
    const int rows = c.skip_rows > c.head_rows ? c.skip_rows : c.head_rows;
    return share_of(c.class_rows > rows ? c.class_rows : rows, k);
  }
  // Layers of the third set of warps, one at least: a warp that waits for none would run away. And those of them whose
  // skip weights are in registers.
  static __host__ __device__ int early_of(const WaveNetCall& c) { return (c.n_layer + 1) / 2; }
  static __host__ __device__ int held_of(const WaveNetCall& c) {
    return at_most(early_of(c), kMostTiles / (c.residual / 16));
  }
  // Streams of a group that a head block draws.
  static __host__ __device__ int drawn_by(const WaveNetCluster& k) {
    return (kStreams + k.head_blocks - 1) / k.head_blocks;
  }
};

// The weights of a pack are ptx::Float16, ptx::BFloat16 or Int8, the last ones multiplied as float16: as the weights of
// a float16 pack of the same numbers, to the bit.
struct Int8 {};

#ifdef AK_CLUSTERS

template <class Weights>
inline constexpr bool kIsInt8 = std::is_same_v<Weights, Int8>;
template <class Weights>
using Multiplied = std::conditional_t<kIsInt8<Weights>, ptx::Float16, Weights>;

// Two float16 weights from the bytes 128 + q that `selector` picks, `scale` being 256 times the row's, twice: the byte
// is the end of 4 + (128 + q) / 256, so that only the product rounds.
__device__ __forceinline__ uint32_t widen(uint32_t bytes, uint32_t selector, uint32_t scale) {
  return ptx::multiply_two(ptx::subtract_two(ptx::permute(bytes, 0x44444444u, selector), 0x44804480u), scale);
}
constexpr uint32_t kLowBytes = 0x4140, kHighBytes = 0x4342;

// A packed matrix: bias float32 (rows); int8 only: scale float32 (taps, rows) and numbers for other kernels (taps,
// rows); words (taps, steps, rows) of two inputs each, int8 of four.
template <class Weights>
struct Matrix {
  static constexpr int kGroup = kIsInt8<Weights> ? 4 : 2;
  const float* bias;
  const float* scales;
  const uint32_t* words;
  int rows, steps;

  __device__ Matrix(const uint8_t* p, int rows, int taps, int inputs)
      : bias(reinterpret_cast<const float*>(p)),
        scales(bias + rows),
        words(reinterpret_cast<const uint32_t*>(scales) + (kIsInt8<Weights> ? 2 * taps * rows : 0)),
        rows(rows),
        steps((inputs + kGroup - 1) / kGroup) {}
  static __device__ int64_t bytes(int rows, int taps, int inputs) {
    const int scales = kIsInt8<Weights> ? 2 : 0;
    return 4 * (int64_t(rows) + int64_t(taps) * ((inputs + kGroup - 1) / kGroup + scales) * rows);
  }
  __device__ Matrix tap(int i) const {
    Matrix m = *this;
    m.scales += i * rows;
    m.words += int64_t(i) * steps * rows;
    return m;
  }
  // Two inputs of a row as 16-bit numbers.
  __device__ uint32_t word(int row, int pair) const {
    if constexpr (kIsInt8<Weights>)
      return widen(two(row, pair), kLowBytes, scale(row));
    else
      return row < rows && pair < steps ? __ldg(words + int64_t(pair) * rows + row) : 0;
  }
  // The A operand of rows (low + 0 .. 7, high + 0 .. 7) and the 16 inputs of a step.
  __device__ uint4 tile(int low, int high, int step) const {
    const int lane = threadIdx.x % 32, row = lane / 4, pair = 8 * step + lane % 4;
    return {word(low + row, pair), word(high + row, pair), word(low + row, pair + 4), word(high + row, pair + 4)};
  }
  // The same rows and n steps to a row of tiles.
  __device__ void put(char* to, int low, int high, int n) const {
    const int lane = threadIdx.x % 32, row = lane / 4;
#pragma unroll 1
    for (int step = 0; step < n; step++)
      if constexpr (kIsInt8<Weights>) {
        const int pair = 8 * step + lane % 4;
        reinterpret_cast<uint2*>(to)[32 * step + lane] = {
            two(low + row, pair) | two(high + row, pair) << 16,
            two(low + row, pair + 4) | two(high + row, pair + 4) << 16,
        };
      } else {
        reinterpret_cast<uint4*>(to)[32 * step + lane] = tile(low, high, step);
      }
    if (kIsInt8<Weights> && lane % 4 == 0)
      reinterpret_cast<uint2*>(to + 256 * n)[row] = {scale(low + row), scale(high + row)};
  }

 private:  // of int8
  __device__ uint32_t two(int row, int pair) const {
    const uint32_t four = row < rows && pair / 2 < steps ? __ldg(words + int64_t(pair / 2) * rows + row) : 0;
    return (four >> 16 * (pair % 2) & 0xffff) ^ 0x8080;
  }
  __device__ uint32_t scale(int row) const {
    const float s = row < rows ? 256.0f * __ldg(scales + row) : 0.0f;
    return ptx::pack(s, s, ptx::Float16{});
  }
};

// Where the pack has the matrices of a layer, and those of the head.
template <class Weights>
struct Pack {
  using M = Matrix<Weights>;
  const WaveNetCall& c;
  __device__ int mix_rows(int layer) const { return c.skip_rows + (layer + 1 < c.n_layer ? c.x_rows : 0); }
  __device__ int64_t conv_bytes() const { return M::bytes(2 * c.h_rows, c.width, c.residual); }
  __device__ const uint8_t* layer(int l) const {
    return c.pack + c.table_bytes + l * (conv_bytes() + M::bytes(c.skip_rows + c.x_rows, 1, c.hidden));
  }
  __device__ M conv(int l) const { return {layer(l), 2 * c.h_rows, c.width, c.residual}; }
  __device__ M mix(int l) const { return {layer(l) + conv_bytes(), mix_rows(l), 1, c.hidden}; }
  __device__ int skip_row(int l) const { return l + 1 < c.n_layer ? c.x_rows : 0; }  // the first of skip in mix
  __device__ M head() const {
    const int last = c.n_layer - 1;
    return {layer(last) + conv_bytes() + M::bytes(mix_rows(last), 1, c.hidden), c.head_rows, 1, c.skip};
  }
  __device__ M out() const {
    return {reinterpret_cast<const uint8_t*>(head().bias) + M::bytes(c.head_rows, 1, c.skip), c.class_rows, 1, c.head};
  }
};

// What Matrix::put left: the lane's part of tile `step`.
template <int Steps, class Weights>
struct TileRow {
  const char* at;
  uint2 scales{};

  __device__ TileRow(const char* at) : at(at) {
    if constexpr (kIsInt8<Weights>) scales = reinterpret_cast<const uint2*>(at + 256 * Steps)[threadIdx.x % 32 / 4];
  }
  __device__ uint4 operator()(int step) const {
    const int i = 32 * step + threadIdx.x % 32;
    if constexpr (kIsInt8<Weights>) {
      const uint2 bytes = reinterpret_cast<const uint2*>(at)[i];
      return {widen(bytes.x, kLowBytes, scales.x), widen(bytes.x, kHighBytes, scales.y),
              widen(bytes.y, kLowBytes, scales.x), widen(bytes.y, kHighBytes, scales.y)};
    } else {
      return reinterpret_cast<const uint4*>(at)[i];
    }
  }
};

// tiles[i] = tile; registers have no addresses.
template <int N>
__device__ __forceinline__ void set_tile(uint4 (&tiles)[N], int i, const uint4& tile) {
#pragma unroll
  for (int n = 0; n < N; n++)
    if (n == i) tiles[n] = tile;
}

// sums += tile(0), tile(1) .. times the vectors of 8 streams at `address`.
template <int Steps, class Tiles, class Type>
__device__ __forceinline__ void add_product(float (&sums)[4], const Tiles& tile, uint32_t address, Type type) {
  static_assert(Steps % 2 == 0);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < Steps; step += 2) {
    const uint4 b = ptx::load_matrix_x4_trans(address + (16 * step + lane) * 2 * kStreams);
    ptx::mma(sums, tile(step), uint2{b.x, b.y}, type);
    ptx::mma(sums, tile(step + 1), uint2{b.z, b.w}, type);
  }
}

// Adds up the cycles that one thread of the first cluster's blocks spends in each stage; off unless asked for.
class StageClock {
 public:
  __device__ StageClock(const WaveNetCall& c, uint32_t rank, bool measures)
      : sums_(c.stages && blockIdx.x == rank && measures ? c.stages + rank * kStages : nullptr), last_(0) {}
  __device__ void start() { last_ = ptx::clock(); }
  __device__ void lap(Stage stage) {  // what has passed since the last lap
    if (!sums_) return;
    const uint32_t now = ptx::clock();
    add(stage, now - last_);
    last_ = now;
  }
  __device__ void add(Stage stage, uint64_t number) const {
    if (sums_) atomicAdd(sums_ + stage, static_cast<unsigned long long>(number));
  }

 private:
  unsigned long long* sums_;
  uint32_t last_;
};

#endif

}  // namespace
}  // namespace audiokernels
