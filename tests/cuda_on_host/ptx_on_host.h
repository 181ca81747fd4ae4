// The functions of csrc/ptx.h for the host, in its order.
#pragma once

#include "cuda.h"
#include "cuda_on_host.h"

namespace audiokernels::ptx {

namespace host = cuda_on_host;

// ---- memory and special registers

inline char* dynamic_shared() { return reinterpret_cast<char*>(host::current->block->shared); }
inline uint32_t shared_address(const void* p) { return host::address_of(p); }
[[noreturn]] inline void trap() { host::fail("trap"); }
inline uint64_t nanoseconds() { return host::launch_now->timer += 10; }
inline uint32_t clock() { return uint32_t(host::launch_now->timer += 10); }
inline int opaque(int x) { return x; }
inline void prefetch(const void* p) { static_cast<void>(*static_cast<const volatile char*>(p)); }

// ---- arithmetic

inline float tanh_approx(float x) {  // as far off as the instruction may be: 2^-11 of the value
  return __uint_as_float(__float_as_uint(std::tanh(x)) & 0xfffff000u);
}

inline float exp2_approx(float x) {  // as far off as it may be, but for whole x; results below 2^-126 are 0
  const float y = float(std::exp2(double(x)));
  return y < 0x1p-126f ? 0.0f : __uint_as_float(__float_as_uint(y) & 0xfffffffeu);
}

struct Float16 {};
struct BFloat16 {};

inline float to_float(uint16_t bits, Float16) { return __half2float({bits}); }
inline float to_float(uint16_t bits, BFloat16) { return __bfloat162float({bits}); }

// Lane i holds, of c, rows i / 4 and i / 4 + 8, columns i % 4 * 2 and the next; of a the same rows, columns i % 4 * 2,
// the next, and those 8 on; of b those rows of the column i / 4.
template <class Type>
void mma(float (&c)[4], const uint4& a, const uint2& b, Type type) {
  struct In {
    uint32_t a[4], b[2];
    float c[4];
  };
  struct Out {
    float c[4];
  };
  const In in{{a.x, a.y, a.z, a.w}, {b.x, b.y}, {c[0], c[1], c[2], c[3]}};
  const Out out = host::collective<In, Out>(0xffffffffu, "mma", in, [type](const In* in, Out* out) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; lane++)
      for (int half = 0; half < 2; half++) {
        const int shift = 16 * half, pair = lane % 4 * 2 + half;
        for (int i = 0; i < 4; i++)
          left[lane / 4 + i % 2 * 8][pair + i / 2 * 8] = to_float(uint16_t(in[lane].a[i] >> shift), type);
        for (int i = 0; i < 2; i++) right[pair + i * 8][lane / 4] = to_float(uint16_t(in[lane].b[i] >> shift), type);
      }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = in[lane].c[i];
        for (int k = 0; k < 16; k++) sum += double(left[row][k]) * right[k][column];
        out[lane].c[i] = float(sum);
      }
  });
  memcpy(c, out.c, sizeof out.c);
}

inline void mma_first(float (&c)[4], const uint4& a, const uint2& b, BFloat16 type) {
  for (float& sum : c) sum = 0;
  mma(c, a, b, type);
}

template <int Matrices, bool Trans>
uint4 load_matrix(uint32_t address) {
  struct Out {
    uint32_t m[4];
  };
  const Out out = host::collective<uint32_t, Out>(0xffffffffu, "ldmatrix", address, [](const uint32_t* in, Out* out) {
    for (int m = 0; m < Matrices; m++)
      for (int row = 0; row < 8; row++) {
        const unsigned char* bytes = host::at(in[m * 8 + row], 16, 16, "ldmatrix");
        for (int column = 0; column < 8; column++) {
          uint16_t element;
          memcpy(&element, bytes + 2 * column, 2);
          const int i = Trans ? column : row, j = Trans ? row : column;
          uint32_t& word = out[i * 4 + j / 2].m[m];
          word = (word & (j % 2 ? 0xffffu : 0xffff0000u)) | uint32_t(element) << (j % 2 * 16);
        }
      }
  });
  return {out.m[0], out.m[1], out.m[2], out.m[3]};
}
inline uint4 load_matrix_x4(uint32_t address) { return load_matrix<4, false>(address); }
inline uint4 load_matrix_x4_trans(uint32_t address) { return load_matrix<4, true>(address); }
inline uint2 load_matrix_x2_trans(uint32_t address) {
  const uint4 m = load_matrix<2, true>(address);
  return {m.x, m.y};
}

