// WaveNet generation by clusters of thread blocks, sm_90 and later; compiled, not yet run on a GPU.
//
// A cluster runs `groups` groups of 8 streams. Its first blocks share the layers, weights in registers and shared
// memory; the others share the rows of skip, head and output. A group goes from block to block: residual and gate
// output by st.async, the gate output of every layer to the head blocks by bulk copies, logits back to block 0, which
// draws.
//
//     z_l = M_l h_l-1 + W_cur x_l-1 + (past taps, bias, condition),   M_l = W_cur,l W_res,l-1   x_l = x_l-1 + W_res
//     h_l-1
//
// so that a layer costs one barrier: x_l is computed beside h_l. M is formed at the start, in float32, rounded once; x
// stays in float32 registers. Vectors of 8 streams are [channel][stream] in 16 bits, the B operand of mma.
//
// Nothing is overwritten early, without any credit: a group's step t + 1 begins when all logits of step t are there,
// and those need every value of step t to have been read.
#include "wavenet_device.h"

namespace audiokernels {
namespace {

constexpr int kThreads = 384, kWarps = kThreads / 32;
constexpr int kStreams = 8;
constexpr int kMostLocal = 5;               // layers of a block
constexpr int kTileBytes = 512;             // 16 x 16 weights as the lanes hold them
constexpr int kMostTiles = 16;              // rows of skip, head and output
constexpr int kLogitStride = kStreams + 2;  // floats a class; spreads the lanes over the banks

__host__ __device__ constexpr int padded(int n, int to) { return (n + to - 1) / to * to; }

// Byte offsets into shared memory, the same in every block; `to_bytes` is what it takes.
struct Places {
  int weights, h, past, x, in_h, in_x, in_x32, z_bias, x_bias, logits, sums, slots, codes, starts;  // of layer blocks
  int in_full, logits_full;                                                                         // mbarriers
  int skip_weights, layer_h, skip, head;                                                            // of head blocks
  int h_full, skip_full, head_full;
  int bytes;

  __host__ __device__ Places(const WaveNetCall& c, const WaveNetCluster& k) {
    const int channel = 2 * kStreams, vector = c.residual * channel, steps = c.residual / 16, groups = k.groups;
    const int local = (c.n_layer + k.layer_blocks - 1) / k.layer_blocks;
    int at = 0;
    const auto take = [&](int n) {
      const int offset = at;
      at += padded(n, 16);
      return offset;
    };
    in_full = take(8 * groups), logits_full = take(8 * groups);
    weights = take(local * c.width * 2 * steps * steps * kTileBytes);
    h = take(groups * local * vector), past = take(local * (c.width - 1) * vector), x = take(2 * vector);
    in_h = take(groups * vector), in_x = take(groups * vector), in_x32 = take(groups * 2 * vector);
    z_bias = take(local * 8 * c.residual), x_bias = take(local * 4 * c.residual);
    logits = take(groups * c.class_rows * kLogitStride * 4), sums = take(kStreams * kMostTiles * 4);
    slots = take(groups * local * kStreams * 4), codes = take(groups * kStreams * 4);
    starts = take(groups * kStreams * 8);
    const int layer_bytes = at;
    at = 0;
    h_full = take(8 * groups * c.n_layer), skip_full = take(8 * groups), head_full = take(8 * groups);
    skip_weights = take(c.n_layer * warps_of(c, k) * steps * kTileBytes);
    layer_h = take(groups * c.n_layer * vector);
    skip = take(groups * padded(c.skip_rows, 32) * channel), head = take(groups * padded(c.head_rows, 32) * channel);
    bytes = layer_bytes > at ? layer_bytes : at;
  }
  // Warps of a head block that share a matrix, a tile of 16 rows each.
  static __host__ __device__ int warps_of(const WaveNetCall& c, const WaveNetCluster& k) {
    int rows = c.skip_rows > c.head_rows ? c.skip_rows : c.head_rows;
    if (c.class_rows > rows) rows = c.class_rows;
    return (rows / 16 + k.head_blocks - 1) / k.head_blocks;
  }
};

// sm_120 has clusters too, but not the shared memory.
#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
#define AK_CLUSTERS

// Ends when the phase of that parity has; a wait for a block that failed ends the launch with an error.
__device__ inline void wait(uint32_t bar, int64_t phase) {
  if (ptx::mbarrier_try_wait(bar, uint32_t(phase & 1))) return;
  constexpr uint64_t kPatience = 20'000'000'000ull;
  const uint64_t start = ptx::nanoseconds();
  while (!ptx::mbarrier_try_wait(bar, uint32_t(phase & 1)))
    if (ptx::nanoseconds() - start > kPatience) ptx::trap();
}

// A packed matrix of 16-bit weights: bias float32 (rows), words (taps, steps, rows) of two inputs each.
struct Matrix {
  const float* bias;
  const uint32_t* words;
  int rows, steps;

