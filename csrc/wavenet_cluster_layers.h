// The blocks of a cluster that share the layers; wavenet_cluster_cuda.cu says how they work together.
#pragma once

#include "wavenet_cluster.h"

#ifdef AK_CLUSTERS
namespace audiokernels {
namespace {

template <int R, class Weights>
struct LayerBlock {
  using Type = Multiplied<Weights>;
  using Tiles = TileRow<R / 16, Weights>;
  static constexpr int kSteps = R / 16, kVector = R * 2 * kStreams, kLocal = most_local(R);
  static constexpr int kTiles = R > 64 ? R / 64 : 1;  // of 16 rows, of a warp
  static constexpr int kGateWarps = 2 * kSteps / kTiles, kXWarps = kSteps / kTiles;
  const WaveNetCall& c;
  const WaveNetCluster& k;
  const Places& at;
  char* shared;
  uint32_t base;  // the address of `shared`
  int rank, warp, lane;
  int first_layer, n_local;
  int64_t first;                      // stream of the cluster
  uint4 w[kLocal * kTiles * kSteps];  // a gate warp's tiles of M, an x warp's of W_res
  float pre[kLocal][kTiles][4];       // what z starts from in the next item: past taps, bias, condition
  StageClock clock;

  __device__ LayerBlock(const WaveNetCall& c, const WaveNetCluster& k, const Places& at, int64_t first)
      : c(c),
        k(k),
        at(at),
        shared(ptx::dynamic_shared()),
        base(ptx::shared_address(shared)),
        rank(int(ptx::cluster_rank())),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        first_layer(c.n_layer * rank / k.layer_blocks),
        n_local(c.n_layer * (rank + 1) / k.layer_blocks - first_layer),
        first(first),
        clock(c, ptx::cluster_rank(), threadIdx.x == 0) {}

  __device__ int stream(int g, int s) const { return g * kStreams + s; }
  __device__ bool active(int g, int s) const { return first + stream(g, s) < c.batch; }
  __device__ float* state(int g, int s) const { return c.state + (first + stream(g, s)) * c.state_stride; }
  __device__ int length(int l) const { return (c.width - 1) * c.dilations[first_layer + l]; }
  __device__ int& slot(int g, int l, int s) const {
    return reinterpret_cast<int*>(shared + at.slots)[(g * n_local + l) * kStreams + s];
  }
  // Where in a stream's state the ring of layer l begins.
  __device__ int64_t& ring(int l) const { return reinterpret_cast<int64_t*>(shared + at.rings)[l]; }
  __device__ int64_t& start(int g, int s) const { return reinterpret_cast<int64_t*>(shared + at.starts)[stream(g, s)]; }
  __device__ int& code(int g, int s) const { return reinterpret_cast<int*>(shared + at.codes)[stream(g, s)]; }
  __device__ bool gates() const { return warp < kGateWarps; }
  __device__ bool has_x() const { return !gates() && warp < kGateWarps + kXWarps; }
  // The warp's tiles are row_tile() .. row_tile() + kTiles - 1.
  __device__ int row_tile() const { return kTiles * (gates() ? warp : warp - kGateWarps); }
  // Row tile i of the gate: 8 channels' tanh rows, then their sigmoid rows, so that a lane holds both.
  __device__ uint4 gate_tile(const Matrix<Weights>& m, int i, int step) const { return m.tile(8 * i, R + 8 * i, step); }
  __device__ char* tile_row(int l, int tap, int row_tile) const {
    return shared + at.weights +
           ((l * c.width + tap) * 2 * kSteps + row_tile) * tile_row_bytes(kIsInt8<Weights>, kSteps);
  }

  // A tile of M_l = W_cur W_res of the layer before.
  __device__ uint4 multiply_weights(int layer, int row_tile, int step) const {
    const Pack<Weights> pack{c};
    const Matrix<Weights> cur = pack.conv(layer).tap(c.width - 1), res = pack.mix(layer - 1);
    uint32_t words[4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int column = 16 * step + 8 * half + lane / 4, shift = 16 * (column % 2);
      const auto element = [&](int row) { return res.word(row, column / 2) >> shift & 0xffff; };
      float sums[4] = {};
#pragma unroll 1
      for (int j = 0; j < kSteps; j++) {
        const int row = 16 * j + lane % 4 * 2;
        ptx::mma(sums, gate_tile(cur, row_tile, j),
                 uint2{element(row) | element(row + 1) << 16, element(row + 8) | element(row + 9) << 16}, Type{});
      }
      words[2 * half] = ptx::pack(sums[0], sums[1], Type{});
      words[2 * half + 1] = ptx::pack(sums[2], sums[3], Type{});
    }
    return {words[0], words[1], words[2], words[3]};
  }

