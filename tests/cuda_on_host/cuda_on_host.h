// CUDA on the host: runs the device code of csrc as plain C++, compiled by g++, without nvcc, a toolkit or a GPU.
//
// A grid is run cluster by cluster, one fiber a CUDA thread. A fiber runs until it waits (barrier, warp collective,
// mbarrier, asynchronous copy) and then another one, picked at random by a seed, runs: what the code does not order
// comes in any order, and a missing barrier shows as a wrong result under some seed. Dynamic shared memory holds NaN at
// first, with a protected page on either side. Asynchronous writes happen at once, at random, or as late as anybody
// waits for them, by the seed. Reported as errors of the launch, never a hang or a crash: a deadlock (who waits where),
// a warp whose lanes meet in different instructions, barriers with different counts, accesses outside of shared memory,
// unaligned ones of an instruction, an mbarrier used before it is initialised, asynchronous writes into a block that
// has ended, a configuration that no H100 takes, or takes only by an attribute that the kernel has not got.
//
// Not modelled: weak ordering of plain loads and stores, proxies (a missing fence.proxy.async goes unseen), bank
// conflicts, time; lanes of a warp run one after the other between collectives. mma sums exactly and rounds once.
//
// How to use it: csrc/*.cu include ptx.h (all inline PTX; here its twins, ptx_on_host.h, take over), ask for shared
// memory by ptx::dynamic_shared(), and launch by cudaLaunchKernelEx. cuda_on_host.build(source) of __init__.py
// compiles.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned size() const { return x * y * z; }
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

// ---- the part of the runtime that launchers call

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719
};
using cudaStream_t = struct CUstream_st*;
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14
};
enum { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };

