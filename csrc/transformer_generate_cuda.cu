// Transformer generation on a GPU: one launch draws all samples, a block of threads a stream, or from compute
// capability 9.0 on a cluster of blocks a stream. Compiled, and run on the host by the tests; not yet run on a GPU.
//
// The blocks of a stream all know x, the centred x, the logits and the code. Each has some heads, or a part of one
// head's keys, some rows of the MLP and of the output, and what the state remembers of them: what a block writes into
// the state no other block reads. Products that follow (proj, down, the context network) multiply a slice of their
// inputs in each block; the slices' sums go to all blocks, which add them in order: one exchange after attention, one
// after the MLP. Slices are the same for every number of blocks, and so are the codes.
//
// A step is a chain of latencies, one stream's rows are few: what does not depend on the last sample is out of it. Keys
// are copied to shared memory a layer ahead, weights lie there from the start, as far as there is room.
#include "transformer_attention.h"
#include "transformer_exchange.h"
#include "transformer_resident.h"

namespace audiokernels {
namespace {

constexpr int kPassGroups = 64;    // of 16 rows
constexpr int kPoolParts = 8;      // threads that share the past rows of a channel
constexpr float kEpsilon = 1e-5f;  // of the norms

enum Finish { kSet, kAdd, kRelu };

template <class Dot, class Exchange>
struct Net : Attention {
  using In = typename Dot::In;
  using Sum = typename Dot::Sum;
  static constexpr int kWords = Dot::kByTap ? 1 : Dot::kGroup;  // of a vector a step

  Exchange exchange;

  __device__ Net(const TransformerCall& call, const TransformerPlaces& places)
      : Attention(call, places, Exchange::rank()), exchange(call, places, shared) {}

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
      const uint4 w = lanes[int64_t(s) * row_quads + quad];  // of the pack, or in shared memory
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

  // put(i, sum + bias) for row i of the operand times the normalised x. Ends synchronised.
  template <class Put>
  __device__ void rows_of(const Operand& m, Put put) const {
    center();
    const In* inputs = prepare(floats(at.h), 1, c.embd_rows());
    if (warp_of() == kWarps - 1) find_scale();  // it has the fewest tasks
    const int parts = c.input_parts, each = c.input_steps;
    Sum* partial = reinterpret_cast<Sum*>(shared + at.partial);
    for (int pass = 0; pass < m.groups; pass += kPassGroups) {
      const int here = lesser(m.groups - pass, kPassGroups);
#pragma unroll 1
      for (int task = warp_of(); task < here * parts; task += kWarps) {
        const Quotient which(task, here);
        const int group = which.remainder, part = which.quotient, begin = part * each;
        Sum sums[4] = {};
        sum_group(sums, m.lanes, m.rows / 4, m.group_of(pass + group), begin, lesser(begin + each, m.steps),
                  inputs + begin * kWords);
        add_lanes(sums);
        if (lane_of() < 4)
          for (int i = 0; i < 4; i++) partial[(part * here + group) * 16 + 4 * lane_of() + i] = sums[i];
      }
      const auto row_of = [&](int i) { return 16 * m.group_of(pass + i / 16) + i % 16; };
      const float first_bias = m.bias[row_of(lesser(thread_of(), 16 * here - 1))];
      __syncthreads();
#pragma unroll 1
      for (int i = thread_of(); i < 16 * here; i += kThreads) {
        const int row = row_of(i);
        const float bias = i < kThreads ? first_bias : m.bias[row];
        Sum sum = partial[i];
        for (int part = 1; part < parts; part++) sum += partial[part * here * 16 + i];
        if constexpr (Dot::kByTap)
          put(16 * pass + i, fmaf(float(sum), m.scale[row] * (floats(at.scales)[0] * floats(at.norm)[0]), bias));
        else
          put(16 * pass + i, fmaf(sum, floats(at.norm)[0], bias));
      }
      __syncthreads();
    }
  }

