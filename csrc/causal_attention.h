// Fused causal attention on the CPU; audiokernels/causal_attention.py defines it.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace audiokernels {

// Never a shared inline copy: this header is compiled once per instruction set.
#define AUDIOKERNELS_INLINE __attribute__((always_inline)) inline

// A (batch, heads, rows, headdim) tensor of the call's dtype; strides in elements.
struct AttentionTensor {
  char* data;
  int64_t stride[4];
};

// How many numbers of a sum lie side by side in a 32-bit word, the unit of what the inner loops multiply: a float32, or
// a pair of bfloat16 where the instruction set multiplies such pairs.
constexpr int64_t attention_per_word(Isa isa) { return isa >= Isa::avx512_bf16 ? 2 : 1; }

// Rows that are read at a time, and at whose multiples tiles begin. Tile registers sum over 16 words, 32 rows.
constexpr int64_t attention_unit_rows(Isa isa) { return isa == Isa::avx512_amx ? 32 : attention_per_word(isa); }

// What a pair's two numbers are: neighbouring channels of a row, for products of rows, or neighbouring rows (an even
// one and the next) of a channel, for sums over rows.
enum class AttentionPairs { channels, rows };

// The same in words: the caller's own memory (float32), or a copy padded with zeros. Pairs of rows: the even row's;
// for tile registers a unit's words of a channel side by side, (units, channels, 16).
struct AttentionRows {
  const float* data;
  int64_t stride[3];
  AUDIOKERNELS_INLINE const float* at(int64_t b, int64_t h) const { return data + b * stride[0] + h * stride[1]; }
};

constexpr double kAttentionLog2E = 1.4426950408889634;

struct AttentionSizes {
  int64_t batch, nheads, nheads_kv, seqlen_q, seqlen_k, headdim;
  int64_t window;  // keys that a query sees, itself among them; at most seqlen_k
  double scale;
  Dtype dtype;
  int64_t group;  // query heads that share keys and values

  AUDIOKERNELS_INLINE int64_t key_of(int64_t q) const {
    return q + seqlen_k - seqlen_q;
  }  // the last key that query q sees
  AUDIOKERNELS_INLINE float factor() const { return float(scale * kAttentionLog2E); }  // of scores, in powers of 2
};

constexpr int64_t kAttentionUnit = 192;     // queries in a unit of forward work, a multiple of every block of queries
constexpr int64_t kAttentionMostRows = 64;  // in a tile of any instruction set
constexpr int64_t kAttentionDecodeKeys = 128;  // read at a time by attention_decode
constexpr int64_t kAttentionMostLanes = 64;

constexpr int64_t attention_rows(Isa isa) { return isa == Isa::avx512_amx ? 64 : 48; }  // of a tile

// Keys of a unit of backward work, a multiple of a tile's lanes. Tile registers are so fast that reading queries takes
// time: more keys meet them at once.
constexpr int64_t attention_block_keys(Isa isa) { return isa == Isa::avx512_amx ? 192 : 48; }
constexpr int64_t kAttentionMostKeys = 192;

// To what headdim is padded: words fill vectors, those of tile registers tiles.
constexpr int64_t attention_channels(Isa isa) { return isa == Isa::avx512_amx ? 32 : 16; }

AUDIOKERNELS_INLINE int64_t attention_round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

struct AttentionForward : AttentionSizes {
  AttentionTensor q, out;
  AttentionRows k, v;  // channels: headdim rounded up to 8; pairs of channels, of rows
  float* lse;          // (batch, nheads, seqlen_q)

  AUDIOKERNELS_INLINE int64_t units_per_head() const { return (seqlen_q + kAttentionUnit - 1) / kAttentionUnit; }
  AUDIOKERNELS_INLINE int64_t scratch_floats() const {
    const int64_t channels = attention_round_up(headdim, 16);
    return kAttentionMostLanes * (channels + kAttentionMostRows) + kAttentionUnit * 2 * channels;
  }
};

