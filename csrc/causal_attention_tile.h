// The pieces that the forward and the backward pass share, for the instruction set being compiled.
//
// A tile of scores has rows, one after the other, and lanes. Forward, queries lie in the lanes: a panel holds a block
// of them as (headdim, kWidth), keys and values are rows whose numbers are broadcast. So scores need no sum and no
// maximum over lanes, a headdim needs no padding beyond 8, and keys are read where the caller has them. Backward it is
// the other way round: keys in the lanes, queries as rows; then four of the five products take the faster of the two
// loops below.
#pragma once

#include "causal_attention.h"
#include "simd.h"
#include "tiles.h"

namespace audiokernels {
namespace AUDIOKERNELS_ISA {
namespace {

// A register tile: kVectors vectors of lanes by kTile rows (or channels).
#if defined(AUDIOKERNELS_TILES)
constexpr int kVectors = 4, kTile = 8;  // of what is not done in tile registers
#elif defined(__AVX512F__)
constexpr int kVectors = 3, kTile = 8, kSums = 24;
#elif defined(__AVX2__)
constexpr int kVectors = 3, kTile = 4, kSums = 12;
#else
constexpr int kVectors = 2, kTile = 4, kSums = 8;
#endif
constexpr int kWidth = kVectors * kLanes;                              // lanes of a panel
constexpr int kRows = attention_rows(Isa::AUDIOKERNELS_ISA);           // of a tile
constexpr int kUnitRows = attention_unit_rows(Isa::AUDIOKERNELS_ISA);  // at whose multiples it begins
static_assert(kWidth <= kAttentionMostLanes && kAttentionUnit % kWidth == 0 && kRows % kTile == 0);
static_assert(kRows <= kAttentionMostRows && kRows % kWidth == 0 && kRows % kUnitRows == 0);

// What the inner loops multiply, a word a lane: see attention_per_word.
constexpr int kPerWord = attention_per_word(Isa::AUDIOKERNELS_ISA);
static_assert(kRows % kPerWord == 0 && kAttentionUnit % kPerWord == 0);
#if defined(AK_BFLOAT16_PAIRS)
AK_INLINE VFloat add_product(VFloat a, VFloat b, VFloat sum) { return add_pairs((VInt)a, (VInt)b, sum); }
AK_INLINE VFloat product(VFloat a, VFloat b) { return add_product(a, b, VFloat{}); }
AK_INLINE VFloat broadcast(const float* word) {
  int32_t pair;
  memcpy(&pair, word, sizeof pair);
  return (VFloat)splat_int(pair);
}
AK_INLINE VFloat ones() { return (VFloat)splat_int(0x3F803F80); }  // 1 and 1
// Two vectors of numbers, as round_both has left them -> pairs of them.
AK_INLINE VInt pair_up(VInt numbers) {
  typedef uint16_t VHalf __attribute__((vector_size(64)));
  VHalf order{};
  for (int i = 0; i < 2 * kLanes; i++) order[i] = uint16_t(i / 2 + i % 2 * kLanes);
  return (VInt)__builtin_shuffle((VHalf)numbers, order);
}
#else
AK_INLINE VFloat add_product(VFloat a, VFloat b, VFloat sum) { return multiply_add(a, b, sum); }
AK_INLINE VFloat product(VFloat a, VFloat b) { return a * b; }
AK_INLINE VFloat broadcast(const float* word) { return splat(*word); }
AK_INLINE VFloat ones() { return splat(1.0f); }
#endif

constexpr float kInfinity = __builtin_inff();

AK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
AK_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
AK_INLINE VFloat select(VInt condition, VFloat a, VFloat b) { return condition ? a : b; }
AK_INLINE bool any(VInt condition) {  // of all ones or zeros a lane
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)condition) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)condition) != 0;
#else
  int32_t some = 0;
  for (int i = 0; i < kLanes; i++) some |= condition[i];
  return some != 0;
#endif
}
AK_INLINE VInt lane_numbers() {
  VInt v{};
  for (int i = 0; i < kLanes; i++) v[i] = i;
  return v;
}

