"""The emulator that runs CUDA kernels without a GPU: right kernels are right under every seed, wrong ones are seen."""

import re

import pytest
import torch
from cuda_on_host import COMPILER, LaunchError, build

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
SEEDS = range(12)

SOURCE = """
#include "cuda.h"
#include "cuda_fp16.h"
#include "cuda_runtime_api.h"
#include "ptx.h"
using namespace audiokernels;

// ---- a block turns its 128 numbers round, by shared memory; without the barrier it is racy
template <bool kBarrier>
void turn(float* x) {
  float* shared = reinterpret_cast<float*>(ptx::dynamic_shared());
  shared[threadIdx.x] = x[threadIdx.x];
  if (kBarrier) __syncthreads();
  x[threadIdx.x] = shared[127 - threadIdx.x];
}

// ---- one warp makes numbers, another one takes them, in `rounds`; without the way back a fast producer overwrites
template <bool kWayBack>
void pipe(float* out, int rounds) {
  volatile float* box = reinterpret_cast<float*>(ptx::dynamic_shared());
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < rounds; i++) {
    if (threadIdx.x < 32) {
      if (kWayBack) ptx::barrier_sync(2, 64);
      box[lane] = float(100 * i + lane);
      ptx::barrier_arrive(1, 64);
      if (!kWayBack) __syncwarp();
    } else {
      if (kWayBack) ptx::barrier_arrive(2, 64);
      ptx::barrier_sync(1, 64);
      out[32 * i + lane] = box[lane];
    }
  }
}

// ---- two warps wait at different barriers
void lock_up() { ptx::barrier_sync(threadIdx.x < 32 ? 3 : 5, 64); }
void miscount() { ptx::barrier_sync(1, threadIdx.x < 32 ? 64 : 96); }
void diverge(float* x) {
  if (threadIdx.x % 2)
    __syncwarp();
  else
    x[0] = __shfl_sync(0xffffffffu, 1.0f, 0);
}
void past_the_end(int bytes) { ptx::dynamic_shared()[bytes] = 1; }
void null(int* x) { *x = 1; }
void unaligned() { ptx::load_matrix_x4(ptx::shared_address(ptx::dynamic_shared()) + 8); }
void bare_mbarrier() { ptx::mbarrier_arrive(ptx::shared_address(ptx::dynamic_shared())); }

// ---- warp functions
void warp(float* x) {
  const int lane = threadIdx.x;
  float sum = x[lane];
  for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
  const float up = __shfl_up_sync(0xffffffffu, x[lane], 1), down = __shfl_down_sync(0xffffffffu, x[lane], 1);
  const int most = __reduce_max_sync(0xffffffffu, lane * 7 % 32);
  const unsigned odd = __ballot_sync(0xffffffffu, lane % 2);
  x[lane] = most == 31 && odd == 0xaaaaaaaau && !__all_sync(0xffffffffu, lane > 0) && __any_sync(0xffffffffu, lane > 30)
                ? sum + 1000 * up + 1e6f * down : -1;
}

// ---- c = a b for 16 x 16 times 16 x 8, fragments by ldmatrix
template <class Type>
void product(const uint16_t* a, const uint16_t* b, float* c) {
  uint16_t* shared = reinterpret_cast<uint16_t*>(ptx::dynamic_shared());
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) shared[i] = a[i];
  for (int i = lane; i < 128; i += 32) shared[256 + i] = b[i];
  __syncwarp();
  const uint32_t base = ptx::shared_address(shared);
  const uint4 left = ptx::load_matrix_x4(base + (lane % 16 * 16 + lane / 16 * 8) * 2);
  const uint2 right = ptx::load_matrix_x2_trans(base + (256 + lane % 16 * 8) * 2);
  float sums[4] = {1, 1, 1, 1};
  ptx::mma(sums, left, right, Type{});
  for (int i = 0; i < 4; i++) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

// ---- cp.async; without the wait the copy may not have come
template <bool kWait>
void stage(const float* x, float* out) {
  char* shared = ptx::dynamic_shared();
  ptx::copy_async_16(ptx::shared_address(shared) + 16 * threadIdx.x, x + 4 * threadIdx.x);
  ptx::copy_async_commit();
  if (kWait) ptx::copy_async_wait<0>();
  for (int i = 0; i < 4; i++) out[4 * threadIdx.x + i] = reinterpret_cast<float*>(shared)[4 * threadIdx.x + i];
  if (!kWait) ptx::copy_async_wait<0>();
}

// ---- a ring of blocks hands numbers on by st.async or a bulk copy, `rounds` times round
enum { kGood, kUnwaited, kLeaves, kUnarmed };
template <int kHow, bool kBulk>
void relay(float* out, int rounds) {
  char* shared = ptx::dynamic_shared();
  const uint32_t base = ptx::shared_address(shared), bar = base + 512, rank = ptx::cluster_rank();
  const int lane = threadIdx.x, blocks = gridDim.x;
  volatile float* box = reinterpret_cast<float*>(shared);         // what came
  float* mine = reinterpret_cast<float*>(shared + 256);  // what goes
  if (lane == 0) ptx::mbarrier_init(bar, 1);
  ptx::mbarrier_fence_init();
  ptx::cluster_arrive();
  ptx::cluster_wait();
  const uint32_t next = (rank + 1) % blocks;
  int waits = 0;
  const auto take = [&] {
    if (lane == 0 && kHow != kUnarmed) ptx::mbarrier_arrive_expect(bar, 128);
    __syncwarp();
    while ((kHow != kUnwaited || rank == 0) && !ptx::mbarrier_try_wait(bar, waits % 2)) {
    }
    waits++;
    return box[lane];
  };
  for (int i = 0; i < rounds; i++) {
    const float value = rank > 0 || i > 0 ? take() + 1 : float(lane);
    if (kBulk) {
      mine[lane] = value;
      ptx::fence_async();
      __syncwarp();
      if (lane == 0) ptx::bulk_copy(ptx::map_shared(base, next), base + 256, 128, ptx::map_shared(bar, next));
    } else {
      ptx::store_async(ptx::map_shared(base + 4 * lane, next), __float_as_uint(value), ptx::map_shared(bar, next));
    }
  }
  if (kHow == kLeaves) return;
  if (rank == 0) out[lane] = take();
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// ---- a box of 16 x 8 of a (2, 3, 20, 12) tensor, as it lies in shared memory
template <bool kWait>
void box(CUtensorMap map, uint16_t* out, int x, int y) {
  uint16_t* shared = reinterpret_cast<uint16_t*>(ptx::dynamic_shared());
  const uint32_t base = ptx::shared_address(shared), bar = base + 256;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(bar, 1);
    ptx::mbarrier_arrive_expect(bar, 256);
    ptx::tensor_load(base, &map, x, y, 2, 1, bar);
  }
  __syncthreads();
  while (kWait && !ptx::mbarrier_try_wait(bar, 0)) {
  }
  for (int i = threadIdx.x; i < 128; i += 32) out[i] = shared[i];
}

// ---- a bounded wait for what never comes
void bounded(int* out) {
  const uint32_t bar = ptx::shared_address(ptx::dynamic_shared());
  if (threadIdx.x == 0) ptx::mbarrier_init(bar, 1);
  __syncthreads();
  const uint64_t start = ptx::nanoseconds();
  while (!ptx::mbarrier_try_wait(bar, 0))
    if (ptx::nanoseconds() - start > 1000000000) {
      *out = 7;
      return;
    }
}

template <class... P, class... A>
int launch(void (*kernel)(P...), int blocks, int threads, int shared, int cluster, A... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  cudaLaunchAttribute attribute{cudaLaunchAttributeClusterDimension, {{unsigned(cluster), 1, 1}}};
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}
#define E CUDA_ON_HOST_EXPORT int
E good_turn(float* x) { return launch(turn<true>, 1, 128, 512, 1, x); }
E racy_turn(float* x) { return launch(turn<false>, 1, 128, 512, 1, x); }
E good_pipe(float* x) { return launch(pipe<true>, 1, 64, 128, 1, x, 5); }
E racy_pipe(float* x) { return launch(pipe<false>, 1, 64, 128, 1, x, 5); }
E locked() { return launch(lock_up, 1, 64, 0, 1); }
E miscounted() { return launch(miscount, 1, 64, 0, 1); }
E diverged(float* x) { return launch(diverge, 1, 32, 0, 1, x); }
E outside(int64_t bytes) { return launch(past_the_end, 1, 32, 256, 1, int(bytes)); }
E slack(int64_t bytes) { return launch(past_the_end, 1, 32, 250, 1, int(bytes)); }
E null_pointer() { return launch(null, 1, 32, 0, 1, (int*)nullptr); }
E misaligned() { return launch(unaligned, 1, 32, 1024, 1); }
E no_mbarrier() { return launch(bare_mbarrier, 1, 32, 64, 1); }
E warps(float* x) { return launch(warp, 1, 32, 0, 1, x); }
E half_product(const uint16_t* a, const uint16_t* b, float* c) {
  return launch(product<ptx::Float16>, 1, 32, 1024, 1, a, b, c);
}
E bfloat_product(const uint16_t* a, const uint16_t* b, float* c) {
  return launch(product<ptx::BFloat16>, 1, 32, 1024, 1, a, b, c);
}
E good_stage(const float* x, float* y) { return launch(stage<true>, 1, 32, 512, 1, x, y); }
E racy_stage(const float* x, float* y) { return launch(stage<false>, 1, 32, 512, 1, x, y); }
E good_relay(float* x) { return launch(relay<kGood, false>, 4, 32, 1024, 4, x, 3); }
E bulk_relay(float* x) { return launch(relay<kGood, true>, 4, 32, 1024, 4, x, 3); }
E racy_relay(float* x) { return launch(relay<kUnwaited, false>, 4, 32, 1024, 4, x, 3); }
E leaving_relay(float* x) { return launch(relay<kLeaves, false>, 4, 32, 1024, 4, x, 3); }
E unarmed_relay(float* x) { return launch(relay<kUnarmed, false>, 4, 32, 1024, 4, x, 3); }
int boxed(void (*kernel)(CUtensorMap, uint16_t*, int, int), const uint16_t* x, uint16_t* out, int64_t row) {
  CUtensorMap map;
  const cuuint64_t bytes = 2 * row, sizes[] = {12, 20, 3, 2}, strides[] = {bytes, 20 * bytes, 60 * bytes};
  const cuuint32_t box[] = {16, 8, 1, 1}, steps[] = {1, 1, 1, 1};
  const CUresult made = cuTensorMapEncodeTiled(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, (void*)x, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made ? 99 : launch(kernel, 1, 32, 384, 1, map, out, 0, -3);
}
E good_box(const uint16_t* x, uint16_t* out, int64_t row) { return boxed(box<true>, x, out, row); }
E racy_box(const uint16_t* x, uint16_t* out, int64_t row) { return boxed(box<false>, x, out, row); }
E bounded_wait(int* x) { return launch(bounded, 1, 32, 64, 1, x); }
E round_half(const float* x, float* y, int64_t n) {
  for (int i = 0; i < n; i++) y[i] = __half2float(__float2half_rn(x[i]));
  return 0;
}
E round_bfloat(const float* x, float* y, int64_t n) {
  for (int i = 0; i < n; i++) y[i] = __bfloat162float(__float2bfloat16_rn(x[i]));
  return 0;
}
"""


