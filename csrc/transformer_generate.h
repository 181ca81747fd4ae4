// Transformer generation on the CPU: the sizes and the packed layout (audiokernels/transformer_pack.py).
#pragma once

#include <cstdint>

#include "generation.h"
#include "isa.h"

namespace audiokernels {

constexpr int64_t kKeyBlock = 64;  // keys side by side in the cache

enum TransformerPositions : int64_t { kRotary = 0, kSinusoidal = 1 };
enum TransformerFusion : int64_t { kNoFusion = 0, kFuseLogits = 1, kFuseAdd = 2, kFuseFilm = 3 };

// TransformerShape.to_ints() of the Python side, in its order; the functions mirror those of transformer_pack.py.
struct TransformerShape {
  int64_t dtype, cache, n_layer, n_head, n_embd, n_inner, n_class, window, positions, fusion;
  int64_t context, code, condition, hop, n_width;
  const int64_t* widths;
  const int64_t* haar;  // (level, count) pairs
  int64_t n_haar;       // of them

  int64_t headdim() const;
  int64_t head_rows() const;
  int64_t heads_rows() const;  // of q, of k and of v
  int64_t capacity() const;
  int64_t angles() const;  // of a position
  int64_t context_rows(int64_t layer) const;
  int64_t fuse_rows() const;
  int64_t table_bytes() const;
  int64_t pack_bytes() const;
  int64_t key_floats() const;  // of a layer's cache, in 32-bit numbers
  int64_t value_floats() const;
  int64_t haar_floats() const;  // of a layer
  int64_t state_floats() const;
  int64_t most_width() const;
  int64_t max_inputs() const;                   // the longest padded input row of a matrix
  int64_t scratch_floats(int64_t batch) const;  // see Scratch in transformer_generate_simd.cpp
};

// Reads and checks the ints of the op's schema; the shape points into them.
TransformerShape transformer_shape(const int64_t* ints, int64_t count);

#define AUDIOKERNELS_DECLARE(isa)                                                \
  namespace isa {                                                                \
  void transformer_run(const TransformerShape& shape, const GenerationJob& job); \
  }
AUDIOKERNELS_FOR_EACH_ISA(AUDIOKERNELS_DECLARE)
#undef AUDIOKERNELS_DECLARE

}  // namespace audiokernels