  // Four rows of a slice: its taps' inputs are `width` numbers each, slice `local` of this block's.
  __device__ float4 slice_sum(const Operand& m, const Cut& cut, int local, int group, const In* in) const {
    const int begin = Quotient(cut.first + local, cut.repeat).quotient * (cut.width / Dot::kGroup) - m.skipped;
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
          total[i] = fmaf(float(sums[i]), m.scale[tap * m.rows + row] * scale, total[i]);
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
    const Quotient which(lane, cut.repeat);
    const float* head = merge + 2 * (lane - which.remainder);
    float most = -INFINITY, total = 0.0f, mine = 0.0f;
    for (int part = 0; part < cut.repeat; part++) most = fmaxf(most, head[2 * part]);
    for (int part = 0; part < cut.repeat; part++) {
      const float sum = head[2 * part + 1], weight = sum > 0.0f ? sum * weight_of(head[2 * part] - most) : 0.0f;
      total += weight;
      if (part == which.remainder) mine = weight;
    }
    return total > 0.0f ? mine / total : 0.0f;
  }

  // to = matrix * in + bias in every block, of which each has its slices of `in`. merge: null, or the largest score and
  // the sum of weights of each of this block's slices, parts of heads that are merged. Ends synchronised.
  __device__ void reduce(const Operand& m, const Cut& cut, const float* in, float* to, Finish finish,
                         const float* merge = nullptr) {
    const In* inputs = prepare(in, m.taps * cut.local(), cut.width);
    for (int first = 0; first < m.rows; first += at.buffer_rows) {
      const int rows = lesser(m.rows - first, at.buffer_rows), groups = rows / 16, behind = cut.count * rows;
      exchange.begin(4 * behind + (merge ? 8 * cut.count : 0), cut.senders);
#pragma unroll 1
      for (int task = warp_of(); task < groups * cut.local(); task += kWarps) {
        const Quotient which(task, groups);
        const int group = which.remainder, local = which.quotient;
        const float4 sums = slice_sum(m, cut, local, first / 16 + group, inputs);
        exchange.put_four((cut.first + local) * rows + 16 * group + 4 * (lane_of() % 4), sums, lane_of() / 4);
      }
      if (merge && thread_of() < 2 * cut.local())
        exchange.put(behind + 2 * cut.first + thread_of(), merge[thread_of()]);
      const float first_bias = m.bias[first + lesser(thread_of(), rows - 1)];  // on its way while others send
      const float* sums = exchange.finish();
      const float share = merge ? part_share(sums + behind, cut) : 1.0f;
#pragma unroll 1
      for (int i = thread_of(); i < rounded(rows, 32); i += kThreads) {  // whole warps
        const int row = first + (i < rows ? i : 0);
        float total = (i < kThreads ? first_bias : m.bias[row]) + (finish == kAdd ? to[row] : 0.0f);
#pragma unroll 8
        for (int s = 0; s < cut.count; s++)
          total = fmaf(__shfl_sync(kAllLanes, share, s), sums[s * rows + (i < rows ? i : 0)], total);
        if (i < rows) to[row] = finish == kRelu ? fmaxf(total, 0.0f) : total;
      }
      __syncthreads();
    }
  }

  // x centred into h. What makes its variance 1 is found beside the product with h, and multiplied into its sums; the
  // affine part is in the matrix. Each warp finds the mean for itself.
  __device__ void center() const {
    const float* x = floats(at.x);
    float sum = 0.0f;
    for (int i = lane_of(); i < c.n_embd; i += 32) sum += x[i];
    const float mean = warp_sum(sum) * c.inverse_embd;
    for (int i = thread_of(); i < c.embd_rows(); i += kThreads) floats(at.h)[i] = i < c.n_embd ? x[i] - mean : 0.0f;
    __syncthreads();
  }
  __device__ void find_scale() const {  // by a warp
    const float* h = floats(at.h);
    float squares = 0.0f;
    for (int i = lane_of(); i < c.n_embd; i += 32) squares = fmaf(h[i], h[i], squares);
    squares = warp_sum(squares) * c.inverse_embd;
    if (lane_of() == 0) floats(at.norm)[0] = 1.0f / sqrtf(squares + kEpsilon);
  }

  // ---- the parts around attention

