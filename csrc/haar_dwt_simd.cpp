// The hot loops of haar_dwt and haar_idwt, compiled once per instruction set. A stage takes up to three levels at a
// time in registers. Of the rows between two stages a strip is kept, which goes on as soon as it is full.
#include "haar_rows.h"

namespace audiokernels {
namespace AUDIOKERNELS_ISA {
namespace {

constexpr float kScale[] = {1.0f, 0x1.6a09e6p-1f, 0.5f, 0x1.6a09e6p-2f};  // 2^(-levels / 2)

struct Channels {
  int64_t first, last;
};

// One strip of a stage: 2^levels rows and what they become.
struct Strip {
  void* rows[kHaarStrip];              // null: zeros where read, nothing where written
  void* sum;                           // a of the last level
  void* details[kHaarStripLevel + 1];  // the first row of d of each level
  int64_t detail_row;
};

// n channels from c on.
template <class Row, class Sum, class D, int levels>
AK_INLINE void analyse(const Strip& strip, int64_t c, int64_t n) {
  typedef typename D::Number Number;
  VFloat v[1 << levels];
  for (int i = 0; i < 1 << levels; i++)
    v[i] = strip.rows[i] ? load_some<Row>((const typename Row::Number*)strip.rows[i] + c, n) : VFloat{};
  AK_UNROLL
  for (int l = 1; l <= levels; l++) {
    AK_UNROLL
    for (int i = 0; i < 1 << (levels - l); i++) {
      const VFloat sum = v[2 * i] + v[2 * i + 1], difference = v[2 * i] - v[2 * i + 1];
      v[i] = sum;
      store_some<D>((Number*)strip.details[l] + i * strip.detail_row + c, difference * splat(kScale[l]), n);
    }
  }
  store_some<Sum>((typename Sum::Number*)strip.sum + c, v[0] * splat(kScale[levels]), n);
}

template <class Row, class Sum, class D, int levels>
AK_INLINE void synthesise(const Strip& strip, int64_t c, int64_t n) {
  typedef typename D::Number Number;
  VFloat v[1 << levels];
  v[0] = load_some<Sum>((const typename Sum::Number*)strip.sum + c, n) * splat(kScale[levels]);
  AK_UNROLL
  for (int l = levels; l >= 1; l--) {
    AK_UNROLL
    for (int i = (1 << (levels - l)) - 1; i >= 0; i--) {
      const Number* detail = (const Number*)strip.details[l] + i * strip.detail_row + c;
      const VFloat sum = v[i], difference = load_some<D>(detail, n) * splat(kScale[l]);
      v[2 * i] = sum + difference;
      v[2 * i + 1] = sum - difference;
    }
  }
  for (int i = 0; i < 1 << levels; i++)
    if (strip.rows[i]) store_some<Row>((typename Row::Number*)strip.rows[i] + c, v[i], n);
}

template <bool forward, class Row, class Sum, class D, int levels>
AK_INLINE void transform(const Strip& strip, Channels channels) {
  constexpr auto* part = forward ? &analyse<Row, Sum, D, levels> : &synthesise<Row, Sum, D, levels>;
  int64_t c = channels.first;
  for (; c + kLanes <= channels.last; c += kLanes) part(strip, c, kLanes);
  if (c < channels.last) part(strip, c, channels.last - c);
}

// The transform of a stage's strip number k; a stage's rows are x for the first, else in scratch, and so is its sum
// except for the last.
template <bool forward, class D>
struct Transform {
  typedef typename D::Number Number;
  const HaarWavelet& w;
  Channels channels;

  int levels(int64_t stage) const { return int(least(kHaarStripLevel, w.n_levels - stage * kHaarStripLevel)); }
  bool last(int64_t stage) const { return stage + 1 == haar_wavelet_stages(w.n_levels); }
  float* scratch(int64_t stage, int64_t row) const { return w.scratch + (stage * kHaarStrip + row) * w.dim; }
  Number* coefficients(int64_t row) const { return (Number*)w.coeffs + row * w.coeffs_row; }

