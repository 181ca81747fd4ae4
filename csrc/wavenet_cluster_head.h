// The blocks of a cluster that share the rows of skip, head and output, and draw; wavenet_cluster_cuda.cu says how they
// work together.
#pragma once

#include "wavenet_cluster.h"

#ifdef AK_CLUSTERS
namespace audiokernels {
namespace {

// Three sets of as many warps, a warp a tile of 16 rows: the first one sums skip over the later half of the layers and
// multiplies by head, the second one multiplies by the output's weights and draws, the third one sums skip over the
// earlier half.
template <int R, class Weights>
struct HeadBlock {
  using Type = Multiplied<Weights>;
  using Tiles = TileRow<R / 16, Weights>;
  static constexpr int kSteps = R / 16, kVector = R * 2 * kStreams, kMostHeld = kMostTiles / kSteps;
  const WaveNetCall& c;
  const WaveNetCluster& k;
  const Places& at;
  char* shared;
  uint32_t base;
  int number;             // of the head block
  int warps, warp, lane;  // of a set; the warp's number in its set
  int set;
  int row;  // the first of the warp's tile
  int64_t first;
  StageClock clock;

  __device__ HeadBlock(const WaveNetCall& c, const WaveNetCluster& k, const Places& at, int64_t first)
      : c(c),
        k(k),
        at(at),
        shared(ptx::dynamic_shared()),
        base(ptx::shared_address(shared)),
        number(int(ptx::cluster_rank()) - k.layer_blocks),
        warps(Places::warps_of(c, k)),
        warp(threadIdx.x / 32 % warps),
        lane(threadIdx.x % 32),
        set(threadIdx.x / 32 / warps),
        row(16 * (number + k.head_blocks * warp)),
        first(first),
        clock(c, ptx::cluster_rank(), warp == 0 && lane == 0 && set < 2) {}

  __device__ int early() const { return Places::early_of(c); }
  __device__ char* skip_row(int layer) const {
    const int number = (layer - Places::held_of(c)) * Places::share_of(c.skip_rows, k) + warp;
    return shared + at.skip_weights + number * tile_row_bytes(kIsInt8<Weights>, kSteps);
  }
  __device__ float4& partial(int g) const {
    return reinterpret_cast<float4*>(shared + at.partial)[(g * Places::share_of(c.skip_rows, k) + warp) * 32 + lane];
  }
  __device__ int skip_at(int g) const { return at.skip + g * padded(c.skip_rows, 32) * 2 * kStreams; }
  __device__ int head_at(int g) const { return at.head + g * padded(c.head_rows, 32) * 2 * kStreams; }
  __device__ int skip_bytes() const { return c.skip_rows * 2 * kStreams; }
  __device__ int head_bytes() const { return c.head_rows * 2 * kStreams; }
  // The streams of a group that this block draws: drawn() from first_drawn() on.
  __device__ int first_drawn() const { return at_most(number * Places::drawn_by(k), kStreams); }
  __device__ int drawn() const { return at_most(kStreams - first_drawn(), Places::drawn_by(k)); }
  __device__ int logit_bytes() const { return drawn() * c.class_rows * 4; }

  // The warp's rows of head or of the output; zeros past the end.
  __device__ void load(uint4 (&w)[kMostTiles], const Matrix<Weights>& m) const {
#pragma unroll 1
    for (int step = 0; step < kMostTiles; step++) set_tile(w, step, m.tile(row, row + 8, step));
  }

  // relu(sums) to the vectors at `offset` of every head block.
  __device__ void share(const float (&sums)[4], int offset, int full) const {
    for (int half = 0; half < 2; half++) {
      const uint32_t word = ptx::pack(fmaxf(sums[2 * half], 0.0f), fmaxf(sums[2 * half + 1], 0.0f), Type{});
      const int bytes = (row + lane / 4 + 8 * half) * 2 * kStreams + lane % 4 * 4;
      for (int i = 0; i < k.head_blocks; i++) {
        const uint32_t to = ptx::map_shared(base, k.layer_blocks + i);
        ptx::store_async(to + offset + bytes, word, to + full);
      }
    }
  }

  // Waits for the phase of step t and opens the next one, of so many bytes.
  __device__ void receive(int full, int bytes, int64_t t) const {
    wait(base + full, t);
    if (warp == 0 && lane == 0) ptx::mbarrier_arrive_expect(base + full, bytes);
  }