inline uint32_t pack(float low, float high, Float16) {
  return __float2half_rn(low).bits | uint32_t(__float2half_rn(high).bits) << 16;
}
inline uint32_t pack(float low, float high, BFloat16) {
  return __float2bfloat16_rn(low).bits | uint32_t(__float2bfloat16_rn(high).bits) << 16;
}
template <class Type>
float half_of(uint32_t word, int high, Type type) {
  return to_float(uint16_t(word >> 16 * high), type);
}

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | uint64_t(b) << 32;
  uint32_t word = 0;
  for (int i = 0; i < 4; i++) word |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return word;
}
inline uint32_t subtract_two(uint32_t a, uint32_t b) {
  const Float16 type;
  return pack(half_of(a, 0, type) - half_of(b, 0, type), half_of(a, 1, type) - half_of(b, 1, type), type);
}
inline uint32_t multiply_two(uint32_t a, uint32_t b) {
  const Float16 type;
  return pack(half_of(a, 0, type) * half_of(b, 0, type), half_of(a, 1, type) * half_of(b, 1, type), type);
}

// Rounded once: to odd in float, then to nearest.
inline uint16_t bfloat_of(double x) {
  float near = float(x);
  uint32_t bits = __float_as_uint(near);
  if (x == x && double(near) != x) {
    if (std::fabs(double(near)) > std::fabs(x)) bits--;
    bits |= 1;
  }
  return __float2bfloat16_rn(__uint_as_float(bits)).bits;
}
inline uint32_t fma_two(uint32_t a, uint32_t b, uint32_t c, BFloat16 type) {
  uint32_t word = 0;
  for (int i = 0; i < 2; i++)
    word |= uint32_t(bfloat_of(double(half_of(a, i, type)) * half_of(b, i, type) + half_of(c, i, type))) << 16 * i;
  return word;
}
inline uint32_t multiply_two(uint32_t a, uint32_t b, BFloat16 type) { return fma_two(a, b, 0x80008000u, type); }

// ---- barriers of a block

inline void barrier_sync(int id, int threads) { host::barrier(id, threads, true); }
inline void barrier_arrive(int id, int threads) { host::barrier(id, threads, false); }

// ---- cp.async

inline void copy_async_16(uint32_t to, const void* from) {
  unsigned char* target = host::at(to, 16, 16, "cp.async");
  if (reinterpret_cast<uintptr_t>(from) % 16) host::fail("cp.async: the source is not aligned");
  const auto copy = [=] { memcpy(target, from, 16); };
  if (host::launch_now->eagerness == 2) copy();
  host::current->copies.push_back(copy);
}
inline void copy_async_commit() {
  host::current->groups.push_back(std::move(host::current->copies));
  host::current->copies.clear();
}
template <int Left>
void copy_async_wait() {
  auto& groups = host::current->groups;
  while (groups.size() > Left) {
    for (const auto& copy : groups.front()) copy();
    groups.pop_front();
  }
}

// ---- clusters

inline uint32_t cluster_rank() { return uint32_t(host::current->block->rank); }
inline void cluster_arrive() { host::cluster_arrive(); }
inline void cluster_wait() { host::cluster_wait(); }
inline uint32_t map_shared(uint32_t address, uint32_t rank) {
  const size_t stride = host::launch_now->stride;
  return uint32_t(address % stride + rank * stride);
}
inline uint32_t load_cluster(uint32_t address) {
  uint32_t value;
  memcpy(&value, host::at(address, 4, 4, "ld.shared::cluster"), 4);
  return value;
}

// ---- mbarriers

constexpr uint64_t kMbarrierMark = 0x5ab;

struct Mbarrier {
  uint64_t mark : 12, phase : 1, arrivals : 12, pending : 12;
  int64_t bytes : 27;
};
static_assert(sizeof(Mbarrier) == 8);

inline Mbarrier& mbarrier_at(uint32_t address) {
  auto* bar = reinterpret_cast<Mbarrier*>(host::at(address, 8, 8, "mbarrier"));
  if (bar->mark != kMbarrierMark) host::fail("an mbarrier is used that nobody initialised");
  return *bar;
}
inline void mbarrier_change(uint32_t address, int arrivals, int64_t bytes) {
  Mbarrier& bar = mbarrier_at(address);
  if (int(bar.pending) < arrivals) host::fail("an mbarrier has more arrivals than it was initialised for");
  bar.pending -= unsigned(arrivals);
  bar.bytes += bytes;
  if (bar.pending == 0 && bar.bytes == 0) {
    bar.phase ^= 1;
    bar.pending = bar.arrivals;
    host::wake(host::launch_now->mbarrier_waiters[&bar]);
  }
}

