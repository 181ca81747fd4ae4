// The hot loops of haar_pool, compiled once per instruction set. A strip is 8 steps; a strip of a column of channels
// lies in registers. Lanes may have different levels; each lane's sums are the same on every instruction set.
//
// Levels up to 3 lie within a strip (causal: and the one before). Of a higher level, first the sums of all strips are
// taken (haar_pool_sums), then those of blocks or windows of strips (haar_pool_combine), by halves that double: nothing
// is subtracted. haar_pool_write adds what is left of a window at either end; if it writes a whole sequence in causal
// mode, it makes the sums too, and x is read from memory once.
#include "haar_rows.h"

namespace audiokernels {
namespace AUDIOKERNELS_ISA {
namespace {

using Strip = VFloat[kHaarStrip];

AK_INLINE float* sums_of(const HaarPool& c, const HaarColumn& column) {
  return c.sums + column.sums * c.strips() * kLanes;
}

// A step of a column; 0 outside of the sequence. `whole`: all of it is inside, and the column is a full vector.
template <class D, HaarMode mode, bool whole>
AK_INLINE VFloat step(const HaarPool& c, const HaarColumn& column, int64_t t) {
  if (!whole && (t < 0 || t >= c.seqlen)) return VFloat{};
  const auto* x = (const typename D::Number*)c.x + t * c.x_row + column.first;
  const VFloat v = whole ? D::load(x) : load_some<D>(x, column.n);
  if (mode == HaarMode::count_adjoint) return v / min(splat(float(c.seqlen - t)), load(column.width));
  return v;
}

// ---- sums of strips, and of blocks and windows of them ----

template <class D, HaarMode mode, bool whole>
AK_INLINE void load_strip(const HaarPool& c, const HaarColumn& column, int64_t strip, Strip& v) {
  for (int i = 0; i < kHaarStrip; i++) v[i] = step<D, mode, whole>(c, column, strip * kHaarStrip + i);
}

AK_INLINE VFloat sum_of(const Strip& v) { return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])); }

template <class D, HaarMode mode, bool whole>
AK_INLINE VFloat strip_sum(const HaarPool& c, const HaarColumn& column, int64_t strip) {
  Strip v;
  load_strip<D, mode, whole>(c, column, strip, v);
  return sum_of(v);
}

template <class D, HaarMode mode>
void strip_sums(const HaarPool& c, int64_t first, int64_t last) {
  for (int64_t strip = first; strip < last; strip++) {
    for (int64_t i = 0; i < c.n_columns; i++) {
      const HaarColumn& column = c.columns[i];
      if (column.sums < 0) continue;
      const auto* ahead = (const typename D::Number*)c.x + (strip + 2) * kHaarStrip * c.x_row + column.first;
      for (int k = 0; k < kHaarStrip && strip + 2 < c.strips(); k++) __builtin_prefetch(ahead + k * c.x_row);
      const bool whole = (strip + 1) * kHaarStrip <= c.seqlen && column.n == kLanes;
      store(sums_of(c, column) + strip * kLanes,
            whole ? strip_sum<D, mode, true>(c, column, strip) : strip_sum<D, mode, false>(c, column, strip));
    }
  }
}

// The mean of the block of 2^level steps that a strip lies in.
void combine_blocks(const HaarPool& c, const HaarColumn& column) {
  const VInt level = load_int(column.level);
  float* sums = sums_of(c, column);
  const int64_t strips = c.strips();
  for (int l = kHaarStripLevel + 1; l <= column.high; l++) {  // the first strip of a block takes its sum
    const int64_t block = int64_t(1) << (l - kHaarStripLevel);
    for (int64_t s = 0; s + block / 2 < strips; s += block) {
      const VFloat right = load(sums + (s + block / 2) * kLanes);
      store(sums + s * kLanes, load(sums + s * kLanes) + where(level >= splat_int(l), right));
    }
  }
  for (int i = 0; i < kLanes; i++) {  // a short last block
    const int64_t start = (c.seqlen - 1) >> column.level[i] << column.level[i];
    const int64_t length = c.seqlen - start, whole = int64_t(1) << column.level[i];
    float& sum = sums[start / kHaarStrip * kLanes + i];
    if (column.level[i] > kHaarStripLevel && length < whole) sum = sum / float(length) * float(whole);
  }
  const VFloat scale = (VFloat)((splat_int(127) - level) << 23);  // 2^-level
  for (int64_t s = 0; s < strips; s++) store(sums + s * kLanes, load(sums + s * kLanes) * scale);
  for (int l = column.high; l > kHaarStripLevel; l--) {  // and hands its mean down
    const int64_t block = int64_t(1) << (l - kHaarStripLevel);
    for (int64_t s = 0; s + block / 2 < strips; s += block) {
      float* right = sums + (s + block / 2) * kLanes;
      store(right, select(level >= splat_int(l), load(sums + s * kLanes), load(right)));
    }
  }
}

