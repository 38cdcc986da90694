// The Python objects of a step, compared by identity with those of the last one, without touching them.
#pragma once

#include <torch/extension.h>

namespace largebatch {

void bind_objects(pybind11::module& module);

}  // namespace largebatch
