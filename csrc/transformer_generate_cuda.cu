// Transformer generation on a GPU: one launch draws all samples, a block of threads a stream, or from compute
// capability 9.0 on a cluster of blocks a stream. Compiled, and run on the host by the tests; not yet run on a GPU.
//
// The blocks of a stream all know x, the normalised x, the logits and the code. Each has some heads, or a part of one
// head's keys, some rows of the MLP and of the output, and what the state remembers of them: what a block writes into
// the state no other block reads. Products that follow (proj, down, the context network) multiply a slice of their
// inputs in each block; the slices' sums go to all blocks, which add them in order: one exchange after attention, one
// after the MLP. Slices are the same for every number of blocks, and so are the codes.
//
// A value of an exchange travels with its completion (st.async on an mbarrier of the receiver), into one of two buffers
// in turn. A block sends for exchange i + 2 after it has received i + 1 from all others, which they sent after they had
// read i: nothing is overwritten early. So a block that has nothing to send still sends a token.
#include "generation_device.h"
#include "transformer_generate_cuda.h"

namespace audiokernels {
namespace {

constexpr int kThreads = kTransformerThreads, kWarps = kThreads / 32;
constexpr int kSubs = 8;           // lanes that share the inputs of 16 rows, four rows each
constexpr int kInputParts = 4;     // warps that share the inputs of 16 rows
constexpr int kPassGroups = 64;    // of 16 rows
constexpr int kPoolParts = 8;      // threads that share the past rows of a channel
constexpr int kAhead = 4;          // rows of values that a lane asks for before it makes scores
constexpr float kEpsilon = 1e-5f;  // of the norms
constexpr float kFaint = -40.0f;   // as on the CPU: a weight of e^-40 of the largest is lost in float32

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

// ---- how the slices' sums, and rows that each block has some of, reach all blocks of a stream

struct Alone {
  float* buffer;

  __device__ Alone(const TransformerCall&, const TransformerPlaces& at, char* shared)
      : buffer(reinterpret_cast<float*>(shared + at.buffer)) {}
  __device__ int rank() const { return 0; }
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
  __device__ int rank() const { return int(ptx::cluster_rank()); }
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
#pragma unroll 1
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

// ---- the network

enum Finish { kSet, kAdd, kRelu };

template <class Dot, class Exchange>
struct Net {
  using In = typename Dot::In;
  using Sum = typename Dot::Sum;
  static constexpr int kWords = Dot::kByTap ? 1 : Dot::kGroup;  // of a vector a step

  const TransformerCall& c;
  const TransformerPlaces& at;
  char* shared;
  Exchange exchange;
  int rank;
  Heads heads;
  float* state;
  int64_t position;
  int slot;  // of the ring of keys

  __device__ Net(const TransformerCall& call, const TransformerPlaces& places)
      : c(call),
        at(places),
        shared(ptx::dynamic_shared()),
        exchange(call, places, shared),
        rank(exchange.rank()),
        heads(call, rank),
        state(call.state + stream() * call.state_stride),
        position(read_position(state)) {
    slot = int(position % c.capacity());
  }

  __device__ int64_t stream() const { return unsigned(blockIdx.x) / unsigned(c.blocks); }
  __device__ int64_t start() const { return read_position(state); }  // of the call: the header is written at its end
  __device__ float* floats(int offset) const { return reinterpret_cast<float*>(shared + offset); }
  __device__ int& code() const { return *ints(at.code); }  // the last one
  __device__ int* ints(int offset) const { return reinterpret_cast<int*>(shared + offset); }
  __device__ Cut share(int n) const { return Cut::of(n, rank, c.blocks); }

  // ---- products. 16 rows are summed by a warp: a lane has four rows and every eighth step of the inputs.

  // `vectors` of `width` inputs each, as the pack type wants them. int8: each scaled by its largest one.
  __device__ const In* prepare(const float* in, int vectors, int width) const {
    if constexpr (Dot::kByTap) {
      int* packed = ints(at.packed);
#pragma unroll 1
      for (int task = warp_of(); task < vectors; task += kWarps) {
        const float* from = in + task * width;
        float largest = 0.0f;
        for (int i = lane_of(); i < width; i += 32) largest = fmaxf(largest, fabsf(from[i]));
        largest = warp_max(largest);
        const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
        if (lane_of() == 0) floats(at.scales)[task] = largest / 127.0f;
        for (int s = lane_of(); s < width / 4; s += 32) {
          uint32_t four = 0;
          for (int j = 0; j < 4; j++) four |= (uint32_t(__float2int_rn(from[4 * s + j] * inverse)) & 0xff) << 8 * j;
          packed[task * (width / 4) + s] = int(four);
        }
      }
      __syncthreads();
      return packed;
    } else {
      return in;
    }
  }

