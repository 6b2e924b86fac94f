// Shared by the files that use pybind11.
#pragma once

#include <pybind11/pybind11.h>

namespace pmc {

// Throws if this processor lacks an instruction set.
void check_isa(int isa);

// The layers of a model: linear, norms, activations.
void bind_layers(pybind11::module_& module);

}  // namespace pmc