// The sum of the strips that lie wholly in the windows that end in `strip`, this one left out. The rings hold the sums
// of the 1, 2, 4 .. strips before: windows of `half` strips become twice as long.
AK_INLINE VFloat strips_before(const HaarPool& c, const HaarColumn& column, int64_t strip, VFloat window) {
  const VInt level = load_int(column.level);
  float* ring = c.rings + column.sums * c.ring_strips() * kLanes;
  VFloat sum{};
  for (int l = kHaarStripLevel + 1; l <= column.high; l++) {
    const int64_t half = int64_t(1) << (l - kHaarStripLevel - 1);
    float* slot = ring + (strip & (half - 1)) * kLanes;
    const VFloat before = where(level >= splat_int(l), load(slot));
    store(slot, window);
    sum += before;
    window += before;
    ring += half * kLanes;
  }
  return sum;
}

void combine_windows(const HaarPool& c, const HaarColumn& column) {
  float* sums = sums_of(c, column);
  for (int64_t s = 0; s < c.strips(); s++, sums += kLanes) store(sums, strips_before(c, column, s, load(sums)));
}

// ---- results ----

// The mean of a block that begins in the strip and has `left` steps, at most 2^level.
AK_INLINE VFloat mean(VFloat sum, int level, int64_t left) {
  return left >= 1 << level ? sum * splat(1.0f / (1 << level)) : sum / splat(float(left));
}

template <class D, bool whole>
AK_INLINE void block_means(const HaarPool& c, const HaarColumn& column, int64_t strip, Strip& v) {
  const VInt level = load_int(column.level);
  const int64_t left = whole ? kHaarStrip : c.seqlen - strip * kHaarStrip;
  VFloat pairs[4], fours[2], eight{};
  if (column.low <= kHaarStripLevel) {
    load_strip<D, HaarMode::block, whole>(c, column, strip, v);
    for (int i = 0; i < 4; i++) pairs[i] = v[2 * i] + v[2 * i + 1];
    for (int i = 0; i < 2; i++) fours[i] = pairs[2 * i] + pairs[2 * i + 1];
    eight = mean(fours[0] + fours[1], 3, left);
    for (int i = 0; i < 2; i++) fours[i] = mean(fours[i], 2, left - 4 * i);
    for (int i = 0; i < 4; i++) pairs[i] = mean(pairs[i], 1, left - 2 * i);
  }
  if (column.high > kHaarStripLevel) eight = select(level > 3, load(sums_of(c, column) + strip * kLanes), eight);
  if (column.low > 2) {
    for (VFloat& out : v) out = eight;
    return;
  }
  for (int i = 0; i < 8; i++) v[i] = select(level > 2, eight, select(level > 1, fours[i / 4], pairs[i / 2]));
}

// Sums of windows of up to 2^top steps: each doubling adds the window before.
template <class D, HaarMode mode, bool whole, int top>
AK_INLINE void short_windows(const HaarPool& c, const HaarColumn& column, int64_t strip, const Strip& x, Strip& sums) {
  constexpr int before = (1 << top) - 1, n = before + kHaarStrip;
  const VInt level = load_int(column.level);
  VFloat v[n];
  for (int i = 0; i < before; i++) v[i] = step<D, mode, whole>(c, column, strip * kHaarStrip + i - before);
  for (int i = before; i < n; i++) v[i] = x[i - before];
  AK_UNROLL
  for (int l = 1, half = 1; l <= top; l++, half *= 2) AK_UNROLL
  for (int i = n - 1; i >= 2 * half - 1; i--) v[i] += where(level >= splat_int(l), v[i - half]);
  for (int i = 0; i < kHaarStrip; i++) sums[i] = v[before + i];
}