// A unit of work is a segment of the keys of a kv head; dq is summed over the segments at the end, in their order. So
// the result does not depend on the threads.
struct AttentionBackward : AttentionSizes {
  AttentionTensor grad_out, q, k, v, out, dq, dk, dv;
  AttentionRows q_rows, grad_rows;  // channels: headdim rounded up to 8; pairs of channels
  AttentionRows q_sums, grad_sums;  // pairs of rows; without pairs the same
  const float *lse, *grad_lse;      // (batch, nheads, seqlen_q); grad_lse may be null
  int64_t segments, block_keys;     // block_keys: attention_block_keys
  // By attention_pack: a query's weights are 2^(scores - reference) times a factor, which lies in its gradients, or is
  // 1 where these are pairs.
  float* grad_floats;  // (batch, nheads, row_floats()): factor * grad_out; not for pairs
  float* row_numbers;  // (batch, nheads, 2, padded_queries()): reference, factor * (grad_lse - D)
  float* dq_parts;     // (batch, nheads, segments, row_floats())

  AUDIOKERNELS_INLINE int64_t padded_queries() const { return attention_round_up(seqlen_q, kAttentionUnit); }
  AUDIOKERNELS_INLINE int64_t channels() const { return attention_round_up(headdim, 16); }
  AUDIOKERNELS_INLINE int64_t row_floats() const { return (padded_queries() + kAttentionMostRows) * channels(); }
  AUDIOKERNELS_INLINE int64_t units_per_head() const { return padded_queries() / kAttentionUnit; }
  AUDIOKERNELS_INLINE int64_t key_blocks() const { return (seqlen_k + block_keys - 1) / block_keys; }
  AUDIOKERNELS_INLINE int64_t scratch_floats() const {
    return kAttentionMostKeys * 5 * channels() + kAttentionMostLanes * 3 * kAttentionMostRows;
  }
};

// seqlen_q new positions against caches of seqlen_k slots: position p lies in slot p % seqlen_k.
struct AttentionDecode : AttentionSizes {
  AttentionTensor q, k_cache, v_cache, out;
  const int32_t* cache_seqlens;  // positions before the new ones
  int64_t cache_seqlens_stride;

  AUDIOKERNELS_INLINE int64_t units() const { return batch * nheads_kv; }
  AUDIOKERNELS_INLINE int64_t queries() const { return group * seqlen_q; }  // of a unit
  AUDIOKERNELS_INLINE int64_t scratch_floats() const {
    const int64_t channels = attention_round_up(headdim, 16);
    return kAttentionDecodeKeys * (1 + 2 * channels) + queries() * (2 * channels + 32);
  }
};

// Of attention_read: a unit is attention_unit_rows of a head of a (batch, heads, rows, headdim) tensor; they become
// words, with zeros in the padding. Of attention_backward: (batch, kv head, segment); of attention_decode: (batch, kv
// head). Others: (batch, head, block of kAttentionUnit queries).
#define AUDIOKERNELS_DECLARE(isa)                                                                                      \
  namespace isa {                                                                                                      \
  void attention_read(const AttentionTensor& t, const int64_t* sizes, Dtype dtype, AttentionPairs pairs, float* words, \
                      int64_t channels, int64_t first, int64_t last);                                                  \
  void attention_forward(const AttentionForward& call, int64_t first_unit, int64_t last_unit, float* scratch);         \
  void attention_pack(const AttentionBackward& call, int64_t first_unit, int64_t last_unit, float* scratch);           \
  void attention_backward(const AttentionBackward& call, int64_t first_unit, int64_t last_unit, float* scratch);       \
  void attention_write_dq(const AttentionBackward& call, int64_t first_unit, int64_t last_unit, float* scratch);       \
  void attention_decode(const AttentionDecode& call, int64_t first_unit, int64_t last_unit, float* scratch);           \
  }
AUDIOKERNELS_FOR_EACH_BFLOAT16_ISA(AUDIOKERNELS_DECLARE)
#undef AUDIOKERNELS_DECLARE

}  // namespace audiokernels
