// The module audiokernels._C: importing it registers the compiled ops with torch; it also tells how it was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "dilated_conv_update.h"
#include "isa.h"
#include "torch_stable.h"
#include "wavenet_stream.h"

namespace py = pybind11;

namespace {

std::vector<std::string> words(const char* text) {
  std::istringstream stream(text);
  std::vector<std::string> result;
  for (std::string word; stream >> word;) result.push_back(word);
  return result;
}

// The kernel of a dilated_conv_update call and why that one.
std::pair<std::string, std::string> dilated_conv_update_plan(bool cuda, bool float64, int64_t batch, int64_t dim_out,
                                                             int64_t taps, int64_t multiprocessors) {
  using Kernel = audiokernels::DilatedConvUpdateKernel;
  const std::string isa = audiokernels::isa_name(audiokernels::isa());
  switch (audiokernels::dilated_conv_update_plan(cuda, float64, batch, dim_out, taps, multiprocessors)) {
    case Kernel::cpu_loop: return {"cpu_loop", "float64 on the CPU takes a plain loop"};
    case Kernel::cuda_fused: return {"cuda_fused", "a block per batch row: few weights, or enough rows for the GPU"};
    case Kernel::cuda_split: return {"cuda_split", "a warp per output, then the ring: many weights, few rows"};
    default: return {"cpu_" + isa, "the best instruction set of this processor, or the one set by set_isa"};
  }
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled kernels of audiokernels and the facts of their build.";
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("compiler") = __VERSION__;
  m.attr("cuda_archs") = py::tuple(py::cast(words(AUDIOKERNELS_CUDA_ARCHS)));
  m.attr("cuda_note") = AUDIOKERNELS_CUDA_NOTE;

  m.def("isa", [] { return audiokernels::isa_name(audiokernels::isa()); }, "The instruction set in use.");
  m.def("set_isa", &audiokernels::set_isa, py::arg("name"),
        "Use the objects of another instruction set (the tests' hook). ValueError if this processor lacks it.");
  m.def(
      "supported_isas", [] { return py::tuple(py::cast(audiokernels::supported_isas())); },
      "The instruction sets that this processor has, the best last.");
  m.def("dilated_conv_update_plan", &dilated_conv_update_plan, py::arg("cuda"), py::arg("float64"), py::arg("batch"),
        py::arg("dim_out"), py::arg("taps"), py::arg("multiprocessors"),
        "(kernel, why) of a dilated_conv_update call; taps = dim_in * width.");

  // Host classes of the rooms.
  audiokernels::bind_wavenet_stream(m);
}
