// The same loops with AVX512 in vectors of 512 bits; called only where the processor has it.
#include <algorithm>

#include "inlining.h"
#include "passes.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif

namespace largebatch {
#include "passes.inc"
namespace {
#include "fp32_avx512.inc"

void first_in_vectors(Algorithm algorithm, bool is_fp64, const Layer& layer, int64_t begin, int64_t end, double* sums,
                      void* kept, const Upcoming* upcoming) {
  if (!fp32::can_take(algorithm, layer)) return first_dispatch(algorithm, is_fp64, layer, begin, end, sums, kept, upcoming);
  fp32::first(algorithm, layer, begin, end, sums, static_cast<float*>(kept), upcoming);
}

void second_in_vectors(Algorithm algorithm, bool is_fp64, const Layer& layer, int64_t begin, int64_t end,
                       const void* kept, const Upcoming* upcoming) {
  if (!fp32::can_take(algorithm, layer)) return second_dispatch(algorithm, is_fp64, layer, begin, end, kept, upcoming);
  fp32::second(algorithm, layer, begin, end, static_cast<const float*>(kept), upcoming);
}
}  // namespace
}  // namespace largebatch

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace largebatch {

const Passes* passes_avx512() {
  static const Passes passes{"avx512", first_in_vectors, second_in_vectors, square_sum_dispatch};
  return &passes;
}

}  // namespace largebatch

#else

namespace largebatch {

const Passes* passes_avx512() { return nullptr; }

}  // namespace largebatch

#endif