  // The warp's rows times the vectors of `rows` channels at `offset`.
  __device__ void product(float (&sums)[4], const uint4 (&w)[kMostTiles], const float* bias, int offset,
                          int rows) const {
    float odd[4] = {};
    for (int i = 0; i < 4; i++) sums[i] = bias[row + lane / 4 + i / 2 * 8];
#pragma unroll
    for (int step = 0; step < kMostTiles; step += 2) {
      if (16 * step >= rows) continue;
      const uint4 b = ptx::load_matrix_x4_trans(base + offset + (16 * step + lane) * 2 * kStreams);
      ptx::mma(sums, w[step], uint2{b.x, b.y}, Type{});
      if (16 * (step + 1) < rows) ptx::mma(odd, w[step + 1], uint2{b.z, b.w}, Type{});
    }
    for (int i = 0; i < 4; i++) sums[i] += odd[i];
  }

  // sums += the warp's rows of skip of a layer; the weights are read before the wait.
  template <class T>
  __device__ void add_skip(float (&sums)[4], int layer, const T& tile, int64_t t, int g) const {
    const int item = g * c.n_layer + layer;
    uint4 tiles[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; step++) tiles[step] = tile(step);
    receive(at.h_full + 8 * item, kVector, t);
    add_product<kSteps>(sums, [&](int step) { return tiles[step]; }, base + at.layer_h + item * kVector, Type{});
  }

  // The first set: skip of the later layers, and head.
  __device__ void run_head(int64_t t, int g, const uint4 (&w)[kMostTiles], const float* bias) {
    if (row < c.skip_rows) {
      wait(base + at.early_full + 8 * g, t);
      const float4 before = partial(g);
      float sums[4] = {before.x, before.y, before.z, before.w};
      for (int layer = early(); layer < c.n_layer; layer++) add_skip(sums, layer, Tiles(skip_row(layer)), t, g);
      share(sums, skip_at(g), at.skip_full + 8 * g);
    }
    clock.lap(kSkip);
    if (row < c.head_rows) {
      float sums[4];
      receive(at.skip_full + 8 * g, skip_bytes(), t);
      clock.lap(kWaitSkip);
      product(sums, w, bias, skip_at(g), c.skip_rows);
      share(sums, head_at(g), at.head_full + 8 * g);
    }
    clock.lap(kHead);
  }

  // The second set: logits, to the blocks that draw from them.
  __device__ void run_out(int64_t t, int g, const uint4 (&w)[kMostTiles], const float* bias) {
    if (row >= c.class_rows) return;
    receive(at.head_full + 8 * g, head_bytes(), t);
    clock.lap(kWaitHead);
    float sums[4];
    product(sums, w, bias, head_at(g), c.head_rows);
    for (int i = 0; i < 4; i++) {
      const int label = row + lane / 4 + i / 2 * 8, s = lane % 4 * 2 + i % 2, block = s / Places::drawn_by(k);
      const uint32_t to = ptx::map_shared(base, k.layer_blocks + block);
      ptx::store_async(to + logits_at(g, s % Places::drawn_by(k)) + 4 * label, __float_as_uint(sums[i]),
                       to + at.logits_full + 8 * g);
    }
    for (int i = 0; i < 4 && c.logits; i++) {
      const int label = row + lane / 4 + i / 2 * 8;
      const int64_t b = first + g * kStreams + lane % 4 * 2 + i % 2;
      if (b < c.batch && label < c.n_class) c.logits[(b * c.n + t) * c.n_class + label] = sums[i];
    }
    clock.lap(kOut);
  }
  __device__ int logits_at(int g, int number) const {
    return at.logits + (g * Places::drawn_by(k) + number) * c.class_rows * 4;
  }

