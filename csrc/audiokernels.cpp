// The module audiokernels._C: importing it registers the compiled ops with torch; it also tells how it was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "isa.h"
#include "torch_stable.h"

namespace py = pybind11;

namespace {

std::vector<std::string> words(const char* text) {
  std::istringstream stream(text);
  std::vector<std::string> result;
  for (std::string word; stream >> word;) result.push_back(word);
  return result;
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
  m.def("supported_isas", [] { return py::tuple(py::cast(audiokernels::supported_isas())); },
        "The instruction sets that this processor has, the best last.");

  // Rooms with host classes: declare `void bind_<room>(pybind11::module_&)` in the room's header and call it here.
}