  __device__ Matrix(const uint8_t* p, int rows, int inputs)
      : bias(reinterpret_cast<const float*>(p)),
        words(reinterpret_cast<const uint32_t*>(p) + rows),
        rows(rows),
        steps((inputs + 1) / 2) {}
  static __device__ int64_t bytes(int rows, int taps, int inputs) {
    return 4 * (int64_t(rows) + int64_t(taps) * ((inputs + 1) / 2) * rows);
  }
  __device__ uint32_t word(int row, int pair) const {
    return row < rows && pair < steps ? __ldg(words + int64_t(pair) * rows + row) : 0;
  }
  __device__ Matrix tap(int i) const {
    Matrix m = *this;
    m.words += int64_t(i) * steps * rows;
    return m;
  }
  // The A operand of rows (low + 0 .. 7, high + 0 .. 7) and the 16 inputs of a step.
  __device__ uint4 tile(int low, int high, int step) const {
    const int lane = threadIdx.x % 32, row = lane / 4, pair = 8 * step + lane % 4;
    return {word(low + row, pair), word(high + row, pair), word(low + row, pair + 4), word(high + row, pair + 4)};
  }
};

// Where the pack has the matrices of a layer, and those of the head.
struct Pack {
  const WaveNetCall& c;
  __device__ int mix_rows(int layer) const { return c.skip_rows + (layer + 1 < c.n_layer ? c.x_rows : 0); }
  __device__ int64_t conv_bytes() const { return Matrix::bytes(2 * c.h_rows, c.width, c.residual); }
  __device__ const uint8_t* layer(int l) const {
    return c.pack + c.table_bytes + l * (conv_bytes() + Matrix::bytes(c.skip_rows + c.x_rows, 1, c.hidden));
  }
  __device__ Matrix conv(int l) const { return {layer(l), 2 * c.h_rows, c.residual}; }
  __device__ Matrix mix(int l) const { return {layer(l) + conv_bytes(), mix_rows(l), c.hidden}; }
  __device__ int skip_row(int l) const { return l + 1 < c.n_layer ? c.x_rows : 0; }  // the first of skip in mix
  __device__ Matrix head() const {
    const int last = c.n_layer - 1;
    return {layer(last) + conv_bytes() + Matrix::bytes(mix_rows(last), 1, c.hidden), c.head_rows, c.skip};
  }
  __device__ Matrix out() const {
    return {reinterpret_cast<const uint8_t*>(head().bias) + Matrix::bytes(c.head_rows, 1, c.skip), c.class_rows,
            c.head};
  }
};

// ---- the blocks of the layers

template <int R, class Type>
struct LayerBlock {
  static constexpr int kSteps = R / 16, kGateWarps = 2 * kSteps, kVector = R * 2 * kStreams;
  const WaveNetCall& c;
  const WaveNetCluster& k;
  const Places& at;
  char* shared;
  uint32_t base;  // the address of `shared`
  int rank, warp, lane;
  int first_layer, n_local;
  int64_t first;                // stream of the cluster
  int64_t first_ring;           // where the block's first ring lies in a state
  uint4 w[kMostLocal][kSteps];  // a gate warp's tile of M, an x warp's of W_res
  float pre[kMostLocal][4];     // what z starts from in the next item: past taps, bias, condition

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
        first(first) {
    int64_t slots = 0;
    for (int l = 0; l < first_layer; l++) slots += (c.width - 1) * c.dilations[l];
    first_ring = kStateHeader + slots * R;
  }

