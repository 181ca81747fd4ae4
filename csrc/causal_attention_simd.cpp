// The forward pass of causal attention, compiled once per instruction set.
//
// A block of queries meets the keys it sees, a tile of kRows at a time, and keeps a running sum of exponentials and of
// weighted values (online softmax; Milakov and Gimelshein 2018, Dao et al. 2022). Scores are powers of 2: log2(e) lies
// in the queries. The reference of a query, which is taken from its scores before the exponential, is 0, or its score
// with itself where that is large. It moves only when scores exceed it so far that a tile's sum shows it: exact,
// without a maximum and mostly without a subtraction.
#include "causal_attention_tile.h"

namespace audiokernels {
namespace AUDIOKERNELS_ISA {
namespace {

constexpr float kMostScore = 16.0f;     // of a query with itself, for the reference 0
constexpr float kMostTotal = 65536.0f;  // of a tile's weights

constexpr int kBlocks = kAttentionUnit / kWidth;  // that meet a tile of keys while it is near

// The sums of exponentials: exact ones, for lse; and where weights are rounded to bfloat16, those of what they became,
// for the denominator: the output stays a mean of the values, with two thirds of the error.
constexpr int kTotals = kPerWord * kVectors;
typedef VFloat Totals[kTotals];

struct Block {
  const AttentionForward* call;
  const float *k, *v;    // of the kv head
  int64_t headdim;       // rounded up to 8
  float factor;          // of scores, in powers of 2
  int64_t own, queries;  // the first query's position, how many there are
  float *panel, *sums, *weights;
  bool referred;  // is some reference not 0?
  VFloat reference[kVectors];
  Totals total;
};

static void start_at_own_score(Block& block, float* rows) {
  const int64_t words = panel_words(block.call->headdim), used = block.headdim / kPerWord;
  for (int64_t i = 0; i < kWidth; i++) {
    const float* row = block.k + (block.own + least(i, block.queries - 1)) * block.call->k.stride[2];
    memcpy(rows + i * words, row, size_t(used) * sizeof(float));
    for (int64_t d = used; d < words; d++) rows[i * words + d] = 0.0f;
  }
  to_panel(rows, words, 1.0f, block.sums);
  for (int i = 0; i < kVectors; i++) {
    VFloat score{};
    for (int64_t d = 0; d < used; d++) {
      const int64_t at = d * kWidth + i * kLanes;
      score = add_product(load(block.panel + at), load(block.sums + at), score);
    }
    if (kPerWord > 1) score *= splat(block.factor);
    const VInt large = (abs(score) > splat(kMostScore)) & (abs(score) < splat(kInfinity));
    block.referred |= any(large);
    block.reference[i] = select(large, score, VFloat{});
  }
  for (VFloat& total : block.total) total = VFloat{};
  memset(block.sums, 0, size_t(panel_channels(block.call->headdim)) * kWidth * sizeof(float));
}

// Scores -> weights; their sums over the tile.
static void exponentials(const Block& block, const Tile& tile, Totals& total) {
  constexpr int kPair = 2 * kVectors;
  constexpr int kPartial = kPair / kPerWord;  // sums; pairs leave fewer registers
  VFloat reference[kVectors], sum[kPartial] = {}, rounded[kVectors] = {};
  for (int i = 0; i < kVectors; i++) reference[i] = block.reference[i];
  const bool whole = tile.whole(), referred = block.referred || kPerWord > 1;
  const float* scores = block.weights;
  float* weights = block.weights;  // pairs take half the place
  for (int64_t j = 0; j < tile.padded_rows(); j += 2, scores += 2 * kWidth, weights += 2 * kWidth / kPerWord) {
    VFloat x[kPair];
    for (int i = 0; i < kPair; i++) x[i] = load(scores + i * kLanes);
    if (referred)
      for (int i = 0; i < kPair; i++) x[i] = exponent(x[i], block.factor, reference[i % kVectors]);
    if (!whole)
      for (int i = 0; i < kPair; i++)
        x[i] = select(tile.visible(j + i / kVectors, i % kVectors), x[i], splat(-kInfinity));
    exp2_of(x);
    for (int i = 0; i < kPair; i++) sum[i % kPartial] += x[i];
    for (int i = 0; i < kVectors; i++) {
      store_weights(x[i], x[i + kVectors], weights + i * kLanes);
      if (kPerWord > 1) rounded[i] = add_product(load(weights + i * kLanes), ones(), rounded[i]);
    }
  }
  for (int i = kVectors; i < kPartial; i++) sum[i - kVectors] += sum[i];
  for (int i = 0; i < kTotals; i++) total[i] = i < kVectors ? sum[i] : rounded[i - kVectors];
}

static void weigh(const Block& block, const Tile& tile, const float* keys, Totals& total) {
  dot_rows(keys, block.call->k.stride[2], tile, block.panel, block.headdim / kPerWord, block.weights);
  exponentials(block, tile, total);
}

// Has a score exceeded its reference by about 16?
AK_INLINE VInt out_of_reach(VFloat total) { return total > splat(kMostTotal); }

// Lifts the references of those queries to their largest scores; what is summed so far shrinks accordingly. Others stay
// to the bit: no query depends on those beside it.
static void move_references(Block& block, const Tile& tile, const float* keys, const Totals& total) {
  for (int i = 0; i < kVectors; i++) {
    VFloat largest = splat(-kInfinity);
    for (int64_t j = 0; j < tile.rows; j++) {
      VFloat score{};
      for (int64_t d = 0; d < block.headdim / kPerWord; d++)
        score = add_product(broadcast(keys + j * block.call->k.stride[2] + d),
                            load(block.panel + d * kWidth + i * kLanes), score);
      if (kPerWord > 1) score *= splat(block.factor);
      largest = max(select(tile.visible(j, i), score, splat(-kInfinity)), largest);
    }
    const VFloat rise = select(out_of_reach(total[i]), largest - block.reference[i], VFloat{});
    VFloat factor[1] = {-rise};
    exp2_of(factor);
    block.reference[i] += rise;
    for (int t = i; t < kTotals; t += kVectors) block.total[t] *= factor[0];
    for (int64_t d = 0; d < block.headdim; d++) {
      float* p = block.sums + d * kWidth + i * kLanes;
      store(p, load(p) * factor[0]);
    }
  }
  block.referred = true;
}

// The keys [key, end).
static void add_keys(Block& block, int64_t key, int64_t end) {
  const AttentionForward& call = *block.call;
  const Tile tile{key - block.own, call.window, end - key, block.queries};
  const float* keys = block.k + key * call.k.stride[2];
  Totals total;
  VInt exceeded{};
  weigh(block, tile, keys, total);
  for (int i = 0; i < kVectors; i++) exceeded |= out_of_reach(total[i]);
  if (any(exceeded)) {
    move_references(block, tile, keys, total);
    weigh(block, tile, keys, total);
  }
  for (int i = 0; i < kTotals; i++) block.total[i] += total[i];
  add_tile(block.v + key * call.v.stride[2], call.v.stride[2], tile, block.weights, block.headdim, block.sums);
}

// block.call, .own, .queries and its memory are set.
static void open_block(Block& block, const Place& at, float* rows) {
  const AttentionForward& call = *block.call;
  const int64_t words = panel_words(call.headdim), kv_head = at.h / call.group;
  block.k = call.k.at(at.b, kv_head);
  block.v = call.v.at(at.b, kv_head);
  block.headdim = attention_round_up(call.headdim, 8);
  block.factor = call.factor();
  read_channel_words(call.q, call.dtype, at, call.headdim, words, rows);
  memset(rows + at.count * words, 0, size_t((kWidth - at.count) * words) * sizeof(float));
  to_panel(rows, words, block.factor, block.panel);
  start_at_own_score(block, rows);
}

static void close_block(const Block& block, const Place& at, float* rows) {
  const AttentionForward& call = *block.call;
  const int64_t channels = panel_channels(call.headdim);
  VFloat inverse[kVectors];
  for (int i = 0; i < kVectors; i++) inverse[i] = splat(1.0f) / block.total[kTotals - kVectors + i];
  from_panel(block.sums, channels, inverse, rows);
  write_rows(rows, channels, call.out, call.dtype, at, call.headdim);
  float* lse = call.lse + (at.b * call.nheads + at.h) * call.seqlen_q + at.first;
  for (int64_t i = 0; i < at.count; i++) {
    const double reference = double(block.reference[i / kLanes][i % kLanes]);
    const double total = double(block.total[i / kLanes][i % kLanes]);
    lse[i] = float((reference + __builtin_log2(total)) * 0.6931471805599453);
  }
}

// The queries from `first` on, a unit of work.
static void forward_unit(const AttentionForward& call, int64_t b, int64_t h, int64_t first, float* scratch) {
  const int64_t panel_size = panel_channels(call.headdim) * kWidth, window = call.window;
  const int64_t queries = least(kAttentionUnit, call.seqlen_q - first), own = call.key_of(first);
  float *rows = scratch, *weights = rows + panel_size, *panels = weights + kRows * kWidth;
  Block blocks[kBlocks];
  Place places[kBlocks];
  int n = 0;
  for (int64_t q = 0; q < queries; q += kWidth, n++, panels += 2 * panel_size) {
    places[n] = {b, h, first + q, least(kWidth, queries - q)};
    blocks[n] = {};
    blocks[n].call = &call;
    blocks[n].own = own + q, blocks[n].queries = places[n].count;
    blocks[n].panel = panels, blocks[n].sums = panels + panel_size, blocks[n].weights = weights;
    open_block(blocks[n], places[n], rows);
  }
  const auto first_key = [=](int64_t position) { return most(position - window + 1, 0) / kUnitRows * kUnitRows; };
  for (int64_t key = first_key(own); key < own + queries; key += kRows) {
    for (int i = 0; i < n; i++) {
      Block& block = blocks[i];
      const int64_t start = most(key, first_key(block.own)), end = least(key + kRows, block.own + block.queries);
      if (start < end) add_keys(block, start, end);
    }
  }
  for (int i = 0; i < n; i++) close_block(blocks[i], places[i], rows);
}

}  // namespace

void attention_read(const AttentionTensor& t, const int64_t* sizes, Dtype dtype, AttentionPairs pairs, float* words,
                    int64_t channels, int64_t first, int64_t last) {
  const int64_t heads = sizes[1], seqlen = sizes[2], headdim = sizes[3], units = (seqlen + kUnitRows - 1) / kUnitRows;
  const int64_t unit_floats = kUnitRows * channels / kPerWord;
  for (int64_t i = first; i < last;) {  // a head's at a time
    const int64_t head = i / units, row = i % units * kUnitRows, count = least(last, (head + 1) * units) - i;
    const Place at{head / heads, head % heads, row, least(count * kUnitRows, seqlen - row)};
    float* to = words + i * unit_floats;
    if (pairs == AttentionPairs::rows) {
      read_sum_words(t, dtype, at, headdim, channels, to);
    } else {
      read_channel_words(t, dtype, at, headdim, channels / kPerWord, to);
      for (int64_t j = at.count * channels / kPerWord; j < count * unit_floats; j++) to[j] = 0.0f;
    }
    i += count;
  }
}

void attention_forward(const AttentionForward& call, int64_t first_unit, int64_t last_unit, float* scratch) {
  const Modes before = begin_products();
  const int64_t per_head = call.units_per_head();
  for (int64_t unit = first_unit; unit < last_unit; unit++) {
    // short rows and long rows in turn: then any run of units costs about the same per unit
    const int64_t head = unit / per_head, turn = unit % per_head;
    const int64_t place = turn % 2 ? per_head - 1 - turn / 2 : turn / 2;
    forward_unit(call, head / call.nheads, head % call.nheads, place * kAttentionUnit, scratch);
  }
  end_products(before);
}

}  // namespace AUDIOKERNELS_ISA
}  // namespace audiokernels
