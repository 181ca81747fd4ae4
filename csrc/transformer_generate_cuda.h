// Transformer generation on a GPU: a call's sizes and pointers, how its work is cut into slices, and the torch-free
// launchers. Packed layout and state are those of audiokernels/transformer_pack.py and transformer_generate.py.
#pragma once

#include "generation_cuda.h"
#include "transformer_generate.h"

namespace audiokernels {

constexpr int kMostWidths = 24, kMostRuns = 128;  // they travel with the launch
constexpr int kSlices = 16;                       // of a sum over inputs, at most
constexpr int kChunkRows = 512;                   // whose sums a block on its own keeps at a time
constexpr int kWaveFloats = 8192;                 // of the states of attention that are kept at a time
constexpr int kTransformerThreads = 512;
constexpr int kSubs = 8;        // lanes that share the inputs of 16 rows, four rows each
constexpr int kInputParts = 4;  // warps that share the inputs of 16 rows

__host__ __device__ constexpr int rounded(int n, int to) { return (n + to - 1) / to * to; }
__host__ __device__ constexpr int above(int n, int by) { return (n + by - 1) / by; }  // n / by, rounded up
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int lesser(int a, int b) { return a < b ? a : b; }

// How the inputs of a product are cut: `count` slices of `width` inputs, whose sums are added in order, `each` of them
// to a block, so that `senders` blocks have some. `repeat` neighbours have the same inputs: parts of a head's keys.
struct Slices {
  int width, count, each, senders, repeat;

  static constexpr Slices share(int width, int count, int repeat, int blocks) {
    const int each = above(count, blocks);
    return {width, count, each, above(count, each), repeat};
  }
  // A vector of n numbers.
  static constexpr Slices of(int n, int blocks) {
    const int width = rounded(above(n, kSlices), 16);
    return share(width, above(n, width), 1, blocks);
  }
};

// A division takes a thread some 100 cycles: what follows from the sizes is found once, on the host.
struct TransformerCall : CudaCall {
  int dtype, cache, n_layer, n_head, n_embd, n_inner, window, positions, fusion, context, code, condition;
  int n_width, n_haar;
  bool aligned;  // keys and values to 16 bytes, in every row of the state
  int blocks;    // of a stream
  int resident;  // weights that a block keeps its part of: 0 none, 1 + n those of the output and of the first n layers
  int staged;    // what is copied to shared memory before a layer needs it: 0 nothing, 1 its keys, 2 its values too
  int32_t widths[kMostWidths];
  int32_t levels[kMostRuns], counts[kMostRuns];  // of the pooling

  // What follows from these, see finish.
  int headdim, head_rows, parts, heads_of_slice, subs;
  Slices attended, inner, context_slices, code_slices, class_groups, embd_groups;  // the last two: groups of 16 rows
  int input_parts, input_steps;      // warps that share the inputs of rows of x, and steps of each
  int first_key_block[kSlices + 1];  // of each part of a head
  float inverse_embd;                // 1 / n_embd
  int key_words, value_words;        // 32-bit ones, of a block of keys of a head
  int64_t first_ring, layer_floats;  // of a stream's state: where the layers' begin, and what each takes

  __host__ __device__ int heads_rows() const { return n_head * head_rows; }
  __host__ __device__ int embd_rows() const { return rounded(n_embd, 16); }
  __host__ __device__ int class_rows() const { return rounded(n_class, 16); }
  __host__ __device__ int context_rows() const { return rounded(context, 16); }
  __host__ __device__ int code_rows() const { return rounded(code, 16); }
  __host__ __device__ int capacity() const { return rounded(window, int(kKeyBlock)); }
  __host__ __device__ int key_blocks() const { return above(window, int(kKeyBlock)); }
  __host__ __device__ int angles() const { return (positions == kRotary ? headdim : n_embd + 1) / 2; }
  __host__ __device__ int fuse_rows() const {
    return fusion == kFuseLogits ? class_rows() : fusion == kFuseAdd ? embd_rows() : n_width ? 2 * embd_rows() : 0;
  }
  __host__ __device__ int units() const { return n_head * parts; }  // a head with a part of its keys