  // Sums of 16 rows over steps begin .. end - 1 of a tap, of which `in` is the first: the same in all lanes of a quad.
  __device__ void sum_group(Sum (&sums)[4], const uint4* lanes, int row_quads, int group, int begin, int end,
                            const In* in) const {
    const int sub = lane_of() / 4, quad = 4 * group + lane_of() % 4;
#pragma unroll 4
    for (int s = begin + sub; s < end; s += kSubs) {
      const uint4 w = __ldg(lanes + int64_t(s) * row_quads + quad);
      const In* from = in + (s - begin) * kWords;
      sums[0] = Dot::add(sums[0], w.x, from, 1);
      sums[1] = Dot::add(sums[1], w.y, from, 1);
      sums[2] = Dot::add(sums[2], w.z, from, 1);
      sums[3] = Dot::add(sums[3], w.w, from, 1);
    }
  }
  static __device__ void add_lanes(Sum (&sums)[4]) {
    for (int i = 0; i < 4; i++)
      for (int bits = 4; bits < 32; bits *= 2) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], bits);
  }

  // put(i, sum + bias) for this block's rows, groups of 16: `groups` in runs of `run`, the first at `first`, `stride`
  // apart. Ends synchronised.
  template <class Put>
  __device__ void rows_of(const PackedMatrix& m, const float* in, int first, int groups, int run, int stride,
                          Put put) const {
    const In* inputs = prepare(in, 1, c.embd_rows());
    const int parts = lesser(kInputParts, above(m.steps, kSubs)), each = above(m.steps, parts);
    Sum* partial = reinterpret_cast<Sum*>(shared + at.partial);
    const auto group_of = [&](int i) {
      const Quotient at_run(i, run);
      return first + at_run.quotient * stride + at_run.remainder;
    };
    for (int pass = 0; pass < groups; pass += kPassGroups) {
      const int here = lesser(groups - pass, kPassGroups);
#pragma unroll 1
      for (int task = warp_of(); task < here * parts; task += kWarps) {
        const Quotient which(task, here);
        const int group = which.remainder, part = which.quotient, begin = part * each;
        Sum sums[4] = {};
        sum_group(sums, m.lanes, m.rows / 4, group_of(pass + group), begin, lesser(begin + each, m.steps),
                  inputs + begin * kWords);
        add_lanes(sums);
        if (lane_of() < 4)
          for (int i = 0; i < 4; i++) partial[(part * here + group) * 16 + 4 * lane_of() + i] = sums[i];
      }
      const auto row_of = [&](int i) { return 16 * group_of(pass + i / 16) + i % 16; };
      const float first_bias = __ldg(m.bias + row_of(lesser(thread_of(), 16 * here - 1)));
      __syncthreads();
#pragma unroll 1
      for (int i = thread_of(); i < 16 * here; i += kThreads) {
        const int row = row_of(i);
        const float bias = i < kThreads ? first_bias : __ldg(m.bias + row);
        Sum sum = partial[i];
        for (int part = 1; part < parts; part++) sum += partial[part * here * 16 + i];
        if constexpr (Dot::kByTap)
          put(16 * pass + i, fmaf(float(sum), __ldg(m.scale + row) * floats(at.scales)[0], bias));
        else
          put(16 * pass + i, sum + bias);
      }
      __syncthreads();
    }
  }

