// The only door to torch: its stable ABI, so that one binary serves torch 2.11 and every later one.
// With a target version set, any header outside the stable set stops the compiler.
#pragma once

#ifndef TORCH_TARGET_VERSION
#define TORCH_TARGET_VERSION 0x020a000000000000  // 2.10: all that the kernels need
#endif

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/version.h>

#include "dtype.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK  // its name in torch 2.11
#endif

namespace audiokernels {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Of a dtype that an op takes.
inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: return Dtype::float32;
  }
}

// An uninitialised tensor on the device of `like`. torch::stable::new_empty looks its op up by name on every call,
// which costs a step op a third of its time.
inline Tensor empty_strided(const Tensor& like, int64_t dims, const int64_t* sizes, const int64_t* strides,
                            int32_t dtype) {
  int32_t device_type;
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, like.get_device_index(), &result));
  return Tensor(result);
}

// A contiguous (rows, columns) one with the dtype of `like`.
inline Tensor empty_matrix(const Tensor& like, int64_t rows, int64_t columns) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns > 1 ? columns : 1, 1};
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty_strided(like, 2, sizes, strides, dtype);
}
}  // namespace audiokernels