  // Once the sizes and the blocks are known. Heads and their keys are cut alike for every batch and number of blocks: a
  // few heads with all their keys are a slice, or, where there are few heads, one head with a part of them.
  void finish() {
    headdim = n_embd / n_head, head_rows = rounded(headdim, 16), inverse_embd = 1.0f / float(n_embd);
    parts = n_head < kSlices ? lesser(kSlices / n_head, key_blocks()) : 1;
    for (int part = 0; part <= parts; part++) first_key_block[part] = above(part * key_blocks(), parts);
    heads_of_slice = above(n_head, kSlices);
    attended = Slices::share(heads_of_slice * head_rows, above(n_head, heads_of_slice) * parts, parts, blocks);
    inner = Slices::of(n_inner, blocks);
    if (n_width) context_slices = Slices::of(context, blocks), code_slices = Slices::of(code, blocks);
    class_groups = Slices::share(16, class_rows() / 16, 1, blocks);
    embd_groups = Slices::share(16, embd_rows() / 16, 1, blocks);
    const int steps = above(n_embd, dtype == kFloat32 ? 1 : dtype == kBFloat16 ? 2 : 4);
    input_parts = lesser(kInputParts, above(steps, kSubs)), input_steps = above(steps, input_parts);
    subs = lesser(16, above(key_blocks(), parts));  // warps that share a unit
    key_words = int(kKeyBlock) * headdim / (cache == kFloat32 ? 1 : 2);
    value_words = int(kKeyBlock) * head_rows / (cache == kFloat32 ? 1 : 2);
    first_ring = kStateHeader;
    int64_t dilation = 1;
    for (int i = 0; i < n_width; dilation *= widths[i++]) first_ring += (widths[i] - 1) * dilation * context_rows();
    layer_floats = ring_floats();
    for (int i = 0; i < n_haar; i++)
      if (levels[i]) layer_floats += int64_t(counts[i]) << levels[i];
  }
  __host__ __device__ int64_t ring_floats() const {  // keys and values of a layer
    return int64_t(n_head) * key_blocks() * (key_words + value_words);
  }
};

// A block's slices: first .. end - 1.
struct Cut : Slices {
  int first, end;

  __host__ __device__ Cut(const Slices& slices, int rank)
      : Slices(slices), first(lesser(rank * each, count)), end(lesser(first + each, count)) {}
  __host__ __device__ int local() const { return end - first; }
};

// What a block has of the heads.
struct Heads {
  int first_unit, end_unit, first, end;  // units, and the heads that they are of

  __host__ __device__ Heads(const TransformerCall& c, int rank) {
    const Cut cut(c.attended, rank);
    first_unit = lesser(cut.first * c.heads_of_slice, c.units());
    end_unit = lesser(cut.end * c.heads_of_slice, c.units());
    first = first_unit / c.parts;
    end = end_unit > first_unit ? (end_unit - 1) / c.parts + 1 : first;
  }
  __host__ __device__ int units() const { return end_unit - first_unit; }
  __host__ __device__ int count() const { return end - first; }
  // Blocks of keys, of all heads one after the other.
  __host__ __device__ int first_key(const TransformerCall& c) const {
    return first * c.key_blocks() + c.first_key_block[first_unit - first * c.parts];
  }
  __host__ __device__ int key_count(const TransformerCall& c) const {
    const int last = end - 1;
    if (units() == 0) return 0;
    return last * c.key_blocks() + c.first_key_block[end_unit - last * c.parts] - first_key(c);
  }
};

// Bytes that so many rows and inputs of a matrix take in shared memory.
__host__ __device__ constexpr int part_bytes(int dtype, int rows, int inputs) {
  const int group = dtype == kFloat32 ? 1 : dtype == kBFloat16 ? 2 : 4;
  return 4 * rows * (1 + (dtype == kInt8) + above(inputs, group));
}

// Byte offsets into shared memory, the same in every block of a stream. audiokernels/transformer_plan.py knows the sum.
struct TransformerPlaces {
  int frequency, cos, sin, x, h, base, qkv, attended, merge, inner, logits, fused, vector, taps, partial, states,
      weights, packed, scales, slots, code, norm, bars, buffer, resident, keys, values;
  int bytes;
  int buffer_rows, buffer_floats, wave;  // wave: units of attention at a time