  Strip strip_of(int64_t stage, int64_t k) const {
    Strip s{};
    const int count = 1 << levels(stage);
    for (int i = 0; i < count; i++) {
      int64_t t = k * count + i;
      if (forward && w.edge && t >= w.seqlen) t = w.seqlen - 1;
      if (stage > 0)
        s.rows[i] = scratch(stage, i);
      else if (t < w.seqlen)
        s.rows[i] = (Number*)w.x + t * w.x_row;
    }
    s.sum = last(stage) ? (void*)coefficients(k) : scratch(stage + 1, k % (1 << levels(stage + 1)));
    s.detail_row = w.coeffs_row;
    for (int l = 1; l <= levels(stage); l++)
      s.details[l] = coefficients((w.padded >> (stage * kHaarStripLevel + l)) + (k << (levels(stage) - l)));
    return s;
  }

  template <class Row, class Sum>
  void run(const Strip& strip, int levels) const {
    switch (levels) {
      case 0: return transform<forward, Row, Sum, D, 0>(strip, channels);
      case 1: return transform<forward, Row, Sum, D, 1>(strip, channels);
      case 2: return transform<forward, Row, Sum, D, 2>(strip, channels);
      default: return transform<forward, Row, Sum, D, 3>(strip, channels);
    }
  }

  void run(int64_t stage, int64_t k) const {
    const Strip strip = strip_of(stage, k);
    if (stage == 0 && last(stage))
      run<D, D>(strip, levels(stage));
    else if (stage == 0)
      transform<forward, D, Float32, D, kHaarStripLevel>(strip, channels);
    else if (last(stage))
      run<Float32, D>(strip, levels(stage));
    else
      transform<forward, Float32, Float32, D, kHaarStripLevel>(strip, channels);
  }
};

template <class D>
void dwt(const HaarWavelet& w, Channels channels) {
  const Transform<true, D> t{w, channels};
  const int64_t strips = w.padded >> t.levels(0);
  for (int64_t k = 0; k < strips; k++) {
    t.run(0, k);
    int64_t row = k;  // of the next stage, whose strip may be full now
    for (int64_t stage = 1; !t.last(stage - 1); stage++) {
      const int64_t count = 1 << t.levels(stage);
      if ((row + 1) % count) break;
      row /= count;
      t.run(stage, row);
    }
  }
}

template <class D>
void idwt_from(const Transform<false, D>& t, int64_t stage, int64_t k) {
  if (k << (stage * kHaarStripLevel + t.levels(stage)) >= t.w.seqlen) return;
  t.run(stage, k);
  if (stage == 0) return;
  const int count = 1 << t.levels(stage);
  for (int i = 0; i < count; i++) idwt_from(t, stage - 1, k * count + i);
}

template <class D>
void idwt(const HaarWavelet& w, Channels channels) {
  const Transform<false, D> t{w, channels};
  for (int64_t k = 0; k < w.padded >> w.n_levels; k++) idwt_from(t, haar_wavelet_stages(w.n_levels) - 1, k);
}

}  // namespace

void haar_dwt(const HaarWavelet& w, int64_t first, int64_t last) {
  switch (w.dtype) {
    case Dtype::bfloat16: return dwt<BFloat16>(w, {first, last});
    case Dtype::float16: return dwt<Float16>(w, {first, last});
    default: return dwt<Float32>(w, {first, last});
  }
}

void haar_idwt(const HaarWavelet& w, int64_t first, int64_t last) {
  switch (w.dtype) {
    case Dtype::bfloat16: return idwt<BFloat16>(w, {first, last});
    case Dtype::float16: return idwt<Float16>(w, {first, last});
    default: return idwt<Float32>(w, {first, last});
  }
}

}  // namespace AUDIOKERNELS_ISA
}  // namespace audiokernels
