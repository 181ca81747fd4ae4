// dilated_conv_update on the CPU: checks, registration, and what surrounds the row dots of *_simd.cpp.
#include <memory>

#include "dilated_conv_update.h"

namespace audiokernels {
namespace {

constexpr int64_t kStackFloats = 4096;
constexpr int64_t kParallelWork = 1 << 17;  // multiply-adds below which a second thread costs more than it saves

auto* pick_dots() {
#define AUDIOKERNELS_CASE(name) \
  case Isa::name: return &name::dilated_conv_dots;
  switch (float_isa()) {
    AUDIOKERNELS_FOR_EACH_FLOAT_ISA(AUDIOKERNELS_CASE)
    default: return &generic::dilated_conv_dots;
  }
#undef AUDIOKERNELS_CASE
}

// taps[b][i][k]: the input channel i of batch row b, width - 1 - k dilations ago; the order of a weight row.
template <class T, class Acc>
void gather_taps(const DilatedConvUpdate& c, Acc* taps) {
  const T* x = static_cast<const T*>(c.x);
  const T* state = static_cast<const T*>(c.conv_state);
  for (int64_t b = 0; b < c.batch; b++, taps += c.taps) {
    const int64_t position = c.position[b * c.position_stride];
    for (int64_t k = 0; k < c.width - 1; k++) {
      const int64_t slot = (position + k * c.dilation) % c.length;
      const T* past = state + b * c.state_stride[0] + slot * c.state_stride[1];
      for (int64_t i = 0; i < c.dim_in; i++) taps[i * c.width + k] = Acc(past[i * c.state_stride[2]]);
    }
    const T* now = x + b * c.x_stride[0];
    for (int64_t i = 0; i < c.dim_in; i++) taps[i * c.width + c.width - 1] = Acc(now[i * c.x_stride[1]]);
  }
}

template <class T, class Acc>
void add_bias(const DilatedConvUpdate& c, const Acc* sums) {
  T* out = static_cast<T*>(c.out);
  const T* bias = static_cast<const T*>(c.bias);
  for (int64_t b = 0; b < c.batch; b++) {
    for (int64_t r = 0; r < c.dim_out; r++) {
      const int64_t at = b * c.dim_out + r;
      out[at] = T(bias ? sums[at] + Acc(bias[r * c.bias_stride]) : sums[at]);
    }
  }
}

// The oldest slot takes the new input.
template <class T>
void write_ring(const DilatedConvUpdate& c) {
  if (c.length == 0) return;
  const T* x = static_cast<const T*>(c.x);
  T* state = static_cast<T*>(c.conv_state);
  for (int64_t b = 0; b < c.batch; b++) {
    const int64_t slot = c.position[b * c.position_stride] % c.length;
    T* oldest = state + b * c.state_stride[0] + slot * c.state_stride[1];
    for (int64_t i = 0; i < c.dim_in; i++) oldest[i * c.state_stride[2]] = x[b * c.x_stride[0] + i * c.x_stride[1]];
  }
}

template <class T>
void run_simd(const DilatedConvUpdate& c, Dtype dtype) {
  const bool direct = dtype == Dtype::float32;  // the sums need no second buffer
  const int64_t n_taps = c.batch * c.taps;
  const int64_t n_scratch = n_taps + (direct ? 0 : c.batch * c.dim_out);
  float stack[kStackFloats];
  std::unique_ptr<float[]> heap(n_scratch > kStackFloats ? new float[n_scratch] : nullptr);
  float* taps = heap ? heap.get() : stack;
  float* sums = direct ? static_cast<float*>(c.out) : taps + n_taps;

  gather_taps<T>(c, taps);
  const auto dots = pick_dots();
  const RowDots call{c.weight, c.weight_stride, taps, c.taps, c.batch, c.dim_out, sums};
  const auto rows = [&](int64_t first, int64_t last) { dots(dtype, call, first, last); };
  const int64_t work = n_taps * c.dim_out;
  if (work < kParallelWork) {
    rows(0, c.dim_out);
  } else {
    torch::stable::parallel_for(0, c.dim_out, c.dim_out * kParallelWork / work + 1, rows);
  }
  if (c.bias || !direct) add_bias<T>(c, sums);
  write_ring<T>(c);
}

void run_double(const DilatedConvUpdate& c) {
  std::unique_ptr<double[]> scratch(new double[c.batch * (c.taps + c.dim_out)]);
  double* taps = scratch.get();
  double* sums = taps + c.batch * c.taps;
  gather_taps<double>(c, taps);
  const double* weight = static_cast<const double*>(c.weight);
  for (int64_t b = 0; b < c.batch; b++) {
    for (int64_t r = 0; r < c.dim_out; r++) {
      double sum = 0;
      for (int64_t j = 0; j < c.taps; j++) sum += weight[r * c.weight_stride + j] * taps[b * c.taps + j];
      sums[b * c.dim_out + r] = sum;
    }
  }
  add_bias<double>(c, sums);
  write_ring<double>(c);
}

Tensor dilated_conv_update(Tensor x, Tensor conv_state, Tensor weight, std::optional<Tensor> bias, Tensor position,
                           int64_t dilation) {
  Tensor out = x;
  const DilatedConvUpdate call = dilated_conv_update_check(x, conv_state, weight, bias, position, dilation, out);
  for (int64_t b = 0; b < call.batch; b++) {
    STD_TORCH_CHECK(call.position[b * call.position_stride] >= 0, "position must be >= 0");
  }
  const Dtype dtype = dtype_of(x.scalar_type());
  const bool float64 = dtype == Dtype::float64;
  if (dilated_conv_update_plan(false, float64, call.batch, call.dim_out, call.taps, 0) ==
      DilatedConvUpdateKernel::cpu_loop) {
    run_double(call);
  } else if (dtype == Dtype::float32) {
    run_simd<float>(call, dtype);
  } else if (dtype == Dtype::bfloat16) {
    run_simd<torch::headeronly::BFloat16>(call, dtype);
  } else {
    run_simd<torch::headeronly::Half>(call, dtype);
  }
  return out;
}

}  // namespace

DilatedConvUpdate dilated_conv_update_check(const Tensor& x, const Tensor& conv_state, Tensor& weight,
                                            const std::optional<Tensor>& bias, const Tensor& position, int64_t dilation,
                                            Tensor& out) {
  DilatedConvUpdate c{};
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
                      dtype == ScalarType::Double,
                  "x must be float32, bfloat16, float16 or float64");
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions (batch, dim_in)");
  STD_TORCH_CHECK(weight.dim() == 3, "weight must have 3 dimensions (dim_out, dim_in, width)");
  STD_TORCH_CHECK(conv_state.dim() == 3, "conv_state must have 3 dimensions (batch, (width - 1) * dilation, dim_in)");
  STD_TORCH_CHECK(position.dim() == 1, "position must have 1 dimension (batch,)");
  STD_TORCH_CHECK(weight.scalar_type() == dtype, "weight must have the dtype of x");
  STD_TORCH_CHECK(conv_state.scalar_type() == dtype, "conv_state must have the dtype of x");
  STD_TORCH_CHECK(position.scalar_type() == ScalarType::Int, "position must be int32");
  const bool cuda = x.is_cuda();
  const int32_t device = x.get_device_index();
  const auto same_device = [&](const Tensor& t) { return t.is_cuda() == cuda && t.get_device_index() == device; };
  STD_TORCH_CHECK(
      same_device(conv_state) && same_device(weight) && same_device(position) && (!bias || same_device(*bias)),
      "all tensors must be on the device of x");

