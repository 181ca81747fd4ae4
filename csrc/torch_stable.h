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

namespace audiokernels {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
}  // namespace audiokernels
