// Intel's AMX: eight tile registers of 16 rows of 64 bytes each, and products of them (Intel's manual, volume 1,
// chapter "Programming with Intel AMX"). Here rows are always whole: what is shorter is padded with zeros by the
// caller. Tiles may have fewer of them (set_rows): then so have loads, stores and products, which take less time.
//
// A product adds to c (16, 16) the product of a (16, 16) and b (16, 16), all of 32-bit words; a word of a holds a pair
// of bfloat16, or four int8, that are neighbours along the sum, and so does a word of b.
#pragma once

#include "simd.h"

#if defined(AUDIOKERNELS_TILES)
namespace audiokernels {
namespace AUDIOKERNELS_ISA {
namespace {

constexpr int kTileRows = 16, kTileWords = 16;

struct TileConfig {
  uint8_t bytes[64];
};

#if !defined(AUDIOKERNELS_EMULATE)
// By assembly, since gcc's own functions do not say that they read and write memory.
AK_INLINE void set_tiles(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
AK_INLINE TileConfig tile_config() {
  TileConfig config;
  asm volatile("sttilecfg %0" : "=m"(config)::"memory");
  return config;
}
AK_INLINE void release_tiles() { asm volatile("tilerelease" ::: "memory"); }
template <int t>
AK_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(t));
}
// Rows are `stride` bytes apart.
template <int t>
AK_INLINE void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(t), "r"(from), "r"(stride) : "memory");
}
template <int t>
AK_INLINE void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(t), "r"(to), "r"(stride) : "memory");
}
template <int c, int a, int b>
AK_INLINE void add_bfloat16_product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
// a: unsigned, b: signed
template <int c, int a, int b>
AK_INLINE void add_int8_product() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
#else
// The same as Intel's manual defines it, for tests on a processor without it.
thread_local int32_t emulated_tiles[8][kTileRows][kTileWords];
thread_local TileConfig emulated_config;
AK_INLINE void set_tiles(const TileConfig& config) { emulated_config = config; }
AK_INLINE TileConfig tile_config() { return emulated_config; }
AK_INLINE void release_tiles() { emulated_config = {}; }
template <int t>
AK_INLINE void zero_tile() {
  memset(emulated_tiles[t], 0, sizeof emulated_tiles[t]);
}
template <int t>
AK_INLINE void load_tile(const void* from, int64_t stride) {
  zero_tile<t>();
  for (int i = 0; i < emulated_config.bytes[48 + t]; i++)
    memcpy(emulated_tiles[t][i], static_cast<const char*>(from) + i * stride, 64);
}
template <int t>
AK_INLINE void store_tile(void* to, int64_t stride) {
  for (int i = 0; i < emulated_config.bytes[48 + t]; i++)
    memcpy(static_cast<char*>(to) + i * stride, emulated_tiles[t][i], 64);
}
template <int c, int a, int b>
AK_INLINE void add_bfloat16_product() {  // the even products of a sum and the odd ones apart, each rounded once
  for (auto& row : emulated_tiles[c]) {
    const int32_t* x = emulated_tiles[a][&row - emulated_tiles[c]];
    VFloat even{}, odd{};
    for (int k = 0; k < kTileWords; k++) {
      const VInt y = load_int(emulated_tiles[b][k]);
      even = flush(fma(flush((VFloat)(splat_int(x[k]) << 16)), flush((VFloat)(y << 16)), even));
      odd = flush(
          fma(flush((VFloat)(splat_int(x[k]) & int32_t(0xFFFF0000))), flush((VFloat)(y & int32_t(0xFFFF0000))), odd));
    }
    VFloat sum;
    memcpy(&sum, row, sizeof sum);
    sum = flush(flush(sum) + flush(even + odd));
    memcpy(row, &sum, sizeof sum);
  }
}
template <int c, int a, int b>
AK_INLINE void add_int8_product() {
  for (int i = 0; i < kTileRows; i++)
    for (int j = 0; j < kTileWords; j++)
      for (int k = 0; k < kTileWords; k++)
        for (int byte = 0; byte < 32; byte += 8)
          emulated_tiles[c][i][j] += (emulated_tiles[a][i][k] >> byte & 0xFF) * int8_t(emulated_tiles[b][k][j] >> byte);
}
#endif

// Tiles 0 .. count - 1 have `rows` rows from here on, the others 16; all are zero.
AK_INLINE void set_rows(int count, int64_t rows) {
  TileConfig config{};
  config.bytes[0] = 1;  // the palette
  for (int t = 0; t < 8; t++) {
    config.bytes[16 + 2 * t] = 64;  // bytes of a row
    config.bytes[48 + t] = t < count ? uint8_t(rows) : kTileRows;
  }
  set_tiles(config);
}
// All eight tiles are whole from here on; what is returned ends that. (Not a destructor: see flush_subnormals.)
AK_INLINE TileConfig begin_tiles() {
  const TileConfig before = tile_config();
  set_rows(0, kTileRows);
  return before;
}
AK_INLINE void end_tiles(const TileConfig& before) {
  if (before.bytes[0])
    set_tiles(before);
  else
    release_tiles();
}

// ---- products of matrices ----

// Of 32-bit words, `stride` from row to row. What of it meets the tile t of sums begins t * `next` further on, and the
// 16 words of a sum that come after the first ones `chunk` further on.
struct TileFactor {
  const float* words;
  int64_t stride, chunk, next;
};

template <int n>
struct TileCount {};
template <int n, class Call>
AK_INLINE void for_each_tile(Call call) {  // call(TileCount<0>{}), ..., call(TileCount<n - 1>{})
  if constexpr (n > 0) {
    for_each_tile<n - 1>(call);
    call(TileCount<n - 1>{});
  }
}
template <int n, class Call>
AK_INLINE void with_tiles(int64_t count, Call call) {  // call(TileCount<count>{}), count 1..n
  if constexpr (n > 1)
    if (count < n) return with_tiles<n - 1>(count, call);
  call(TileCount<n>{});
}

constexpr int kSumTiles = 4;  // registers for sums; the others hold what is multiplied

// sums[t] = left[t] right for t < n, or += where `add`: left (16, 16 chunks), right (16 chunks, 16), both in pairs of
// bfloat16; sums (16, 16), rows `stride` apart, tiles `next`.
template <int n, bool add>
AK_INLINE void multiply_tiles(const TileFactor& left, const TileFactor& right, int64_t chunks, float* sums,
                              int64_t stride, int64_t next) {
  for_each_tile<n>([&]<int t>(TileCount<t>) {
    if constexpr (add)
      load_tile<t>(sums + t * next, 4 * stride);
    else
      zero_tile<t>();
  });
  for (int64_t c = 0; c < chunks; c++) {
    load_tile<7>(right.words + c * right.chunk, 4 * right.stride);
    for_each_tile<n>([&]<int t>(TileCount<t>) {
      constexpr int kLeft = kSumTiles + t % 3;  // of three, so that one is loaded while another is multiplied
      load_tile<kLeft>(left.words + t * left.next + c * left.chunk, 4 * left.stride);
      add_bfloat16_product<t, kLeft, 7>();
    });
  }
  for_each_tile<n>([&]<int t>(TileCount<t>) { store_tile<t>(sums + t * next, 4 * stride); });
}

}  // namespace
}  // namespace AUDIOKERNELS_ISA
}  // namespace audiokernels
#endif