namespace cuda_on_host {

constexpr size_t kStackBytes = 64 << 10, kPage = 4096, kSharedAlign = 128;
constexpr size_t kMostShared = 232448;  // of an H100
constexpr int kNamedBarriers = 16;

struct Block;
struct Thread {
  Block* block;
  dim3 index;
  int linear, lane;
  jmp_buf context;
  ucontext_t start;
  bool started = false, done = false;
  const char* waits = nullptr;  // what it waits for, and where
  long where = 0;
  uint64_t cluster_generation = 0;
  std::vector<std::function<void()>> copies;              // cp.async, not committed
  std::deque<std::vector<std::function<void()>>> groups;  // committed
};

struct Barrier {
  int expected = 0, arrived = 0;
  std::vector<Thread*> waiters;
};

// What lanes bring to a warp instruction and take from it; two sides, because a fast lane may be one instruction ahead.
struct Collective {
  const char* kind = nullptr;
  uint32_t arrived = 0;
  int side = 0;
  unsigned char in[2][32][64], out[2][32][64];
  std::vector<Thread*> waiters;
};

struct Block {
  dim3 index;
  int rank, live;
  unsigned char* shared;
  Barrier barriers[kNamedBarriers];
  std::vector<std::map<uint32_t, Collective>> warps;  // by mask
  std::deque<Thread> threads;
};

struct Write {  // an asynchronous one, and the mbarrier that it completes
  std::function<void()> write;
  const void* bar;
};

struct Launch {
  dim3 grid, block, cluster;
  size_t shared_bytes = 0;
  std::function<void()> kernel;
  std::deque<Block> blocks;  // of the cluster that runs
  unsigned char* memory = nullptr;
  size_t stride = 0;
  std::vector<Thread*> ready;
  std::vector<Write> pending;
  std::unordered_map<const void*, std::vector<Thread*>> mbarrier_waiters;
  Barrier cluster_barrier;
  uint64_t cluster_generation = 0;
  std::mt19937_64 random;
  int eagerness = 0;  // of asynchronous writes: 0 as late as possible, 1 at random, 2 at once
  uint64_t timer = 0;
  bool failed = false;
};

inline Launch* launch_now = nullptr;
inline Thread* current = nullptr;
inline jmp_buf scheduler;
inline sigjmp_buf crash;
inline std::string error_text;
inline uint64_t seed = 0;
inline bool timeouts =
    false;  // let bounded waits time out where nothing else can happen, instead of reporting a deadlock

inline std::string name_of(const Thread& t) {
  const Block& b = *t.block;
  return "block (" + std::to_string(b.index.x) + "," + std::to_string(b.index.y) + "," + std::to_string(b.index.z) +
         ") thread " + std::to_string(t.linear);
}

// Ends the launch; never returns to the fiber.
[[noreturn]] inline void fail(const std::string& text) {
  if (!launch_now->failed) error_text = current ? name_of(*current) + ": " + text : text;
  launch_now->failed = true;
  _longjmp(scheduler, 1);
}

inline void wake(std::vector<Thread*>& waiters) {
  for (Thread* t : waiters) t->waits = nullptr;
  launch_now->ready.insert(launch_now->ready.end(), waiters.begin(), waiters.end());
  waiters.clear();
}

inline __attribute__((noinline)) void suspend() {
  if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
}

inline void wait_in(std::vector<Thread*>& waiters, const char* what, long where) {
  current->waits = what;
  current->where = where;
  waiters.push_back(current);
  suspend();
}

// ---- barriers

inline void complete(Barrier& b) {
  b.arrived = 0;
  wake(b.waiters);
}

inline void barrier(int id, int threads, bool wait) {
  if (id < 0 || id >= kNamedBarriers) fail("barrier " + std::to_string(id) + " does not exist");
  Barrier& b = current->block->barriers[id];
  if (threads % 32 || threads <= 0) fail("barrier " + std::to_string(id) + ": the count must be a multiple of 32");
  if (b.arrived > 0 && b.expected != threads)
    fail("barrier " + std::to_string(id) + ": " + std::to_string(threads) + " threads, others say " +
         std::to_string(b.expected));
  b.expected = threads;
  if (++b.arrived == threads)
    complete(b);
  else if (wait)
    wait_in(b.waiters, "bar.sync", id);
}

inline void sync_threads() {
  Barrier& b = current->block->barriers[0];
  if (b.arrived > 0 && b.expected != 0) fail("__syncthreads meets a bar.sync 0 with a count");
  b.expected = 0;
  if (++b.arrived == current->block->live)
    complete(b);
  else
    wait_in(b.waiters, "__syncthreads", 0);
}

inline int live_in_cluster() {
  int live = 0;
  for (const Block& b : launch_now->blocks) live += b.live;
  return live;
}

inline void cluster_arrive() {
  Barrier& b = launch_now->cluster_barrier;
  current->cluster_generation = launch_now->cluster_generation + 1;
  if (++b.arrived == live_in_cluster()) {
    launch_now->cluster_generation++;
    complete(b);
  }
}

inline void cluster_wait() {
  if (launch_now->cluster_generation < current->cluster_generation)
    wait_in(launch_now->cluster_barrier.waiters, "barrier.cluster.wait", 0);
}

// ---- warps

// Every lane of `mask` brings `in`; the last one to come runs finish(ins, outs), which fills all lanes' outs.
template <class In, class Out, class Finish>
Out collective(uint32_t mask, const char* kind, const In& in, Finish finish) {
  static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64);
  if (!(mask >> current->lane & 1)) fail(std::string(kind) + ": the lane is not in its own mask");
  Collective& c = current->block->warps[current->linear / 32][mask];
  if (c.arrived == 0) c.kind = kind;
  if (strcmp(c.kind, kind) != 0) fail(std::string("the warp diverged: ") + kind + " meets " + c.kind);
  const int side = c.side;
  memcpy(c.in[side][current->lane], &in, sizeof in);
  c.arrived |= 1u << current->lane;
  if (c.arrived == mask) {
    In ins[32]{};
    Out outs[32]{};
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1) memcpy(&ins[i], c.in[side][i], sizeof(In));
    finish(ins, outs);
    for (int i = 0; i < 32; i++) memcpy(c.out[side][i], &outs[i], sizeof(Out));
    c.arrived = 0;
    c.side ^= 1;
    wake(c.waiters);
  } else {
    wait_in(c.waiters, kind, mask);
  }
  Out out;
  memcpy(&out, c.out[side][current->lane], sizeof out);
  return out;
}

// ---- shared memory; a 32-bit address counts from the first block's, so that it names a byte of the cluster