  __device__ void load_weights() {
    const Pack<Weights> pack{c};
    constexpr int kOfLayer = kTiles * kSteps;
#pragma unroll 1
    for (int n = 0; n < n_local * kOfLayer; n++) {
      lane = ptx::opaque(lane);
      const int layer = first_layer + n / kOfLayer, i = row_tile() + n / kSteps % kTiles, step = n % kSteps;
      uint4 tile{};
      if (layer > 0 && gates()) tile = multiply_weights(layer, i, step);
      if (layer > 0 && has_x()) tile = pack.mix(layer - 1).tile(16 * i, 16 * i + 8, step);
      set_tile(w, n, tile);
    }
#pragma unroll 1
    for (int l = 0; l < n_local; l++) {
      const int layer = first_layer + l;
      const Matrix<Weights> conv = pack.conv(layer), cur = conv.tap(c.width - 1);
#pragma unroll 1
      for (int i = 0; i < c.width * kTiles && gates(); i++) {
        const int tap = i / kTiles, tile = row_tile() + i % kTiles;
        conv.tap(tap).put(tile_row(l, tap, tile), 8 * tile, R + 8 * tile, kSteps);
      }
      // The residual's bias goes into x_l by itself and into z_l through W_cur.
      for (int row = threadIdx.x; row < 2 * R; row += kThreads) {
        float sum = c.base ? 0.0f : conv.bias[row];
#pragma unroll 1
        for (int j = 0; j < R && layer > 0; j++)
          sum = fmaf(ptx::half_of(cur.word(row, j / 2), j % 2, Type{}), pack.mix(layer - 1).bias[j], sum);
        reinterpret_cast<float*>(shared + at.z_bias)[l * 2 * R + row] = sum;
        if (row < R)
          reinterpret_cast<float*>(shared + at.x_bias)[l * R + row] = layer > 0 ? pack.mix(layer - 1).bias[row] : 0.0f;
      }
    }
    if (threadIdx.x == 0) {
      int64_t at_float = kStateHeader;
      for (int layer = 0; layer < first_layer + n_local; layer++) {
        if (layer >= first_layer) ring(layer - first_layer) = at_float;
        at_float += int64_t(c.width - 1) * c.dilations[layer] * R;
      }
    }
    for (int i = threadIdx.x; i < k.groups * n_local * kStreams; i += kThreads) {
      const int s = i % kStreams, l = i / kStreams % n_local, g = i / kStreams / n_local;
      const int64_t position = active(g, s) ? read_position(state(g, s)) : 0;
      slot(g, l, s) = int(position % length(l));
    }
    for (int i = threadIdx.x; i < k.groups * kStreams; i += kThreads) {
      const int s = i % kStreams, g = i / kStreams;
      start(g, s) = active(g, s) ? read_position(state(g, s)) : 0;
      code(g, s) = active(g, s) ? read_code(c, state(g, s)) : 0;
    }
    for (int i = threadIdx.x; i < k.groups * kVector / 4; i += kThreads)  // no gate output before layer 0
      if (rank == 0) reinterpret_cast<uint32_t*>(shared + at.in_h)[i] = 0;
  }

  // Biases plus the projection of the frame of stream s, for the block's layers.
  __device__ void project_condition(int g, int s, int64_t frame) const {
    const float* table = reinterpret_cast<const float*>(c.pack) + c.n_class * c.x_rows;
    const int64_t b = first + stream(g, s);
    const float* values = c.frames + b * c.frames_stride[0] + frame * c.frames_stride[1];
    for (int i = threadIdx.x; i < n_local * 2 * R; i += kThreads) {
      const int layer = first_layer + i / (2 * R), row = i % (2 * R);
      float sum = Pack<Weights>{c}.conv(layer).bias[row];
      for (int j = 0; j < c.condition; j++)
        sum =
            fmaf(__ldg(table + (int64_t(layer) * c.condition + j) * 2 * R + row), values[j * c.frames_stride[2]], sum);
      c.base[(b * c.n_layer + layer) * 2 * R + row] = sum;
    }
  }

  // The past of a layer's input, a unit a tap of a stream: unit u has stream u % 8. Where it lies at `ahead` steps
  // after the one that the slots are for.
  __device__ int units() const { return n_local * (c.width - 1) * kStreams; }
  __device__ const float* past(int g, int unit, int ahead) const {
    const int s = unit % kStreams, item = unit / kStreams;
    const int l = c.width == 2 ? item : item / (c.width - 1), tap = item - l * (c.width - 1);
    int from = slot(g, l, s) + tap * c.dilations[first_layer + l] + ahead;
    if (from >= length(l)) from -= length(l);
    return state(g, s) + ring(l) + int64_t(from) * R;
  }

  // Brings what `prepare` will read of a group to L2, some time before.
  __device__ void look_ahead(int g, int ahead) const {
    constexpr int kLines = R / 32;
    for (int i = threadIdx.x; i < units() * kLines; i += kThreads)
      if (active(g, i / kLines % kStreams)) ptx::prefetch(past(g, i / kLines, ahead) + i % kLines * 32);
  }

