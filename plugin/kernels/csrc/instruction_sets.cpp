#include "instruction_sets.h"

namespace largebatch {

std::vector<const Passes*> available_passes() {
  std::vector<const Passes*> available;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool has_fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    available.push_back(&passes_avx512);
  if (has_fma) available.push_back(&passes_avx2);
#endif
  available.push_back(&passes_portable);
  return available;
}

const Passes*& passes_in_use() {
  static const Passes* passes = available_passes().front();
  return passes;
}

}  // namespace largebatch
