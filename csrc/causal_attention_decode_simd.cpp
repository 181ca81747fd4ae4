// Causal attention of a few new queries against a ring of keys and values, compiled once per instruction set.
//
// Few queries do not fill the lanes: the channels lie in them. All queries of a kv head meet its keys a chunk at a
// time, so that a chunk is read from memory once.
#include "causal_attention_tile.h"

namespace audiokernels {
namespace AUDIOKERNELS_ISA {
namespace {

constexpr int64_t kChunk = kAttentionDecodeKeys;
static_assert(kChunk % kLanes == 0);

constexpr float kHeadroom = 16.0f;  // a score may exceed the reference by that much

// A query, scaled, and its running softmax, in powers of 2.
struct Query {
  float *q, *sums;  // (channels)
  float* total;     // (kLanes)
  float* reference;
};

// How numbers of a dtype become vectors.
struct Float32 {
  typedef float Number;
  AK_INLINE VFloat vector(const Number* p) { return load(p); }
};
struct Bfloat16 {
  typedef uint16_t Number;
  AK_INLINE VFloat vector(const Number* p) { return load_bfloat16(p); }
};

// Consecutive positions that lie in consecutive slots, as rows.
struct Chunk {
  int64_t position, count;
  const void *k, *v;
  int64_t k_stride, v_stride;
};

static Query query_of(float* queries, int64_t i, int64_t channels) {
  float* p = queries + i * (2 * channels + 32);
  return {p, p + channels, p + 2 * channels, p + 2 * channels + 16};
}

// block(i, head, step) for the queries i of a kv head.
template <class Block>
AK_INLINE void for_each_query(const AttentionDecode& call, int64_t kv_head, Block block) {
  int64_t i = 0;
  for (int64_t head = kv_head * call.group; head < (kv_head + 1) * call.group; head++)
    for (int64_t step = 0; step < call.seqlen_q; step++) block(i++, head, step);
}

// Rows of a cache, in place where that will do.
static const void* chunk_rows(const AttentionDecode& call, const AttentionTensor& t, bool in_place, const Place& at,
                              float* memory, int64_t* stride) {
  if (in_place) {
    *stride = t.stride[2];
    return address(t, call.dtype, at);
  }
  *stride = panel_channels(call.headdim);
  read_rows(t, call.dtype, at, call.headdim, *stride, memory);
  return memory;
}

template <int step>
AK_INLINE void add_pairs(VFloat (&v)[kLanes]) {  // one step of a transposition whose rows are summed
  VInt low{}, high{};
  for (int i = 0; i < kLanes; i++) {
    low[i] = i & step ? kLanes + i - step : i;
    high[i] = i & step ? kLanes + i : i + step;
  }
  for (int r = 0; r < kLanes; r += 2 * step)
    v[r] = __builtin_shuffle(v[r], v[r + step], low) + __builtin_shuffle(v[r], v[r + step], high);
}
// Lane i: the sum of v[i].
AK_INLINE VFloat sums_of(VFloat (&v)[kLanes]) {
  add_pairs<1>(v);
  add_pairs<2>(v);
  if constexpr (kLanes >= 8) add_pairs<4>(v);
  if constexpr (kLanes >= 16) add_pairs<8>(v);
  return v[0];
}

// q . rows[i] for kLanes rows; beyond the last one, that once more.
template <class From, bool whole>
AK_INLINE VFloat row_scores(const float* q, const typename From::Number* rows, int64_t stride, int64_t last,
                            int64_t channels) {
  VFloat products[kLanes] = {};
  for (int64_t d = 0; d < channels; d += kLanes) {
    const VFloat lanes = load(q + d);
    for (int i = 0; i < kLanes; i++) {
      const auto* row = rows + (whole ? i : least(i, last)) * stride;
      products[i] = multiply_add(lanes, From::vector(row + d), products[i]);
    }
  }
  return sums_of(products);
}

// scores[j] = q . rows[j] for j < count; minus infinity up to the next multiple of kLanes.
template <class From>
static void scores_of(const float* q, const typename From::Number* rows, int64_t stride, int64_t count,
                      int64_t channels, float* scores) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes)
    store(scores + j, row_scores<From, true>(q, rows + j * stride, stride, 0, channels));
  if (j < count) {
    const VFloat sums = row_scores<From, false>(q, rows + j * stride, stride, count - 1 - j, channels);
    store(scores + j, select(lane_numbers() < splat_int(int32_t(count - j)), sums, splat(-kInfinity)));
  }
}

template <VFloat (*combine)(VFloat, VFloat)>
AK_INLINE float fold(VFloat v) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    VInt other{};
    for (int i = 0; i < kLanes; i++) other[i] = i ^ half;
    v = combine(v, __builtin_shuffle(v, other));
  }
  return v[0];
}
AK_INLINE VFloat plus(VFloat a, VFloat b) { return a + b; }

static void move_reference(const Query& query, VFloat top, int64_t channels) {
  const float largest = fold<max>(top), reference = largest > -kInfinity ? largest : 0.0f;
  VFloat factor[1] = {splat(*query.reference - reference)};
  exp2_of(factor);
  for (int64_t d = 0; d < channels; d += kLanes) store(query.sums + d, load(query.sums + d) * factor[0]);
  store(query.total, load(query.total) * factor[0]);
  *query.reference = reference;
}