  __host__ __device__ explicit TransformerPlaces(const TransformerCall& c) {
    const int embd = c.embd_rows(), head = c.head_rows, slice = c.heads_of_slice * head, blocks = c.blocks;
    int heads = 0, units = 0, key_blocks = 0;
    for (int rank = 0; rank < blocks; rank++) {
      const Heads mine(c, rank);
      heads = larger(heads, mine.count()), units = larger(units, mine.units());
      key_blocks = larger(key_blocks, mine.key_count(c));
    }
    int width = c.n_width ? 1 : 0;
    for (int i = 0; i < c.n_width; i++) width = larger(width, c.widths[i]);
    const int inner_rows = c.inner.each * c.inner.width, attended_rows = c.attended.each * slice;
    const int taps_rows = width * c.context_slices.each * c.context_slices.width;
    const int vector_rows = c.n_width ? larger(c.context_rows(), rounded(c.code, 16 * kSlices)) : 0;  // whole slices
    const int class_rows = 16 * c.class_groups.each;
    const int rows = larger(larger(3 * heads * head, inner_rows), class_rows);
    const int inputs = larger(larger(embd, attended_rows), larger(inner_rows, larger(taps_rows, vector_rows)));
    const int all_rows = larger(larger(embd, c.fuse_rows()), larger(c.context_rows(), c.code_rows()));
    buffer_rows = blocks > 1 ? all_rows : lesser(all_rows, kChunkRows);
    buffer_floats = rounded(larger(kSlices * buffer_rows + 2 * kSlices, blocks > 1 ? c.class_rows() : 0), 4) + 4;
    wave = larger(1, lesser(units, kWaveFloats / (c.subs * (head + 4))));
    int at = 0;
    const auto take = [&](int n) {
      const int offset = at;
      at += rounded(n, 16);
      return offset;
    };
    frequency = take(8 * c.angles()), cos = take(4 * c.angles()), sin = take(4 * c.angles());
    x = take(4 * embd), h = take(4 * embd), base = take(c.condition ? 4 * embd : 0);
    qkv = take(4 * 3 * heads * head), attended = take(4 * attended_rows), merge = take(8 * c.attended.each);
    inner = take(4 * inner_rows), logits = take(4 * c.class_rows()), fused = take(4 * c.fuse_rows());
    vector = take(4 * vector_rows), taps = take(4 * taps_rows);
    partial = take(4 * larger(larger(4 * lesser(rows, 1024), kTransformerThreads), c.class_rows() / 16));
    states = take(4 * wave * c.subs * (head + 4)), weights = take(4 * kTransformerThreads / 32 * int(kKeyBlock));
    packed = take(c.dtype == kInt8 ? inputs : 0), scales = take(c.dtype == kInt8 ? 4 * kSlices * larger(width, 1) : 0);
    slots = take(4 * c.n_width), code = take(4), norm = take(4), bars = take(24);
    buffer = take(4 * buffer_floats * (blocks > 1 ? 2 : 1));
    resident = take(0);
    if (c.resident > 0)
      take(part_bytes(c.dtype, class_rows, c.n_embd) +
           (c.resident - 1) *
               (part_bytes(c.dtype, 3 * heads * head, c.n_embd) + part_bytes(c.dtype, embd, heads * head) +
                part_bytes(c.dtype, inner_rows, c.n_embd) + part_bytes(c.dtype, embd, inner_rows)));
    keys = take(c.staged > 0 ? 4 * key_blocks * c.key_words : 0);
    values = take(c.staged > 1 ? 4 * key_blocks * c.value_words : 0);
    bytes = at;
  }
};

// All samples of every stream: a block, or a cluster of call.blocks blocks, a stream.
cudaError_t transformer_generate_cuda(const TransformerCall& call, int shared_bytes, cudaStream_t stream);
// How many clusters of that size may be resident on the current device at once.
cudaError_t transformer_clusters_cuda(int blocks, int shared_bytes, int* clusters);

}  // namespace audiokernels