// Subnormal numbers count as zero from here on: far keys would slow the sums down a hundred times. And tile registers
// are set up. What is returned ends that.
struct Modes {
  unsigned numbers;
#if defined(AUDIOKERNELS_TILES)
  TileConfig tiles;
#endif
};
AK_INLINE Modes begin_products() {
  Modes before{};
  before.numbers = flush_subnormals();
#if defined(AUDIOKERNELS_TILES)
  before.tiles = begin_tiles();
#endif
  return before;
}
AK_INLINE void end_products(const Modes& before) {
#if defined(AUDIOKERNELS_TILES)
  end_tiles(before.tiles);
#endif
  keep_subnormals(before.numbers);
}

// x = 2^x within 1.2 ulps, 1 at 0; infinity from 128 on, 0 far below, NaN stays NaN. Step by step for all vectors,
// since each step waits for the one before it.
template <int n>
AK_INLINE void exp2_of(VFloat (&x)[n]) {
  VFloat r[n], p[n];
#if defined(__AVX512F__)
  constexpr float kFactors[] = {0x1.277860p-7f, 0x1.c91cecp-5f, 0x1.ebdb58p-3f, 0x1.62e4bap-1f, 1.0f};
  for (int i = 0; i < n; i++) r[i] = _mm512_reduce_ps(x[i], _MM_FROUND_TO_NEG_INF);  // x - floor(x)
  for (int i = 0; i < n; i++) p[i] = splat(0x1.e97510p-10f);
#else
  constexpr float kFactors[] = {0x1.3ceacap-7f, 0x1.c6b704p-5f, 0x1.ebf9bap-3f, 0x1.62e42ap-1f, 1.0f};
  constexpr float kBias = kRound + 127.0f;
  for (int i = 0; i < n; i++) {
    x[i] = max(splat(-127.0f), min(splat(128.0f), x[i]));  // in this order NaN passes
    const VFloat t = x[i] + splat(kBias);                  // the exponent's bits of 2^round(x), in the low bits
    r[i] = x[i] - (t - splat(kBias));
    x[i] = (VFloat)((VInt)t << 23);
  }
  for (int i = 0; i < n; i++) p[i] = splat(0x1.5bb9cap-10f);
#endif
#pragma GCC unroll 5
  for (float factor : kFactors)
    for (int i = 0; i < n; i++) p[i] = multiply_add(p[i], r[i], splat(factor));
#if defined(__AVX512F__)
  for (int i = 0; i < n; i++) x[i] = _mm512_scalef_ps(p[i], x[i]);  // times 2^floor(x)
#else
  for (int i = 0; i < n; i++) x[i] *= p[i];
#endif
}

// ---- rows of any dtype and stride ----

// Some rows of a (batch, head): `headdim` numbers each.
struct Place {
  int64_t b, h, first, count;
};

AK_INLINE char* address(const AttentionTensor& t, Dtype dtype, const Place& at) {
  return t.data + (at.b * t.stride[0] + at.h * t.stride[1] + at.first * t.stride[2]) * bytes_of(dtype);
}