inline unsigned char* at(uint32_t address, size_t bytes, size_t alignment, const char* what) {
  const Launch& l = *launch_now;
  const size_t rank = address / l.stride, offset = address % l.stride;
  if (rank >= l.blocks.size() || offset + bytes > l.shared_bytes)
    fail(std::string(what) + ": " + std::to_string(bytes) + " bytes at " + std::to_string(offset) + " of " +
         std::to_string(l.shared_bytes) + " bytes of shared memory");
  if (offset % alignment) fail(std::string(what) + ": offset " + std::to_string(offset) + " is not aligned");
  if (l.blocks[rank].live == 0) fail(std::string(what) + ": block " + std::to_string(rank) + " has ended");
  return l.blocks[rank].shared + offset;
}

inline uint32_t address_of(const void* pointer) {
  const Block& b = *current->block;
  const ptrdiff_t offset = static_cast<const unsigned char*>(pointer) - b.shared;
  if (offset < 0 || size_t(offset) > launch_now->shared_bytes)
    fail("the pointer is not into this block's shared memory");
  return uint32_t(b.rank * launch_now->stride + offset);
}

// An asynchronous write by the thread that runs.
inline void later(uint32_t bar, std::function<void()> write) {
  if (launch_now->eagerness == 2)
    write();
  else
    launch_now->pending.push_back({std::move(write), at(bar, 8, 8, "mbarrier")});
}

// ---- the scheduler

inline void entry() {
  launch_now->kernel();
  Thread& t = *current;
  Block& b = *t.block;
  t.done = true;
  if (!t.copies.empty() || !t.groups.empty()) fail("the thread ends with a cp.async that nobody waited for");
  b.live--;
  Barrier& all = b.barriers[0];
  if (b.live > 0 && all.expected == 0 && all.arrived == b.live) complete(all);
  Barrier& cluster = launch_now->cluster_barrier;
  if (cluster.arrived > 0 && cluster.arrived == live_in_cluster()) {
    launch_now->cluster_generation++;
    complete(cluster);
  }
  _longjmp(scheduler, 1);
}

inline __attribute__((noinline)) void resume(Thread* t) {
  static ucontext_t unused;
  current = t;
  threadIdx = t->index;
  blockIdx = t->block->index;
  if (_setjmp(scheduler) == 0) {
    if (t->started) _longjmp(t->context, 1);
    t->started = true;
    swapcontext(&unused, &t->start);
  }
}

inline std::string who_waits() {
  std::map<std::string, std::vector<int>> groups;
  for (const Block& b : launch_now->blocks)
    for (const Thread& t : b.threads)
      if (t.waits) {
        std::string key = "block " + std::to_string(b.index.x) + " at " + t.waits + " " + std::to_string(t.where);
        groups[key].push_back(t.linear);
      }
  std::string text = "deadlock:";
  for (const auto& [key, threads] : groups)
    text += "\n  " + key + ": " + std::to_string(threads.size()) + " threads, " + std::to_string(threads.front()) +
            " .. " + std::to_string(threads.back());
  return text;
}

template <class T>
T take(std::vector<T>& from, size_t i) {
  T taken = std::move(from[i]);
  from[i] = std::move(from.back());
  from.pop_back();
  return taken;
}

template <class T>
T take_any(std::vector<T>& from) {
  return take(from, launch_now->random() % from.size());
}

// As late as possible: one that somebody waits for, where there is one.
inline void run_write() {
  Launch& l = *launch_now;
  std::vector<size_t> awaited;
  for (size_t i = 0; i < l.pending.size() && l.eagerness == 0; i++)
    if (!l.mbarrier_waiters[l.pending[i].bar].empty()) awaited.push_back(i);
  const auto write = awaited.empty() ? take_any(l.pending).write : take(l.pending, take_any(awaited)).write;
  current = nullptr;
  if (_setjmp(scheduler) == 0) write();  // fail() comes back here
}

inline void wake_bounded_waits() {
  launch_now->timer += uint64_t{1} << 40;
  for (auto& [bar, waiters] : launch_now->mbarrier_waiters) wake(waiters);
}

inline void run_cluster() {
  Launch& l = *launch_now;
  while (!l.failed) {
    const bool early = l.eagerness == 1 && !l.pending.empty() && l.random() % 8 == 0;
    if (early || (l.ready.empty() && !l.pending.empty())) {
      run_write();
    } else if (!l.ready.empty()) {
      resume(take_any(l.ready));
    } else if (live_in_cluster() == 0) {
      return;
    } else {
      if (timeouts) wake_bounded_waits();
      if (l.ready.empty()) {
        error_text = who_waits();
        l.failed = true;
      }
    }
  }
}

