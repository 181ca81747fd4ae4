// WaveNetStream: the pack, the state and the random numbers of a generation in one object, pulled block by block.
#include "wavenet_stream.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "generation_call.h"
#include "wavenet_generate.h"

namespace py = pybind11;

namespace audiokernels {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// Philox4x32-10 (Salmon et al., SC 2011), as audiokernels/philox.py: the numbers of one stream from `position` on.
void philox_uniform(uint64_t seed, uint32_t row, int64_t position, int64_t n, float* out) {
  uint32_t words[4] = {};
  int64_t block = -1;
  for (int64_t i = 0; i < n; i++) {
    if ((position + i) / 4 != block) {
      block = (position + i) / 4;
      uint32_t c[4] = {uint32_t(block), uint32_t(uint64_t(block) >> 32), row, 0};
      uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
      for (int round = 0; round < 10; round++) {
        const uint64_t p0 = uint64_t{0xD2511F53} * c[0], p1 = uint64_t{0xCD9E8D57} * c[2];
        const uint32_t next[4] = {uint32_t(p1 >> 32) ^ c[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ k1,
                                  uint32_t(p0)};
        memcpy(c, next, sizeof c);
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
      }
      memcpy(words, c, sizeof words);
    }
    out[i] = float(words[(position + i) % 4] >> 8) * 0x1p-24f;
  }
}

class WaveNetStream {
 public:
  WaveNetStream(Array<uint8_t> weights, std::vector<int64_t> shape_ints, const Array<float>& state, uint64_t seed,
                double temperature, std::optional<int64_t> top_k, std::optional<double> top_p,
                std::optional<Array<float>> condition)
      : weights_(std::move(weights)),
        shape_ints_(std::move(shape_ints)),
        shape_(wavenet_shape(shape_ints_.data(), int64_t(shape_ints_.size()))),
        condition_(std::move(condition)),
        seed_(seed),
        sampling_(check_sampling(temperature, top_k, top_p, shape_.n_class)) {
    if (weights_.ndim() != 1 || weights_.size() != shape_.pack_bytes())
      throw std::invalid_argument("weights must hold the pack's bytes");
    if (state.ndim() != 2 || state.shape(1) != shape_.state_floats())
      throw std::invalid_argument("state must have shape (batch, " + std::to_string(shape_.state_floats()) + ")");
    if (condition_ &&
        (condition_->ndim() != 3 || condition_->shape(0) != state.shape(0) || condition_->shape(2) != shape_.condition))
      throw std::invalid_argument("condition must have shape (batch, frames, condition channels)");
    if ((shape_.condition > 0) != condition_.has_value())
      throw std::invalid_argument("condition must be given exactly for a pack with condition channels");
    batch_ = state.shape(0);
    state_.assign(state.data(), state.data() + state.size());
    check_state_header(shape_.n_class, state_.data(), batch_, shape_.state_floats());
  }

  py::array read(int64_t n) {
    if (n < 0) throw std::invalid_argument("n must be >= 0, got " + std::to_string(n));
    const bool narrow = shape_.n_class <= 256;
    py::array out = narrow ? py::array(Array<uint8_t>({batch_, n})) : py::array(Array<int16_t>({batch_, n}));
    void* data = out.mutable_data();
    const uint8_t* pack = weights_.data();
    const float* condition = condition_ ? condition_->data() : nullptr;
    const int64_t frames = condition_ ? condition_->shape(1) : 0;
    {
      py::gil_scoped_release release;
      const std::lock_guard lock(mutex_);
      generate(n, data, pack, condition, frames);
    }
    return out;
  }

  // Whoever waits for a reader lets other Python threads run.
  int64_t position() {
    const py::gil_scoped_release release;
    const std::lock_guard lock(mutex_);
    return batch_ ? state_position(state_.data()) : 0;
  }

  Array<float> state() {
    Array<float> copy({batch_, shape_.state_floats()});
    float* data = copy.mutable_data();
    {
      const py::gil_scoped_release release;
      const std::lock_guard lock(mutex_);
      std::copy(state_.begin(), state_.end(), data);
    }
    return copy;
  }

 private:
  void generate(int64_t n, void* out, const uint8_t* pack, const float* condition, int64_t frames) {
    const int64_t stride = shape_.state_floats(), channels = shape_.condition;
    std::vector<float> uniforms(size_t(batch_ * n)), part;
    GenerationJob job{};
    job.pack = pack;
    job.n_class = shape_.n_class;
    job.channels = channels;
    job.state = state_.data();
    job.state_stride = stride;
    job.batch = batch_;
    job.n = n;
    job.sampling = sampling_;
    job.out = out;
    for (int64_t b = 0; b < batch_; b++)
      philox_uniform(seed_, uint32_t(b), state_position(job.state + b * stride), n, uniforms.data() + b * n);
    job.uniforms = uniforms.data();
    if (condition) {  // the frames that these n samples touch, of each row
      job.frames = touched_frames(shape_.hop, job.state, batch_, stride, n);
      part.resize(size_t(batch_ * job.frames * channels));
      for (int64_t b = 0; b < batch_; b++) {
        const int64_t position = state_position(job.state + b * stride), first = position / shape_.hop;
        const int64_t touched = n ? (position % shape_.hop + n - 1) / shape_.hop + 1 : 0;
        if (first + touched > frames)
          throw std::invalid_argument("condition has " + std::to_string(frames) + " frames, but samples up to " +
                                      std::to_string(position + n) + " need " + std::to_string(first + touched));
        std::copy_n(condition + (b * frames + first) * channels, touched * channels,
                    part.data() + b * job.frames * channels);
      }
      job.condition = part.data();
    }
    if (n == 0 || batch_ == 0) return;
    torch::stable::parallel_for(0, batch_, 1,
                                [&](int64_t begin, int64_t end) { wavenet_run_streams(shape_, job, begin, end); });
  }

  Array<uint8_t> weights_;
  std::vector<int64_t> shape_ints_;
  WaveNetShape shape_;
  std::optional<Array<float>> condition_;
  uint64_t seed_;
  Sampling sampling_;
  int64_t batch_ = 0;
  std::vector<float> state_;
  std::mutex mutex_;
};

}  // namespace

void bind_wavenet_stream(py::module_& m) {
  py::class_<WaveNetStream>(m, "WaveNetStream")
      .def(py::init<Array<uint8_t>, std::vector<int64_t>, Array<float>, uint64_t, double, std::optional<int64_t>,
                    std::optional<double>, std::optional<Array<float>>>(),
           py::arg("weights"), py::arg("shape"), py::arg("state"), py::arg("seed"), py::arg("temperature"),
           py::arg("top_k"), py::arg("top_p"), py::arg("condition"))
      .def("read", &WaveNetStream::read, py::arg("n"))
      .def("state", &WaveNetStream::state)
      .def_property_readonly("position", &WaveNetStream::position);
}

}  // namespace audiokernels