def call(name, *arguments, **options):
    build(SOURCE).call(name, *arguments, **options)


def failure(name, *arguments, seeds=SEEDS, **options) -> str:
    """What is reported under the first seed that shows it."""
    for seed in seeds:
        try:
            call(name, *arguments, seed=seed, **options)
        except LaunchError as error:
            return str(error)
    return ""


def turned(name, seed):
    x = torch.arange(128.0)
    call(name, x, seed=seed)
    return torch.equal(x, torch.arange(128.0).flip(0))


def piped(name, seed):
    out = torch.zeros(5, 32)
    call(name, out, seed=seed)
    return torch.equal(out, 100 * torch.arange(5.0)[:, None] + torch.arange(32.0))


def relayed(name, seed):
    out = torch.zeros(32)
    call(name, out, seed=seed)
    return torch.equal(out, torch.arange(32.0) + 3 * 4 - 1)


def staged(name, seed):
    x, out = torch.randn(128), torch.zeros(128)
    call(name, x, out, seed=seed)
    return torch.equal(out, x)


def boxes(name, seed):
    """Zeros outside of the tensor; the 16-byte halves of the rows 4 to 7 of every 8 have changed places."""
    x, out = torch.randn(2, 3, 20, 16).half(), torch.zeros(8, 2, 8).half()
    call(name, x, out, 16, seed=seed)
    expected = torch.zeros(8, 16).half()
    expected[3:, :12] = x[1, 2, :5, :12]
    expected = expected.view(8, 2, 8)
    expected[4:] = expected[4:].flip(1)
    return torch.equal(out, expected)