  __device__ bool last_of_all(int l) const { return first_layer + l + 1 == c.n_layer; }
  __device__ int stream(int g, int s) const { return g * kStreams + s; }
  __device__ bool active(int g, int s) const { return first + stream(g, s) < c.batch; }
  __device__ float* state(int g, int s) const { return c.state + (first + stream(g, s)) * c.state_stride; }
  __device__ int length(int l) const { return (c.width - 1) * c.dilations[first_layer + l]; }
  __device__ int& slot(int g, int l, int s) const {
    return reinterpret_cast<int*>(shared + at.slots)[(g * n_local + l) * kStreams + s];
  }
  __device__ int64_t& start(int g, int s) const { return reinterpret_cast<int64_t*>(shared + at.starts)[stream(g, s)]; }
  __device__ int& code(int g, int s) const { return reinterpret_cast<int*>(shared + at.codes)[stream(g, s)]; }
  // Row tile `warp` of the gate: 8 channels' tanh rows, then their sigmoid rows, so that a lane holds both.
  __device__ uint4 gate_tile(const Matrix& m, int step) const { return m.tile(8 * warp, R + 8 * warp, step); }
  __device__ uint4* tile_of(int l, int tap, int row_tile, int step) const {
    return reinterpret_cast<uint4*>(shared + at.weights) +
           ((((l * c.width + tap) * kGateWarps + row_tile) * kSteps + step) * 32 + lane);
  }

  // The warp's tile of M_l = W_cur W_res of the layer before, put where that of tap 0 belongs.
  __device__ void multiply_weights(int l) const {
    const Pack pack{c};
    const int layer = first_layer + l;
#pragma unroll 1
    for (int step = 0; step < kSteps; step++) {
      uint32_t words[4] = {};
#pragma unroll
      for (int half = 0; half < 2; half++) {
        if (layer == 0) continue;
        const Matrix cur = pack.conv(layer).tap(c.width - 1), res = pack.mix(layer - 1);
        const int column = 16 * step + 8 * half + lane / 4, shift = 16 * (column % 2);
        const auto element = [&](int row) { return res.word(row, column / 2) >> shift & 0xffff; };
        float sums[4] = {};
#pragma unroll 1
        for (int j = 0; j < kSteps; j++) {
          const int row = 16 * j + lane % 4 * 2;
          ptx::mma(sums, gate_tile(cur, j),
                   uint2{element(row) | element(row + 1) << 16, element(row + 8) | element(row + 9) << 16}, Type{});
        }
        words[2 * half] = ptx::pack(sums[0], sums[1], Type{});
        words[2 * half + 1] = ptx::pack(sums[2], sums[3], Type{});
      }
      *tile_of(l, 0, warp, step) = {words[0], words[1], words[2], words[3]};
    }
  }