template <class Number, VFloat (*load_vector)(const Number*)>
AK_INLINE void read_numbers(const Number* p, int64_t stride, int64_t n, int64_t channels, float* row) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + kLanes <= n; i += kLanes) store(row + i, load_vector(p + i));
  for (; i < channels; i += kLanes) {
    Number gathered[kLanes] = {};
    for (int64_t j = i; j < least(n, i + kLanes); j++) gathered[j - i] = p[j * stride];
    store(row + i, load_vector(gathered));
  }
}
template <class Number, VFloat (*load_vector)(const Number*)>
static inline void read_rows_as(const AttentionTensor& t, const void* from, int64_t count, int64_t n, int64_t channels,
                                float* rows) {
  const Number* p = static_cast<const Number*>(from);
  if (t.stride[2] == channels && t.stride[3] == 1 && n == channels)  // one run: a row alone may be a single vector
    return read_numbers<Number, load_vector>(p, 1, count * n, count * n, rows);
  for (int64_t i = 0; i < count; i++)
    read_numbers<Number, load_vector>(p + i * t.stride[2], t.stride[3], n, channels, rows + i * channels);
}
// -> float32 (count, channels), zeros beyond headdim; channels a multiple of kLanes.
static inline void read_rows(const AttentionTensor& t, Dtype dtype, const Place& at, int64_t headdim, int64_t channels,
                             float* rows) {
  const char* p = address(t, dtype, at);
  switch (dtype) {
    case Dtype::bfloat16: return read_rows_as<uint16_t, load_bfloat16>(t, p, at.count, headdim, channels, rows);
    case Dtype::float16: return read_rows_as<uint16_t, load_float16>(t, p, at.count, headdim, channels, rows);
    default: return read_rows_as<float, load>(t, p, at.count, headdim, channels, rows);
  }
}

template <class Number, void (*store_vector)(Number*, VFloat)>
AK_INLINE void write_numbers(const float* row, Number* p, int64_t stride, int64_t n) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + kLanes <= n; i += kLanes) store_vector(p + i, load(row + i));
  for (; i < n; i += kLanes) {
    Number scattered[kLanes];
    store_vector(scattered, load(row + i));
    for (int64_t j = i; j < least(n, i + kLanes); j++) p[j * stride] = scattered[j - i];
  }
}
template <class Number, void (*store_vector)(Number*, VFloat)>
static inline void write_rows_as(const float* rows, int64_t channels, const AttentionTensor& t, void* to, int64_t count,
                                 int64_t n) {
  Number* p = static_cast<Number*>(to);
  for (int64_t i = 0; i < count; i++)
    write_numbers<Number, store_vector>(rows + i * channels, p + i * t.stride[2], t.stride[3], n);
}
static inline void write_rows(const float* rows, int64_t channels, const AttentionTensor& t, Dtype dtype,
                              const Place& at, int64_t headdim) {
  char* p = address(t, dtype, at);
  switch (dtype) {
    case Dtype::bfloat16: return write_rows_as<uint16_t, store_bfloat16>(rows, channels, t, p, at.count, headdim);
    case Dtype::float16: return write_rows_as<uint16_t, store_float16>(rows, channels, t, p, at.count, headdim);
    default: return write_rows_as<float, store>(rows, channels, t, p, at.count, headdim);
  }
}

// ---- words ----

#if defined(AK_BFLOAT16_PAIRS)
// A row's numbers, side by side, and zeros.
AK_INLINE void copy_row(const AttentionTensor& t, const Place& at, int64_t headdim, int64_t channels,
                        uint16_t* numbers) {
  const auto* p = reinterpret_cast<const uint16_t*>(address(t, Dtype::bfloat16, at));
  if (t.stride[3] == 1)
    memcpy(numbers, p, size_t(headdim) * sizeof *p);
  else
    for (int64_t d = 0; d < headdim; d++) numbers[d] = p[d * t.stride[3]];
  for (int64_t d = headdim; d < channels; d++) numbers[d] = 0;
}
// -> (count, words), pairs of channels, zeros beyond headdim.
static inline void read_channel_words(const AttentionTensor& t, Dtype, const Place& at, int64_t headdim, int64_t words,
                                      float* rows) {
  for (int64_t i = 0; i < at.count; i++)
    copy_row(t, {at.b, at.h, at.first + i, 1}, headdim, 2 * words, reinterpret_cast<uint16_t*>(rows + i * words));
}
// -> (count / 2, channels), pairs of rows; one that there is not is zeros.
static inline void read_row_words(const AttentionTensor& t, Dtype, const Place& at, int64_t headdim, int64_t channels,
                                  float* rows) {
  uint16_t pair[2][256];
  for (int64_t i = 0; i < at.count; i += 2, rows += channels) {
    for (int64_t j = 0; j < 2; j++)
      copy_row(t, {at.b, at.h, at.first + i + j, 1}, i + j < at.count ? headdim : 0, channels, pair[j]);
    for (int64_t d = 0; d < channels; d += kLanes) store_int(rows + d, widen(pair[0] + d) | widen(pair[1] + d) << 16);
  }
}
#else
constexpr auto read_channel_words = read_rows, read_row_words = read_rows;
#endif

