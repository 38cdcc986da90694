// For any processor: what the compiler makes of the loops for its default target.
#include <algorithm>

#include "inlining.h"
#include "passes.h"

namespace largebatch {
#include "passes.inc"
}  // namespace largebatch

namespace largebatch {

const Passes* passes_portable() {
  static const Passes passes{"portable", first_dispatch, second_dispatch, square_sum_dispatch};
  return &passes;
}

}  // namespace largebatch