  __device__ void load_weights() {
    const Pack pack{c};
    const bool gates = warp < kGateWarps, residual = !gates && warp < kGateWarps + kSteps;
    const int row_tile = gates ? warp : warp - kGateWarps;
    // By way of shared memory, so that the loops over layers stay loops; a lane reads back what it wrote itself.
#pragma unroll 1
    for (int l = 0; l < n_local; l++) {
      if (gates) multiply_weights(l);
      for (int step = 0; step < kSteps && residual; step++)
        *tile_of(l, 1, row_tile, step) =
            first_layer + l > 0 ? pack.mix(first_layer + l - 1).tile(16 * row_tile, 16 * row_tile + 8, step)
                                : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int l = 0; l < kMostLocal; l++)
#pragma unroll
      for (int step = 0; step < kSteps; step++)
        if (l < n_local && (gates || residual)) w[l][step] = *tile_of(l, residual, row_tile, step);
    __syncthreads();
#pragma unroll 1
    for (int l = 0; l < n_local; l++) {
      const int layer = first_layer + l;
      const Matrix conv = pack.conv(layer), cur = conv.tap(c.width - 1);
#pragma unroll 1
      for (int i = 0; i < c.width * kSteps && gates; i++)
        *tile_of(l, i / kSteps, warp, i % kSteps) = gate_tile(conv.tap(i / kSteps), i % kSteps);
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
      float sum = Pack{c}.conv(layer).bias[row];
      for (int j = 0; j < c.condition; j++)
        sum =
            fmaf(__ldg(table + (int64_t(layer) * c.condition + j) * 2 * R + row), values[j * c.frames_stride[2]], sum);
      c.base[(b * c.n_layer + layer) * 2 * R + row] = sum;
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
    int64_t ring_at = first_ring;
    for (int l = 0; l < n_local; l++) {
      const int d = c.dilations[first_layer + l];
      for (int i = threadIdx.x; i < (c.width - 1) * kStreams * R; i += kThreads) {
        const int row = i % R, s = i / R % kStreams, tap = i / R / kStreams;
        const int ahead = slot(g, l, s) + tap * d, from = ahead < length(l) ? ahead : ahead - length(l);
        const float x = active(g, s) ? state(g, s)[ring_at + int64_t(from) * R + row] : 0.0f;
        reinterpret_cast<uint16_t*>(shared + at.past)[((l * (c.width - 1) + tap) * R + row) * kStreams + s] =
            uint16_t(ptx::pack(x, 0.0f, Type{}));
      }
      ring_at += int64_t(length(l)) * R;
    }
    __syncthreads();
    if (warp >= kGateWarps) return;
    const int low = 8 * warp + lane / 4, s = lane % 4 * 2;
#pragma unroll
    for (int l = 0; l < kMostLocal; l++) {
      if (l >= n_local) continue;
      const float* bias = reinterpret_cast<const float*>(shared + at.z_bias) + l * 2 * R;
      for (int i = 0; i < 4; i++) {
        const int row = low + i / 2 * R;
        pre[l][i] = bias[row];
        if (c.base && active(g, s + i % 2))
          pre[l][i] += c.base[((first + stream(g, s + i % 2)) * c.n_layer + first_layer + l) * 2 * R + row];
      }
#pragma unroll 1
      for (int tap = 0; tap + 1 < c.width; tap++)
        add_product(pre[l], tile_of(l, tap, warp, 0), base + at.past + (l * (c.width - 1) + tap) * kVector);
    }
  }

  // sums += tiles (32 lanes apart) times the vectors at `address`.
  __device__ void add_product(float (&sums)[4], const uint4* tiles, uint32_t address) const {
#pragma unroll
    for (int step = 0; step < kSteps; step += 2) {
      const uint4 b = ptx::load_matrix_x4_trans(address + (16 * step + lane) * 2 * kStreams);
      ptx::mma(sums, tiles[32 * step], uint2{b.x, b.y}, Type{});
      ptx::mma(sums, tiles[32 * (step + 1)], uint2{b.z, b.w}, Type{});
    }
  }
  __device__ void add_product(float (&sums)[4], const uint4 (&tiles)[kSteps], uint32_t address) const {
#pragma unroll
    for (int step = 0; step < kSteps; step += 2) {
      const uint4 b = ptx::load_matrix_x4_trans(address + (16 * step + lane) * 2 * kStreams);
      ptx::mma(sums, tiles[step], uint2{b.x, b.y}, Type{});
      ptx::mma(sums, tiles[step + 1], uint2{b.z, b.w}, Type{});
    }
  }

  __device__ void put(int offset, uint32_t value) const { *reinterpret_cast<uint32_t*>(shared + offset) = value; }

  // The layers of one step of a group, a barrier each.
  __device__ void run_layers(int g) {
    const bool hands_on = rank + 1 < k.layer_blocks;
    const uint32_t next = hands_on ? ptx::map_shared(base, rank + 1) : 0, next_full = next + at.in_full + 8 * g;
    const int pair = lane % 4 * 4;  // bytes to the lane's two streams
    float x[4];
    int64_t ring_at = first_ring;
#pragma unroll
    for (int l = 0; l < kMostLocal; l++) {
      if (l >= n_local) continue;
      const int h_at = at.h + (g * n_local + l) * kVector, x_at = at.x + l % 2 * kVector;
      const int h_in = l == 0 ? at.in_h + g * kVector : h_at - kVector;
      const int x_in = l == 0 ? at.in_x + g * kVector : at.x + (l + 1) % 2 * kVector;
      const bool leaves = l + 1 == n_local && hands_on;
      if (warp < kGateWarps) {
        float z[4] = {};
        add_product(z, w[l], base + h_in);
        add_product(pre[l], tile_of(l, c.width - 1, warp, 0), base + x_in);
        float h[2];
        for (int i = 0; i < 2; i++)
          h[i] = ptx::tanh_approx(z[i] + pre[l][i]) *
                 fmaf(ptx::tanh_approx(0.5f * (z[2 + i] + pre[l][2 + i])), 0.5f, 0.5f);
        const uint32_t word = ptx::pack(h[0], h[1], Type{});
        const int row = (8 * warp + lane / 4) * 2 * kStreams + pair;
        put(h_at + row, word);
        if (leaves) ptx::store_async(next + at.in_h + g * kVector + row, word, next_full);
        ptx::fence_async();  // the bulk copies below read it
      } else if (warp < kGateWarps + kSteps) {
        const int low = 16 * (warp - kGateWarps) + lane / 4, s = lane % 4 * 2;
        for (int i = 0; i < 4; i++) {
          const int row = low + i / 2 * 8;
          if (l == 0) x[i] = reinterpret_cast<float*>(shared + at.in_x32)[(g * R + row) * kStreams + s + i % 2];
          x[i] += reinterpret_cast<float*>(shared + at.x_bias)[l * R + row];
        }
        add_product(x, w[l], base + h_in);
        for (int half = 0; half < 2; half++) {
          const int row = low + 8 * half, bytes = row * 2 * kStreams + pair;
          const uint32_t word = ptx::pack(x[2 * half], x[2 * half + 1], Type{});
          put(x_at + bytes, word);
          if (leaves) {
            ptx::store_async(next + at.in_x + g * kVector + bytes, word, next_full);
            ptx::store_async(next + at.in_x32 + 2 * (g * kVector + bytes),
                             uint2{__float_as_uint(x[2 * half]), __float_as_uint(x[2 * half + 1])}, next_full);
          }
          for (int i = 0; i < 2; i++)
            if (active(g, s + i)) state(g, s + i)[ring_at + int64_t(slot(g, l, s + i)) * R + row] = x[2 * half + i];
        }
        ring_at += int64_t(length(l)) * R;
      }
      __syncthreads();
      if (threadIdx.x == 32 * kGateWarps)
        for (int i = 0; i < k.head_blocks; i++) {
          const uint32_t to = ptx::map_shared(base, k.layer_blocks + i);
          const int item = g * c.n_layer + first_layer + l;
          ptx::bulk_copy(to + at.layer_h + item * kVector, base + h_at, kVector, to + at.h_full + 8 * item);
        }
    }
  }

  // Block 0: the codes of step t, drawn from the logits that have come, or known; a warp a stream.
  __device__ void choose(int64_t t, int g) {
    if (warp < kStreams) {
      wait(base + at.logits_full + 8 * g, t);
      if (threadIdx.x == 0) ptx::mbarrier_arrive_expect(base + at.logits_full + 8 * g, c.class_rows * 4 * kStreams);
      if (active(g, warp)) {
        const int64_t b = first + stream(g, warp);
        float* logit = reinterpret_cast<float*>(shared + at.logits) + g * c.class_rows * kLogitStride + warp;
        float* sums = reinterpret_cast<float*>(shared + at.sums) + warp * kMostTiles;
        const float u = c.uniforms[b * c.uniforms_stride[0] + t * c.uniforms_stride[1]];
        const int drawn = t < c.forced ? forced_code(c, b, t) : draw(c, logit, kLogitStride, sums, u);
        if (lane == 0) {
          code(g, warp) = drawn;
          write_code(c, b, t, drawn);
          if (t + 1 == c.n) write_header(state(g, warp), start(g, warp) + c.n, drawn);
        }
      }
    }
    __syncthreads();
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

  __device__ void run() {
    load_weights();
    for (int g = 0; g < k.groups && threadIdx.x == 0; g++) {
      ptx::mbarrier_init(base + at.in_full + 8 * g, 1);
      ptx::mbarrier_init(base + at.logits_full + 8 * g, 1);
      ptx::mbarrier_arrive_expect(base + at.in_full + 8 * g, 4 * kVector);
      ptx::mbarrier_arrive_expect(base + at.logits_full + 8 * g, c.class_rows * 4 * kStreams);
    }
    ptx::mbarrier_fence_init();
    __syncthreads();
    ptx::cluster_arrive();
    ptx::cluster_wait();
    prepare(0, 0);
    for (int64_t t = 0; t < c.n; t++)
      for (int g = 0; g < k.groups; g++) {
        if (rank == 0) {
          if (t > 0) choose(t - 1, g);
          embed(g);
        } else {
          const uint32_t full = base + at.in_full + 8 * g;
          wait(full, t);
          if (threadIdx.x == 0) ptx::mbarrier_arrive_expect(full, 4 * kVector);
        }
        run_layers(g);
        const int next = g + 1 == k.groups ? 0 : g + 1;
        if (next > 0 || t + 1 < c.n) prepare(t + (next == 0), next);
      }
    for (int g = 0; g < k.groups && rank == 0; g++) choose(c.n - 1, g);
  }
};

// ---- the blocks of skip, head and output

template <int R, class Type>
struct HeadBlock {
  static constexpr int kSteps = R / 16, kVector = R * 2 * kStreams;
  const WaveNetCall& c;
  const WaveNetCluster& k;
  const Places& at;
  char* shared;
  uint32_t base;
  int warps, warp, lane;  // of a matrix; the second `warps` have the output
  int row;                // the first of the warp's tile
  int64_t first;
  uint4 w[kMostTiles];  // its rows of head, or of the output

  __device__ HeadBlock(const WaveNetCall& c, const WaveNetCluster& k, const Places& at, int64_t first)
      : c(c),
        k(k),
        at(at),
        shared(ptx::dynamic_shared()),
        base(ptx::shared_address(shared)),
        warps(Places::warps_of(c, k)),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        row(16 * (int(ptx::cluster_rank()) - k.layer_blocks + k.head_blocks * (warp % warps))),
        first(first) {}

  __device__ uint4* skip_tile(int layer, int step) const {
    return reinterpret_cast<uint4*>(shared + at.skip_weights) + ((layer * warps + warp) * kSteps + step) * 32 + lane;
  }

  __device__ void load_weights() {
    const Pack pack{c};
    if (warp >= 2 * warps) return;
    const Matrix m = warp < warps ? pack.head() : pack.out();
#pragma unroll
    for (int step = 0; step < kMostTiles; step++) w[step] = m.tile(row, row + 8, step);
#pragma unroll 1
    for (int layer = 0; layer < c.n_layer && warp < warps && row < c.skip_rows; layer++)
      for (int step = 0; step < kSteps; step++) {
        const int from = pack.skip_row(layer) + row;
        *skip_tile(layer, step) = pack.mix(layer).tile(from, from + 8, step);
      }
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

  // Waits for the vectors of `rows` channels at `offset`, and multiplies the warp's rows by them.
  __device__ void product(float (&sums)[4], const float* bias, int offset, int rows, int full, int64_t t) const {
    wait(base + full, t);
    if (warp % warps == 0 && lane == 0) ptx::mbarrier_arrive_expect(base + full, rows * 2 * kStreams);
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

  __device__ void run_skip_and_head(int64_t t, int g, const float (&skip_bias)[2], const float* head_bias) const {
    if (row < c.skip_rows) {
      float sums[4] = {skip_bias[0], skip_bias[0], skip_bias[1], skip_bias[1]};
      for (int layer = 0; layer < c.n_layer; layer++) {
        const int item = g * c.n_layer + layer;
        wait(base + at.h_full + 8 * item, t);
        if (warp == 0 && lane == 0) ptx::mbarrier_arrive_expect(base + at.h_full + 8 * item, kVector);
#pragma unroll
        for (int step = 0; step < kSteps; step += 2) {
          const uint4 b =
              ptx::load_matrix_x4_trans(base + at.layer_h + item * kVector + (16 * step + lane) * 2 * kStreams);
          ptx::mma(sums, *skip_tile(layer, step), uint2{b.x, b.y}, Type{});
          ptx::mma(sums, *skip_tile(layer, step + 1), uint2{b.z, b.w}, Type{});
        }
      }
      share(sums, at.skip + g * padded(c.skip_rows, 32) * 2 * kStreams, at.skip_full + 8 * g);
    }
    if (row < c.head_rows) {
      float sums[4];
      product(sums, head_bias, at.skip + g * padded(c.skip_rows, 32) * 2 * kStreams, c.skip_rows, at.skip_full + 8 * g,
              t);
      share(sums, at.head + g * padded(c.head_rows, 32) * 2 * kStreams, at.head_full + 8 * g);
    }
  }

  __device__ void run_out(int64_t t, int g, const float* bias) const {
    if (row >= c.class_rows) return;
    float sums[4];
    product(sums, bias, at.head + g * padded(c.head_rows, 32) * 2 * kStreams, c.head_rows, at.head_full + 8 * g, t);
    const uint32_t to = ptx::map_shared(base, 0);
    for (int half = 0; half < 2; half++) {
      const int label = row + lane / 4 + 8 * half, s = lane % 4 * 2;
      const int at_logit = (g * c.class_rows + label) * kLogitStride + s;
      ptx::store_async(to + at.logits + 4 * at_logit,
                       uint2{__float_as_uint(sums[2 * half]), __float_as_uint(sums[2 * half + 1])},
                       to + at.logits_full + 8 * g);
      for (int i = 0; i < 2 && c.logits && label < c.n_class; i++) {
        const int64_t b = first + g * kStreams + s + i;
        if (b < c.batch) c.logits[(b * c.n + t) * c.n_class + label] = sums[2 * half + i];
      }
    }
  }

  __device__ void run() {
    load_weights();
    for (int g = 0; g < k.groups && threadIdx.x == 0; g++) {
      const auto arm = [&](int full, int bytes) {
        ptx::mbarrier_init(base + full, 1);
        ptx::mbarrier_arrive_expect(base + full, bytes);
      };
      arm(at.skip_full + 8 * g, c.skip_rows * 2 * kStreams);
      arm(at.head_full + 8 * g, c.head_rows * 2 * kStreams);
      for (int layer = 0; layer < c.n_layer; layer++) arm(at.h_full + 8 * (g * c.n_layer + layer), kVector);
    }
    ptx::mbarrier_fence_init();
    __syncthreads();
    ptx::cluster_arrive();
    ptx::cluster_wait();
    const Pack pack{c};
    float skip_bias[2] = {};
    for (int layer = 0; layer < c.n_layer && warp < warps && row < c.skip_rows; layer++)
      for (int i = 0; i < 2; i++) skip_bias[i] += pack.mix(layer).bias[pack.skip_row(layer) + row + lane / 4 + 8 * i];
    for (int64_t t = 0; t < c.n; t++)
      for (int g = 0; g < k.groups; g++) {
        if (warp < warps)
          run_skip_and_head(t, g, skip_bias, pack.head().bias);
        else if (warp < 2 * warps)
          run_out(t, g, pack.out().bias);
      }
  }
};

#endif

template <int R, class Type>
__global__ void __launch_bounds__(kThreads, 1)
    cluster_kernel(const __grid_constant__ WaveNetCall c, const __grid_constant__ WaveNetCluster k,
                   const __grid_constant__ Places at) {
#ifdef AK_CLUSTERS
  const int64_t first = int64_t(blockIdx.x / (k.layer_blocks + k.head_blocks)) * k.groups * kStreams;
  if (int(ptx::cluster_rank()) < k.layer_blocks)
    LayerBlock<R, Type>(c, k, at, first).run();
  else
    HeadBlock<R, Type>(c, k, at, first).run();
  ptx::cluster_arrive();  // no block ends while others may write into it
  ptx::cluster_wait();
#endif
}

using Kernel = void (*)(WaveNetCall, WaveNetCluster, Places);

template <class Type>
Kernel kernel_of(const WaveNetCall& c) {
  return c.residual == 32 ? cluster_kernel<32, Type> : cluster_kernel<64, Type>;
}

// The launch for a call; cudaErrorInvalidValue if the call is not one for this kernel.
cudaError_t configure(const WaveNetCall& c, const WaveNetCluster& k, Kernel* kernel, cudaLaunchConfig_t* config) {
  const int local = k.layer_blocks > 0 ? (c.n_layer + k.layer_blocks - 1) / k.layer_blocks : 0;
  const int tiles = 16 * k.head_blocks;
  const bool sizes = (c.residual == 32 || c.residual == 64) && c.hidden == c.residual && c.width >= 2;
  const bool rows = c.skip_rows >= tiles && c.head_rows >= tiles && c.class_rows >= tiles && c.skip_rows <= 256 &&
                    c.head_rows <= 256 && c.n_class <= 256;
  if (!sizes || !rows || k.groups < 1 || k.layer_blocks < 1 || k.layer_blocks > c.n_layer || local > kMostLocal ||
      2 * Places::warps_of(c, k) > kWarps || (c.dtype != kFloat16 && c.dtype != kBFloat16))
    return cudaErrorInvalidValue;
  *kernel = c.dtype == kFloat16 ? kernel_of<ptx::Float16>(c) : kernel_of<ptx::BFloat16>(c);
  const int bytes = Places(c, k).bytes, blocks = k.layer_blocks + k.head_blocks, streams = k.groups * kStreams;
  cudaError_t error = cudaFuncSetAttribute(*kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && blocks > 8)
    error = cudaFuncSetAttribute(*kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  config->gridDim = dim3(unsigned((c.batch + streams - 1) / streams * blocks));
  config->blockDim = dim3(kThreads);
  config->dynamicSmemBytes = size_t(bytes);
  config->attrs[0].id = cudaLaunchAttributeClusterDimension;
  config->attrs[0].val.clusterDim.x = unsigned(blocks);
  config->attrs[0].val.clusterDim.y = config->attrs[0].val.clusterDim.z = 1;
  config->numAttrs = 1;
  return error;
}

}  // namespace

cudaError_t wavenet_cluster_cuda(const WaveNetCall& call, const WaveNetCluster& cluster, cudaStream_t stream) {
  Kernel kernel = nullptr;
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  config.attrs = &attribute;
  config.stream = stream;
  const cudaError_t error = configure(call, cluster, &kernel, &config);
  return error == cudaSuccess ? cudaLaunchKernelEx(&config, kernel, call, cluster, Places(call, cluster)) : error;
}

cudaError_t wavenet_cluster_most(const WaveNetCall& call, const WaveNetCluster& cluster, int* clusters) {
  Kernel kernel = nullptr;
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  config.attrs = &attribute;
  const cudaError_t error = configure(call, cluster, &kernel, &config);
  return error == cudaSuccess ? cudaOccupancyMaxActiveClusters(clusters, kernel, &config) : error;
}

}  // namespace audiokernels
