// causal_attention_decode and kv_cache_update on the CPU: checks, threads, registration, float64. A call may take two
// microseconds: sizes are asked once for each tensor, and what a step needs lies on the stack.
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "causal_attention.h"
#include "torch_stable.h"

namespace audiokernels {
namespace {

constexpr int64_t kStackFloats = 8192;         // 32 KiB: headdim 16 fits
constexpr int64_t kParallelNumbers = 1 << 17;  // keys * headdim below which a second thread costs more than it saves

// A tensor's facts, each asked once. It is on the CPU: were one of a call's tensors elsewhere, so were the kernel.
struct Facts {
  int64_t *sizes, *strides, dim;
  void* data;
  ScalarType dtype;
  explicit Facts(const Tensor& t) : dtype(t.scalar_type()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &sizes));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t.get(), &dim));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(t.get(), &data));
  }
  AttentionTensor tensor() const {
    return {static_cast<char*>(data), {strides[0], strides[1], strides[2], strides[3]}};
  }
};

void check_caches(const Facts& k_cache, const Facts& v_cache) {
  const ScalarType dtype = k_cache.dtype;
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
                      dtype == ScalarType::Double,
                  "k_cache must be float32, bfloat16, float16 or float64");
  STD_TORCH_CHECK(k_cache.dim == 4 && v_cache.dim == 4,
                  "k_cache and v_cache must have 4 dimensions (batch, nheads_kv, capacity, headdim)");
  STD_TORCH_CHECK(v_cache.dtype == dtype, "v_cache must have the dtype of k_cache");
  STD_TORCH_CHECK(std::memcmp(k_cache.sizes, v_cache.sizes, 4 * sizeof(int64_t)) == 0,
                  "v_cache must have the shape of k_cache");
  STD_TORCH_CHECK(k_cache.sizes[3] >= 8 && k_cache.sizes[3] <= 256, "k_cache must have a headdim of 8..256");
}

void check_seqlens(const Facts& seqlens, int64_t batch) {
  STD_TORCH_CHECK(seqlens.dtype == ScalarType::Int, "cache_seqlens must be int32");
  STD_TORCH_CHECK(seqlens.dim == 1 && seqlens.sizes[0] == batch, "cache_seqlens must have shape (batch,)");
  const auto* p = static_cast<const int32_t*>(seqlens.data);
  for (int64_t b = 0; b < batch; b++) STD_TORCH_CHECK(p[b * seqlens.strides[0]] >= 0, "cache_seqlens must be >= 0");
}

// ---- decode ----

void decode_double(const AttentionDecode& c) {
  const auto row = [](const AttentionTensor& t, int64_t b, int64_t h, int64_t i) {
    return reinterpret_cast<double*>(t.data) + b * t.stride[0] + h * t.stride[1] + i * t.stride[2];
  };
  std::vector<double> weights(size_t(c.window));
  for (int64_t at = 0; at < c.batch * c.nheads * c.seqlen_q; at++) {
    const int64_t b = at / c.seqlen_q / c.nheads, h = at / c.seqlen_q % c.nheads, i = at % c.seqlen_q;
    const int64_t own = c.cache_seqlens[b * c.cache_seqlens_stride] + i;
    const int64_t first = own - c.window + 1 > 0 ? own - c.window + 1 : 0;
    const double* q = row(c.q, b, h, i);
    double *out = row(c.out, b, h, i), largest = -INFINITY, total = 0;
    for (int64_t p = first; p <= own; p++) {
      const double* k = row(c.k_cache, b, h / c.group, p % c.seqlen_k);
      double score = 0;
      for (int64_t d = 0; d < c.headdim; d++) score += q[d * c.q.stride[3]] * k[d * c.k_cache.stride[3]];
      weights[size_t(p - first)] = score *= c.scale;
      if (score > largest) largest = score;
    }
    for (int64_t p = first; p <= own; p++)
      total += weights[size_t(p - first)] = std::exp(weights[size_t(p - first)] - largest);
    for (int64_t d = 0; d < c.headdim; d++) {
      double sum = 0;
      for (int64_t p = first; p <= own; p++) {
        const double* v = row(c.v_cache, b, h / c.group, p % c.seqlen_k);
        sum += weights[size_t(p - first)] * v[d * c.v_cache.stride[3]];
      }
      out[d * c.out.stride[3]] = sum / total;
    }
  }
}