RUNS = {"turn": turned, "pipe": piped, "relay": relayed, "stage": staged, "box": boxes}


@pytest.mark.parametrize("kernel", RUNS)
def test_a_right_kernel_is_right_in_every_order(kernel):
    assert all(RUNS[kernel](f"good_{kernel}", seed) for seed in SEEDS)
    if kernel == "relay":
        assert all(relayed("bulk_relay", seed) for seed in SEEDS)


@pytest.mark.parametrize("kernel", RUNS)
def test_a_missing_barrier_or_wait_is_seen(kernel):
    def seen(seed):
        try:
            return not RUNS[kernel](f"racy_{kernel}", seed)
        except LaunchError:
            return True

    assert any(seen(seed) for seed in SEEDS)


def test_deadlock_tells_who_waits_where():
    text = failure("locked")
    assert "deadlock" in text
    assert "bar.sync 3: 32 threads, 0 .. 31" in text and "bar.sync 5: 32 threads, 32 .. 63" in text
    assert "mbarrier at shared offset 512" in failure("unarmed_relay", torch.zeros(32))


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("miscounted", [], "barrier 1: .* threads, others say"),
        ("diverged", [torch.zeros(1)], "the warp diverged"),
        ("outside", [256], "access outside of shared memory"),
        ("outside", [-1], "write outside of shared memory"),
        ("outside", [-4097], "access outside of shared memory"),
        ("slack", [251], "a write outside of shared memory"),
        ("null_pointer", [], "access outside of memory"),
        ("misaligned", [], "ldmatrix: offset 8 is not aligned"),
        ("no_mbarrier", [], "an mbarrier is used that nobody initialised"),
        ("leaving_relay", [torch.zeros(32)], "block . has ended"),
    ],
)
def test_wrong_kernels_are_reported_and_the_process_lives(name, arguments, text):
    assert re.search(text, failure(name, *arguments)), failure(name, *arguments)
    assert turned("good_turn", 0)