  // Four rows of a slice: its taps' inputs are `width` numbers each, slice `local` of this block's.
  __device__ float4 slice_sum(const PackedMatrix& m, const Cut& cut, int local, int group, const In* in) const {
    const int begin = Quotient(cut.first + local, cut.repeat).quotient * (cut.width / Dot::kGroup);
    const int end = lesser(begin + cut.width / Dot::kGroup, m.steps), words = cut.width / Dot::kGroup * kWords;
    Sum sums[4] = {};
    float total[4] = {};
#pragma unroll 1
    for (int tap = 0; tap < m.taps; tap++) {
      const int vector = tap * cut.local() + local;
      sum_group(sums, m.lanes + int64_t(tap) * m.steps * (m.rows / 4), m.rows / 4, group, begin, end,
                in + vector * words);
      if constexpr (Dot::kByTap) {
        add_lanes(sums);
        const float scale = floats(at.scales)[vector];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int row = 16 * group + 4 * (lane_of() % 4) + i;
          total[i] = fmaf(float(sums[i]), __ldg(m.scale + tap * m.rows + row) * scale, total[i]);
          sums[i] = 0;
        }
      }
    }
    if constexpr (!Dot::kByTap) {
      add_lanes(sums);
      for (int i = 0; i < 4; i++) total[i] = sums[i];
    }
    return {total[0], total[1], total[2], total[3]};
  }

  // Of slice `lane`: the share that its part of a head's keys has of their softmax. merge: largest score and sum a
  // slice.
  __device__ float part_share(const float* merge, const Cut& cut) const {
    const int lane = lane_of();
    if (lane >= cut.count) return 0.0f;
    const float* head = merge + 2 * (lane / cut.repeat * cut.repeat);
    float most = -INFINITY, total = 0.0f, mine = 0.0f;
    for (int part = 0; part < cut.repeat; part++) most = fmaxf(most, head[2 * part]);
    for (int part = 0; part < cut.repeat; part++) {
      const float sum = head[2 * part + 1], weight = sum > 0.0f ? sum * weight_of(head[2 * part] - most) : 0.0f;
      total += weight;
      if (part == lane % cut.repeat) mine = weight;
    }
    return total > 0.0f ? mine / total : 0.0f;
  }

  // to = matrix * in + bias in every block, of which each has its slices of `in`. merge: null, or the largest score and
  // the sum of weights of each of this block's slices, parts of heads that are merged. Ends synchronised.
  __device__ void reduce(const PackedMatrix& m, const Cut& cut, const float* in, float* to, Finish finish,
                         const float* merge = nullptr) {
    const In* inputs = prepare(in, m.taps * cut.local(), cut.width);
    for (int first = 0; first < m.rows; first += at.buffer_rows) {
      const int rows = lesser(m.rows - first, at.buffer_rows), groups = rows / 16, behind = cut.count * rows;
      exchange.begin(4 * behind + (merge ? 8 * cut.count : 0), cut.blocks_with_some(c.blocks));
#pragma unroll 1
      for (int task = warp_of(); task < groups * cut.local(); task += kWarps) {
        const Quotient which(task, groups);
        const int group = which.remainder, local = which.quotient;
        const float4 sums = slice_sum(m, cut, local, first / 16 + group, inputs);
        exchange.put_four((cut.first + local) * rows + 16 * group + 4 * (lane_of() % 4), sums, lane_of() / 4);
      }
      if (merge && thread_of() < 2 * cut.local())
        exchange.put(behind + 2 * cut.first + thread_of(), merge[thread_of()]);
      const float first_bias = __ldg(m.bias + first + lesser(thread_of(), rows - 1));  // on its way while others send
      const float* sums = exchange.finish();
      const float share = merge ? part_share(sums + behind, cut) : 1.0f;
#pragma unroll 1
      for (int i = thread_of(); i < rounded(rows, 32); i += kThreads) {  // whole warps
        const int row = first + (i < rows ? i : 0);
        float total = (i < kThreads ? first_bias : __ldg(m.bias + row)) + (finish == kAdd ? to[row] : 0.0f);
        for (int s = 0; s < cut.count; s++)
          total = fmaf(__shfl_sync(kAllLanes, share, s), sums[s * rows + (i < rows ? i : 0)], total);
        if (i < rows) to[row] = finish == kRelu ? fmaxf(total, 0.0f) : total;
      }
      __syncthreads();
    }
  }

  // x centred and scaled into h: the affine part is in the matrix that follows. Each warp finds the mean for itself.
  __device__ void normalize() const {
    const float *x = floats(at.x), count = float(c.n_embd);
    float sum = 0.0f, squares = 0.0f;
    for (int i = lane_of(); i < c.n_embd; i += 32) sum += x[i];
    const float mean = warp_sum(sum) / count;
    for (int i = lane_of(); i < c.n_embd; i += 32) squares = fmaf(x[i] - mean, x[i] - mean, squares);
    const float scale = 1.0f / sqrtf(warp_sum(squares) / count + kEpsilon);
    for (int i = thread_of(); i < c.embd_rows(); i += kThreads)
      floats(at.h)[i] = i < c.n_embd ? (x[i] - mean) * scale : 0.0f;
    __syncthreads();
  }