// ---- panels ----

template <int step>
AK_INLINE void transpose_step(VFloat (&v)[kLanes]) {
  VInt low{}, high{};
  for (int i = 0; i < kLanes; i++) {
    low[i] = i & step ? kLanes + i - step : i;
    high[i] = i & step ? kLanes + i : i + step;
  }
  for (int r = 0; r < kLanes; r++) {
    if (r & step) continue;
    const VFloat a = v[r], b = v[r + step];
    v[r] = __builtin_shuffle(a, b, low);
    v[r + step] = __builtin_shuffle(a, b, high);
  }
}
AK_INLINE void transpose(VFloat (&v)[kLanes]) {
  transpose_step<1>(v);
  transpose_step<2>(v);
  if constexpr (kLanes >= 8) transpose_step<4>(v);
  if constexpr (kLanes >= 16) transpose_step<8>(v);
}

AK_INLINE int64_t panel_channels(int64_t headdim) { return attention_round_up(headdim, kLanes > 8 ? kLanes : 8); }

// The words of a row in a panel.
AK_INLINE int64_t panel_words(int64_t headdim) {
  return panel_channels(attention_round_up(headdim, kPerWord) / kPerWord);
}

// rows (kWidth, words) -> panel (words, kWidth), times `scale` unless they are pairs; words a multiple of kLanes.
static inline void to_panel(const float* rows, int64_t words, float scale, float* panel) {
  for (int64_t d = 0; d < words; d += kLanes) {
    for (int i = 0; i < kWidth; i += kLanes) {
      VFloat v[kLanes];
      for (int r = 0; r < kLanes; r++) v[r] = load(rows + (i + r) * words + d);
      transpose(v);
      for (int r = 0; r < kLanes; r++) store(panel + (d + r) * kWidth + i, kPerWord == 1 ? v[r] * splat(scale) : v[r]);
    }
  }
}

// panel -> rows, each lane times its factor.
static inline void from_panel(const float* panel, int64_t channels, const VFloat (&factor)[kVectors], float* rows) {
  for (int64_t d = 0; d < channels; d += kLanes) {
    for (int i = 0; i < kVectors; i++) {
      VFloat v[kLanes];
      for (int r = 0; r < kLanes; r++) v[r] = load(panel + (d + r) * kWidth + i * kLanes) * factor[i];
      transpose(v);
      for (int r = 0; r < kLanes; r++) store(rows + (i * kLanes + r) * channels + d, v[r]);
    }
  }
}

// Rows to be summed: see sum_word.
#if defined(AUDIOKERNELS_TILES)
static inline void read_sum_words(const AttentionTensor& t, Dtype dtype, const Place& at, int64_t headdim,
                                  int64_t channels, float* words) {
  float pairs[kLanes * 256];
  for (int64_t i = 0; i < at.count; i += kUnitRows, words += channels * kLanes) {
    const Place unit{at.b, at.h, at.first + i, least(kUnitRows, at.count - i)};
    memset(pairs, 0, sizeof pairs);
    read_row_words(t, dtype, unit, headdim, channels, pairs);
    for (int64_t d = 0; d < channels; d += kLanes) {
      VFloat v[kLanes];
      for (int r = 0; r < kLanes; r++) v[r] = load(pairs + r * channels + d);
      transpose(v);
      for (int r = 0; r < kLanes; r++) store(words + (d + r) * kLanes, v[r]);
    }
  }
}
#else
constexpr auto read_sum_words = read_row_words;
#endif