auto* pick_decode() {
#define AUDIOKERNELS_CASE(name) \
  case Isa::name: return &name::attention_decode;
  switch (float_isa()) {
    AUDIOKERNELS_FOR_EACH_FLOAT_ISA(AUDIOKERNELS_CASE)
    default: return &generic::attention_decode;
  }
#undef AUDIOKERNELS_CASE
}

void run_decode(const AttentionDecode& call) {
  const auto units = [&](int64_t first, int64_t last) {
    alignas(64) float stack[kStackFloats];
    const int64_t n = call.scratch_floats();
    const std::unique_ptr<float[]> heap(n > kStackFloats ? new float[n] : nullptr);
    pick_decode()(call, first, last, heap ? heap.get() : stack);
  };
  const int64_t work = call.units() * call.queries() * call.window * call.headdim;
  if (work < kParallelNumbers) {
    units(0, call.units());
  } else {
    torch::stable::parallel_for(0, call.units(), call.units() * kParallelNumbers / work + 1, units);
  }
}

// Uninitialised like q, as output_like in the door: memory (batch, m, nheads, headdim) where q lies so.
Tensor decode_output(const Facts& q, int32_t dtype) {
  const int64_t *sizes = q.sizes, row = sizes[3], heads = sizes[1] > 1 ? sizes[1] : 1, m = sizes[2] > 1 ? sizes[2] : 1;
  const auto lies = [&](const int64_t (&strides)[4]) {
    for (int j = 0; j < 4; j++)
      if (sizes[j] != 1 && q.strides[j] != strides[j]) return false;
    return sizes[0] * sizes[1] * sizes[2] != 0;
  };
  const int64_t contiguous[] = {heads * m * row, m * row, row, 1},
                heads_inside[] = {heads * m * row, row, heads * row, 1};
  const int64_t* strides = !lies(contiguous) && lies(heads_inside) ? heads_inside : contiguous;
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &result));
  return Tensor(result);
}

Tensor causal_attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens,
                               std::optional<double> scale, std::optional<int64_t> window) {
  const Facts fq(q), fk(k_cache), fv(v_cache), lens(cache_seqlens);
  check_caches(fk, fv);
  STD_TORCH_CHECK(fq.dim == 4 && fq.dtype == fk.dtype, "q must be (batch, nheads, m, headdim), dtype of k_cache");
  const int64_t heads_kv = fk.sizes[1], capacity = fk.sizes[2], m = fq.sizes[2];
  STD_TORCH_CHECK(fq.sizes[0] == fk.sizes[0] && fq.sizes[3] == fk.sizes[3],
                  "q must have the batch and the headdim of k_cache");
  STD_TORCH_CHECK(heads_kv ? fq.sizes[1] % heads_kv == 0 : fq.sizes[1] == 0,
                  "q must have a multiple of the heads of k_cache");
  check_seqlens(lens, fq.sizes[0]);
  STD_TORCH_CHECK(!window || (*window >= 1 && *window < int64_t{1} << 62), "window must be >= 1");
  STD_TORCH_CHECK(!scale || std::isfinite(*scale), "scale must be finite");
  const int64_t keys = window ? *window : capacity - m + 1;
  STD_TORCH_CHECK(keys >= 1 && capacity >= keys + m - 1, "k_cache must have a capacity >= window + m - 1");

  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(q.get(), &dtype));
  Tensor out = decode_output(fq, dtype);
  AttentionDecode call{};
  call.batch = fq.sizes[0], call.nheads = fq.sizes[1], call.nheads_kv = heads_kv;
  call.seqlen_q = m, call.seqlen_k = capacity, call.headdim = fq.sizes[3];
  if (call.batch * call.nheads * m == 0) return out;
  call.group = call.nheads / heads_kv;
  call.window = keys;
  call.scale = scale ? *scale : 1 / std::sqrt(double(call.headdim));
  call.dtype = dtype_of(fq.dtype);
  call.q = fq.tensor(), call.k_cache = fk.tensor(), call.v_cache = fv.tensor(), call.out = Facts(out).tensor();
  call.cache_seqlens = static_cast<const int32_t*>(lens.data);
  call.cache_seqlens_stride = lens.strides[0];
  if (call.dtype == Dtype::float64) {
    decode_double(call);
  } else {
    run_decode(call);
  }
  return out;
}

