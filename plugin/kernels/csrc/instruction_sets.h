// The passes of the instruction sets that this processor has.
#pragma once

#include <vector>

#include "passes.h"

namespace largebatch {

std::vector<const Passes*> available_passes();  // the best first

const Passes*& passes_in_use();

}  // namespace largebatch