// Where the word of row j (and of the next one) and channel d lies.
AK_INLINE const float* sum_word(const float* rows, int64_t stride, int64_t j, int64_t d) {
#if defined(AUDIOKERNELS_TILES)
  return rows + j / kUnitRows * kUnitRows * stride + d * kTileWords + j % kUnitRows / kPerWord;
#else
  return rows + j * stride + d;
#endif
}

// ---- what is seen ----

// Row r sees the lanes [first + r, first + r + window) of those that there are.
struct Tile {
  int64_t first, window, rows, lanes;

  // What is worked on: beyond the last row nothing is seen, weights are zero.
  int64_t padded_rows() const { return attention_round_up(rows, kUnitRows > 2 ? kUnitRows : 2); }
  // Does every row see every lane?
  bool whole() const { return rows == kRows && lanes == kWidth && first + rows <= 1 && first + window >= kWidth; }
  int64_t first_lane(int64_t r) const { return least(most(first + r, 0), lanes); }
  int64_t end_lane(int64_t r) const { return r < rows ? least(most(first + r + window, 0), lanes) : 0; }
  // The lanes of vector i that row r sees; none sees a row beyond the last.
  AUDIOKERNELS_INLINE VInt visible(int64_t r, int i) const {
    const VInt lane = lane_numbers() + splat_int(i * kLanes);
    return (lane >= splat_int(int32_t(first_lane(r)))) & (lane < splat_int(int32_t(end_lane(r))));
  }
};

// call(Count<n>{}) for the number n of vectors that hold so many lanes, at least one.
template <int n>
struct Count {};
template <int n = kVectors, class Call>
AK_INLINE void with_vectors(int64_t lanes, Call call) {
  if constexpr (n > 1)
    if (lanes <= (n - 1) * kLanes) return with_vectors<n - 1>(lanes, call);
  call(Count<n>{});
}

// Is every number of these rows, or pairs of rows, finite? Where not, zero weights do not keep them out of a sum.
static inline bool all_finite(const float* rows, int64_t stride, int64_t count, int64_t headdim) {
  typedef float Eight __attribute__((vector_size(32)));
  typedef int32_t EightInt __attribute__((vector_size(32)));
  Eight sum{};
  for (int64_t j = 0; j < count; j += kPerWord) {
    for (int64_t d = 0; d < headdim; d += 8) {
      Eight x;
      memcpy(&x, rows + j * stride + d, sizeof x);
      sum += x * 0.0f;  // of a pair the second number, with more digits
      if (kPerWord == 2) sum += (Eight)((EightInt)x << 16) * 0.0f;
    }
  }
  float total = 0;
  for (int i = 0; i < 8; i++) total += sum[i];
  return total == 0.0f;
}

// What exp2_of makes a weight of. The factor of scores lies in the panel; not so that of pairs: rounded to bfloat16 it
// would cost more than the weights do.
AK_INLINE VFloat exponent(VFloat score, float factor, VFloat reference) {
  return kPerWord == 1 ? score - reference : multiply_add(score, splat(factor), -reference);
}

// Weights of a row and of the next one -> words of a tile.
AK_INLINE void store_weights(VFloat first, VFloat second, float* words) {
#if defined(AK_BFLOAT16_PAIRS)
  store_int(words, pair_up(round_both(first, second)));
#else
  store(words, first);
  store(words + kWidth, second);
#endif
}

// ---- products ----

#if defined(AUDIOKERNELS_TILES)

static_assert(kWidth == kSumTiles * kTileWords && kRows == kSumTiles * kTileRows);

