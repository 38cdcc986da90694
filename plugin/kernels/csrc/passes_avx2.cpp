// The passes in AVX2; called only where the processor has it.
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "passes.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define LARGEBATCH_AVX2

namespace largebatch {
#include "vectors.h"
#include "passes.inc"
}  // namespace largebatch

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace largebatch {
const Passes passes_avx2{"avx2", first, second, square_sum};
}  // namespace largebatch

#endif
