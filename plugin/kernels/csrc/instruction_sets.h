// The passes of each instruction set that this processor has; one of them is in use.
#pragma once

#include <string>
#include <vector>

#include "passes.h"

namespace largebatch {

const Passes*& passes_in_use();

std::vector<std::string> instruction_sets();  // the fastest first

void use_instruction_set(const std::string& name);

}  // namespace largebatch
