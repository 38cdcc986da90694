#include "instruction_sets.h"

#include <c10/util/Exception.h>

namespace largebatch {

namespace {

std::vector<const Passes*> available_passes() {
  std::vector<const Passes*> available;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (passes_avx512() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    available.push_back(passes_avx512());
  if (passes_avx2() && __builtin_cpu_supports("avx2")) available.push_back(passes_avx2());
#endif
  available.push_back(passes_portable());
  return available;
}

}  // namespace

const Passes*& passes_in_use() {
  static const Passes* passes = available_passes().front();
  return passes;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Passes* passes : available_passes()) names.push_back(passes->name);
  return names;
}

void use_instruction_set(const std::string& name) {
  for (const Passes* passes : available_passes()) {
    if (name == passes->name) {
      passes_in_use() = passes;
      return;
    }
  }
  TORCH_CHECK_VALUE(false, "instruction set ", name, " is not available on this processor");
}

}  // namespace largebatch
