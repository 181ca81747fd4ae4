// A WaveNet that an audio callback pulls blocks from; see audiokernels/wavenet_stream.py.
#pragma once

#include <pybind11/pybind11.h>

namespace audiokernels {
void bind_wavenet_stream(pybind11::module_& m);
}
