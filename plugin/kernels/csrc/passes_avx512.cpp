// The same loops with AVX512 in vectors of 512 bits; called only where the processor has it.
#include "passes.h"

#if defined(__x86_64__) && defined(__GNUC__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
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

const Passes* passes_avx512() {
  static const Passes passes{"avx512", first_dispatch, second_dispatch, square_sum_dispatch};
  return &passes;
}

}  // namespace largebatch

#else

namespace largebatch {

const Passes* passes_avx512() { return nullptr; }

}  // namespace largebatch

#endif