// scores -> weights, up to the next multiple of kLanes.
static void softmax_step(const Query& query, int64_t count, int64_t channels, float* scores) {
  constexpr int kStep = kChunk / kLanes < 4 ? kChunk / kLanes : 4;
  VFloat top = splat(-kInfinity);
  for (int64_t j = 0; j < count; j += kLanes) top = max(load(scores + j), top);
  if (any(top > splat(*query.reference + kHeadroom))) move_reference(query, top, channels);
  const VFloat reference = splat(*query.reference);
  VFloat total = load(query.total);
  for (int64_t j = 0; j < count; j += kStep * kLanes) {  // what lies beyond count is not used
    VFloat weights[kStep];
    for (int i = 0; i < kStep; i++) weights[i] = load(scores + j + i * kLanes) - reference;
    exp2_of(weights);
    for (int i = 0; i < kStep; i++) {
      store(scores + j + i * kLanes, weights[i]);
      if (j + i * kLanes < count) total += weights[i];
    }
  }
  store(query.total, total);
}

template <class From>
static void add_values(const float* weights, const typename From::Number* rows, int64_t stride, int64_t count,
                       int64_t channels, float* sums) {
  for (int64_t d = 0; d < channels; d += kLanes) {
    VFloat sum[4] = {};
    const auto* p = rows + d;
    int64_t j = 0;
    for (; j + 4 <= count; j += 4, p += 4 * stride)
      for (int i = 0; i < 4; i++) sum[i] = multiply_add(splat(weights[j + i]), From::vector(p + i * stride), sum[i]);
    for (; j < count; j++, p += stride) sum[0] = multiply_add(splat(weights[j]), From::vector(p), sum[0]);
    store(sums + d, load(sums + d) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
  }
}

// The keys of a chunk that the query at position `own` sees.
template <class From>
static void add_chunk(const Chunk& chunk, const Query& query, int64_t own, int64_t window, int64_t channels,
                      float* scores) {
  const int64_t first = most(own - window + 1 - chunk.position, 0), end = least(own + 1 - chunk.position, chunk.count);
  if (first >= end) return;
  const auto *k = static_cast<const typename From::Number*>(chunk.k) + first * chunk.k_stride,
             *v = static_cast<const typename From::Number*>(chunk.v) + first * chunk.v_stride;
  scores_of<From>(query.q, k, chunk.k_stride, end - first, channels, scores);
  softmax_step(query, end - first, channels, scores);
  add_values<From>(scores, v, chunk.v_stride, end - first, channels, query.sums);
}

static void decode_unit(const AttentionDecode& call, int64_t b, int64_t kv_head, float* scratch) {
  const int64_t channels = panel_channels(call.headdim), m = call.seqlen_q;
  const int64_t before = call.cache_seqlens[b * call.cache_seqlens_stride];
  float* scores = scratch;
  float* k_memory = scores + kChunk;
  float* v_memory = k_memory + kChunk * channels;
  float* queries = v_memory + kChunk * channels;
  const VFloat scale = splat(call.factor());
  const bool bfloat16 = call.dtype == Dtype::bfloat16;
  const bool in_place = (bfloat16 || call.dtype == Dtype::float32) && call.headdim % kLanes == 0 &&
                        call.k_cache.stride[3] == 1 && call.v_cache.stride[3] == 1;
  const auto add = in_place && bfloat16 ? &add_chunk<Bfloat16> : &add_chunk<Float32>;
  for_each_query(call, kv_head, [&](int64_t i, int64_t head, int64_t step) {
    const Query query = query_of(queries, i, channels);
    read_rows(call.q, call.dtype, {b, head, step, 1}, call.headdim, channels, query.q);
    for (int64_t d = 0; d < channels; d += kLanes) {
      store(query.q + d, load(query.q + d) * scale);
      store(query.sums + d, VFloat{});
    }
    store(query.total, VFloat{});
    *query.reference = -kInfinity;
  });
  int64_t position = most(before - call.window + 1, 0);
  int64_t slot = position < call.seqlen_k ? position : position % call.seqlen_k;  // a division takes as long as a score
  while (position < before + m) {
    Chunk chunk{position, least(least(kChunk, before + m - position), call.seqlen_k - slot), nullptr, nullptr, 0, 0};
    const Place at{b, kv_head, slot, chunk.count};
    chunk.k = chunk_rows(call, call.k_cache, in_place, at, k_memory, &chunk.k_stride);
    chunk.v = chunk_rows(call, call.v_cache, in_place, at, v_memory, &chunk.v_stride);
    for_each_query(call, kv_head, [&](int64_t i, int64_t, int64_t step) {
      add(chunk, query_of(queries, i, channels), before + step, call.window, channels, scores);
    });
    position += chunk.count;
    slot = slot + chunk.count < call.seqlen_k ? slot + chunk.count : 0;
  }
  for_each_query(call, kv_head, [&](int64_t i, int64_t head, int64_t step) {
    const Query query = query_of(queries, i, channels);
    const VFloat inverse = splat(1.0f / fold<plus>(load(query.total)));
    for (int64_t d = 0; d < channels; d += kLanes) store(query.sums + d, load(query.sums + d) * inverse);
    write_rows(query.sums, channels, call.out, call.dtype, {b, head, step, 1}, call.headdim);
  });
}

}  // namespace

void attention_decode(const AttentionDecode& call, int64_t first_unit, int64_t last_unit, float* scratch) {
  const Modes before = begin_products();
  int64_t b = first_unit / call.nheads_kv, kv_head = first_unit % call.nheads_kv;
  for (int64_t unit = first_unit; unit < last_unit; unit++) {
    decode_unit(call, b, kv_head, scratch);
    if (++kv_head == call.nheads_kv) kv_head = 0, b++;
  }
  end_products(before);
}

}  // namespace AUDIOKERNELS_ISA
}  // namespace audiokernels