  // The past of a group's inputs to shared memory, rounded. All loads of a thread are under way at once.
  __device__ void load_past(int g) const {
    constexpr int kRows = R / 32, kUnits = 8 / kRows;
    for (int first_unit = warp; first_unit < units(); first_unit += kUnits * kWarps) {
      float values[kUnits][kRows];
#pragma unroll
      for (int i = 0; i < kUnits; i++) {
        const int unit = first_unit + i * kWarps;
        const bool there = unit < units() && active(g, unit % kStreams);
        const float* from = there ? past(g, unit, 0) + lane : nullptr;
#pragma unroll
        for (int j = 0; j < kRows; j++) values[i][j] = there ? from[32 * j] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kUnits; i++) {
        const int unit = first_unit + i * kWarps, item = unit / kStreams, s = unit % kStreams;
        for (int j = 0; j < kRows && unit < units(); j++)
          reinterpret_cast<uint16_t*>(shared + at.past)[(item * R + lane + 32 * j) * kStreams + s] =
              uint16_t(ptx::pack(values[i][j], 0.0f, Type{}));
      }
    }
  }

  // Off the chain: everything of step t of a group that is known before its input is.
  __device__ void prepare(int64_t t, int g) {
    if (t > 0 && threadIdx.x < n_local * kStreams) {
      int& now = slot(g, threadIdx.x / kStreams, threadIdx.x % kStreams);
      now = now + 1 == length(threadIdx.x / kStreams) ? 0 : now + 1;
    }
    for (int s = 0; c.base && s < kStreams; s++) {
      const int64_t begin = start(g, s);
      if (active(g, s) && (t == 0 || (begin + t) % c.hop == 0)) project_condition(g, s, frame_of(c, begin, begin + t));
    }
    __syncthreads();
    load_past(g);
    __syncthreads();
    if (!gates()) return;
    const int s = lane % 4 * 2;
#pragma unroll
    for (int l = 0; l < kLocal; l++) {
      if (l >= n_local) continue;
      const float* bias = reinterpret_cast<const float*>(shared + at.z_bias) + l * 2 * R;
#pragma unroll
      for (int tile = 0; tile < kTiles; tile++) {
        for (int i = 0; i < 4; i++) {
          const int row = 8 * (row_tile() + tile) + lane / 4 + i / 2 * R;
          pre[l][tile][i] = bias[row];
          if (c.base && active(g, s + i % 2))
            pre[l][tile][i] += c.base[((first + stream(g, s + i % 2)) * c.n_layer + first_layer + l) * 2 * R + row];
        }
#pragma unroll 1
        for (int tap = 0; tap + 1 < c.width; tap++)
          add_product<kSteps>(pre[l][tile], Tiles(tile_row(l, tap, row_tile() + tile)),
                              base + at.past + (l * (c.width - 1) + tap) * kVector, Type{});
      }
    }
  }

  __device__ auto held(int l, int tile) const {
    return [=](int step) { return w[(l * kTiles + tile) * kSteps + step]; };
  }
  __device__ void put(int offset, uint32_t value) const { *reinterpret_cast<uint32_t*>(shared + offset) = value; }