// ---- update ----

// Numbers of `bytes` bytes, headdim of them.
void copy_row(const char* from, int64_t from_stride, char* to, int64_t to_stride, int64_t bytes, int64_t headdim) {
  if (from_stride == 1 && to_stride == 1) {
    std::memcpy(to, from, size_t(headdim * bytes));
    return;
  }
  for (int64_t d = 0; d < headdim; d++)
    std::memcpy(to + d * to_stride * bytes, from + d * from_stride * bytes, size_t(bytes));
}

// The rows of x go to the slots of the positions from cache_seqlens on.
void write_slots(const Facts& cache, const Facts& x, const Facts& seqlens) {
  const int64_t heads = x.sizes[1], m = x.sizes[2], bytes = bytes_of(dtype_of(x.dtype));
  const AttentionTensor to = cache.tensor(), from = x.tensor();
  for (int64_t b = 0; b < x.sizes[0]; b++) {
    const int64_t before = static_cast<const int32_t*>(seqlens.data)[b * seqlens.strides[0]];
    for (int64_t h = 0; h < heads; h++) {
      for (int64_t i = 0; i < m; i++) {
        const int64_t slot = (before + i) % cache.sizes[2];
        copy_row(from.data + (b * from.stride[0] + h * from.stride[1] + i * from.stride[2]) * bytes, from.stride[3],
                 to.data + (b * to.stride[0] + h * to.stride[1] + slot * to.stride[2]) * bytes, to.stride[3], bytes,
                 x.sizes[3]);
      }
    }
  }
}

void kv_cache_update(Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, Tensor cache_seqlens) {
  const Facts caches[] = {Facts(k_cache), Facts(v_cache)}, rows[] = {Facts(k), Facts(v)}, lens(cache_seqlens);
  check_caches(caches[0], caches[1]);
  const int64_t* sizes = caches[0].sizes;
  for (const Facts& x : rows) {
    STD_TORCH_CHECK(x.dim == 4 && x.dtype == caches[0].dtype, "k and v must have 4 dimensions and the caches' dtype");
    STD_TORCH_CHECK(x.sizes[0] == sizes[0] && x.sizes[1] == sizes[1] && x.sizes[3] == sizes[3] &&
                        x.sizes[2] == rows[0].sizes[2] && x.sizes[2] <= sizes[2],
                    "k and v must have shape (batch, nheads_kv, m, headdim), m <= capacity");
  }
  for (const Facts& cache : caches)
    for (int i = 0; i < 4; i++)
      STD_TORCH_CHECK(cache.strides[i] != 0 || cache.sizes[i] <= 1, "a cache must not be an expanded view");
  check_seqlens(lens, sizes[0]);
  write_slots(caches[0], rows[0], lens);
  write_slots(caches[1], rows[1], lens);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(audiokernels, CPU, m) {
  m.impl("causal_attention_decode", TORCH_BOX(&causal_attention_decode));
  m.impl("kv_cache_update", TORCH_BOX(&kv_cache_update));
}

}  // namespace audiokernels