  // The codes of step t, drawn or known, a stream a warp at a time; they go to block 0.
  __device__ void choose(int64_t t, int g) {
    for (int i = warp; i < drawn(); i += warps) {
      const int s = first_drawn() + i;
      const int64_t b = first + g * kStreams + s;
      const bool active = b < c.batch;
      const float u = active ? c.uniforms[b * c.uniforms_stride[0] + t * c.uniforms_stride[1]] : 0.0f;
      wait(base + at.logits_full + 8 * g, t);
      if (i == 0 && lane == 0) ptx::mbarrier_arrive_expect(base + at.logits_full + 8 * g, logit_bytes());
      clock.lap(kWaitLogits);
      int code = 0;
      if (active) {
        float* logit = reinterpret_cast<float*>(shared + logits_at(g, i));
        float* sums = reinterpret_cast<float*>(shared + at.sums) + warp * kMostTiles;
        code = t < c.forced ? forced_code(c, b, t) : draw(c, logit, 1, sums, u);
      }
      if (lane > 0) continue;
      if (t + 1 < c.n) {
        const uint32_t to = ptx::map_shared(base, 0);
        ptx::store_async(to + at.codes + 4 * (g * kStreams + s), uint32_t(code), to + at.in_full + 8 * g);
      }
      if (active) {
        write_code(c, b, t, code);
        float* state = c.state + b * c.state_stride;
        if (t + 1 == c.n) write_header(state, read_position(state) + c.n, code);
      }
    }
    clock.lap(kDraw);
  }

  __device__ void init_barriers() const {
    const auto arm = [&](int full, int bytes) {
      ptx::mbarrier_init(base + full, 1);
      ptx::mbarrier_arrive_expect(base + full, bytes);
    };
    for (int g = 0; g < k.groups; g++) {
      ptx::mbarrier_init(base + at.early_full + 8 * g, Places::share_of(c.skip_rows - 16 * number, k));
      arm(at.skip_full + 8 * g, skip_bytes());
      arm(at.head_full + 8 * g, head_bytes());
      arm(at.logits_full + 8 * g, logit_bytes());
      for (int layer = 0; layer < c.n_layer; layer++) arm(at.h_full + 8 * (g * c.n_layer + layer), kVector);
    }
    ptx::mbarrier_fence_init();
  }

  // The third set: skip of the earlier layers, the first of them from registers.
  __device__ void run_early(int64_t t, int g, const uint4 (&w)[kMostTiles], const float (&bias)[2]) const {
    const int held = Places::held_of(c);
    float sums[4] = {bias[0], bias[0], bias[1], bias[1]};
#pragma unroll
    for (int layer = 0; layer < kMostHeld; layer++)
      if (layer < held) add_skip(sums, layer, [&](int step) { return w[layer * kSteps + step]; }, t, g);
    for (int layer = held; layer < early(); layer++) add_skip(sums, layer, Tiles(skip_row(layer)), t, g);
    partial(g) = float4{sums[0], sums[1], sums[2], sums[3]};
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(base + at.early_full + 8 * g);
  }
  __device__ void load_early(uint4 (&w)[kMostTiles], float (&bias)[2]) const {
    const Pack<Weights> pack{c};
#pragma unroll 1
    for (int i = 0; i < Places::held_of(c) * kSteps; i++) {
      const int from = pack.skip_row(i / kSteps) + row;
      set_tile(w, i, pack.mix(i / kSteps).tile(from, from + 8, i % kSteps));
    }
#pragma unroll 1
    for (int layer = 0; layer < c.n_layer; layer++) {
      const Matrix<Weights> mix = pack.mix(layer);
      const int from = pack.skip_row(layer) + row;
      for (int i = 0; i < 2; i++) bias[i] += mix.bias[from + lane / 4 + 8 * i];
      if (layer >= Places::held_of(c)) mix.put(skip_row(layer), from, from + 8, kSteps);
    }
  }

  // By all threads, once their weights are there.
  __device__ void begin() {
    if (threadIdx.x == 0) init_barriers();
    __syncthreads();
    ptx::cluster_arrive();
    ptx::cluster_wait();
    clock.start();
  }

  __device__ void run() {
    const Pack<Weights> pack{c};
    if (set == 0) {
      uint4 w[kMostTiles];
      load(w, pack.head());
      begin();
      for (int64_t t = 0; t < c.n; t++)
        for (int g = 0; g < k.groups; g++) run_head(t, g, w, pack.head().bias);
    } else if (set == 1) {
      uint4 w[kMostTiles];
      load(w, pack.out());
      begin();
      for (int64_t t = 0; t < c.n; t++)
        for (int g = 0; g < k.groups; g++) {
          run_out(t, g, w, pack.out().bias);
          choose(t, g);
        }
    } else {
      uint4 w[kMostTiles];
      float bias[2] = {};
      const bool works = set == 2 && row < c.skip_rows;
      if (works) load_early(w, bias);
      begin();
      for (int64_t t = 0; t < c.n && works; t++)
        for (int g = 0; g < k.groups; g++) run_early(t, g, w, bias);
    }
  }
};

}  // namespace
}  // namespace audiokernels
#endif