inline void on_fault(int, siginfo_t* info, void*) {
  const auto* address = static_cast<const unsigned char*>(info->si_addr);
  const Launch& l = *launch_now;
  const bool ours = address >= l.memory && address < l.memory + l.stride * l.blocks.size() + 2 * kPage;
  error_text = (current ? name_of(*current) : std::string("an asynchronous write")) +
               (ours ? ": access outside of shared memory" : ": access outside of memory");
  siglongjmp(crash, 1);
}

// While it lives, faults end the launch and not the process.
struct FaultHandler {
  static constexpr size_t kBytes = 64 << 10;
  struct sigaction segv_before, bus_before;
  stack_t stack_before;
  std::vector<char> stack = std::vector<char>(kBytes);
  FaultHandler() {
    const stack_t alternate{stack.data(), 0, kBytes};
    sigaltstack(&alternate, &stack_before);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &segv_before);
    sigaction(SIGBUS, &action, &bus_before);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &segv_before, nullptr);
    sigaction(SIGBUS, &bus_before, nullptr);
    sigaltstack(&stack_before, nullptr);
  }
};

inline unsigned char* map_pages(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : static_cast<unsigned char*>(p);
}

inline unsigned char* stack_of(size_t i) {  // kept over launches
  static std::vector<unsigned char*> stacks;
  while (stacks.size() <= i) {
    stacks.push_back(map_pages(kStackBytes));
    mprotect(stacks.back() + kPage, kStackBytes - kPage, PROT_READ | PROT_WRITE);  // the first page stops an overflow
  }
  return stacks[i];
}

inline void make_cluster(dim3 first) {
  Launch& l = *launch_now;
  l.blocks.clear();
  l.ready.clear();
  l.cluster_barrier = {};
  const size_t n = l.cluster.size(), slack = (l.shared_bytes + kSharedAlign - 1) / kSharedAlign * kSharedAlign;
  for (size_t rank = 0; rank < n; rank++) {
    Block& b = l.blocks.emplace_back();
    const unsigned x = rank % l.cluster.x, y = rank / l.cluster.x % l.cluster.y, z = rank / l.cluster.x / l.cluster.y;
    b.index = dim3(first.x + x, first.y + y, first.z + z);
    b.rank = int(rank);
    b.live = int(l.block.size());
    b.shared = l.memory + rank * l.stride + l.stride - kPage - slack;  // it ends at a protected page
    memset(l.memory + rank * l.stride + kPage, 0xFF, l.stride - 2 * kPage);
    b.warps.resize((b.live + 31) / 32);
    for (int i = 0; i < b.live; i++) {
      Thread& t = b.threads.emplace_back();
      t.block = &b;
      t.linear = i;
      t.lane = i % 32;
      t.index = dim3(i % l.block.x, i / l.block.x % l.block.y, i / l.block.x / l.block.y);
      getcontext(&t.start);
      t.start.uc_stack.ss_sp = stack_of(rank * b.live + i);
      t.start.uc_stack.ss_size = kStackBytes;
      t.start.uc_link = nullptr;
      makecontext(&t.start, entry, 0);
      l.ready.push_back(&t);
    }
  }
}

// What lies between shared memory and the protected pages is still as it was.
inline void check_slack() {
  Launch& l = *launch_now;
  for (const Block& b : l.blocks) {
    const unsigned char* first = l.memory + b.rank * l.stride + kPage;
    for (const unsigned char* p = first; p < first + l.stride - 2 * kPage; p++)
      if ((p < b.shared || p >= b.shared + l.shared_bytes) && *p != 0xFF && !l.failed) {
        error_text = "block " + std::to_string(b.index.x) + ": a write outside of shared memory";
        l.failed = true;
      }
  }
}

// What cudaFuncSetAttribute has allowed a kernel.
struct Allowed {
  size_t shared_bytes = 48 << 10;
  unsigned cluster = 8;
};
inline std::map<const void*, Allowed> allowed;

