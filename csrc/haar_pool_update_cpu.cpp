// haar_pool_update on the CPU: checks, registration, and rows in and out of float32. A step is *_simd.cpp's.
#include "haar_cpu.h"

namespace audiokernels {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

auto* pick_update() {
#define AUDIOKERNELS_CASE(name) \
  case Isa::name: return &name::haar_pool_update;
  switch (float_isa()) {
    AUDIOKERNELS_FOR_EACH_FLOAT_ISA(AUDIOKERNELS_CASE)
    default: return &generic::haar_pool_update;
  }
#undef AUDIOKERNELS_CASE
}

int64_t state_slots(const std::vector<int64_t>& runs) {
  int64_t slots = 0;
  for (size_t i = 0; i < runs.size(); i += 2) {
    const int64_t rows = runs[i] == 0 ? 0 : runs[i] < 0 ? 2 : (int64_t(1) << runs[i]) + 1;
    int64_t more;
    STD_TORCH_CHECK(!__builtin_mul_overflow(rows, runs[i + 1], &more) && !__builtin_add_overflow(slots, more, &slots),
                    "state must have shape (batch, slots) of haar_pool_state");
  }
  return slots;
}

void check(const Tensor& x, const Tensor& state, const Tensor& position, const std::vector<int64_t>& runs) {
  check_rows(x, "x", 2);
  check_runs(runs, x.size(1));
  const bool float64 = x.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(!state.is_cuda() && !position.is_cuda(), "all tensors must be on the device of x");
  STD_TORCH_CHECK(state.scalar_type() == (float64 ? ScalarType::Double : ScalarType::Float),
                  "state must be float32 (float64 for x of float64)");
  STD_TORCH_CHECK(state.dim() == 2 && state.size(0) == x.size(0) && state.size(1) == state_slots(runs),
                  "state must have shape (batch, slots) of haar_pool_state");
  for (int i = 0; i < 2; i++)
    STD_TORCH_CHECK(state.size(i) <= 1 || state.stride(i) != 0, "state must not be an expanded view");
  STD_TORCH_CHECK(position.dim() == 1 && position.size(0) == x.size(0) && position.scalar_type() == ScalarType::Int,
                  "position must have shape (batch,), int32");
}

// T is x's number, S the state's.
template <class T, class S>
void update_batch(const Tensor& x, const Tensor& state, const Tensor& position, const Tensor& out, HaarUpdate call) {
  const int64_t dim = x.size(1), x_stride[] = {x.stride(0), x.stride(1)}, state_stride = state.stride(0);
  const int64_t position_stride = position.stride(0);
  const T* x_data = static_cast<const T*>(x.data_ptr());
  const int32_t* position_data = static_cast<const int32_t*>(position.data_ptr());
  T* out_data = static_cast<T*>(out.data_ptr());
  S* state_data = static_cast<S*>(state.data_ptr());
  const auto update = pick_update();
  torch::stable::parallel_for(0, x.size(0), kHaarGrain / dim + 1, [&](int64_t first, int64_t last) {
    const Floats memory = new_floats(2 * dim);
    S* row = reinterpret_cast<S*>(memory.get());
    for (int64_t b = first; b < last; b++) {
      for (int64_t i = 0; i < dim; i++) row[i] = S(x_data[b * x_stride[0] + i * x_stride[1]]);
      HaarUpdate one = call;
      one.position = position_data[b * position_stride];
      one.x = row, one.state = state_data + b * state_stride;
      update(one);
      for (int64_t i = 0; i < dim; i++) out_data[b * dim + i] = T(row[i]);
    }
  });
}

Tensor haar_pool_update(Tensor x, Tensor state, Tensor position, std::vector<int64_t> runs, bool count,
                        int64_t seqlen) {
  check(x, state, position, runs);
  bool endless = false;
  for (size_t i = 0; i < runs.size(); i += 2) endless |= runs[i] < 0 && runs[i + 1] > 0;
  STD_TORCH_CHECK(seqlen >= (endless && !count), "seqlen must be >= 0, and >= 1 where it is divided by, got ", seqlen);
  const int32_t* steps = static_cast<const int32_t*>(position.data_ptr());
  for (int64_t b = 0; b < x.size(0); b++) STD_TORCH_CHECK(steps[b * position.stride(0)] >= 0, "position must be >= 0");
  Tensor out = empty_matrix(x, x.size(0), x.size(1));
  if (x.numel() == 0) return out;
  HaarUpdate call{};
  call.float64 = x.scalar_type() == ScalarType::Double, call.count = count, call.seqlen = seqlen;
  call.runs = runs.data(), call.n_runs = int64_t(runs.size() / 2);
  const bool direct = state.size(1) <= 1 || state.stride(1) == 1;
  Tensor slots = direct ? state : torch::stable::contiguous(state);
  switch (x.scalar_type()) {
    case ScalarType::Double: update_batch<double, double>(x, slots, position, out, call); break;
    case ScalarType::BFloat16: update_batch<BFloat16, float>(x, slots, position, out, call); break;
    case ScalarType::Half: update_batch<Half, float>(x, slots, position, out, call); break;
    default: update_batch<float, float>(x, slots, position, out, call);
  }
  if (!direct) torch::stable::copy_(state, slots);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(audiokernels, CPU, m) { m.impl("haar_pool_update", TORCH_BOX(&haar_pool_update)); }

}  // namespace audiokernels