  // ---- attention

  __device__ uint4 load_four(const uint32_t* p) const {
    return c.aligned ? *reinterpret_cast<const uint4*>(p) : uint4{p[0], p[1], p[2], p[3]};
  }
  __device__ uint2 load_two(const uint32_t* p) const {
    return c.aligned ? *reinterpret_cast<const uint2*>(p) : uint2{p[0], p[1]};
  }

  // Where a head's key block begins in the cache; `values` of the layer follow its keys.
  template <class Cache>
  __device__ uint32_t* keys_at(uint32_t* cache, int head, int block) const {
    return cache + (int64_t(head) * c.capacity() + block * kKeyBlock) * c.headdim / Cache::kGroup;
  }
  template <class Cache>
  __device__ uint32_t* values_at(uint32_t* cache, int head, int block) const {
    const int64_t keys = int64_t(c.n_head) * c.capacity() * c.headdim / Cache::kGroup;
    return cache + keys + (int64_t(head) * c.capacity() + block * kKeyBlock) * c.head_rows / Cache::kGroup;
  }
  template <class Cache>
  static __device__ void write_cell(uint32_t* cell, int member, float value) {
    if constexpr (Cache::kGroup == 1)
      *cell = __float_as_uint(value);
    else
      reinterpret_cast<uint16_t*>(cell)[member] = uint16_t(ptx::pack(value, 0.0f, ptx::BFloat16{}));
  }

  // Turns q by the position; the turned key and the value go into their slot, if this block has it.
  template <class Cache>
  __device__ void remember(uint32_t* cache) const {
    constexpr int g = Cache::kGroup;
    const int d = c.headdim, d16 = c.head_rows, half = d / 2, block = slot / int(kKeyBlock), in_block = slot % 64;
    const int part = block * c.parts / c.key_blocks();
    float *q = floats(at.qkv), *k = q + heads.count() * d16, *v = k + heads.count() * d16;
    const auto mine = [&](int head) {
      const int unit = head * c.parts + part;
      return unit >= heads.first_unit && unit < heads.end_unit;
    };
#pragma unroll 1
    for (int i = thread_of(); i < heads.count() * half; i += kThreads) {
      const int head = heads.first + i / half, a = i / half * d16 + i % half, b = a + half;
      float low = k[a], high = k[b];
      if (c.positions == kRotary) {
        const float cosine = floats(at.cos)[i % half], sine = floats(at.sin)[i % half], x = q[a], y = q[b];
        q[a] = x * cosine - y * sine;
        q[b] = y * cosine + x * sine;
        low = k[a] * cosine - k[b] * sine;
        high = k[b] * cosine + k[a] * sine;
      }
      if (!mine(head)) continue;
      uint32_t* cells = keys_at<Cache>(cache, head, block) + in_block;
      write_cell<Cache>(cells + i % half / g * kKeyBlock, i % half % g, low);
      write_cell<Cache>(cells + (i % half + half) / g * kKeyBlock, (i % half + half) % g, high);
    }
#pragma unroll 1
    for (int i = thread_of(); i < heads.count() * d16; i += kThreads)
      if (const int head = heads.first + i / d16; mine(head))
        write_cell<Cache>(values_at<Cache>(cache, head, block) + in_block / g * d16 + i % d16, in_block % g, v[i]);
  }

