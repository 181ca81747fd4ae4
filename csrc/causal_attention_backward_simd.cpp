// The backward pass of causal attention, compiled once per instruction set.
//
// One pass over the tiles: weights p and their gradients ds are made again from lse and serve dq, dk and dv at once
// (Dao, 2023). With D = rowsum(grad_out * out) - grad_lse:
//   p = exp(scale q k' - lse)   dv = p' grad_out   ds = p * (grad_out v' - D)   dq = scale ds k   dk = scale ds' q
// Keys lie in the lanes. A block of them meets all queries that see it, so dk and dv have one writer, and are panels;
// dq is summed in memory, in the order of the keys.
#include "causal_attention_tile.h"

namespace audiokernels {
namespace AUDIOKERNELS_ISA {
namespace {

constexpr int64_t kBlockKeys = attention_block_keys(Isa::AUDIOKERNELS_ISA);
constexpr bool kTiles = Isa::AUDIOKERNELS_ISA == Isa::avx512_amx;
constexpr int64_t kKeys = kTiles ? kBlockKeys : kWidth;  // that meet the same queries, a tile after the other
static_assert(kBlockKeys % kKeys == 0 && kKeys % kWidth == 0 && kBlockKeys <= kAttentionMostKeys);
constexpr double kMostLse = 24.0;  // in powers of 2, for the reference 0: factors of gradients stay near 1

// Rows of a head, as both kinds of products want them.
struct Rows {
  const float *words, *sums;
  int64_t stride, sums_stride;
  Rows from(int64_t row) const { return {words + row * stride, sums + row * sums_stride, stride, sums_stride}; }
};

// The rows of a query head, and what attention_pack has made of them.
struct Head {
  Rows q, grad;
  const float *references, *shifts;
  float* dq;
};

// A block of keys.
struct Keys {
  int64_t first, count, first_query, end_query;  // the queries that see some of them
  float* rows;                                   // (kWidth / kPerWord, channels)
  const float *k, *v;                            // panels: factor * k, v
  float *dk_sums, *dv_sums;                      // panels: dk / scale, dv
};

static float row_dot(const float* a, const float* b, int64_t n) {
  VFloat sum{};
  for (int64_t d = 0; d < n; d += kLanes) sum = multiply_add(load(a + d), load(b + d), sum);
  float lanes[kLanes], total = 0;
  store(lanes, sum);
  for (int i = 0; i < kLanes; i++) total += lanes[i];
  return total;
}

static void pack_row(const AttentionBackward& call, int64_t head, int64_t query, const float* out, float* grad) {
  const int64_t at = head * call.seqlen_q + query, n = call.padded_queries();
  const double lse = kAttentionLog2E * double(call.lse[at]);
  const bool small = lse < kMostLse && lse > -kMostLse && kPerWord == 1;
  const double reference = small ? 0.0 : double(float(lse));
  const float factor = __builtin_isfinite(lse) && kPerWord == 1 ? float(__builtin_exp2(reference - lse)) : 1.0f;
  const float shift = (call.grad_lse ? call.grad_lse[at] : 0.0f) - row_dot(grad, out, call.channels());
  float* number = call.row_numbers + 2 * head * n + query;
  number[0] = float(small ? 0.0 : lse);
  number[n] = factor * shift;
  for (int64_t d = 0; d < call.channels(); d += kLanes) store(grad + d, load(grad + d) * splat(factor));
}

// A tile's numbers, all (queries, kWidth): weights; their gradients, then those of scores; the same for sums over keys.
struct Tiles {
  float *p, *ds, *ds_keys;
};

// Gradients of a row and of the next one -> words of pairs of queries and of pairs of keys.
AK_INLINE void store_gradients(VFloat first, VFloat second, float* words, float* key_words) {
  store_weights(first, second, words);
#if defined(AK_BFLOAT16_PAIRS)
  const __m512i numbers = (__m512i)round_both(first, second);
  _mm256_storeu_si256((__m256i*)key_words, _mm512_castsi512_si256(numbers));
  _mm256_storeu_si256((__m256i*)(key_words + kWidth / 2), _mm512_maskz_extracti64x4_epi64(0xF, numbers, 1));
#else
  (void)key_words;
#endif
}

// Scores -> weights, gradients of weights -> gradients of scores.
static void weights_and_gradients(const Tile& tile, float factor, const float* references, const float* shifts,
                                  const Tiles& tiles) {
  const bool whole = tile.whole();
  for (int64_t j = 0; j < tile.padded_rows(); j += 2) {
    const float *score = tiles.p + j * kWidth, *of_weight = tiles.ds + j * kWidth;
    VFloat x[2 * kVectors];
    for (int i = 0; i < 2 * kVectors; i++)
      x[i] = exponent(load(score + i * kLanes), factor, splat(references[j + i / kVectors]));
    exp2_of(x);
    const int64_t at = j / kPerWord * kWidth;
    for (int i = 0; i < kVectors; i++) {
      VFloat weight[2], gradient[2];
      for (int row = 0; row < 2; row++) {
        const VInt visible = whole ? ~VInt{} : tile.visible(j + row, i);
        const VFloat p = x[row * kVectors + i];
        const VFloat ds = p * (load(of_weight + row * kWidth + i * kLanes) + splat(shifts[j + row]));
        weight[row] = select(visible, p, VFloat{});
        gradient[row] = select(visible, ds, VFloat{});
      }
      store_weights(weight[0], weight[1], tiles.p + at + i * kLanes);
      store_gradients(gradient[0], gradient[1], tiles.ds + at + i * kLanes, tiles.ds_keys + at + i * kLanes / kPerWord);
    }
  }
}

#if defined(AUDIOKERNELS_TILES)
// sums[query][d] += sum over the keys of weights[query][key] * rows[key][d]; weights (., kWidth / 2), rows and sums (.,
// channels).
static void add_all_keys(const Tile& tile, const float* weights, const float* rows, int64_t channels, float* sums) {
  constexpr int64_t kStride = kWidth / kPerWord;
  const int64_t chunks = (tile.lanes + kUnitRows - 1) / kUnitRows;
  const TileFactor left{weights, kStride, kTileWords, kTileRows * kStride};
  for (int64_t d = 0; d < channels; d += kTileWords) {
    const TileFactor right{rows + d, channels, kTileWords * channels, 0};
    with_tiles<kSumTiles>((tile.rows + kTileRows - 1) / kTileRows, [&]<int n>(TileCount<n>) {
      multiply_tiles<n, true>(left, right, chunks, sums + d, channels, kTileRows * channels);
    });
  }
}
#else
// sums[i][d] += sum_j weights[i][j] * rows[j][d] for kSums / V queries i and V vectors of channels d.
template <int V>
AK_INLINE void add_keys(const float* weights, const float* rows, int64_t stride, int64_t keys, float* sums) {
  constexpr int kCount = kSums / V;  // more than gcc unrolls by itself
  VFloat sum[kCount][V] = {};
  for (int64_t j = 0; j < (keys + kPerWord - 1) / kPerWord; j++, rows += stride) {
    VFloat lanes[V];
    for (int d = 0; d < V; d++) lanes[d] = load(rows + d * kLanes);
#pragma GCC unroll 24
    for (int i = 0; i < kCount; i++) {
      const VFloat weight = broadcast(weights + i * kWidth / kPerWord + j);
      for (int d = 0; d < V; d++) sum[i][d] = add_product(weight, lanes[d], sum[i][d]);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < kCount; i++) {
    for (int d = 0; d < V; d++) {
      float* p = sums + i * stride + d * kLanes;
      store(p, load(p) + sum[i][d]);
    }
  }
}

template <int V>
static void add_key_columns(const Tile& tile, const float* weights, const float* rows, int64_t stride, float* sums) {
  constexpr int kCount = kSums / V;
  static_assert(kRows % kCount == 0);
  for (int64_t i = 0; i < tile.rows; i += kCount)
    add_keys<V>(weights + i * kWidth / kPerWord, rows, stride, tile.lanes, sums + i * stride);
}

static void add_all_keys(const Tile& tile, const float* weights, const float* rows, int64_t channels, float* sums) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= channels; d += 4 * kLanes) add_key_columns<4>(tile, weights, rows + d, channels, sums + d);
  for (; d + 2 * kLanes <= channels; d += 2 * kLanes) add_key_columns<2>(tile, weights, rows + d, channels, sums + d);
  for (; d < channels; d += kLanes) add_key_columns<1>(tile, weights, rows + d, channels, sums + d);
}
#endif

// The same where keys that a query does not see may hold NaN; for the others the same to the bit.
static void add_seen_keys(const Tile& tile, const float* weights, const float* rows, int64_t channels, float* sums) {
  for (int64_t i = 0; i < tile.rows; i++) {
    for (int64_t d = 0; d < channels; d += kLanes) {
      float* p = sums + i * channels + d;
      SumOfWords sum{load(p)};
      const int64_t first = tile.first_lane(i), end = tile.end_lane(i);
      const auto sees = [&](int64_t key) { return splat_int(-(key >= first && key < end)); };
      for (int64_t key = first / kUnitRows * kUnitRows; key < end; key += kPerWord) {
        const VFloat row = load(rows + key / kPerWord * channels + d);
        sum.add(broadcast(weights + (i * kWidth + key) / kPerWord),
                (VFloat)((VInt)row & seen_words(sees(key), sees(key + 1))));
      }
      store(p, sum.end());
    }
  }
}

// sums[query][d] += sum over the keys of weights[query][key] * rows[key][d]; rows and sums (., channels).
static void add_key_rows(const Tile& tile, const float* weights, const float* rows, int64_t channels, float* sums) {
  if (!tile.whole() && !all_finite(rows, channels / kPerWord, tile.lanes, channels))
    return add_seen_keys(tile, weights, rows, channels, sums);
  add_all_keys(tile, weights, rows, channels, sums);
}

// The queries from `query` on against a block of keys.
static void backward_tile(const AttentionBackward& call, const Head& head, const Keys& keys, int64_t query,
                          float* weights) {
  const int64_t channels = call.channels(), headdim = attention_round_up(call.headdim, 8), words = headdim / kPerWord;
  const Tile tile{call.key_of(query) - keys.first - call.window + 1, call.window, least(kRows, call.seqlen_q - query),
                  keys.count};
  const Rows q = head.q.from(query), grad = head.grad.from(query);
  const Tiles tiles{weights, weights + kRows * kWidth, weights + kPerWord * kRows * kWidth};
  dot_rows(q.words, q.stride, tile, keys.k, words, tiles.p);
  dot_rows(grad.words, grad.stride, tile, keys.v, words, tiles.ds);
  weights_and_gradients(tile, call.factor(), head.references + query, head.shifts + query, tiles);
  add_tile(grad.sums, grad.sums_stride, tile, tiles.p, headdim, keys.dv_sums);
  add_tile(q.sums, q.sums_stride, tile, tiles.ds, headdim, keys.dk_sums);
  add_key_rows(tile, tiles.ds_keys, keys.rows, channels, head.dq + query * channels);
}

// The keys of `place`, at most kWidth, in `memory`: five panels.
static Keys open_keys(const AttentionBackward& call, const Place& place, float* memory) {
  const int64_t channels = call.channels(), panel = kWidth * channels;
  const int64_t words = attention_round_up(channels / kPerWord, kLanes);
  float *rows = memory, *k = rows + panel, *v = k + panel, *dk = v + panel, *dv = dk + panel;
  memset(rows, 0, size_t(panel) * sizeof(float));
  read_channel_words(call.v, call.dtype, place, call.headdim, words, rows);
  to_panel(rows, words, 1.0f, v);
  read_channel_words(call.k, call.dtype, place, call.headdim, words, rows);
  to_panel(rows, words, call.factor(), k);
  if (kPerWord > 1) read_row_words(call.k, call.dtype, place, call.headdim, channels, rows);
  memset(dk, 0, size_t(2 * panel) * sizeof(float));
  const int64_t first = most(place.first - call.key_of(0), 0) / kUnitRows * kUnitRows;
  const int64_t end = least(call.seqlen_q, place.first + place.count - 1 + call.window - call.key_of(0));
  return {place.first, place.count, first, end, rows, k, v, dk, dv};
}

static void close_keys(const AttentionBackward& call, const Place& place, const Keys& keys) {
  VFloat scale[kVectors], one[kVectors];
  for (int i = 0; i < kVectors; i++) scale[i] = splat(float(call.scale)), one[i] = splat(1.0f);
  from_panel(keys.dk_sums, call.channels(), scale, keys.rows);
  write_rows(keys.rows, call.channels(), call.dk, call.dtype, place, call.headdim);
  from_panel(keys.dv_sums, call.channels(), one, keys.rows);
  write_rows(keys.rows, call.channels(), call.dv, call.dtype, place, call.headdim);
}

// The keys [key, end), at most kKeys of them, and all queries that see some of them. `scratch`: panels and tiles.
static void backward_keys(const AttentionBackward& call, int64_t b, int64_t kv_head, int64_t segment, int64_t key,
                          int64_t end, float* scratch) {
  const int64_t n = call.padded_queries();
  Keys blocks[kKeys / kWidth];
  Place places[kKeys / kWidth];
  int count = 0;
  for (; key < end; key += kWidth, count++, scratch += 5 * kWidth * call.channels()) {
    places[count] = {b, kv_head, key, least(kWidth, end - key)};
    blocks[count] = open_keys(call, places[count], scratch);
  }
  for (int64_t h = kv_head * call.group; h < (kv_head + 1) * call.group; h++) {
    const int64_t at = b * call.nheads + h;
    const float* numbers = call.row_numbers + 2 * at * n;
    const Head head{
        {call.q_rows.at(b, h), call.q_sums.at(b, h), call.q_rows.stride[2], call.q_sums.stride[2]},
        {call.grad_rows.at(b, h), call.grad_sums.at(b, h), call.grad_rows.stride[2], call.grad_sums.stride[2]},
        numbers,
        numbers + n,
        call.dq_parts + (at * call.segments + segment) * call.row_floats()};
    for (int64_t query = blocks[0].first_query; query < blocks[count - 1].end_query; query += kRows)
      for (int i = 0; i < count; i++)
        if (query + kRows > blocks[i].first_query && query < blocks[i].end_query)
          backward_tile(call, head, blocks[i], query, scratch);
  }
  for (int i = 0; i < count; i++) close_keys(call, places[i], blocks[i]);
}

// The keys of a segment: blocks s, 2 n - 1 - s, 2 n + s, ...: early ones, which more queries see, and late ones alike.
static void backward_segment(const AttentionBackward& call, int64_t b, int64_t kv_head, int64_t segment,
                             float* scratch) {
  for (int64_t h = kv_head * call.group; h < (kv_head + 1) * call.group; h++) {
    float* dq = call.dq_parts + ((b * call.nheads + h) * call.segments + segment) * call.row_floats();
    memset(dq, 0, size_t(call.row_floats()) * sizeof(float));
  }
  for (int64_t turn = 0; turn * call.segments < call.key_blocks(); turn++) {
    const int64_t block = turn * call.segments + (turn % 2 ? call.segments - 1 - segment : segment);
    const int64_t first = block * kBlockKeys, end = least(first + kBlockKeys, call.seqlen_k);
    for (int64_t key = first; key < end; key += kKeys)
      backward_keys(call, b, kv_head, segment, key, least(key + kKeys, end), scratch);
  }
}

// The queries of units of attention_pack and attention_write_dq: block(head, first query, queries).
template <class Block>
AK_INLINE void for_each_block(const AttentionBackward& call, int64_t first_unit, int64_t last_unit, Block block) {
  for (int64_t unit = first_unit; unit < last_unit; unit++) {
    const int64_t first = unit % call.units_per_head() * kAttentionUnit;
    block(unit / call.units_per_head(), first, least(kAttentionUnit, call.seqlen_q - first));
  }
}

}  // namespace

void attention_pack(const AttentionBackward& call, int64_t first_unit, int64_t last_unit, float* scratch) {
  const int64_t channels = call.channels();
  for_each_block(call, first_unit, last_unit, [&](int64_t head, int64_t first, int64_t queries) {
    for (int64_t i = first; i < first + queries; i += kRows) {
      const Place place{head / call.nheads, head % call.nheads, i, least(kRows, first + queries - i)};
      float* grad =
          kPerWord == 1 ? call.grad_floats + head * call.row_floats() + i * channels : scratch + kRows * channels;
      read_rows(call.grad_out, call.dtype, place, call.headdim, channels, grad);
      read_rows(call.out, call.dtype, place, call.headdim, channels, scratch);
      for (int64_t j = 0; j < place.count; j++)
        pack_row(call, head, i + j, scratch + j * channels, grad + j * channels);
    }
  });
}

void attention_backward(const AttentionBackward& call, int64_t first_unit, int64_t last_unit, float* scratch) {
  const Modes before = begin_products();
  for (int64_t unit = first_unit; unit < last_unit; unit++) {
    const int64_t kv_head = unit / call.segments;
    backward_segment(call, kv_head / call.nheads_kv, kv_head % call.nheads_kv, unit % call.segments, scratch);
  }
  end_products(before);
}

void attention_write_dq(const AttentionBackward& call, int64_t first_unit, int64_t last_unit, float*) {
  const int64_t channels = call.channels(), part = call.row_floats();
  for_each_block(call, first_unit, last_unit, [&](int64_t head, int64_t first, int64_t queries) {
    float* sum = call.dq_parts + head * call.segments * part + first * channels;
    for (int64_t i = 0; i < queries * channels; i += kLanes) {
      VFloat total = load(sum + i);
      for (int64_t s = 1; s < call.segments; s++) total += load(sum + s * part + i);
      store(sum + i, total * splat(float(call.scale)));
    }
    write_rows(sum, channels, call.dq, call.dtype, {head / call.nheads, head % call.nheads, first, queries},
               call.headdim);
  });
}

}  // namespace AUDIOKERNELS_ISA
}  // namespace audiokernels
