// The passes in AVX-512; called only where the processor has it.
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "passes.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif

#define LARGEBATCH_AVX512

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
const Passes passes_avx512{"avx512", first, second, square_sum};
}  // namespace largebatch

#endif