  // Warp task of attention: the key blocks first, first + subs, .. < end of a head, with a running largest score.
  // Leaves that, the sum of weights, and the weighted sum of values in `result`: of 128 channels, from quad `from` on.
  template <class Cache>
  __device__ void attend_some(uint32_t* cache, int head, int first, int end, const float* q, float* result,
                              int from) const {
    constexpr int g = Cache::kGroup;
    const int d = c.headdim, d16 = c.head_rows, lane = lane_of(), quads = lesser(d16 / 4 - from, 32);
    int width = 4;  // lanes that share a row of values
    while (width < quads) width *= 2;
    const int quad = lane % width, row = lane / width, rows = 32 / width;
    float most = -INFINITY, sum = 0.0f, sums[4] = {};
    float* weights = floats(at.weights) + warp_of() * kKeyBlock;
#pragma unroll 1
    for (int block = first; block < end && int64_t(block) * kKeyBlock <= position; block += c.subs) {
      const uint32_t* values = values_at<Cache>(cache, head, block) + 4 * (from + quad);
      uint4 ahead[kAhead];  // of the values, on their way while the scores are made
      for (int j = 0; j < kAhead && quad < quads && row + j * rows < kKeyBlock / g; j++)
        ahead[j] = load_four(values + (row + j * rows) * d16);
      float scores[2] = {};
      const uint32_t* cell = keys_at<Cache>(cache, head, block) + 2 * lane;
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
      if (largest == -INFINITY) continue;  // the window ends within this block, before its first key
      const float fade = sum > 0.0f ? weight_of(most - largest) : 0.0f;
      most = largest;
      for (int i = 0; i < 2; i++) scores[i] = scores[i] == -INFINITY ? 0.0f : weight_of(scores[i] - largest);
      sum = fmaf(sum, fade, warp_sum(scores[0] + scores[1]));
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
      for (int sub = 0; sub < subs; sub++)
        value = fmaf(__shfl_sync(kAllLanes, scale, sub), results[sub * stride + 4 + (i < d16 ? i : 0)], value);
      if (i < d16) attended[i] = value;
    }
    if (lane == 0 && c.parts > 1) merge[0] = most, merge[1] = total;
  }

