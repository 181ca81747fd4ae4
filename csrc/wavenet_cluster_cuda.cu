// WaveNet generation by clusters of thread blocks, sm_90 and later; compiled, not yet run on a GPU.
//
// A cluster runs `groups` groups of 8 streams, each in turn in every block. Its first blocks share the layers, weights
// in registers and shared memory; the others share the rows of skip, head and output, and draw. A group goes from block
// to block: residual and gate output by st.async, the gate output of every layer to the head blocks by bulk copies, the
// codes back to block 0. While a group is in one block, the others are in the blocks before and behind it.
//
//     z_l = M_l h_l-1 + W_cur x_l-1 + (past taps, bias, condition),   M_l = W_cur,l W_res,l-1
//     x_l = x_l-1 + W_res h_l-1
//
// so that a layer costs one barrier: x_l is computed beside h_l. M is formed at the start, in float32, rounded once; x
// stays in float32 registers. Vectors of 8 streams are [channel][stream] in 16 bits, the B operand of mma. Weights are
// of 16 bits, or int8 that TileRow widens to float16 as it reads them from shared memory; those in registers are of 16
// bits.
//
// Nothing is overwritten early, without any credit: every buffer belongs to one group, a group's step t + 1 begins when
// all its codes of step t are there, and those need every value of step t to have been read.
#include "wavenet_cluster_head.h"
#include "wavenet_cluster_layers.h"

namespace audiokernels {
namespace {

template <int R, class Weights>
__global__ void __launch_bounds__(kThreads, 1)
    cluster_kernel(const __grid_constant__ WaveNetCall c, const __grid_constant__ WaveNetCluster k,
                   const __grid_constant__ Places at) {
#ifdef AK_CLUSTERS
  const int64_t first = int64_t(blockIdx.x / (k.layer_blocks + k.head_blocks)) * k.groups * kStreams;
  if (int(ptx::cluster_rank()) < k.layer_blocks)
    LayerBlock<R, Weights>(c, k, at, first).run();
  else
    HeadBlock<R, Weights>(c, k, at, first).run();
  ptx::cluster_arrive();  // no block ends while others may write into it
  ptx::cluster_wait();
#endif
}

using Kernel = void (*)(WaveNetCall, WaveNetCluster, Places);

template <class Weights>
Kernel kernel_of(const WaveNetCall& c) {
  switch (c.residual) {
    case 32: return cluster_kernel<32, Weights>;
    case 64: return cluster_kernel<64, Weights>;
    default: return cluster_kernel<128, Weights>;
  }
}
Kernel kernel_of(const WaveNetCall& c) {
  switch (c.dtype) {
    case kFloat16: return kernel_of<ptx::Float16>(c);
    case kBFloat16: return kernel_of<ptx::BFloat16>(c);
    default: return kernel_of<Int8>(c);
  }
}

// The launch for a call; cudaErrorInvalidValue if the call is not one for this kernel.
cudaError_t configure(const WaveNetCall& c, const WaveNetCluster& k, Kernel* kernel, cudaLaunchConfig_t* config) {
  const int local = k.layer_blocks > 0 ? (c.n_layer + k.layer_blocks - 1) / k.layer_blocks : 0;
  const int tiles = 16 * k.head_blocks;
  const bool sizes =
      (c.residual == 32 || c.residual == 64 || c.residual == 128) && c.hidden == c.residual && c.width >= 2;
  const bool rows = c.skip_rows >= tiles && c.head_rows >= tiles && c.class_rows >= tiles && c.skip_rows <= 256 &&
                    c.head_rows <= 256 && c.n_class <= 256;
  if (!sizes || !rows || k.groups < 1 || k.layer_blocks < 1 || k.layer_blocks > c.n_layer ||
      local > most_local(c.residual) || 3 * Places::warps_of(c, k) > kWarps || c.dtype == kFloat32)
    return cudaErrorInvalidValue;
  *kernel = kernel_of(c);
  const int bytes = Places(c, k).bytes, blocks = k.layer_blocks + k.head_blocks, streams = k.groups * kStreams;
  cudaError_t error = allow_all_shared(*kernel);
  if (error == cudaSuccess && blocks > 8)
    error = cudaFuncSetAttribute(*kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  config->gridDim = dim3(unsigned((c.batch + streams - 1) / streams * blocks));
  config->blockDim = dim3(kThreads);
  config->dynamicSmemBytes = size_t(bytes);
  config->attrs[0].id = cudaLaunchAttributeClusterDimension;
  config->attrs[0].val.clusterDim.x = unsigned(blocks);
  config->attrs[0].val.clusterDim.y = config->attrs[0].val.clusterDim.z = 1;
  config->numAttrs = 1;
  return error;
}

}  // namespace

cudaError_t wavenet_cluster_cuda(const WaveNetCall& call, const WaveNetCluster& cluster, cudaStream_t stream) {
  Kernel kernel = nullptr;
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  config.attrs = &attribute;
  config.stream = stream;
  const cudaError_t error = configure(call, cluster, &kernel, &config);
  return error == cudaSuccess ? cudaLaunchKernelEx(&config, kernel, call, cluster, Places(call, cluster)) : error;
}

cudaError_t wavenet_cluster_most(const WaveNetCall& call, const WaveNetCluster& cluster, int* clusters) {
  Kernel kernel = nullptr;
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  config.attrs = &attribute;
  const cudaError_t error = configure(call, cluster, &kernel, &config);
  if (error != cudaSuccess) return error;
  config.gridDim = dim3(attribute.val.clusterDim.x);  // of one cluster: sizes alone have no batch
  return has_clusters(kernel) ? cudaOccupancyMaxActiveClusters(clusters, kernel, &config) : cudaErrorInvalidValue;
}

}  // namespace audiokernels
