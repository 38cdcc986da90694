// The same loops with AVX2; called only where the processor has it.
#include <algorithm>

#include "inlining.h"
#include "passes.h"

#if defined(__x86_64__) && defined(__GNUC__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif

namespace largebatch {
#include "passes.inc"
}  // namespace largebatch

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace largebatch {

const Passes* passes_avx2() {
  static const Passes passes{"avx2", first_dispatch, second_dispatch, square_sum_dispatch};
  return &passes;
}

}  // namespace largebatch

#else

namespace largebatch {

const Passes* passes_avx2() { return nullptr; }

}  // namespace largebatch

#endif