// Fills in the sizes; false if an H100 would not take them.
inline bool configure(Launch& l, const cudaLaunchConfig_t& config, const void* kernel) {
  l.grid = config.gridDim;
  l.block = config.blockDim;
  for (unsigned i = 0; i < config.numAttrs; i++)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& c = config.attrs[i].val.clusterDim;
      l.cluster = dim3(c.x, c.y, c.z);
    }
  l.shared_bytes = config.dynamicSmemBytes;
  const Allowed most = allowed[kernel];
  return l.block.size() > 0 && l.block.size() <= 1024 && l.grid.size() > 0 && l.shared_bytes <= most.shared_bytes &&
         l.cluster.size() > 0 && l.cluster.size() <= most.cluster && l.grid.x % l.cluster.x == 0 &&
         l.grid.y % l.cluster.y == 0 && l.grid.z % l.cluster.z == 0;
}

inline cudaError_t run(const cudaLaunchConfig_t& config, const void* which, std::function<void()> kernel) {
  Launch l;
  launch_now = &l;
  error_text.clear();
  if (!configure(l, config, which)) {
    error_text = "invalid launch configuration";
    return cudaErrorInvalidValue;
  }
  gridDim = l.grid, blockDim = l.block;
  l.kernel = std::move(kernel);
  l.random.seed(seed);
  l.eagerness = int(seed % 3);
  // The same stride for every launch: an address must not depend on the size by more than its offset.
  const size_t usable = (l.shared_bytes + kPage - 1) / kPage * kPage;
  l.stride = usable + 2 * kPage;
  l.memory = map_pages(l.stride * l.cluster.size());
  for (size_t rank = 0; rank < l.cluster.size() && usable > 0; rank++)
    mprotect(l.memory + rank * l.stride + kPage, usable, PROT_READ | PROT_WRITE);
  std::vector<dim3> firsts;
  for (unsigned z = 0; z < l.grid.z; z += l.cluster.z)
    for (unsigned y = 0; y < l.grid.y; y += l.cluster.y)
      for (unsigned x = 0; x < l.grid.x; x += l.cluster.x) firsts.emplace_back(x, y, z);
  FaultHandler handler;
  if (sigsetjmp(crash, 1) == 0) {
    while (!firsts.empty() && !l.failed) {
      make_cluster(take_any(firsts));
      run_cluster();
      check_slack();
    }
  } else {
    l.failed = true;
  }
  munmap(l.memory, l.stride * l.cluster.size());
  current = nullptr;
  return l.failed ? cudaErrorLaunchFailure : cudaSuccess;
}

inline cudaError_t last_error = cudaSuccess;

}  // namespace cuda_on_host

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  std::tuple<std::decay_t<Parameters>...> copies(arguments...);
  return cuda_on_host::last_error =
             cuda_on_host::run(*config, reinterpret_cast<const void*>(kernel), [&] { std::apply(kernel, copies); });
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel* kernel, const cudaLaunchConfig_t* config) {
  cuda_on_host::Launch sizes;
  *clusters = 1;
  return cuda_on_host::configure(sizes, *config, reinterpret_cast<const void*>(kernel)) ? cudaSuccess
                                                                                        : cudaErrorInvalidValue;
}
struct cudaFuncAttributes {
  int ptxVersion;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_host::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return cuda_on_host::error_text.c_str(); }
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  auto& allowed = cuda_on_host::allowed[kernel];
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed)
    allowed.cluster = value ? 16 : 8;
  else if (size_t(value) <= cuda_on_host::kMostShared)
    allowed.shared_bytes = size_t(value);
  else
    return cudaErrorInvalidValue;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = int(cuda_on_host::kMostShared);
  return cudaSuccess;
}

// For what Library.call of __init__.py reaches.
#define CUDA_ON_HOST_EXPORT extern "C" __attribute__((visibility("default"), used))

CUDA_ON_HOST_EXPORT inline void cuda_on_host_configure(uint64_t seed, int timeouts) {
  cuda_on_host::seed = seed;
  cuda_on_host::timeouts = timeouts != 0;
}
CUDA_ON_HOST_EXPORT inline const char* cuda_on_host_error() { return cuda_on_host::error_text.c_str(); }

// ---- built-in functions

