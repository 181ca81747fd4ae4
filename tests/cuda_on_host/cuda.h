// Stands in for the header of the CUDA driver: tensor maps of four dimensions, 16-bit elements and 32-byte swizzle,
// which are refused where the driver would refuse them.
#pragma once

#include "cuda_on_host.h"

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_32B = 1 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };
struct alignas(64) CUtensorMap {
  uint64_t opaque[16];
};

namespace cuda_on_host {
constexpr uint64_t kTensorMapMark = 0x7e2508;
struct TensorMap {
  uint64_t mark;
  const unsigned char* data;
  int64_t sizes[4], strides[3];  // strides in bytes, of the second dimension and on
  uint32_t box[4];
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
}  // namespace cuda_on_host

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  cuda_on_host::TensorMap m{cuda_on_host::kTensorMapMark, static_cast<const unsigned char*>(data), {}, {}, {}};
  bool good = rank == 4 && reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
              2 * box[0] % 16 == 0 && 2 * box[0] <= 32;
  for (int i = 0; i < 4; i++) {
    good = good && sizes[i] > 0 && sizes[i] <= uint64_t{1} << 32 && box[i] > 0 && box[i] <= 256 && steps[i] == 1;
    good = good && (i == 3 || (strides[i] > 0 && strides[i] % 16 == 0 && strides[i] < uint64_t{1} << 40));
    m.sizes[i] = int64_t(sizes[i]), m.box[i] = box[i];
    if (i < 3) m.strides[i] = int64_t(strides[i]);
  }
  memcpy(map, &m, sizeof m);
  return good ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
enum { cudaEnableDefault = 0 };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0 };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult*) {
  *function = reinterpret_cast<void*>(cuTensorMapEncodeTiled);
  return strcmp(name, "cuTensorMapEncodeTiled") == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