inline void mbarrier_init(uint32_t address, uint32_t arrivals) {
  auto* bar = reinterpret_cast<Mbarrier*>(host::at(address, 8, 8, "mbarrier"));
  bar->mark = kMbarrierMark;
  bar->phase = 0;
  bar->arrivals = bar->pending = arrivals;
  bar->bytes = 0;
}
inline void mbarrier_fence_init() {}
inline void mbarrier_arrive(uint32_t bar) { mbarrier_change(bar, 1, 0); }
inline void mbarrier_arrive_cluster(uint32_t bar) { mbarrier_change(bar, 1, 0); }
inline void mbarrier_arrive_expect(uint32_t bar, uint32_t bytes) {
  mbarrier_at(bar).bytes += bytes;
  mbarrier_change(bar, 1, 0);
}
inline bool mbarrier_try_wait(uint32_t address, uint32_t parity) {
  Mbarrier& bar = mbarrier_at(address);
  if (bar.phase == parity)
    host::wait_in(host::launch_now->mbarrier_waiters[&bar], "mbarrier at shared offset",
                  long(address % host::launch_now->stride));
  return bar.phase != parity;
}

// ---- asynchronous writes

inline void write_async(uint32_t to, const void* value, size_t bytes, uint32_t bar) {
  std::vector<unsigned char> copy(bytes);
  memcpy(copy.data(), value, bytes);
  host::at(to, bytes, bytes, "st.async");
  host::later(bar, [=] {
    memcpy(host::at(to, bytes, bytes, "st.async"), copy.data(), bytes);
    mbarrier_change(bar, 0, -int64_t(bytes));
  });
}
inline void store_async(uint32_t to, uint32_t value, uint32_t bar) { write_async(to, &value, 4, bar); }
inline void store_async(uint32_t to, const uint2& value, uint32_t bar) { write_async(to, &value, 8, bar); }
inline void store_async(uint32_t to, const uint4& value, uint32_t bar) { write_async(to, &value, 16, bar); }
inline void bulk_copy(uint32_t to, uint32_t from, uint32_t bytes, uint32_t bar) {
  host::at(from, bytes, 16, "bulk copy");
  if (bytes % 16) host::fail("a bulk copy of " + std::to_string(bytes) + " bytes: not a multiple of 16");
  host::later(bar, [=] {  // reads its source as late as it writes
    memcpy(host::at(to, bytes, 16, "bulk copy"), host::at(from, bytes, 16, "bulk copy"), bytes);
    mbarrier_change(bar, 0, -int64_t(bytes));
  });
}
inline void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t bar) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16) host::fail("a bulk load that is not aligned to 16 bytes");
  host::later(bar, [=] {
    memcpy(host::at(to, bytes, 16, "bulk load"), from, bytes);
    mbarrier_change(bar, 0, -int64_t(bytes));
  });
}
inline void tensor_load(uint32_t to, const void* map, int x, int y, int z, int w, uint32_t bar) {
  const auto& m = *reinterpret_cast<const host::TensorMap*>(map);
  if (m.mark != host::kTensorMapMark) host::fail("a tensor map that nobody encoded");
  const size_t bytes = size_t(m.box[0]) * m.box[1] * m.box[2] * m.box[3] * 2;
  host::at(to, bytes, 128, "tensor load");
  host::later(bar, [=] {
    uint32_t at = to;  // the box lies dense, 16-byte chunks of 32 bytes change places where bit 7 of the address is set
    for (uint32_t l = 0; l < m.box[3]; l++)
      for (uint32_t k = 0; k < m.box[2]; k++)
        for (uint32_t j = 0; j < m.box[1]; j++)
          for (uint32_t i = 0; i < m.box[0]; i++, at += 2) {
            const int64_t index[] = {x + int64_t(i), y + int64_t(j), z + int64_t(k), w + int64_t(l)};
            const unsigned char* from = m.data + 2 * index[0];
            bool inside = index[0] >= 0 && index[0] < m.sizes[0];
            for (int d = 1; d < 4; d++) {
              inside = inside && index[d] >= 0 && index[d] < m.sizes[d];
              from += index[d] * m.strides[d - 1];
            }
            uint16_t element = 0;
            if (inside) memcpy(&element, from, 2);
            memcpy(host::at(at ^ (at >> 3 & 16), 2, 2, "tensor load"), &element, 2);
          }
    mbarrier_change(bar, 0, -int64_t(bytes));
  });
}
inline void fence_async() {}
inline void fence_async_global() {}

}  // namespace audiokernels::ptx