  // The layers of one step of a group, a barrier each.
  __device__ void run_layers(int g) {
    const bool hands_on = rank + 1 < k.layer_blocks;
    const uint32_t next = hands_on ? ptx::map_shared(base, rank + 1) : 0, next_full = next + at.in_full + 8 * g;
    const int pair = lane % 4 * 4;  // bytes to the lane's two streams
    float x[kTiles][4];
#pragma unroll
    for (int l = 0; l < kLocal; l++) {
      if (l >= n_local) continue;
      const int h_at = at.h + (g * n_local + l) * kVector, x_at = at.x + l % 2 * kVector;
      const int h_in = l == 0 ? at.in_h + g * kVector : h_at - kVector;
      const int x_in = l == 0 ? at.in_x + g * kVector : at.x + (l + 1) % 2 * kVector;
      const bool leaves = l + 1 == n_local && hands_on;
      if (gates()) {
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++) {
          float z[4] = {}, h[2];
          add_product<kSteps>(z, held(l, tile), base + h_in, Type{});
          add_product<kSteps>(pre[l][tile], Tiles(tile_row(l, c.width - 1, row_tile() + tile)), base + x_in, Type{});
          for (int i = 0; i < 2; i++)
            h[i] = ptx::tanh_approx(z[i] + pre[l][tile][i]) *
                   fmaf(ptx::tanh_approx(0.5f * (z[2 + i] + pre[l][tile][2 + i])), 0.5f, 0.5f);
          const uint32_t word = ptx::pack(h[0], h[1], Type{});
          const int bytes = (8 * (row_tile() + tile) + lane / 4) * 2 * kStreams + pair;
          put(h_at + bytes, word);
          if (leaves) ptx::store_async(next + at.in_h + g * kVector + bytes, word, next_full);
        }
        ptx::fence_async();  // the bulk copies below read it
      } else if (has_x()) {
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++) {
          const int low = 16 * (row_tile() + tile) + lane / 4, s = lane % 4 * 2;
          for (int i = 0; i < 4; i++) {
            const int row = low + i / 2 * 8;
            if (l == 0) x[tile][i] = reinterpret_cast<float*>(shared + at.in_x32)[(g * R + row) * kStreams + s + i % 2];
            x[tile][i] += reinterpret_cast<float*>(shared + at.x_bias)[l * R + row];
          }
          add_product<kSteps>(x[tile], held(l, tile), base + h_in, Type{});
          for (int half = 0; half < 2; half++) {
            const int row = low + 8 * half, bytes = row * 2 * kStreams + pair;
            const float two[2] = {x[tile][2 * half], x[tile][2 * half + 1]};
            const uint32_t word = ptx::pack(two[0], two[1], Type{});
            put(x_at + bytes, word);
            if (leaves) {
              ptx::store_async(next + at.in_x + g * kVector + bytes, word, next_full);
              ptx::store_async(next + at.in_x32 + 2 * (g * kVector + bytes),
                               uint2{__float_as_uint(two[0]), __float_as_uint(two[1])}, next_full);
            }
            for (int i = 0; i < 2; i++)
              if (active(g, s + i)) state(g, s + i)[ring(l) + int64_t(slot(g, l, s + i)) * R + row] = two[i];
          }
        }
      }
      __syncthreads();
      if (warp >= kGateWarps && lane == 0) {
        const int item = g * c.n_layer + first_layer + l;
#pragma unroll 1
        for (int i = warp - kGateWarps; i < k.head_blocks; i += kWarps - kGateWarps) {
          const uint32_t to = ptx::map_shared(base, k.layer_blocks + i);
          ptx::bulk_copy(to + at.layer_h + item * kVector, base + h_at, kVector, to + at.h_full + 8 * item);
        }
      }
    }
  }

  // Block 0: the input of layer 0.
  __device__ void embed(int g) const {
    const float* embedding = reinterpret_cast<const float*>(c.pack);
    for (int i = threadIdx.x; i < R * kStreams; i += kThreads) {
      const int row = i % R, s = i / R, to = (g * R + row) * kStreams + s;
      const float x = __ldg(embedding + code(g, s) * R + row);
      reinterpret_cast<float*>(shared + at.in_x32)[to] = x;
      reinterpret_cast<uint16_t*>(shared + at.in_x)[to] = uint16_t(ptx::pack(x, 0.0f, Type{}));
    }
    __syncthreads();
  }

  // What completes in_full: residual and gate output of the block before, or the codes that the head blocks drew.
  __device__ uint32_t in_bytes() const { return rank == 0 ? 4 * kStreams : 4 * kVector; }

  __device__ void receive(int64_t t, int g) {
    const uint32_t full = base + at.in_full + 8 * g;
    if (rank > 0 || t > 0) {  // a stream's first code is its state's
      wait(full, rank > 0 ? t : t - 1);
      if (threadIdx.x == 0) ptx::mbarrier_arrive_expect(full, in_bytes());
    }
    clock.lap(kWaitInput);
    if (rank == 0) embed(g);
    clock.lap(kEmbed);
  }

  __device__ void run() {
    load_weights();
    for (int g = 0; g < k.groups && threadIdx.x == 0; g++) {
      ptx::mbarrier_init(base + at.in_full + 8 * g, 1);
      ptx::mbarrier_arrive_expect(base + at.in_full + 8 * g, in_bytes());
    }
    ptx::mbarrier_fence_init();
    __syncthreads();
    ptx::cluster_arrive();
    ptx::cluster_wait();
    clock.start();
    clock.add(kNanoseconds, -ptx::nanoseconds());
    int g = k.groups - 1;
    for (int64_t t = -1; t < c.n;) {  // from the item before the first one, so that prepare is here once
      const int next = g + 1 == k.groups ? 0 : g + 1;
      const int64_t next_t = t + (next == 0);
      lane = ptx::opaque(lane), warp = ptx::opaque(warp);
      if (t >= 0) {
        look_ahead(next, next_t > 0);
        receive(t, g);
        run_layers(g);
        clock.lap(kLayers);
      }
      if (next_t < c.n) prepare(next_t, next);
      clock.lap(kPrepare);
      t = next_t, g = next;
    }
    clock.add(kNanoseconds, ptx::nanoseconds());
  }
};

}  // namespace
}  // namespace audiokernels
#endif