// products[j][lane] = rows[j] . panel[lane] for the rows of a tile, rounded up to 16, and the lanes that they see.
static inline void dot_rows(const float* rows, int64_t stride, const Tile& tile, const float* panel, int64_t words,
                            float* products) {
  const int64_t chunks = (words + kTileWords - 1) / kTileWords, end = (tile.rows + kTileRows - 1) / kTileRows;
  for (int64_t lane = 0; lane < tile.lanes; lane += kTileWords) {
    int64_t first = 0, last = end;  // sixteens of rows that see some of these lanes
    while (first < last && tile.end_lane(least((first + 1) * kTileRows, tile.rows) - 1) <= lane) first++;
    while (first < last && tile.first_lane((last - 1) * kTileRows) >= lane + kTileWords) last--;
    if (first == last) continue;
    const TileFactor left{rows + first * kTileRows * stride, stride, kTileWords, kTileRows * stride};
    const TileFactor right{panel + lane, kWidth, kTileWords * kWidth, 0};
    float* sums = products + first * kTileRows * kWidth + lane;
    with_tiles<kSumTiles>(last - first, [&]<int n>(TileCount<n>) {
      multiply_tiles<n, false>(left, right, chunks, sums, kWidth, kTileRows * kWidth);
    });
  }
}

// panel[d][lane] += sum_j rows[j][d] * weights[j][lane] for d < headdim, rounded up to 16.
static inline void add_rows(const float* rows, int64_t stride, const Tile& tile, const float* weights, int64_t headdim,
                            float* panel) {
  const int64_t chunks = tile.padded_rows() / kUnitRows, channels = kTileRows * kSumTiles;
  for (int64_t d = 0; d < headdim; d += channels) {
    const TileFactor left{rows + d * kTileWords, kTileWords, kUnitRows * stride, kTileRows * kTileWords};
    for (int64_t lane = 0; lane < tile.lanes; lane += kTileWords) {
      const TileFactor right{weights + lane, kWidth, kTileWords * kWidth, 0};
      with_tiles<kSumTiles>((least(headdim - d, channels) + kTileRows - 1) / kTileRows, [&]<int n>(TileCount<n>) {
        multiply_tiles<n, true>(left, right, chunks, panel + d * kWidth + lane, kWidth, kTileRows * kWidth);
      });
    }
  }
}

// A sum over rows to the bit as that: 16 words at a time, the first and the second numbers of pairs apart.
struct SumOfWords {
  VFloat total, first{}, second{};
  int n = 0;
  AUDIOKERNELS_INLINE void add(VFloat a, VFloat b) {
    const VInt x = (VInt)a, y = (VInt)b, high = splat_int(~0xFFFF);
    first = fma((VFloat)(x << 16), (VFloat)(y << 16), first);
    second = fma((VFloat)(x & high), (VFloat)(y & high), second);
    if (++n % kTileWords == 0) close();
  }
  AUDIOKERNELS_INLINE void close() {
    total += first + second;
    first = second = VFloat{};
  }
  AUDIOKERNELS_INLINE VFloat end() {
    close();
    return total;
  }
};

#else

// sums[t][i] = sum over d < n of word(d, t) * panel[d][i]: nearly all time goes by here. The first step is a product,
// since to copy a zero into each sum takes as long as to add to it.
template <int V, class Word>
AK_INLINE void multiply(const float* panel, int64_t n, Word word, VFloat (&sum)[kTile][V]) {
  VFloat lanes[V];
  for (int i = 0; i < V; i++) lanes[i] = load(panel + i * kLanes);
  for (int t = 0; t < kTile; t++) {
    const VFloat x = broadcast(word(0, t));
    for (int i = 0; i < V; i++) sum[t][i] = product(x, lanes[i]);
  }
  for (int64_t d = 1; d < n; d++) {
    for (int i = 0; i < V; i++) lanes[i] = load(panel + d * kWidth + i * kLanes);
    for (int t = 0; t < kTile; t++) {
      const VFloat x = broadcast(word(d, t));
      for (int i = 0; i < V; i++) sum[t][i] = add_product(x, lanes[i], sum[t][i]);
    }
  }
}