def test_a_tensor_map_that_the_driver_refuses():
    x, out = torch.zeros(2, 3, 20, 17).half(), torch.zeros(128).half()
    assert "99" in failure("good_box", x, out, 17)
    assert "99" in failure("good_box", x.flatten()[1:], out, 16)


def test_bounded_wait():
    out = torch.zeros(1, dtype=torch.int32)
    assert "deadlock" in failure("bounded_wait", out) and int(out) == 0
    call("bounded_wait", out, timeouts=True)
    assert int(out) == 7


def test_warp_functions():
    x = torch.arange(32.0)
    call("warps", x)
    up, down = torch.arange(-1.0, 31.0).clamp(0), torch.arange(1.0, 33.0).clamp(max=31)
    assert torch.equal(x, 496 + 1000 * up + 1e6 * down)


@pytest.mark.parametrize(("name", "dtype"), [("half_product", torch.float16), ("bfloat_product", torch.bfloat16)])
def test_mma_and_ldmatrix_are_a_matrix_product(name, dtype):
    g = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(16, 16, generator=g).to(dtype), torch.randn(16, 8, generator=g).to(dtype), torch.zeros(16, 8)
    call(name, a, b, c, seed=5)
    assert torch.equal(c, (a.double() @ b.double() + 1).float())


@pytest.mark.parametrize(("name", "dtype"), [("round_half", torch.float16), ("round_bfloat", torch.bfloat16)])
def test_16_bit_floats_round_as_torch_does(name, dtype):
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    near = torch.randn(100_000) * 2.0 ** torch.randint(-26, 18, (100_000,))
    x = torch.cat([bits.to(torch.int32).view(torch.float32), near])
    x = torch.cat([x, torch.tensor([0.0, -0.0, 65504.0, 65519.9, 65520.0, torch.inf, -torch.inf, torch.nan])])
    y = torch.empty_like(x)
    call(name, x, y, len(x))
    expected = x.to(dtype).float()
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))
