// _causal_attention_sm90 on CUDA: checks and binding of the kernel. Which calls take it: causal_attention_plan.py.
#include "causal_attention_sm90_cuda.h"

#include "cuda_stream.h"
#include "torch_stable.h"

namespace audiokernels {
namespace {

const uint16_t* data_of(const Tensor& x) { return static_cast<const uint16_t*>(x.data_ptr()); }

// Fills in the strides of (batch, head, row) of a tensor with dense rows.
void check_rows(const Tensor& x, const char* name, int64_t (&strides)[3]) {
  STD_TORCH_CHECK(x.stride(3) == 1, name, " must have the numbers of a row side by side");
  for (int i = 0; i < 3; i++) strides[i] = x.stride(i);
}

// out and lse are written. scale: of logits in log2 units; window: at most seqlen_k.
void _causal_attention_sm90(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, double scale, int64_t window) {
  for (const Tensor* x : {&q, &k, &v, &out})
    STD_TORCH_CHECK(x->is_cuda() && x->get_device_index() == q.get_device_index() &&
                        x->scalar_type() == ScalarType::BFloat16 && x->dim() == 4,
                    "q, k, v and out must be bfloat16 tensors of 4 dimensions on one GPU");
  const int64_t batch = q.size(0), nheads = q.size(1), seqlen_q = q.size(2), headdim = q.size(3);
  const int64_t nheads_kv = k.size(1), seqlen_k = k.size(2);
  STD_TORCH_CHECK(batch > 0 && nheads_kv > 0 && nheads > 0 && nheads % nheads_kv == 0 && seqlen_q > 0 &&
                      seqlen_q <= seqlen_k && (headdim == 8 || headdim == 16),
                  "q must not be empty, and have a multiple of the heads of k, no more rows, and headdim 8 or 16");
  STD_TORCH_CHECK(batch <= 65535 && seqlen_q <= (int64_t{1} << 22) && seqlen_k <= (int64_t{1} << 30) &&
                      nheads <= (int64_t{1} << 30),
                  "q or k is too large for the grid");
  for (const Tensor* x : {&k, &v})
    STD_TORCH_CHECK(x->size(0) == batch && x->size(1) == nheads_kv && x->size(2) == seqlen_k && x->size(3) == headdim,
                    "k and v must have shape (batch, nheads_kv, seqlen_k, headdim)");
  STD_TORCH_CHECK(out.size(0) == batch && out.size(1) == nheads && out.size(2) == seqlen_q && out.size(3) == headdim,
                  "out must have the shape of q");
  STD_TORCH_CHECK(lse.is_cuda() && lse.get_device_index() == q.get_device_index() &&
                      lse.scalar_type() == ScalarType::Float && lse.dim() == 3 && lse.size(0) == batch &&
                      lse.size(1) == nheads && lse.size(2) == seqlen_q && lse.is_contiguous(),
                  "lse must be a contiguous float32 (batch, nheads, seqlen_q) on the device of q");
  STD_TORCH_CHECK(window >= 1 && window <= seqlen_k, "window must be 1..seqlen_k");
  AttentionCall call{};
  call.q = data_of(q), call.k = data_of(k), call.v = data_of(v);
  call.out = static_cast<uint16_t*>(out.data_ptr()), call.lse = static_cast<float*>(lse.data_ptr());
  for (int i = 0; i < 4; i++) call.q_stride[i] = q.stride(i);
  check_rows(k, "k", call.k_stride);
  check_rows(v, "v", call.v_stride);
  check_rows(out, "out", call.o_stride);
  for (int64_t stride : call.o_stride) STD_TORCH_CHECK(stride % 2 == 0, "out must have even strides");
  call.batch = int(batch), call.nheads = int(nheads), call.group = int(nheads / nheads_kv);
  call.seqlen_q = int(seqlen_q), call.seqlen_k = int(seqlen_k), call.headdim = int(headdim);
  call.window = int(window), call.scale = float(scale);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const auto stream = static_cast<cudaStream_t>(current_cuda_stream(q.get_device_index()));
  const cudaError_t error = causal_attention_sm90_cuda(call, stream);
  check_cuda("causal_attention", error, cudaGetErrorString(error));
}

STABLE_TORCH_LIBRARY_IMPL(audiokernels, CUDA, m) {
  if (!torch_is_rocm()) m.impl("_causal_attention_sm90", TORCH_BOX(&_causal_attention_sm90));
}

}  // namespace
}  // namespace audiokernels