// Sums of windows of more than 8 steps: the rest of the strip that lies 2^level steps back, the strips between, and the
// start of this one.
template <class D, HaarMode mode, bool whole>
AK_INLINE void long_windows(const HaarPool& c, const HaarColumn& column, int64_t strip, const Strip& x, Strip& sums) {
  const VInt level = load_int(column.level);
  const int64_t start = strip * kHaarStrip;
  const VFloat between =
      c.sums ? load(sums_of(c, column) + strip * kLanes) : strips_before(c, column, strip, sum_of(x));
  for (int i = 0; i < kHaarStrip; i++) sums[i] = VFloat{};
  constexpr uint64_t within = (1 << (kHaarStripLevel + 1)) - 1;
  for (uint64_t left = column.levels & ~within; left; left &= left - 1) {
    const int l = __builtin_ctzll(left);
    const int64_t back = start - (int64_t(1) << l);
    if (back < 0) break;
    for (int i = 1; i < kHaarStrip; i++)
      sums[i - 1] += where(level == splat_int(l), step<D, mode, whole>(c, column, back + i));
  }
  for (int i = kHaarStrip - 2; i >= 0; i--) sums[i] += sums[i + 1];
  VFloat here{};
  for (int i = 0; i < kHaarStrip; i++) {
    here += x[i];
    sums[i] = (sums[i] + between) + here;
  }
}

template <class D, HaarMode mode, bool whole>
AK_INLINE void window_means(const HaarPool& c, const HaarColumn& column, int64_t strip, Strip& v) {
  Strip x;
  load_strip<D, mode, whole>(c, column, strip, x);
  if (column.low <= kHaarStripLevel) {
    if (column.high == 1)
      short_windows<D, mode, whole, 1>(c, column, strip, x, v);
    else if (column.high == 2)
      short_windows<D, mode, whole, 2>(c, column, strip, x, v);
    else
      short_windows<D, mode, whole, 3>(c, column, strip, x, v);
  }
  if (column.high > kHaarStripLevel) {
    Strip sums;
    long_windows<D, mode, whole>(c, column, strip, x, sums);
    const VInt is_long = load_int(column.level) > kHaarStripLevel;
    for (int i = 0; i < kHaarStrip; i++) v[i] = column.low > kHaarStripLevel ? sums[i] : select(is_long, sums[i], v[i]);
  }
  const VFloat width = load(column.width), scale = load(column.scale);
  for (int i = 0; i < kHaarStrip; i++) {
    if (mode == HaarMode::window) v[i] *= scale;
    if (mode == HaarMode::count) v[i] /= min(splat(float(strip * kHaarStrip + i + 1)), width);
  }
}

template <class D, HaarMode mode, bool whole>
AK_INLINE void write_strip(const HaarPool& c, const HaarColumn& column, int64_t strip) {
  Strip v;
  if constexpr (mode == HaarMode::block)
    block_means<D, whole>(c, column, strip, v);
  else
    window_means<D, mode, whole>(c, column, strip, v);
  typename D::Number* y = (typename D::Number*)c.y + strip * kHaarStrip * c.y_row + column.first;
  const int64_t steps = whole ? kHaarStrip : least(kHaarStrip, c.seqlen - strip * kHaarStrip);
  for (int i = 0; i < steps; i++) store_some<D>(y + i * c.y_row, v[i], whole ? kLanes : column.n);
}

template <class D, HaarMode mode>
AK_INLINE void write(const HaarPool& c, const HaarColumn& column, int64_t strip) {
  if (strip > 0 && (strip + 1) * kHaarStrip <= c.seqlen && column.n == kLanes)
    write_strip<D, mode, true>(c, column, strip);
  else
    write_strip<D, mode, false>(c, column, strip);
}

