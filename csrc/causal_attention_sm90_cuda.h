// causal_attention on GPUs from sm_90 on, headdim 8 and 16, bfloat16, forward: a call and its torch-free launcher.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace audiokernels {

// Strides count elements. Rows of k and v lie at multiples of 16 bytes, their numbers side by side, as in out.
struct AttentionCall {
  const uint16_t *q, *k, *v;
  uint16_t* out;
  float* lse;                                                  // (batch, nheads, seqlen_q)
  int64_t q_stride[4], k_stride[3], v_stride[3], o_stride[3];  // batch, head, row, and of q the number within it
  int batch, nheads, group, seqlen_q, seqlen_k, headdim;       // group: heads of q a head of k
  int window;                                                  // at most seqlen_k
  float scale;                                                 // of logits in log2 units
};

// cudaErrorInvalidValue where the tensor maps do not take the strides, cudaErrorNoKernelImageForDevice where this build
// has no such kernel for the current device.
cudaError_t causal_attention_sm90_cuda(const AttentionCall& call, cudaStream_t stream);

}  // namespace audiokernels