inline void __syncthreads() { cuda_on_host::sync_threads(); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  cuda_on_host::collective<int, int>(mask, "__syncwarp", 0, [](const int*, int*) {});
}
template <class T, class Source>
T shuffle_on_host(uint32_t mask, T value, Source source) {
  const int lane = cuda_on_host::current->lane;
  struct In {
    T value;
    int from;
  };
  return cuda_on_host::collective<In, T>(mask, "shuffle", In{value, source(lane)}, [mask](const In* in, T* out) {
    for (int i = 0; i < 32; i++)
      if (mask >> in[i].from & 1) out[i] = in[in[i].from].value;
  });
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int from, int width = 32) {
  return shuffle_on_host(mask, value, [=](int lane) { return lane / width * width + (from & (width - 1)); });
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
  return shuffle_on_host(mask, value, [=](int lane) {
    const int from = lane ^ bits;
    return from / width <= lane / width ? from : lane;
  });
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int delta, int width = 32) {
  return shuffle_on_host(mask, value, [=](int lane) { return lane % width >= delta ? lane - delta : lane; });
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int delta, int width = 32) {
  return shuffle_on_host(mask, value, [=](int lane) { return lane % width + delta < width ? lane + delta : lane; });
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  return cuda_on_host::collective<int, uint32_t>(mask, "vote", predicate, [mask](const int* in, uint32_t* out) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; i++) bits |= uint32_t(in[i] != 0 && (mask >> i & 1)) << i;
    std::fill(out, out + 32, bits);
  });
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
template <class T, class Combine>
T reduce_on_host(uint32_t mask, T value, Combine combine) {
  return cuda_on_host::collective<T, T>(mask, "redux", value, [=](const T* in, T* out) {
    T all = in[__builtin_ctz(mask)];
    for (int i = __builtin_ctz(mask) + 1; i < 32; i++)
      if (mask >> i & 1) all = combine(all, in[i]);
    std::fill(out, out + 32, all);
  });
}
template <class T>
T __reduce_max_sync(uint32_t mask, T value) {
  return reduce_on_host(mask, value, [](T a, T b) { return std::max(a, b); });
}
template <class T>
T __reduce_min_sync(uint32_t mask, T value) {
  return reduce_on_host(mask, value, [](T a, T b) { return std::min(a, b); });
}
template <class T>
T __reduce_add_sync(uint32_t mask, T value) {
  return reduce_on_host(mask, value, [](T a, T b) { return T(a + b); });
}

template <class To, class From>
To bits_on_host(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
template <class T>
T atomicAdd(T* p, T x) {
  return std::exchange(*p, *p + x);
}
inline int __float_as_int(float x) { return bits_on_host<int>(x); }
inline unsigned __float_as_uint(float x) { return bits_on_host<unsigned>(x); }
inline float __int_as_float(int x) { return bits_on_host<float>(x); }
inline float __uint_as_float(unsigned x) { return bits_on_host<float>(x); }
inline int __float2int_rn(float x) { return int(std::nearbyintf(x)); }
inline void sincospif(float x, float* sine, float* cosine) {
  *sine = float(std::sin(M_PI * x));
  *cosine = float(std::cos(M_PI * x));
}
inline int __viaddmin_s32_relu(int a, int b, int c) {  // the sum wraps
  return std::max(std::min(int(unsigned(a) + unsigned(b)), c), 0);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += int(int8_t(a >> i)) * int(int8_t(b >> i));
  return c;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
using std::max;
using std::min;

// ---- 16-bit floats

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline float __half2float(__half h) {
  const uint32_t magnitude = h.bits & 0x7fff;
  float value = bits_on_host<float>(magnitude << 13) * 0x1p112f;
  if (magnitude >= 0x7c00) value = bits_on_host<float>(0x7f800000 | (magnitude & 0x3ff) << 13);
  return bits_on_host<float>(bits_on_host<uint32_t>(value) | uint32_t(h.bits & 0x8000) << 16);
}
inline __half __float2half_rn(float x) {  // to nearest, ties to even
  const float size = std::fabs(x);
  uint32_t half;
  if (!(size < 65520.0f)) {
    half = x == x ? 0x7c00 : 0x7e00;
  } else if (size < 0x1p-14f) {
    half = bits_on_host<uint32_t>(size + 0.5f) - 0x3f000000;  // a subnormal's last place is that of 0.5
  } else {
    const uint32_t magnitude = bits_on_host<uint32_t>(size);
    half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  return {uint16_t(half | (bits_on_host<uint32_t>(x) >> 16 & 0x8000))};
}
inline float __bfloat162float(__nv_bfloat16 b) { return bits_on_host<float>(uint32_t(b.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = bits_on_host<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
