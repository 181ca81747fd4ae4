// The backward pass of causal attention, compiled once per instruction set.
//
// One pass over the tiles: weights p and their gradients ds are made again from lse and serve dq, dk and dv at once
// (Dao, 2023). With D = rowsum(grad_out * out) - grad_lse:
//   p = exp(scale q k' - lse)   dv = p' grad_out   ds = p * (grad_out v' - D)   dq = scale ds k   dk = scale ds' q
// A block of keys meets all queries that see it, so dk and dv have one writer; dq is summed in a panel per block of
// queries, in the order of the keys.
#include "causal_attention_tile.h"

namespace audiokernels {
namespace AUDIOKERNELS_ISA {
namespace {

constexpr int64_t kGradients = 2;  // dk and dv of a block of keys lie together

// log2(e) * lse and what its rounding left.
struct Lse {
  const float *high, *low;
};

// A query head and what attention_pack has made of it.
struct Head {
  int64_t b, h;
  const float *q_panels, *grad_panels;
  Lse lse;
  const float* shifts;
};

static Head head_of(const AttentionBackward& call, int64_t b, int64_t h) {
  const int64_t head = b * call.nheads + h, panels = head * call.panel_floats(), n = call.padded_queries();
  const float* rows = call.row_numbers + 3 * head * n;
  return {b, h, call.q_panels + panels, call.grad_panels + panels, {rows, rows + n}, rows + 2 * n};
}

static float row_dot(const float* a, const float* b, int64_t n) {
  VFloat sum{};
  for (int64_t d = 0; d < n; d += kLanes) sum = multiply_add(load(a + d), load(b + d), sum);
  float lanes[kLanes], total = 0;
  store(lanes, sum);
  for (int i = 0; i < kLanes; i++) total += lanes[i];
  return total;
}

// `rows` has room for three blocks of rows.
static void pack_block(const AttentionBackward& call, int64_t head, int64_t first, float* rows) {
  const int64_t channels = panel_channels(call.headdim), size = channels * kQueries, n = call.padded_queries();
  const int64_t queries = least(kQueries, call.seqlen_q - first), panel = head * call.panel_floats() + first * channels;
  float *grad_rows = rows + size, *out_rows = grad_rows + size;
  const Place place{head / call.nheads, head % call.nheads, first, queries};
  memset(rows, 0, size_t(3 * size) * sizeof(float));
  read_rows(call.q, call.dtype, place, call.headdim, channels, rows);
  read_rows(call.grad_out, call.dtype, place, call.headdim, channels, grad_rows);
  read_rows(call.out, call.dtype, place, call.headdim, channels, out_rows);
  to_panel(rows, channels, float(call.scale * 1.4426950408889634), call.q_panels + panel);
  to_panel(grad_rows, channels, 1.0f, call.grad_panels + panel);
  for (int64_t i = 0; i < kQueries; i++) {
    float lse = kInfinity, rest = 0, shift = 0;  // beyond the last query: no weight
    if (i < queries) {
      const int64_t at = head * call.seqlen_q + first + i;
      const double exact = 1.4426950408889634 * double(call.lse[at]);
      lse = float(exact);
      rest = __builtin_isfinite(lse) ? float(exact - double(lse)) : 0.0f;
      shift = (call.grad_lse ? call.grad_lse[at] : 0.0f) -
              row_dot(grad_rows + i * channels, out_rows + i * channels, channels);
    }
    float* number = call.row_numbers + 3 * head * n + first + i;
    number[0] = lse;
    number[n] = rest;
    number[2 * n] = shift;
  }
}

// scores -> p, gradients of p -> ds, both (keys, kQueries).
static void weights_and_gradients(const Tile& tile, const Lse& lse, float* p, float* ds) {
  VFloat high[kQueryVectors], low[kQueryVectors];
  for (int i = 0; i < kQueryVectors; i++) {
    high[i] = load(lse.high + i * kLanes);
    low[i] = load(lse.low + i * kLanes);
  }
  const bool whole = tile.whole();
  for (int64_t j = 0; j < tile.count; j += 2, p += 2 * kQueries, ds += 2 * kQueries) {
    VFloat x[kPair];
    for (int i = 0; i < kPair; i++) x[i] = (load(p + i * kLanes) - high[i % kQueryVectors]) - low[i % kQueryVectors];
    exp2_of(x);
    for (int i = 0; i < kPair; i++) {
      VFloat gradient = x[i] * load(ds + i * kLanes);
      if (!whole) {
        const VInt visible = tile.visible(j + i / kQueryVectors, i % kQueryVectors);
        x[i] = select(visible, x[i], VFloat{});
        gradient = select(visible, gradient, VFloat{});
      }
      store(p + i * kLanes, x[i]);
      store(ds + i * kLanes, gradient);
    }
  }
}

// sums[j][d] += sum_i weights[j][i] * rows[i][d] for kSums / V keys j and V vectors of channels d.
template <int V>
AK_INLINE void add_queries(const float* weights, const float* rows, int64_t stride, int64_t queries, float* sums,
                           int64_t channels) {
  constexpr int kRows = kSums / V;  // more than gcc unrolls by itself
  VFloat sum[kRows][V] = {};
  for (int64_t i = 0; i < queries; i++, rows += stride) {
    VFloat lanes[V];
    for (int d = 0; d < V; d++) lanes[d] = load(rows + d * kLanes);
#pragma GCC unroll 24
    for (int j = 0; j < kRows; j++) {
      const VFloat weight = splat(weights[j * kQueries + i]);
      for (int d = 0; d < V; d++) sum[j][d] = multiply_add(weight, lanes[d], sum[j][d]);
    }
  }
#pragma GCC unroll 24
  for (int j = 0; j < kRows; j++) {
    for (int d = 0; d < V; d++) {
      float* p = sums + j * channels + d * kLanes;
      store(p, load(p) + sum[j][d]);
    }
  }
}

template <int V>
static void add_query_columns(const Tile& tile, const float* weights, const float* rows, int64_t stride, float* sums,
                              int64_t channels) {
  constexpr int kRows = kSums / V;
  static_assert(kKeys % kRows == 0);
  for (int64_t j = 0; j < tile.count; j += kRows)
    add_queries<V>(weights + j * kQueries, rows, stride, tile.queries, sums + j * channels, channels);
}

// The same where queries that do not see a key may hold NaN; for the others the same to the bit.
static void add_seeing_rows(const Tile& tile, const float* weights, const float* rows, int64_t stride, float* sums,
                            int64_t channels) {
  for (int64_t j = 0; j < tile.count; j++) {
    for (int64_t d = 0; d < channels; d += kLanes) {
      VFloat sum{};
      for (int64_t i = 0; i < tile.queries; i++)
        if (tile.sees(i, j)) sum = multiply_add(splat(weights[j * kQueries + i]), load(rows + i * stride + d), sum);
      float* p = sums + j * channels + d;
      store(p, load(p) + sum);
    }
  }
}

// sums[key][d] += sum over the queries of weights[key][query] * rows[query][d].
static void add_query_rows(const Tile& tile, const float* weights, const float* rows, int64_t stride, float* sums,
                           int64_t channels) {
  if (!tile.whole() && !all_finite(rows, stride, tile.queries, channels))
    return add_seeing_rows(tile, weights, rows, stride, sums, channels);
  int64_t d = 0;
  for (; d + 4 * kLanes <= channels; d += 4 * kLanes)
    add_query_columns<4>(tile, weights, rows + d, stride, sums + d, channels);
  for (; d + 2 * kLanes <= channels; d += 2 * kLanes)
    add_query_columns<2>(tile, weights, rows + d, stride, sums + d, channels);
  for (; d < channels; d += kLanes) add_query_columns<1>(tile, weights, rows + d, stride, sums + d, channels);
}

// A block of keys against a block of queries. key_sums: dk / scale, dv; dq_panel: dq / scale.
static void backward_tile(const AttentionBackward& call, const Head& head, const Tile& tile, float* dq_panel,
                          float* key_sums, float* weights) {
  const int64_t channels = panel_channels(call.headdim), headdim = attention_round_up(call.headdim, 8);
  const int64_t kv_head = head.h / call.group, query = tile.own - call.key_of(0);
  const int64_t k_stride = call.k.stride[2], v_stride = call.v.stride[2];
  const int64_t q_stride = call.q_rows.stride[2], grad_stride = call.grad_out_rows.stride[2];
  const float* k = call.k.at(head.b, kv_head) + tile.key * k_stride;
  const float* v = call.v.at(head.b, kv_head) + tile.key * v_stride;
  const float* q_rows = call.q_rows.at(head.b, head.h) + query * q_stride;
  const float* grad_rows = call.grad_out_rows.at(head.b, head.h) + query * grad_stride;
  float* ds = weights + kKeys * kQueries;

  VFloat shift[kQueryVectors];
  for (int i = 0; i < kQueryVectors; i++) shift[i] = load(head.shifts + query + i * kLanes);
  dot_rows(k, k_stride, tile.count, head.q_panels + query * channels, headdim, {}, weights);
  dot_rows(v, v_stride, tile.count, head.grad_panels + query * channels, headdim, shift, ds);
  weights_and_gradients(tile, {head.lse.high + query, head.lse.low + query}, weights, ds);
  add_tile(k, k_stride, tile, ds, headdim, dq_panel);
  add_query_rows(tile, ds, q_rows, q_stride, key_sums, channels);
  add_query_rows(tile, weights, grad_rows, grad_stride, key_sums + kKeys * channels, channels);
}

// A block of keys against all queries of a head that see some of it.
static void backward_keys(const AttentionBackward& call, const Head& head, int64_t key, float* dq, float* key_sums,
                          float* weights) {
  const int64_t count = least(kKeys, call.seqlen_k - key), offset = call.key_of(0);
  const int64_t first = most(key - offset, 0) / kQueries * kQueries;
  const int64_t end = least(call.seqlen_q, key + count - 1 + call.window - offset);
  for (int64_t query = first; query < end; query += kQueries) {
    const Tile tile{key, count, call.key_of(query), least(kQueries, call.seqlen_q - query), call.window};
    backward_tile(call, head, tile, dq + query * panel_channels(call.headdim), key_sums, weights);
  }
}

static void write_key_gradients(const AttentionBackward& call, const int64_t (&head)[2], int64_t key, float* key_sums) {
  const int64_t channels = panel_channels(call.headdim);
  float *dk = key_sums, *dv = key_sums + kKeys * channels;
  const Place place{head[0], head[1], key, least(kKeys, call.seqlen_k - key)};
  for (int64_t i = 0; i < place.count * channels; i++) dk[i] *= float(call.scale);
  write_rows(dk, channels, call.dk, call.dtype, place, call.headdim);
  write_rows(dv, channels, call.dv, call.dtype, place, call.headdim);
}

// The keys of a segment: blocks s, 2 n - 1 - s, 2 n + s, ...: early ones, which more queries see, and late ones alike.
static int64_t segment_key(const AttentionBackward& call, int64_t segment, int64_t turn) {
  return kKeys * (turn * call.segments + (turn % 2 ? call.segments - 1 - segment : segment));
}

static void backward_segment(const AttentionBackward& call, int64_t b, int64_t kv_head, int64_t segment,
                             float* scratch) {
  const int64_t key_floats = kGradients * kKeys * panel_channels(call.headdim);
  const int64_t turns = (call.key_blocks() + call.segments - 1) / call.segments;
  float *weights = scratch, *key_sums = weights + 2 * kKeys * kQueries;
  memset(key_sums, 0, size_t(turns * key_floats) * sizeof(float));
  for (int64_t h = kv_head * call.group; h < (kv_head + 1) * call.group; h++) {
    const Head head = head_of(call, b, h);
    float* dq = call.dq_parts + ((b * call.nheads + h) * call.segments + segment) * call.panel_floats();
    memset(dq, 0, size_t(call.panel_floats()) * sizeof(float));
    for (int64_t turn = 0; turn < turns; turn++) {
      const int64_t key = segment_key(call, segment, turn);
      if (key < call.seqlen_k) backward_keys(call, head, key, dq, key_sums + turn * key_floats, weights);
    }
  }
  for (int64_t turn = 0; turn < turns; turn++) {
    const int64_t key = segment_key(call, segment, turn);
    if (key < call.seqlen_k) write_key_gradients(call, {b, kv_head}, key, key_sums + turn * key_floats);
  }
}

// The queries of a unit of attention_pack and attention_write_dq, block by block: block(head, first query).
template <class Block>
AK_INLINE void for_each_block(const AttentionBackward& call, int64_t first_unit, int64_t last_unit, Block block) {
  for (int64_t unit = first_unit; unit < last_unit; unit++) {
    const int64_t first = unit % call.units_per_head() * kAttentionUnit;
    for (int64_t query = first; query < least(first + kAttentionUnit, call.seqlen_q); query += kQueries)
      block(unit / call.units_per_head(), query);
  }
}

}  // namespace

void attention_pack(const AttentionBackward& call, int64_t first_unit, int64_t last_unit, float* scratch) {
  for_each_block(call, first_unit, last_unit,
                 [&](int64_t head, int64_t query) { pack_block(call, head, query, scratch); });
}

void attention_backward(const AttentionBackward& call, int64_t first_unit, int64_t last_unit, float* scratch) {
  const unsigned before = flush_subnormals();
  for (int64_t unit = first_unit; unit < last_unit; unit++) {
    const int64_t kv_head = unit / call.segments;
    backward_segment(call, kv_head / call.nheads_kv, kv_head % call.nheads_kv, unit % call.segments, scratch);
  }
  keep_subnormals(before);
}

void attention_write_dq(const AttentionBackward& call, int64_t first_unit, int64_t last_unit, float* scratch) {
  const int64_t channels = panel_channels(call.headdim), part = call.panel_floats();
  VFloat scale[kQueryVectors];
  for (int i = 0; i < kQueryVectors; i++) scale[i] = splat(float(call.scale));
  for_each_block(call, first_unit, last_unit, [&](int64_t head, int64_t query) {
    float* sum = call.dq_parts + head * call.segments * part + query * channels;
    for (int64_t s = 1; s < call.segments; s++)
      for (int64_t i = 0; i < kQueries * channels; i++) sum[i] += sum[s * part + i];
    from_panel(sum, channels, scale, scratch);
    const Place place{head / call.nheads, head % call.nheads, query, least(kQueries, call.seqlen_q - query)};
    write_rows(scratch, channels, call.dq, call.dtype, place, call.headdim);
  });
}

}  // namespace AUDIOKERNELS_ISA
}  // namespace audiokernels