// products[j][lane] = rows[j] . panel[lane] for the rows of a tile, rounded up to kTile, and the lanes that they see.
static inline void dot_rows(const float* rows, int64_t stride, const Tile& tile, const float* panel, int64_t words,
                            float* products) {
  for (int64_t j = 0; j < tile.rows; j += kTile, rows += kTile * stride, products += kTile * kWidth) {
    const float* row[kTile] = {rows};  // beyond the last row, that once more
    for (int t = 1; t < kTile; t++) row[t] = row[t - 1] + (j + t < tile.rows ? stride : 0);
    const int64_t first = least(tile.first_lane(j) / kLanes * kLanes, kWidth - kLanes);
    const int64_t end = tile.end_lane(least(j + kTile, tile.rows) - 1);
    with_vectors(end - first, [&]<int V>(Count<V>) {
      VFloat sum[kTile][V];
      multiply(panel + first, words, [&](int64_t d, int t) { return row[t] + d; }, sum);
      for (int t = 0; t < kTile; t++)
        for (int i = 0; i < V; i++) store(products + t * kWidth + first + i * kLanes, sum[t][i]);
    });
  }
}

// panel[d][lane] += sum_j rows[j][d] * weights[j][lane] for d < headdim (rounded up to kTile); of pairs half as many j.
template <int V>
static inline void add_rows(const float* rows, int64_t stride, int64_t count, const float* weights, int64_t headdim,
                            float* panel) {
  for (int64_t d = 0; d < headdim; d += kTile) {
    VFloat sum[kTile][V];
    const float* row = rows + d;
    multiply(
        weights, (count + kPerWord - 1) / kPerWord, [&](int64_t j, int t) { return row + kPerWord * j * stride + t; },
        sum);
    for (int t = 0; t < kTile; t++) {
      for (int i = 0; i < V; i++) {
        float* p = panel + (d + t) * kWidth + i * kLanes;
        store(p, load(p) + sum[t][i]);  // short sums first: they round less
      }
    }
  }
}
static inline void add_rows(const float* rows, int64_t stride, const Tile& tile, const float* weights, int64_t headdim,
                            float* panel) {
  with_vectors(tile.lanes, [&]<int V>(Count<V>) { add_rows<V>(rows, stride, tile.rows, weights, headdim, panel); });
}

// A sum over rows to the bit as that.
struct SumOfWords {
  VFloat total, sum{};
  AUDIOKERNELS_INLINE void add(VFloat a, VFloat b) { sum = add_product(a, b, sum); }
  AUDIOKERNELS_INLINE VFloat end() const { return total + sum; }
};

#endif

// Masks of a number each -> of the word that holds the first, or both.
AK_INLINE VInt seen_words(VInt first, VInt second) {
  return kPerWord == 1 ? first : (first & 0xFFFF) | (second & ~0xFFFF);
}

// add_rows where rows that a lane does not see may hold NaN; for the others the same to the bit.
static inline void add_seen_rows(const float* rows, int64_t stride, const Tile& tile, const float* weights,
                                 int64_t headdim, float* panel) {
  for (int i = 0; i < kVectors; i++) {
    for (int64_t d = 0; d < headdim; d++) {
      float* p = panel + d * kWidth + i * kLanes;
      SumOfWords sum{load(p)};
      for (int64_t j = 0; j < tile.rows; j += kPerWord) {
        const VFloat weight = load(weights + j / kPerWord * kWidth + i * kLanes);
        const VInt seen = seen_words(tile.visible(j, i), tile.visible(j + 1, i));
        sum.add((VFloat)((VInt)broadcast(sum_word(rows, stride, j, d)) & seen), weight);
      }
      store(p, sum.end());
    }
  }
}

// The weighted sum of a tile's rows, by whichever of the two it needs.
static inline void add_tile(const float* rows, int64_t stride, const Tile& tile, const float* weights, int64_t headdim,
                            float* panel) {
  const bool units = kUnitRows > kPerWord;  // which lie side by side
  const int64_t floats = attention_round_up(tile.rows, kUnitRows) * stride;
  if (!tile.whole() && !(units ? all_finite(rows, 0, 1, floats) : all_finite(rows, stride, tile.rows, headdim)))
    return add_seen_rows(rows, stride, tile, weights, headdim, panel);
  add_rows(rows, stride, tile, weights, headdim, panel);
}

}  // namespace
}  // namespace AUDIOKERNELS_ISA
}  // namespace audiokernels