  template <class Cache>
  __device__ void attend(uint32_t* cache) const {
    remember<Cache>(cache);
    __syncthreads();
    const int subs = c.subs, d16 = c.head_rows, stride = d16 + 4;
    for (int first = heads.first_unit; first < heads.end_unit; first += at.wave) {
      const int units = lesser(heads.end_unit - first, at.wave);
#pragma unroll 1
      for (int task = warp_of(); task < units * subs; task += kWarps) {
        const Quotient unit(task, subs);
        const Quotient head(first + unit.quotient - heads.first * c.parts, c.parts);  // of this block's
        const int begin = c.first_key_block(head.remainder), end = c.first_key_block(head.remainder + 1);
        for (int from = 0; from < d16 / 4; from += 32)  // once, unless a head has more than 128 channels
          attend_some<Cache>(cache, heads.first + head.quotient, begin + unit.remainder, end,
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
  }

  // ---- the parts around attention

  __device__ void find_angles() const {
    const double* turns = reinterpret_cast<const double*>(shared + at.frequency);
    for (int i = thread_of(); i < c.angles(); i += kThreads) {
      const double turn = double(position) * turns[i];
      sincospif(2.0f * float(turn - rint(turn)), floats(at.sin) + i, floats(at.cos) + i);
    }
  }

  // The code of the context network: the rings of its layers move by a step. Each block has some channels of each.
  __device__ void run_context(const uint8_t*& p, int64_t& ring_at) {
    const int rows = c.context_rows();
    const float* table = reinterpret_cast<const float*>(c.pack) + int64_t(c.n_class + c.condition) * c.embd_rows();
    float *vector = floats(at.vector), *taps = floats(at.taps);
    for (int i = thread_of(); i < rows; i += kThreads) vector[i] = __ldg(table + int64_t(code()) * rows + i);
    __syncthreads();
    const Cut cut = share(c.context);
    const int channels = cut.local() * cut.width;
    int d = 1;
#pragma unroll 1
    for (int layer = 0; layer < c.n_width; d *= c.widths[layer++]) {
      const int width = c.widths[layer], length = (width - 1) * d;
      const PackedMatrix m = read_matrix<Dot>(p, layer + 1 < c.n_width ? rows : c.code_rows(), width, c.context);
#pragma unroll 1
      for (int i = thread_of(); i < channels; i += kThreads) {
        const int channel = cut.first * cut.width + i;
        const float x = channel < rows ? vector[channel] : 0.0f;
        float* ring = state + ring_at + channel;
        const int oldest = length > 0 ? ints(at.slots)[layer] : 0;
        for (int tap = 0, from = oldest; tap + 1 < width; tap++) {
          taps[tap * channels + i] = channel < rows ? ring[int64_t(from) * rows] : 0.0f;
          from = from + d < length ? from + d : from + d - length;
        }
        taps[(width - 1) * channels + i] = x;
        if (length > 0 && channel < rows) ring[int64_t(oldest) * rows] = x;
      }
      __syncthreads();
      reduce(m, cut, taps, vector, kRelu);
      ring_at += int64_t(length) * rows;
    }
    const int most = larger(rows, c.code_rows());
    for (int i = c.code_rows() + thread_of(); i < most; i += kThreads) vector[i] = 0.0f;  // of layers before
    __syncthreads();
  }

  // Bias-free projection of the frame that holds the position.
  __device__ void project_condition() const {
    const int64_t frame = frame_of(c, start(), position);
    const float* table = reinterpret_cast<const float*>(c.pack) + int64_t(c.n_class) * c.embd_rows();
    const float* values = c.frames + stream() * c.frames_stride[0] + frame * c.frames_stride[1];
    for (int i = thread_of(); i < c.embd_rows(); i += kThreads) {
      float sum = 0.0f;
      for (int k = 0; k < c.condition; k++)
        sum = fmaf(__ldg(table + int64_t(k) * c.embd_rows() + i), values[k * c.frames_stride[2]], sum);
      floats(at.base)[i] = sum;
    }
  }

  // What the first layer reads.
  __device__ void embed(const uint8_t*& p, int64_t& ring_at) {
    const int rows = c.embd_rows();
    float *x = floats(at.x), *fused = floats(at.fused);
    find_angles();
    if (c.condition && (position == start() || position % c.hop == 0)) project_condition();
    if (c.n_width) {
      run_context(p, ring_at);
      const Cut cut = share(c.code);
      reduce(read_matrix<Dot>(p, c.fuse_rows(), 1, c.code), cut, floats(at.vector) + cut.first * cut.width, fused,
             kSet);
    }
    __syncthreads();
#pragma unroll 1
    for (int i = thread_of(); i < rows; i += kThreads) {
      float value = __ldg(reinterpret_cast<const float*>(c.pack) + int64_t(code()) * rows + i);
      if (c.fusion == kFuseAdd) value += fused[i];
      if (c.fusion == kFuseFilm) value = fmaf(value, fused[i], value) + fused[rows + i];
      if (c.condition) value += floats(at.base)[i];
      if (c.positions == kSinusoidal && i < c.n_embd)
        value += i < c.angles() ? floats(at.sin)[i] : floats(at.cos)[i - c.angles()];
      x[i] = value;
    }
    __syncthreads();
  }

  // Causal Haar pooling: the mean of the last 2^level rows of every channel. Each block has some channels.
  __device__ void pool(int64_t& ring_at) {
    const int groups = c.embd_rows() / 16, each = above(groups, c.blocks);
    const int begin = 16 * lesser(rank * each, groups), end = 16 * lesser((rank + 1) * each, groups);
    float *x = floats(at.x), *partial = floats(at.partial);
    exchange.begin(4 * c.embd_rows(), above(groups, each));
    for (int first = begin; first < end; first += kThreads / kPoolParts) {
      const int here = lesser(end - first, kThreads / kPoolParts), part = thread_of() / here;
      const int channel = first + thread_of() % here;
      int run = 0, behind = channel, level = 0;
      int64_t at_run = 0;
      for (; run < c.n_haar && behind >= c.counts[run]; behind -= c.counts[run++])
        if (c.levels[run]) at_run += int64_t(c.counts[run]) << c.levels[run];
      if (run < c.n_haar) level = c.levels[run];  // beyond the last run: padding
      if (part < kPoolParts && level > 0) {
        float *ring = state + ring_at + at_run + behind, sum = 0.0f;
        const int count = c.counts[run], slots = 1 << level, newest = int(position & (slots - 1));
        for (int s = part; s < slots; s += kPoolParts) sum += s == newest ? x[channel] : ring[int64_t(s) * count];
        if (part == 0) ring[int64_t(newest) * count] = x[channel];
        partial[part * here + channel - first] = sum * (1.0f / float(slots));
      } else if (part < kPoolParts) {
        partial[part * here + channel - first] = part == 0 ? x[channel] : 0.0f;
      }
      __syncthreads();
      if (thread_of() < here) {
        float mean = partial[thread_of()];
        for (int i = 1; i < kPoolParts; i++) mean += partial[i * here + thread_of()];
        exchange.put(first + thread_of(), mean);
      }
      __syncthreads();
    }
    const float* pooled = exchange.finish();
    for (int i = thread_of(); i < c.embd_rows(); i += kThreads) x[i] = pooled[i];
    __syncthreads();
    for (int run = 0; run < c.n_haar; run++)
      if (c.levels[run]) ring_at += int64_t(c.counts[run]) << c.levels[run];
  }

  // Two halves of one form, norm, rows of each block, sum over all blocks: a loop, so that their code exists once.
  __device__ void layer(const uint8_t*& p, int64_t& ring_at) {
    const int embd = c.embd_rows(), head_groups = c.head_rows / 16, inner_rows = rounded(c.n_inner, 16);
    const Cut inner = share(c.n_inner);
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
      const bool mlp = half > 0;
      const PackedMatrix in = read_matrix<Dot>(p, mlp ? inner_rows : 3 * c.heads_rows(), 1, c.n_embd);
      const PackedMatrix out = read_matrix<Dot>(p, embd, 1, mlp ? c.n_inner : c.heads_rows());
      const int first = mlp ? inner.first * inner.width / 16 : heads.first * head_groups;
      const int last = lesser(inner.end * inner.width, inner_rows) / 16;
      const int run = mlp ? last - first : heads.count() * head_groups;  // of q, of k and of v
      float* rows = floats(mlp ? at.inner : at.qkv);
      normalize();
      rows_of(in, floats(at.h), first, mlp ? run : 3 * run, larger(run, 1), c.heads_rows() / 16,
              [&](int i, float v) { rows[i] = mlp ? fmaxf(v, 0.0f) : v; });
      if (!mlp) {
        const int64_t cache = int64_t(c.n_head) * c.capacity() * (c.headdim + c.head_rows);
        if (c.cache == kFloat32)
          attend<DotFloat32>(reinterpret_cast<uint32_t*>(state + ring_at));
        else
          attend<DotBFloat16>(reinterpret_cast<uint32_t*>(state + ring_at));
        ring_at += c.cache == kFloat32 ? cache : cache / 2;
      }
      reduce(out, mlp ? inner : Cut::heads(c, rank), floats(mlp ? at.inner : at.attended), floats(at.x), kAdd,
             !mlp && c.parts > 1 ? floats(at.merge) : nullptr);
    }
    if (c.n_haar) pool(ring_at);
  }

  __device__ void find_logits(const uint8_t*& p) {
    const PackedMatrix out = read_matrix<Dot>(p, c.class_rows(), 1, c.n_embd);
    const int all = out.rows / 16, each = above(all, c.blocks), first = lesser(rank * each, all);
    const int groups = lesser(first + each, all) - first;
    normalize();
    exchange.begin(4 * out.rows, above(all, each));
    rows_of(out, floats(at.h), first, groups, larger(groups, 1), 0,
            [&](int i, float v) { exchange.put(16 * first + i, v); });
    const float* rows = exchange.finish();
    for (int i = thread_of(); i < out.rows; i += kThreads)
      floats(at.logits)[i] = rows[i] + (c.fusion == kFuseLogits ? floats(at.fused)[i] : 0.0f);
    __syncthreads();
  }

  // The code of step t, by the first warp of every block alike.
  __device__ void choose(int64_t t) {
    if (warp_of() == 0) {
      float* logits = floats(at.logits);
      if (c.logits && rank == 0)
        for (int i = lane_of(); i < c.n_class; i += 32) c.logits[(stream() * c.n + t) * c.n_class + i] = logits[i];
      __syncwarp();
      const float u = c.uniforms[stream() * c.uniforms_stride[0] + t * c.uniforms_stride[1]];
      const int chosen = t < c.forced ? forced_code(c, stream(), t) : draw(c, logits, 1, floats(at.partial), u);
      if (lane_of() == 0) {
        code() = chosen;
        if (rank == 0) write_code(c, stream(), t, chosen);
      }
    }
    __syncthreads();
  }

  __device__ void prepare_call() {
    double* turns = reinterpret_cast<double*>(shared + at.frequency);  // of a circle, from position to position
    const double channels = double(c.positions == kRotary ? c.headdim : c.n_embd);
    for (int i = thread_of(); i < c.angles(); i += kThreads)
      turns[i] = pow(10000.0, -2.0 * double(i) / channels) / 6.283185307179586476925;
    const auto clear = [&](int from, int to) {  // padding of slices
      for (int i = from / 4 + thread_of(); i < to / 4; i += kThreads) floats(0)[i] = 0.0f;
    };
    clear(at.attended, at.merge);
    clear(at.inner, at.logits);
    clear(at.vector, at.taps);
    int d = 1;
    for (int layer = 0; layer < c.n_width; d *= c.widths[layer++])
      if (thread_of() == 0)
        ints(at.slots)[layer] = c.widths[layer] > 1 ? int(position % ((c.widths[layer] - 1) * d)) : 0;
    if (thread_of() == 0) code() = int(header_number(state[2], c.n_class));
    exchange.start();
    __syncthreads();
  }

  __device__ void run() {
    prepare_call();
    for (int64_t t = 0; t < c.n; t++) {
      const uint8_t* p = c.pack + c.table_bytes;
      int64_t ring_at = kStateHeader;
      embed(p, ring_at);
#pragma unroll 1
      for (int i = 0; i < c.n_layer; i++) layer(p, ring_at);
      if (c.logits || t >= c.forced) find_logits(p);
      choose(t);
      position++;
      slot = slot + 1 == c.capacity() ? 0 : slot + 1;
      int d = 1;
      for (int i = 0; i < c.n_width; d *= c.widths[i++])
        if (int& at_slot = ints(at.slots)[i]; thread_of() == 0)
          at_slot = at_slot + 1 < (c.widths[i] - 1) * d ? at_slot + 1 : 0;
    }
    exchange.end();
    if (rank == 0 && thread_of() == 0) write_header(state, position, code());
  }
};

template <class Dot>
__global__ void __launch_bounds__(kThreads, 1)
    alone_kernel(const __grid_constant__ TransformerCall c, const __grid_constant__ TransformerPlaces at) {
  Net<Dot, Alone>(c, at).run();
}

template <class Dot>
__global__ void __launch_bounds__(kThreads, 1)
    together_kernel(const __grid_constant__ TransformerCall c, const __grid_constant__ TransformerPlaces at) {
#ifdef AK_CLUSTERS
  Net<Dot, Together>(c, at).run();
#endif
}

using Kernel = void (*)(TransformerCall, TransformerPlaces);

template <class Dot>
Kernel kernel_of(int blocks) {
  return blocks > 1 ? together_kernel<Dot> : alone_kernel<Dot>;
}

cudaError_t configure(Kernel kernel, int blocks, int shared_bytes, cudaLaunchConfig_t* config) {
  cudaError_t error = allow_all_shared(kernel);
  if (error == cudaSuccess && blocks > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  config->blockDim = dim3(kThreads);
  config->dynamicSmemBytes = size_t(shared_bytes);
  config->attrs[0].id = cudaLaunchAttributeClusterDimension;
  config->attrs[0].val.clusterDim.x = unsigned(blocks);
  config->attrs[0].val.clusterDim.y = config->attrs[0].val.clusterDim.z = 1;
  config->numAttrs = blocks > 1 ? 1 : 0;
  return error;
}

}  // namespace

cudaError_t transformer_generate_cuda(const TransformerCall& call, int shared_bytes, cudaStream_t stream) {
  if (call.blocks < 1 || call.blocks > 16) return cudaErrorInvalidValue;
  const TransformerPlaces places(call);
  if (places.bytes > shared_bytes) return cudaErrorInvalidValue;
  const Kernel kernel = call.dtype == kFloat32    ? kernel_of<DotFloat32>(call.blocks)
                        : call.dtype == kBFloat16 ? kernel_of<DotBFloat16>(call.blocks)
                                                  : kernel_of<DotInt8>(call.blocks);
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  config.attrs = &attribute;
  config.stream = stream;
  config.gridDim = dim3(unsigned(call.batch * call.blocks));
  const cudaError_t error = configure(kernel, call.blocks, shared_bytes, &config);
  return error == cudaSuccess ? cudaLaunchKernelEx(&config, kernel, call, places) : error;
}

cudaError_t transformer_clusters_cuda(int blocks, int shared_bytes, int* clusters) {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  config.attrs = &attribute;
  config.gridDim = dim3(unsigned(blocks));
  const Kernel kernel = together_kernel<DotFloat32>;
  if (!has_clusters(kernel)) return cudaErrorInvalidValue;
  const cudaError_t error = configure(kernel, blocks, shared_bytes, &config);
  return error == cudaSuccess ? cudaOccupancyMaxActiveClusters(clusters, kernel, &config) : error;
}

}  // namespace audiokernels