  c.batch = x.size(0);
  c.dim_in = x.size(1);
  c.dim_out = weight.size(0);
  c.width = weight.size(2);
  c.dilation = dilation;
  c.taps = c.dim_in * c.width;
  STD_TORCH_CHECK(c.width >= 1, "weight must have a width >= 1");
  STD_TORCH_CHECK(dilation >= 1 && !__builtin_mul_overflow(c.width - 1, dilation, &c.length), "dilation must be >= 1");
  STD_TORCH_CHECK(weight.size(1) == c.dim_in, "weight.shape[1] must be dim_in, as x has it");
  STD_TORCH_CHECK(conv_state.size(0) == c.batch && conv_state.size(1) == c.length && conv_state.size(2) == c.dim_in,
                  "conv_state must have shape (batch, (width - 1) * dilation, dim_in)");
  STD_TORCH_CHECK(position.size(0) == c.batch, "position must have shape (batch,)");
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == dtype, "bias must have the dtype of x");
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == c.dim_out, "bias must have shape (dim_out,)");
    c.bias = bias->data_ptr();
    c.bias_stride = bias->stride(0);
  }
  for (int i = 0; i < 2; i++) c.x_stride[i] = x.stride(i);
  for (int i = 0; i < 3; i++) {
    c.state_stride[i] = conv_state.stride(i);
    STD_TORCH_CHECK(c.state_stride[i] != 0 || conv_state.size(i) <= 1, "conv_state must not be an expanded view");
  }
  if ((c.width > 1 && weight.stride(2) != 1) || (c.dim_in > 1 && weight.stride(1) != c.width)) {
    weight = torch::stable::contiguous(weight);
  }
  c.weight_stride = weight.stride(0);
  c.position_stride = position.stride(0);
  out = empty_matrix(x, c.batch, c.dim_out);
  c.x = x.data_ptr();
  c.conv_state = conv_state.data_ptr();
  c.weight = weight.data_ptr();
  c.position = static_cast<const int32_t*>(position.data_ptr());
  c.out = out.data_ptr();
  return c;
}

STABLE_TORCH_LIBRARY_IMPL(audiokernels, CPU, m) { m.impl("dilated_conv_update", TORCH_BOX(&dilated_conv_update)); }

}  // namespace audiokernels