  // Of a position, by the threads from `first` on.
  __device__ void find_angles(int64_t of, int first) const {
    const double* turns = reinterpret_cast<const double*>(shared + at.frequency);
    for (int i = thread_of() - first; i < c.angles(); i += kThreads - first) {
      const double turn = double(of) * turns[i];
      sincospif(2.0f * float(turn - rint(turn)), floats(at.sin) + i, floats(at.cos) + i);
    }
  }

  // The matrix of a layer of the context network.
  __device__ PackedMatrix context_matrix(const uint8_t*& p, int layer) const {
    const int rows = layer + 1 < c.n_width ? c.context_rows() : c.code_rows();
    return read_matrix<Dot>(p, rows, c.widths[layer], c.context);
  }
  // That of its code's way into the network.
  __device__ PackedMatrix fuse_matrix(const uint8_t*& p) const { return read_matrix<Dot>(p, c.fuse_rows(), 1, c.code); }

  // The code of the context network: the rings of its layers move by a step. Each block has some channels of each.
  __device__ void run_context(const uint8_t*& p) {
    const int rows = c.context_rows();
    const float* table = reinterpret_cast<const float*>(c.pack) + int64_t(c.n_class + c.condition) * c.embd_rows();
    float *vector = floats(at.vector), *taps = floats(at.taps);
    for (int i = thread_of(); i < rows; i += kThreads) vector[i] = __ldg(table + int64_t(code()) * rows + i);
    __syncthreads();
    const Cut cut = share(c.context_slices);
    const int channels = cut.local() * cut.width;
    int64_t ring_at = kStateHeader;
    int d = 1;
#pragma unroll 1
    for (int layer = 0; layer < c.n_width; d *= c.widths[layer++]) {
      const int width = c.widths[layer], length = (width - 1) * d;
      const PackedMatrix m = context_matrix(p, layer);
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
      reduce(all_rows(m), cut, taps, vector, kRelu);
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
  __device__ void embed(const uint8_t*& p) {
    const int rows = c.embd_rows();
    float *x = floats(at.x), *fused = floats(at.fused);
    if (c.condition && (position == start() || position % c.hop == 0)) project_condition();
    if (c.n_width) {
      run_context(p);
      const Cut cut = share(c.code_slices);
      reduce(all_rows(fuse_matrix(p)), cut, floats(at.vector) + cut.first * cut.width, fused, kSet);
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
  __device__ void pool(int64_t ring_at) {
    const Cut groups = share(c.embd_groups);
    const int begin = 16 * groups.first, end = 16 * groups.end;
    float *x = floats(at.x), *partial = floats(at.partial);
    exchange.begin(4 * c.embd_rows(), groups.senders);
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
  }

  // ---- a layer has two halves of one form: norm, rows of each block, sum over all blocks

  struct Half {
    Operand in, out;
  };

  // Of the pack: q, k and v and what follows attention, or the two of the MLP.
  __device__ Half half_of(bool mlp, const uint8_t*& p) const {
    const int inner_rows = rounded(c.n_inner, 16), head_groups = c.head_rows / 16;
    const Cut inner = share(c.inner);
    const PackedMatrix in = read_matrix<Dot>(p, mlp ? inner_rows : 3 * c.heads_rows(), 1, c.n_embd);
    const PackedMatrix out = read_matrix<Dot>(p, c.embd_rows(), 1, mlp ? c.n_inner : c.heads_rows());
    const int first = mlp ? inner.first * inner.width / 16 : heads.first * head_groups;
    const int last = lesser(inner.end * inner.width, inner_rows) / 16;
    const int run = mlp ? larger(last - first, 0) : heads.count() * head_groups;  // of q, of k and of v
    return {{in, first, mlp ? run : 3 * run, larger(run, 1), c.heads_rows() / 16, 0}, all_rows(out)};
  }
  // The block's part of it in shared memory, from `to` on.
  __device__ Half resident_half(bool mlp, const Half& whole, char*& to) const {
    const Cut inner = share(c.inner);
    const int first = (mlp ? inner.first * inner.width : heads.first * c.head_rows) / Dot::kGroup;
    const int end = (mlp ? inner.end * inner.width : heads.end * c.head_rows) / Dot::kGroup;
    const Operand in = resident_part<Dot>(whole.in, 0, whole.in.steps, to);
    return {in, resident_part<Dot>(whole.out, first, larger(lesser(end, whole.out.steps) - first, 0), to)};
  }
  // The output's rows of this block.
  __device__ Operand output_of(const uint8_t* p) const {
    const Cut groups = share(c.class_groups);
    const PackedMatrix m = read_matrix<Dot>(p, c.class_rows(), 1, c.n_embd);
    return {m, groups.first, groups.local(), larger(groups.local(), 1), 0, 0};
  }

  __device__ void load_weights() const {
    if (c.resident == 0) return;
    const uint8_t* p = c.pack + c.table_bytes;
    char* to = shared + at.resident;
    for (int layer = 0; layer < c.n_width; layer++) context_matrix(p, layer);
    if (c.n_width) fuse_matrix(p);
#pragma unroll 1
    for (int i = 0; i < 2 * c.n_layer; i++) {
      const Half whole = half_of(i % 2, p);
      if (i / 2 >= c.resident - 1) continue;
      const Half part = resident_half(i % 2, whole, to);
      load_part<Dot>(whole.in, part.in);
      load_part<Dot>(whole.out, part.out);
    }
    const Operand out = output_of(p);
    load_part<Dot>(out, resident_part<Dot>(out, 0, out.steps, to));
  }

  // p: the layer in the pack, `to` in shared memory; `next` attends after it, or -1: none does. A loop over the halves,
  // so that their code exists once.
  __device__ void layer(int i, int next, const uint8_t*& p, char*& to) {
#pragma unroll 1
    for (int n = 0; n < 2; n++) {
      const bool mlp = n > 0;
      Half half = half_of(mlp, p);
      if (i < c.resident - 1) half = resident_half(mlp, half, to);
      float* rows = floats(mlp ? at.inner : at.qkv);
      rows_of(half.in, [&](int i, float v) { rows[i] = mlp ? fmaxf(v, 0.0f) : v; });
      if (!mlp) {
        if (c.cache == kFloat32)
          attend<DotFloat32>(i);
        else
          attend<DotBFloat16>(i);
      }
      reduce(half.out, share(mlp ? c.inner : c.attended), floats(mlp ? at.inner : at.attended), floats(at.x), kAdd,
             !mlp && c.parts > 1 ? floats(at.merge) : nullptr);
      if (!mlp && next >= 0) stage(next);
    }
    if (c.n_haar) pool(c.first_ring + i * c.layer_floats + c.ring_floats());
  }

  __device__ void find_logits(const uint8_t* p, char* to) {
    Operand out = output_of(p);
    const int first = 16 * out.first;
    if (c.resident > 0) out = resident_part<Dot>(out, 0, out.steps, to);
    exchange.begin(4 * c.class_rows(), c.class_groups.senders);
    rows_of(out, [&](int i, float v) { exchange.put(first + i, v); });
    const float* rows = exchange.finish();
    for (int i = thread_of(); i < c.class_rows(); i += kThreads)
      floats(at.logits)[i] = rows[i] + (c.fusion == kFuseLogits ? floats(at.fused)[i] : 0.0f);
    __syncthreads();
  }

  // The code of step t, by the first warp of every block alike; the next position's angles by the others.
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
    } else {
      find_angles(position + 1, 32);
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
    load_weights();
    start_staging();
    exchange.start();
    __syncthreads();
    find_angles(position, 0);
    stage(0);
  }

  __device__ void run() {
    prepare_call();
    for (int64_t t = 0; t < c.n; t++) {
      const uint8_t* p = c.pack + c.table_bytes;
      char* to = shared + at.resident;
      embed(p);
#pragma unroll 1
      for (int i = 0; i < c.n_layer; i++) layer(i, i + 1 < c.n_layer ? i + 1 : t + 1 < c.n ? 0 : -1, p, to);
      if (c.logits || t >= c.forced) find_logits(p, to);
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
  const bool kept = call.resident >= 0 && call.resident <= call.n_layer + 1 && call.staged >= 0 && call.staged <= 2;
  if (call.blocks < 1 || call.blocks > 16 || !kept || (call.blocks == 1 && call.staged)) return cudaErrorInvalidValue;
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
