// WaveNet generation on a GPU: a call's sizes and pointers, and the torch-free launchers. The packed layout is that of
// audiokernels/wavenet_pack.py, the state that of wavenet_generate.h.
#pragma once

#include "generation_cuda.h"
#include "wavenet_generate.h"

namespace audiokernels {

constexpr int kMostLayers = 256;  // they travel with the launch

// Where the time of a block of a cluster goes; audiokernels/wavenet_stages.py names the stages.
enum Stage {
  kWaitInput,  // a block of layers
  kEmbed,
  kLayers,
  kPrepare,
  kSkip,  // a head block: the warps of skip and head
  kWaitSkip,
  kHead,
  kWaitHead,  // and those of the output
  kOut,
  kWaitLogits,
  kDraw,
  kNanoseconds,  // no stage: the time of all of them together, of a block of layers
  kStages
};

struct WaveNetCall : CudaCall {
  int dtype, residual, hidden, skip, head, width, condition, n_layer;
  int x_rows, h_rows, skip_rows, head_rows, class_rows;  // padded to 16; the gate has twice h_rows
  float* base;  // scratch: (batch, n_layer, 2 h_rows) biases with the projected condition; null without one
  unsigned long long* stages;  // (blocks of a cluster, kStages) clock cycles, or null
  int32_t dilations[kMostLayers];
};

// One block for `streams` (1 or 4) streams, any sizes, weights from L2.
cudaError_t wavenet_general_cuda(const WaveNetCall& call, int streams, int shared_bytes, cudaStream_t stream);

// How a cluster of blocks shares a call: `groups` of 8 streams in flight, layers over layer_blocks, rows of skip, head
// and output over head_blocks.
struct WaveNetCluster {
  int groups, layer_blocks, head_blocks;
};
cudaError_t wavenet_cluster_cuda(const WaveNetCall& call, const WaveNetCluster& cluster, cudaStream_t stream);
// How many such clusters may be resident on the current device at once.
cudaError_t wavenet_cluster_most(const WaveNetCall& call, const WaveNetCluster& cluster, int* clusters);

}  // namespace audiokernels
