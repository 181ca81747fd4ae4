// Causal attention on the CPU: checks, results, threads, registration. The hot loops are *_simd.cpp; float64 is here.
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "causal_attention.h"
#include "floats.h"
#include "torch_stable.h"

namespace audiokernels {
namespace {

struct Kernels {
  Isa isa;
  decltype(&generic::attention_read) read;
  decltype(&generic::attention_forward) forward;
  decltype(&generic::attention_pack) pack;
  decltype(&generic::attention_backward) backward;
  decltype(&generic::attention_write_dq) write_dq;
};

Kernels pick_kernels(Dtype dtype) {
#define AUDIOKERNELS_KERNELS(name) \
  {Isa::name,                      \
   &name::attention_read,          \
   &name::attention_forward,       \
   &name::attention_pack,          \
   &name::attention_backward,      \
   &name::attention_write_dq}
#define AUDIOKERNELS_CASE(name) \
  case Isa::name: return AUDIOKERNELS_KERNELS(name);
  switch (dtype == Dtype::bfloat16 ? bfloat16_isa() : float_isa()) {
    AUDIOKERNELS_FOR_EACH_BFLOAT16_ISA(AUDIOKERNELS_CASE)
    default: return AUDIOKERNELS_KERNELS(generic);
  }
#undef AUDIOKERNELS_CASE
#undef AUDIOKERNELS_KERNELS
}

// ---- arguments and results ----

AttentionTensor attention_tensor(const Tensor& t) {
  return {static_cast<char*>(t.data_ptr()), {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

void check_like(const Tensor& t, const char* name, const Tensor& q) {
  STD_TORCH_CHECK(t.dim() == 4, name, " must have 4 dimensions (batch, heads, seqlen, headdim)");
  STD_TORCH_CHECK(t.scalar_type() == q.scalar_type(), name, " must have the dtype of q");
}

AttentionSizes check_sizes(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale,
                           std::optional<int64_t> window) {
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
                      dtype == ScalarType::Double,
                  "q must be float32, bfloat16, float16 or float64");
  check_like(q, "q", q);
  check_like(k, "k", q);
  check_like(v, "v", q);
  AttentionSizes s{};
  s.batch = q.size(0), s.nheads = q.size(1), s.seqlen_q = q.size(2), s.headdim = q.size(3);
  s.nheads_kv = k.size(1), s.seqlen_k = k.size(2);
  s.dtype = dtype_of(dtype);
  STD_TORCH_CHECK(s.headdim >= 8 && s.headdim <= 256, "q must have a headdim of 8..256");
  STD_TORCH_CHECK(k.size(0) == s.batch && k.size(3) == s.headdim, "k must have the batch and the headdim of q");
  for (int i = 0; i < 4; i++) STD_TORCH_CHECK(v.size(i) == k.size(i), "v must have the shape of k");
  STD_TORCH_CHECK(s.nheads_kv ? s.nheads % s.nheads_kv == 0 : s.nheads == 0,
                  "q must have a multiple of the heads of k");
  STD_TORCH_CHECK(s.seqlen_q <= s.seqlen_k, "k must be at least as long as q");
  STD_TORCH_CHECK(!window || *window >= 1, "window must be >= 1");
  s.group = s.nheads_kv ? s.nheads / s.nheads_kv : 1;
  s.window = window && *window < s.seqlen_k ? *window : s.seqlen_k;
  s.scale = scale ? *scale : 1 / std::sqrt(double(s.headdim));
  STD_TORCH_CHECK(std::isfinite(s.scale), "scale must be finite");
  return s;
}

bool is_contiguous(const Tensor& t, std::initializer_list<int> order) {
  int64_t expected = 1;
  for (auto i = std::rbegin(order); i != std::rend(order); ++i) {
    if (t.size(*i) == 0) return true;
    if (t.size(*i) != 1 && t.stride(*i) != expected) return false;
    expected *= t.size(*i);
  }
  return true;
}

// Uninitialised like x, as output_like in the door: memory (batch, seqlen, heads, headdim) where x lies so.
Tensor output_like(const Tensor& x) {
  const auto at_least_1 = [&](int i) { return x.size(i) > 1 ? x.size(i) : 1; };
  const int64_t sizes[] = {x.size(0), x.size(1), x.size(2), x.size(3)};
  const int64_t row = at_least_1(3), heads = at_least_1(1), seqlen = at_least_1(2);
  const bool heads_inside = is_contiguous(x, {0, 2, 1, 3}) && !is_contiguous(x, {0, 1, 2, 3});
  const int64_t strides[] = {row * heads * seqlen, heads_inside ? row : row * seqlen, heads_inside ? row * heads : row,
                             1};
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return empty_strided(x, 4, sizes, strides, dtype);
}

Tensor lse_like(const Tensor& q) {
  const auto at_least_1 = [&](int i) { return q.size(i) > 1 ? q.size(i) : 1; };
  const int64_t sizes[] = {q.size(0), q.size(1), q.size(2)};
  const int64_t strides[] = {at_least_1(1) * at_least_1(2), at_least_1(2), 1};
  const bool float64 = q.scalar_type() == ScalarType::Double;
  return empty_strided(q, 3, sizes, strides, float64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
}

// A tensor's rows as words, its own memory where that will do; `memory` keeps a copy alive.
AttentionRows word_rows(const Kernels& kernels, const Tensor& t, Dtype dtype, AttentionPairs pairs, Floats& memory) {
  const AttentionTensor tensor = attention_tensor(t);
  const int64_t sizes[] = {t.size(0), t.size(1), t.size(2), t.size(3)};
  if (dtype == Dtype::float32 && tensor.stride[3] == 1 && sizes[3] % 8 == 0)
    return {static_cast<const float*>(t.data_ptr()), {tensor.stride[0], tensor.stride[1], tensor.stride[2]}};
  const int64_t channels = attention_round_up(sizes[3], attention_channels(kernels.isa));
  const int64_t row = channels / attention_per_word(kernels.isa), unit_rows = attention_unit_rows(kernels.isa);
  const int64_t per_head = (sizes[2] + unit_rows - 1) / unit_rows, units = sizes[0] * sizes[1] * per_head;
  const int64_t head = per_head * unit_rows * row;
  memory = new_floats(sizes[0] * sizes[1] * head);
  torch::stable::parallel_for(0, units, 4096 / unit_rows, [&](int64_t first, int64_t last) {
    kernels.read(tensor, sizes, dtype, pairs, memory.get(), channels, first, last);
  });
  return {memory.get(), {sizes[1] * head, head, row}};
}

// Calls kernel(call, first, last, scratch) from several threads.
template <class Call>
void run_units(void (*kernel)(const Call&, int64_t, int64_t, float*), const Call& call, int64_t units) {
  torch::stable::parallel_for(0, units, 1, [&](int64_t first, int64_t last) {
    const Floats scratch = new_floats(call.scratch_floats());
    kernel(call, first, last, scratch.get());
  });
}

// ---- float64: no tiles, a row of weights at a time ----

struct DoubleView {
  double* data;
  int64_t stride[4];
  explicit DoubleView(const Tensor& t) : data(static_cast<double*>(t.data_ptr())), stride{} {
    for (int i = 0; i < t.dim(); i++) stride[i] = t.stride(i);
  }
  double* row(int64_t b, int64_t h, int64_t i) const { return data + b * stride[0] + h * stride[1] + i * stride[2]; }
};

double dot(const double* a, int64_t a_stride, const double* b, int64_t b_stride, int64_t n) {
  double sum[4] = {};  // four short sums round less than a long one
  for (int64_t d = 0; d < n; d++) sum[d % 4] += a[d * a_stride] * b[d * b_stride];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// y += factor * x
void add(double factor, const double* x, int64_t x_stride, double* y, int64_t y_stride, int64_t n) {
  for (int64_t d = 0; d < n; d++) y[d * y_stride] += factor * x[d * x_stride];
}

// Calls row(b, h, i, first key, last key) for the queries of heads [first, last).
template <class Row>
void for_each_query(const AttentionSizes& s, int64_t first, int64_t last, const Row& row) {
  for (int64_t head = first; head < last; head++) {
    for (int64_t i = 0; i < s.seqlen_q; i++) {
      const int64_t own = s.key_of(i), oldest = own - s.window + 1;
      row(head / s.nheads, head % s.nheads, i, oldest > 0 ? oldest : 0, own);
    }
  }
}

void forward_double(const AttentionSizes& s, const Tensor& q, const Tensor& k, const Tensor& v, Tensor& out,
                    Tensor& lse) {
  const DoubleView vq(q), vk(k), vv(v), vout(out), vlse(lse);
  torch::stable::parallel_for(0, s.batch * s.nheads, 1, [&](int64_t first_head, int64_t last_head) {
    std::vector<double> weights(size_t(s.window));
    for_each_query(s, first_head, last_head, [&](int64_t b, int64_t h, int64_t i, int64_t first, int64_t last) {
      double largest = -INFINITY, total = 0;
      for (int64_t j = first; j <= last; j++) {
        double& w = weights[size_t(j - first)];
        w = s.scale * dot(vq.row(b, h, i), vq.stride[3], vk.row(b, h / s.group, j), vk.stride[3], s.headdim);
        if (w > largest) largest = w;
      }
      double* row = vout.row(b, h, i);
      for (int64_t d = 0; d < s.headdim; d++) row[d * vout.stride[3]] = 0;
      for (int64_t j = first; j <= last; j++) total += std::exp(weights[size_t(j - first)] - largest);
      const double row_lse = largest + std::log(total);
      for (int64_t j = first; j <= last; j++)
        add(std::exp(weights[size_t(j - first)] - row_lse), vv.row(b, h / s.group, j), vv.stride[3], row,
            vout.stride[3], s.headdim);
      vlse.data[b * vlse.stride[0] + h * vlse.stride[1] + i * vlse.stride[2]] = row_lse;
    });
  });
}

struct Gradients {
  Tensor dq, dk, dv;
};

void backward_double(const AttentionSizes& s, const Tensor& grad_out, const std::optional<Tensor>& grad_lse,
                     const Tensor (&saved)[5], Gradients& gradients) {
  const auto& [q, k, v, out, lse] = saved;
  const DoubleView vgrad(grad_out), vq(q), vk(k), vv(v), vout(out), vlse(lse), vgrad_lse(grad_lse ? *grad_lse : lse);
  const DoubleView vdq(gradients.dq), vdk(gradients.dk), vdv(gradients.dv);
  torch::stable::zero_(gradients.dq);
  torch::stable::zero_(gradients.dk);
  torch::stable::zero_(gradients.dv);
  const auto at = [](const DoubleView& t, int64_t b, int64_t h, int64_t i) { return *t.row(b, h, i); };
  torch::stable::parallel_for(0, s.batch * s.nheads_kv, 1, [&](int64_t first_head, int64_t last_head) {
    for_each_query(s, first_head * s.group, last_head * s.group,
                   [&](int64_t b, int64_t h, int64_t i, int64_t first, int64_t last) {
                     const int64_t n = s.headdim, kv = h / s.group;
                     const double *q_row = vq.row(b, h, i), *grad_row = vgrad.row(b, h, i);
                     const double shift = (grad_lse ? at(vgrad_lse, b, h, i) : 0) -
                                          dot(grad_row, vgrad.stride[3], vout.row(b, h, i), vout.stride[3], n);
                     for (int64_t j = first; j <= last; j++) {
                       const double* k_row = vk.row(b, kv, j);
                       const double p =
                           std::exp(s.scale * dot(q_row, vq.stride[3], k_row, vk.stride[3], n) - at(vlse, b, h, i));
                       const double dp = dot(grad_row, vgrad.stride[3], vv.row(b, kv, j), vv.stride[3], n);
                       const double ds = s.scale * p * (dp + shift);
                       add(ds, k_row, vk.stride[3], vdq.row(b, h, i), vdq.stride[3], n);
                       add(ds, q_row, vq.stride[3], vdk.row(b, kv, j), vdk.stride[3], n);
                       add(p, grad_row, vgrad.stride[3], vdv.row(b, kv, j), vdv.stride[3], n);
                     }
                   });
  });
}

// ---- the ops ----

std::tuple<Tensor, Tensor> causal_attention(Tensor q, Tensor k, Tensor v, std::optional<double> scale,
                                            std::optional<int64_t> window) {
  AttentionForward call{check_sizes(q, k, v, scale, window), attention_tensor(q), {}, {}, {}, nullptr};
  Tensor out = output_like(q), lse = lse_like(q);
  if (q.numel() == 0) return {out, lse};
  if (call.dtype == Dtype::float64) {
    forward_double(call, q, k, v, out, lse);
    return {out, lse};
  }
  const Kernels kernels = pick_kernels(call.dtype);
  Floats k_memory, v_memory;
  call.k = word_rows(kernels, k, call.dtype, AttentionPairs::channels, k_memory);
  call.v = word_rows(kernels, v, call.dtype, AttentionPairs::rows, v_memory);
  call.out = attention_tensor(out);
  call.lse = static_cast<float*>(lse.data_ptr());
  run_units(kernels.forward, call, call.batch * call.nheads * call.units_per_head());
  return {out, lse};
}

// The keys of a kv head are cut where heads are few: for threads, yet the same for any number of them.
int64_t segments_of(const AttentionBackward& call) {
  constexpr int64_t kUnits = 16, kFewestKeys = 384;
  const int64_t wanted = (kUnits - 1) / (call.batch * call.nheads_kv) + 1,
                most = call.key_blocks() * call.block_keys / kFewestKeys;
  return wanted < most ? wanted : most > 1 ? most : 1;
}

void run_backward(AttentionBackward& call, const Tensor& q, const Tensor& grad_out) {
  const Kernels kernels = pick_kernels(call.dtype);
  const int64_t heads = call.batch * call.nheads;
  Floats q_memory, grad_memory, q_sums_memory, grad_sums_memory;
  call.q_rows = call.q_sums = word_rows(kernels, q, call.dtype, AttentionPairs::channels, q_memory);
  call.block_keys = attention_block_keys(kernels.isa);
  if (attention_per_word(kernels.isa) == 1) {
    grad_memory = new_floats(heads * call.row_floats());
    call.grad_floats = grad_memory.get();
    call.grad_rows =
        call.grad_sums = {call.grad_floats, {call.nheads * call.row_floats(), call.row_floats(), call.channels()}};
  } else {
    call.grad_rows = word_rows(kernels, grad_out, call.dtype, AttentionPairs::channels, grad_memory);
    call.grad_sums = word_rows(kernels, grad_out, call.dtype, AttentionPairs::rows, grad_sums_memory);
    call.q_sums = word_rows(kernels, q, call.dtype, AttentionPairs::rows, q_sums_memory);
  }
  call.segments = segments_of(call);
  const Floats numbers = new_floats(2 * heads * call.padded_queries());
  const Floats dq_parts = new_floats(heads * call.row_floats() * call.segments);
  call.row_numbers = numbers.get();
  call.dq_parts = dq_parts.get();
  run_units(kernels.pack, call, heads * call.units_per_head());
  run_units(kernels.backward, call, call.batch * call.nheads_kv * call.segments);
  run_units(kernels.write_dq, call, heads * call.units_per_head());
}

std::tuple<Tensor, Tensor, Tensor> causal_attention_backward(Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q,
                                                             Tensor k, Tensor v, Tensor out, Tensor lse,
                                                             std::optional<double> scale,
                                                             std::optional<int64_t> window) {
  AttentionBackward call{};
  static_cast<AttentionSizes&>(call) = check_sizes(q, k, v, scale, window);
  const ScalarType sum_dtype = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_like(grad_out, "grad_out", q);
  check_like(out, "out", q);
  for (int i = 0; i < 4; i++)
    STD_TORCH_CHECK(grad_out.size(i) == q.size(i) && out.size(i) == q.size(i), "grad_out and out must be shaped as q");
  for (const Tensor* t : {&lse, grad_lse ? &*grad_lse : &lse}) {
    STD_TORCH_CHECK(t->dim() == 3 && t->size(0) == call.batch && t->size(1) == call.nheads &&
                        t->size(2) == call.seqlen_q && t->scalar_type() == sum_dtype,
                    "lse and grad_lse must be (batch, nheads, seqlen_q), float32 (float64 for float64)");
  }
  Gradients gradients{output_like(q), output_like(k), output_like(v)};
  if (q.numel() == 0) {
    torch::stable::zero_(gradients.dk);
    torch::stable::zero_(gradients.dv);
  } else if (call.dtype == Dtype::float64) {
    backward_double(call, grad_out, grad_lse, {q, k, v, out, lse}, gradients);
  } else {
    lse = torch::stable::contiguous(lse);
    if (grad_lse) grad_lse = torch::stable::contiguous(*grad_lse);
    call.grad_out = attention_tensor(grad_out);
    call.q = attention_tensor(q);
    call.k = attention_tensor(k);
    call.v = attention_tensor(v);
    call.out = attention_tensor(out);
    call.dq = attention_tensor(gradients.dq);
    call.dk = attention_tensor(gradients.dk);
    call.dv = attention_tensor(gradients.dv);
    call.lse = static_cast<const float*>(lse.data_ptr());
    call.grad_lse = grad_lse ? static_cast<const float*>(grad_lse->data_ptr()) : nullptr;
    run_backward(call, q, grad_out);
  }
  return {gradients.dq, gradients.dk, gradients.dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(audiokernels, CPU, m) {
  m.impl("causal_attention", TORCH_BOX(&causal_attention));
  m.impl("causal_attention_backward", TORCH_BOX(&causal_attention_backward));
}

}  // namespace audiokernels