template <class D>
AK_INLINE void copy_steps(const HaarPool& c, int64_t first, int64_t last) {
  const int64_t bytes = sizeof(typename D::Number), x_row = c.x_row * bytes, y_row = c.y_row * bytes;
  for (int64_t run = 0; run < c.n_copied; run++) {
    const int64_t offset = c.copied[2 * run] * bytes, n = c.copied[2 * run + 1] * bytes;
    const char* x = (const char*)c.x + first * x_row + offset;
    char* y = (char*)c.y + first * y_row + offset;
    for (int64_t t = first; t < last; t++, x += x_row, y += y_row) {
      int64_t i = 0;
      for (; i + int64_t(sizeof(VInt)) <= n; i += sizeof(VInt)) {
        const VInt v = load_int(x + i);
        memcpy(y + i, &v, sizeof v);
      }
      if (i < n) memcpy(y + i, x + i, n - i);
    }
  }
}

// A strip ahead, of what is read and of what is written.
template <class D>
AK_INLINE void prefetch_strip(const HaarPool& c, int64_t strip) {
  typedef typename D::Number Number;
  for (int64_t t = strip * kHaarStrip; t < least(c.seqlen, (strip + 1) * kHaarStrip); t++) {
    const char* x = (const char*)((const Number*)c.x + t * c.x_row);
    const char* y = (const char*)((const Number*)c.y + t * c.y_row);
    for (int64_t i = 0; i < c.dim * int64_t(sizeof(Number)); i += 64) {
      __builtin_prefetch(x + i);
      __builtin_prefetch(y + i, 1);
    }
  }
}

template <class D, HaarMode mode>
void write_part(const HaarPool& c, const HaarPart& part) {
  const bool in_place = c.y == c.x;
  for (int64_t i = part.first_strip; i < part.last_strip; i++) {
    const int64_t strip = in_place ? part.last_strip - 1 - (i - part.first_strip) : i;  // no window needs it any more
    if (!in_place) prefetch_strip<D>(c, strip + 1);
    if (!in_place) copy_steps<D>(c, strip * kHaarStrip, least(c.seqlen, (strip + 1) * kHaarStrip));
    for (int64_t k = part.first_column; k < part.last_column; k++) write<D, mode>(c, c.columns[k], strip);
  }
}

template <HaarMode>
struct Mode {};

template <class D, class F>
AK_INLINE void by_mode(const HaarPool& c, const F& f) {
  switch (c.mode) {
    case HaarMode::block: return f(D{}, Mode<HaarMode::block>{});
    case HaarMode::window: return f(D{}, Mode<HaarMode::window>{});
    case HaarMode::count: return f(D{}, Mode<HaarMode::count>{});
    default: return f(D{}, Mode<HaarMode::count_adjoint>{});
  }
}

template <class F>
AK_INLINE void by_dtype_and_mode(const HaarPool& c, const F& f) {
  switch (c.dtype) {
    case Dtype::bfloat16: return by_mode<BFloat16>(c, f);
    case Dtype::float16: return by_mode<Float16>(c, f);
    default: return by_mode<Float32>(c, f);
  }
}

}  // namespace

int haar_lanes() { return kLanes; }

void haar_pool_sums(const HaarPool& c, int64_t first, int64_t last) {
  by_dtype_and_mode(c, [&]<class D, HaarMode mode>(D, Mode<mode>) { strip_sums<D, mode>(c, first, last); });
}

void haar_pool_combine(const HaarPool& c, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++) {
    if (c.columns[i].sums < 0) continue;
    if (c.mode == HaarMode::block)
      combine_blocks(c, c.columns[i]);
    else
      combine_windows(c, c.columns[i]);
  }
}

void haar_pool_write(const HaarPool& c, const HaarPart& part) {
  by_dtype_and_mode(c, [&]<class D, HaarMode mode>(D, Mode<mode>) { write_part<D, mode>(c, part); });
}

}  // namespace AUDIOKERNELS_ISA
}  // namespace audiokernels
